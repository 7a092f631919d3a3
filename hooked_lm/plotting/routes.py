"""A graph of residual states over positions and depth, joined by the routes of information."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hooked_lm.circuits.routes_result import InformationRoutes, RouteEdge, RouteNode
from hooked_lm.plotting.figure import Figure
from hooked_lm.plotting.style import BLUE, PAPER, SEQUENTIAL, colour_at, colour_bar, names_of, styled, text, ticks

__all__ = ["route_graph"]

# The share of the colour scale of the palest edge, which is still visible on paper.
_PALEST = 0.3
# Widths and colours of lines: edges in one of these bands of importance are one trace.
_BANDS = 8
_CURVE = np.linspace(0.0, 1.0, 13)
# How far an edge of an MLP, or of a head that reads its own position, swings out beside the stream.
_SWING = 0.28


def route_graph(routes: InformationRoutes, title: str = "") -> Figure:
    """Return the residual states on the routes, a column for each position, joined by the kept edges.

    The depth goes upwards. Edges of larger importance are wider and darker, and a dot in the middle of each has its
    name, importance and flow. Straight upright lines are the stream, lines bent to the right MLPs, all others heads;
    biases, which come from no state, are not drawn.

    Args:
        routes: what `information_routes` returns.
        title: of the figure.
    """
    # The strongest are drawn last, on top of the others.
    edges = sorted((edge for edge in routes.edges if edge.source is not None), key=lambda edge: edge.importance)
    figure = Figure()
    _add_lines(figure, edges)
    _add_middles(figure, edges)
    _add_states(figure, routes.nodes)
    names = names_of(routes.strings, len(routes.strings), "positions")
    states = {node.depth: node.state for node in routes.nodes}
    step = -(-(routes.start.depth + 1) // 24)
    shown = sorted(depth for depth in states if depth % step == 0)
    figure.update_xaxes(title="position", range=[-0.7, len(names) - 0.3], **ticks(names, most=48))
    figure.update_yaxes(
        title="state",
        tickvals=shown,
        ticktext=[states[depth] for depth in shown],
        range=[-0.5, routes.start.depth + 0.5],
    )
    height = 130 + min(60, max(16, 900 // (routes.start.depth + 1))) * (routes.start.depth + 1)
    return styled(figure, title, height, grid=False, least_width=110 + 34 * len(names))


def _line(edge: RouteEdge) -> tuple[np.ndarray, np.ndarray]:
    """The points of an edge, from its source upwards."""
    assert edge.source is not None
    start, end, t = edge.source, edge.destination, _CURVE
    ease = t**2 * (3 - 2 * t)
    beside = {"residual": 0.0, "mlp": _SWING, "head": -_SWING if start.pos == end.pos else 0.0}[edge.kind]
    return start.pos + (end.pos - start.pos) * ease + beside * np.sin(np.pi * t), start.depth + t


def _band(edge: RouteEdge) -> int:
    return min(int(edge.importance * _BANDS), _BANDS - 1)


def _colour(share: float) -> str:
    return colour_at(SEQUENTIAL, _PALEST + (1 - _PALEST) * share)


def _add_lines(figure: Figure, edges: Sequence[RouteEdge]) -> None:
    for band in range(_BANDS):
        x, y = list[float | None](), list[float | None]()
        for edge in edges:
            if _band(edge) == band:
                xs, ys = _line(edge)
                x += [*xs.tolist(), None]
                y += [*ys.tolist(), None]
        share = (band + 0.5) / _BANDS
        if x:
            line = {"color": _colour(share), "width": 1 + 5 * share}
            figure.add_scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip")


def _add_middles(figure: Figure, edges: Sequence[RouteEdge]) -> None:
    if not edges:
        return
    middles = [_line(edge) for edge in edges]
    half = len(_CURVE) // 2
    figure.add_scatter(
        x=[float(x[half]) for x, _ in middles],
        y=[float(y[half]) for _, y in middles],
        mode="markers",
        marker={
            "size": 7,
            "color": [edge.importance for edge in edges],
            "colorscale": [[place, _colour(place)] for place in np.linspace(0, 1, 6)],
            "cmin": 0.0,
            "cmax": 1.0,
            "showscale": True,
            "colorbar": colour_bar("importance", len=220, lenmode="pixels"),
            "line": {"color": PAPER, "width": 1},
        },
        customdata=[f"{text(edge.label)}<br>into {edge.destination.state}<br>flow {edge.flow:.3f}" for edge in edges],
        hovertemplate="%{customdata}<br>importance %{marker.color:.3f}<extra></extra>",
    )


def _add_states(figure: Figure, nodes: Sequence[RouteNode]) -> None:
    figure.add_scatter(
        x=[node.pos for node in nodes],
        y=[node.depth for node in nodes],
        mode="markers",
        marker={"size": 8, "color": BLUE, "line": {"color": PAPER, "width": 1}},
        text=[f"{node.state}, position {node.pos}" for node in nodes],
        hovertemplate="%{text}<extra></extra>",
    )
