"""axis_size: the length of an activation's axis, from the config alone."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from hooked_lm.names import SELECTED_AXES

__all__ = ["axis_size"]


def axis_size(cfg: HookedTransformerConfig, site: str, axis: str) -> int | None:
    """Return the length of an axis of an activation, or None if it depends on the prompts.

    Args:
        cfg: the model's config.
        site: full hook name.
        axis: the axis's name; position axes have the context's length.
    """
    # A generation reads positions up to the context's length, also where a pass has fewer.
    positions = dict.fromkeys(SELECTED_AXES["pos"], cfg.n_ctx)
    return {
        "head": cfg.n_heads,
        "kv_head": cfg.n_hooked_kv_heads,
        "d_model": cfg.d_model,
        **cfg.attention_widths(of_values=site.endswith((".hook_v", ".hook_z"))),
        "d_mlp": cfg.d_shared_expert if ".mlp.shared." in site else cfg.d_mlp,
        "vocab": cfg.d_vocab_out,
        "expert": cfg.num_experts,
        "chosen": cfg.experts_per_token,
        **positions,
    }.get(axis)
