"""Maps of a run: what patching brings back, and what the residual stream says. Arrays in, plotly figures out."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from hooked_lm.plotting.figures import SEQUENTIAL, _matrix, _styled
from hooked_lm.utils import to_numpy

# Paper in the middle: blue is above it, orange below, and both darken with the distance.
DIVERGING = [
    [0.0, "#7a3208"],
    [0.15, "#d9661f"],
    [0.3, "#efa878"],
    [0.425, "#f8dfcd"],
    [0.5, "#fbfaf6"],
    [0.575, "#dbe8f5"],
    [0.7, "#92bde6"],
    [0.85, "#2f7bc8"],
    [1.0, "#0f3d73"],
]

# How many letters there is room for across a page.
_LETTERS = 100


def patching_grid(
    scores: Any,
    labels: Sequence[str] | None = None,
    *,
    axis: Literal["position", "head"] = "position",
    centre: float = 0.0,
    limit: float | None = None,
    unit: str = "score",
    title: str = "",
) -> go.Figure:
    """Return a heat map of patched runs, a row for each layer, a column for each position or head.

    Args:
        scores: [layer pos] or [layer head].
        labels: of the columns, such as the tokens of the positions; by default their numbers.
        axis: what the columns are.
        centre: the score that has no colour: 0 for shares, the corrupted run's for scores as they are.
        limit: the distance from the centre at which the colour is full; by default the largest there is.
        unit: what a score is, said where one points.
        title: over the map.

    Raises:
        ValueError: the scores have no two axes, or the labels are not as many as the columns.
    """
    values = _matrix(scores, "a grid of patched runs", f"layer {axis}")
    n_layers, n_columns = values.shape
    names = _names(labels, n_columns, f"{axis}s")
    furthest = float(np.nanmax(np.abs(values - centre), initial=0.0)) if limit is None else limit
    furthest = furthest or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=list(range(n_columns)),
            y=list(range(n_layers)),
            zmin=centre - furthest,
            zmax=centre + furthest,
            colorscale=DIVERGING,
            colorbar={"thickness": 8, "outlinewidth": 0, "tickvals": [centre - furthest, centre, centre + furthest]},
            xgap=1,
            ygap=1,
            # Of heads the numbers are read one by one; of positions the picture is.
            texttemplate="%{z:.2f}" if axis == "head" and n_columns <= 16 else None,
            customdata=[[escape(name) for name in names]] * n_layers,
            hovertemplate=f"layer %{{y}}, {axis} %{{customdata}}<br>{escape(unit)} %{{z:.3f}}<extra></extra>",
        )
    )
    figure.update_xaxes(title=axis, **_ticks(names, most=48))
    figure.update_yaxes(
        title="layer", autorange="reversed", **_ticks([str(layer) for layer in range(n_layers)], most=24)
    )
    return _styled(figure, title, height=150 + min(34, max(14, 800 // n_layers)) * n_layers, grid=False)


def lens_table(
    tokens: Sequence[Sequence[Sequence[str]]],
    probabilities: Any,
    sites: Sequence[str],
    labels: Sequence[str] | None = None,
    title: str = "",
) -> go.Figure:
    """Return a table of what the residual stream says: a row for each site, the last on top, a column per position.

    In each cell stands the likeliest token, in the colour of its probability; the others are shown where one points.

    Args:
        tokens: the likeliest tokens of each site and position, [site pos top], the likeliest first.
        probabilities: of those tokens, [site pos top].
        sites: the labels of the rows, in order of depth.
        labels: of the positions; by default their numbers.
        title: over the table.

    Raises:
        ValueError: the three do not fit together.
    """
    values = to_numpy(probabilities)
    if values.ndim != 3 or values.size == 0:
        raise ValueError(f"probabilities of tokens have shape [site pos top], got {values.shape}")
    shapes = {(len(row), *{len(cell) for cell in row}) for row in tokens}
    if (len(tokens), shapes, len(sites)) != (values.shape[0], {values.shape[1:]}, values.shape[0]):
        raise ValueError(f"{len(tokens)} sites of tokens and {len(sites)} labels for probabilities {values.shape}")
    n_sites, n_columns = values.shape[:2]
    names = _names(labels, n_columns, "positions")
    letters = min(16, _LETTERS // n_columns)
    figure = go.Figure(
        go.Heatmap(
            z=values[:, :, 0],
            x=list(range(n_columns)),
            y=list(range(n_sites)),
            zmin=0.0,
            zmax=1.0,
            colorscale=SEQUENTIAL,
            colorbar={"thickness": 8, "outlinewidth": 0, "tickvals": [0, 0.5, 1]},
            xgap=2,
            ygap=2,
            text=[[_shown(cell[0], letters) for cell in row] for row in tokens],
            texttemplate="%{text}" if letters > 2 else None,
            textfont={"size": 11},
            customdata=_hover(tokens, values, sites, names),
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    figure.update_xaxes(title="position", **_ticks(names, most=48))
    figure.update_yaxes(**_ticks(sites, most=n_sites))
    return _styled(figure, title, height=130 + 26 * n_sites, grid=False)


def _hover(
    tokens: Sequence[Sequence[Sequence[str]]], values: np.ndarray, sites: Sequence[str], names: Sequence[str]
) -> list[list[str]]:
    """What is said of each cell: where it is, then every token and its probability."""
    return [
        [
            "<br>".join(
                [
                    f"{escape(sites[site])}, position {escape(names[column])}",
                    *(
                        f"{escape(token)}  {probability:.1%}"
                        for token, probability in zip(cell, values[site, column], strict=True)
                    ),
                ]
            )
            for column, cell in enumerate(row)
        ]
        for site, row in enumerate(tokens)
    ]


def _names(labels: Sequence[str] | None, n_columns: int, what: str) -> list[str]:
    names = [str(column) for column in range(n_columns)] if labels is None else list(labels)
    if len(names) != n_columns:
        raise ValueError(f"{len(names)} labels for {n_columns} {what}")
    return names


def _ticks(names: Sequence[str], most: int) -> dict[str, Any]:
    """Tick labels for cells 0, 1, ...: all of them, or as many as there is room for."""
    shown = range(0, len(names), -(-len(names) // most))
    return {"tickvals": list(shown), "ticktext": [_shown(names[place], 22) for place in shown]}


def _shown(text: str, letters: int) -> str:
    """A text as plotly shows it: not too long, and no part of it read as markup."""
    return escape(text if len(text) <= letters else text[: letters - 1] + "…")
