"""How a config's heads and neurons are shared out: the sizes of each rank's part, and the axis of each parameter."""

from __future__ import annotations

import re
from dataclasses import fields

from hooked_lm.components.ranks import SplitAxis
from hooked_lm.config import HookedTransformerConfig

__all__ = ["PartOfConfig", "axis_of", "check_sizes", "kv_copies"]

# Name of a parameter of a block -> what its axis is shared out by, and the axis.
_SPLIT: dict[str, tuple[str, int]] = {
    r"attn\.(W_Q|W_O|b_Q|W_G|b_G|sinks|W_UQ|W_UK|W_UV)": ("head", 0),
    r"attn\.(W_K|W_V|b_K|b_V)": ("kv_head", 0),
    r"attn\.q_norm\.(w|b)": ("gains of heads", 0),
    r"attn\.k_norm\.(w|b)": ("gains of key-value heads", 0),
    r"mlp(\.shared)?\.(W_in|W_gate)": ("d_mlp", -1),
    r"mlp(\.shared)?\.(b_in|b_gate)": ("d_mlp", -1),
    r"mlp(\.shared)?\.W_out": ("d_mlp", -2),
    r"shortcut\.(W_in|W_gate|b_in|b_gate)": ("d_mlp", -1),
    r"shortcut\.W_out": ("d_mlp", -2),
}


def kv_copies(cfg: HookedTransformerConfig, size: int) -> int:
    """Return how many ranks in a row have the same key-value head: more than one where there are fewer than ranks.

    Args:
        cfg: the whole config.
        size: how many ranks.
    """
    return max(1, size // cfg.n_kv_heads)


def check_sizes(cfg: HookedTransformerConfig, size: int) -> None:
    """Check that a config can be shared out.

    Args:
        cfg: the whole config.
        size: among so many ranks.

    Raises:
        ValueError: heads, key-value heads or neurons do not divide, or the model has what no rank can compute alone.
    """
    if cfg.n_heads % size:
        raise ValueError(f"{cfg.n_heads} heads are not shared out evenly among {size} processes")
    if cfg.n_kv_heads % size and size % cfg.n_kv_heads:
        raise ValueError(
            f"{cfg.n_kv_heads} key-value heads and {size} processes: one number has to be a multiple of the other"
        )
    for name in ("d_mlp", "d_expert", "d_shared_expert"):
        width = getattr(cfg, name)
        if width is not None and width % size and not cfg.attn_only:
            raise ValueError(f"{name}={width} neurons are not shared out evenly among {size} processes")
    if not cfg.attn_only and cfg.is_layer_norm_activation():
        raise ValueError(f"{cfg.act_fn!r} normalises all neurons together: such a model runs in one process")


def axis_of(name: str, ndim: int, cfg: HookedTransformerConfig, size: int) -> SplitAxis | None:
    """Return along which axis a parameter is shared out; None for one that every rank has whole.

    Args:
        name: in the model.
        ndim: how many axes it has.
        cfg: the whole config.
        size: how many ranks.
    """
    in_block = re.fullmatch(r"blocks\.\d+\.(.+)", name)
    if in_block is None:
        return None
    for pattern, (shared, dim) in _SPLIT.items():
        if re.fullmatch(pattern, in_block[1]) is None:
            continue
        if shared.startswith("gains") and (cfg.qk_norm_across_heads or not cfg.qk_norm_per_head_gains):
            return None
        by_kv = shared in ("kv_head", "gains of key-value heads")
        return SplitAxis(dim % ndim, kv_copies(cfg, size) if by_kv else 1)
    return None


_FIELDS = frozenset(one.name for one in fields(HookedTransformerConfig))


class PartOfConfig(HookedTransformerConfig):
    """A config as the blocks of one rank see it: that of the whole model, with the sizes of the rank's part.

    Attributes:
        whole: the whole model's config. Fields that are assigned there are read here.
    """

    whole: HookedTransformerConfig

    def __getattribute__(self, name: str) -> object:
        own: dict[str, object] = object.__getattribute__(self, "__dict__")
        if name in own:
            return own[name]
        if name in _FIELDS:
            return getattr(own["whole"], name)
        return object.__getattribute__(self, name)  # what is computed of fields is computed of these

    @classmethod
    def of(cls, whole: HookedTransformerConfig, size: int) -> PartOfConfig:
        """Return a part's config.

        Args:
            whole: the whole model's.
            size: how many ranks.
        """
        part = object.__new__(cls)
        sizes: dict[str, object] = {"whole": whole, "n_heads": whole.n_heads // size}
        if whole.n_key_value_heads is not None:
            sizes["n_key_value_heads"] = whole.n_kv_heads * kv_copies(whole, size) // size
        for name in ("d_mlp", "d_expert", "d_shared_expert"):
            width = getattr(whole, name)
            sizes[name] = None if width is None else width // size
        object.__getattribute__(part, "__dict__").update(sizes)
        return part
