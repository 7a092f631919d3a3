"""The process that holds a model and runs traces: bytes come and go over a pipe, JSON and safetensors only."""

from __future__ import annotations

import json
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from safetensors.torch import save
from torch import Tensor

from hooked_lm._support.plain_data import PlainData
from hooked_lm.names import UnknownHookError
from hooked_lm.remote.manifest import manifest_of
from hooked_lm.remote.protocol import RemoteError, packed, unpacked
from hooked_lm.sweep.engine import run_part
from hooked_lm.sweep.wire import SWEEP_FORMAT
from hooked_lm.tracing.errors import TraceError
from hooked_lm.tracing.estimate import estimate_runs
from hooked_lm.tracing.executor import run_trace
from hooked_lm.tracing.graph import Graph
from hooked_lm.tracing.reading import from_bytes
from hooked_lm.tracing.target import Target
from hooked_lm.transformer import HookedTransformer

__all__ = ["ModelSource", "results_as_bytes", "serve_requests"]

_BETWEEN_REPORTS = 0.1  # seconds


@dataclass(frozen=True)
class ModelSource:
    """Which model a worker loads.

    Attributes:
        name: as for `from_pretrained`.
        revision: branch, tag or commit on the hub.
        device: where it runs.
        dtype: `"float64"`; None for that of the checkpoint.
        processing: make the processing steps of `from_pretrained`.
    """

    name: str
    revision: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    processing: bool = True

    def load(self) -> HookedTransformer:
        """Return the model."""
        build = HookedTransformer.from_pretrained
        if not self.processing:
            build = HookedTransformer.from_pretrained_no_processing
        return build(self.name, revision=self.revision, device=self.device, dtype=self.dtype)


class _Stopped(Exception):
    """A job that was cancelled, or ran too long."""


def serve_requests(connection: Connection, source: str) -> None:
    """Load a model, send its manifest, and answer requests until the connection is closed.

    Args:
        connection: a pipe's end.
        source: of the model, as JSON.
    """
    # A Ctrl-C reaches the whole group: the server decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        model = ModelSource(**json.loads(source)).load()
        manifest = manifest_of(model)
    except (ValueError, OSError, RuntimeError) as error:
        connection.send_bytes(packed({"kind": "unloadable", "message": str(error)}))
        return
    connection.send_bytes(packed({"kind": "manifest", "manifest": manifest, "rate": _rate(model)}))
    target = Target.of(model)
    while True:
        try:
            head, body = unpacked(connection.recv_bytes())
            if head["kind"] == "run":
                connection.send_bytes(_answer(model, target, connection, head, body))
        except (EOFError, BrokenPipeError):
            return


def _rate(model: HookedTransformer) -> float:
    """Floating-point operations in a second, of a short prompt: a first guess for plans."""
    length = min(32, model.cfg.n_ctx)
    tokens = torch.zeros(1, length, dtype=torch.long)
    with torch.no_grad():
        model(tokens, attention_mask=torch.ones_like(tokens))
        begun = time.perf_counter()
        model(tokens, attention_mask=torch.ones_like(tokens)).sum().item()
    return estimate_runs("pass", model.cfg, 1, length).flops / (time.perf_counter() - begun)


def _answer(model: HookedTransformer, target: Target, connection: Connection, head: PlainData, body: bytes) -> bytes:
    """Run one job, and return the message that ends it."""
    _reset_peak(model)
    try:
        watch = _watcher(connection, head["job"], time.monotonic() + head["seconds"])
        if head["format"] == SWEEP_FORMAT:
            return packed({"kind": "done", "warnings": []}, run_part(model, body))
        graph = from_bytes(body, target)
        # Lines are the client's to know: errors name the node instead.
        graph.lines = {index: str(index) for index in range(len(graph.nodes))}
        results = run_trace(model, graph, target, together=head["together"], watch=watch)
        return packed({"kind": "done", "warnings": _warnings(graph, results)}, results_as_bytes(results))
    except _Stopped as stop:
        status, kind = (504, "time") if str(stop) else (409, "cancelled")
        failure = RemoteError(status, kind, str(stop) or "the job was cancelled")
    except TraceError as error:
        node = int(error.line) if error.line is not None and error.line.isdecimal() else error.node
        failure = RemoteError(422, "trace", error.reason, node)
    except (ValueError, UnknownHookError) as error:
        failure = RemoteError(422, "sweep", str(error))
    except (MemoryError, RuntimeError) as error:
        failure = _fault(error, model, head["memory"])
    return packed({"kind": "failed", "failure": failure.as_data()})


def _fault(error: Exception, model: HookedTransformer, planned: int) -> RemoteError:
    short = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
    if not short:
        return RemoteError(500, "failed", f"the run failed: {error}")
    return RemoteError(
        507,
        "memory",
        f"memory ran out: {planned / 2**20:.4g} MiB were planned for this trace, and the worker's peak was "
        f"{_peak(model) / 2**20:.4g} MiB; use fewer or shorter prompts, or save less",
    )


def _reset_peak(model: HookedTransformer) -> None:
    if model.embed.W_E.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.embed.W_E.device)


def _peak(model: HookedTransformer) -> int:
    """The most memory that was in use: of the device, or of the process on a CPU."""
    device = model.embed.W_E.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _watcher(connection: Connection, job: str, deadline: float) -> Callable[[int, int], None]:
    """Return what reports progress, and raises where the job was cancelled or runs too long."""
    reported = {"at": 0.0, "number": -1.0}

    def watch(number: int, layer: int) -> None:
        while connection.poll():
            head, _ = unpacked(connection.recv_bytes())
            if head == {"kind": "cancel", "job": job}:
                raise _Stopped("")
        now = time.monotonic()
        if now > deadline:
            raise _Stopped(
                f"the job ran longer than this server allows; it had come to pass {number + 1} layer {layer}"
            )
        if number != reported["number"] or now - reported["at"] > _BETWEEN_REPORTS:
            connection.send_bytes(packed({"kind": "progress", "pass": number + 1, "layer": layer}))
            reported.update(at=now, number=number)

    return watch


def results_as_bytes(results: dict[str, Tensor]) -> bytes:
    """Return a trace's results as safetensors: numbered tensors, and their names as metadata.

    Args:
        results: name -> tensor.
    """
    # Clones, because the format refuses tensors that share memory; numbers, because a name of its own is reserved.
    numbered = {str(at): one.detach().cpu().contiguous().clone() for at, one in enumerate(results.values())}
    return save(numbered, {"names": json.dumps(list(results))})


def _warnings(graph: Graph, results: dict[str, Tensor]) -> list[PlainData]:
    found = []
    for name, one in results.items():
        count = int(one.isnan().sum()) if one.is_floating_point() else 0
        if count:
            message = f"{count} of the {one.numel()} entries of {name!r} are NaN"
            found.append({"message": message, "node": graph.saves[name]})
    return found
