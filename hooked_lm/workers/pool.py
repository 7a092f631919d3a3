"""Pool: some workers that take bodies one by one; the body of a worker that is lost goes to another one, once."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self, cast

from torch import nn

from hooked_lm._support.checksums import checksums
from hooked_lm.hooked_model import HookedModel
from hooked_lm.sweep.workers import WorkerError

__all__ = ["Pool", "Worker", "WorkerLost", "contents_of"]


class WorkerLost(Exception):
    """A worker's process has ended, or its machine is not there."""


class Worker(Protocol):
    """One model that answers a body with bytes."""

    def run(self, body: bytes) -> bytes:
        """Return the answer to a body.

        Raises:
            WorkerLost: the worker is no more.
            Exception: the body failed there; the message says how.
        """
        ...

    def close(self) -> None:
        """Let go of the worker."""
        ...


class Pool:
    """Workers for `sweep(..., workers=)`, in a `with` block that ends them.

    Args:
        workers: each has the model.
        model: that they have, as it is now.
    """

    def __init__(self, workers: Sequence[Worker], model: HookedModel) -> None:
        if not workers:
            raise ValueError("a pool has one worker at least")
        self.workers = list(workers)
        self._contents = contents_of(model)

    def check(self, model: HookedModel) -> None:
        """Check that the workers have this model, with its present weights.

        Args:
            model: of this process.

        Raises:
            ValueError: they have another one, or it has changed since.
        """
        if contents_of(model) != self._contents:
            raise ValueError(
                "these workers have another model than this one, or its weights or its config have changed since they "
                "were made: make them anew of the model as it is"
            )

    def run_all(self, bodies: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
        """Yield the place of each body among them and its answer, in the order in which answers come.

        Args:
            bodies: made as they are needed.

        Raises:
            WorkerError: a body failed, or was lost with two workers, or no worker is left.
        """
        yield from _Share(self, bodies).answers()

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            worker.close()
        self.workers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Share:
    """The bodies of one call, shared out among the workers of a pool: a thread for each worker takes the next one."""

    def __init__(self, pool: Pool, bodies: Iterable[bytes]) -> None:
        self.pool, self.bodies = pool, enumerate(bodies)
        self.again: deque[tuple[int, bytes]] = deque()  # of lost workers
        self.lost_once: set[int] = set()
        self.running = 0
        self.changed = threading.Condition()
        self.stopped = False
        self.found: queue.Queue[tuple[int, bytes] | Exception | None] = queue.Queue()

    def answers(self) -> Iterator[tuple[int, bytes]]:
        workers = list(self.pool.workers)
        threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        ended = 0
        try:
            while ended < len(threads):
                one = self.found.get()
                if isinstance(one, Exception):
                    raise one
                if one is None:
                    ended += 1
                else:
                    yield one
            if self._unanswered():
                raise WorkerError("every worker is lost, and parts of the sweep have not been run")
        finally:
            with self.changed:
                self.stopped = True
                self.changed.notify_all()

    def _unanswered(self) -> bool:
        return bool(self.again) or next(self.bodies, None) is not None

    def _serve(self, worker: Worker) -> None:
        """Run bodies on a worker until there are none, or it is lost."""
        while (taken := self._take()) is not None:
            number, body = taken
            try:
                self.found.put((number, worker.run(body)))
            except WorkerLost as error:
                self._lose(worker, number, body, error)
                break
            except Exception as error:
                self.found.put(WorkerError(f"part {number} of the sweep failed in a worker: {error}"))
                break
            finally:
                with self.changed:
                    self.running -= 1
                    self.changed.notify_all()
        self.found.put(None)

    def _take(self) -> tuple[int, bytes] | None:
        """The next body; None when no more can come. One that runs elsewhere may yet have to be run again."""
        with self.changed:
            while not self.stopped:
                taken = self.again.popleft() if self.again else self._next()
                if taken is not None:
                    self.running += 1
                    return taken
                if not self.running:
                    return None
                self.changed.wait()
        return None

    def _next(self) -> tuple[int, bytes] | None:
        try:
            return next(self.bodies, None)
        except Exception as error:  # of making a body, which the caller is to see
            self.found.put(error)
            return None

    def _lose(self, worker: Worker, number: int, body: bytes, error: WorkerLost) -> None:
        if worker in self.pool.workers:
            self.pool.workers.remove(worker)
        worker.close()
        with self.changed:
            if number in self.lost_once:
                self.found.put(WorkerError(f"part {number} of the sweep was lost with two workers, last: {error}"))
            self.lost_once.add(number)
            self.again.append((number, body))


def contents_of(model: HookedModel) -> tuple[object, ...]:
    """Return what two models have in common that compute the same: sums over their weights, and their config.

    Args:
        model: the model.
    """
    named = [*cast(nn.Module, model).named_parameters(), *cast(nn.Module, model).named_buffers()]
    config = model.cfg.to_dict()
    config.pop("device", None)
    sums = checksums([one for _, one in named])
    return tuple((name, one.dtype, one.shape) for name, one in named), tuple(sums), repr(sorted(config.items()))
