"""What belongs to the thread that runs a model: which hooks act in it, and the pass that is under way.

None of it is kept on the model, so two threads may run one model under hooks of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

__all__ = ["Pass", "Token", "current_pass", "editing_hooks_only", "here", "in_pass", "only", "without_hooks"]


class Token:
    """Something that is only ever compared by identity; a copy of it is itself."""

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self


@dataclass(frozen=True)
class Pass:
    """The forward pass that is under way.

    Attributes:
        n_past: positions of the text that earlier passes have read, which are in the key-value cache.
    """

    n_past: int = 0


class _Thread(threading.local):
    """The state of one thread.

    Attributes:
        identity: stands for the thread; unlike its number it is never given to another.
        scope: None, or the token of the `only` block that the thread is in: then hooks of other scopes do not act.
        edits_only: whether hooks that only read, and backward hooks, are left out.
        running: the pass that is under way; between passes one that begins a text.
    """

    def __init__(self) -> None:
        self.identity = Token()
        self.scope: Token | None = None
        self.edits_only = False
        self.running = Pass()


here = _Thread()


def current_pass() -> Pass:
    """Return the pass that this thread is in; outside of passes, one that begins a text."""
    return here.running


@contextmanager
def in_pass(running: Pass) -> Generator[None, None, None]:
    """Within a `with` block this pass is under way; afterwards it is the one before again, whatever happens."""
    before = here.running
    here.running = running
    try:
        yield
    finally:
        here.running = before


@contextmanager
def only(scope: Token) -> Generator[None, None, None]:
    """Within a `with` block, in this thread, no hooks act but those of the scope."""
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
def editing_hooks_only() -> Generator[None, None, None]:
    """Within a `with` block, in this thread, forward hooks that may edit act, and no others."""
    before = here.edits_only
    here.edits_only = True
    try:
        yield
    finally:
        here.edits_only = before
