"""Repeated random tokens: how much better the second half is predicted, by which heads, and whether MLPs matter.

Random tokens that come twice can only be predicted by looking back. An induction head attends to the token after the
earlier copy of the current token, which it finds by the output of a previous-token head at that position (Olsson et al.
2022, "In-context Learning and Induction Heads").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm.circuits.full_circuits import top1_accuracy
from hooked_lm.circuits.induction import (
    Head,
    induction_scores,
    k_composition_qk_circuit,
    next_token_scores,
    previous_token_scores,
    repeated_random_tokens,
)
from hooked_lm.hooked_model import HookedModel
from hooked_lm.interventions import Intervention
from hooked_lm.names import get_act_name

__all__ = ["Repeats", "continue_repeats"]


@dataclass(frozen=True, eq=False)
class Repeats:
    """How a model predicts random tokens that come twice. Log-probabilities are means, in nats.

    Attributes:
        length, n_prompts: the tokens in a half, and the number of sequences.
        first_log_prob, first_accuracy, second_log_prob, second_accuracy: of the two halves.
        induction_scores, previous_token_scores: [layer head].
        induction_head: the head with the highest induction score.
        previous_token_head: the highest previous-token score in the layers below; None if the induction head is in
            layer 0.
        log_prob_without_mlp, accuracy_without_mlp: of the second half, when one layer's MLP writes there its output at
            the same place of the first half, [layer].
        circuit_accuracy: top-1 accuracy of the two heads' full QK circuit over the vocabulary: the share of tokens for
            which the key with the highest score is the one that follows that same token. None without a pair.
        effective_accuracy: the same with the query token as it is after the first MLP; None also without MLPs.
    """

    length: int
    n_prompts: int
    first_log_prob: float
    first_accuracy: float
    second_log_prob: float
    second_accuracy: float
    induction_scores: Float[Tensor, "layer head"]
    previous_token_scores: Float[Tensor, "layer head"]
    induction_head: Head
    previous_token_head: Head | None
    log_prob_without_mlp: Float[Tensor, " layer"]
    accuracy_without_mlp: Float[Tensor, " layer"]
    circuit_accuracy: float | None
    effective_accuracy: float | None


@torch.no_grad()
def continue_repeats(
    model: HookedModel, *, n_prompts: int = 30, length: int = 50, seed: int = 0, verbose: bool = True
) -> Repeats:
    """Run a model on repeated random tokens, and find the heads that continue the repeat.

    Args:
        model: a `HookedTransformer`.
        n_prompts, length: the number of sequences, and of tokens in each half.
        seed: of the tokens.
        verbose: show progress bars.

    Raises:
        ValueError: `2 * length + 1` positions are more than the model takes, or it has no layers.
    """
    bos = getattr(model.tokenizer, "bos_token_id", None)
    tokens = repeated_random_tokens(
        n_prompts, length, model.cfg.d_vocab, torch.Generator().manual_seed(seed), 0 if bos is None else int(bos)
    )
    # BOS is often the padding token too: by the mask the model reads it as a token.
    mask = torch.ones_like(tokens)
    writes = [] if model.cfg.attn_only else [get_act_name("mlp_out", layer) for layer in range(model.cfg.n_layers)]
    wanted = ["blocks.*.attn.hook_pattern", *writes]
    logits, cache = model.run_with_cache(tokens, names_filter=wanted, attention_mask=mask)
    scores = next_token_scores(logits, tokens)
    induction, previous = induction_scores(cache, length), previous_token_scores(cache)
    head = divmod(int(induction.argmax()), model.cfg.n_heads)
    below = previous[: head[0]]
    writer = divmod(int(below.argmax()), model.cfg.n_heads) if len(below) else None
    without = [_second_half_without(model, tokens, mask, site, cache[site], length) for site in writes]
    accuracies = [
        None
        if writer is None or (effective and not writes)
        else top1_accuracy(
            k_composition_qk_circuit(model, writer, head, effective_embedding=effective), verbose=verbose
        )
        for effective in (False, True)
    ]
    return Repeats(
        length=length,
        n_prompts=n_prompts,
        first_log_prob=scores.first_half().mean_log_prob(),
        first_accuracy=scores.first_half().accuracy(),
        second_log_prob=scores.second_half().mean_log_prob(),
        second_accuracy=scores.second_half().accuracy(),
        induction_scores=induction,
        previous_token_scores=previous,
        induction_head=head,
        previous_token_head=writer,
        log_prob_without_mlp=torch.tensor([one[0] for one in without]),
        accuracy_without_mlp=torch.tensor([one[1] for one in without]),
        circuit_accuracy=accuracies[0],
        effective_accuracy=accuracies[1],
    )


def _second_half_without(
    model: HookedModel, tokens: Tensor, mask: Tensor, site: str, written: Tensor, length: int
) -> tuple[float, float]:
    """Log-probability and accuracy when an MLP writes in the repeat its output of the first time."""
    repeat = tuple(range(length + 1, 2 * length + 1))
    frozen = Intervention(site, "replace", written[:, 1 : length + 1], pos=repeat)
    scores = next_token_scores(model.run(tokens, interventions=[frozen], attention_mask=mask), tokens).second_half()
    return scores.mean_log_prob(), scores.accuracy()
