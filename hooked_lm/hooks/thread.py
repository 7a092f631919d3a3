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
    "new_pass",
    "only",
    "passes_begun",
    "reading_again",
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
        first_read: the pass reads a text again, of which so many positions were read in one pass and each later one in
            a pass of its own, as a generation with a key-value cache does; None for a pass that reads new text.
        mask: [batch pos], False where a position of this pass is padding; None if nothing is padded.
    """

    n_past: int = 0
    kept: KeptPositions | None = None
    first_read: int | None = None
    mask: Tensor | None = field(default=None, compare=False)

    def segments(self, n_positions: int) -> list[tuple[int, int]]:
        """Return the passes in which the positions of this pass were read, as `(start, stop)` within it."""
        if self.first_read is None:
            return [(0, n_positions)]
        return [(0, self.first_read), *((one, one + 1) for one in range(self.first_read, n_positions))]


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
        first_read: `first_read` of the next pass.
        begun: the passes that have begun within the innermost `passes_begun` block; None outside of them.
    """

    def __init__(self) -> None:
        self.identity = Token()
        self.scope: Token | None = None
        self.edits_only: frozenset[object] = frozenset()
        self.gradient_switch: GradientSwitch | None = None
        self.runs_models = False
        self.running = Pass()
        self.first_read: int | None = None
        self.begun: list[Pass] | None = None


here = _Thread()


def _identity() -> Token:
    return here.identity


def current_pass() -> Pass:
    """Return this thread's current pass; between passes, a pass without earlier positions."""
    return here.running


@contextmanager
def in_pass(running: Pass, whole: bool = True) -> Generator[None, None, None]:
    """Make a pass the current one within a `with` block; afterwards the earlier one is restored, also on errors.

    Args:
        running: the pass.
        whole: of a model; False for a block that is called by itself.
    """
    before = here.running, here.first_read
    # A run that a hook makes reads a text of its own.
    here.running, here.first_read = running, None
    # A block by itself may be a part of a checkpointed run that autograd recomputes: see `_refuse_recomputation`.
    here.runs_models = here.runs_models or whole
    if here.begun is not None:
        here.begun.append(running)
    try:
        yield
    finally:
        here.running, here.first_read = before


def new_pass(n_past: int, mask: Tensor | None = None) -> Pass:
    """Return the pass that begins now in this thread.

    Args:
        n_past: the number of positions in the key-value cache.
        mask: [batch pos], False where a position of this pass is padding; None if nothing is padded.
    """
    return Pass(n_past, first_read=here.first_read, mask=mask)


@contextmanager
def reading_again(first_read: int | None) -> Generator[None, None, None]:
    """Within a `with` block, runs of models read a text again that was read in several passes.

    Args:
        first_read: how many positions the first of those passes had; each later position was a pass of its own. None
            for runs that read new text.
    """
    before = here.first_read
    here.first_read = first_read
    try:
        yield
    finally:
        here.first_read = before


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
