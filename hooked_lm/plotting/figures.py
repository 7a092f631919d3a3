"""The figures. Each takes arrays (tensors, numpy, lists) with the shapes its docstring gives, and returns a figure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from hooked_lm.utils import to_numpy

INK, MUTED, GRID = "#1c1c1a", "#6b6a64", "#e7e5de"
BLUE, ORANGE, GREY = "#2a6fbb", "#d9661f", "#b3b1a8"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
# One hue from light to dark: lightness says how much, also in print and to the colour-blind.
SEQUENTIAL = [[0.0, "#fbfaf6"], [0.15, "#dbe8f5"], [0.4, "#92bde6"], [0.7, "#2f7bc8"], [1.0, "#0f3d73"]]


def attention_pattern(pattern: Any, labels: Sequence[str] | None = None, title: str = "") -> go.Figure:
    """Return a heat map of one head's attention: a row for each query, a column for each key.

    Args:
        pattern: [query key], between 0 and 1.
        labels: of the positions, which queries and keys share; by default their numbers.
        title: over the map.

    Raises:
        ValueError: the pattern is not [query key], or the labels are not as many as the keys.
    """
    values = _matrix(pattern, "an attention pattern", "query key")
    n_query, n_key = values.shape
    # Plotly reads markup: a token may look like some.
    names = [escape(name) for name in (map(str, range(n_key)) if labels is None else labels)]
    if len(names) != n_key or n_query > n_key:
        raise ValueError(f"{len(names)} labels for a pattern of {n_query} queries and {n_key} keys")
    keys, queries = list(range(n_key)), list(range(n_key - n_query, n_key))
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=keys,
            y=queries,
            zmin=0.0,
            zmax=1.0,
            colorscale=SEQUENTIAL,
            colorbar={"thickness": 8, "outlinewidth": 0, "tickvals": [0, 0.5, 1], "len": 0.5},
            customdata=[[f"{names[query]} → {names[key]}" for key in keys] for query in queries],
            hovertemplate="from position %{y} to %{x}<br>tokens %{customdata}<br>attention %{z:.3f}<extra></extra>",
        )
    )
    step = max(1, n_key // 12)
    ticks = {"tickvals": keys[::step], "ticktext": names[::step]}
    figure.update_xaxes(title="attended to (key)", constrain="domain", **ticks)
    figure.update_yaxes(
        title="from (query)", autorange="reversed", scaleanchor="x", constrain="domain", constraintoward="top", **ticks
    )
    return _styled(figure, title, height=420, grid=False)


def log_prob_curve(
    log_probs: Any, repeat_at: int | None = None, chance: float | None = None, title: str = ""
) -> go.Figure:
    """Return the log-probability of each next token along the sequence.

    Args:
        log_probs: [pos], in nats; entry `i` is about the token at position `i + 1`.
        repeat_at: the position where the repeat begins, marked by a line.
        chance: the log-probability of a guess, marked by a line.
        title: over the curve.
    """
    values = to_numpy(log_probs)
    if values.ndim != 1:
        raise ValueError(f"log-probabilities [pos] are expected, got shape {values.shape}")
    positions = np.arange(1, len(values) + 1)
    figure = go.Figure(
        go.Scatter(
            x=positions,
            y=values,
            mode="lines+markers",
            line={"color": BLUE, "width": 2},
            marker={"size": 5},
            hovertemplate="token at position %{x}<br>log-probability %{y:.3f}<extra></extra>",
        )
    )
    if chance is not None:
        figure.add_hline(chance, line={"color": MUTED, "width": 1, "dash": "dot"})
        figure.add_annotation(
            x=1, y=chance, xref="paper", text="a guess", showarrow=False, yanchor="bottom", font={"color": MUTED}
        )
    if repeat_at is not None:
        figure.add_vline(repeat_at - 0.5, line={"color": ORANGE, "width": 1.5})
        figure.add_annotation(
            x=repeat_at,
            y=0.5,
            yref="paper",
            text="the repeat begins",
            showarrow=False,
            xanchor="left",
            xshift=6,
            font={"color": ORANGE},
        )
    figure.update_xaxes(title="position of the token predicted")
    figure.update_yaxes(title="log-probability (nats)", rangemode="tozero")
    return _styled(figure, title, height=340)


def head_scores(scores: Any, title: str = "") -> go.Figure:
    """Return a map of one number per head, the number written in each cell.

    Args:
        scores: [layer head], between 0 and 1.
        title: over the map.
    """
    values = _matrix(scores, "a map of head scores", "layer head")
    rows, columns = (
        [f"{kind} {index}" for index in range(n)] for kind, n in zip(("layer", "head"), values.shape, strict=True)
    )
    figure = _numbered_map(values, rows, columns, top=1.0)
    return _styled(figure, title, height=130 + 52 * len(rows), grid=False)


def composition_matrix(scores: Any, writers: Sequence[str], readers: Sequence[str], title: str = "") -> go.Figure:
    """Return a map of composition scores, a row for each writing head, a column for each reading head.

    Args:
        scores: [writer reader], not negative.
        writers, readers: the heads' labels, such as `"L0H1"`.
        title: over the map.

    Raises:
        ValueError: the labels are not as many as the rows and columns.
    """
    values = _matrix(scores, "a map of composition scores", "writer reader")
    if values.shape != (len(writers), len(readers)):
        raise ValueError(f"{len(writers)} writers and {len(readers)} readers for scores {values.shape}")
    figure = _numbered_map(values, list(writers), list(readers), top=max(float(values.max()), 1e-9))
    figure.update_xaxes(title="reads")
    figure.update_yaxes(title="writes")
    return _styled(figure, title, height=150 + 52 * len(writers), grid=False)


def ablation_bars(
    labels: Sequence[str], values: Any, highlight: Sequence[bool], axis: str = "", title: str = ""
) -> go.Figure:
    """Return a horizontal bar for each condition, with its value written at its end.

    Args:
        labels: of the conditions, from top to bottom.
        values: [condition].
        highlight: which bars to draw in the stronger colour.
        axis: what the values are.
        title: over the bars.

    Raises:
        ValueError: the three are not equally many.
    """
    lengths = to_numpy(values)
    if lengths.shape != (len(labels),) or len(highlight) != len(labels):
        raise ValueError(f"{len(labels)} labels and {len(highlight)} highlights for values of shape {lengths.shape}")
    figure = go.Figure(
        go.Bar(
            x=lengths,
            y=list(labels),
            orientation="h",
            marker={"color": [ORANGE if strong else GREY for strong in highlight], "cornerradius": 3},
            text=[f"{value:.2f}" for value in lengths],
            textposition="outside",
            cliponaxis=False,
            width=0.55,
            hovertemplate="%{y}<br>%{x:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title=axis, rangemode="tozero")
    figure.update_yaxes(autorange="reversed", showgrid=False, ticksuffix="  ")
    return _styled(figure, title, height=110 + 44 * len(labels))


def _numbered_map(values: np.ndarray, rows: list[str], columns: list[str], top: float) -> go.Figure:
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=columns,
            y=rows,
            zmin=0.0,
            zmax=top,
            colorscale=SEQUENTIAL,
            showscale=False,
            xgap=3,
            ygap=3,
            texttemplate="%{z:.2f}",
            hovertemplate="%{y}, %{x}: %{z:.3f}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed")
    return figure


def _styled(figure: go.Figure, title: str, height: int, grid: bool = True) -> go.Figure:
    figure.update_layout(
        title={"text": title, "font": {"size": 15, "color": INK}, "x": 0.0, "xref": "paper"} if title else None,
        height=height,
        margin={"l": 10, "r": 24, "t": 44 if title else 20, "b": 10},
        font={"family": FONT, "size": 13, "color": INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=False,
    )
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(
            showgrid=grid,
            gridcolor=GRID,
            zeroline=False,
            automargin=True,
            tickfont={"color": MUTED},
            title_font={"color": MUTED},
        )
    return figure


def _matrix(values: Any, what: str, axes: str) -> np.ndarray:
    array = to_numpy(values)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{what} has shape [{axes}], got {array.shape}")
    return array
