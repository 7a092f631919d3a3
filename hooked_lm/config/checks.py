"""Filling in and checking a config: one function per concern, each of which changes the config in place or raises."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hooked_lm.config.activations import activation_names
from hooked_lm.config.choices import (
    ATTENTION_DIRECTIONS,
    EXPERT_GROUP_SCORES,
    INIT_MODES,
    NORM_PLACEMENTS,
    NORMALIZATION_TYPES,
    PADDING_SIDES,
    POSITION_TYPES,
    QK_NORM_TYPES,
    ROUTER_SCORES,
)
from hooked_lm.config.counting import count_parameters

if TYPE_CHECKING:
    from hooked_lm.config.config import HookedTransformerConfig

__all__ = [
    "check_choices",
    "check_finite",
    "check_latents",
    "check_per_layer",
    "check_rotary_scaling",
    "check_router",
    "check_shortcut",
    "check_types",
    "fill_and_check",
    "fill_experts",
    "fill_heads",
    "fill_init",
    "fill_mlp",
    "fill_norms",
    "fill_positions",
    "fill_vocab",
    "fill_windows",
    "is_above_zero",
    "parse_dtype",
    "require_above_zero",
    "require_choice",
    "require_divisible",
    "require_positive",
    "require_positive_integer",
]

# Fields that are compared with other numbers before all are checked to be numbers.
_COMPARED = (
    *("eps", "attn_scale", "initializer_range", "query_scale_beta"),
    *("NTK_by_parts_low_freq_factor", "NTK_by_parts_high_freq_factor"),
)
# Fields about experts, each with the value that it has in a config without experts.
_ABOUT_EXPERTS: dict[str, object] = {
    **dict.fromkeys(("moe_layers", "d_expert", "d_shared_expert", "sparsemixer_jitter", "gated_limit")),
    **dict.fromkeys(("expert_groups", "expert_groups_per_token")),
    **dict.fromkeys(("shared_expert_gate", "router_correction", "router_in_float32", "shortcut_experts"), False),
    "router_scores": "softmax",
    "identity_experts": 0,
    "routed_scale": 1.0,
}
# Fields that have one value in a config with `shortcut_experts`.
_WITH_SHORTCUTS: dict[str, object] = {
    **dict.fromkeys(("moe_layers", "d_shared_expert")),
    "parallel_attn_mlp": False,
    "norm_placement": "before",
}


def fill_and_check(cfg: HookedTransformerConfig) -> None:
    """Fill in the fields that follow from others, and check all of them.

    Raises:
        ValueError: a value out of range, or fields that contradict each other.
    """
    check_types(cfg)
    for name in ("n_layers", "d_model", "n_ctx"):
        require_positive(cfg, name, at_least=0 if name == "n_layers" else 1)
    fill_heads(cfg)
    fill_mlp(cfg)
    fill_experts(cfg)
    fill_norms(cfg)
    fill_vocab(cfg)
    fill_positions(cfg)
    check_latents(cfg)
    fill_windows(cfg)
    fill_init(cfg)
    check_choices(cfg)
    check_finite(cfg)
    cfg.n_params = count_parameters(cfg)


def check_types(cfg: HookedTransformerConfig) -> None:
    """Check what the other checks rely on: integers of 64 bits, flags that are flags, and numbers to compare."""
    for field in dataclasses.fields(cfg):
        name, value = field.name, getattr(cfg, field.name)
        if field.name != "n_params" and isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} is an integer of up to 64 bits; got one of {value.bit_length()}")
        if field.type == "bool" and value not in (True, False):
            raise ValueError(f"{name} is True or False; got {value!r}")
    check_finite(cfg, [*_COMPARED])


def check_finite(cfg: HookedTransformerConfig, names: Sequence[str] | None = None) -> None:
    """Check that the fields for real numbers hold finite ones, or None where they may.

    Args:
        cfg: the config.
        names: of the fields; None for all.
    """
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.type not in ("float", "float | None") or (names is not None and field.name not in names):
            continue
        if not _is_finite(value) and not (value is None and field.type == "float | None"):
            raise ValueError(f"{field.name} is a finite number; got {value!r}")


def _is_finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def fill_heads(cfg: HookedTransformerConfig) -> None:
    """Fill in `n_heads` or `d_head`, and `attn_scale`."""
    if cfg.n_heads == -1 and cfg.d_head == -1:
        raise ValueError("give n_heads or d_head: one follows from d_model and the other")
    if cfg.n_heads == -1:
        require_positive(cfg, "d_head")
        require_divisible(cfg, "d_model", "d_head", "give n_heads")
        cfg.n_heads = cfg.d_model // cfg.d_head
    require_positive(cfg, "n_heads")
    if cfg.d_head == -1:
        require_divisible(cfg, "d_model", "n_heads", "give d_head")
        cfg.d_head = cfg.d_model // cfg.n_heads
    require_positive(cfg, "d_head")
    if cfg.n_key_value_heads is not None:
        require_positive(cfg, "n_key_value_heads")
        require_divisible(cfg, "n_heads", "n_key_value_heads", "each key-value head serves as many query heads")
    if not cfg.use_attn_scale:
        cfg.attn_scale = 1.0
    elif cfg.attn_scale == -1.0:
        cfg.attn_scale = math.sqrt(cfg.d_head)
    require_above_zero(cfg, "clip_qkv", or_none=True)
    if cfg.attention_gate and cfg.positional_embedding_type == "shortformer":
        raise ValueError("attention_gate is not defined for shortformer, whose positions are added to queries and keys")
    if not cfg.attn_scale > 0:
        raise ValueError(f"attn_scale divides the attention scores, so it is positive; got {cfg.attn_scale}")


def fill_mlp(cfg: HookedTransformerConfig) -> None:
    """Fill in `d_mlp`, and check the fields about dense MLPs."""
    if cfg.attn_only:
        if cfg.num_experts is not None or cfg.gated_mlp:
            raise ValueError("attn_only means no MLP: num_experts and gated_mlp contradict it")
        return
    if cfg.d_mlp is None:
        cfg.d_mlp = 4 * cfg.d_model
    require_positive(cfg, "d_mlp")
    if cfg.act_fn is None:
        raise ValueError(f"act_fn is missing: give one of {activation_names()}, or attn_only=True for no MLPs")
    if cfg.gated_mlp and cfg.act_fn == "solu_ln":
        raise ValueError("solu_ln is not defined for a gated MLP")


def fill_experts(cfg: HookedTransformerConfig) -> None:
    """Check the fields about experts."""
    if (cfg.num_experts is None) != (cfg.experts_per_token is None):
        raise ValueError("num_experts and experts_per_token go together")
    if cfg.num_experts is None or cfg.experts_per_token is None:
        for name, none in _ABOUT_EXPERTS.items():
            if getattr(cfg, name) != none:
                raise ValueError(f"{name} goes with num_experts: this config has no experts")
        return
    require_positive(cfg, "num_experts")
    if not 1 <= cfg.experts_per_token <= cfg.num_experts:
        raise ValueError(f"experts_per_token {cfg.experts_per_token} is not in 1-{cfg.num_experts}")
    if cfg.act_fn in ("solu_ln", "xielu"):
        raise ValueError(f"{cfg.act_fn} is not defined for a mixture of experts")
    require_above_zero(cfg, "gated_limit", "sparsemixer_jitter", or_none=True)
    if cfg.sparsemixer_jitter is not None and cfg.experts_per_token != 2:
        raise ValueError(f"SparseMixer picks two experts, not experts_per_token={cfg.experts_per_token}")
    if cfg.gated_limit is not None and not cfg.gated_mlp:
        raise ValueError("gated_limit is about the two factors of gated experts: give gated_mlp=True")
    if cfg.d_shared_expert is not None and not cfg.gated_mlp:
        raise ValueError("the shared expert is a gated MLP: d_shared_expert needs gated_mlp=True")
    if cfg.shared_expert_gate and cfg.d_shared_expert is None:
        raise ValueError("shared_expert_gate needs a shared expert: give d_shared_expert")
    for name in ("d_expert", "d_shared_expert"):
        if getattr(cfg, name) is not None:
            require_positive(cfg, name)
    require_positive(cfg, "identity_experts", at_least=0)
    if cfg.identity_experts >= cfg.num_experts:
        raise ValueError(
            f"identity_experts {cfg.identity_experts} leaves none of {cfg.num_experts} experts with weights"
        )
    check_per_layer(cfg, "moe_layers")
    check_router(cfg, cfg.num_experts, cfg.experts_per_token)


def check_router(cfg: HookedTransformerConfig, n_experts: int, n_chosen: int) -> None:
    """Check the fields about how experts are chosen and weighted.

    Args:
        cfg: the config.
        n_experts, n_chosen: how many experts there are, and how many of them a token uses.
    """
    require_choice("router_scores", cfg.router_scores, ROUTER_SCORES)
    require_choice("expert_group_score", cfg.expert_group_score, EXPERT_GROUP_SCORES)
    require_above_zero(cfg, "routed_scale")
    if cfg.norm_topk_min < 0:
        raise ValueError(f"norm_topk_min is a least sum of weights, so it is not negative; got {cfg.norm_topk_min}")
    if cfg.sparsemixer_jitter is not None and (cfg.router_scores != "softmax" or cfg.router_correction):
        raise ValueError(
            "SparseMixer has weights of its own: router_scores='sigmoid' and router_correction contradict it"
        )
    if (cfg.expert_groups is None) != (cfg.expert_groups_per_token is None):
        raise ValueError("expert_groups and expert_groups_per_token go together")
    if cfg.expert_groups is None or cfg.expert_groups_per_token is None:
        return
    if cfg.sparsemixer_jitter is not None:
        raise ValueError("SparseMixer chooses among all experts: expert_groups contradicts sparsemixer_jitter")
    require_positive(cfg, "expert_groups")
    require_divisible(cfg, "num_experts", "expert_groups", "groups have as many experts each")
    if not 1 <= cfg.expert_groups_per_token <= cfg.expert_groups:
        raise ValueError(f"expert_groups_per_token {cfg.expert_groups_per_token} is not in 1-{cfg.expert_groups}")
    in_group = n_experts // cfg.expert_groups
    if cfg.expert_group_score == "top2" and in_group < 2:
        raise ValueError("expert_group_score='top2' is the sum of a group's two best experts, and a group has one")
    if n_chosen > in_group * cfg.expert_groups_per_token:
        raise ValueError(
            f"experts_per_token {n_chosen} is more than the {in_group * cfg.expert_groups_per_token} experts of "
            f"{cfg.expert_groups_per_token} groups"
        )


def fill_norms(cfg: HookedTransformerConfig) -> None:
    """Bring the two fields about the place of norms into agreement, and check the fields about norms."""
    if cfg.use_normalization_before_and_after:
        if cfg.norm_placement not in ("before", "before_and_after"):
            raise ValueError(f"use_normalization_before_and_after contradicts norm_placement={cfg.norm_placement!r}")
        cfg.norm_placement = "before_and_after"
    cfg.use_normalization_before_and_after = cfg.norm_placement == "before_and_after"
    if cfg.final_rms and not cfg.final_norm:
        raise ValueError("final_rms is about the final norm, and with final_norm=False there is none")
    if not cfg.first_norm and cfg.norm_placement not in ("before", "before_and_after"):
        raise ValueError(f"first_norm=False leaves out a norm that norm_placement={cfg.norm_placement!r} does not have")
    for name in ("qk_norm_across_heads", "qk_norm_per_head_gains", "qk_norm_after_rotary"):
        if getattr(cfg, name) and not cfg.use_qk_norm:
            raise ValueError(f"{name} is about the norm of queries and keys: it needs use_qk_norm=True")
    check_shortcut(cfg)
    if cfg.norm_placement == "residual" and cfg.parallel_attn_mlp:
        raise ValueError("norms on the residual stream come after attention and after the MLP: not in parallel")


def check_shortcut(cfg: HookedTransformerConfig) -> None:
    """Check that blocks whose experts' output is added by the next block can do without other kinds of MLP and norm."""
    if not cfg.shortcut_experts:
        return
    if cfg.n_layers % 2:
        raise ValueError(f"shortcut_experts joins blocks in pairs, so n_layers is even; got {cfg.n_layers}")
    for name, needed in _WITH_SHORTCUTS.items():
        if getattr(cfg, name) != needed:
            raise ValueError(f"shortcut_experts needs {name}={needed!r}; got {getattr(cfg, name)!r}")


def fill_vocab(cfg: HookedTransformerConfig) -> None:
    """Fill in `d_vocab_out`, and check both vocabularies."""
    for name in ("d_vocab", "d_vocab_out"):
        if getattr(cfg, name) != -1:
            require_positive(cfg, name)
    if cfg.d_vocab_out == -1:
        cfg.d_vocab_out = cfg.d_vocab
    # A d_vocab of -1 is set from the tokenizer later, and the config checked again.
    if cfg.tie_word_embeddings and cfg.d_vocab != -1 and cfg.d_vocab_out != cfg.d_vocab:
        raise ValueError(f"tied embeddings have one vocabulary, not {cfg.d_vocab} in and {cfg.d_vocab_out} out")


def fill_positions(cfg: HookedTransformerConfig) -> None:
    """Fill in `rotary_dim`, and check the fields about positions."""
    if cfg.positional_embedding_type == "rotary":
        if cfg.rotary_dim is None:
            cfg.rotary_dim = cfg.d_head
        require_positive(cfg, "rotary_dim")
        if cfg.rotary_dim % 2 or cfg.rotary_dim > cfg.d_head:
            raise ValueError(f"rotary_dim {cfg.rotary_dim} is not even and at most d_head {cfg.d_head}")
        check_rotary_scaling(cfg, cfg.rotary_dim // 2)
    elif cfg.rotary_layers is not None:
        raise ValueError(f"rotary_layers goes with rotary positions, not {cfg.positional_embedding_type!r}")
    require_above_zero(cfg, "rotary_base", "alibi_scale", "embedding_scale", "logit_scale")
    require_above_zero(cfg, "rotary_base_local", or_none=True)
    require_positive(cfg, "query_scale_ctx_len")
    if cfg.query_scale_beta < 0:
        raise ValueError(f"query_scale_beta is not negative; got {cfg.query_scale_beta}")
    if cfg.alibi_in_bfloat16 and cfg.attention_dir == "bidirectional":
        raise ValueError("alibi_in_bfloat16 counts from the first key, which only causal attention allows")
    check_per_layer(cfg, "rotary_layers")


def check_latents(cfg: HookedTransformerConfig) -> None:
    """Check the fields about latent attention."""
    if cfg.d_latent_kv is None:
        for name in ("d_latent_q", "d_value"):
            if getattr(cfg, name) is not None:
                raise ValueError(f"{name} is about latent attention: give d_latent_kv")
        return
    for name in ("d_latent_kv", "d_latent_q", "d_value"):
        if getattr(cfg, name) is not None:
            require_positive(cfg, name)
    if cfg.positional_embedding_type != "rotary" or cfg.rotary_dim is None or cfg.rotary_dim >= cfg.d_head:
        raise ValueError(
            "in latent attention some of a head's dimensions rotate, and the others come from the latent: give "
            f"positional_embedding_type='rotary' and a rotary_dim below d_head {cfg.d_head}"
        )
    if cfg.n_kv_heads != cfg.n_heads:
        raise ValueError("in latent attention each head has keys and values of its own: leave out n_key_value_heads")
    if cfg.use_qk_norm or cfg.clip_qkv is not None:
        raise ValueError("use_qk_norm and clip_qkv are not defined for latent attention, whose latents are normalised")
    if cfg.attention_gate:
        raise ValueError("attention_gate is not defined for latent attention: leave one of the two out")
    if cfg.latent_eps < 0:
        raise ValueError(f"latent_eps is not negative; got {cfg.latent_eps}")


def check_rotary_scaling(cfg: HookedTransformerConfig, n_pairs: int) -> None:
    """Check that rotary frequencies are scaled in one way at most, and the numbers of that way."""
    switches = ("use_NTK_by_parts_rope", "use_yarn_rope", "use_dynamic_rope", "use_longrope")
    scalings = [name for name in switches if getattr(cfg, name)]
    if cfg.rotary_scaling_factor != 1.0:
        scalings.append("rotary_scaling_factor")
    if len(scalings) > 1:
        raise ValueError(f"rotary frequencies are scaled in one way, not by {' and '.join(scalings)}")
    if cfg.rotary_scaling_factor == 0:  # a negative factor reverses the rotation
        raise ValueError("rotary_scaling_factor divides positions, so it is not 0")
    if cfg.use_NTK_by_parts_rope:
        require_above_zero(cfg, "NTK_by_parts_factor", "NTK_original_ctx_len")
        low, high = cfg.NTK_by_parts_low_freq_factor, cfg.NTK_by_parts_high_freq_factor
        if not 0 < low < high:
            raise ValueError(f"NTK_by_parts_low_freq_factor {low} is not above 0 and below the high one, {high}")
    if cfg.use_yarn_rope:
        require_above_zero(cfg, "yarn_factor", "yarn_beta_fast", "yarn_beta_slow")
        require_above_zero(cfg, "yarn_original_max_position_embeddings")
        require_above_zero(cfg, "yarn_attention_factor", or_none=True)
    if cfg.use_dynamic_rope:
        require_above_zero(cfg, "dynamic_rope_factor", "dynamic_rope_original_ctx_len")
        if n_pairs == 1:
            raise ValueError("use_dynamic_rope stretches every pair but the fastest: rotary_dim 2 has no other")
    if cfg.use_longrope:
        require_above_zero(cfg, "longrope_attention_factor", "longrope_original_ctx_len")
        for name in ("longrope_short_factors", "longrope_long_factors"):
            factors = getattr(cfg, name)
            if factors is None or len(factors) != n_pairs or not all(is_above_zero(f) for f in factors):
                raise ValueError(f"{name} holds one positive factor for each of {n_pairs} pairs; got {factors}")


def check_per_layer(cfg: HookedTransformerConfig, name: str) -> None:
    """Check a field with a bool per layer, and make it a list of the config's own."""
    per_layer = getattr(cfg, name)
    if per_layer is None:
        return
    listed = isinstance(per_layer, (list, tuple)) and all(isinstance(value, bool) for value in per_layer)
    if not listed or len(per_layer) < cfg.n_layers:
        raise ValueError(f"{name} holds True or False for each of {cfg.n_layers} layers; got {per_layer}")
    setattr(cfg, name, list(per_layer))


def fill_windows(cfg: HookedTransformerConfig) -> None:
    """Fill in `use_local_attn` and `attn_types`, and check the fields about windows."""
    if cfg.use_local_attn is None:
        cfg.use_local_attn = cfg.window_size is not None
    if not cfg.use_local_attn:
        if cfg.attn_types is not None and "local" in cfg.attn_types and cfg.window_size is None:
            raise ValueError("attn_types names local layers: give window_size")
        return
    if cfg.window_size is None:
        raise ValueError("use_local_attn needs window_size")
    require_positive(cfg, "window_size")
    if cfg.attn_types is None:
        cfg.attn_types = ["local"] * cfg.n_layers
    if len(cfg.attn_types) < cfg.n_layers or not set(cfg.attn_types) <= {"global", "local"}:
        raise ValueError(
            f"attn_types holds 'global' or 'local' for each of {cfg.n_layers} layers; got {cfg.attn_types}"
        )


def fill_init(cfg: HookedTransformerConfig) -> None:
    """Fill in `initializer_range`, and parse `dtype` and `device`."""
    if cfg.initializer_range < 0:
        cfg.initializer_range = 0.8 / math.sqrt(cfg.d_model) if cfg.init_mode == "gpt2" else 1.0
    cfg.dtype = parse_dtype(cfg.dtype)
    if cfg.device is not None:
        cfg.device = str(torch.device(cfg.device))


def check_choices(cfg: HookedTransformerConfig) -> None:
    """Check the fields whose values are a closed list."""
    for name, choices in (
        ("normalization_type", NORMALIZATION_TYPES),
        ("positional_embedding_type", POSITION_TYPES),
        ("attention_dir", ATTENTION_DIRECTIONS),
        ("init_mode", INIT_MODES),
        ("norm_placement", NORM_PLACEMENTS),
        ("qk_norm_type", QK_NORM_TYPES),
        ("default_padding_side", PADDING_SIDES),
    ):
        require_choice(name, getattr(cfg, name), choices)
    own = "a function of your own is registered first: hooked_lm.config.register_activation"
    require_choice("act_fn", cfg.act_fn, (*activation_names(), None), otherwise=own)
    without_weights = [name for name in activation_names() if name not in ("solu_ln", "xielu")]
    require_choice("unembed_act_fn", cfg.unembed_act_fn, (*without_weights, None), otherwise=own)
    if cfg.final_rms and cfg.normalization_type is None:
        raise ValueError("final_rms goes with norms: with normalization_type=None there is no final norm")
    if not cfg.eps >= 0:
        raise ValueError(f"eps is not negative; got {cfg.eps}")


def require_choice(name: str, value: object, choices: Sequence[object], otherwise: str = "") -> None:
    """Check that a field's value is one of its choices.

    Args:
        name: the field, for the message.
        value: its value.
        choices: the values it may have.
        otherwise: for the end of the message.

    Raises:
        ValueError: it is not; the message names the nearest choice.
    """
    if value not in choices:
        near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={value!r} is none of {choices}{hint}{otherwise and f'; {otherwise}'}")


def require_positive(cfg: HookedTransformerConfig, name: str, at_least: int = 1) -> None:
    """Check that a field is an integer of at least 1, or of another least value."""
    require_positive_integer(name, getattr(cfg, name), at_least)


def require_positive_integer(name: str, value: object, at_least: int = 1) -> None:
    """Check that a field's value is an integer of at least 1, or of another least value.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} is an integer of at least {at_least}; got {value!r}")


def require_above_zero(cfg: HookedTransformerConfig, *names: str, or_none: bool = False) -> None:
    """Check that fields are positive, finite numbers."""
    for name in names:
        value = getattr(cfg, name)
        if not (is_above_zero(value) or (or_none and value is None)):
            raise ValueError(f"{name} is positive; got {value!r}")


def require_divisible(cfg: HookedTransformerConfig, name: str, by: str, otherwise: str) -> None:
    """Check that one field is a multiple of another; `otherwise` ends the message."""
    if getattr(cfg, name) % getattr(cfg, by):
        raise ValueError(f"{name} {getattr(cfg, name)} is not a multiple of {by} {getattr(cfg, by)}: {otherwise}")


def is_above_zero(value: object) -> bool:
    """Return whether a value is a positive, finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def parse_dtype(dtype: object) -> torch.dtype:
    """Return a floating-point torch dtype from itself or from its name.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    # No float8: torch has no products and sums of those.
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype is a floating-point torch dtype or its name; got {dtype!r}")
    return dtype
