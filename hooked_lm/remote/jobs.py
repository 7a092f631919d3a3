"""Jobs and their queue, which takes a job of each user in turn."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Literal

from hooked_lm._support.plain_data import PlainData
from hooked_lm.remote.protocol import RemoteError

__all__ = ["Event", "Job", "JobQueue", "State"]

State = Literal["queued", "running", "done", "failed", "cancelled", "expired"]


@dataclass(frozen=True)
class Event:
    """Something that happened to a job.

    Attributes:
        number: counts a job's events from 1.
        kind: the job's state.
        data: what a client is told.
    """

    number: int
    kind: State
    data: PlainData


@dataclass(eq=False)
class Job:
    """A trace that a user sent.

    Attributes:
        id: follows from user, model and trace.
        user: the name of the user.
        model: the name of the model.
        body: the trace's bytes; empty once it has ended.
        attempt: of the client, which it repeats where it sends the same request again.
        plan: passes, operations, bytes and seconds.
        format: `"hooked_lm trace"`, or that of a part of a sweep.
        together: make several runs in one pass.
        created: the time at which it came.
        failure: why it failed.
        retried: a worker was lost that ran it.
        stopping: it was cancelled while it ran.
        at: the pass and layer that it has come to.
        started: the time at which it began to run, of the monotonic clock.
    """

    id: str
    user: str
    model: str
    body: bytes
    attempt: str
    plan: PlainData
    format: str
    together: bool = True
    created: float = field(default_factory=time.time)
    failure: RemoteError | None = None
    retried: bool = False
    stopping: bool = False
    at: tuple[int, int] = (0, 0)
    started: float = 0.0

    def __post_init__(self) -> None:
        self.events: list[Event] = []
        self._lock = threading.Lock()
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._count = 0

    @property
    def state(self) -> State:
        """What the job does at present."""
        return self.events[-1].kind if self.events else "queued"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it, apart from the end of its result."""
        return self.state not in ("queued", "running")

    def publish(self, kind: State, **data: object) -> None:
        """Add an event. Of each state only the newest is kept, so that a job's events are few.

        Args:
            kind: the state.
            **data: what a client is told.
        """
        with self._lock:
            self._count += 1
            self.events = [one for one in self.events if one.kind != kind]
            self.events.append(Event(self._count, kind, data))
            if self.ended:
                self.body = b""
            waiting = list(self._waiting)
        for loop, event in waiting:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # the loop has been closed, and with it whatever waited there
                continue

    async def later_events(self, last: int, timeout: float) -> list[Event]:
        """Return the events after a number, once there are any; none after the timeout.

        Args:
            last: the number of the last event that is known.
            timeout: in seconds.
        """
        changed = asyncio.Event()
        waiter = (asyncio.get_running_loop(), changed)
        with self._lock:
            self._waiting.add(waiter)
            found = [one for one in self.events if one.number > last]
        try:
            if not found:
                async with asyncio.timeout(timeout):
                    await changed.wait()
        except TimeoutError:
            return []
        finally:
            with self._lock:
                self._waiting.discard(waiter)
        return [one for one in list(self.events) if one.number > last]

    def described(self) -> PlainData:
        """Return the job as plain data."""
        last = self.events[-1]
        return {"job": self.id, "model": self.model, "state": last.kind, **last.data, "plan": self.plan}


class JobQueue:
    """Jobs that wait, of each user in turn.

    Args:
        most: how many jobs of one user may wait.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lines: OrderedDict[str, deque[Job]] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        with self._changed:
            return sum(map(len, self._lines.values()))

    def put(self, job: Job) -> None:
        """Add a job to its user's line.

        Args:
            job: the job.

        Raises:
            RemoteError: 429, too many jobs of this user wait.
        """
        with self._changed:
            line = self._lines.setdefault(job.user, deque())
            if len(line) >= self._most:
                raise RemoteError(
                    429, "queue full", f"{len(line)} of your jobs wait already, and no more than {self._most} may"
                )
            line.append(job)
            self._tell_positions()
            self._changed.notify()

    def put_back(self, job: Job) -> None:
        """Put a job whose worker was lost in front of its user's line.

        Args:
            job: the job.
        """
        with self._changed:
            self._lines.setdefault(job.user, deque()).appendleft(job)
            self._lines.move_to_end(job.user, last=False)
            self._tell_positions()
            self._changed.notify()

    def take(self) -> Job | None:
        """Return the next job, once there is one; None when the queue has been closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._lines))
            if self._closed:
                return None
            user, line = next(iter(self._lines.items()))
            job = line.popleft()
            self._lines.move_to_end(user)
            if not line:
                del self._lines[user]
            self._tell_positions()
            return job

    def remove(self, job: Job) -> bool:
        """Take a job out of the queue; return whether it was there.

        Args:
            job: the job.
        """
        with self._changed:
            line = self._lines.get(job.user)
            if line is None or job not in line:
                return False
            line.remove(job)
            if not line:
                del self._lines[job.user]
            self._tell_positions()
            return True

    def close(self) -> None:
        """Give out no more jobs."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _tell_positions(self) -> None:
        """Tell each job how many there are up to it; a round takes one job of each user."""
        ranked = [(at, turn, job) for turn, line in enumerate(self._lines.values()) for at, job in enumerate(line)]
        for position, (_, _, job) in enumerate(sorted(ranked, key=lambda one: one[:2]), start=1):
            last = job.events[-1] if job.events else None
            if last is None or last.kind != "queued" or last.data.get("position") != position:
                job.publish("queued", position=position)
