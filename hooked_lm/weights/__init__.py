"""A model's weights: processing as pure functions, the classic library's state dicts, initial values, views, files."""

from hooked_lm.weights.processing import (
    STEPS,
    Processed,
    Step,
    Weights,
    center_unembed,
    center_writing_weights,
    fold_layer_norm,
    fold_value_biases,
    plan_processing,
    process,
    process_,
    refactor_factored_attn_matrices,
    untie,
    unties,
)
from hooked_lm.weights.surgery import select_layers
from weight_conversion.classic_state import from_classic

__all__ = [
    "STEPS",
    "Processed",
    "Step",
    "Weights",
    "center_unembed",
    "center_writing_weights",
    "fold_layer_norm",
    "fold_value_biases",
    "from_classic",
    "plan_processing",
    "process",
    "process_",
    "refactor_factored_attn_matrices",
    "select_layers",
    "untie",
    "unties",
]
