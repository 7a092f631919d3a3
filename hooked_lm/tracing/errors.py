"""TraceError, and the line of the caller's code that it names."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["TraceError", "calling_line"]

_PACKAGE = str(Path(__file__).resolve().parents[1])


class TraceError(ValueError):
    """A trace that cannot be recorded, planned, read or run.

    Attributes:
        line: the file and line of the code that recorded the part at fault, `"notebook.py:12"`; None if it is unknown.
        reason: the message without the line.
        node: the number of the node at fault, in a trace that is read from bytes; None if it is unknown.
    """

    def __init__(self, message: str, line: str | None = None, node: int | None = None) -> None:
        super().__init__(message if line is None else f"{message} (recorded at {line})")
        self.line, self.reason, self.node = line, message, node


def calling_line() -> str | None:
    """Return the file and line of the innermost caller outside this package, `"notebook.py:12"`."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None else f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
