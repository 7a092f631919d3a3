"""The client: models on a server, whose traces are recorded here and run there."""

from __future__ import annotations

import json
import time
import uuid
import warnings
from types import SimpleNamespace
from typing import cast
from urllib.parse import quote

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm._support.plain_data import PlainData
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.remote.manifest import target_of, tokenizer_of
from hooked_lm.remote.protocol import RemoteError, read_error
from hooked_lm.remote.transport import Disconnected, Transport
from hooked_lm.tokenization import Tokenizer
from hooked_lm.tokenization.inputs import InputReading
from hooked_lm.tracing.canonical import canonical
from hooked_lm.tracing.errors import TraceError
from hooked_lm.tracing.graph import Graph
from hooked_lm.tracing.planner import plan_trace
from hooked_lm.tracing.trace import Trace
from hooked_lm.tracing.wire import to_bytes

__all__ = ["RemoteModel", "RemoteServer", "connect"]

_POLL = 0.5  # seconds between two questions, where streams of events do not come through
_FRUITLESS = 3  # streams in a row without an event, after which the client asks instead


def connect(url: str, token: str | None = None, *, timeout: float = 30.0, patience: float = 120.0) -> RemoteServer:
    """Return a server that runs traces: one of `hooked-lm serve`.

    Args:
        url: of the server, `"https://host"`.
        token: the bearer token; None where none is needed.
        timeout: seconds without a sign of life after which a connection counts as lost.
        patience: seconds that a server may be away before that is an error.

    Raises:
        ValueError: that is no address.
        RemoteError: the server refuses the token.
        ConnectionError: it is not reached.
    """
    server = RemoteServer(Transport(url, token, timeout, patience))
    server.models()
    return server


class RemoteServer:
    """A server. `connect` makes one.

    Args:
        transport: how to reach it.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def __repr__(self) -> str:
        return f"RemoteServer({self._transport.url!r})"

    def models(self) -> list[str]:
        """Return the names of the server's models."""
        return [str(one["name"]) for one in self._transport.ask("GET", "/v1/models")["models"]]

    def model(self, name: str) -> RemoteModel:
        """Return a model of the server: its names, shapes and tokenizer, without weights.

        Args:
            name: of the model.

        Raises:
            RemoteError: there is none of this name; the message lists the names.
        """
        path = f"/v1/models/{quote(name, safe='')}"
        return RemoteModel(name, self._transport.ask("GET", path), self._transport)


class RemoteModel:
    """A model on a server.

    Args:
        name: of the model.
        manifest: what the server says of it.
        transport: how to reach the server.

    Attributes:
        name: of the model.
        manifest: what the server says of it: config, axes of the activations, shapes and SHA-256 of the weights,
            limits.
        cfg: its config.
        tokenizer: its tokenizer; None if it has none.
    """

    def __init__(self, name: str, manifest: PlainData, transport: Transport) -> None:
        self.name, self.manifest, self._transport = name, manifest, transport
        self.cfg = HookedTransformerConfig.from_dict(manifest["config"])
        self._texts = _Texts(self.cfg, tokenizer_of(manifest))
        self._target = target_of(manifest, self.cfg, self._texts.read)

    def __repr__(self) -> str:
        return f"RemoteModel({self.name!r} at {self._transport.url!r})"

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, as the server has it."""
        return self._texts.tokenizer

    @property
    def hook_names(self) -> list[str]:
        """The full names of the hook points, in the order in which they run."""
        return list(self._target.axes)

    def to_tokens(self, text: str | list[str], prepend_bos: bool | None = None) -> Tensor:
        """Return the tokens of texts, [batch pos].

        Args:
            text: a text, or several.
            prepend_bos: put BOS in front; by default as the model does.
        """
        return self._texts.to_tokens(text, prepend_bos)

    def trace(self, *, together: bool = True, run: bool = True, verbose: bool = True) -> Trace:
        """Return a trace to record an experiment in. It runs on the server when the `with` block ends.

        Args:
            together: make several runs in one pass of the model.
            run: False only records; `t.run()` runs it.
            verbose: show a progress bar.
        """
        can_sweep = bool(self.manifest["can_sweep"])

        def execute(graph: Graph) -> dict[str, Tensor]:
            return self._run(graph, together, verbose)

        trace = Trace(
            self._target,
            execute,
            lambda graph: plan_trace(graph, self._target, together=together, can_sweep=lambda: can_sweep),
        )
        trace.runs_at_exit = run
        return trace

    def check(self, trace: Trace) -> PlainData:
        """Return what the server says a trace will cost: passes, operations, bytes and seconds. Nothing is queued.

        Args:
            trace: of this model.

        Raises:
            TraceError: the server would refuse it; the error names the line.
        """
        body = to_bytes(trace.graph, self._target)
        try:
            return self._transport.ask("POST", f"{self._path}/check", body)
        except RemoteError as error:
            raise _at_its_line(error, canonical(trace.graph, self._target)) from error

    def run_body(self, body: bytes, *, together: bool = True, verbose: bool = False) -> tuple[bytes, list[PlainData]]:
        """Run bytes on the server; return the answer and its warnings.

        Args:
            body: of a trace or a part of a sweep.
            together: make several runs in one pass of the model.
            verbose: show a progress bar.

        Raises:
            RemoteError: the server refused it, or it failed there.
            ConnectionError: the server is not reached.
        """
        job = _Job(self._transport, self._path, body, together)
        try:
            warned = job.wait(self.name, verbose)
            return job.result(), warned
        except KeyboardInterrupt:
            job.cancel()
            raise

    @property
    def _path(self) -> str:
        return f"/v1/models/{quote(self.name, safe='')}"

    def _run(self, graph: Graph, together: bool, verbose: bool) -> dict[str, Tensor]:
        body = to_bytes(graph, self._target)
        try:
            content, warned = self.run_body(body, together=together, verbose=verbose)
        except RemoteError as error:
            raise _at_its_line(error, canonical(graph, self._target)) from error
        if warned:
            lines = canonical(graph, self._target).lines
            for one in warned:
                line = lines.get(one["node"])
                place = "" if line is None else f" (recorded at {line})"
                warnings.warn(f"{one['message']}{place}", stacklevel=4)
        found = read_results(content)
        return {name: found[name] for name in graph.saves}


def read_results(content: bytes) -> dict[str, Tensor]:
    """Return the tensors of a result by name.

    Args:
        content: as the server sends it.

    Raises:
        ValueError: it is something else.
    """
    length = int.from_bytes(content[:8], "little")
    try:
        names = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["names"])
        tensors = load(content)
        return {str(name): tensors[str(at)] for at, name in enumerate(names)}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the server's result is not one that this version reads: {error}") from error


def _at_its_line(error: RemoteError, made: Graph) -> Exception:
    """The error of a trace, at the line that recorded the node at fault; any other as it is."""
    if error.kind not in ("trace", "limit", "scope") or error.status not in (422, 403):
        return error
    if error.kind == "scope":
        return error
    return TraceError(error.reason, None if error.node is None else made.lines.get(error.node))


class _Texts(InputReading):
    """Reads prompts as the model would, without its weights."""

    def __init__(self, cfg: HookedTransformerConfig, tokenizer: Tokenizer | None) -> None:
        super().__init__()
        self.cfg = cfg
        # Where the tokens go, and nothing else of an embedding.
        object.__setattr__(self, "embed", SimpleNamespace(W_E=torch.empty(0, dtype=cfg.dtype)))
        if tokenizer is not None:
            settings = cfg.default_prepend_bos, cfg.default_padding_side
            self.set_tokenizer(tokenizer)
            cfg.default_prepend_bos, cfg.default_padding_side = settings

    def read(self, prompts: object, prepend_bos: bool | None, attention_mask: object) -> list[list[int]]:
        """Return the tokens of each prompt, without padding."""
        given = cast(Tensor | None, attention_mask)
        tokens, mask = self.tokens_and_mask(prompts, given, prepend_bos)  # type: ignore[arg-type]
        if mask is None:
            return tokens.tolist()
        return [row[keep.bool()].tolist() for row, keep in zip(tokens, mask, strict=True)]


class _Job:
    """A trace that has been sent: what happens to it, and its result."""

    def __init__(self, transport: Transport, model: str, body: bytes, together: bool) -> None:
        self._transport, self._body = transport, body
        # The same word whenever this request is sent again, so that the server never runs it twice.
        options = f"attempt={uuid.uuid4().hex}&together={int(together)}"
        self._where = f"{model}/jobs?{options}"
        self._id = self._send()
        self._last = 0

    def _send(self) -> str:
        return str(self._transport.ask("POST", self._where, self._body)["job"])

    @property
    def _path(self) -> str:
        return f"/v1/jobs/{self._id}"

    def cancel(self) -> None:
        """Tell the server to stop it."""
        self._transport.ask("DELETE", self._path)

    def result(self) -> bytes:
        """Return the result, once the job is done."""
        return self._transport.fetch(f"{self._path}/result")

    def wait(self, name: str, verbose: bool) -> list[PlainData]:
        """Wait until the job is done; return its warnings.

        Raises:
            RemoteError: it failed.
            ConnectionError: the server is away for too long.
        """
        fruitless, away_since = 0, None
        with tqdm(disable=not verbose, leave=False, desc=name, bar_format="{desc} |{bar}| {elapsed}") as bar:
            while True:
                try:
                    before = self._last
                    ended = self._follow(bar) if fruitless < _FRUITLESS else self._asked(bar)
                    if ended is not None:
                        return ended
                    fruitless = 0 if self._last > before else fruitless + 1
                    away_since = None
                except Disconnected as error:
                    fruitless += self._last == before
                    away_since = time.monotonic() if away_since is None or self._last > before else away_since
                    if time.monotonic() - away_since > self._transport.patience:
                        raise ConnectionError(f"{self._transport.url} is not reached: {error}") from error
                    time.sleep(0.1)
                except RemoteError as error:
                    if error.kind != "unknown job":
                        raise
                    # The server was started anew: it has not heard of the job.
                    self._id, self._last = self._send(), 0

    def _follow(self, bar: tqdm[None]) -> list[PlainData] | None:
        """Follow a stream of events to its end; None if the job has not ended by then."""
        for number, kind, data in self._transport.events(f"{self._path}/events", self._last):
            self._last = number
            ended = self._heard(kind, data, bar)
            if ended is not None:
                return ended
        return None

    def _asked(self, bar: tqdm[None]) -> list[PlainData] | None:
        """Ask how the job is."""
        time.sleep(_POLL)
        data = self._transport.ask("GET", self._path)
        return self._heard(data["state"], data, bar)

    @staticmethod
    def _heard(kind: str, data: PlainData, bar: tqdm[None]) -> list[PlainData] | None:
        """Show an event; return the warnings where it is the last one."""
        if kind in ("failed", "cancelled"):
            raise read_error(data["error"], 500)
        if kind == "done":
            warned: list[PlainData] = data["warnings"]
            return warned
        if kind == "queued":
            bar.set_description(f"queued, {data['position']}")
        elif kind == "running":
            bar.total = data["passes"] * max(data["layers"], 1)
            bar.n = (data["pass"] - 1) * max(data["layers"], 1) + data["layer"]
            bar.set_description(f"pass {data['pass']}/{data['passes']}, layer {data['layer']}/{data['layers']}")
        return None
