"""How often a model gives a task's answers."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from hooked_lm.hooked_model import HookedModel
from hooked_lm.tasks.task_set import TaskSet, TaskTokens

__all__ = ["Score", "score"]


@dataclass(frozen=True)
class Score:
    """How often, and how clearly, a model gives the answers of a task set.

    Attributes:
        n: the number of examples.
        top: the share whose answer has the highest logit of all tokens.
        preferred: the share whose answer has a higher logit than the wrong answer.
        logit_diff: the answer's logit less the wrong answer's, the mean.
        probability: of the answer, the mean.
    """

    n: int
    top: float
    preferred: float
    logit_diff: float
    probability: float


@torch.no_grad()
def score(model: HookedModel, examples: TaskSet, batch: int = 64) -> Score:
    """Return how a model does on the clean prompts.

    Args:
        model: a `HookedTransformer` with a tokenizer.
        examples: prompts of any lengths; those of one length run together.
        batch: how many prompts run at a time.

    Raises:
        ValueError: the tokenizer does not suit the examples; see `TaskSet.check`.
    """
    scores: dict[str, list[Tensor]] = defaultdict(list)
    for group in examples.groups(model.tokenizer):
        tokens = group.tokens(model)
        for start in range(0, len(group), batch):
            rows = slice(start, start + batch)
            some = TaskTokens(tokens.clean[rows], tokens.corrupted[rows], tokens.answers[rows], tokens.wrong[rows])
            logits = model(some.clean, logits_to_keep=1)
            for name, metric in some.metrics().items():
                scores[name].append(metric.per_prompt(logits))
    return Score(n=len(examples), **{name: torch.cat(parts).double().mean().item() for name, parts in scores.items()})
