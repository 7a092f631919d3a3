"""Traces as bytes: a length, canonical JSON, and the constants as safetensors.

The layout is `u64 length of the JSON, little-endian | JSON | safetensors`. The JSON has sorted keys, no spaces and
finite numbers only. `tracing.reading` reads them. See docs/formats.md.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from hooked_lm._support.files import write_whole
from hooked_lm._support.framing import framed
from hooked_lm.tracing.canonical import canonical, tensor_hash
from hooked_lm.tracing.errors import TraceError
from hooked_lm.tracing.graph import (
    Apply,
    Compute,
    Constant,
    Generated,
    Gradient,
    Graph,
    Node,
    Read,
    RunSpec,
    Score,
    Weight,
    Write,
)
from hooked_lm.tracing.target import Target

__all__ = ["FORMAT", "OPS_VERSION", "VERSION", "content_hash", "save_graph", "to_bytes"]

FORMAT, VERSION, OPS_VERSION = "hooked_lm trace", 1, 1


def to_bytes(graph: Graph, target: Target) -> bytes:
    """Return a trace as bytes: equal bytes for two traces that differ in the order of their lines only.

    Args:
        graph: the trace.
        target: what is known of the model.

    Raises:
        TraceError: it has a metric that is no function of its name and arguments.
    """
    made = canonical(graph, target)
    tensors: dict[str, Tensor] = {}

    def named(tensor: Tensor) -> dict[str, object]:
        name = tensor_hash(tensor)
        tensors[name] = tensor.detach().cpu().contiguous()
        return {"tensor": name}

    def plain(value: object) -> object:
        if isinstance(value, Tensor):
            return named(value)
        if isinstance(value, float) and not math.isfinite(value):
            return {"number": str(value)}
        return value

    def described(index: int, node: Node) -> dict[str, object]:
        if isinstance(node, Score):
            if node.metric.maker is None:
                raise TraceError(
                    f"the metric {node.metric.name!r} is a function of this process: use one of hooked_lm.metrics, or "
                    "give its maker's name and arguments",
                    made.lines.get(index),
                )
            arguments = {name: plain(value) for name, value in node.metric.arguments.items()}
            return {"kind": "score", "metric": node.metric.maker, "arguments": arguments, "logits": node.logits}
        return _described(node, made.runs, plain)

    document = {
        "format": FORMAT,
        "version": VERSION,
        "ops": OPS_VERSION,
        "runs": [_run(run) for run in made.runs],
        "nodes": [described(index, node) for index, node in enumerate(made.nodes)],
        "saves": made.saves,
    }
    return framed(document, tensors)


def _run(run: RunSpec) -> dict[str, object]:
    tokens = [list(row) for row in run.tokens]
    return {"tokens": tokens} if run.decoding is None else {"tokens": tokens, "decoding": asdict(run.decoding)}


def content_hash(graph: Graph, target: Target) -> str:
    """Return the SHA-256 of a trace's bytes, which names the experiment.

    Args:
        graph: the trace.
        target: what is known of the model.
    """
    return hashlib.sha256(to_bytes(graph, target)).hexdigest()


def _described(node: Node, runs: Sequence[RunSpec], plain: Callable[[object], object]) -> dict[str, object]:
    if isinstance(node, (Read, Write)):
        select = {name: list(one) if isinstance(one, tuple) else one for name, one in node.select.chosen().items()}
        if "pos" in select and runs[node.run].steps(node.select.step) != [0]:
            # A step after the first has one position, which is not that of the prompt's beginning.
            select["pos"] = [-1] if isinstance(select["pos"], list) else -1
        where = {"run": node.run, "site": node.site, "select": select}
        if isinstance(node, Read):
            return {"kind": "read", **where, "version": node.version}
        return {"kind": "write", **where, "ordinal": node.ordinal, "how": node.how, "value": node.value}
    if isinstance(node, Compute):
        params = {name: plain(value) for name, value in node.params.items()}
        return {"kind": "op", "name": node.name, "operands": list(node.operands), "params": params}
    if isinstance(node, Constant):
        return {"kind": "constant", "value": plain(node.value)}
    if isinstance(node, Apply):
        return {"kind": "apply", "piece": node.piece, "operand": node.operand}
    if isinstance(node, Weight):
        return {"kind": "weight", "name": node.name}
    if isinstance(node, Generated):
        return {"kind": "generated", "run": node.run}
    assert isinstance(node, Gradient)
    return {"kind": "gradient", "scalar": node.scalar, "of": node.of}


def save_graph(path: str | Path, graph: Graph, target: Target) -> None:
    """Write a trace to a file.

    Args:
        path: of the file; its name ends in `.trace`.
        graph: the trace.
        target: what is known of the model.
    """
    content = to_bytes(graph, target)
    write_whole(Path(path), lambda unfinished: Path(unfinished).write_bytes(content))
