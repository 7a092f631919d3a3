"""`hooked-lm explore`: a local web page that looks inside a model."""

from __future__ import annotations

import socket
import threading
import time
import webbrowser
from typing import TYPE_CHECKING, Annotated

import typer

from hooked_lm.cli.inputs import Device, Revision, check_device, one_line_errors

if TYPE_CHECKING:
    import uvicorn

    from hooked_lm.explorer.prompts import ExplorableModel

__all__ = ["explore"]


def explore(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A bundled model, a folder, an alias, a hub id; or http://HOST/NAME on a server."
        ),
    ] = "demo-tasks-4l",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 for any free port.")] = 8080,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
    device: Device = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; by default the checkpoint's.")] = None,
    revision: Revision = None,
    processing: Annotated[bool, typer.Option(help="Fold and centre the weights, as from_pretrained does.")] = True,
    token: Annotated[str | None, typer.Option(help="For a server that asks for one.", envvar="HOOKED_LM_TOKEN")] = None,
) -> None:
    """Open a local web page that shows a model at work: attention, logit lens, patching, ablation, steering."""
    with one_line_errors():
        from hooked_lm._support.extras import require

        try:
            require("uvicorn", "hooked-lm explore", "server")
            require("starlette", "hooked-lm explore", "server")
        except ImportError as error:
            raise ValueError(str(error)) from error
        check_device(device)
        _check_port(port)
        found, name, load = _loaded(model, device, dtype, revision, processing, token)
        _serve(found, name, load, port, open_page)


def _check_port(port: int) -> None:
    """Check, before a model is loaded, that the page can be served there."""
    with socket.socket() as tried:
        # As the server does: a connection that has just ended does not keep the port.
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"--port {port}: {error.strerror}; --port 0 takes one that is free") from error


def _loaded(
    given: str, device: str, dtype: str | None, revision: str | None, processing: bool, token: str | None
) -> tuple[ExplorableModel, str, str]:
    """Return the model, its name, and the Python that loads it."""
    if given.startswith(("http://", "https://")):
        from hooked_lm.remote import connect

        address, _, name = given.rpartition("/")
        if address.endswith(":/") or not name:
            raise ValueError(f"a model on a server is http://HOST/NAME, got {given}")
        given_token = ', token="..."' if token else ""
        load = f'import hooked_lm\n\nmodel = hooked_lm.connect("{address}"{given_token}).model("{name}")'
        return connect(address, token).model(name), name, load
    from hooked_lm.remote.source import ModelSource

    source = ModelSource(given, revision, device, dtype, processing, 1)
    options = {"device": None if device == "cpu" else device, "dtype": dtype, "revision": revision}
    written = "".join(f', {key}="{value}"' for key, value in options.items() if value is not None)
    maker = "from_pretrained" if processing else "from_pretrained_no_processing"
    load = f'from hooked_lm import HookedTransformer\n\nmodel = HookedTransformer.{maker}("{given}"{written})'
    return source.load(), given, load


def _serve(model: ExplorableModel, name: str, load: str, port: int, open_page: bool) -> None:
    import uvicorn

    from hooked_lm.explorer.app import make_app

    config = uvicorn.Config(
        make_app(model, name, load), host="127.0.0.1", port=port, log_level="warning", lifespan="off", access_log=False
    )
    server = uvicorn.Server(config)
    threading.Thread(target=_announce, args=(server, name, open_page), daemon=True).start()
    server.run()


def _announce(server: uvicorn.Server, name: str, open_page: bool) -> None:
    """Say where the page is as soon as it is there, and open it."""
    while not server.started:
        if server.should_exit:
            return
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    typer.echo(f"Exploring {name} at {address}. Ctrl-C ends it.", err=True)
    if open_page:
        webbrowser.open(address)
