"""HookedTransformerConfig: a whole architecture as one validated value."""

from hooked_lm.config.activations import ACTIVATIONS, activation_names, register_activation
from hooked_lm.config.choices import (
    ATTENTION_DIRECTIONS,
    INIT_MODES,
    NORM_PLACEMENTS,
    NORMALIZATION_TYPES,
    PADDING_SIDES,
    POSITION_TYPES,
    QK_NORM_TYPES,
)
from hooked_lm.config.classic import RENAMED
from hooked_lm.config.config import HookedTransformerConfig

__all__ = [
    "ACTIVATIONS",
    "ATTENTION_DIRECTIONS",
    "INIT_MODES",
    "NORMALIZATION_TYPES",
    "NORM_PLACEMENTS",
    "PADDING_SIDES",
    "POSITION_TYPES",
    "QK_NORM_TYPES",
    "RENAMED",
    "HookedTransformerConfig",
    "activation_names",
    "register_activation",
]
