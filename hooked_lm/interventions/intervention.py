"""Interventions as data: at a site, on chosen positions, heads, features and prompts, replace, add, scale or zero.

The same object acts on a forward pass and on every step of a generation. It is checked against a model before anything
runs, and can be written to a file together with its value. `Intervention.from_cache`, `.mean` and `.resample` take the
value from a cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from hooked_lm._support.integers import entries_of, integer, is_integer
from hooked_lm._support.precision import at_least_single
from hooked_lm._support.torch_internals import transforms_active
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooks import HookPoint, KeptPositions
from hooked_lm.interventions.axis_sizes import axis_size
from hooked_lm.interventions.masked import check_aligned, combined_mask, mask_weights
from hooked_lm.names import (
    POSITION_AXES,
    ActivationKey,
    UnknownHookError,
    describe_unknown,
    selected_axis,
)

__all__ = [
    "OPERATIONS",
    "HasHookPoints",
    "Intervention",
    "Operation",
    "Recorded",
    "Selection",
    "Selections",
    "draw_prompts",
]

Operation = Literal["replace", "add", "scale", "zero"]
# Which entries along an axis: None for all, one (the axis is then dropped from the value's shape), or several.
Selection = int | tuple[int, ...] | None

OPERATIONS = ("replace", "add", "scale", "zero")

# Sites whose activations are whole numbers.
_INTEGER_SITES = ("hook_tokens", "hook_expert_indices")

_PLURAL = {"pos": "positions", "head": "heads", "feature": "features", "batch": "prompts"}

# Axes whose length depends on the prompts -> what an error calls their entries.
_COUNTED = {"batch": "in the batch", **dict.fromkeys(POSITION_AXES, "positions")}


class Selections(TypedDict, total=False):
    """The selections of an intervention, as keyword arguments."""

    pos: Selection
    head: Selection
    feature: Selection
    batch: Selection


class HasHookPoints(Protocol):
    """A model whose hook points are found by name."""

    @property
    def hook_dict(self) -> Mapping[str, HookPoint]: ...


class Recorded(Protocol):
    """A cache that values are taken from: an `ActivationCache`."""

    has_batch_dim: bool
    attention_mask: Tensor | None

    @property
    def model(self) -> HasHookPoints: ...

    def full_name(self, key: ActivationKey) -> str: ...

    def __getitem__(self, key: ActivationKey) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Intervention:
    """One edit of one activation.

    Attributes:
        site: full hook name, `"blocks.3.attn.hook_z"`.
        operation: `"replace"` by the value, `"add"` it, `"scale"` by it, or `"zero"`.
        value: a number, or a tensor that broadcasts to the selection; none for `"zero"`.
        pos: positions. From 0 they are those of the whole text, also when a generation reads it in steps; negative ones
            count from the end of the present pass, so that -1 is the newest position at every step. For scores and
            patterns they are query positions.
        head, feature, batch: heads, entries of the last axis, prompts. Lists, ranges and arrays become tuples.

    Raises:
        ValueError: an unknown operation, a value where none belongs or none where one does, or an empty selection.

    >>> Intervention("blocks.0.attn.hook_z", "zero", head=2)
    Intervention(site='blocks.0.attn.hook_z', operation='zero', value=None, pos=None, head=2, feature=None, batch=None)
    """

    site: str
    operation: Operation
    value: Tensor | float | None = None
    pos: Selection = None
    head: Selection = None
    feature: Selection = None
    batch: Selection = None

    def __post_init__(self) -> None:
        if not isinstance(self.site, str):
            raise ValueError(f"site is a full hook name, such as get_act_name('z', 0) gives; got {self.site!r}")
        if self.operation not in OPERATIONS:
            raise ValueError(f"operation {self.operation!r} is none of {OPERATIONS}")
        if (self.operation == "zero") != (self.value is None):
            needs = "takes no value" if self.operation == "zero" else "needs a value"
            raise ValueError(f"{self.operation!r} at {self.site!r} {needs}")
        if isinstance(self.value, (np.floating, np.integer)):
            object.__setattr__(self, "value", self.value.item())
        if not _is_value(self.value):
            raise ValueError(f"value at {self.site!r} is a real tensor or a number, not {type(self.value).__name__}")
        for name, selection in self.selections().items():
            several = entries_of(selection)
            chosen = (selection,) if several is None else several
            if not chosen or not all(is_integer(one) for one in chosen):
                raise ValueError(f"{name}={selection!r} at {self.site!r} is not an int or several ints")
            entries = tuple(integer(one, name) for one in chosen)
            object.__setattr__(self, name, entries[0] if several is None else entries)
            _refuse_repeats(self.site, name, entries, None)

    # Values from a cache. The selections are applied both to the cached activation and to the run.

    @classmethod
    def from_cache(
        cls,
        site: ActivationKey,
        cache: Recorded,
        **selections: Unpack[Selections],
    ) -> Self:
        """Return the intervention that replaces an activation by the cached one: activation patching.

        Args:
            site: a hook name or a short key, `("z", 3)`.
            cache: of a run with the same number of positions, and the same number of prompts or one.
            selections: `pos`, `head`, `feature`, `batch`: the part that is replaced, by the same part of the cache.

        Raises:
            KeyError: the cache has no such activation.
            ValueError: the cache has no batch axis, or a selection is out of range.
        """
        return cls._replacing(site, cache, cache[site], (), selections)

    @classmethod
    def mean(
        cls,
        site: ActivationKey,
        cache: Recorded,
        *,
        per_position: bool = False,
        attention_mask: Tensor | None = None,
        **selections: Unpack[Selections],
    ) -> Self:
        """Return the intervention that replaces an activation by its mean over the cache: mean ablation.

        Source: Wang et al. 2022, "Interpretability in the Wild".

        Args:
            site: a hook name or a short key, `("z", 3)`.
            cache: of the prompts to average over. Padding of its run is left out.
            per_position: take the mean over prompts at each position, not over positions too.
            attention_mask: [batch pos] of the cache's prompts, 0 at positions that are left out besides.
            selections: `pos`, `head`, `feature`, `batch`: the part that is replaced.

        Raises:
            KeyError: the cache has no such activation.
            ValueError: the cache has no batch axis or holds whole numbers there, the mask does not fit, counts nothing
                or is given for a mean per position, a mean per position of prompts that padding shifts against each
                other, or a selection is out of range.
        """
        value, name = cache[site], cache.full_name(site)
        if not value.is_floating_point():
            raise ValueError(f"{name!r} holds whole numbers, whose mean stands for nothing")
        averaged = (0,) if per_position else (0, _find_axis(name, _axes(name, cache), "pos"))
        if per_position:
            check_aligned("a mean per position", cache.attention_mask)
        own = None if per_position else cache.attention_mask
        weights = mask_weights(name, value, averaged, combined_mask(attention_mask, own))
        exact = at_least_single(value)
        mean = exact.mean(averaged, keepdim=True)
        if weights is not None:
            mean = (exact * weights).sum(averaged, keepdim=True) / weights.sum()
        return cls._replacing(site, cache, mean.to(value.dtype), averaged, selections)

    @classmethod
    def resample(
        cls,
        site: ActivationKey,
        cache: Recorded,
        *,
        n_prompts: int | None = None,
        seed: int = 0,
        **selections: Unpack[Selections],
    ) -> Self:
        """Return the intervention that replaces an activation by that of another prompt: resampling ablation.

        Source: Chan et al. 2022, "Causal Scrubbing".

        Args:
            site: a hook name or a short key, `("z", 3)`.
            cache: of a run with the same number of positions.
            n_prompts: the number of prompts in the run; each gets the activation of a random prompt of the cache. By
                default the run has the cache's own prompts, and each gets the activation of another one.
            seed: of the random draw.
            selections: `pos`, `head`, `feature`: the part that is replaced, by the same part of the cache.

        Raises:
            KeyError: the cache has no such activation.
            ValueError: the cache has no batch axis or only one prompt, padding shifts its prompts against each other,
                or a selection is out of range.
        """
        value = cache[site]
        check_aligned("resampling", cache.attention_mask)
        generator = torch.Generator().manual_seed(seed)
        drawn = draw_prompts(value.shape[0], n_prompts, generator).to(value.device)
        if "batch" in selections:
            raise ValueError("resample draws for every prompt: there is no batch to select")
        return cls._replacing(site, cache, value[drawn], (), selections)

    @classmethod
    def _replacing(
        cls, site: ActivationKey, cache: Recorded, value: Tensor, averaged: Sequence[int], fields: Selections
    ) -> Self:
        name = cache.full_name(site)
        axes = _axes(name, cache)
        # Built with a placeholder value, to check the selections before the value is cut to them.
        made = cls(name, "replace", 0.0, **fields)
        chosen = {_find_axis(name, axes, field): selection for field, selection in made.selections().items()}
        index: int | slice | list[int]
        for axis, selection in sorted(chosen.items(), reverse=True):
            size = value.shape[axis]
            if axis in averaged:
                index = 0 if isinstance(selection, int) else slice(None)
            elif all(-size <= one < size for one in (selection if isinstance(selection, tuple) else (selection,))):
                index = selection if isinstance(selection, int) else list(selection)
            else:
                raise ValueError(
                    f"the cache has {name!r} with shape {tuple(value.shape)}: there is no {axes[axis]} {selection}"
                )
            value = value[(slice(None),) * axis + (index,)]
        return cls(name, "replace", value.detach(), **fields)

    def selections(self) -> dict[str, int | tuple[int, ...]]:
        """Return the selections that are not None, by the name of their field."""
        made = {"pos": self.pos, "head": self.head, "feature": self.feature, "batch": self.batch}
        return {name: selection for name, selection in made.items() if selection is not None}

    def check(self, cfg: HookedTransformerConfig, axes_by_site: Mapping[str, Sequence[str]]) -> None:
        """Check the intervention against a model.

        Args:
            cfg: the model's config.
            axes_by_site: its hook names -> the axes of their activations.

        Raises:
            UnknownHookError: the model has no such site.
            ValueError: the site has no such axis, or no such entry along it.
        """
        if self.site not in axes_by_site:
            raise UnknownHookError(describe_unknown(self.site, list(axes_by_site)))
        axes = axes_by_site[self.site]
        for name, selection in self.selections().items():
            axis = axes[_find_axis(self.site, axes, name)]
            size = axis_size(cfg, self.site, axis)
            for one in selection if isinstance(selection, tuple) else (selection,):
                if size is not None and not -size <= one < size:
                    raise ValueError(
                        f"{self.operation} at {self.site!r} {name} {one}: "
                        f"this model has {_PLURAL[name]} 0-{size - 1} there"
                    )
            if axis not in _COUNTED:
                _refuse_repeats(self.site, name, selection, size)
        if self.site.endswith(_INTEGER_SITES) and not _is_whole(self.value):
            raise ValueError(f"{self.site!r} holds whole numbers, and the value is none")

    def check_fit(
        self, cfg: HookedTransformerConfig, axes_by_site: Mapping[str, Sequence[str]], batch: int, n_positions: int
    ) -> None:
        """Check the intervention, which `check` has passed, against prompts that are read in one pass.

        Args:
            cfg: the model's config.
            axes_by_site: its hook names -> the axes of their activations.
            batch: the number of prompts.
            n_positions: their length.

        Raises:
            ValueError: a prompt, position or key out of range, or a value that does not broadcast to the selection.
        """
        axes = axes_by_site[self.site]
        lengths = {"batch": batch, **dict.fromkeys(POSITION_AXES, n_positions), "1": 1}
        sizes = [lengths.get(axis) or axis_size(cfg, self.site, axis) for axis in axes]
        shape: list[int | None] = list(sizes)
        for name, selection in self.selections().items():
            axis = _find_axis(self.site, axes, name)
            size = sizes[axis]
            for one in selection if isinstance(selection, tuple) else (selection,):
                if size is not None and not -size <= one < size:
                    there = f"the prompts have {size} {_COUNTED[axes[axis]]}"
                    raise ValueError(f"{self.operation} at {self.site!r} {name} {one}: {there}")
            _refuse_repeats(self.site, name, selection, size)
            shape[axis] = len(selection) if isinstance(selection, tuple) else -1
        selected = [size for size in shape if size != -1]
        if not isinstance(self.value, Tensor) or None in selected:
            return
        try:
            torch.empty(self.value.shape, device="meta").expand(selected)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise ValueError(
                f"{self.operation} at {self.site!r}: a value with shape {tuple(self.value.shape)} does not fit the "
                f"selection, {tuple(selected)}"
            ) from error

    def apply(
        self, x: Tensor, axes: Sequence[str], n_past: int = 0, kept: KeptPositions | None = None
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Return an activation with the edit made, and which of the selected positions it was made at.

        Args:
            x: the activation; returned itself if it has none of the positions.
            axes: the names of its axes.
            n_past: positions of the text that were read in earlier passes.
            kept: the positions of this pass that the activation has; None for all.

        Returns:
            The activation, and indices into `pos` as a tuple: those of positions that are part of this pass. Without
            `pos` it is (0,).

        Raises:
            ValueError: a prompt out of range, or a value that does not broadcast to the selection.
        """
        chosen: dict[int, tuple[int, ...]] = {}
        dropped: list[int] = []
        here: tuple[int, ...] = (0,)
        pos_axis: int | None = None
        for name, selection in self.selections().items():
            axis = _find_axis(self.site, axes, name)
            entries = selection if isinstance(selection, tuple) else (selection,)
            if name == "pos":
                size = x.shape[axis] if kept is None else kept.n_positions
                local = [one + size if one < 0 else one - n_past for one in entries]
                found = [
                    (index, place)
                    for index, one in enumerate(local)
                    for place in ([one] if kept is None else kept.places_of(one))
                    if 0 <= one < size
                ]
                here, entries, pos_axis = tuple(index for index, _ in found), tuple(place for _, place in found), axis
                if len(set(entries)) < len(entries):
                    raise ValueError(f"pos={selection!r} at {self.site!r} selects an entry of this pass twice")
                if not here:
                    return x, here
            elif not all(-x.shape[axis] <= one < x.shape[axis] for one in entries):
                raise ValueError(f"{self.site!r} has shape {tuple(x.shape)}: there is no {name} {selection}")
            chosen[axis] = entries
            if not isinstance(selection, tuple):
                dropped.append(axis)
        where = _where(x, chosen)
        values = self._edit(x[where], dropped, pos_axis, here)
        if transforms_active():  # torch.vmap cannot write a batch of values into a tensor that is no batch
            return x.index_put(where, values), here  # type: ignore[arg-type]
        edited = x.clone()
        edited[where] = values
        return edited, here

    def _edit(self, selected: Tensor, dropped: Sequence[int], pos_axis: int | None, here: tuple[int, ...]) -> Tensor:
        if self.operation == "zero":
            return torch.zeros_like(selected)
        value = torch.as_tensor(self.value, dtype=selected.dtype, device=selected.device)
        # The value covers the whole selection, while a pass may hold only some of the selected positions.
        whole = list(selected.shape)
        if pos_axis is not None:
            # A position may be there several times, if that is what logits were asked for.
            whole[pos_axis] = len(self.pos) if isinstance(self.pos, tuple) else 1
        shape = [size for axis, size in enumerate(whole) if axis not in dropped]
        try:
            value = value.expand(shape).reshape(whole)
        except RuntimeError as error:
            raise ValueError(
                f"{self.operation} at {self.site!r}: a value with shape {tuple(value.shape)} does not fit the "
                f"selection, {tuple(shape)}"
            ) from error
        if pos_axis is not None and isinstance(self.pos, tuple):
            value = value.index_select(pos_axis, torch.tensor(here, device=value.device))
        if self.operation == "add":
            return selected + value
        return selected * value if self.operation == "scale" else value


def draw_prompts(n_cached: int, n_prompts: int | None, generator: torch.Generator) -> Tensor:
    """Return, for each prompt of a run, the index of the cached prompt that replaces it, [batch].

    Args:
        n_cached: how many prompts the cache has.
        n_prompts: the number of prompts in the run, each replaced by any cached one; None if the run has the cache's
            own prompts, each replaced by another one.
        generator: of the random draw.

    Raises:
        ValueError: the cache has no other prompt, or the run has none.
    """
    if n_prompts is not None and n_prompts < 1:
        raise ValueError(f"n_prompts is how many prompts will be run, 1 or more; got {n_prompts}")
    if n_prompts is not None:
        return torch.randint(n_cached, (n_prompts,), generator=generator)
    if n_cached < 2:
        raise ValueError("a single prompt has no other to be resampled from: give several, or prompts of another run")
    drawn = torch.randint(n_cached - 1, (n_cached,), generator=generator)
    return drawn + (drawn >= torch.arange(n_cached))  # any but its own


def _where(x: Tensor, chosen: Mapping[int, tuple[int, ...]]) -> tuple[slice | Tensor, ...]:
    """Return an index of the chosen entries that keeps every axis: slices where they do, else index tensors."""
    by_axis = [[one % x.shape[axis] for one in chosen[axis]] if axis in chosen else None for axis in range(x.ndim)]
    slices = [slice(None) if entries is None else _as_slice(entries) for entries in by_axis]
    if None not in slices and not transforms_active():
        return tuple(one for one in slices if one is not None)
    # Index tensors that broadcast against each other select every combination of the entries.
    indices = [
        torch.arange(size, device=x.device) if entries is None else torch.tensor(entries, device=x.device)
        for size, entries in zip(x.shape, by_axis, strict=True)
    ]
    return tuple(index.reshape([-1 if i == axis else 1 for i in range(x.ndim)]) for axis, index in enumerate(indices))


def _as_slice(entries: Sequence[int]) -> slice | None:
    """Return the slice that selects these entries, or None if there is no such slice."""
    step = entries[1] - entries[0] if len(entries) > 1 else 1
    spaced = all(later - earlier == step for earlier, later in itertools.pairwise(entries))
    return slice(entries[0], entries[-1] + 1, step) if step > 0 and spaced else None


def _is_value(value: object) -> bool:
    if isinstance(value, Tensor):
        return not value.is_complex()
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _is_whole(value: Tensor | float | None) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool((value == value.round()).all())
    return value is None or float(value).is_integer()


def _refuse_repeats(site: str, name: str, selection: Selection, size: int | None) -> None:
    """Raise ValueError if an entry is selected twice: it would be edited once, with one of the two values."""
    entries = selection if isinstance(selection, tuple) else ()
    counted = [one % size if size else one for one in entries]
    if len(set(counted)) < len(counted):
        raise ValueError(f"{name}={selection!r} at {site!r} selects an entry twice")


def _find_axis(site: str, axes: Sequence[str], selection: str) -> int:
    """Return the axis of a site along which a selection selects."""
    found = selected_axis(axes, selection)
    if found is None:
        raise ValueError(f"{site!r} has axes {' '.join(axes)!r}: there is no {selection} to select")
    return found


def _axes(site: str, cache: Recorded) -> Sequence[str]:
    """Return the names of a cached activation's axes."""
    if not cache.has_batch_dim:
        raise ValueError(f"the cache has no batch axis, and {site!r} is taken by prompt: leave out remove_batch_dim")
    return cache.model.hook_dict[site].axes
