"""Fields that the tests of architectures share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

Weights = dict[str, Tensor]
ROTARY: dict[str, Any] = {"positional_embedding_type": "rotary", "d_head": 8, "rotary_base": 100.0}
BY_PARTS = {
    "use_NTK_by_parts_rope": True,
    "NTK_by_parts_factor": 6.0,
    "NTK_by_parts_low_freq_factor": 1.0,
    "NTK_by_parts_high_freq_factor": 4.0,
    "NTK_original_ctx_len": 16,
}
LATENT: dict[str, Any] = {
    "positional_embedding_type": "rotary",
    "d_head": 6,
    "rotary_dim": 4,
    "d_latent_kv": 5,
    "d_latent_q": 7,
    "d_value": 3,
}
