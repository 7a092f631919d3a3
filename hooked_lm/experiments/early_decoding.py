"""Early decoding: at which layer can the answer be read from the residual stream, and what does each MLP add to it?

The stream of every layer is read out as if it were the last (nostalgebraist 2020, "interpreting GPT: the logit lens").
An answer that appears from one layer to the next was put there by what that layer adds; taking one MLP's update away
shows whether the answer needs it (Merullo et al. 2023, "Language Models Implement Simple Word2Vec-style Vector
Arithmetic", on capitals in GPT-2 medium).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_lm import metrics
from hooked_lm.circuits.logit_lens import logit_lens
from hooked_lm.hooked_model import HookedModel
from hooked_lm.interventions import Intervention
from hooked_lm.names import get_act_name
from hooked_lm.sweep import sweep
from hooked_lm.tasks import TaskSet

__all__ = ["EarlyDecoding", "decode_early"]


@dataclass(frozen=True, eq=False)
class EarlyDecoding:
    """When the answer can be read at the last position, and how likely it is without single MLPs.

    Attributes:
        labels: where the stream was read: `"0_pre"`, `"0_mid"`, `"0_post"`, ...
        ranks: the answer's rank there, 0 where it is the likeliest, [site prompt].
        log_probs: the answer's log-probability there, in nats, [site prompt].
        top: the likeliest token of the first prompt at each site, as a string.
        prompt, answer: the first prompt and its answer.
        ranks_without, log_probs_without: the answer's at the model's output, when the MLP of one layer adds nothing at
            the last position, [layer prompt].
    """

    labels: tuple[str, ...]
    ranks: Int[Tensor, "site prompt"]
    log_probs: Float[Tensor, "site prompt"]
    top: tuple[str, ...]
    prompt: str
    answer: str
    ranks_without: Int[Tensor, "layer prompt"]
    log_probs_without: Float[Tensor, "layer prompt"]

    @property
    def median_rank(self) -> Float[Tensor, " site"]:
        """The median rank over prompts."""
        return self.ranks.double().quantile(0.5, dim=-1)

    @property
    def probability(self) -> Float[Tensor, " site"]:
        """The answer's mean probability over prompts."""
        return self.log_probs.exp().mean(-1)

    @property
    def probability_without(self) -> Float[Tensor, " layer"]:
        """The answer's mean probability over prompts, when one MLP adds nothing."""
        return self.log_probs_without.exp().mean(-1)

    @property
    def top_share_without(self) -> Float[Tensor, " layer"]:
        """Share of prompts whose answer is still the likeliest when one MLP adds nothing."""
        return (self.ranks_without == 0).double().mean(-1)

    @property
    def decisive_mlp(self) -> int:
        """The layer without whose MLP the answer is least likely."""
        return int(self.probability_without.argmin())

    def appears_at(self, prompt: int = 0) -> str | None:
        """Return the site from which on the answer is the likeliest token of a prompt, or None if it never is."""
        right = (self.ranks[:, prompt] == 0).tolist()
        if not right[-1]:
            return None
        return self.labels[len(right) - next((i for i, one in enumerate(right[::-1]) if not one), len(right))]


@torch.no_grad()
def decode_early(model: HookedModel, examples: TaskSet, *, verbose: bool = True) -> EarlyDecoding:
    """Read the answers from every layer, and again without each MLP.

    Args:
        model: a `HookedTransformer` with a tokenizer and MLPs.
        examples: prompts of any lengths with their answers, such as `get_task("capitals").examples()`.
        verbose: show progress bars.

    Raises:
        ValueError: the model has no MLPs, or its tokenizer does not suit the examples.
    """
    if model.cfg.attn_only:
        raise ValueError("early decoding takes away what single MLPs add, and this model has none")
    lenses, ranks, log_probs = [], [], []
    groups = examples.groups(model.tokenizer)
    cells = [Intervention(get_act_name("mlp_out", layer), "zero", pos=-1) for layer in range(model.cfg.n_layers)]
    for group in groups:
        tokens = group.tokens(model)
        lens = logit_lens(model, tokens.clean, targets=tokens.answers[:, None], positions=-1, top_k=1, verbose=False)
        lenses.append(lens)
        ranks.append(sweep(model, tokens.clean, cells, metrics.rank(tokens.answers), per_prompt=True, verbose=verbose))
        log_probs.append(
            sweep(model, tokens.clean, cells, metrics.log_prob(tokens.answers), per_prompt=True, verbose=verbose)
        )
    first = lenses[0]
    return EarlyDecoding(
        labels=first.labels,
        ranks=torch.cat([lens.target_ranks[:, :, 0, 0] for lens in lenses], -1),
        log_probs=torch.cat([lens.target_log_probs[:, :, 0, 0] for lens in lenses], -1),
        top=tuple((first.strings or {})[int(token)] for token in first.top_tokens[:, 0, 0, 0]),
        prompt=groups[0].clean[0],
        answer=groups[0].answers[0],
        ranks_without=torch.cat(ranks, -1).long(),
        log_probs_without=torch.cat(log_probs, -1),
    )
