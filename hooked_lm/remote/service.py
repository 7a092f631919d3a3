"""Service: the models of a server, and the jobs that users send for them. It holds no weights."""

from __future__ import annotations

import hashlib
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from hooked_lm._support.plain_data import PlainData
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.remote.jobs import Job, JobQueue
from hooked_lm.remote.limits import Limits, check_body, check_cost, check_graph, check_part, estimate_data, scopes_of
from hooked_lm.remote.manifest import target_of
from hooked_lm.remote.metering import Counts, log
from hooked_lm.remote.protocol import RemoteError
from hooked_lm.remote.replicas import Replica
from hooked_lm.remote.results import ResultStore
from hooked_lm.remote.source import ModelSource
from hooked_lm.remote.tokens import User, UserTable
from hooked_lm.sweep.wire import SWEEP_FORMAT, part_from_bytes
from hooked_lm.tracing.errors import TraceError
from hooked_lm.tracing.estimate import estimate_plan
from hooked_lm.tracing.planner import plan_trace
from hooked_lm.tracing.reading import from_bytes

__all__ = ["ServedModel", "Service"]

_MOST_JOBS = 4096  # that are remembered once they have ended


class ServedModel:
    """A model of the server: its replicas, and the queue that they take jobs from.

    Args:
        source: of the model.
        n_replicas: worker processes, each with the model.
        limits: of its jobs.
        results: where results go.
        counts: for Prometheus.
    """

    def __init__(
        self, source: ModelSource, n_replicas: int, limits: Limits, results: ResultStore, counts: Counts
    ) -> None:
        self.queue = JobQueue(limits.queued)
        self.replicas: list[Replica] = []
        try:
            for _ in range(n_replicas):
                self.replicas.append(Replica(source, self.queue, results, limits, counts))
        except BaseException:
            self.close()
            raise
        self.manifest = self.replicas[0].manifest
        self.cfg = HookedTransformerConfig.from_dict(self.manifest["config"])
        self.target = target_of(self.manifest, self.cfg)

    @property
    def state(self) -> str:
        """`"ready"`, or `"loading"` while no replica is."""
        states = {replica.state for replica in self.replicas}
        return "ready" if states & {"ready", "running"} else "loading"

    @property
    def flops_per_second(self) -> float:
        """How fast jobs were lately, in floating-point operations."""
        return max(replica.flops_per_second for replica in self.replicas)

    def close(self) -> None:
        """End the replicas."""
        self.queue.close()
        for replica in self.replicas:
            replica.close()


class Service:
    """The models, users, jobs and results of a server.

    Args:
        sources: name of a model -> where it comes from.
        users: who may send what.
        limits: of a job.
        n_replicas: worker processes of each model.

    Raises:
        ValueError: a model cannot be loaded.
    """

    def __init__(
        self,
        sources: dict[str, ModelSource],
        users: UserTable | None = None,
        limits: Limits | None = None,
        n_replicas: int = 1,
    ) -> None:
        self.users, self.limits, self.counts = users or UserTable(), limits or Limits(), Counts()
        self._folder = tempfile.TemporaryDirectory(prefix="hooked_lm_results_")
        self.results = ResultStore(Path(self._folder.name), self.limits.kept_seconds, self.limits.kept_bytes)
        self.models: dict[str, ServedModel] = {}
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.Lock()
        try:
            for name, source in sources.items():
                self.models[name] = ServedModel(source, n_replicas, self.limits, self.results, self.counts)
                log("model ready", model=name, replicas=n_replicas)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all workers and drop the results."""
        for model in self.models.values():
            model.close()
        self._folder.cleanup()

    def model(self, name: str) -> ServedModel:
        """Return a model.

        Raises:
            RemoteError: 404, there is none of this name.
        """
        if name not in self.models:
            raise RemoteError(404, "unknown model", f"no model {name!r}; this server has {', '.join(self.models)}")
        return self.models[name]

    def plan(self, user: User, name: str, body: bytes, together: bool) -> PlainData:
        """Return what a trace or a part of a sweep costs, checked against everything. Nothing is queued.

        Args:
            user: who sends it.
            name: of the model.
            body: the bytes.
            together: make several runs in one pass.

        Raises:
            RemoteError: 403, 409, 413 or 422.
        """
        model = self.model(name)
        document = check_body(body, self.limits)
        if document.get("format") == SWEEP_FORMAT:
            _require(user, ["trace"])
            try:
                part = part_from_bytes(body)
            except ValueError as error:
                raise RemoteError(422, "sweep", str(error)) from error
            estimate = check_part(part, model.cfg, self.limits)
        else:
            try:
                graph = from_bytes(body, model.target)
                _require(user, sorted(scopes_of(graph)))
                check_graph(graph, model.cfg, self.limits)
                can_sweep = bool(model.manifest["can_sweep"])
                plan = plan_trace(graph, model.target, together=together, can_sweep=lambda: can_sweep)
            except TraceError as error:
                raise RemoteError(422, "trace", error.reason, error.node) from error
            estimate = estimate_plan(plan, graph, model.cfg)
        check_cost(estimate, self.limits)
        seconds = estimate.flops / model.flops_per_second
        return {"format": document["format"], **estimate_data(estimate), "seconds": seconds}

    def submit(self, user: User, name: str, body: bytes, attempt: str, together: bool) -> Job:
        """Return the job of a trace: the one that there is already, or a new one in the queue.

        A job that failed, was cancelled or whose result has been dropped is made anew for another attempt; the same
        attempt, which a client repeats when it has not heard the answer, gives the same job.

        Args:
            user, name, body, together: as for `plan`.
            attempt: any word of the client's.

        Raises:
            RemoteError: as `plan`, and 429 where too many jobs of the user wait.
        """
        model = self.model(name)
        key = f"{user.name}\0{name}\0{model.manifest['weights_sha256']}\0{together}\0".encode()
        job_id = hashlib.sha256(key + body).hexdigest()
        found = self._still_good(job_id, attempt)
        if found is not None:
            return found
        plan = self.plan(user, name, body, together)
        with self._lock:
            found = self._still_good(job_id, attempt)
            if found is not None:
                return found
            job = Job(job_id, user.name, name, body, attempt, plan, plan["format"], together)
            model.queue.put(job)
            self._jobs.pop(job_id, None)
            self._jobs[job_id] = job
            self._forget()
        self.counts.add("jobs_queued_total")
        log("job queued", job=job_id, user=user.name, model=name, bytes=len(body), flops=plan["flops"])
        return job

    def _still_good(self, job_id: str, attempt: str) -> Job | None:
        job = self._jobs.get(job_id)
        if job is None or job.attempt == attempt or not job.ended:
            return job
        return job if job.state == "done" and self.results.path(job_id) is not None else None

    def _forget(self) -> None:
        """Forget the oldest jobs that have ended, beyond so many or once their results are dropped."""
        too_old = time.time() - 2 * self.limits.kept_seconds
        for job_id, job in list(self._jobs.items()):
            if job.ended and (len(self._jobs) > _MOST_JOBS or job.created < too_old):
                del self._jobs[job_id]
                self.results.drop(job_id)

    def job(self, user: User, job_id: str) -> Job:
        """Return a job of a user.

        Raises:
            RemoteError: 404, the user has none of this id.
        """
        job = self._jobs.get(job_id)
        if job is None or job.user != user.name:
            raise RemoteError(404, "unknown job", "no such job of yours: it was never sent, or is long over")
        return job

    def cancel(self, job: Job) -> None:
        """Stop a job: at once if it waits, at the next hook if it runs."""
        if self.models[job.model].queue.remove(job):
            job.failure = RemoteError(409, "cancelled", "the job was cancelled")
            job.publish("cancelled", error=job.failure.as_data())
        elif not job.ended:
            job.stopping = True

    def result(self, job: Job) -> Path:
        """Return the file of a job's result.

        Raises:
            RemoteError: the job's own failure; 409 while it is not done; 410 once the result has been dropped.
        """
        if job.failure is not None:
            raise job.failure
        if not job.ended:
            raise RemoteError(409, "not done", f"the job is {job.state}: its result comes with the event 'done'")
        path = self.results.path(job.id)
        if path is None:
            hours = self.limits.kept_seconds / 3600
            raise RemoteError(410, "gone", f"results are kept for {hours:.2g} hours: run the trace again")
        return path

    def metrics(self) -> str:
        """Return counts and present numbers in Prometheus' text format."""
        replicas = [replica for model in self.models.values() for replica in model.replicas]
        running = sum(replica.state == "running" for replica in replicas)
        waiting = sum(len(model.queue) for model in self.models.values())
        gauges = {"jobs_waiting": waiting, "workers": len(replicas), "workers_running": running}
        return self.counts.text(gauges)


def _require(user: User, scopes: Sequence[str]) -> None:
    lacking = [one for one in scopes if one not in user.scopes]
    if lacking:
        raise RemoteError(
            403,
            "scope",
            f"this trace needs the scope {lacking[0]!r}, and the token of {user.name!r} has "
            f"{', '.join(sorted(user.scopes)) or 'none'}",
        )
