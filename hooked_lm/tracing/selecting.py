"""Selections of a trace: from what a caller writes to positions and entries that hold for every prompt of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hooked_lm._support.integers import entries_of, integer, is_integer
from hooked_lm.names import POSITION_AXES, selected_axis
from hooked_lm.tracing.graph import Entries, RunSpec, Select
from hooked_lm.tracing.types import TensorType

__all__ = ["FIELDS", "by_index", "resolved", "selected_type"]

FIELDS = ("pos", "head", "feature", "batch")


def by_index(index: object, axes: Sequence[str]) -> dict[str, object]:
    """Return the selections that an index in brackets makes: `[:, -1]` is `pos=-1` at a site of the stream.

    Args:
        index: an integer, a slice, a list of integers, an ellipsis, or a tuple of those, one for each axis.
        axes: of the site.

    Raises:
        ValueError: too many entries, or one along an axis that nothing selects along.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    if parts.count(Ellipsis) > 1:
        raise ValueError("an index has one ellipsis at most")
    if Ellipsis in parts:
        place = parts.index(Ellipsis)
        parts[place : place + 1] = [slice(None)] * (len(axes) - len(parts) + 1)
    if len(parts) > len(axes):
        raise ValueError(f"an index of {len(parts)} entries; the site has axes {' '.join(axes)!r}")
    selections: dict[str, object] = {}
    for axis, part in enumerate(parts):
        if isinstance(part, slice) and part == slice(None):
            continue
        name = next((name for name in FIELDS if selected_axis(axes, name) == axis), None)
        if name is None:
            raise ValueError(f"nothing selects along the axis {axes[axis]!r} of {' '.join(axes)!r}")
        selections[name] = part
    return selections


def resolved(site: str, whole: TensorType, run: RunSpec, given: Mapping[str, object]) -> Select:
    """Return selections with slices written out, checked against a run.

    Args:
        site: full hook name, for messages.
        whole: the type of the activation.
        run: the run.
        given: field -> an integer, a slice, integers, or None for all.

    Raises:
        ValueError: a selection along an axis that the site does not have, or out of range for some prompt.
    """
    made: dict[str, Entries] = {}
    for name, entries in given.items():
        if entries is None or (isinstance(entries, slice) and entries == slice(None)):
            continue
        axis = selected_axis(whole.axes, name)
        if axis is None:
            raise ValueError(f"{site!r} has axes {' '.join(whole.axes)!r}: there is no {name} to select")
        if whole.axes[axis] in POSITION_AXES:
            made[name] = _positions(site, name, entries, run)
        else:
            made[name] = _entries(site, name, entries, whole.shape[axis])
    return Select(**made)


def _entries(site: str, name: str, entries: object, size: int) -> Entries:
    if isinstance(entries, slice):
        chosen: object = range(size)[entries]
    else:
        chosen = entries
    several = entries_of(chosen)
    found = [chosen] if several is None else list(several)
    if not found or not all(is_integer(one) for one in found):
        raise ValueError(f"{name}={entries!r} at {site!r} is not an int, a slice or several ints that select something")
    whole = [integer(one, name) for one in found]
    for one in whole:
        if not -size <= one < size:
            raise ValueError(f"{name} {one} at {site!r}: there are {size} there")
    counted = [one % size for one in whole]
    if len(set(counted)) < len(counted):
        raise ValueError(f"{name}={entries!r} at {site!r} selects an entry twice")
    return counted[0] if several is None else tuple(counted)


def _positions(site: str, name: str, entries: object, run: RunSpec) -> Entries:
    """Positions that hold for every prompt: those of the first, or counted from the end where the starts differ."""
    if isinstance(entries, slice):
        by_prompt = [tuple(range(length)[entries]) for length in run.lengths]
        from_start = set(by_prompt)
        from_end = {
            tuple(one - length for one in chosen) for chosen, length in zip(by_prompt, run.lengths, strict=True)
        }
        found = from_start if len(from_start) == 1 else from_end
        if len(found) > 1:
            raise ValueError(
                f"{name}={entries} at {site!r} selects different positions in prompts of {min(run.lengths)} to "
                f"{max(run.lengths)} tokens: count from one end, or trace prompts of one length together"
            )
        chosen = found.pop()
        if not chosen:
            raise ValueError(f"{name}={entries} at {site!r} selects no position")
        return chosen
    made = _entries(site, name, entries, min(run.lengths)) if run.length else _signed(site, name, entries, run)
    return made


def _signed(site: str, name: str, entries: object, run: RunSpec) -> Entries:
    """Positions of prompts of unequal lengths, which keep the end that they are counted from."""
    several = entries_of(entries)
    found = [entries] if several is None else list(several)
    if not found or not all(is_integer(one) for one in found):
        raise ValueError(f"{name}={entries!r} at {site!r} is not an int, a slice or several ints")
    whole = [integer(one, name) for one in found]
    for length in run.lengths:
        for one in whole:
            if not -length <= one < length:
                raise ValueError(f"{name} {one} at {site!r}: the shortest prompt has {min(run.lengths)} positions")
        if len({one % length for one in whole}) < len(whole):
            raise ValueError(f"{name}={entries!r} at {site!r} selects a position twice in a prompt of {length} tokens")
    return whole[0] if several is None else tuple(whole)


def selected_type(site: str, whole: TensorType, run: RunSpec, select: Select, *, reading: bool = True) -> TensorType:
    """Return the type of a selected part; a single entry drops its axis.

    Args:
        site: full hook name, for messages.
        whole: the type of the activation.
        run: the run.
        select: the part.
        reading: refuse all positions of prompts of unequal lengths, which make no tensor. For a write they count 1.

    Raises:
        ValueError: see `reading`.
    """
    shape: list[int | None] = list(whole.shape)
    for name, entries in select.chosen().items():
        axis = selected_axis(whole.axes, name)
        assert axis is not None
        shape[axis] = len(entries) if isinstance(entries, tuple) else None
    for axis, name in enumerate(whole.axes):
        if name in POSITION_AXES and shape[axis] == 0:
            if reading:
                raise ValueError(
                    f"{site!r} of prompts of {min(run.lengths)} to {max(run.lengths)} tokens: select positions "
                    "(.at(pos=-1)), or trace prompts of one length together"
                )
            shape[axis] = 1
    kept = [axis for axis, size in enumerate(shape) if size is not None]
    sizes = tuple(size for size in shape if size is not None)
    return TensorType(tuple(whole.axes[axis] for axis in kept), sizes, whole.kind)
