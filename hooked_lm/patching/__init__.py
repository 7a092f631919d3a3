"""Patching: replace part of a run by part of another, and see what becomes of the answer.

`activation` has the classic module's functions, `statistics` many pairs of prompts at once, `tracing` causal tracing,
`ablation` ablation, `attribution` the estimate by one backward pass, `path` single paths. Names are resolved when first
used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hooked_lm.patching.ablation import AblationScores as AblationScores
    from hooked_lm.patching.ablation import ablate as ablate
    from hooked_lm.patching.activation import PATCHES as PATCHES
    from hooked_lm.patching.activation import Patch as Patch
    from hooked_lm.patching.activation import PatchSetter as PatchSetter
    from hooked_lm.patching.activation import generic_activation_patch as generic_activation_patch
    from hooked_lm.patching.activation import (
        get_act_patch_attn_head_all_pos_every as get_act_patch_attn_head_all_pos_every,
    )
    from hooked_lm.patching.activation import (
        get_act_patch_attn_head_by_pos_every as get_act_patch_attn_head_by_pos_every,
    )
    from hooked_lm.patching.activation import get_act_patch_attn_head_k_all_pos as get_act_patch_attn_head_k_all_pos
    from hooked_lm.patching.activation import get_act_patch_attn_head_k_by_pos as get_act_patch_attn_head_k_by_pos
    from hooked_lm.patching.activation import get_act_patch_attn_head_out_all_pos as get_act_patch_attn_head_out_all_pos
    from hooked_lm.patching.activation import get_act_patch_attn_head_out_by_pos as get_act_patch_attn_head_out_by_pos
    from hooked_lm.patching.activation import (
        get_act_patch_attn_head_pattern_all_pos as get_act_patch_attn_head_pattern_all_pos,
    )
    from hooked_lm.patching.activation import (
        get_act_patch_attn_head_pattern_by_pos as get_act_patch_attn_head_pattern_by_pos,
    )
    from hooked_lm.patching.activation import (
        get_act_patch_attn_head_pattern_dest_src_pos as get_act_patch_attn_head_pattern_dest_src_pos,
    )
    from hooked_lm.patching.activation import get_act_patch_attn_head_q_all_pos as get_act_patch_attn_head_q_all_pos
    from hooked_lm.patching.activation import get_act_patch_attn_head_q_by_pos as get_act_patch_attn_head_q_by_pos
    from hooked_lm.patching.activation import get_act_patch_attn_head_v_all_pos as get_act_patch_attn_head_v_all_pos
    from hooked_lm.patching.activation import get_act_patch_attn_head_v_by_pos as get_act_patch_attn_head_v_by_pos
    from hooked_lm.patching.activation import get_act_patch_attn_out as get_act_patch_attn_out
    from hooked_lm.patching.activation import get_act_patch_block_every as get_act_patch_block_every
    from hooked_lm.patching.activation import get_act_patch_mlp_out as get_act_patch_mlp_out
    from hooked_lm.patching.activation import get_act_patch_resid_mid as get_act_patch_resid_mid
    from hooked_lm.patching.activation import get_act_patch_resid_post as get_act_patch_resid_post
    from hooked_lm.patching.activation import get_act_patch_resid_pre as get_act_patch_resid_pre
    from hooked_lm.patching.activation import (
        layer_head_dest_src_pos_pattern_patch_setter as layer_head_dest_src_pos_pattern_patch_setter,
    )
    from hooked_lm.patching.activation import layer_head_pattern_patch_setter as layer_head_pattern_patch_setter
    from hooked_lm.patching.activation import layer_head_pos_pattern_patch_setter as layer_head_pos_pattern_patch_setter
    from hooked_lm.patching.activation import layer_head_vector_patch_setter as layer_head_vector_patch_setter
    from hooked_lm.patching.activation import layer_pos_head_vector_patch_setter as layer_pos_head_vector_patch_setter
    from hooked_lm.patching.activation import layer_pos_patch_setter as layer_pos_patch_setter
    from hooked_lm.patching.activation import make_df_from_ranges as make_df_from_ranges
    from hooked_lm.patching.attribution import GRIDS as GRIDS
    from hooked_lm.patching.attribution import Attribution as Attribution
    from hooked_lm.patching.attribution import Audit as Audit
    from hooked_lm.patching.attribution import AuditedCell as AuditedCell
    from hooked_lm.patching.attribution import attribution_patch as attribution_patch
    from hooked_lm.patching.path import Node as Node
    from hooked_lm.patching.path import get_act_patch_direct_path as get_act_patch_direct_path
    from hooked_lm.patching.path import get_act_patch_direct_path_all_sources as get_act_patch_direct_path_all_sources
    from hooked_lm.patching.path import path_patch as path_patch
    from hooked_lm.patching.path import path_patch_heads as path_patch_heads
    from hooked_lm.patching.path import path_patch_mlps as path_patch_mlps
    from hooked_lm.patching.statistics import PairScores as PairScores
    from hooked_lm.patching.statistics import bootstrap_interval as bootstrap_interval
    from hooked_lm.patching.statistics import normalize_scores as normalize_scores
    from hooked_lm.patching.statistics import patch_pairs as patch_pairs
    from hooked_lm.patching.statistics import share_of_same_sign as share_of_same_sign
    from hooked_lm.patching.tracing import CausalTrace as CausalTrace
    from hooked_lm.patching.tracing import causal_trace as causal_trace

_NAMES = {
    "ablation": ("AblationScores", "ablate"),
    "activation": (
        "PATCHES",
        "Patch",
        "PatchSetter",
        "generic_activation_patch",
        "get_act_patch_attn_head_all_pos_every",
        "get_act_patch_attn_head_by_pos_every",
        "get_act_patch_attn_head_k_all_pos",
        "get_act_patch_attn_head_k_by_pos",
        "get_act_patch_attn_head_out_all_pos",
        "get_act_patch_attn_head_out_by_pos",
        "get_act_patch_attn_head_pattern_all_pos",
        "get_act_patch_attn_head_pattern_by_pos",
        "get_act_patch_attn_head_pattern_dest_src_pos",
        "get_act_patch_attn_head_q_all_pos",
        "get_act_patch_attn_head_q_by_pos",
        "get_act_patch_attn_head_v_all_pos",
        "get_act_patch_attn_head_v_by_pos",
        "get_act_patch_attn_out",
        "get_act_patch_block_every",
        "get_act_patch_mlp_out",
        "get_act_patch_resid_mid",
        "get_act_patch_resid_post",
        "get_act_patch_resid_pre",
        "layer_head_dest_src_pos_pattern_patch_setter",
        "layer_head_pattern_patch_setter",
        "layer_head_pos_pattern_patch_setter",
        "layer_head_vector_patch_setter",
        "layer_pos_head_vector_patch_setter",
        "layer_pos_patch_setter",
        "make_df_from_ranges",
    ),
    "attribution": ("GRIDS", "Attribution", "Audit", "AuditedCell", "attribution_patch"),
    "path": (
        "Node",
        "get_act_patch_direct_path",
        "get_act_patch_direct_path_all_sources",
        "path_patch",
        "path_patch_heads",
        "path_patch_mlps",
    ),
    "statistics": (
        "PairScores",
        "bootstrap_interval",
        "normalize_scores",
        "patch_pairs",
        "share_of_same_sign",
    ),
    "tracing": ("CausalTrace", "causal_trace"),
}
_HOMES = {name: f"hooked_lm.patching.{module}" for module, names in _NAMES.items() for name in names}

__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hooked_lm.patching' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
