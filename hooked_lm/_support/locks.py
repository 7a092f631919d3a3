"""A lock on a folder that no two processes hold at once. It goes with its process, whichever way that ends."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from hooked_lm._support.files import explained

__all__ = ["folder_lock"]


@contextmanager
def folder_lock(folder: Path, what: str) -> Generator[None, None, None]:
    """Hold the lock of a folder within the `with` block.

    Args:
        folder: that is there.
        what: is done to it; for the message.

    Raises:
        ValueError: another process holds it, or the folder cannot be written to.
    """
    with explained(folder):
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        if not _locked(descriptor):
            raise ValueError(f"{what} {folder}: another process does that already. Wait for it, or give another folder")
        yield
    finally:
        os.close(descriptor)  # which lets go of the lock


def _locked(descriptor: int) -> bool:
    """Whether the lock was free; the operating system lets go of it when the file is closed."""
    try:
        if os.name == "posix":
            import fcntl  # there is none on Windows

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt  # only there on Windows

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError:
        return False
    return True
