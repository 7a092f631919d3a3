"""Name movers: the heads that copy the right name to the end of an IOI prompt, found in three ways and then removed.

Direct logit attribution measures what each head's output adds to the answer's logit; patching, what the logit loses
when the head writes its output from a prompt about other people; path patching, the part of that loss that goes
straight to the logits (Wang et al. 2022, "Interpretability in the Wild"). The heads with the largest direct effect are
the name movers. Removing them has to remove the behaviour, and removing as many other heads must not.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm import metrics
from hooked_lm.circuits.direct_logit import hooks_for_attribution, logit_attribution
from hooked_lm.circuits.induction import Head
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooked_model import HookedModel
from hooked_lm.interventions import Intervention
from hooked_lm.names import get_act_name
from hooked_lm.patching import get_act_patch_attn_head_out_all_pos, path_patch_heads
from hooked_lm.sweep import sweep
from hooked_lm.tasks import TaskSet

__all__ = ["NameMovers", "find_name_movers"]


@dataclass(frozen=True, eq=False)
class NameMovers:
    """Three measures of every head, and the accuracy without the heads with the largest direct effect.

    Logits are the answer's. With the unembedding centred, as `from_pretrained` does, they are relative to the mean.

    Attributes:
        attribution: what each head adds to the logit, [layer head].
        patched: what the logit loses when a head writes its output from the corrupted prompts, [layer head].
        direct: the part of that loss on the direct path to the logits, [layer head].
        movers: the heads of the largest direct effect, the largest first.
        logit: the mean over the clean prompts.
        accuracy: share of clean prompts whose answer is the likeliest token.
        accuracy_without: the same when the movers write, at each position, their mean over the corrupted prompts.
        accuracy_without_others: the same for as many other heads, for each draw of them, [draw].
    """

    attribution: Float[Tensor, "layer head"]
    patched: Float[Tensor, "layer head"]
    direct: Float[Tensor, "layer head"]
    movers: tuple[Head, ...]
    logit: float
    accuracy: float
    accuracy_without: float
    accuracy_without_others: Float[Tensor, " draw"]

    def agreement(self) -> float:
        """Return the correlation of direct attribution and direct path over all heads."""
        return float(torch.corrcoef(torch.stack([self.attribution.flatten(), self.direct.flatten()]))[0, 1])

    def ranks(self) -> dict[str, list[int]]:
        """Return the rank of each mover among all heads by each measure, 0 for the first."""
        measures = {"attribution": self.attribution, "patched": self.patched, "direct": self.direct}
        return {name: [int((grid > grid[head]).sum()) for head in self.movers] for name, grid in measures.items()}


@torch.no_grad()
def find_name_movers(
    model: HookedModel, examples: TaskSet, *, n_heads: int = 3, n_draws: int = 20, seed: int = 0, verbose: bool = True
) -> NameMovers:
    """Find the heads that move the name to the end, and measure the accuracy without them.

    Args:
        model: a `HookedTransformer` with a tokenizer.
        examples: pairs of one length whose corrupted prompt is about other people, such as
            `get_task("ioi").examples(50, template=0, corruption="unrelated")`.
        n_heads: how many heads to remove.
        n_draws: how many random sets of as many other heads are removed for comparison.
        seed: of the random sets.
        verbose: show progress bars.

    Raises:
        ValueError: prompts of several lengths, or more heads than half of the model's.
    """
    cfg, tokens = model.cfg, examples.tokens(model)
    if not 1 <= n_heads <= cfg.n_layers * cfg.n_heads // 2:
        raise ValueError(f"n_heads is in 1-{cfg.n_layers * cfg.n_heads // 2}, half of the heads; got {n_heads}")
    metric = metrics.logit(tokens.answers)
    logits, cache = model.run_with_cache(tokens.clean, names_filter=hooks_for_attribution(model, "head"))
    sites = [get_act_name("z", layer) for layer in range(cfg.n_layers)]
    _, corrupted = model.run_with_cache(tokens.corrupted, names_filter=sites)
    clean = float(metric(logits))
    # Noising: the clean run, with a head's output from a prompt about other people.
    patched = clean - get_act_patch_attn_head_out_all_pos(model, tokens.clean, corrupted, metric, verbose=verbose)
    direct = clean - path_patch_heads(model, tokens.clean, corrupted, metric, "logits", verbose=verbose)
    movers = tuple(divmod(index, cfg.n_heads) for index in direct.flatten().topk(n_heads).indices.tolist())
    sets = [(), movers, *_others(cfg, movers, n_draws, seed)]
    cells = [
        [Intervention.mean(("z", layer), corrupted, per_position=True, head=head) for layer, head in heads]
        for heads in sets
    ]
    accuracies = sweep(model, tokens.clean, cells, metrics.accuracy(tokens.answers), verbose=verbose)
    return NameMovers(
        attribution=logit_attribution(cache, tokens.answers, split="head").grid.mean(-1),
        patched=patched,
        direct=direct,
        movers=movers,
        logit=clean,
        accuracy=float(accuracies[0]),
        accuracy_without=float(accuracies[1]),
        accuracy_without_others=accuracies[2:],
    )


def _others(cfg: HookedTransformerConfig, movers: tuple[Head, ...], n_draws: int, seed: int) -> list[tuple[Head, ...]]:
    """Random sets of as many heads, without the movers."""
    left = [head for head in itertools.product(range(cfg.n_layers), range(cfg.n_heads)) if head not in movers]
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(left[index] for index in torch.randperm(len(left), generator=generator)[: len(movers)])
        for _ in range(n_draws)
    ]
