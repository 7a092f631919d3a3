"""Spawned: workers in processes of their own on this machine. Bytes go over pipes; weights are mapped from one file."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from hooked_lm._support.integers import integer
from hooked_lm.hooked_model import HookedModel
from hooked_lm.sweep.engine import run_part
from hooked_lm.workers.model_file import read_model, write_model
from hooked_lm.workers.pool import Pool, WorkerLost

__all__ = ["Spawned"]

_GRACE = 5.0  # seconds that a process has to end by itself
_ANSWER, _FAILURE = b"\0", b"\1"


class Spawned(Pool):
    """Workers in processes of their own, which load the model once.

    A script that makes them needs `if __name__ == "__main__":` around what it runs, as for all of Python's spawned
    processes.

    Args:
        model: a `HookedTransformer`. On a CPU all workers map its weights from one file.
        n_workers: how many.
        threads: that each computes with; by default the machine's cores, divided among them.
        devices: one for each worker; by default the CPU.

    Raises:
        ValueError: numbers that do not fit each other.
        WorkerLost: a process did not start.
    """

    def __init__(
        self,
        model: HookedModel,
        n_workers: int = 2,
        *,
        threads: int | None = None,
        devices: list[str] | None = None,
    ) -> None:
        n_workers = integer(n_workers, "n_workers")
        if n_workers < 1 or (devices is not None and len(devices) != n_workers):
            raise ValueError(f"one worker at least, and a device for each; got {n_workers} and {devices}")
        threads = max(1, (os.cpu_count() or 1) // n_workers) if threads is None else integer(threads, "threads")
        self._folder = tempfile.TemporaryDirectory(prefix="hooked_lm_workers_")
        write_model(model, self._folder.name)
        started = [_Process(self._folder.name, one, threads) for one in devices or ["cpu"] * n_workers]
        super().__init__(started, model)
        try:
            for one in started:
                one.wait_until_ready()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes."""
        super().close()
        self._folder.cleanup()


class _Process:
    """A worker's process, seen from this one."""

    def __init__(self, folder: str, device: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=serve, args=(theirs, folder, device, threads), daemon=True)
        self.process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        self._answer()

    def run(self, body: bytes) -> bytes:
        try:
            self._pipe.send_bytes(body)
        except OSError as error:
            raise WorkerLost(self._how_it_ended()) from error
        return self._answer()

    def _answer(self) -> bytes:
        try:
            came = self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise WorkerLost(self._how_it_ended()) from error
        if came[:1] == _FAILURE:
            raise RuntimeError(came[1:].decode())
        return came[1:]

    def _how_it_ended(self) -> str:
        self.process.join(_GRACE)
        return f"a worker's process ended with code {self.process.exitcode}"

    def close(self) -> None:
        self._pipe.close()  # its end tells the process to end
        self.process.join(_GRACE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(_GRACE)


def serve(pipe: Connection, folder: str, device: str, threads: int) -> None:
    """Load a model, and answer bodies until the pipe is closed. It is what a worker's process runs.

    Args:
        pipe: an end of one.
        folder: of the model.
        device: where it computes.
        threads: with so many.
    """
    torch.set_num_threads(threads)
    try:
        model = read_model(Path(folder), device)
        pipe.send_bytes(_ANSWER)
        while True:
            body = pipe.recv_bytes()
            try:
                answer = _ANSWER + run_part(model, body)
            except Exception as error:
                answer = _FAILURE + f"{type(error).__name__}: {error}".encode()
            pipe.send_bytes(answer)
    except (EOFError, OSError, KeyboardInterrupt):
        return
