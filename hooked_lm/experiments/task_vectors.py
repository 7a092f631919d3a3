"""Function vectors: the vector that carries a task from its examples can be added to a prompt that has none.

The mean state at the last token of prompts with examples, or the summed mean outputs of the few heads that carry the
task, is added to a prompt with no example at all (Todd et al. 2024, "Function Vectors in Large Language Models";
Hendel et al. 2023, "In-Context Learning Creates Task Vectors"). The heads are those that, put into prompts with
examples of another relation, raise this one's answer most. Controls: random vectors of the same length; the same
heads' outputs on examples of other relations; and on examples whose answers are shuffled, which still show what kind of
word an answer is (Min et al. 2022, "Rethinking the Role of Demonstrations").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm.circuits.function_vectors import (
    FunctionVector,
    HeadEffects,
    SteeringEffect,
    function_vector,
    head_effects,
    mean_head_outputs,
    mean_state,
    steering_effect,
)
from hooked_lm.experiments.prompts import answerable
from hooked_lm.hooked_model import HookedModel
from hooked_lm.tasks import TaskSet, get_task

__all__ = ["VECTORS", "TaskVectors", "transplant_task"]

VECTORS = ("state", "heads", "other relations", "shuffled")
# Draw this many times the examples that are needed: with some tokenizers few answers are one token.
_SPARE = 8


@dataclass(frozen=True, eq=False)
class TaskVectors:
    """How prompts without examples are answered with and without a task's vector.

    Attributes:
        relation: the task.
        asked: the prompts without examples. Their queries are not those of the prompts that the vectors are made from.
        with_examples: accuracy on prompts with examples, the most that a vector can be expected to bring.
        effects: each head's indirect effect on prompts with examples of another relation.
        vector: the sum of the best heads' mean outputs.
        steering: accuracy and log-probability by layer, for the vectors of `VECTORS`: the mean `"state"`, the best
            `"heads"`, the same heads on examples of `"other relations"`, and on `"shuffled"` ones.
    """

    relation: str
    asked: TaskSet
    with_examples: float
    effects: HeadEffects
    vector: FunctionVector
    steering: SteeringEffect

    @property
    def accuracy(self) -> Float[Tensor, "vector layer"]:
        """Accuracy by vector and layer."""
        return self.steering.accuracy

    @property
    def random_accuracy(self) -> float:
        """Accuracy with random vectors, averaged over them, at the best layer."""
        return float(self.steering.control_accuracy.max())

    @property
    def base_accuracy(self) -> float:
        """Accuracy without any vector."""
        return float(self.steering.base_accuracy)


@torch.no_grad()
def transplant_task(
    model: HookedModel,
    relation: str = "opposite",
    *,
    shots: int = 5,
    n: int = 60,
    n_heads: int = 6,
    n_controls: int = 5,
    seed: int = 0,
    verbose: bool = True,
) -> TaskVectors:
    """Find a task's vector on prompts with examples, and add it to prompts without.

    Args:
        model: a `HookedTransformer` with a tokenizer.
        relation: one of the relations of `get_task("relations")`.
        shots: examples in a prompt.
        n: the largest number of prompts of each kind; those without examples ask each query once.
        n_heads: how many heads the vector sums.
        n_controls: how many random vectors.
        seed: of the prompts.
        verbose: show progress bars.

    Raises:
        ValueError: an unknown relation, more heads than there are, a tokenizer in which no answer is one
            token, or so many prompts that no query is left to steer.
    """
    shown, shuffled = (_drawn(model, n, seed, relation, shots, kind) for kind in ("relation", "shuffled"))
    asked = _asked_elsewhere(model, n, seed + 1, relation, shown)
    means = mean_head_outputs(model, shown.clean, verbose=verbose)
    effects = head_effects(model, shown.corrupted, shown.answers, means, verbose=verbose)
    vector = function_vector(model, means, effects, n_heads=n_heads)
    vectors: dict[str, FunctionVector | Tensor] = {
        "state": mean_state(model, shown.clean, verbose=verbose),
        "heads": vector,
    }
    for name, prompts in zip(VECTORS[2:], (shown.corrupted, shuffled.corrupted), strict=True):
        vectors[name] = function_vector(model, mean_head_outputs(model, prompts, verbose=verbose), vector.heads)
    steering = steering_effect(
        model, asked.clean, asked.answers, vectors, n_controls=n_controls, seed=seed, verbose=verbose
    )
    return TaskVectors(relation, asked, _accuracy(model, shown.clean, shown.answers), effects, vector, steering)


def _drawn(model: HookedModel, n: int, seed: int, relation: str, shots: int, corruption: str) -> TaskSet:
    """Prompts with examples, with answers of one token."""
    drawn = get_task("relations").examples(_SPARE * n, seed, relation=relation, shots=shots, corruption=corruption)
    return answerable(drawn, model.tokenizer, n)


def _asked_elsewhere(model: HookedModel, n: int, seed: int, relation: str, shown: TaskSet) -> TaskSet:
    """Prompts without examples, each query once, without the queries of the prompts with examples."""
    drawn = get_task("relations").examples(_SPARE * n, seed, relation=relation, shots=0)
    taken = {_query(prompt) for prompt in shown.clean}
    left = {one.prompt: one for one in drawn.examples if _query(one.prompt) not in taken}
    if not left:
        raise ValueError(f"{n} prompts with examples ask for every word that has a {relation}: ask for fewer")
    return answerable(TaskSet(drawn.task, tuple(left.values())), model.tokenizer, n)


def _query(prompt: str) -> str:
    return prompt.rsplit(", ", 1)[-1]


def _accuracy(model: HookedModel, prompts: list[str], answers: list[str]) -> float:
    logits = model(prompts, padding_side="left", logits_to_keep=1)[:, -1]
    wanted = torch.tensor([model.to_single_token(answer) for answer in answers], device=logits.device)
    return float((logits.argmax(-1) == wanted).double().mean())
