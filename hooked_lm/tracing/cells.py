"""Runs of a trace that are cells of one sweep: the same tokens and metric, edited by values that are there before."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hooked_lm._support.tensor_bytes import bytes_of
from hooked_lm.interventions import Intervention
from hooked_lm.metrics import Metric
from hooked_lm.tracing.graph import Graph, Read, Score, Write
from hooked_lm.tracing.ops import Operand

__all__ = ["SweepCells", "intervention_of", "sweep_cells"]

# From so many runs on, walking up the layers once costs less than a pass with all of them.
_FEWEST = 4


@dataclass(frozen=True)
class SweepCells:
    """Runs that are cells of one sweep.

    Attributes:
        scores: run -> the node of its score.
        writes: run -> its writes, as nodes in order.
        metric: that all are scored by.
    """

    scores: Mapping[int, int]
    writes: Mapping[int, Sequence[int]]
    metric: Metric


def sweep_cells(graph: Graph, live: set[int], excluded: set[int], places: Mapping[str, int]) -> list[SweepCells]:
    """Return the runs that are cells of a sweep, by sweep.

    A cell has prompts of one length and edits; all that is read of it is the score of one metric.

    Args:
        graph: the trace.
        live: the nodes that are computed.
        excluded: runs that take part in gradients.
        places: full hook name -> its place in the order in which hooks run.
    """
    reads: dict[int, list[int]] = defaultdict(list)
    writes: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    users: dict[int, list[int]] = defaultdict(list)
    for index in sorted(live):
        node = graph.nodes[index]
        for one in node.inputs:
            users[one].append(index)
        if isinstance(node, Read):
            reads[node.run].append(index)
        elif isinstance(node, Write):
            writes[node.run].append((places[node.site], node.ordinal, index))
    saved = set(graph.saves.values())
    found: dict[object, list[int]] = defaultdict(list)
    score_of: dict[int, int] = {}
    digests: dict[int, object] = {}
    for run, its_reads in reads.items():
        spec = graph.runs[run]
        if run in excluded or spec.decoding is not None or spec.length is None or not writes[run] or len(its_reads) > 1:
            continue
        scores = users[its_reads[0]]
        score = graph.nodes[scores[0]] if len(scores) == 1 and its_reads[0] not in saved else None
        edits_ends = any(_is_end(graph.nodes[index]) for *_, index in writes[run])
        if isinstance(score, Score) and not edits_ends:
            score_of[run] = scores[0]
            found[spec.tokens, _digest(score.metric, digests)].append(run)
    made = []
    for runs in found.values():
        if len(runs) >= _FEWEST:
            metric = graph.nodes[score_of[runs[0]]]
            assert isinstance(metric, Score)
            edits = {run: [index for *_, index in sorted(writes[run])] for run in runs}
            made.append(SweepCells({run: score_of[run] for run in runs}, edits, metric.metric))
    return made


def _is_end(node: object) -> bool:
    """Whether a write is outside the blocks, where a sweep has nothing to leave out."""
    return isinstance(node, Write) and not node.site.startswith("blocks.")


def _digest(metric: Metric, known: dict[int, object]) -> object:
    """What tells metrics apart: their maker and its arguments; a metric without a maker is itself alone."""
    if metric.maker is None:
        return id(metric)
    if id(metric) not in known:
        known[id(metric)] = (metric.maker, *((name, _hashable(one)) for name, one in metric.arguments.items()))
    return known[id(metric)]


def _hashable(value: object) -> object:
    if isinstance(value, Tensor):
        content = hashlib.sha256(bytes_of(value).numpy().tobytes()).digest()
        return str(value.dtype), tuple(value.shape), content
    return value


def intervention_of(write: Write, value: Operand | None) -> Intervention:
    """Return a write as an intervention.

    Args:
        write: the write.
        value: its value.
    """
    selections: Mapping[str, int | tuple[int, ...]] = write.select.chosen()
    return Intervention(write.site, write.how, value, **selections)
