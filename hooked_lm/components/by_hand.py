"""What a component is given when it is called by hand, with the keywords of the classic library, and not by a model."""

from __future__ import annotations

import inspect

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from hooked_lm._support.torch_internals import values_readable
from hooked_lm.components.positions import wrong_mask
from hooked_lm.components.sequence import SequenceLayout
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.kv_cache import HookedTransformerKeyValueCacheEntry

__all__ = ["call_own", "positions_by_hand", "refuse_position_bias", "sequence_by_hand", "valid_positions", "window_of"]

_Past = HookedTransformerKeyValueCacheEntry | None


def sequence_by_hand(
    x: Tensor,
    layout: object,
    past: _Past,
    past_kv_cache_entry: _Past,
    attention_mask: Tensor | None,
    additive_mask: Tensor | None = None,
) -> tuple[SequenceLayout, _Past]:
    """Return the layout of a call by hand, and the layer's key-value cache.

    Args:
        x: the input, [batch pos ...].
        layout: the layout, as a model gives it; None for one that follows from the other arguments.
        past, past_kv_cache_entry: the key-value cache, by its two names.
        attention_mask: [batch key], 0 at padding, over the positions of the cache and the new ones.
        additive_mask: numbers to add to the masked scores.

    Raises:
        TypeError: another object in the layout's place.
        ValueError: two key-value caches, a layout and a mask, or a mask of another shape.
    """
    if past is not None and past_kv_cache_entry is not None and past is not past_kv_cache_entry:
        raise ValueError("past and past_kv_cache_entry are two names of one key-value cache: give one of them")
    past = past_kv_cache_entry if past is None else past
    if isinstance(layout, SequenceLayout):
        if attention_mask is not None or additive_mask is not None:
            raise ValueError("a layout says what is masked: give attention_mask or layout, not both")
        return layout, past
    if layout is not None:
        raise TypeError(
            f"layout is a SequenceLayout, got {type(layout).__name__}: give past_kv_cache_entry=, attention_mask= and "
            "shortformer_pos_embed= by keyword"
        )
    n_past = 0 if past is None else past.past_keys.shape[1]
    valid = valid_positions(attention_mask, x.shape[0], n_past + x.shape[1])
    if valid is not None:
        valid = valid.to(x.device)
    return SequenceLayout(x.shape[1], n_past, x.device, valid, additive_mask), past


def positions_by_hand(x: Tensor, positions: Tensor | None) -> Tensor | None:
    """Return positions to add to the inputs of queries and keys, as they came.

    Args:
        x: the input they are added to, [batch pos d_model].
        positions: of the same shape, or with one prompt for all; None for none.

    Raises:
        ValueError: another shape, such as that of a mask in their place.
    """
    if positions is not None and positions.shape not in (x.shape, (1, *x.shape[1:])):
        raise ValueError(
            f"shortformer_pos is added to the stream {list(x.shape)}, got {list(positions.shape)}: "
            "a mask is given as attention_mask="
        )
    return positions


def valid_positions(attention_mask: Tensor | None, batch: int, n_keys: int) -> Bool[Tensor, "batch key"] | None:
    """Return which positions are text; None if all are.

    Args:
        attention_mask: [batch key], 0 at padding; None for no padding.
        batch: the number of prompts.
        n_keys: the number of positions, those of a key-value cache included.

    Raises:
        ValueError: a mask of another shape.
    """
    if attention_mask is None:
        return None
    if tuple(attention_mask.shape) != (batch, n_keys):
        raise wrong_mask(attention_mask, batch, n_keys)
    valid = attention_mask.to(torch.bool)
    return None if values_readable(valid) and bool(valid.all()) else valid


def window_of(cfg: HookedTransformerConfig, attn_type: str | None, layer: int) -> int | None:
    """Return how many positions a query of a layer sees; None for all.

    Args:
        cfg: the config.
        attn_type: `"global"`, `"local"`, or None for what the config says of the layer.
        layer: the layer.

    Raises:
        ValueError: another `attn_type`, or `"local"` without a `window_size`.
    """
    if attn_type is None:
        return cfg.window(layer)
    if attn_type not in ("global", "local"):
        raise ValueError(f"attn_type is 'global' or 'local', got {attn_type!r}; a layer's number is layer_id=")
    if attn_type == "local" and cfg.window_size is None:
        raise ValueError("local attention needs the config's window_size, which is None")
    return cfg.window_size if attn_type == "local" else None


def refuse_position_bias(position_bias: Tensor | None) -> None:
    """Check that attention was given no relative position bias.

    Raises:
        ValueError: it was given one.
    """
    if position_bias is not None:
        raise ValueError(
            "position_bias is T5's, and there is no encoder-decoder model here: numbers to add to the scores are "
            "additive_attention_mask="
        )


def call_own(
    component: nn.Module,
    inputs: tuple[Tensor, ...],
    layout: SequenceLayout,
    past: _Past,
    shortformer_pos: Tensor | None,
) -> Tensor:
    """Return the output of a block or an attention that a user wrote, called in the words that its `forward` knows.

    Args:
        component: takes `layout` and `past`, as this package's; or as the classic library's `past_kv_cache_entry`,
            `attention_mask` and, of a block, `shortformer_pos_embed`.
        inputs: the residual stream, or the inputs of queries, keys and values.
        layout: lengths, padding and positions.
        past: the layer's key-value cache.
        shortformer_pos: of a block, positions to add to the inputs of queries and keys.
    """
    named = inspect.signature(component.forward).parameters
    output: Tensor
    if "layout" in named or "past_kv_cache_entry" not in named:
        added = () if len(inputs) == 3 else (shortformer_pos,)
        output = component(*inputs, layout, past, *added)
        return output
    mask = None if layout.valid is None else layout.valid.long()
    given = {"attention_mask": mask, "shortformer_pos_embed": shortformer_pos}
    words = {name: value for name, value in given.items() if name in named}
    output = component(*inputs, past_kv_cache_entry=past, **words)
    return output
