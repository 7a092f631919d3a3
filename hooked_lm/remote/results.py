"""Results on disk, each kept for a while."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from pathlib import Path

__all__ = ["ResultStore"]


class ResultStore:
    """Files of results.

    Args:
        folder: where they are.
        seconds: how long each is kept.
        most: bytes of all together; the oldest are dropped first.
    """

    def __init__(self, folder: Path, seconds: float, most: int) -> None:
        self._folder, self._seconds, self._most = folder, seconds, most
        self._kept: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, job: str, content: bytes) -> None:
        """Keep a result.

        Args:
            job: its job's id.
            content: the bytes.
        """
        with self._lock:
            self._folder.joinpath(job).write_bytes(content)
            self._kept.pop(job, None)
            self._kept[job] = (time.monotonic(), len(content))
            self._drop_old()

    def path(self, job: str) -> Path | None:
        """Return the file of a result; None once it has been dropped.

        Args:
            job: its job's id.
        """
        with self._lock:
            self._drop_old()
            return self._folder / job if job in self._kept else None

    def drop(self, job: str) -> None:
        """Drop a result, if it is kept.

        Args:
            job: its job's id.
        """
        with self._lock:
            if self._kept.pop(job, None) is not None:
                self._folder.joinpath(job).unlink(missing_ok=True)

    def _drop_old(self) -> None:
        total = sum(size for _, size in self._kept.values())
        while self._kept:
            job, (made, size) = next(iter(self._kept.items()))
            if time.monotonic() - made < self._seconds and total <= self._most:
                return
            del self._kept[job]
            total -= size
            self._folder.joinpath(job).unlink(missing_ok=True)
