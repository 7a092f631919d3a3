"""The classic setters: patches of part of an activation, as functions and as data for a sweep."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, cast

from torch import Tensor

from hooked_lm.interventions import Intervention
from hooked_lm.names import SELECTED_AXES, grid_axis

__all__ = [
    "Index",
    "PatchSetter",
    "SetterFunction",
    "layer_head_dest_src_pos_pattern_patch_setter",
    "layer_head_pattern_patch_setter",
    "layer_head_pos_pattern_patch_setter",
    "layer_head_vector_patch_setter",
    "layer_pos_head_vector_patch_setter",
    "layer_pos_patch_setter",
]

# The index of a cell: a number for each axis.
Index = Sequence[object]
# (activation of the corrupted run, index of the cell, activation of the clean run) -> the activation to go on with.
# The type of an index is open: the columns of an `index_df` hold whatever the caller's own setter understands.
SetterFunction = Callable[[Tensor, list[Any], Tensor], Tensor | None]


@dataclass(frozen=True)
class PatchSetter:
    """A patch of part of an activation, by the cell's index: a function, as one would write it, and data for a sweep.

    Attributes:
        name: its name in this module.
        index_axes: the axes that the numbers of an index are along; the first is the layer.
        activation_axes: the axes that an activation must have after `batch`.
    """

    name: str
    index_axes: tuple[str, ...]
    activation_axes: tuple[str, ...]

    def __call__(self, corrupted_activation: Tensor, index: Index, clean_activation: Tensor) -> Tensor:
        """Write the clean activation's part into the corrupted one, in place, and return that."""
        where = self._where(index)
        corrupted_activation[where] = clean_activation[where]
        return corrupted_activation

    def intervention(self, site: str, index: Index, clean_activation: Tensor) -> Intervention:
        """Return the same patch at a hook name, as data.

        Args:
            site: the hook name.
            index: of the cell: an entry for each of `index_axes`, the layer first.
            clean_activation: the whole activation; the index selects the part that is put in.
        """
        fields = {grid_axis(axis).field: entry for axis, entry in self._entries(index).items()}
        return Intervention(site, "replace", clean_activation[self._where(index)], **fields)

    def check(self, site: str, axes: Sequence[str]) -> None:
        """Check that a site's activations have the axes that are indexed.

        Args:
            site: the hook name; for the message.
            axes: the axes there, the batch first.

        Raises:
            ValueError: they have others.
        """
        found = tuple(
            "head" if axis in SELECTED_AXES["head"] else axis for axis in axes[1 : 1 + len(self.activation_axes)]
        )
        if found != self.activation_axes:
            raise ValueError(
                f"{self.name} patches activations [batch {' '.join(self.activation_axes)} ...], "
                f"but those at {site!r} are [{' '.join(axes)}]"
            )

    def _entries(self, index: Index) -> dict[str, int]:
        if len(index) != len(self.index_axes):
            raise ValueError(f"{self.name} takes an index ({', '.join(self.index_axes)}), got {list(index)}")
        try:
            entries = [operator.index(cast(SupportsIndex, entry)) for entry in index]
        except TypeError:
            raise ValueError(f"the index of {self.name} is made of integers, got {list(index)}") from None
        return dict(zip(self.index_axes[1:], entries[1:], strict=True))

    def _where(self, index: Index) -> tuple[int | slice, ...]:
        chosen = {grid_axis(name).along[0]: entry for name, entry in self._entries(index).items()}
        return (slice(None), *(chosen.get(axis, slice(None)) for axis in self.activation_axes))


layer_pos_patch_setter = PatchSetter("layer_pos_patch_setter", ("layer", "pos"), ("pos",))
layer_pos_head_vector_patch_setter = PatchSetter(
    "layer_pos_head_vector_patch_setter", ("layer", "pos", "head"), ("pos", "head")
)
layer_head_vector_patch_setter = PatchSetter("layer_head_vector_patch_setter", ("layer", "head"), ("pos", "head"))
layer_head_pattern_patch_setter = PatchSetter(
    "layer_head_pattern_patch_setter", ("layer", "head"), ("head", "query", "key")
)
layer_head_pos_pattern_patch_setter = PatchSetter(
    "layer_head_pos_pattern_patch_setter", ("layer", "head", "dest_pos"), ("head", "query", "key")
)
layer_head_dest_src_pos_pattern_patch_setter = PatchSetter(
    "layer_head_dest_src_pos_pattern_patch_setter", ("layer", "head", "dest_pos", "src_pos"), ("head", "query", "key")
)
