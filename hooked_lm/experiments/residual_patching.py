"""Residual patching on indirect object identification: where in the run are the two names told apart?

"When John and Mary went to the store, John gave a drink to" ends in " Mary"; with the other name as the giver it ends
in " John" (Wang et al. 2022, "Interpretability in the Wild"). Putting the clean run's stream into the corrupted one, at
one layer and position at a time, shows where the difference between the prompts is carried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm import metrics
from hooked_lm.hooked_model import HookedModel
from hooked_lm.patching.statistics import PairScores, patch_pairs
from hooked_lm.tasks import TaskSet

__all__ = ["IOIPatching", "patch_ioi"]


@dataclass(frozen=True, eq=False)
class IOIPatching:
    """Logit differences (answer less the other name), and what patching the stream brings back.

    Attributes:
        clean, corrupted: each prompt's logit difference, [prompt].
        accuracy: share of clean prompts in which the answer has the higher logit.
        scores: the patched grid [layer pos] of every pair, as a share of the way from corrupted (0) to clean (1).
        labels: the tokens of the first clean prompt, one for each position.
    """

    clean: Float[Tensor, " prompt"]
    corrupted: Float[Tensor, " prompt"]
    accuracy: float
    scores: PairScores
    labels: tuple[str, ...]

    @property
    def grid(self) -> Float[Tensor, "layer pos"]:
        """The mean over pairs."""
        return self.scores.mean

    def carriers(self, least: float = 0.5) -> list[list[int]]:
        """Return, for each layer, the positions that bring back at least the share `least` by themselves."""
        return [torch.where(row >= least)[0].tolist() for row in self.grid]


@torch.no_grad()
def patch_ioi(model: HookedModel, examples: TaskSet, *, site: str = "resid_pre", verbose: bool = True) -> IOIPatching:
    """Patch the clean stream into the corrupted run at every layer and position.

    Args:
        model: a `HookedTransformer` with a tokenizer.
        examples: at least two pairs whose prompts have one length and are alike position by position, such as
            `get_task("ioi").examples(50, template=0, order="abba")`.
        site: a grid by layer and position in `patching.PATCHES`: `"resid_pre"`, `"attn_out"`, `"mlp_out"`, ...
        verbose: show a progress bar.

    Raises:
        ValueError: prompts of several lengths, or with the same logit difference clean and corrupted; an unknown grid.
    """
    tokens = examples.tokens(model)
    metric = metrics.logit_diff(tokens.answers, tokens.wrong)
    scores = patch_pairs(model, tokens.clean, tokens.corrupted, metric, site, verbose=verbose)
    return IOIPatching(
        clean=scores.clean,
        corrupted=scores.corrupted,
        accuracy=(scores.clean > 0).double().mean().item(),
        scores=scores,
        labels=tuple(cast("list[str]", model.to_str_tokens(tokens.clean[0]))),
    )
