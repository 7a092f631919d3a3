"""Published numbers about GPT-2 small, beside the same numbers measured here.

The figures are those of the exercises that these experiments are modelled on (ARENA's chapters on indirect object
identification and induction heads), computed there with folded weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hooked_lm import metrics
from hooked_lm.circuits.full_circuits import top1_accuracy
from hooked_lm.circuits.induction import k_composition_qk_circuit
from hooked_lm.experiments.repeats import Repeats
from hooked_lm.hooked_model import HookedModel

__all__ = [
    "CIRCUIT_ACCURACY",
    "FIRST_ACCURACY",
    "FIRST_LOG_PROB",
    "INDUCTION_HEAD",
    "INDUCTION_SCORE",
    "IOI_LOGIT_DIFFERENCE",
    "IOI_PROMPT",
    "MODEL",
    "PREVIOUS_TOKEN_HEAD",
    "SECOND_ACCURACY",
    "SECOND_LOG_PROB",
    "Beside",
    "beside_published",
]

MODEL = "gpt2"
IOI_PROMPT = "After John and Mary went to the store, {giver} gave a bottle of milk to"
# The logit of " John" less that of " Mary", by the name of the giver.
IOI_LOGIT_DIFFERENCE = {"Mary": 4.276, "John": -2.738}
# Fifty random tokens, twice: log-probabilities in nats.
FIRST_LOG_PROB, SECOND_LOG_PROB = -13.898, -0.644
FIRST_ACCURACY, SECOND_ACCURACY = 0.0, 0.93
INDUCTION_HEAD, INDUCTION_SCORE = (5, 5), 0.91
PREVIOUS_TOKEN_HEAD, CIRCUIT_ACCURACY = (4, 11), 0.2283


@dataclass(frozen=True)
class Beside:
    """A number measured here, and the published one."""

    what: str
    measured: float
    published: float


@torch.no_grad()
def beside_published(model: HookedModel, repeats: Repeats) -> tuple[Beside, ...]:
    """Return GPT-2 small's numbers beside the published ones.

    Args:
        model: GPT-2 small.
        repeats: the result of `continue_repeats` on it, with 30 sequences of 50 tokens.
    """
    john, mary = model.to_single_token(" John"), model.to_single_token(" Mary")
    difference = metrics.logit_diff(john, mary)
    found = [
        Beside(f"logit of John less that of Mary when {giver} gives", float(difference(model(prompt))), published)
        for giver, published in IOI_LOGIT_DIFFERENCE.items()
        for prompt in [IOI_PROMPT.format(giver=giver)]
    ]
    circuit = k_composition_qk_circuit(model, PREVIOUS_TOKEN_HEAD, INDUCTION_HEAD)
    return (
        *found,
        Beside("log-probability, first half", repeats.first_log_prob, FIRST_LOG_PROB),
        Beside("log-probability, second half", repeats.second_log_prob, SECOND_LOG_PROB),
        Beside("accuracy, first half", repeats.first_accuracy, FIRST_ACCURACY),
        Beside("accuracy, second half", repeats.second_accuracy, SECOND_ACCURACY),
        Beside("induction score of L5H5", float(repeats.induction_scores[INDUCTION_HEAD]), INDUCTION_SCORE),
        Beside("heads with a higher previous-token score than L4H11", float(_above(repeats)), 0.0),
        Beside("top-1 accuracy of L4H11 into L5H5", top1_accuracy(circuit, verbose=False), CIRCUIT_ACCURACY),
    )


def _above(repeats: Repeats) -> int:
    scores = repeats.previous_token_scores
    return int((scores > scores[PREVIOUS_TOKEN_HEAD]).sum())
