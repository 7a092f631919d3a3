"""canonical: the one form of a trace that does not depend on the order of the lines that recorded it.

What nothing saved depends on is dropped, equal nodes are one, and runs and nodes are numbered by their content.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from itertools import groupby, pairwise

from torch import Tensor

from hooked_lm._support.tensor_bytes import bytes_of
from hooked_lm.metrics import Metric
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
    Select,
    Write,
)
from hooked_lm.tracing.planner import Moment, first_moment, last_moment, live_nodes, sequence
from hooked_lm.tracing.target import Target

__all__ = ["canonical", "tensor_hash"]


def tensor_hash(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and values.

    Args:
        tensor: of any dtype.
    """
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    found.update(bytes_of(tensor).numpy().tobytes())
    return found.hexdigest()


def canonical(graph: Graph, target: Target) -> Graph:
    """Return a trace in its canonical form: equal for two traces that differ in the order of their lines only.

    Args:
        graph: the trace.
        target: what is known of the model.

    Raises:
        TraceError: values go around in a circle.
    """
    live = live_nodes(graph, target)
    needs = _needs(graph, target, live)
    order = _topological(needs, graph)
    # By what it is computed from, without regard to the other edits of its run.
    alone = _hashes(graph, order, needs, {})
    written: dict[int, list[str]] = defaultdict(list)
    for index in order:
        node = graph.nodes[index]
        if isinstance(node, Write):
            written[node.run].append(alone[index])
    used = {node.run for index in live if isinstance(node := graph.nodes[index], (Read, Generated, Write))}
    runs = {run: _digest([graph.runs[run], sorted(written[run])]) for run in used}
    final = _hashes(graph, order, needs, runs)
    return _renumbered(graph, live, needs, runs, final)


def _needs(graph: Graph, target: Target, live: set[int]) -> dict[int, set[int]]:
    """The nodes that come before each: its inputs, the edits upstream of what it reads, and the order at a site."""
    writes: dict[int, list[tuple[Moment, int]]] = defaultdict(list)  # of each run
    at_site: dict[tuple[int, str], list[tuple[int, int]]] = defaultdict(list)
    for index in live:
        node = graph.nodes[index]
        if isinstance(node, Write):
            writes[node.run].append((first_moment(graph, target, node), index))
        if isinstance(node, (Read, Write)):
            at_site[node.run, node.site].append((sequence(node), index))
    # Each edit needs those before it, so what is next to it is enough of what is at its site.
    before: dict[int, set[int]] = {}
    for events in at_site.values():
        steps = [{index for _, index in step} for _, step in groupby(sorted(events), key=lambda one: one[0])]
        for earlier, later in pairwise([set[int](), *steps]):
            before |= dict.fromkeys(later, earlier)
    needs: dict[int, set[int]] = {}
    for index in live:
        node = graph.nodes[index]
        needs[index] = set(node.inputs)
        if isinstance(node, Write):
            needs[index] |= before[index]
        if isinstance(node, (Read, Generated)):
            reached = last_moment(graph, target, node)
            needs[index].update(write for moment, write in writes[node.run] if moment < reached)
    return needs


def _topological(needs: Mapping[int, set[int]], graph: Graph) -> list[int]:
    """The nodes in an order in which each comes after what it needs."""
    order, missing = [], {index: len(needed) for index, needed in needs.items()}
    users: dict[int, list[int]] = defaultdict(list)
    for index, needed in needs.items():
        for one in needed:
            users[one].append(index)
    ready = [index for index, count in missing.items() if not count]
    while ready:
        index = ready.pop()
        order.append(index)
        for user in users[index]:
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)
    if len(order) < len(needs):
        stuck = min(set(needs) - set(order))
        raise TraceError("values of this trace depend on each other in a circle", graph.lines.get(stuck))
    return order


def _hashes(
    graph: Graph, order: Iterable[int], needs: Mapping[int, set[int]], runs: Mapping[int, str]
) -> dict[int, str]:
    """A hash of each node's content; with `runs`, of its run's whole content too."""
    found: dict[int, str] = {}
    for index in order:
        node = graph.nodes[index]
        content: list[object] = [type(node).__name__]
        for one in fields(node):
            value = getattr(node, one.name)
            if one.name == "run":
                value = [graph.runs[value], runs.get(value)]
            elif one.name == "type":
                continue
            elif one.name in ("value", "operand", "scalar", "of", "logits") and not isinstance(node, Constant):
                value = None if value is None else found[value]
            elif one.name == "operands":
                value = [found[operand] for operand in value]
            content.append(value)
        if isinstance(node, (Read, Generated)):
            content.append(sorted(found[other] for other in needs[index]))
        found[index] = _digest(content)
    return found


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, default=_plain, allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(content: object) -> object:
    """What JSON has no form for: tensors by their hash, metrics by their maker, selections by their fields."""
    if isinstance(content, Tensor):
        return ["tensor", tensor_hash(content)]
    if isinstance(content, Metric):
        # A metric without a maker is itself alone.
        return [content.maker, content.arguments] if content.maker else ["metric", content.name, id(content)]
    if isinstance(content, Select):
        return content.chosen()
    if isinstance(content, RunSpec):
        return asdict(content)
    if isinstance(content, Mapping):
        return dict(content)
    raise TypeError(f"{type(content).__name__} has no canonical form")


def _renumbered(
    graph: Graph, live: set[int], needs: Mapping[int, set[int]], runs: Mapping[int, str], final: Mapping[int, str]
) -> Graph:
    made = Graph()
    run_numbers: dict[str, int] = {}
    for run in sorted(runs, key=runs.__getitem__):
        if runs[run] not in run_numbers:
            run_numbers[runs[run]] = len(made.runs)
            made.runs.append(graph.runs[run])
    # One node for each content; what it needs by content, too.
    chosen = {final[index]: index for index in sorted(live, reverse=True)}
    needed = {key: {final[one] for one in needs[index]} for key, index in chosen.items()}
    missing = {key: len(keys) for key, keys in needed.items()}
    users: dict[str, list[str]] = defaultdict(list)
    for key, keys in needed.items():
        for one in keys:
            users[one].append(key)
    ready = [key for key, count in missing.items() if not count]
    heapq.heapify(ready)
    numbers: dict[str, int] = {}
    while ready:
        key = heapq.heappop(ready)
        numbers[key] = len(made.nodes)
        made.nodes.append(_with_numbers(graph.nodes[chosen[key]], final, numbers, runs, run_numbers))
        if chosen[key] in graph.lines:
            made.lines[numbers[key]] = graph.lines[chosen[key]]
        for user in users[key]:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, user)
    made.saves = {name: numbers[final[node]] for name, node in sorted(graph.saves.items())}
    return made


def _with_numbers(
    node: Node,
    final: Mapping[int, str],
    numbers: Mapping[str, int],
    runs: Mapping[int, str],
    run_numbers: Mapping[str, int],
) -> Node:
    def number(index: int) -> int:
        return numbers[final[index]]

    if isinstance(node, (Read, Generated, Score, Write)):
        node = replace(node, run=run_numbers[runs[node.run]])
    if isinstance(node, Write):
        return replace(node, value=None if node.value is None else number(node.value))
    if isinstance(node, Score):
        return replace(node, logits=number(node.logits))
    if isinstance(node, Compute):
        return replace(node, operands=tuple(map(number, node.operands)))
    if isinstance(node, Apply):
        return replace(node, operand=number(node.operand))
    if isinstance(node, Gradient):
        return replace(node, scalar=number(node.scalar), of=number(node.of))
    return node
