"""The version numbers of file formats."""

from __future__ import annotations

__all__ = ["check_version"]


def check_version(what: str, version: object, newest: int) -> None:
    """Check that a file's version of its format is one that this code reads: 1 to `newest`.

    Args:
        what: the file, for the message.
        version: the number in the file; 1 for a file without one, which was written before there were numbers.
        newest: the newest version that this code knows.

    Raises:
        ValueError: a newer version, or no version number at all.
    """
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"{what}: {version!r} is no version number of its format, which counts from 1")
    if version > newest:
        read = "version 1" if newest == 1 else f"versions 1 to {newest}"
        raise ValueError(f"{what} has version {version} of its format; this hooked_lm reads {read}: update hooked_lm")
