"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import itertools
import os
import platform
import re
import shutil
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["append_line", "explained", "unfinished_folder", "whole_file", "write_whole"]


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
def unfinished_folder(parent: str | Path) -> Generator[Path, None, None]:
    """Make a folder under a temporary name; rename it to its final name within the `with` block, or it is removed.

    Folders of writers that were killed are removed too.

    Args:
        parent: the folder in which it is; it is made where it is missing.

    Raises:
        ValueError: the folder cannot be made.
    """
    parent = Path(parent)
    with explained(parent):
        parent.mkdir(parents=True, exist_ok=True)
        _remove_left(parent)
        place = parent / f".{next(_numbers)}.{_HOST}.{os.getpid()}.unfinished"
        place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def append_line(path: str | Path, line: str) -> None:
    """Add a line to the end of a file that several processes may add to. A line that was cut off before it is ended.

    Args:
        path: of the file, which is made where it is missing.
        line: without its line break.

    Raises:
        ValueError: the file cannot be written.
    """
    path = Path(path)
    with explained(path), path.open("ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        whole = size == 0
        if size:
            file.seek(size - 1)
            whole = file.read(1) == b"\n"
        # One call: what several processes append at once is not mixed up on a local disk.
        file.write(("" if whole else "\n").encode() + line.encode() + b"\n")


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
    with _only_writer(target):
        unfinished = target.with_name(f".{target.name}.{_HOST}.{os.getpid()}.unfinished")
        try:
            yield unfinished
            with explained(path):
                unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)


# A file that is being written has its writer's machine and process in its name.
_HOST = re.sub(r"[^\w-]", "-", platform.node()) or "unknown"
_UNFINISHED = re.compile(r"\.(?P<name>.+)\.(?P<host>[\w-]+)\.(?P<process>\d+)\.unfinished")
_being_written: set[Path] = set()
_numbers = itertools.count()
_looking = threading.Lock()


@contextmanager
def _only_writer(target: Path) -> Generator[None, None, None]:
    """Be the only writer of a file, and remove what writers that were killed have left in its folder.

    Raises:
        ValueError: another thread, or another process of this machine, is writing the file.
    """
    with _looking:
        if target in _being_written or _others_writing(target):
            raise ValueError(f"{target} is being written already: two writers at one path would mix up their files")
        _being_written.add(target)
    try:
        yield
    finally:
        _being_written.discard(target)


def _others_writing(target: Path) -> bool:
    """Whether another process of this machine is writing a file; files of processes that are gone are removed."""
    busy = False
    for left in target.parent.glob(".*.unfinished"):
        found = _UNFINISHED.fullmatch(left.name)
        if found is None or found["host"] != _HOST or int(found["process"]) == os.getpid():
            continue
        if _is_running(int(found["process"])):
            busy = busy or found["name"] == target.name
        else:
            left.unlink(missing_ok=True)
    return busy


def _remove_left(parent: Path) -> None:
    """Remove the unfinished folders of processes of this machine that are gone."""
    for left in parent.glob(".*.unfinished"):
        found = _UNFINISHED.fullmatch(left.name)
        if found is not None and found["host"] == _HOST and not _is_running(int(found["process"])):
            shutil.rmtree(left, ignore_errors=True)


def _is_running(process: int) -> bool:
    """Whether a process of this machine runs; True where that cannot be told without harm."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
