"""Read traces from bytes that somebody else may have made.

A reader refuses every key, version, operation and site that it does not know before anything runs: each node is
recorded anew, by the rules that check a trace as it is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields as fields_of
from pathlib import Path
from typing import NoReturn, TypeGuard

from torch import Tensor

from hooked_lm._support.framing import unframed
from hooked_lm._support.plain_data import PlainData
from hooked_lm._support.reading import readable
from hooked_lm._support.versions import check_version
from hooked_lm.generation.decoding import Sampling
from hooked_lm.metrics import get_metric
from hooked_lm.names import UnknownHookError
from hooked_lm.tracing.canonical import tensor_hash
from hooked_lm.tracing.errors import TraceError
from hooked_lm.tracing.graph import Decoding, Graph, Read, RunSpec, Select
from hooked_lm.tracing.runs import Run, Site
from hooked_lm.tracing.target import Target
from hooked_lm.tracing.trace import Trace
from hooked_lm.tracing.values import Value
from hooked_lm.tracing.wire import FORMAT, OPS_VERSION, VERSION

__all__ = ["from_bytes", "load_graph"]

_WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def from_bytes(content: bytes, target: Target) -> Graph:
    """Return a trace from its bytes, checked against a model.

    Args:
        content: as `to_bytes` makes them.
        target: what is known of the model.

    Raises:
        TraceError: anything else, or a trace that does not fit the model.
    """
    document, tensors = unframed(content, "trace", TraceError)
    for name, tensor in tensors.items():
        if tensor_hash(tensor) != name:
            raise TraceError(f"the tensor {name[:12]!r} is not the one that the trace was made with")
    return _graph(document, tensors, target)


def _graph(document: object, tensors: Mapping[str, Tensor], target: Target) -> Graph:
    keys = {"format", "version", "ops", "runs", "nodes", "saves"}
    if not isinstance(document, dict) or set(document) != keys or document["format"] != FORMAT:
        raise TraceError(f"this is not a {FORMAT}: it has the keys {', '.join(sorted(keys))}")
    try:
        check_version("the trace", document["version"], VERSION)
        check_version("the trace's table of operations", document["ops"], OPS_VERSION)
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
            raise TraceError(f"node {index} of the trace: {_reason(error)}", node=index) from error
    return rebuilding.finished(document["saves"])


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


class Rebuilding:
    """A trace that is recorded anew, part by part.

    Args:
        target: what is known of the model.
        tensors: name -> constant.
    """

    def __init__(self, target: Target, tensors: Mapping[str, Tensor]) -> None:
        self.trace, self.tensors = Trace(target, _never, _never), tensors
        self.runs: list[Run] = []
        self.values: list[Value | None] = []  # None for a write
        self.used: set[str] = set()

    def add_run(self, entry: object) -> None:
        """Add a run.

        Args:
            entry: its description.

        Raises:
            TraceError: it is none.
        """
        generates = isinstance(entry, dict) and "decoding" in entry
        fields = _with_keys(entry, {"tokens", "decoding"} if generates else {"tokens"})
        tokens = fields["tokens"]
        rows = tokens if isinstance(tokens, list) else []
        if not rows or not all(isinstance(row, list) and all(_is_index(one) for one in row) for row in rows):
            raise TraceError("the tokens of a run are lists of integers, one for each prompt")
        decoding = _decoding(fields["decoding"]) if generates else None
        self.runs.append(self.trace.run_of(RunSpec(tuple(tuple(row) for row in rows), decoding)))

    def add_node(self, entry: object) -> None:
        """Add a node, which refers to earlier ones.

        Args:
            entry: its description.

        Raises:
            TraceError: it is none, or does not fit.
        """
        kinds: dict[object, tuple[set[str], Callable[[PlainData], Value | None]]] = {
            "read": ({"run", "site", "select", "version"}, self._read),
            "write": ({"run", "site", "select", "ordinal", "how", "value"}, self._write),
            "op": ({"name", "operands", "params"}, self._op),
            "constant": ({"value"}, self._constant),
            "apply": ({"piece", "operand"}, self._apply),
            "weight": ({"name"}, self._weight),
            "score": ({"metric", "arguments", "logits"}, self._score),
            "gradient": ({"scalar", "of"}, self._gradient),
            "generated": ({"run"}, self._generated),
        }
        kind = entry.get("kind") if isinstance(entry, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise TraceError(f"{kind!r} is no kind of node; there are {', '.join(map(str, kinds))}")
        keys, build = kinds[kind]
        fields = _with_keys(entry, keys | {"kind"})
        value = build(fields)
        if value is not None and value.node != len(self.values):
            raise TraceError("a trace has every node once")
        self.values.append(value)

    def finished(self, saves: PlainData) -> Graph:
        """Return the graph.

        Args:
            saves: name -> node.

        Raises:
            TraceError: a save, a version or an edit's number that does not fit, or a tensor that nothing uses.
        """
        for name, index in saves.items():
            self.trace.save_node(self._value(index).node, name)
        unused = set(self.tensors) - self.used
        if unused:
            raise TraceError(f"{len(unused)} tensors of the trace are used by no node")
        return self.trace.graph

    # Nodes

    def _read(self, fields: PlainData) -> Value:
        site = self._site(fields, "version")
        _ = site.node  # records the read
        return site

    def _write(self, fields: PlainData) -> None:
        value = fields["value"]
        self._site(fields, "ordinal").write(fields["how"], None if value is None else self._value(value))

    def _generated(self, fields: PlainData) -> Value:
        return self._run(fields["run"]).generated

    def _run(self, index: object) -> Run:
        if not _is_index(index) or index >= len(self.runs):
            raise TraceError(f"there is no run {index!r}")
        return self.runs[index]

    def _site(self, fields: PlainData, numbered: str) -> Site:
        run, name, select = self._run(fields["run"]), fields["site"], fields["select"]
        if not isinstance(name, str) or name not in self.trace.target.axes:
            raise TraceError(f"the model has no site {name!r}")
        if not isinstance(select, dict) or not set(select) <= set(Select.__dataclass_fields__):
            raise TraceError(f"a selection has the fields {', '.join(Select.__dataclass_fields__)}, got {select!r}")
        if not _is_index(fields[numbered]) or fields[numbered] != run.n_writes.get(name, 0):
            before = run.n_writes.get(name, 0)
            raise TraceError(f"{numbered} {fields[numbered]!r} at {name!r}: the nodes before have {before} edits there")
        return Site(run, name, Select(), fields[numbered]).at(**select)

    def _op(self, fields: PlainData) -> Value:
        operands, params = fields["operands"], fields["params"]
        if not isinstance(operands, list) or not isinstance(params, dict):
            raise TraceError("an operation has a list of operands and an object of parameters")
        given = {name: self._plain(value) for name, value in params.items()}
        if not isinstance(fields["name"], str):
            raise TraceError(f"an operation has a name, got {fields['name']!r}")
        return self.trace.op(fields["name"], *map(self._value, operands), **given)

    def _constant(self, fields: PlainData) -> Value:
        value = self._plain(fields["value"])
        if not isinstance(value, (Tensor, bool, int, float)):
            raise TraceError(f"a constant is a tensor or a number, got {value!r}")
        return self.trace.as_value(value)

    def _apply(self, fields: PlainData) -> Value:
        return self.trace.apply(fields["piece"], self._value(fields["operand"]))

    def _weight(self, fields: PlainData) -> Value:
        if not isinstance(fields["name"], str):
            raise TraceError(f"a parameter has a name, got {fields['name']!r}")
        return self.trace.weight(fields["name"])

    def _score(self, fields: PlainData) -> Value:
        arguments, logits = fields["arguments"], self._value(fields["logits"])
        if not isinstance(arguments, dict) or not isinstance(logits, Site):
            raise TraceError("a score has its metric's arguments and the node that reads the logits")
        given = {name: self._plain(value) for name, value in arguments.items()}
        try:
            metric = get_metric(fields["metric"])(**given)
        except (TypeError, RuntimeError) as error:
            raise TraceError(f"the metric {fields['metric']!r} does not take these arguments: {error}") from error
        return logits.run.scores(metric, logits)

    def _gradient(self, fields: PlainData) -> Value:
        of = self._value(fields["of"])
        if not isinstance(self.trace.graph.nodes[of.node], Read):
            raise TraceError("a gradient is with respect to an activation that is read")
        made = self.trace.gradient(self._value(fields["scalar"]), of=of)
        assert isinstance(made, Value)
        return made

    # Parts of nodes

    def _value(self, index: object) -> Value:
        value = self.values[index] if _is_index(index) and index < len(self.values) else None
        if value is None:
            raise TraceError(f"{index!r} is no earlier node with a value")
        return value

    def _plain(self, value: object) -> object:
        """Plain data as it is; a tensor or a number that JSON has no word for, by its description."""
        if not isinstance(value, dict):
            if isinstance(value, list) and not all(isinstance(one, (int, str)) for one in value):
                raise TraceError(f"a list in a trace holds integers or names, got {value!r}")
            return value
        if set(value) == {"tensor"} and isinstance(value["tensor"], str) and value["tensor"] in self.tensors:
            self.used.add(value["tensor"])
            return self.tensors[value["tensor"]]
        if set(value) == {"number"} and isinstance(value["number"], str) and value["number"] in _WORDS:
            return _WORDS[value["number"]]
        raise TraceError(f"{value!r} is no tensor of the trace, and no number")


def _with_keys(entry: object, keys: set[str]) -> PlainData:
    if not isinstance(entry, dict) or set(entry) != keys:
        found = sorted(entry) if isinstance(entry, dict) else entry
        raise TraceError(f"expected the keys {', '.join(sorted(keys))}, got {found!r}")
    return entry


def _decoding(entry: object) -> Decoding:
    given = _with_keys(entry, {one.name for one in fields_of(Decoding)})
    sampling = _with_keys(given["sampling"], {one.name for one in fields_of(Sampling)})
    ends = given["eos_token_ids"]
    whole = [given["max_new_tokens"], given["seed"], *(ends if isinstance(ends, list) else [None])]
    if not all(map(_is_index, whole)) or not isinstance(given["use_past_kv_cache"], bool):
        raise TraceError(f"a generation has whole numbers of steps, seed and end tokens, got {given!r}")
    if not isinstance(sampling["do_sample"], bool):
        raise TraceError(f"do_sample is true or false, got {sampling['do_sample']!r}")
    try:
        drawn = Sampling(**sampling)
    except (ValueError, TypeError) as error:
        raise TraceError(str(error)) from error
    return Decoding(given["max_new_tokens"], drawn, given["seed"], tuple(ends), given["use_past_kv_cache"])


def _is_index(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _reason(error: Exception) -> str:
    # The line is that of the reader's caller, and says nothing of the trace.
    return error.reason if isinstance(error, TraceError) else str(error)


def _never(graph: Graph) -> NoReturn:
    raise TraceError("a trace that is read is run by its model")
