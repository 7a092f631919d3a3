"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | Path, content: str | Callable[[Path], object]) -> Path:
    """Write a file under another name and then rename it, so that under its own it is never in part.

    Folders that are missing are made. What is no plain file (`/dev/stdout`, a pipe) is written to directly.

    Args:
        path: where the file will be.
        content: text, or a function that writes to the path it is given.

    Returns:
        The path.

    Raises:
        ValueError: it cannot be written; what was there before is still there.
    """
    path = Path(path)
    write = (lambda place: place.write_text(content, encoding="utf-8")) if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = path.resolve()
        if target.exists() and not target.is_file():
            write(target)
            return path
        unfinished = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
        try:
            write(unfinished)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error
    return path
