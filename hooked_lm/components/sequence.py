"""SequenceLayout: the lengths, padding and positions of one forward pass, and the masks and tables computed from them.

Each mask and table is computed once per pass and shared by all layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_lm._support.integers import integer, is_integer
from hooked_lm.components.positions import (
    AlibiSpec,
    QueryScaleSpec,
    RotarySpec,
    alibi_slopes,
    positions_of_text,
    query_scales,
    rotary_tables,
)
from hooked_lm.hooks import KeptPositions

__all__ = ["Prompt", "SequenceLayout", "kept_index", "kept_positions"]


class SequenceLayout:
    """The shape of one forward pass.

    Args:
        n_queries: positions computed in this pass.
        n_past: positions before them, in the key-value cache.
        valid: [batch key] False at padding, over past and new positions; None when nothing is padded.
        additive_mask: numbers to add to the masked scores, [batch head query key] or of a shape that broadcasts to it;
            None for none.
    """

    def __init__(
        self,
        n_queries: int,
        n_past: int,
        device: torch.device,
        valid: Bool[Tensor, "batch key"] | None = None,
        additive_mask: Tensor | None = None,
    ) -> None:
        self.n_queries, self.n_past, self.device, self.valid = n_queries, n_past, device, valid
        self.additive_mask = additive_mask
        self._made: dict[object, Tensor | tuple[Tensor, Tensor] | None] = {}
        self._carried: Tensor | None = None
        self._elsewhere: dict[torch.device, SequenceLayout] = {}

    def on(self, device: torch.device) -> SequenceLayout:
        """Return this layout with its masks and tables on another device, the same one for every block there.

        Args:
            device: of the blocks.
        """
        if device == self.device:
            return self
        if device not in self._elsewhere:
            valid, additive = (None if one is None else one.to(device) for one in (self.valid, self.additive_mask))
            self._elsewhere[device] = SequenceLayout(self.n_queries, self.n_past, device, valid, additive)
        return self._elsewhere[device]

    def carry(self, x: Float[Tensor, "batch pos d_model"]) -> None:
        """Keep what a block computes for the next block of this pass to add."""
        self._carried = x

    def take_carried(self) -> Float[Tensor, "batch pos d_model"] | None:
        """Return what the block before has computed for this one, once; None if it has not run in this pass."""
        carried, self._carried = self._carried, None
        return carried

    @property
    def n_keys(self) -> int:
        return self.n_past + self.n_queries

    @property
    def real_queries(self) -> Bool[Tensor, "batch query"] | None:
        """False where a position of this pass is padding; None when nothing is padded."""
        return None if self.valid is None else self.valid[:, self.n_past :]

    @property
    def position_ids(self) -> Int[Tensor, "batch_or_1 query"]:
        """The position of each query within its own prompt: padding is not counted."""
        if "positions" not in self._made:
            self._made["positions"] = self._key_positions()[:, self.n_past :]
        return self._made["positions"]  # type: ignore[return-value]

    def is_plainly_causal(self, window: int | None) -> bool:
        """Whether the mask is the full lower triangle, for which fused attention needs no mask (`is_causal`)."""
        # Two statements: under torch.compile with dynamic shapes one expression would be symbolic, not a bool.
        if window is not None and window < self.n_keys:
            return False
        return self.valid is None and self.n_past == 0

    def mask(self, causal: bool, window: int | None) -> Bool[Tensor, "batch_or_1 1 query key"] | None:
        """Return which keys each query may attend to; None if every key."""
        key = ("mask", causal, window)
        if key not in self._made:
            self._made[key] = self._make_mask(causal, window)
        return self._made[key]  # type: ignore[return-value]

    def _make_mask(self, causal: bool, window: int | None) -> Tensor | None:
        # Every key, as in a step of generation. It follows from the lengths: to read a mask on an accelerator would be
        # to wait for all work so far.
        in_window = window is None or window >= self.n_keys
        if self.valid is None and in_window and (self.n_queries == 1 or not causal):
            return None
        # Comparisons rather than a matrix of distances, which would take eight bytes for each of its entries.
        queries = torch.arange(self.n_past, self.n_keys, device=self.device)[:, None]
        keys = torch.arange(self.n_keys, device=self.device)[None]
        allowed = (keys <= queries if causal else torch.ones_like(keys <= queries))[None]
        if window is not None:
            places = self._key_positions()
            here, there = places[:, self.n_past :, None], places[:, None, :]
            allowed = allowed & (there > here - window) & (there < here + window)
        allowed = allowed[:, None]
        if self.valid is not None:
            # A query at padding has no real key; it attends to itself, so that its softmax is defined.
            allowed = (allowed & self.valid[:, None, None, :]) | (keys == queries)
        return allowed

    def _distance(self) -> Int[Tensor, "batch_or_1 query key"]:
        """Return the distance of query and key within their prompt, padding not counted."""
        if self.valid is None:
            return self._slot_distance()[None]
        positions = self._key_positions()
        return positions[:, self.n_past :, None] - positions[:, None, :]

    def _slot_distance(self) -> Int[Tensor, "query key"]:
        queries = torch.arange(self.n_past, self.n_keys, device=self.device)
        keys = torch.arange(self.n_keys, device=self.device)
        return queries[:, None] - keys[None, :]

    def alibi(self, spec: AlibiSpec, dtype: torch.dtype) -> Float[Tensor, "batch_or_1 head query_or_1 key"]:
        """Return ALiBi's bias on the scores, minus slope times distance (Press et al. 2022).

        Rounded to bfloat16, it is slope times the key's position instead: the same to a softmax, apart from rounding.
        """
        key = (spec, dtype)
        if key not in self._made:
            slopes = alibi_slopes(spec.n_heads, self.device)[slice(*(spec.part or (None,)))][:, None, None]
            if spec.in_bfloat16:
                slopes = slopes.bfloat16()
                bias = slopes * self._key_positions()[:, None, None, :]
            else:
                bias = -slopes * self._distance().abs()[:, None]
            self._made[key] = bias.to(dtype) * spec.scale
        return self._made[key]  # type: ignore[return-value]

    def _key_positions(self) -> Int[Tensor, "batch_or_1 key"]:
        """Return the position of each key within its prompt."""
        if self.valid is None:
            return torch.arange(self.n_keys, device=self.device)[None]
        return positions_of_text(self.valid)

    def _lengths(self) -> Int[Tensor, " batch_or_1"]:
        """Return the length of each prompt, padding not counted."""
        if self.valid is None:
            return torch.full((1,), self.n_keys, device=self.device)
        return self.valid.sum(-1)

    def bias(self, causal: bool, window: int | None, alibi: AlibiSpec, dtype: torch.dtype) -> Tensor:
        """Return ALiBi and mask as one tensor to add to the scores."""
        key = ("bias", causal, window, alibi, dtype)
        if key not in self._made:
            bias, allowed = self.alibi(alibi, dtype), self.mask(causal, window)
            self._made[key] = bias if allowed is None else bias.masked_fill(~allowed, float("-inf"))
        return self._made[key]  # type: ignore[return-value]

    def rotary(self, spec: RotarySpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines for this pass's positions, each [batch_or_1 query 1 rotary_dim]."""
        key = (spec, dtype)
        if key not in self._made:
            cos, sin = rotary_tables(spec, self.position_ids, self._lengths())
            self._made[key] = (cos.to(dtype), sin.to(dtype))
        return self._made[key]  # type: ignore[return-value]

    def query_scales(self, spec: QueryScaleSpec, dtype: torch.dtype) -> Float[Tensor, "batch_or_1 query 1 1"]:
        """Return the factor on each query of this pass."""
        key = (spec, dtype)
        if key not in self._made:
            self._made[key] = query_scales(spec, self.position_ids).to(dtype)
        return self._made[key]  # type: ignore[return-value]


def kept_positions(logits_to_keep: int | slice | Tensor | None, n_positions: int) -> KeptPositions | None:
    """Return the positions that `logits_to_keep` selects among those of a pass; None for all.

    Args:
        logits_to_keep: as for a call of the model: the last so many, or a slice or index of positions.
        n_positions: how many the pass has.

    Raises:
        TypeError, ValueError: as `kept_index`.
    """
    if logits_to_keep is None:
        return None
    index = kept_index(logits_to_keep, n_positions)
    kept = torch.arange(n_positions)[index.cpu() if isinstance(index, Tensor) else index]
    return KeptPositions(tuple(kept.tolist()), n_positions)


def kept_index(logits_to_keep: object, n_positions: int) -> slice | Tensor:
    """Return `logits_to_keep` as an index of the positions of a pass, checked.

    Args:
        logits_to_keep: the last so many; or a slice, or a tensor, array or list of positions.
        n_positions: how many the pass has.

    Raises:
        TypeError: something else.
        ValueError: a position that is not there, or none at all.
    """
    if isinstance(logits_to_keep, int) and not isinstance(logits_to_keep, bool):
        return _last(logits_to_keep, n_positions)
    if isinstance(logits_to_keep, slice):
        if not torch.compiler.is_compiling() and not range(n_positions)[logits_to_keep]:
            raise ValueError(f"logits_to_keep {logits_to_keep} keeps none of the {n_positions} positions there are")
        return logits_to_keep
    if isinstance(logits_to_keep, (list, np.ndarray)) and np.asarray(logits_to_keep).dtype.kind in "iub":
        logits_to_keep = torch.as_tensor(np.asarray(logits_to_keep))
    if is_integer(logits_to_keep):
        return _last(integer(logits_to_keep, "logits_to_keep"), n_positions)
    if not isinstance(logits_to_keep, Tensor) or logits_to_keep.is_floating_point() or logits_to_keep.ndim != 1:
        raise TypeError(
            f"logits_to_keep is an int, a slice or a tensor of positions (one axis, integers), got {logits_to_keep!r}"
        )
    if logits_to_keep.dtype == torch.bool or torch.compiler.is_compiling():
        return logits_to_keep
    outside = (logits_to_keep < -n_positions) | (logits_to_keep >= n_positions)
    if logits_to_keep.numel() == 0 or bool(outside.any()):
        raise ValueError(
            f"logits_to_keep keeps positions 0-{n_positions - 1} of this input, one at least; got "
            f"{logits_to_keep.tolist()}"
        )
    return logits_to_keep


def _last(count: int, n_positions: int) -> slice:
    if not 1 <= count <= n_positions:
        raise ValueError(f"logits_to_keep is 1-{n_positions} for this input, got {count}")
    return slice(-count, None)


@dataclass(frozen=True, eq=False)
class Prompt:
    """The checked input of a forward pass.

    Attributes:
        tokens: [batch pos]; None for a pass that begins with a residual and was given no tokens.
        mask: [batch pos], 0 at padding, as it was given or inferred; None if nothing is padded.
        residual: the residual stream [batch pos d_model] at the first block; None for a pass that begins with tokens,
            until they are embedded.
        layout: lengths, padding and positions.
        shortformer_pos: [batch pos d_model] to add to the inputs of queries and keys in place of the model's own
            positions; None for those.
    """

    tokens: Int[Tensor, "batch pos"] | None
    mask: Tensor | None
    residual: Float[Tensor, "batch pos d_model"] | None
    layout: SequenceLayout
    shortformer_pos: Float[Tensor, "batch pos d_model"] | None = None

    def with_positions(self, shortformer_pos: Tensor) -> Prompt:
        """Return this input with positions given by the caller, checked.

        Args:
            shortformer_pos: [batch pos d_model].

        Raises:
            ValueError: the input is tokens, whose positions are the model's own; or the shapes differ.
        """
        if self.residual is None:
            raise ValueError("shortformer_pos_embed goes with start_at_layer; tokens have the model's own positions")
        if shortformer_pos.shape != self.residual.shape:
            raise ValueError(
                f"shortformer_pos_embed has the shape of the residual stream, {list(self.residual.shape)}; got "
                f"{list(shortformer_pos.shape)}"
            )
        return replace(self, shortformer_pos=shortformer_pos)
