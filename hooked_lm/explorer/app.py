"""The explorer's web application: a page and its assets, and the views as JSON, one computation at a time."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from hooked_lm._support.plain_data import PlainData
from hooked_lm.explorer.code import program
from hooked_lm.explorer.prompts import ExplorableModel
from hooked_lm.explorer.views import VIEWS, card
from hooked_lm.names import UnknownHookError
from hooked_lm.remote import RemoteError
from hooked_lm.tracing import TraceError

__all__ = ["ASSETS", "make_app"]

ASSETS = Path(__file__).parent / "assets"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_LARGEST_BODY = 200_000
# Nothing but the page's own files: no other page can be shown in it, or show it.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def make_app(
    model: ExplorableModel, name: str, load: str, hosts: tuple[str, ...] = ("127.0.0.1", "localhost")
) -> Starlette:
    """Return the application that shows a model.

    Requests must name one of the hosts, so that a page of another site, which a browser may have been led to send here,
    is refused. A view waits for the one before it; where a newer request for the same view has come meanwhile, the
    older one is not computed.

    Args:
        model: a `HookedTransformer`, or a model on a server.
        name: to show.
        load: the Python that loads it as `model`.
        hosts: names under which the page is opened.

    Raises:
        ValueError: the model's attention is bidirectional, so it has no next token to show; or it has no layers.
    """
    if model.cfg.attention_dir != "causal" or model.cfg.n_layers == 0:
        raise ValueError("the explorer shows next tokens and heads: it takes causal models with one layer or more")
    views = _Views(model, name, load)

    def guarded(endpoint: Callable[[HttpRequest], Awaitable[Response]]) -> Callable[[HttpRequest], Awaitable[Response]]:
        async def answer(request: HttpRequest) -> Response:
            host = request.headers.get("host", "").rsplit(":", 1)[0]
            if host not in hosts:
                response: Response = _refused(403, f"this page is opened as {' or '.join(hosts)}")
            else:
                response = await endpoint(request)
            response.headers.update(_HEADERS)
            return response

        return answer

    files = [
        Route("/" if path.name == "index.html" else f"/assets/{path.name}", guarded(_file(path)))
        for path in sorted(ASSETS.iterdir())
        if path.suffix in _TYPES
    ]
    return Starlette(
        routes=[
            *files,
            Route("/api/model", guarded(views.model_card)),
            Route("/api/{view}", guarded(views.answer), methods=["POST"]),
        ]
    )


def _file(path: Path) -> Callable[[HttpRequest], Awaitable[Response]]:
    async def send(request: HttpRequest) -> Response:
        return FileResponse(path, media_type=_TYPES[path.suffix])

    return send


class _Views:
    """The views of a model. Only one is computed at a time."""

    def __init__(self, model: ExplorableModel, name: str, load: str) -> None:
        self.model, self.name, self.load = model, name, load
        self._busy = asyncio.Lock()
        self._newest: dict[str, int] = defaultdict(int)

    async def model_card(self, request: HttpRequest) -> Response:
        return JSONResponse(await run_in_threadpool(card, self.model, self.name, self.load))

    async def answer(self, request: HttpRequest) -> Response:
        view = request.path_params["view"]
        if view not in VIEWS and view != "code":
            return _refused(404, f"there is no view {view[:40]!r}")
        # A form of another site cannot send this type.
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return _refused(415, "a request is JSON")
        try:
            fields = await _fields(request)
        except ValueError as error:
            return _refused(400, str(error))
        self._newest[view] += 1
        number = self._newest[view]
        async with self._busy:
            if number != self._newest[view]:
                # No error: the page has sent a newer request, and ignores the answer to this one.
                return JSONResponse({"superseded": True})
            return await run_in_threadpool(self._computed, view, fields)

    def _computed(self, view: str, fields: PlainData) -> Response:
        try:
            if view == "code":
                return JSONResponse({"code": program(self.model, self.load, fields)})
            return JSONResponse(VIEWS[view](self.model, fields))
        except (TraceError, UnknownHookError, ValueError) as error:
            return _refused(422, str(error))
        except (RemoteError, ConnectionError) as error:
            return _refused(502, f"the server of the model: {error}")


async def _fields(request: HttpRequest) -> PlainData:
    """The fields of a request.

    Raises:
        ValueError: too large a body, or no JSON object in it.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _LARGEST_BODY:
            raise ValueError(f"a request has {_LARGEST_BODY} bytes at most")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("the request is not JSON") from error
    if not isinstance(fields, dict):
        raise ValueError("a request is a JSON object")
    return fields


def _refused(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)
