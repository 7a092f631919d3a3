"""The highest activations of each unit so far, as a corpus is read."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Highest"]


class Highest:
    """The `k` highest activations of each unit so far, and their contexts.

    Args:
        k: how many.
        context: tokens on either side.
        one_per_text: at most one of each text.
    """

    def __init__(self, k: int, context: int, one_per_text: bool) -> None:
        self.k, self.context, self.one_per_text = k, context, one_per_text
        # Values [unit k], texts, positions, context tokens [unit k context], context values; none before a batch.
        self.fields: tuple[Tensor, ...] = ()

    def _start(self, values: Float[Tensor, "batch pos unit"], tokens: Tensor) -> None:
        shape, window = (values.shape[-1], self.k), 2 * self.context + 1
        self.fields = (
            values.new_full(shape, float("-inf")),
            tokens.new_full(shape, -1),
            tokens.new_full(shape, -1),
            tokens.new_full((*shape, window), -1),
            values.new_full((*shape, window), float("nan")),
        )

    def add(
        self,
        values: Float[Tensor, "batch pos unit"],
        tokens: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch pos"],
        scored: Bool[Tensor, "batch pos"],
        texts: list[int],
    ) -> None:
        """Take in a batch of texts that come after all before."""
        if not self.fields:
            self._start(values, tokens)
        scored = scored[..., None]
        wrong = (scored & ~values.isfinite()).flatten(1).any(1)
        if wrong.any():
            raise ValueError(f"text {texts[int(wrong.int().argmax())]} has activations that are NaN or infinite")
        values = values.masked_fill(~scored, float("-inf"))
        n_pos = tokens.shape[1]
        if self.one_per_text:
            best = values.max(1)  # the first of equal ones
            found = best.values.T
            places = best.indices.T + torch.arange(len(tokens), device=values.device) * n_pos
        else:
            found = rearrange(values, "batch pos unit -> unit (batch pos)")
            places = torch.arange(found.shape[1], device=values.device).expand_as(found)
        # An activation equal to the lowest that is kept comes too late. Most are lower: only as many as one unit has
        # above its lowest are looked at, in their order in the corpus.
        n_above = (found > self.fields[0][:, -1:]).sum(1)
        units = n_above.nonzero()[:, 0]
        if not len(units):
            return
        before, found = [one[units] for one in self.fields], found[units]
        candidates = found.topk(int(n_above.max()), dim=1).indices.sort(1).values
        # What was kept stands first, and a stable sort leaves it before what equals it.
        joined = torch.cat([before[0], found.gather(1, candidates)], 1)
        order = joined.sort(stable=True, dim=1, descending=True).indices[:, : self.k]
        is_new, rank = order >= self.k, order.clamp(max=self.k - 1)
        place = places[units].gather(1, candidates.gather(1, (order - self.k).clamp(min=0)))
        after = self._described(values, tokens, mask, torch.tensor(texts).to(tokens), units, place)
        for field_, old, new in zip(self.fields, before, after, strict=True):
            several = field_.ndim == 3
            index = rank[..., None].expand_as(old) if several else rank
            field_[units] = torch.where(is_new[..., None] if several else is_new, new, old.gather(1, index))

    def _described(
        self,
        values: Float[Tensor, "batch pos unit"],
        tokens: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch pos"],
        texts: Int[Tensor, " batch"],
        units: Int[Tensor, " some"],
        place: Int[Tensor, "some k"],
    ) -> tuple[Tensor, ...]:
        """The five fields of tokens of this batch, by their places in it."""
        n_pos = tokens.shape[1]
        row, pos = place // n_pos, place % n_pos
        value = values[row, pos, units[:, None]]
        none = value == float("-inf")
        around = pos[..., None] + torch.arange(-self.context, self.context + 1, device=pos.device)
        inside = (around >= 0) & (around < n_pos)
        around, row_, unit = around.clamp(0, n_pos - 1), row[..., None], units[:, None, None]
        inside &= mask[row_, around].bool() & ~none[..., None]
        activations = values[row_, around, unit]
        return (
            value,
            texts[row].masked_fill(none, -1),
            pos.masked_fill(none, -1),
            tokens[row_, around].masked_fill(~inside, -1),
            activations.masked_fill(~inside | activations.isinf(), float("nan")),
        )
