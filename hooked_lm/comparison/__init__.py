"""Comparison of two models: their configs, weights, activations, outputs, and the effects of interventions.

found = compare(before, after, prompts)
print(found.summary)
"""

from __future__ import annotations

from hooked_lm.comparison.comparing import compare, compare_checkpoints
from hooked_lm.comparison.result import (
    CheckpointComparison,
    ConfigDifference,
    EffectDifferences,
    ModelComparison,
    SiteDifference,
    WeightDifference,
)
from hooked_lm.comparison.weights import compare_configs, compare_weights

__all__ = [
    "CheckpointComparison",
    "ConfigDifference",
    "EffectDifferences",
    "ModelComparison",
    "SiteDifference",
    "WeightDifference",
    "compare",
    "compare_checkpoints",
    "compare_configs",
    "compare_weights",
]
