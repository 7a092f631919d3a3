"""What information routes are: the edges of a graph of residual states, with their importances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_lm._support.integers import at_least_one
from hooked_lm.circuits.heads import HeadScores

__all__ = ["EdgeKind", "InformationRoutes", "RouteEdge", "RouteNode"]

EdgeKind = Literal["residual", "head", "mlp", "bias"]
# A line of `InformationRoutes.rows`.
Row = dict[str, str | int | float | None]


class RouteNode(NamedTuple):
    """The residual stream at one depth and position.

    Attributes:
        depth: how many sublayers have written to it; 0 for the embeddings.
        state: `"0_pre"`, `"0_mid"`, `"0_post"`, `"1_mid"`, ... as in `LogitLens.labels`.
        pos: the position.
    """

    depth: int
    state: str
    pos: int


class RouteEdge(NamedTuple):
    """A term of a residual state, and the state that the term was made from. `pandas.DataFrame` takes a list of them.

    Attributes:
        kind: `"residual"` (the state before), `"head"` (what a head writes of one source position), `"mlp"`, or
            `"bias"` (what is added whatever the input).
        layer: the block.
        head: of a head's edge; otherwise None.
        source: the state the term is made from; None for a bias.
        destination: the state that the term is part of.
        importance: the term's share in its state, between 0 and 1.
        flow: the importance times the flow into the destination: see `InformationRoutes`.
    """

    kind: EdgeKind
    layer: int
    head: int | None
    source: RouteNode | None
    destination: RouteNode
    importance: float
    flow: float

    @property
    def label(self) -> str:
        """`"L1H4 2 -> 6"`: the component, and from which position to which."""
        name = f"L{self.layer}H{self.head}" if self.kind == "head" else f"{self.layer}_{self.kind}"
        source = "" if self.source is None else f"{self.source.pos} "
        return f"{name} {source}-> {self.destination.pos}"


@dataclass(frozen=True, eq=False)
class InformationRoutes:
    """The part of the graph of residual states that a final state is made from, edges of little importance left out.

    The importances of all terms of a state sum to 1; those at or below the threshold are left out, with all that only
    they lead to. The flow is 1 at the final state and goes down its edges in proportion to their importance, so an
    edge's flow is the product of the importances on the way to it, summed over the ways (as in the rollout of Abnar and
    Zuidema 2020, "Quantifying Attention Flow in Transformers"). What the threshold leaves out loses its flow.

    Attributes:
        tokens: the prompt, [pos].
        strings: its tokens as strings; their numbers for a model without a tokenizer.
        start: the final state.
        threshold: edges that are kept have a larger importance.
        edges: from the final state downwards.
        inputs: the flow that arrives at the embeddings of each position, [pos].
        bias_flow: the flow that ends in biases.
        cancelled: states on the routes whose terms cancel each other, so that none is closer to the state than nothing
            is: they have no importances, and routes end there.
        n_layers, n_heads: of the model.
        off: the largest error of a state's entry as a sum of the terms, over all states that were taken apart.
    """

    tokens: Int[Tensor, " pos"]
    strings: tuple[str, ...]
    start: RouteNode
    threshold: float
    edges: tuple[RouteEdge, ...]
    inputs: Float[Tensor, " pos"]
    bias_flow: float
    cancelled: tuple[RouteNode, ...]
    n_layers: int
    n_heads: int
    off: float

    @property
    def nodes(self) -> tuple[RouteNode, ...]:
        """The states on the routes, from the embeddings upwards."""
        found = {self.start} | {edge.source for edge in self.edges if edge.source is not None}
        return tuple(sorted(found))

    @property
    def lost(self) -> float:
        """The share of the flow that was left out: with edges at or below the threshold, and at `cancelled` states."""
        return 1.0 - float(self.inputs.sum()) - self.bias_flow

    def of_kind(self, kind: EdgeKind | None) -> list[RouteEdge]:
        """Return the edges of a kind; all for None.

        Raises:
            ValueError: there is no such kind.
        """
        if kind is not None and kind not in get_args(EdgeKind):
            raise ValueError(f"kind is one of {', '.join(get_args(EdgeKind))}, or None for all; got {kind!r}")
        return [edge for edge in self.edges if kind in (None, edge.kind)]

    def top(
        self, k: int = 10, *, kind: EdgeKind | None = "head", by: Literal["importance", "flow"] = "importance"
    ) -> list[RouteEdge]:
        """Return the `k` edges that matter most, the first first; fewer where there are fewer.

        Args:
            k: how many edges.
            kind: heads' edges by default, since they alone lead from one position to another; None for all.
            by: order by an edge's importance in its state, or by its share of the final state's flow.

        Raises:
            ValueError: `k` is below 1, or an unknown kind or order.
        """
        at_least_one(k, "k")
        _check_order(by)
        return sorted(self.of_kind(kind), key=lambda edge: -float(getattr(edge, by)))[:k]

    def heads(self, by: Literal["importance", "flow"] = "importance") -> HeadScores:
        """Return a score for every head: the sum over its edges on the routes; `.top()` has the highest.

        Args:
            by: sum the edges' importances, each in its own state, or their flow.

        Raises:
            ValueError: an unknown order.
        """
        _check_order(by)
        scores = torch.zeros(self.n_layers, self.n_heads, dtype=torch.float64)
        for edge in self.of_kind("head"):
            assert edge.head is not None
            scores[edge.layer, edge.head] += getattr(edge, by)
        return HeadScores(f"information routes, {by}", scores)

    def rows(self) -> list[Row]:
        """Return a dictionary for each edge, from the final state downwards; `pandas.DataFrame` takes them.

        Keys: `kind`, `layer`, `head`, `source_state`, `source`, `source_token`, `state`, `destination`, `token`,
        `importance`, `flow`. What an edge lacks is None.
        """
        return [
            {
                "kind": edge.kind,
                "layer": edge.layer,
                "head": edge.head,
                "source_state": None if edge.source is None else edge.source.state,
                "source": None if edge.source is None else edge.source.pos,
                "source_token": None if edge.source is None else self.strings[edge.source.pos],
                "state": edge.destination.state,
                "destination": edge.destination.pos,
                "token": self.strings[edge.destination.pos],
                "importance": edge.importance,
                "flow": edge.flow,
            }
            for edge in self.edges
        ]

    def table(
        self, k: int = 10, *, kind: EdgeKind | None = "head", by: Literal["importance", "flow"] = "importance"
    ) -> str:
        """Return the edges that matter most as text.

        Args:
            k, kind, by: as for `top`.

        Raises:
            ValueError: as `top`.
        """
        shown = self.top(k, kind=kind, by=by)
        lines = [["edge", "state", "importance", "flow", "tokens"]]
        for edge in shown:
            ends = [] if edge.source is None else [repr(self.strings[edge.source.pos])]
            ends.append(repr(self.strings[edge.destination.pos]))
            numbers = (f"{edge.importance:.3f}", f"{edge.flow:.3f}")
            lines.append([edge.label, edge.destination.state, *numbers, " -> ".join(ends)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        count = f"{len(shown)} of {len(self.of_kind(kind))} {kind or ''} edges".replace("  ", " ")
        head = f"{count} above {self.threshold:g} into {self.start.state} at position {self.start.pos}"
        if self.cancelled:
            head += f"; routes end at {len(self.cancelled)} states whose terms cancel each other"
        return "\n".join([head, *("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)])

    def __str__(self) -> str:
        return self.table()


def _check_order(by: str) -> None:
    if by not in ("importance", "flow"):
        raise ValueError(f"edges are ordered by 'importance' or 'flow', not {by!r}")
