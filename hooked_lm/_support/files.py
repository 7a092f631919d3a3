"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["explained", "whole_file", "write_whole"]


def write_whole(path: str | Path, content: str | Callable[[Path], object]) -> Path:
    """Write a file under a temporary name and then rename it, so that a partial file never has the final name.

    Missing folders are made. A path that is no plain file (`/dev/stdout`, a pipe) is written to directly.

    Args:
        path: where the file will be.
        content: text, or a function that writes to the path it is given.

    Returns:
        The path.

    Raises:
        ValueError: the file cannot be written; an older file at the path is left as it was.
    """
    path = Path(path)
    write = (lambda place: place.write_text(content, encoding="utf-8")) if isinstance(content, str) else content
    with _whole(path) as place, explained(path):
        write(place)
    return path


@contextmanager
def whole_file(path: str | Path) -> Generator[BinaryIO, None, None]:
    """Open a file to write bytes to; it gets its final name at the end of the `with` block, unless the block failed.

    Raises:
        ValueError: the file cannot be made, or the path is no plain file; an older file is left as it was.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} cannot be written: it is no plain file")
    with _whole(path) as place:
        with explained(path):
            file = place.open("wb")
        try:
            yield file
        except BaseException:
            with suppress(OSError):  # the first error is the one to report
                file.close()
            raise
        with explained(path):
            file.close()


@contextmanager
def explained(path: Path) -> Generator[None, None, None]:
    """Within a `with` block that writes to a file, an OSError is a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def _whole(path: Path) -> Generator[Path, None, None]:
    """Where to write: beside the path, to be renamed to it at the end; or the path itself, if it is no plain file."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        target = path.resolve()
    if target.exists() and not target.is_file():
        yield target
        return
    unfinished = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.unfinished")
    try:
        yield unfinished
        with explained(path):
            unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
