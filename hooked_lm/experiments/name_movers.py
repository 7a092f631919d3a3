"""Name movers: the heads that copy the right name to the end of an IOI prompt, found in three ways and then removed.

Direct logit attribution asks what each head's output adds to the logit difference; patching what its clean output
brings back in a corrupted run; path patching what of that goes straight to the logits (Wang et al. 2022). Where they
agree, removing the heads has to take the behaviour away, and removing as many others must not.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm import metrics
from hooked_lm.circuits.direct_logit import hooks_for_attribution, logit_attribution
from hooked_lm.circuits.induction import Head
from hooked_lm.interventions import Intervention
from hooked_lm.names import get_act_name
from hooked_lm.patching import get_act_patch_attn_head_out_all_pos, path_patch_heads
from hooked_lm.sweep import sweep
from hooked_lm.tasks import TaskSet


@dataclass(frozen=True, eq=False)
class NameMovers:
    """Three measures of every head, and what the heads they name are needed for. Logit differences throughout.

    Attributes:
        attribution: what each head adds to the clean prompts' logit difference, [layer head].
        patched: how much of the way from corrupted (0) to clean (1) each head's output brings back, [layer head].
        direct: the same by its direct path to the logits alone, [layer head].
        movers: the heads of the largest direct effect, the largest first.
        clean, corrupted: mean logit differences.
        without: the clean prompts' when the movers write their mean over corrupted prompts instead.
        without_others: the same for as many other heads, for each draw of them, [draw].
        accuracy, accuracy_without: share of clean prompts in which the answer has the higher logit, intact and without
            the movers.
        accuracy_without_others: without others, [draw].
    """

    attribution: Float[Tensor, "layer head"]
    patched: Float[Tensor, "layer head"]
    direct: Float[Tensor, "layer head"]
    movers: tuple[Head, ...]
    clean: float
    corrupted: float
    without: float
    without_others: Float[Tensor, " draw"]
    accuracy: float
    accuracy_without: float
    accuracy_without_others: Float[Tensor, " draw"]

    def agreement(self) -> dict[str, float]:
        """Return how alike two measures are over all heads: their correlations, by name."""
        measures = {"attribution": self.attribution, "patched": self.patched, "direct": self.direct}
        return {
            f"{one}, {other}": float(
                torch.corrcoef(torch.stack([measures[one].flatten(), measures[other].flatten()]))[0, 1]
            )
            for one, other in itertools.combinations(measures, 2)
        }


@torch.no_grad()
def find_name_movers(
    model: Any, examples: TaskSet, *, n_heads: int = 3, n_draws: int = 20, seed: int = 0, verbose: bool = True
) -> NameMovers:
    """Find the heads that move the name to the end, and remove them.

    Args:
        model: a `HookedTransformer` with a tokenizer.
        examples: pairs whose prompts have one length, such as `get_task("ioi").examples(50, template=0)`.
        n_heads: how many heads to remove.
        n_draws: how often as many others are drawn for comparison.
        seed: of the draws.
        verbose: show progress bars.

    Raises:
        ValueError: prompts of several lengths, or more heads than half of the model's.
    """
    cfg, tokens = model.cfg, examples.tokens(model)
    if not 1 <= n_heads <= cfg.n_layers * cfg.n_heads // 2:
        raise ValueError(f"n_heads is in 1-{cfg.n_layers * cfg.n_heads // 2}, half of the heads; got {n_heads}")
    metric = metrics.logit_diff(tokens.answers, tokens.wrong)
    wanted = {*hooks_for_attribution(model, "head"), *(get_act_name("z", layer) for layer in range(cfg.n_layers))}
    logits, cache = model.run_with_cache(tokens.clean, names_filter=sorted(wanted))
    corrupted_logits, corrupted_cache = model.run_with_cache(tokens.corrupted, names_filter="blocks.*.attn.hook_z")
    clean, corrupted = float(metric(logits)), float(metric(corrupted_logits))
    attributed = logit_attribution(cache, tokens.answers, tokens.wrong, split="head")
    grids = [
        measure(model, tokens.corrupted, cache, metric, *more, verbose=verbose)
        for measure, more in ((get_act_patch_attn_head_out_all_pos, ()), (path_patch_heads, ("logits",)))
    ]
    patched, direct = ((grid - corrupted) / (clean - corrupted) for grid in grids)
    movers = tuple(divmod(index, cfg.n_heads) for index in direct.flatten().topk(n_heads).indices.tolist())
    sets = [movers, *_others(cfg, movers, n_draws, seed)]
    cells = [
        [Intervention.mean(("z", layer), corrupted_cache, per_position=True, head=head) for layer, head in heads]
        for heads in sets
    ]
    found = sweep(model, tokens.clean, cells, metric, per_prompt=True, verbose=verbose)
    return NameMovers(
        attribution=attributed.grid.mean(-1),
        patched=patched,
        direct=direct,
        movers=movers,
        clean=clean,
        corrupted=corrupted,
        without=float(found[0].mean()),
        without_others=found[1:].mean(-1),
        accuracy=(metric.per_prompt(logits) > 0).double().mean().item(),
        accuracy_without=(found[0] > 0).double().mean().item(),
        accuracy_without_others=(found[1:] > 0).double().mean(-1),
    )


def _others(cfg: Any, movers: tuple[Head, ...], n_draws: int, seed: int) -> list[tuple[Head, ...]]:
    """As many heads that are none of the movers, drawn several times."""
    left = [head for head in itertools.product(range(cfg.n_layers), range(cfg.n_heads)) if head not in movers]
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(left[index] for index in torch.randperm(len(left), generator=generator)[: len(movers)])
        for _ in range(n_draws)
    ]
