"""How often a model gives a task's answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hooked_lm.hooked_model import HookedModel
from hooked_lm.tasks.task_set import TaskSet

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
    answer_logits, wrong_logits, top, probabilities = [], [], [], []
    for group in examples.groups(model.tokenizer):
        tokens = group.tokens(model)
        for start in range(0, len(group), batch):
            rows = slice(start, start + batch)
            logits = model(tokens.clean[rows], logits_to_keep=1)[:, -1]
            answers = tokens.answers[rows, None]
            answer_logits.append(logits.gather(-1, answers))
            wrong_logits.append(logits.gather(-1, tokens.wrong[rows, None]))
            top.append(logits.argmax(-1, keepdim=True) == answers)
            probabilities.append(logits.softmax(-1).gather(-1, answers))
    difference = torch.cat(answer_logits) - torch.cat(wrong_logits)
    return Score(
        n=len(examples),
        top=torch.cat(top).double().mean().item(),
        preferred=(difference > 0).double().mean().item(),
        logit_diff=difference.double().mean().item(),
        probability=torch.cat(probabilities).double().mean().item(),
    )
