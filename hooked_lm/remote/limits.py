"""What a server accepts: sizes of the body, the trace, its results and its cost, checked before a job is queued."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hooked_lm._support.plain_data import PlainData
from hooked_lm._support.reading import parse_json
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.remote.protocol import RemoteError
from hooked_lm.sweep.wire import SWEEP_FORMAT, SWEEP_VERSION, SweepPart
from hooked_lm.tracing.estimate import TraceEstimate, estimate_runs
from hooked_lm.tracing.graph import Compute, Constant, Gradient, Graph, Weight
from hooked_lm.tracing.types import TensorType
from hooked_lm.tracing.wire import OPS_VERSION, VERSION

__all__ = ["Limits", "check_body", "check_cost", "check_graph", "check_part", "estimate_data", "scopes_of"]

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


@dataclass(frozen=True)
class Limits:
    """What a server accepts.

    Attributes:
        body: bytes of a request.
        json: bytes of the JSON in it.
        depth: levels of lists and objects in the JSON.
        nodes: of a trace.
        runs: of a trace.
        tokens: of all prompts of a trace, with the new ones of its generations.
        saved: bytes of all results of a trace.
        memory: bytes of the largest pass and of all values of a trace.
        flops: floating-point operations of a trace.
        queued: jobs of one user that wait.
        seconds: of a job, from its start.
        kept_seconds: how long a result is kept.
        kept_bytes: of all results that are kept; the oldest are dropped first.
    """

    body: int = 2**25
    json: int = 2**20
    depth: int = 32
    nodes: int = 10_000
    runs: int = 512
    tokens: int = 65_536
    saved: int = 2**26
    memory: int = 2**33
    flops: float = 1e16
    queued: int = 4
    seconds: float = 600.0
    kept_seconds: float = 3600.0
    kept_bytes: int = 2**32


def check_body(body: bytes, limits: Limits) -> PlainData:
    """Check the sizes and versions of a trace's bytes, before anything is built of them; return its JSON's content.

    Args:
        body: as `tracing.wire.to_bytes` or `sweep.wire.part_to_bytes` makes it.
        limits: the limits.

    Raises:
        RemoteError: 413 where the body is too large, 409 for a newer version, else 422.
    """
    if len(body) > limits.body:
        raise RemoteError(413, "limit", f"a trace of {len(body)} bytes: this server takes {limits.body}")
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or length > len(body) - 8:
        raise RemoteError(422, "trace", f"cut off: {len(body)} bytes, which begin with the length {length} of the JSON")
    if length > limits.json:
        raise RemoteError(422, "limit", f"a trace with {length} bytes of JSON: this server takes {limits.json}")
    text = body[8 : 8 + length]
    _check_depth(text, limits)
    try:
        document = parse_json(text.decode(), "the trace", finite=True)
    except ValueError as error:
        raise RemoteError(422, "trace", str(error)) from error
    if not isinstance(document, dict):
        raise RemoteError(422, "trace", "a trace begins with an object of JSON")
    sweeps = document.get("format") == SWEEP_FORMAT
    _check_version("sweeps" if sweeps else "traces", document.get("version"), SWEEP_VERSION if sweeps else VERSION)
    _check_version("operations", document.get("ops"), OPS_VERSION)
    for described in (document.get("cells"), document.get("always")):  # JSON in a string, of a sweep
        if isinstance(described, str):
            _check_depth(described.encode("utf-8", "surrogatepass"), limits)
    for name, most in (("nodes", limits.nodes), ("runs", limits.runs)):
        entries = document.get(name)
        if isinstance(entries, list):
            _check(name, len(entries), most)
    return document


def _check_version(what: str, version: object, newest: int) -> None:
    if isinstance(version, int) and version > newest:
        raise RemoteError(
            409,
            "version",
            f"the client writes version {version} of {what}, this server reads up to {newest}: update it",
        )


def _check_depth(text: bytes, limits: Limits) -> None:
    deepest = level = 0
    for bracket in _BRACKET.finditer(_STRING.sub(b"", text)):
        level += 1 if bracket[0] in b"[{" else -1
        deepest = max(deepest, level)
    if deepest > limits.depth:
        raise RemoteError(422, "limit", f"JSON nested {deepest} levels deep: this server takes {limits.depth}")


def _check(what: str, found: float, most: float, node: int | None = None) -> None:
    if found > most:
        raise RemoteError(422, "limit", f"{found:g} {what}: this server takes {most:g} in one trace", node)


def check_graph(graph: Graph, cfg: HookedTransformerConfig, limits: Limits) -> None:
    """Check a trace's size, the bytes that it saves and the cost of its operations.

    Args:
        graph: the trace.
        cfg: the model's config.
        limits: the limits.

    Raises:
        RemoteError: it is beyond a limit; with the node, where one alone is.
    """
    _check("runs", len(graph.runs), limits.runs)
    _check("nodes", len(graph.nodes), limits.nodes)
    decoded = (run.n_prompts * run.decoding.max_new_tokens for run in graph.runs if run.decoding is not None)
    _check("tokens", sum(sum(run.lengths) for run in graph.runs) + sum(decoded), limits.tokens)
    values = 0
    operations = 0.0
    for index, node in enumerate(graph.nodes):
        size = 0 if isinstance(node, Constant) else _bytes(node.type, cfg)
        values += size
        _check("bytes in one value", size, limits.memory, index)
        if isinstance(node, Compute):
            operations += _operations(graph, node)
            _check("operations", operations, limits.flops, index)
    _check("bytes of values", values, limits.memory)
    saved = 0
    for index in graph.saves.values():
        saved += _bytes(graph.nodes[index].type, cfg)
        _check("bytes of saved values", saved, limits.saved, index)


def check_part(part: SweepPart, cfg: HookedTransformerConfig, limits: Limits) -> TraceEstimate:
    """Check the size of a part of a sweep; return what it costs at most.

    Args:
        part: the part.
        cfg: the model's config.
        limits: the limits.

    Raises:
        RemoteError: it is beyond a limit.
    """
    batch, length = part.tokens.shape
    _check("cells", len(part.cells), limits.nodes)
    _check("tokens", part.tokens.numel(), limits.tokens)
    _check("bytes of scores", 8 * batch * len(part.cells), limits.saved)
    return TraceEstimate((estimate_runs("sweep", cfg, batch * (len(part.cells) + 1), length),))


def check_cost(estimate: TraceEstimate, limits: Limits) -> None:
    """Check what a trace's passes cost.

    Args:
        estimate: the passes.
        limits: the limits.

    Raises:
        RemoteError: it is beyond a limit.
    """
    _check("bytes of activations in one pass", estimate.memory, limits.memory)
    _check("floating-point operations", estimate.flops, limits.flops)


def _bytes(type: TensorType, cfg: HookedTransformerConfig) -> int:
    size = 8 if cfg.dtype == torch.float64 else 4
    return type.numel * {"float": size, "int": 8, "bool": 1}[type.kind]


def _operations(graph: Graph, node: Compute) -> float:
    """The multiplications of an operation; of a contraction, those of all its names together."""
    types = [graph.nodes[one].type for one in node.operands]
    if node.name == "einsum":
        names = str(node.params["equation"]).split("->")[0].split(",")
        sizes = {
            axis: size
            for part, one in zip(names, types, strict=True)
            for axis, size in zip(part.split(), one.shape, strict=True)
        }
        return float(math.prod(sizes.values()))
    if node.name == "matmul" and types[0].shape:
        return float(node.type.numel * types[0].shape[-1])
    return float(max([node.type.numel, *(one.numel for one in types)]))


def scopes_of(graph: Graph) -> set[str]:
    """Return the scopes that a trace needs: `"trace"`, and `"gradient"` and `"weight"` where it has such nodes.

    Args:
        graph: the trace.
    """

    def needed() -> Iterator[str]:
        yield "trace"
        for node in graph.nodes:
            if isinstance(node, Gradient):
                yield "gradient"
            elif isinstance(node, Weight):
                yield "weight"

    return set(needed())


def estimate_data(estimate: TraceEstimate) -> PlainData:
    """Return an estimate as plain data.

    Args:
        estimate: the passes.
    """
    passes = [vars(one) for one in estimate.passes]
    return {"passes": passes, "flops": estimate.flops, "memory": estimate.memory}
