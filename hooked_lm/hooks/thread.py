"""The state of the thread that runs a model: the hooks that act in it, and its current forward pass.

None of it is kept on the model, so two threads may run one model under different hooks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

from torch import Tensor

__all__ = [
    "GradientSwitch",
    "KeptPositions",
    "Pass",
    "Token",
    "current_pass",
    "editing_hooks_only",
    "here",
    "in_pass",
    "only",
    "passes_begun",
    "without_hooks",
]


class Token:
    """An object that is compared by identity only; copying it returns the object itself."""

    def __reduce__(self) -> tuple[Callable[[], Token], tuple[()]]:
        # Read from a file it stands for the thread that reads it.
        return _identity, ()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self


@dataclass(frozen=True)
class KeptPositions:
    """The positions of a pass that are unembedded, where they are not all of them.

    Attributes:
        positions: counted from the start of the pass.
        n_positions: how many the pass has.
    """

    positions: tuple[int, ...]
    n_positions: int

    def places_of(self, position: int) -> list[int]:
        """Return where a position, counted from the start of the pass, is among those kept."""
        return [place for place, one in enumerate(self.positions) if one == position]


@dataclass(frozen=True)
class Pass:
    """A forward pass.

    Attributes:
        n_past: the number of positions in the key-value cache, run in earlier passes.
        kept: while the unembedding runs, the positions it is run on; None for all.
        mask: [batch pos], False where a position of this pass is padding; None if nothing is padded.
    """

    n_past: int = 0
    kept: KeptPositions | None = None
    mask: Tensor | None = field(default=None, compare=False)


@dataclass
class GradientSwitch:
    """Whether the backward hooks of one part of a graph act.

    Attributes:
        on: they do.
    """

    on: bool = True


class _Thread(threading.local):
    """The state of one thread.

    Attributes:
        identity: identifies the thread; unlike a thread number it is never reused.
        scope: None, or the token of the current `only` block, in which hooks of other scopes do not act.
        edits_only: hook points at which hooks that only read do not act.
        gradient_switch: turns off the backward hooks of what is computed meanwhile; None for no switch.
        runs_models: whether this thread has run a model; autograd's own threads have not.
        running: the current pass; between passes, a pass without earlier positions.
        begun: the passes that have begun within the innermost `passes_begun` block; None outside of them.
    """

    def __init__(self) -> None:
        self.identity = Token()
        self.scope: Token | None = None
        self.edits_only: frozenset[object] = frozenset()
        self.gradient_switch: GradientSwitch | None = None
        self.runs_models = False
        self.running = Pass()
        self.begun: list[Pass] | None = None


here = _Thread()


def _identity() -> Token:
    return here.identity


def current_pass() -> Pass:
    """Return this thread's current pass; between passes, a pass without earlier positions."""
    return here.running


@contextmanager
def in_pass(running: Pass) -> Generator[None, None, None]:
    """Make a pass the current one within a `with` block; afterwards the earlier one is restored, also on errors.

    Args:
        running: the pass.
    """
    before = here.running
    here.running, here.runs_models = running, True
    if here.begun is not None:
        here.begun.append(running)
    try:
        yield
    finally:
        here.running = before


@contextmanager
def passes_begun() -> Generator[list[Pass], None, None]:
    """Yield a list that gets every pass which begins in this thread within a `with` block, in order."""
    before, here.begun = here.begun, []
    try:
        yield here.begun
    finally:
        here.begun = before


@contextmanager
def only(scope: Token) -> Generator[None, None, None]:
    """Within a `with` block, only hooks of the scope act in this thread.

    Args:
        scope: the token of the block.
    """
    before = here.scope
    here.scope = scope
    try:
        yield
    finally:
        here.scope = before


@contextmanager
def without_hooks() -> Generator[None, None, None]:
    """Within a `with` block no hooks act in this thread."""
    with only(Token()):
        yield


@contextmanager
def editing_hooks_only(points: Iterable[object]) -> Generator[None, None, None]:
    """Within a `with` block, hooks that only read do not act at some hook points, in this thread.

    Args:
        points: the hook points.
    """
    before = here.edits_only
    here.edits_only = before.union(points)
    try:
        yield
    finally:
        here.edits_only = before


@contextmanager
def switched_gradients(switch: GradientSwitch) -> Generator[None, None, None]:
    """Put the backward hooks of what is computed within a `with` block under a switch.

    Args:
        switch: while it is off, these hooks do not act.
    """
    before = here.gradient_switch
    here.gradient_switch = switch
    try:
        yield
    finally:
        here.gradient_switch = before
