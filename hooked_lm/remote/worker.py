"""The process that holds a model and runs traces: bytes come and go over a pipe, JSON and safetensors only."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from multiprocessing.connection import Connection

import torch
from safetensors.torch import save
from torch import Tensor

from hooked_lm._support.memory import is_out_of_memory
from hooked_lm._support.plain_data import PlainData
from hooked_lm.names import UnknownHookError
from hooked_lm.remote.group import Followers, Member, launched
from hooked_lm.remote.manifest import manifest_of
from hooked_lm.remote.protocol import RemoteError, packed, unpacked
from hooked_lm.remote.source import ModelSource
from hooked_lm.sweep.engine import run_part
from hooked_lm.sweep.wire import SWEEP_FORMAT
from hooked_lm.tracing.errors import TraceError
from hooked_lm.tracing.estimate import estimate_runs
from hooked_lm.tracing.executor import Watch, run_trace
from hooked_lm.tracing.graph import Graph
from hooked_lm.tracing.reading import from_bytes
from hooked_lm.tracing.target import Target
from hooked_lm.transformer import HookedTransformer

__all__ = ["Stopped", "introduce", "results_as_bytes", "run_job", "serve_requests"]

_BETWEEN_REPORTS = 0.1  # seconds


class Stopped(Exception):
    """A job that was cancelled, or ran too long."""


def serve_requests(connection: Connection, source: str) -> None:
    """Load a model, send its manifest, and answer requests until the connection is closed.

    Args:
        connection: a pipe's end.
        source: of the model, as JSON.
    """
    # A Ctrl-C reaches the whole group: the server decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    given = ModelSource(**json.loads(source))
    try:
        member = _first_of(given) if given.ranks > 1 else None
        model = given.load() if member is None else member.model
        manifest, rate, target = introduce(model)
    except (ValueError, OSError, RuntimeError) as error:
        connection.send_bytes(packed({"kind": "unloadable", "message": str(error)}))
        return
    connection.send_bytes(packed({"kind": "manifest", "manifest": manifest, "rate": rate}))
    while True:
        try:
            head, body = unpacked(connection.recv_bytes())
            if head["kind"] != "run":
                continue
            if member is not None:
                member.send(head, body)
            connection.send_bytes(_answer(model, target, connection, head, body, member))
        except (EOFError, BrokenPipeError):
            return


def _first_of(source: ModelSource) -> Member:
    """The first process of a group, the others of which `torch.distributed.run` has started or this one starts."""
    if launched() > 1:
        return Member(source, 0, None)
    followers = Followers(source)
    member = Member(source, 0, followers.store)
    member.followers = followers
    return member


def introduce(model: HookedTransformer) -> tuple[PlainData, float, Target]:
    """Return what is told of a model: its manifest, operations in a second, and what traces are read against.

    Args:
        model: the worker's, or this process's part of it.
    """
    return manifest_of(model), _rate(model), Target.of(model)


def _rate(model: HookedTransformer) -> float:
    """Floating-point operations in a second, of a short prompt: a first guess for plans."""
    length = min(32, model.cfg.n_ctx)
    tokens = torch.zeros(1, length, dtype=torch.long)
    with torch.no_grad():
        model(tokens, attention_mask=torch.ones_like(tokens))
        begun = time.perf_counter()
        model(tokens, attention_mask=torch.ones_like(tokens)).sum().item()
    return estimate_runs("pass", model.cfg, 1, length).flops / (time.perf_counter() - begun)


def run_job(
    model: HookedTransformer, target: Target, head: PlainData, body: bytes, watch: Watch
) -> tuple[list[PlainData], bytes]:
    """Run a trace or a part of a sweep; return warnings and result.

    Args:
        model: the worker's.
        target: what traces are read against.
        head: of the job: its format, and whether several runs go into one pass.
        body: its bytes.
        watch: as for `run_trace`.

    Raises:
        TraceError, ValueError, UnknownHookError: it does not fit the model.
        Stopped: by the watch.
    """
    if head["format"] == SWEEP_FORMAT:
        return [], run_part(model, body)
    graph = from_bytes(body, target)
    # Lines are the client's to know: errors name the node instead.
    graph.lines = {index: str(index) for index in range(len(graph.nodes))}
    results = run_trace(model, graph, target, together=head["together"], watch=watch)
    return _warnings(graph, results), results_as_bytes(results)


def _answer(
    model: HookedTransformer,
    target: Target,
    connection: Connection,
    head: PlainData,
    body: bytes,
    member: Member | None,
) -> bytes:
    """Run one job, and return the message that ends it."""
    _reset_peak(model)
    try:
        watch = _watcher(connection, head["job"], time.monotonic() + head["seconds"], member)
        warned, result = run_job(model, target, head, body, watch)
        return packed({"kind": "done", "warnings": warned}, result)
    except Stopped as stop:
        status, kind = (504, "time") if str(stop) else (409, "cancelled")
        failure = RemoteError(status, kind, str(stop) or "the job was cancelled")
    except TraceError as error:
        node = int(error.line) if error.line is not None and error.line.isdecimal() else error.node
        failure = RemoteError(422, "trace", error.reason, node)
    except (ValueError, UnknownHookError) as error:
        failure = RemoteError(422, "sweep", str(error))
    except (MemoryError, RuntimeError) as error:
        failure = _fault(error, model, head["memory"])
        if member is not None:
            _leave(connection, failure)
    return packed({"kind": "failed", "failure": failure.as_data()})


def _leave(connection: Connection, failure: RemoteError) -> None:
    """End a process whose group has come apart: the group is started again.

    A want of memory is told before; else another process is lost, and the job is run again.
    """
    if failure.kind == "memory":
        connection.send_bytes(packed({"kind": "failed", "failure": failure.as_data()}))
    os.kill(os.getpid(), signal.SIGKILL)


def _fault(error: Exception, model: HookedTransformer, planned: int) -> RemoteError:
    if not is_out_of_memory(error):
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


def _watcher(connection: Connection, job: str, deadline: float, member: Member | None) -> Watch:
    """Return what reports progress, and raises where the job was cancelled or runs too long."""
    reported = {"at": 0.0, "number": -1.0}

    def watch(number: int, layer: int) -> None:
        cancelled = False
        while connection.poll():
            head, _ = unpacked(connection.recv_bytes())
            cancelled = cancelled or head == {"kind": "cancel", "job": job}
        now = time.monotonic()
        if member is not None:
            member.agreed(cancelled or now > deadline)
        if cancelled:
            raise Stopped("")
        if now > deadline:
            raise Stopped(f"the job ran longer than this server allows; it had come to pass {number + 1} layer {layer}")
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
