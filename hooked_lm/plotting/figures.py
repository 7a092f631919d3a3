"""Figures of heads: one attention pattern, a score for each head, composition scores, and bars for ablations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from hooked_lm.plotting.figure import Figure
from hooked_lm.plotting.style import (
    DIVERGING,
    GREY,
    ORANGE,
    SEQUENTIAL,
    Scale,
    categories,
    colour_bar,
    matrix,
    names_of,
    number,
    require_attention,
    styled,
    text,
    ticks,
    with_room,
)
from hooked_lm.utils import ArrayLike, to_numpy

__all__ = ["ablation_bars", "attention_pattern", "composition_matrix", "head_scores"]

# The largest number of columns with room for a number in each cell.
_NUMBERED = 16


def attention_pattern(pattern: ArrayLike, labels: Sequence[str] | None = None, title: str = "") -> Figure:
    """Return a heat map of one head's attention: a row for each query, a column for each key.

    Args:
        pattern: [query key], between 0 and 1. Fewer queries than keys are the last ones.
        labels: of the positions, which queries and keys share, such as the tokens; by default their numbers.
        title: of the figure.

    Raises:
        ValueError: the pattern is not [query key] or not between 0 and 1, or the labels are not as many as the keys.
    """
    values = matrix(pattern, "an attention pattern", "query key")
    require_attention(values)
    n_query, n_key = values.shape
    if n_query > n_key or (labels is not None and len(labels) != n_key):
        n_labels = n_key if labels is None else len(labels)
        raise ValueError(f"{n_labels} labels for a pattern of {n_query} queries and {n_key} keys")
    names = names_of(labels, n_key, "keys")
    keys, queries = list(range(n_key)), list(range(n_key - n_query, n_key))
    words = [text(name) for name in names]
    figure = Figure(
        go.Heatmap(
            z=values,
            x=keys,
            y=queries,
            zmin=0.0,
            zmax=1.0,
            colorscale=SEQUENTIAL,
            # The map is square and may be narrower than the page: a bar at the edge of the page would be far from it.
            colorbar=colour_bar(
                "", orientation="h", x=0, xpad=0, xanchor="left", y=1.02, yanchor="bottom", len=130, lenmode="pixels"
            ),
            customdata=[[f"{words[query]} → {words[key]}" for key in keys] for query in queries],
            # The format `:d` shows positions; without it plotly shows the tick labels, which are tokens.
            hovertemplate="from position %{y:d} to %{x:d}<br>tokens %{customdata}<br>attention %{z:.3f}<extra></extra>",
        )
    )
    height = 480 + 8 * min(max(n_query - 20, 0), 30)
    marks = ticks(names, most=height // 24)
    figure.update_xaxes(title="attended to (key)", constrain="domain", constraintoward="left", **marks)
    figure.update_yaxes(
        title="from (query)", autorange="reversed", scaleanchor="x", constrain="domain", constraintoward="top", **marks
    )
    styled(figure, title, height, grid=False, least_width=100 + 11 * len(marks["tickvals"]))
    return figure.update_layout(margin_t=92 if title else 56, title_y=0.97, title_yanchor="top")


def head_scores(scores: ArrayLike, title: str = "") -> Figure:
    """Return a map of one number per head, with the number in each cell where there is room.

    Args:
        scores: [layer head], between 0 and 1; or, if some are negative, between -1 and 1, on a scale around 0.
        title: of the figure.

    Raises:
        ValueError: the scores are not [layer head], or some are beyond 1: use `patching_grid` for these.
    """
    values = matrix(scores, "a map of head scores", "layer head")
    furthest = float(np.abs(values).max())
    if not furthest <= 1 + 1e-3:
        raise ValueError(
            f"scores of heads are between 0 and 1, or -1 and 1, and the furthest is {furthest:.3g}: "
            "patching_grid(scores, axis='head') draws others"
        )
    rows, columns = (
        [f"{kind} {index}" for index in range(n)] for kind, n in zip(("layer", "head"), values.shape, strict=True)
    )
    signed = bool((values < 0).any())
    figure = _numbered_map(values, rows, columns, -1.0 if signed else 0.0, 1.0, DIVERGING if signed else SEQUENTIAL)
    return styled(figure, title, 130 + _row_height(len(rows)) * len(rows), grid=False, least_width=_width(columns))


def composition_matrix(scores: ArrayLike, writers: Sequence[str], readers: Sequence[str], title: str = "") -> Figure:
    """Return a map of composition scores, a row for each writing head, a column for each reading head.

    Args:
        scores: [writer reader], not negative; or, if some are, drawn on a scale around 0.
        writers, readers: the heads' labels, such as `"L0H1"`.
        title: of the figure.

    Raises:
        ValueError: the labels are not as many as the rows and columns.
    """
    values = matrix(scores, "a map of composition scores", "writer reader")
    if values.shape != (len(writers), len(readers)):
        raise ValueError(f"{len(writers)} writers and {len(readers)} readers for scores {values.shape}")
    top = max(float(np.abs(values).max()), 1e-9)
    signed = bool((values < 0).any())
    figure = _numbered_map(
        values, list(writers), list(readers), -top if signed else 0.0, top, DIVERGING if signed else SEQUENTIAL
    )
    figure.update_xaxes(title="reads")
    figure.update_yaxes(title="writes")
    height = 150 + _row_height(len(writers)) * len(writers)
    return styled(figure, title, height, grid=False, least_width=_width(readers))


def ablation_bars(
    labels: Sequence[str], values: ArrayLike, highlight: Sequence[bool], axis: str = "", title: str = ""
) -> Figure:
    """Return a horizontal bar for each condition, with its value written at its end.

    Args:
        labels: of the conditions, from top to bottom.
        values: [condition].
        highlight: which bars to draw in the stronger colour.
        axis: the title of the values' axis.
        title: of the figure.

    Raises:
        ValueError: labels, values and highlights differ in number.
    """
    lengths = to_numpy(values)
    if lengths.shape != (len(labels),) or len(highlight) != len(labels):
        raise ValueError(f"{len(labels)} labels and {len(highlight)} highlights for values of shape {lengths.shape}")
    figure = Figure(
        go.Bar(
            x=lengths,
            y=categories(labels),
            orientation="h",
            marker={"color": [ORANGE if strong else GREY for strong in highlight], "cornerradius": 3},
            text=[number(value) for value in lengths],
            textposition="outside",
            cliponaxis=False,
            width=0.55,
            customdata=[text(label) for label in labels],
            hovertemplate="%{customdata}<br>%{x:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title=text(axis), range=with_room(lengths))
    figure.update_yaxes(autorange="reversed", type="category")
    styled(figure, title, 110 + 44 * len(labels))
    return figure.update_yaxes(showgrid=False)


def _row_height(n_rows: int) -> int:
    return min(52, max(18, 800 // n_rows))


def _width(columns: Sequence[str]) -> int:
    return 80 + (30 if len(columns) <= _NUMBERED else 12) * len(columns)


def _numbered_map(
    values: np.ndarray, rows: list[str], columns: list[str], low: float, high: float, scale: Scale
) -> Figure:
    numbered = len(columns) <= _NUMBERED
    where = [[f"{text(row)}, {text(column)}" for column in columns] for row in rows]
    figure = Figure(
        go.Heatmap(
            z=values,
            x=categories(columns),
            y=categories(rows),
            zmin=low,
            zmax=high,
            colorscale=scale,
            # With numbers in the cells no colour bar is needed.
            showscale=not numbered,
            colorbar=colour_bar("", tickvals=[low, (low + high) / 2, high], tickformat=".3~g"),
            xgap=3 if numbered else 1,
            ygap=3 if numbered else 1,
            texttemplate="%{z:.2f}" if numbered else None,
            customdata=where,
            hovertemplate="%{customdata}: %{z:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed")
    return figure
