"""The values that a config field may take, where they are a closed list."""

from __future__ import annotations

__all__ = [
    "ATTENTION_DIRECTIONS",
    "EXPERT_GROUP_SCORES",
    "INIT_MODES",
    "NORMALIZATION_TYPES",
    "NORM_PLACEMENTS",
    "PADDING_SIDES",
    "POSITION_TYPES",
    "QK_NORM_TYPES",
    "ROUTER_SCORES",
]

NORMALIZATION_TYPES = ("LN", "LNPre", "RMS", "RMSPre", None)
POSITION_TYPES = ("standard", "rotary", "alibi", "shortformer", "none")
ATTENTION_DIRECTIONS = ("causal", "bidirectional")
INIT_MODES = ("gpt2", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal")
NORM_PLACEMENTS = ("before", "before_and_after", "after", "residual")
QK_NORM_TYPES = ("RMS", "RMSPre", "LN")
PADDING_SIDES = ("left", "right")
ROUTER_SCORES = ("softmax", "sigmoid")
EXPERT_GROUP_SCORES = ("max", "top2")
