"""Where the parts of a trace's runs are in the tensors of one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hooked_lm.interventions import Operation
from hooked_lm.names import POSITION_AXES, selected_axis
from hooked_lm.tracing.graph import Entries, Select

__all__ = ["Part", "RunRows"]

Index = slice | Tensor


@dataclass(frozen=True)
class RunRows:
    """The rows of a pass that are a run's prompts, padded on the left.

    Attributes:
        start: the first row.
        lengths: how many positions of each prompt are meant: all of them, or the one that a step reads.
        stop: the column behind the last of them.
        n_rows, n_columns: of the pass.
        key_lengths, key_stop: the same as `lengths` and `stop`, for the keys of scores and patterns.
    """

    start: int
    lengths: tuple[int, ...]
    stop: int
    n_rows: int
    n_columns: int
    key_lengths: tuple[int, ...]
    key_stop: int

    @classmethod
    def of_prompts(cls, start: int, lengths: tuple[int, ...], n_rows: int, n_columns: int) -> RunRows:
        """Return the rows of prompts that are read in one pass.

        Args:
            start: the first row.
            lengths: of the prompts.
            n_rows, n_columns: of the pass.
        """
        return cls(start, lengths, n_columns, n_rows, n_columns, lengths, n_columns)


class Part:
    """A part of an activation of a run, within the activation of the pass.

    Args:
        rows: the run's rows.
        axes: of the site.
        select: the part.
        columns: the positions that the activation has, in order; None for all of the pass.
    """

    def __init__(
        self, rows: RunRows, axes: Sequence[str], select: Select, columns: Sequence[int] | None = None
    ) -> None:
        self.rows, self.axes = rows, tuple(axes)
        self.chosen: dict[int, Entries] = {}
        self.dropped: list[int] = []
        for name, entries in select.chosen().items():
            if name == "step":
                continue
            axis = selected_axis(axes, name)
            assert axis is not None
            self.chosen[axis] = entries
            if not isinstance(entries, tuple):
                self.dropped.append(axis)
        self.places = None if columns is None else {column: place for place, column in enumerate(columns)}
        self.is_all = not self.chosen and self.places is None and self._fills_pass()
        self._index: tuple[Index, ...] | None = None
        # True at a prompt's own tokens, where all positions of prompts of unequal lengths are written; broadcasts to
        # the part.
        self.own: Tensor | None = None

    def _fills_pass(self) -> bool:
        rows = self.rows
        whole = len(rows.lengths) == rows.n_rows and set(rows.lengths) == {rows.n_columns}
        return whole and set(rows.key_lengths) == {rows.key_stop}

    def read(self, x: Tensor) -> Tensor:
        """Return the part: a view where slices select it.

        Args:
            x: the activation of the pass.
        """
        if self.is_all:
            return x
        part = x[self._indices(x)]
        for axis in sorted(self.dropped, reverse=True):
            part = part.squeeze(axis)
        return part

    def write(self, x: Tensor, how: Operation, value: Tensor | float | None) -> Tensor:
        """Return the activation with an edit made at the part.

        Args:
            x: the activation of the pass.
            how: the edit.
            value: broadcasts to the part.
        """
        index = self._indices(x)
        before = x if self.is_all else x[index]
        after = self._edited(before, how, value)
        if self.own is not None:
            after = torch.where(self.own.to(x.device), after, before)
        if self.is_all:
            return after
        edited = x.clone()
        edited[index] = after
        return edited

    def _edited(self, before: Tensor, how: Operation, value: Tensor | float | None) -> Tensor:
        if how == "zero":
            return torch.zeros_like(before)
        given = torch.as_tensor(value, dtype=before.dtype, device=before.device)
        kept = [axis for axis in range(before.ndim) if axis not in self.dropped]
        # The value's axes are the last of those that the part keeps; dropped ones come back with size 1.
        shape = [1] * before.ndim
        for axis, size in zip(reversed(kept), reversed(given.shape), strict=False):
            shape[axis] = size
        given = given.reshape(shape)
        if how == "replace":
            return given.expand_as(before)
        return before + given if how == "add" else before * given

    # Indices that keep every axis

    def _indices(self, x: Tensor) -> tuple[Index, ...]:
        if self._index is None:
            self._index = self._found(x)
        return self._index

    def _found(self, x: Tensor) -> tuple[Index, ...]:
        prompts = self._prompts()
        by_axis: list[list[int] | list[list[int]] | None] = []  # entries; a list for each prompt; None for all
        for axis, name in enumerate(self.axes):
            if axis == 0:
                by_axis.append([self.rows.start + one for one in prompts])
            elif name in POSITION_AXES:
                by_axis.append(self._columns(axis, name, prompts))
            else:
                entries = self.chosen.get(axis)
                by_axis.append(None if entries is None else list(_several(entries)))
        slices = [slice(None) if one is None else _as_slice(one) for one in by_axis]
        if None not in slices:
            return tuple(one for one in slices if one is not None)
        made = []
        for axis, entries_or_none in enumerate(by_axis):
            shape = [1] * len(by_axis)
            shape[axis] = -1
            if entries_or_none is None:
                index = torch.arange(x.shape[axis], device=x.device)
            else:
                index = torch.tensor(entries_or_none, device=x.device)
                if index.ndim == 2:
                    shape[0] = len(prompts)
            made.append(index.reshape(shape))
        return tuple(made)

    def _prompts(self) -> list[int]:
        entries = self.chosen.get(0)
        return list(range(len(self.rows.lengths))) if entries is None else list(_several(entries))

    def _columns(self, axis: int, name: str, prompts: Sequence[int]) -> list[int] | list[list[int]]:
        """The columns of each prompt's positions: one list if they are the same for all prompts."""
        entries, rows = self.chosen.get(axis), self.rows
        own_lengths, stop = (rows.key_lengths, rows.key_stop) if name == "key" else (rows.lengths, rows.stop)
        lengths = [own_lengths[prompt] for prompt in prompts]
        if entries is None and len(set(lengths)) > 1:
            own = torch.arange(stop) >= stop - torch.tensor(lengths)[:, None]
            own = own.reshape([len(lengths) if i == 0 else stop if i == axis else 1 for i in range(len(self.axes))])
            self.own = own if self.own is None else self.own & own
            found = [list(range(stop))]
        else:
            found = [
                [stop - length + one % length for one in (range(length) if entries is None else _several(entries))]
                for length in lengths
            ]
        if self.places is not None and name != "key":
            found = [[self.places[column] for column in columns] for columns in found]
        return found[0] if all(one == found[0] for one in found) else found


def _several(entries: Entries) -> tuple[int, ...]:
    assert entries is not None
    return entries if isinstance(entries, tuple) else (entries,)


def _as_slice(entries: Sequence[int] | Sequence[Sequence[int]]) -> slice | None:
    """The slice that selects these entries; None if none does."""
    first = entries[0]
    if not isinstance(first, int):
        return None
    step = entries[1] - first if len(entries) > 1 else 1  # type: ignore[operator]
    if step < 1 or any(entry != first + index * step for index, entry in enumerate(entries)):
        return None
    return slice(first, entries[-1] + 1, step)  # type: ignore[operator]
