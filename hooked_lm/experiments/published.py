"""What was published about GPT-2 small, to stand beside what is measured.

The figures are those of the exercises that these experiments are modelled on, computed there with folded weights.
"""

from __future__ import annotations

MODEL = "gpt2"

# "After John and Mary went to the store, Mary gave a bottle of milk to": the answer's logit less the other name's.
IOI_CLEAN = "After John and Mary went to the store, Mary gave a bottle of milk to"
IOI_CORRUPTED = "After John and Mary went to the store, John gave a bottle of milk to"
IOI_LOGIT_DIFFERENCE = {"clean": 4.276, "corrupted": -2.738}

# Fifty random tokens, twice: log-probability in nats and accuracy of either half; the highest induction score, and the
# head it belongs to; the head of the highest previous-token score; and the top-1 accuracy of their full K-composition
# circuit.
REPEATS = {
    "first_log_prob": -13.898,
    "second_log_prob": -0.644,
    "first_accuracy": 0.0,
    "second_accuracy": 0.93,
    "induction_head": (5, 5),
    "induction_score": 0.91,
    "previous_token_head": (4, 11),
    "circuit_accuracy": 0.2283,
}
