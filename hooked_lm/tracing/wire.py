"""Traces as bytes: a length, canonical JSON, and the constants as safetensors.

The layout is `u64 length of the JSON, little-endian | JSON | safetensors`. The JSON has sorted keys, no spaces and
finite numbers only. A reader refuses every key, version, operation and site that it does not know before anything runs:
each node is recorded anew, by the rules that check a trace as it is written. See docs/formats.md.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hooked_lm._support.files import write_whole
from hooked_lm._support.reading import parse_json, readable
from hooked_lm._support.versions import check_version
from hooked_lm.names import UnknownHookError
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
from hooked_lm.tracing.rebuilding import Rebuilding
from hooked_lm.tracing.target import Target

__all__ = ["content_hash", "from_bytes", "load_graph", "save_graph", "to_bytes"]

_FORMAT, _VERSION, _OPS = "hooked_lm trace", 1, 1
_LONGEST_JSON = 2**20 * 16


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
        return _described(node, plain)

    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "ops": _OPS,
        "runs": [_run(run) for run in made.runs],
        "nodes": [described(index, node) for index, node in enumerate(made.nodes)],
        "saves": made.saves,
    }
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    return len(text).to_bytes(8, "little") + text + save(dict(sorted(tensors.items())))


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


def _described(node: Node, plain: Callable[[object], object]) -> dict[str, object]:
    if isinstance(node, (Read, Write)):
        select = {name: list(one) if isinstance(one, tuple) else one for name, one in node.select.chosen().items()}
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


def from_bytes(content: bytes, target: Target) -> Graph:
    """Return a trace from its bytes, checked against a model.

    Args:
        content: as `to_bytes` makes them.
        target: what is known of the model.

    Raises:
        TraceError: anything else, or a trace that does not fit the model.
    """
    if len(content) < 8:
        raise TraceError(f"a trace begins with the length of its JSON, 8 bytes; there are {len(content)}")
    length = int.from_bytes(content[:8], "little")
    if length > min(_LONGEST_JSON, len(content) - 8):
        raise TraceError(f"a trace of {len(content)} bytes says that {length} of them are JSON")
    try:
        text = content[8 : 8 + length].decode()
        document = parse_json(text, "the trace", TraceError, finite=True)
        tensors = load(content[8 + length :])
    except UnicodeDecodeError as error:
        raise TraceError(f"the trace is not text in UTF-8: {error}") from error
    except (SafetensorError, ValueError, KeyError, OverflowError, RuntimeError, TypeError) as error:
        raise error if isinstance(error, TraceError) else TraceError(f"the trace's tensors: {error}") from error
    for name, tensor in tensors.items():
        if tensor_hash(tensor) != name:
            raise TraceError(f"the tensor {name[:12]!r} is not the one that the trace was made with")
    return _graph(document, tensors, target)


def _graph(document: object, tensors: Mapping[str, Tensor], target: Target) -> Graph:
    keys = {"format", "version", "ops", "runs", "nodes", "saves"}
    if not isinstance(document, dict) or set(document) != keys or document["format"] != _FORMAT:
        raise TraceError(f"this is not a {_FORMAT}: it has the keys {', '.join(sorted(keys))}")
    try:
        check_version("the trace", document["version"], _VERSION)
        check_version("the trace's table of operations", document["ops"], _OPS)
    except ValueError as error:
        raise TraceError(str(error)) from error
    if not all(isinstance(document[name], kind) for name, kind in (("runs", list), ("nodes", list), ("saves", dict))):
        raise TraceError("the runs and nodes of a trace are lists, its saves an object")
    rebuilding = Rebuilding(target, tensors)
    for run in document["runs"]:
        rebuilding.add_run(run)
    for index, node in enumerate(document["nodes"]):
        try:
            rebuilding.add_node(node)
        except (ValueError, UnknownHookError) as error:
            raise TraceError(f"node {index} of the trace: {error}") from error
    return rebuilding.finished(document["saves"])


def save_graph(path: str | Path, graph: Graph, target: Target) -> None:
    """Write a trace to a file.

    Args:
        path: of the file; its name ends in `.trace`.
        graph: the trace.
        target: what is known of the model.
    """
    content = to_bytes(graph, target)
    write_whole(Path(path), lambda unfinished: Path(unfinished).write_bytes(content))


def load_graph(path: str | Path, target: Target) -> Graph:
    """Return the trace of a file.

    Args:
        path: of the file.
        target: what is known of the model.

    Raises:
        TraceError: there is no such file, or no trace in it that fits the model.
    """
    with readable(path, TraceError):
        content = Path(path).read_bytes()
    return from_bytes(content, target)
