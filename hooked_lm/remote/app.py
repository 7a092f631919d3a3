"""The server's web application: endpoints, authorization, bodies that are counted as they come, events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from hooked_lm._support.plain_data import PlainData
from hooked_lm.remote.jobs import Job
from hooked_lm.remote.metering import log
from hooked_lm.remote.protocol import PROTOCOL, PROTOCOL_HEADER, RemoteError
from hooked_lm.remote.service import Service
from hooked_lm.remote.tokens import User

__all__ = ["make_app"]

_HEARTBEAT = 10.0  # seconds between two signs of life in a stream of events
_IDLE = 30.0  # seconds that a body may stand still
_BODIES = 3  # that are read and checked at a time, so that they take little memory together
Endpoint = Callable[[Request, User], Awaitable[Response]]


def make_app(service: Service, heartbeat: float = _HEARTBEAT) -> Starlette:
    """Return the application of a service.

    Args:
        service: its models and jobs.
        heartbeat: seconds between two signs of life in a stream of events.
    """
    endpoints = _Endpoints(service, heartbeat)
    routes = [
        Route("/healthz", endpoints.health),
        Route("/metrics", endpoints.metrics),
        Route("/v1/models", endpoints.guarded(endpoints.models)),
        Route("/v1/models/{model}", endpoints.guarded(endpoints.model)),
        Route("/v1/models/{model}/check", endpoints.guarded(endpoints.check), methods=["POST"]),
        Route("/v1/models/{model}/jobs", endpoints.guarded(endpoints.submit), methods=["POST"]),
        Route("/v1/jobs/{job}", endpoints.guarded(endpoints.job), methods=["GET"]),
        Route("/v1/jobs/{job}", endpoints.guarded(endpoints.cancel), methods=["DELETE"]),
        Route("/v1/jobs/{job}/events", endpoints.guarded(endpoints.events)),
        Route("/v1/jobs/{job}/result", endpoints.guarded(endpoints.result)),
    ]
    return Starlette(routes=routes)


class _Endpoints:
    def __init__(self, service: Service, heartbeat: float) -> None:
        self.service, self.heartbeat = service, heartbeat
        self._reading = asyncio.Semaphore(_BODIES)

    def guarded(self, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint that needs a token and a known protocol, and answers errors as data."""

        async def answer(request: Request) -> Response:
            try:
                _check_protocol(request.headers.get(PROTOCOL_HEADER))
                user = self.service.users.user_of(request.headers.get("authorization"))
                response = await endpoint(request, user)
            except RemoteError as error:
                response = _error(error)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception as error:
                log("fault", path=request.url.path, error=f"{type(error).__name__}: {error}")
                response = _error(RemoteError(500, "fault", "the server has a fault here, which its log tells"))
            self.service.counts.add("requests_total", f'status="{response.status_code}"')
            response.headers[PROTOCOL_HEADER] = str(PROTOCOL)
            return response

        return answer

    async def health(self, request: Request) -> Response:
        """200 where every model has a worker that takes jobs."""
        states = {name: model.state for name, model in self.service.models.items()}
        ready = all(state == "ready" for state in states.values())
        return JSONResponse({"ready": ready, "models": states}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(self.service.metrics(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request, user: User) -> Response:
        models = self.service.models.items()
        return JSONResponse({"models": [{"name": name, "state": model.state} for name, model in models]})

    async def model(self, request: Request, user: User) -> Response:
        model = self.service.model(request.path_params["model"])
        limits = {name: value for name, value in vars(self.service.limits).items() if not name.startswith("kept")}
        return JSONResponse({**model.manifest, "limits": limits, "state": model.state, "scopes": sorted(user.scopes)})

    async def check(self, request: Request, user: User) -> Response:
        name, together = request.path_params["model"], request.query_params.get("together") != "0"
        async with self._reading:
            body = await self._body(request)
            return JSONResponse(await run_in_threadpool(self.service.plan, user, name, body, together))

    async def submit(self, request: Request, user: User) -> Response:
        name, together = request.path_params["model"], request.query_params.get("together") != "0"
        attempt = request.query_params.get("attempt", "")[:64]
        self.service.model(name)  # before the body is read
        async with self._reading:
            body = await self._body(request)
            job = await run_in_threadpool(self.service.submit, user, name, body, attempt, together)
        return JSONResponse(job.described(), 202)

    async def _body(self, request: Request) -> bytes:
        """The body, counted while it comes."""
        most = self.service.limits.body
        said = request.headers.get("content-length", "0")
        if not said.isdecimal() or int(said) > most:
            raise RemoteError(413, "limit", f"a body of {said[:20]} bytes: this server takes {most}")
        parts: list[bytes] = []
        size = 0
        stream = request.stream().__aiter__()
        while True:
            try:
                async with asyncio.timeout(_IDLE):
                    part = await anext(stream)
            except StopAsyncIteration:
                return b"".join(parts)
            except TimeoutError as error:
                raise RemoteError(408, "slow", f"nothing came of the body for {_IDLE:g} seconds") from error
            size += len(part)
            if size > most:
                raise RemoteError(413, "limit", f"a body of more than {most} bytes, which is what this server takes")
            parts.append(part)

    def _job(self, request: Request, user: User) -> Job:
        return self.service.job(user, request.path_params["job"])

    async def job(self, request: Request, user: User) -> Response:
        return JSONResponse(self._job(request, user).described())

    async def cancel(self, request: Request, user: User) -> Response:
        job = self._job(request, user)
        self.service.cancel(job)
        return JSONResponse(job.described(), 202)

    async def result(self, request: Request, user: User) -> Response:
        path = self.service.result(self._job(request, user))
        return FileResponse(path, media_type="application/octet-stream")

    async def events(self, request: Request, user: User) -> Response:
        job, known = self._job(request, user), request.headers.get("last-event-id", "0")
        if not known.isdecimal() or len(known) > 9:
            raise RemoteError(422, "event", f"Last-Event-ID is the number of an event, got {known[:20]!r}")
        # A proxy that collects an answer before it passes it on would keep the events to itself.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._told(job, int(known)), media_type="text/event-stream", headers=headers)

    async def _told(self, job: Job, last: int) -> AsyncIterator[str]:
        while True:
            found = await job.later_events(last, self.heartbeat)
            for event in found:
                last = event.number
                yield f"id: {event.number}\nevent: {event.kind}\ndata: {json.dumps(event.data)}\n\n"
            if job.ended and not await job.later_events(last, 0):
                return
            if not found:
                yield ": still here\n\n"


def _check_protocol(said: str | None) -> None:
    if said is not None and (not said.isdecimal() or int(said[:9]) > PROTOCOL):
        raise RemoteError(
            409, "version", f"the client speaks version {said[:20]} of the protocol, this server {PROTOCOL}: update it"
        )


def _error(error: RemoteError) -> Response:
    data: PlainData = error.as_data()
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse(data, error.status, headers)
