"""A replica of a model: its worker process, and the thread that gives it jobs and hears of their end."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import asdict
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from hooked_lm._support.plain_data import PlainData
from hooked_lm.remote.group import launched
from hooked_lm.remote.jobs import Job, JobQueue
from hooked_lm.remote.limits import Limits
from hooked_lm.remote.metering import Counts, log
from hooked_lm.remote.protocol import RemoteError, packed, read_error, unpacked
from hooked_lm.remote.results import ResultStore
from hooked_lm.remote.source import ModelSource
from hooked_lm.remote.worker import serve_requests

__all__ = ["Replica"]

_GRACE = 5.0  # seconds that a job has to stop by itself, before its worker is killed
_TICK = 0.05  # seconds between two looks at whether a job was cancelled


class _WorkerLost(Exception):
    """The process has ended."""


class Replica:
    """One worker process and its thread.

    Args:
        source: of the model.
        queue: where the jobs come from.
        results: where results go.
        limits: of a job.
        counts: for Prometheus.

    Attributes:
        manifest: of the model.
        process: the worker.
        state: `"loading"`, `"ready"`, `"running"` or `"closed"`.
        flops_per_second: how fast jobs were lately.
    """

    def __init__(
        self, source: ModelSource, queue: JobQueue, results: ResultStore, limits: Limits, counts: Counts
    ) -> None:
        self._source, self._queue, self._results = source, queue, results
        self._limits, self._counts = limits, counts
        self.state = "loading"
        self._closing = False
        self.flops_per_second = 0.0
        self.process, self._pipe, self.manifest = self._start()
        self.state = "ready"
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the worker. The queue must have been closed before."""
        self._closing = True
        if self.state == "ready":
            self._pipe.close()  # its end tells the process to end
            self.process.join(_GRACE)
        self.process.kill()
        self._thread.join(2 * _GRACE)
        self.process.join(_GRACE)
        self.state = "closed"

    def _start(self) -> tuple[BaseProcess, Connection, PlainData]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve_requests, args=(theirs, json.dumps(asdict(self._source))), daemon=True)
        process.start()
        theirs.close()
        try:
            head, _ = unpacked(ours.recv_bytes())
        except (EOFError, OSError) as error:
            process.join(_GRACE)
            raise ValueError(f"the worker for {self._source.name!r} ended with code {process.exitcode}") from error
        if head["kind"] != "manifest":
            raise ValueError(head["message"])
        self.flops_per_second = self.flops_per_second or head["rate"]
        return process, ours, head["manifest"]

    def _restart(self) -> None:
        self.state = "loading"
        self.process.kill()
        self.process.join(_GRACE)
        self._pipe.close()
        if self._source.ranks > 1 and launched() > 1:
            # Whoever started the group's processes starts all of them again, this one among them.
            log("group lost", model=self._source.name)
            os.kill(os.getpid(), signal.SIGKILL)
        pause = 1.0
        while not self._closing:
            try:
                self.process, self._pipe, self.manifest = self._start()
            except ValueError as error:
                log("worker not started", model=self._source.name, reason=str(error))
                time.sleep(pause)
                pause = min(2 * pause, 60.0)
                continue
            self.state = "ready"
            return

    def _loop(self) -> None:
        while (job := self._queue.take()) is not None:
            self.state = "running"
            try:
                self._run(job)
            except (EOFError, OSError, _WorkerLost):
                self._lost(job)
            if self._closing:
                return
            self.state = "ready"

    def _run(self, job: Job) -> None:
        """Give a job to the worker, and hear of it until it ends."""
        job.started, job.at = time.monotonic(), (1, 0)
        self._publish_progress(job)
        head = {
            "kind": "run",
            "format": job.format,
            "job": job.id,
            "together": job.together,
            "seconds": self._limits.seconds,
            "memory": job.plan["memory"],
        }
        if not self.process.is_alive():
            raise _WorkerLost
        self._pipe.send_bytes(packed(head, job.body))
        told = 0.0
        while True:
            if self._pipe.poll(_TICK):
                message, payload = unpacked(self._pipe.recv_bytes())
                if message["kind"] == "progress":
                    job.at = (message["pass"], message["layer"])
                    self._publish_progress(job)
                    continue
                self._end(job, message, payload)
                return
            now = time.monotonic()
            if job.stopping and not told:
                self._pipe.send_bytes(packed({"kind": "cancel", "job": job.id}))
                told = now
            late = now > job.started + self._limits.seconds + _GRACE
            if late or (told and now > told + _GRACE):
                cancelled = RemoteError(409, "cancelled", "the job was cancelled")
                self._fail(job, RemoteError(504, "time", f"stopped at {_place(job)}: too long") if late else cancelled)
                self._restart()
                return

    def _publish_progress(self, job: Job) -> None:
        number, layer = job.at
        n_passes = len(job.plan["passes"])
        n_layers = job.plan["passes"][number - 1]["layers"] if number <= n_passes else 0
        job.publish("running", **{"pass": number, "passes": n_passes, "layer": layer, "layers": n_layers})

    def _end(self, job: Job, message: PlainData, payload: bytes) -> None:
        if message["kind"] == "failed":
            self._fail(job, read_error(message["failure"], 500))
            return
        if len(payload) > 2 * self._limits.saved + 2**20:
            self._fail(job, RemoteError(422, "limit", f"{len(payload)} bytes of results: save less"))
            return
        self._results.put(job.id, payload)
        seconds = max(time.monotonic() - job.started, 1e-3)
        self.flops_per_second += 0.3 * (job.plan["flops"] / seconds - self.flops_per_second)
        job.publish("done", warnings=message["warnings"], bytes=len(payload))
        self._count(job, "done")

    def _fail(self, job: Job, failure: RemoteError) -> None:
        job.failure = failure
        job.publish("cancelled" if failure.kind == "cancelled" else "failed", error=failure.as_data())
        self._count(job, job.state)

    def _count(self, job: Job, state: str) -> None:
        seconds = time.monotonic() - job.started
        self._counts.add("jobs_total", f'state="{state}"')
        self._counts.add("job_seconds_total", "", seconds)
        failure = None if job.failure is None else job.failure.kind
        log("job ended", job=job.id, user=job.user, state=state, seconds=round(seconds, 4), failure=failure)

    def _lost(self, job: Job) -> None:
        """Give the job of a lost worker to another one, once."""
        self._counts.add("workers_lost_total")
        log("worker lost", job=job.id, user=job.user, at=_place(job), retried=job.retried)
        if job.stopping:
            self._fail(job, RemoteError(409, "cancelled", "the job was cancelled"))
        elif job.retried or self._closing:
            self._fail(job, RemoteError(502, "worker lost", f"worker lost at {_place(job)}, and the job not run again"))
        else:
            job.retried = True
            self._queue.put_back(job)
        self._restart()


def _place(job: Job) -> str:
    return f"pass {job.at[0]} layer {job.at[1]}"
