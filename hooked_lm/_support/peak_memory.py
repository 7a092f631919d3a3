"""The most memory that the process used during a piece of work, and the most that an accelerator had allocated."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["PeakMemory", "peak_memory"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class PeakMemory:
    """What a piece of work used, once it has ended.

    Attributes:
        process: the most resident memory of the whole process meanwhile, in bytes; None where the system cannot tell.
        before: its resident memory when the work began.
        device: the most that torch had allocated on the CUDA device meanwhile; None without one.
    """

    process: int | None = None
    before: int | None = None
    device: int | None = None


_open: list[PeakMemory] = []
_lock = threading.Lock()


@contextmanager
def peak_memory() -> Generator[PeakMemory, None, None]:
    """Measure the peak of memory within the `with` block. Blocks may be nested, and stand in several threads.

    On Linux, the kernel's high-water mark of the process is set back when a block begins, and read when it ends.
    """
    found = PeakMemory()
    on_device = torch.cuda.is_available() and torch.cuda.is_initialized()
    with _lock:
        _take_mark()
        found.before = found.process = _in_bytes("VmRSS") if _reset_mark() else None
        _open.append(found)
    if on_device:
        torch.cuda.reset_peak_memory_stats()
    try:
        yield found
    finally:
        with _lock:
            _take_mark()
            _open[:] = [one for one in _open if one is not found]
        if on_device:
            found.device = torch.cuda.max_memory_allocated()


def _take_mark() -> None:
    """Give the high-water mark to all blocks that are open, since setting it back would hide it from them."""
    mark = _in_bytes("VmHWM") if _open else None
    for one in _open:
        if mark is not None and one.process is not None:
            one.process = max(one.process, mark)


def _reset_mark() -> bool:
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _in_bytes(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)
