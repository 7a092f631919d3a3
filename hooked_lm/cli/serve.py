"""`hooked-lm serve`: models that run the traces of others."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hooked_lm.cli.inputs import Device, Revision, check_device, one_line_errors

if TYPE_CHECKING:
    from hooked_lm.remote.source import ModelSource

__all__ = ["serve"]

_MOST_CONNECTIONS = 1024  # at a time; beyond them a client is told to come back


def serve(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Models, each as for `info`; NAME=MODEL serves one as NAME.")
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 for any free port.")] = 8000,
    host: Annotated[str, typer.Option(help="Where others reach it; other machines need --tokens.")] = "127.0.0.1",
    tokens: Annotated[Path | None, typer.Option(help="A JSON file of users and the SHA-256 of their tokens.")] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Worker processes of each model.")] = 1,
    device: Device = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; by default the checkpoint's.")] = None,
    revision: Revision = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes that share out each model's heads and neurons.")] = 1,
    processing: Annotated[bool, typer.Option(help="Fold and centre the weights, as from_pretrained does.")] = True,
    seconds: Annotated[float, typer.Option(min=0.1, help="The most that a job may take.")] = 600.0,
) -> None:
    """Serve models: others record traces with hooked_lm.connect and run them here. Only data crosses the wire."""
    with one_line_errors():
        from hooked_lm._support.extras import require

        try:
            require("uvicorn", "hooked-lm serve", "server")
            require("starlette", "hooked-lm serve", "server")
        except ImportError as error:
            raise ValueError(str(error)) from error
        check_device(device)
        if tokens is None and not _is_loopback(host):
            raise ValueError(
                f"--host {host}: an address that other machines reach needs --tokens FILE, since everybody could run "
                "traces there"
            )
        _log_lines()
        sources = _sources(models, revision, device, dtype, processing, _ranks(ranks, replicas, len(models)))
        if int(os.environ.get("RANK", "0")) > 0:
            from hooked_lm.remote.follower import follow

            follow(next(iter(sources.values())), int(os.environ["RANK"]), None)
        _run(sources, host, port, tokens, replicas, seconds)


def _run(
    sources: dict[str, ModelSource], host: str, port: int, tokens: Path | None, replicas: int, seconds: float
) -> None:
    import uvicorn

    from hooked_lm.remote.app import make_app
    from hooked_lm.remote.limits import Limits
    from hooked_lm.remote.service import Service
    from hooked_lm.remote.tokens import UserTable

    users = UserTable() if tokens is None else UserTable.read(tokens)
    service = Service(sources, users, Limits(seconds=seconds), replicas)
    try:
        config = uvicorn.Config(
            make_app(service),
            host=host,
            port=port,
            log_config=None,
            limit_concurrency=_MOST_CONNECTIONS,
            timeout_graceful_shutdown=5,
            lifespan="off",
        )
        server = uvicorn.Server(config)
        typer.echo(f"Serving {', '.join(sources)} at http://{host}:{port}. Ctrl-C ends it.", err=True)
        server.run()
    finally:
        service.close()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _ranks(asked: int, replicas: int, n_models: int) -> int:
    """The processes of each model: as many as were asked for, or as `torch.distributed.run` has started."""
    from hooked_lm.remote.group import launched

    started = launched()
    if started == 1:
        return asked
    if asked not in (1, started) or replicas > 1 or n_models > 1:
        raise ValueError(f"torch.distributed.run has started {started} processes: they serve one model, once")
    return started


def _sources(
    models: list[str], revision: str | None, device: str, dtype: str | None, processing: bool, ranks: int
) -> dict[str, ModelSource]:
    """Return where each model comes from, by the name under which it is served."""
    from hooked_lm.remote.source import ModelSource

    found: dict[str, ModelSource] = {}
    for given in models:
        name, equals, place = given.partition("=")
        place = place if equals else given
        name = name if equals else Path(given).name
        if not name or name in found:
            raise ValueError(f"two models cannot be served as {name!r}: give one as NAME={place}")
        found[name] = ModelSource(place, revision, device, dtype, processing, ranks)
    return found


def _log_lines() -> None:
    """Let the server's log go to standard error, a line of JSON for each event; uvicorn's too."""

    class Lines(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            message = record.getMessage()
            if record.name.startswith("hooked_lm."):
                return message
            return json.dumps({"time": round(record.created, 3), "event": "http", "message": message})

    handler = logging.StreamHandler()
    handler.setFormatter(Lines())
    for name, level in (("hooked_lm.remote", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
