"""A graph of heads, joined where one reads what another writes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hooked_lm.plotting.figure import Figure
from hooked_lm.plotting.style import (
    BLUE,
    GREY,
    MUTED,
    PAPER,
    SEQUENTIAL,
    colour_at,
    colour_bar,
    shown,
    styled,
    text,
)
from hooked_lm.utils import ArrayLike, to_numpy

__all__ = ["composition_graph"]

# The share of the colour scale of the palest edge, which is still visible on paper.
_PALEST = 0.3
# The largest number of heads in a row with room for their names.
_NAMED = 16
_CURVE = np.linspace(0.0, 1.0, 21)


def composition_graph(
    scores: ArrayLike, labels: Sequence[str] | None = None, top: int = 20, unit: str = "composition", title: str = ""
) -> Figure:
    """Return the heads as nodes, a row for each layer with the first at the bottom, joined where they compose most.

    Edges with higher scores are wider and darker. Heads without an edge are pale.

    Args:
        scores: [layer head layer head], the writer's layer and head and then the reader's, as `head_composition(...)`
            gives in `scores`, `excess` and `z`.
        labels: of the heads, layer by layer, as in `model.all_head_labels`; by default `L0H0`, `L0H1`, ...
        top: how many edges to draw: those with the highest scores, of those above 0.
        unit: of the scores.
        title: of the figure.

    Raises:
        ValueError: the scores have other axes, are not finite, or name a writer that is not in an earlier layer than
            its reader; the labels are not as many as the heads; or `top` is not positive.
    """
    values = to_numpy(scores)
    if values.ndim != 4 or values.shape[:2] != values.shape[2:] or values.size == 0:
        raise ValueError(f"composition of all heads has shape [layer head layer head], got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("scores of composition are finite; some of these are not")
    if top < 1:
        raise ValueError(f"top is how many edges to draw, 1 or more, not {top}")
    n_layers, n_heads = values.shape[:2]
    names = [f"L{layer}H{head}" for layer in range(n_layers) for head in range(n_heads)]
    if labels is not None:
        if len(labels) != len(names):
            raise ValueError(f"{len(labels)} labels for {n_layers} layers of {n_heads} heads")
        names = list(labels)
    square = values.reshape(len(names), len(names))
    layers = np.repeat(np.arange(n_layers), n_heads)
    late = (layers[:, None] >= layers) & (square != 0)
    if late.any():
        writer, reader = np.argwhere(late)[0]
        raise ValueError(
            f"{names[writer]} -> {names[reader]} has score {square[writer, reader]:.3g}, and nothing is read before it "
            "is written: the writer's axes come first"
        )
    order = np.argsort(-square, axis=None, kind="stable")[:top]
    edges = [(int(at) // len(names), int(at) % len(names)) for at in order if square.flat[at] > 0]
    across = np.tile(np.arange(n_heads) - (n_heads - 1) / 2, n_layers)
    figure = Figure()
    _add_edges(figure, square, edges, across, layers, names, unit)
    _add_heads(figure, edges, across, layers, names, room=n_heads <= _NAMED)
    reach = max(float(np.abs(trace.x).max()) for trace in figure.data) + 0.6
    figure.update_xaxes(visible=False, range=[-reach, reach])
    figure.update_yaxes(
        title="layer", tickvals=list(range(0, n_layers, -(-n_layers // 24))), range=[-0.5, n_layers - 0.5]
    )
    height, width = (
        90 + max(34, min(110, 800 // n_layers)) * n_layers,
        150 + (38 if n_heads <= _NAMED else 13) * n_heads,
    )
    return styled(figure, title, height, grid=False, least_width=width)


def _add_edges(
    figure: Figure,
    square: np.ndarray,
    edges: Sequence[tuple[int, int]],
    across: np.ndarray,
    layers: np.ndarray,
    names: Sequence[str],
    unit: str,
) -> None:
    """The edges, the highest on top, each with a dot in its middle that has the hover text."""
    if not edges:
        return
    highest = float(square[edges[0]])
    lowest = min(float(square[edges[-1]]), 0.999 * highest)
    middles = []
    for writer, reader in reversed(edges):
        share = _PALEST + (1 - _PALEST) * (float(square[writer, reader]) - lowest) / (highest - lowest)
        x, y = _curve(across[writer], layers[writer], across[reader], layers[reader])
        middles.append((x[len(x) // 2], y[len(y) // 2]))
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines",
            line={"color": colour_at(SEQUENTIAL, share), "width": 1 + 5 * share**2},
            hoverinfo="skip",
        )
    scale = [[place, colour_at(SEQUENTIAL, _PALEST + (1 - _PALEST) * place)] for place in np.linspace(0, 1, 6)]
    figure.add_scatter(
        x=[x for x, _ in middles],
        y=[y for _, y in middles],
        mode="markers",
        marker={
            "size": 8,
            "color": [float(square[edge]) for edge in reversed(edges)],
            "colorscale": scale,
            "cmin": lowest,
            "cmax": highest,
            "showscale": True,
            "colorbar": colour_bar(unit, tickvals=[lowest, highest], tickformat=".2~f", len=220, lenmode="pixels"),
            "line": {"color": PAPER, "width": 1},
        },
        customdata=[f"{text(names[writer])} → {text(names[reader])}" for writer, reader in reversed(edges)],
        hovertemplate=f"%{{customdata}}<br>{text(unit)} %{{marker.color:.3f}}<extra></extra>",
    )


def _curve(x0: float, y0: float, x1: float, y1: float) -> tuple[np.ndarray, np.ndarray]:
    """A curve that is vertical at both ends, and swings outwards past the layers between."""
    t, swing = _CURVE, 0.45 * min(y1 - y0 - 1, 3) * (1 if x0 + x1 >= 0 else -1)
    ease = t**2 * (3 - 2 * t)
    return x0 + (x1 - x0) * ease + swing * np.sin(np.pi * t) ** 2, y0 + (y1 - y0) * t


def _add_heads(
    figure: Figure,
    edges: Sequence[tuple[int, int]],
    across: np.ndarray,
    layers: np.ndarray,
    names: Sequence[str],
    room: bool,
) -> None:
    joined = {head for edge in edges for head in edge}
    writes = [sum(writer == head for writer, _ in edges) for head in range(len(names))]
    reads = [sum(reader == head for _, reader in edges) for head in range(len(names))]
    figure.add_scatter(
        x=across,
        y=layers,
        mode="markers+text" if room else "markers",
        marker={
            "size": 34 if room else 11,
            "color": [BLUE if head in joined else "#f1efe8" for head in range(len(names))],
            "line": {"color": [BLUE if head in joined else GREY for head in range(len(names))], "width": 1},
        },
        text=[shown(name, 7) for name in names] if room else None,
        textfont={
            "size": 10 if max(map(len, names)) <= 5 else 9,
            "color": [PAPER if head in joined else MUTED for head in range(len(names))],
        },
        customdata=[
            f"{text(name)}<br>writes to {writes[head]}, reads from {reads[head]} of these"
            for head, name in enumerate(names)
        ],
        hovertemplate="%{customdata}<extra></extra>",
    )
