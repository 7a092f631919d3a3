"""Grids of patches, and a round of one: our sweep does all of it, everybody else some of its cells.

Every cell of a loop takes as long as any other, so the others' time is scaled up. Recording the clean run, in full, is
left out of everybody's time. Values are compared on the cells that the others did.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers.process import Asked
from hooked_lm.patching import PATCHES

ANSWER, WRONG = 3, 4
# The largest difference at which two values still count as the same.
TOLERANCE = 1e-4

Index = Sequence[int]
# Cells of a grid -> the seconds that they took, and their values.
Loop = Callable[[Sequence[Index]], tuple[float, list[float]]]


@dataclass(frozen=True)
class Prompts:
    """A clean and a corrupted prompt.

    Attributes:
        name: how they differ.
        clean: [batch pos].
        corrupted: [batch pos].
    """

    name: str
    clean: Tensor
    corrupted: Tensor


@dataclass(frozen=True)
class Grid:
    """What is patched, cell by cell.

    Attributes:
        name: with its size.
        patch: which of `PATCHES`.
        cells: the index of every cell, in the order of the results.
    """

    name: str
    patch: str
    cells: list[Index]


@dataclass(frozen=True)
class Round:
    """A grid done once.

    Attributes:
        seconds: of the sweep.
        others: by name, somebody's seconds for the whole grid, and the differences of his values from the sweep's.
        failed: names that gave an error instead, and which.
    """

    seconds: float
    others: dict[str, tuple[float, Tensor]]
    failed: dict[str, RuntimeError]


def make_prompts(n_pos: int, d_vocab: int) -> tuple[Prompts, Prompts]:
    """Return a pair without a token in common, and a pair that differs in the middle only."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, d_vocab, (1, n_pos), generator=generator)
    shift = torch.randint(1, d_vocab, (1, n_pos), generator=generator)
    other = (clean + shift) % d_vocab
    middle = torch.arange(n_pos) == n_pos // 2
    return Prompts("every token differs", clean, other), Prompts(
        "one token differs", clean, clean.where(~middle, other)
    )


def make_grid(kind: str, patch: str, shape: tuple[int, ...]) -> Grid:
    """Return all cells of a grid."""
    return Grid(f"{kind} {'x'.join(map(str, shape))}", patch, list(itertools.product(*map(range, shape))))


def ask_loop(contestant: Asked, grid: Grid, cells: Sequence[Index]) -> tuple[float, list[float]]:
    """Let somebody patch cell by cell."""
    patch = PATCHES[grid.patch]
    reply = contestant.ask(
        "patch",
        activation=patch.activation,
        setter=patch.setter.name,
        axes=patch.axes,
        cells=cells,
        answer=ANSWER,
        wrong=WRONG,
    )
    return reply["seconds"], reply["values"]


def one_round(
    grid: Grid, chosen: list[int], sweep: Callable[[], tuple[float, Tensor]], loops: Mapping[str, Loop]
) -> Round:
    """Sweep, and let everybody else do half of the chosen cells before that and half after it."""
    halves = chosen[::2], chosen[1::2]
    failed: dict[str, RuntimeError] = {}

    def done(names: Sequence[str], places: list[int]) -> dict[str, tuple[float, list[float]]]:
        found = {}
        for name in names:
            try:
                found[name] = loops[name]([grid.cells[place] for place in places])
            except RuntimeError as error:
                failed[name] = error
        return found

    before = done(list(loops), halves[0])
    seconds, values = sweep()
    # Backwards, so that on the average everybody is equally far from the sweep.
    after = done(list(before)[::-1], halves[1])
    ours = values[halves[0] + halves[1]]
    others = {}
    for name in (one for one in before if one in after):
        taken = (before[name][0] + after[name][0]) * len(grid.cells) / len(chosen)
        others[name] = taken, ours - torch.tensor(before[name][1] + after[name][1])
    return Round(seconds, others, failed)
