"""Plan a trace: what has to be computed, and in which passes of the model.

A value that goes from place p of run A to place q of run B needs A's pass to come before B's if p lies behind q, and no
later than B's otherwise. Places are those of the hook points, in the order in which they run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hooked_lm.config import HookedTransformerConfig
from hooked_lm.tracing.cells import SweepCells, sweep_cells
from hooked_lm.tracing.errors import TraceError
from hooked_lm.tracing.graph import Generated, Gradient, Graph, Node, Read, Write
from hooked_lm.tracing.target import Target

__all__ = ["DEFAULT_MEMORY_BUDGET", "PlannedPass", "TracePlan", "plan_trace"]

DEFAULT_MEMORY_BUDGET = 2**29  # bytes: 512 MiB

# Sites at which a layer computes attention's pattern in full, for its whole batch.
_EAGER_SITES = ("hook_attn_scores", "hook_pattern")


@dataclass
class PlannedPass:
    """One forward pass.

    Attributes:
        runs: the runs that it makes, whose prompts are its rows.
        events: full hook name -> the reads and writes there, as nodes, for each run in order.
        gradients: whether a graph is recorded.
        generated: the nodes of its new tokens, for a generation.
        cells: the runs as cells of a sweep, which takes the place of the pass; None for a pass.
    """

    runs: list[int]
    events: dict[str, list[int]] = field(default_factory=dict)
    gradients: bool = False
    generated: list[int] = field(default_factory=list)
    cells: SweepCells | None = None


@dataclass
class TracePlan:
    """How a trace is run.

    Attributes:
        passes: in order.
        live: the nodes that are computed.
    """

    passes: list[PlannedPass]
    live: set[int]


@dataclass(frozen=True)
class _Edge:
    """A value that goes from one run into another."""

    source: int
    target: int
    strict: bool  # the source's pass comes before the target's
    read: int
    write: int


def plan_trace(
    graph: Graph,
    target: Target,
    *,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    together: bool = True,
    can_sweep: Callable[[], bool] = lambda: False,
) -> TracePlan:
    """Return the passes of a trace.

    Args:
        graph: the trace.
        target: what is known of the model.
        memory_budget: approximate memory, in bytes, for the activations of one pass.
        together: make several runs in one pass. False gives each a pass of its own, where values allow it.
        can_sweep: whether runs that differ only in their edits may be scored by one sweep; asked if there are such.

    Raises:
        TraceError: values go around in a circle that no order of passes serves.
    """
    live = live_nodes(graph, target)
    runs = sorted({node.run for index in live if isinstance(node := graph.nodes[index], (Read, Generated))})
    edges = _edges(graph, target, live)
    differentiated = _differentiated(graph, live, edges)
    cells = sweep_cells(graph, live, differentiated, target.places) if together else []
    if cells and not can_sweep():
        cells = []
    packing = _Packing(graph, target, edges, live, memory_budget, together)
    swept = {run: one for one in cells for run in one.scores}
    for group in _grouped(graph, runs, edges):
        if len(group) == 1 and group[0] in swept:
            packing.add_cell(group[0], swept[group[0]])
        else:
            packing.add(group)
    for one in packing.passes:
        one.gradients = any(run in differentiated for run in one.runs)
    packing.add_events()
    return TracePlan(packing.ordered(), live)


class _Packing:
    """Runs that are put into passes, sources first."""

    def __init__(
        self, graph: Graph, target: Target, edges: Sequence[_Edge], live: set[int], memory_budget: int, together: bool
    ) -> None:
        self.graph, self.live, self.together = graph, live, together
        self.limit = max(1, memory_budget // bytes_per_position(target.cfg))
        self.passes: list[PlannedPass] = []
        self.level: list[int] = []  # of each pass: it comes after all passes of lower levels
        self.sizes: list[tuple[bool, int, int]] = []  # of each pass: attention in full, rows, length
        self.placed: dict[int, int] = {}  # run -> its pass
        self.sources: dict[int, list[_Edge]] = defaultdict(list)
        for edge in edges:
            self.sources[edge.target].append(edge)
        self.eager = {
            node.run
            for index in live
            if isinstance(node := graph.nodes[index], (Read, Write)) and node.site.endswith(_EAGER_SITES)
        }

    def _earliest(self, group: Sequence[int], before: bool = False) -> tuple[int, int]:
        """The first level, and within it the first pass, in which the values of these runs are there.

        Args:
            group: runs of one pass.
            before: all values come from earlier passes.
        """
        earliest = (0, 0)
        for edge in (edge for run in group for edge in self.sources[run] if edge.source not in group):
            index = self.placed[edge.source]
            there = (self.level[index] + 1, 0) if edge.strict or before else (self.level[index], index)
            earliest = max(earliest, there)
        return earliest

    def add(self, group: list[int]) -> None:
        """Put runs that need one pass into the first pass that takes them."""
        specs = [self.graph.runs[run] for run in group]
        eager, rows = any(run in self.eager for run in group), sum(spec.n_prompts for spec in specs)
        longest = max(max(spec.lengths) for spec in specs)
        earliest = self._earliest(group)
        alone = not self.together or any(spec.decoding is not None for spec in specs)
        for index, (its_eager, its_rows, its_length) in enumerate(self.sizes):
            fits = its_eager == eager and (its_rows + rows) * max(its_length, longest) <= self.limit
            in_time = (self.level[index], index) >= earliest
            if not alone and fits and in_time and self.passes[index].cells is None:
                self._place(group, index)
                self.sizes[index] = (eager, its_rows + rows, max(its_length, longest))
                return
        self._open(group, earliest[0], (eager, self.limit if alone else rows, longest))

    def add_cell(self, run: int, cells: SweepCells) -> None:
        """Put a run into a sweep that it is a cell of, after the passes that its values come from."""
        level, _ = self._earliest([run], before=True)
        for index, one in enumerate(self.passes):
            if one.cells is cells and self.level[index] >= level:
                self._place([run], index)
                return
        self._open([run], level, (False, self.limit, 1))
        self.passes[-1].cells = cells

    def _open(self, group: list[int], level: int, size: tuple[bool, int, int]) -> None:
        self.passes.append(PlannedPass([]))
        self.level.append(level)
        self.sizes.append(size)
        self._place(group, len(self.passes) - 1)

    def _place(self, group: list[int], index: int) -> None:
        self.passes[index].runs += group
        self.placed.update(dict.fromkeys(group, index))

    def add_events(self) -> None:
        """Give every pass the reads and writes of its runs."""
        for index in sorted(self.live):
            node = self.graph.nodes[index]
            if isinstance(node, Generated):
                self.passes[self.placed[node.run]].generated.append(index)
            elif isinstance(node, (Read, Write)):
                self.passes[self.placed[node.run]].events.setdefault(node.site, []).append(index)
        for planned in self.passes:
            for events in planned.events.values():
                events.sort(key=lambda index: (sequence(self.graph.nodes[index]), index))

    def ordered(self) -> list[PlannedPass]:
        """Return the passes in order."""
        order = sorted(range(len(self.passes)), key=lambda index: (self.level[index], index))
        return [self.passes[index] for index in order]


def bytes_per_position(cfg: HookedTransformerConfig) -> int:
    """Return roughly how many bytes a pass takes for each position of each prompt.

    Args:
        cfg: the model's config.
    """
    width = 6 * cfg.d_model + 3 * cfg.n_heads * cfg.d_head + 2 * (cfg.d_mlp or 0) + cfg.n_heads * 64
    return width * cfg.dtype.itemsize


def live_nodes(graph: Graph, target: Target) -> set[int]:
    """Return the nodes that a saved value depends on.

    A write counts if its run is read at its place or behind it.

    Args:
        graph: the trace.
        target: what is known of the model.
    """
    writes: dict[int, list[tuple[Moment, int]]] = defaultdict(list)
    for index, node in enumerate(graph.nodes):
        if isinstance(node, Write):
            writes[node.run].append((first_moment(graph, target, node), index))
    live: set[int] = set()
    stack = list(graph.saves.values())
    while stack:
        index = stack.pop()
        if index in live:
            continue
        live.add(index)
        node = graph.nodes[index]
        stack += node.inputs
        if isinstance(node, (Read, Generated)):
            reached = last_moment(graph, target, node)
            stack += [write for moment, write in writes[node.run] if moment < reached]
    return live


# A step, a place in the model and a number among the writes there.
Moment = tuple[int, int, int]


def first_moment(graph: Graph, target: Target, node: Write) -> Moment:
    """Return when a write first acts in its run.

    Args:
        graph: the trace.
        target: what is known of the model.
        node: the write.
    """
    return min(graph.runs[node.run].steps(node.select.step)), target.places[node.site], node.ordinal


def last_moment(graph: Graph, target: Target, node: Read | Generated) -> Moment:
    """Return when a read has all that it reads of its run.

    Args:
        graph: the trace.
        target: what is known of the model.
        node: the read.
    """
    if isinstance(node, Generated):
        return max(graph.runs[node.run].steps(None)), len(target.places), 0
    return max(graph.runs[node.run].steps(node.select.step)), target.places[node.site], node.version


def sequence(node: Node) -> int:
    """Return a number that orders the reads and writes at one site of one run: each read before the writes behind it.

    Args:
        node: a read or a write.
    """
    return 2 * node.version if isinstance(node, Read) else 2 * node.ordinal + 1 if isinstance(node, Write) else 0


def _edges(graph: Graph, target: Target, live: set[int]) -> list[_Edge]:
    """The values that go from run to run, each with the read furthest on in its run."""
    sources: dict[int, dict[int, tuple[Moment, int]]] = {}  # node -> run -> the last moment, and the read then
    edges = []
    for index in sorted(live):
        node = graph.nodes[index]
        if isinstance(node, (Read, Generated)):
            sources[index] = {node.run: (last_moment(graph, target, node), index)}
            continue
        found: dict[int, tuple[Moment, int]] = {}
        for one in node.inputs:
            for run, place in sources[one].items():
                found[run] = max(found.get(run, place), place)
        sources[index] = found
        if not isinstance(node, Write):
            continue
        written_at = first_moment(graph, target, node)[:2]
        for run, (read_at, read) in found.items():
            behind = read_at[:2] > written_at
            if run == node.run and behind:
                raise TraceError(_backwards(graph, read, index), graph.lines.get(index))
            if run != node.run:
                generated = graph.runs[run].decoding is not None or graph.runs[node.run].decoding is not None
                edges.append(_Edge(run, node.run, behind or generated, read, index))
    return edges


def _backwards(graph: Graph, read: int, write: int) -> str:
    source, edit = graph.nodes[read], graph.nodes[write]
    assert isinstance(source, (Read, Generated))
    assert isinstance(edit, Write)
    read_at = repr(source.site) if isinstance(source, Read) else "the generated tokens"
    if source.run == edit.run:
        return (
            f"the edit at {edit.site!r} uses {read_at} of the same run, which comes later in the model: "
            "take the value from another t.prompts(...) of the same text"
        )
    line = graph.lines.get(read)
    return (
        f"the edit at {edit.site!r} of one run uses {read_at} of another{f' ({line})' if line else ''}, which "
        "itself depends on the first, and no order of passes serves both: take one of the two from another "
        "t.prompts(...)"
    )


def _grouped(graph: Graph, runs: Sequence[int], edges: Sequence[_Edge]) -> list[list[int]]:
    """Groups of runs that need one pass, since values go between them in both directions, sources first.

    Raises:
        TraceError: one of those values goes back to an earlier place.
    """
    after: dict[int, list[int]] = {run: [] for run in runs}
    for edge in edges:
        after[edge.source].append(edge.target)
    groups = _strong_components(after)
    group_of = {run: number for number, group in enumerate(groups) for run in group}
    for edge in edges:
        if edge.strict and group_of[edge.source] == group_of[edge.target]:
            raise TraceError(_backwards(graph, edge.read, edge.write), graph.lines.get(edge.write))
    return groups


def _strong_components(after: Mapping[int, Iterable[int]]) -> list[list[int]]:
    """The strongly connected components of a graph, each before those that it leads to (Tarjan 1972), in order."""
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    open_nodes: list[int] = []
    found: list[list[int]] = []
    for root in sorted(after, reverse=True):
        if root in number:
            continue
        stack = [(root, iter(sorted(after[root], reverse=True)))]
        number[root] = low[root] = len(number)
        open_nodes.append(root)
        while stack:
            node, rest = stack[-1]
            for other in rest:
                if other not in number:
                    number[other] = low[other] = len(number)
                    open_nodes.append(other)
                    stack.append((other, iter(sorted(after[other], reverse=True))))
                    break
                if other in open_nodes:
                    low[node] = min(low[node], number[other])
            else:
                stack.pop()
                if stack:
                    low[stack[-1][0]] = min(low[stack[-1][0]], low[node])
                if low[node] == number[node]:
                    at = open_nodes.index(node)
                    found.append(sorted(open_nodes[at:]))
                    del open_nodes[at:]
    return found[::-1]


def _differentiated(graph: Graph, live: set[int], edges: Sequence[_Edge]) -> set[int]:
    """The runs whose graph is recorded: those with respect to which a gradient is taken, and those behind them."""
    found: set[int] = set()
    for index in live:
        node = graph.nodes[index]
        if isinstance(node, Gradient):
            read = graph.nodes[node.of]
            assert isinstance(read, Read)
            found.add(read.run)
    growing = True
    while growing:
        grown = {edge.target for edge in edges if edge.source in found} - found
        found |= grown
        growing = bool(grown)
    return found
