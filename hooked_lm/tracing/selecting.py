"""Selections of a trace: from what a caller writes to positions and entries that hold for every prompt of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hooked_lm._support.integers import entries_of, integer, is_integer
from hooked_lm.names import POSITION_AXES, selected_axis
from hooked_lm.tracing.graph import Entries, RunSpec, Select
from hooked_lm.tracing.types import TensorType

__all__ = ["FIELDS", "by_index", "resolved", "selected_type"]

FIELDS = ("pos", "head", "feature", "batch")
_STEP = "step"


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
    if not _is_all(given.get(_STEP)):
        if run.decoding is None:
            raise ValueError(f"step={given[_STEP]!r} at {site!r}: only a generation, t.generate(...), has steps")
        made[_STEP] = _entries(site, _STEP, given[_STEP], run.decoding.max_new_tokens)
    for name, entries in given.items():
        if name == _STEP or _is_all(entries):
            continue
        axis = selected_axis(whole.axes, name)
        if axis is None:
            raise ValueError(f"{site!r} has axes {' '.join(whole.axes)!r}: there is no {name} to select")
        if whole.axes[axis] in POSITION_AXES:
            made[name] = _positions(site, name, entries, run.spans(whole.axes[axis], made.get(_STEP)))
            if name == "pos" and run.steps(made.get(_STEP)) != [0]:
                _check_newest(site, made[name], entries)
        else:
            made[name] = _entries(site, name, entries, whole.shape[axis])
    return Select(**made)


def _is_all(entries: object) -> bool:
    return entries is None or (isinstance(entries, slice) and entries == slice(None))


def _check_newest(site: str, made: Entries, given: object) -> None:
    if given not in (-1, [-1], (-1,)):
        raise ValueError(
            f"pos={given!r} at {site!r}: a step after the first reads one position, pos=-1; other positions of the "
            "prompt are read and edited at step=0"
        )


def _entries(site: str, name: str, entries: object, size: int) -> Entries:
    chosen = range(size)[entries] if isinstance(entries, slice) else entries
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


def _positions(site: str, name: str, entries: object, lengths: Sequence[int]) -> Entries:
    """Positions that hold for every prompt: those of the first, or counted from the end where the starts differ."""
    if isinstance(entries, slice):
        by_prompt = [tuple(range(length)[entries]) for length in lengths]
        from_end = {tuple(one - length for one in chosen) for chosen, length in zip(by_prompt, lengths, strict=True)}
        found = set(by_prompt) if len(set(by_prompt)) == 1 else from_end
        if len(found) > 1:
            raise ValueError(
                f"{name}={entries} at {site!r} selects different positions in prompts of {min(lengths)} to "
                f"{max(lengths)} tokens: count from one end, or trace prompts of one length together"
            )
        chosen = found.pop()
        if not chosen:
            raise ValueError(f"{name}={entries} at {site!r} selects no position")
        return chosen
    # Positions of prompts of unequal lengths keep the end that they are counted from.
    of_each = [_entries(site, name, entries, length) for length in sorted(set(lengths))]
    if len(of_each) == 1:
        return of_each[0]
    several = entries_of(entries)
    whole = [integer(one, name) for one in ([entries] if several is None else several)]
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
        if name != _STEP:
            axis = selected_axis(whole.axes, name)
            assert axis is not None
            shape[axis] = len(entries) if isinstance(entries, tuple) else None
    for axis, name in enumerate(whole.axes):
        if name in POSITION_AXES and shape[axis] == 0:
            if reading:
                spans = run.spans(name, select.step)
                raise ValueError(
                    f"{site!r} has from {min(spans)} to {max(spans)} entries along {name!r}, by prompt and step: "
                    f"select some of them (.at({'feature' if name == 'key' else 'pos'}=-1)), or trace prompts of one "
                    "length"
                )
            shape[axis] = 1
    kept = [axis for axis, size in enumerate(shape) if size is not None]
    sizes = tuple(size for size in shape if size is not None)
    axes = tuple(whole.axes[axis] for axis in kept)
    if run.decoding is not None and not isinstance(select.step, int):
        axes, sizes = (_STEP, *axes), (len(run.steps(select.step)), *sizes)
    return TensorType(axes, sizes, whole.kind)
