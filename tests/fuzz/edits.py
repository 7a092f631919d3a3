"""Edits of activations, drawn at random, and what they do to the activations of the reference.

The meaning of an edit is written out here a second time: which entries of the padded batch it selects, and with which
entry of its value. A text may be read in several passes: then a negative position counts from the end of each pass,
and a pass has scores and patterns for the keys up to its end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hooked_lm.interventions import Intervention
from tests.fuzz.batch import POSITIONS, Batch
from tests.fuzz.reference import Edit, Reference

Passes = tuple[tuple[int, int], ...]
Axes = Mapping[str, Sequence[str]]
Operation = Literal["replace", "add", "scale", "zero"]
FIELDS = {"batch": "batch", "pos": "pos", "query": "pos", "head": "head", "kv_head": "head"}


def fields_of(axes: Sequence[str]) -> list[str | None]:
    """Return, for each axis, the field of an edit that selects along it."""
    last = [*[None] * (len(axes) - 1), None if axes[-1] in ("1", "chosen") else "feature"]
    return [FIELDS.get(name, end) for name, end in zip(axes, last, strict=True)]


# What an edit does


def selected(edit: Intervention, axes: Sequence[str], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return which entries of an activation an edit selects, and the value at each, both in the activation's shape."""
    wanted, kept = [], []
    for field, size in zip(fields_of(axes), shape, strict=True):
        selection = None if field is None else getattr(edit, field)
        entries = range(size) if selection is None else [selection] if isinstance(selection, int) else selection
        wanted.append(torch.tensor([one % size for one in entries]))
        if not isinstance(selection, int):
            kept.append(len(entries))
    value = torch.as_tensor(0.0 if edit.value is None else edit.value, dtype=torch.float64)
    index = torch.meshgrid(*wanted, indexing="ij")
    mask, values = torch.zeros(*shape, dtype=torch.bool), torch.zeros(*shape, dtype=torch.float64)
    mask[index] = True
    values[index] = value.expand(kept).reshape([len(one) for one in wanted])
    return mask, values


def applied(edit: Intervention, x: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    """Return an activation with the edit made at the entries of the mask."""
    values = values.to(x.dtype)
    new: dict[str, Callable[[], Tensor]] = {
        "replace": lambda: values,
        "add": lambda: x + values,
        "scale": lambda: x * values,
        "zero": lambda: torch.zeros_like(x),
    }
    return torch.where(mask, new[edit.operation](), x)


def in_pass(edit: Intervention, axes: Sequence[str], start: int, stop: int) -> Intervention | None:
    """Return an edit with positions that count in one pass; None if the pass has none of them."""
    if edit.pos is None:
        return edit
    entries = edit.pos if isinstance(edit.pos, tuple) else (edit.pos,)
    local = [one + stop - start if one < 0 else one - start for one in entries]
    there = [index for index, one in enumerate(local) if 0 <= one < stop - start]
    if not there:
        return None
    if isinstance(edit.pos, int):
        return replace(edit, pos=local[0])
    value = edit.value
    if isinstance(value, Tensor):
        # Axes count from the right, as values broadcast.
        kept = [field for field in fields_of(axes) if field is None or not isinstance(getattr(edit, field), int)]
        axis = value.ndim - (len(kept) - kept.index("pos"))
        if axis >= 0 and value.shape[axis] > 1:
            value = value.index_select(axis, torch.tensor(there))
    return replace(edit, pos=tuple(local[one] for one in there), value=value)


@dataclass(frozen=True)
class Edited:
    """Edits of a batch, as the reference makes them: prompt by prompt, pass by pass."""

    edits: Sequence[Intervention]
    axes: Axes
    batch: Batch
    passes: Passes

    def of_prompt(self, prompt: int) -> Edit:
        """Return the function that makes the edits of one prompt."""

        def edit(name: str, x: Tensor) -> Tensor:
            for one in self.edits:
                if one.site == name:
                    for start, stop in self.passes:
                        x = self._in_one_pass(one, prompt, x, start, stop)
            return x

        return edit

    def _in_one_pass(self, edit: Intervention, prompt: int, x: Tensor, start: int, stop: int) -> Tensor:
        axes = self.axes[edit.site]
        local = in_pass(edit, axes, start, stop)
        if local is None:
            return x
        sizes = {"batch": len(self.batch.tokens), "pos": stop - start, "query": stop - start, "key": stop}
        shape = [sizes.get(name, size) for name, size in zip(axes, (0, *x.shape), strict=True)]
        mask, values = (of_all[prompt] for of_all in selected(local, axes, shape))
        for axis, name in enumerate(axes[1:]):
            if name in POSITIONS:
                # From the pass to the whole padded text, and from there to the prompt's own positions.
                first = 0 if name == "key" else start
                mask, values = (spread(one, axis, first, self.passes[-1][1]) for one in (mask, values))
                begin = self.batch.starts[prompt]
                mask, values = (one.narrow(axis, begin, x.shape[axis]) for one in (mask, values))
        return applied(edit, x, mask, values)


def spread(x: Tensor, axis: int, before: int, length: int) -> Tensor:
    """Return `x` with zeros before and after it along an axis."""
    shape = list(x.shape)
    shape[axis] = length
    out = x.new_zeros(shape)
    out.narrow(axis, before, x.shape[axis]).copy_(x)
    return out


def expected_rows(
    reference: Reference,
    batch: Batch,
    edits: Sequence[Intervention],
    axes: Axes,
    passes: Passes | None = None,
    head_copies: bool = False,
) -> list[dict[str, Tensor]]:
    """Return the activations of each prompt, by the reference."""
    made = Edited(edits, axes, batch, passes or ((0, batch.length),))
    return [
        reference.run(row[batch.real(prompt)], made.of_prompt(prompt), head_copies=head_copies)
        for prompt, row in enumerate(batch.tokens)
    ]


# Drawing


def draw_edit(
    rng: random.Random,
    site: str,
    axes: Sequence[str],
    shape: Sequence[int],
    *,
    from_end: bool = True,
    positions: Sequence[int] | None = None,
    d_vocab: int = 2,
) -> Intervention:
    """Draw an edit of an activation with some axes and shape.

    Args:
        from_end: positions may be negative.
        positions: those that are selected from; all positions by default, or no selection.
        d_vocab: tokens are below it.
    """
    chosen: dict[str, Any] = {}
    kept: list[tuple[int, bool]] = []  # of the value's axes: the length, and whether a value can have that length
    for field, name, size in zip(fields_of(axes), axes, shape, strict=True):
        must = field == "pos" and positions is not None
        if field is None or not (must or rng.random() < (0.65 if field == "pos" else 0.4)):
            kept.append((size, name not in POSITIONS))
            continue
        choices = positions if must and positions is not None else range(size)
        picked = rng.sample(list(choices), rng.randint(1, min(3, len(choices))))
        if field != "pos" or from_end:
            picked = [one - size if rng.random() < 0.3 else one for one in picked]
        if len(picked) == 1 and rng.random() < 0.6:
            chosen[field] = picked[0]
        else:
            chosen[field] = tuple(picked)
            kept.append((len(picked), True))
    operation: Operation = rng.choice(get_args(Operation))
    if site.endswith("hook_tokens"):
        value: Any = rng.randrange(d_vocab)
        return Intervention(site, "replace", value, **chosen)
    if site.endswith("hook_expert_weights"):
        operation = "add"  # others make weights equal, and then any of the experts may be the chosen one
    if site.endswith("hook_scale") and operation == "zero":
        operation = "scale"  # nothing is divided by zero
    value = None if operation == "zero" else draw_value(rng, kept, positive=operation == "scale")
    return Intervention(site, operation, value, **chosen)


def draw_value(rng: random.Random, kept: list[tuple[int, bool]], *, positive: bool) -> Tensor | float:
    if rng.random() < 0.4:
        return rng.uniform(0.3, 2.0)
    # Any broadcast: an axis of length one, or none of the first axes at all.
    kept = kept[rng.randint(0, len(kept)) if rng.random() < 0.3 else 0 :]
    shape = [size if can and rng.random() < 0.8 else 1 for size, can in kept]
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    return value.abs() + 0.3 if positive else value
