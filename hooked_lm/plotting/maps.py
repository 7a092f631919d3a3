"""Maps of a run: scores of patched runs, and tokens read from the residual stream. Arrays in, plotly figures out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import plotly.graph_objects as go

from hooked_lm.plotting.figure import Figure
from hooked_lm.plotting.style import (
    SEQUENTIAL,
    colour_bar,
    matrix,
    names_of,
    place_of_unit,
    shown,
    span_of,
    styled,
    text,
    ticks,
    visible,
)
from hooked_lm.utils import ArrayLike, to_numpy

__all__ = ["lens_table", "patching_grid", "site_map"]

# The number of letters across a page.
_LETTERS = 100
# The height of the row of a site, in pixels.
_SITE = 26


def patching_grid(
    scores: ArrayLike,
    labels: Sequence[str] | None = None,
    *,
    axis: Literal["position", "head"] = "position",
    centre: float = 0.0,
    limit: float | None = None,
    unit: str = "score",
    title: str = "",
) -> Figure:
    """Return a heat map of patched runs, a row for each layer, a column for each position or head.

    Args:
        scores: [layer pos] or [layer head].
        labels: of the columns, such as the tokens of the positions; by default their numbers.
        axis: what the columns are.
        centre: the score that has no colour: 0 for shares, the corrupted run's score for raw scores. Around 0, if no
            score is negative and there is no limit, colours begin at 0, as for norms and losses.
        limit: the distance from the centre at which the colour is full; by default the largest there is.
        unit: of the scores, shown along the colour bar and on hovering; in the title where the bar is too short.
        title: of the figure.

    Raises:
        ValueError: the scores have no two axes, the labels are not as many as the columns, or the limit is not above 0.
    """
    values = matrix(scores, "a grid of patched runs", f"layer {axis}")
    n_layers, n_columns = values.shape
    names = names_of(labels, n_columns, f"{axis}s")
    span = span_of(values, centre, limit)
    row = min(34, max(14, 640 // n_layers))
    title, bar_unit = place_of_unit(title, unit, row * n_layers)
    figure = Figure(
        go.Heatmap(
            z=values,
            x=list(range(n_columns)),
            y=list(range(n_layers)),
            zmin=span.low,
            zmax=span.high,
            colorscale=span.scale,
            colorbar=colour_bar(bar_unit, tickvals=span.marks, tickformat=".3~g"),
            xgap=1,
            ygap=1,
            # Numbers for heads, which are read one by one; positions are read as a picture.
            texttemplate="%{z:.2f}" if axis == "head" and n_columns <= 16 else None,
            customdata=[_places(names)] * n_layers,
            hovertemplate=f"layer %{{y}}, {axis} %{{customdata}}<br>{text(unit)} %{{z:.3f}}<extra></extra>",
        )
    )
    figure.update_xaxes(title=axis, **ticks(names, most=48))
    figure.update_yaxes(
        title="layer", autorange="reversed", **ticks([str(layer) for layer in range(n_layers)], most=24)
    )
    height, width = 150 + row * n_layers, 110 + (30 if axis == "head" else 9) * n_columns
    return styled(figure, title, height, grid=False, least_width=width)


def lens_table(
    tokens: Sequence[Sequence[Sequence[str]]],
    probabilities: ArrayLike,
    sites: Sequence[str],
    labels: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """Return a table of tokens read from the residual stream: a row for each site, the last on top.

    Each cell shows the likeliest token, in the colour of its probability; hovering shows the other tokens.

    Args:
        tokens: the likeliest tokens of each site and position, [site pos top], the likeliest first.
        probabilities: of those tokens, [site pos top].
        sites: the labels of the rows, in order of depth.
        labels: of the positions; by default their numbers.
        title: of the figure.

    Raises:
        ValueError: tokens, probabilities and labels do not fit together.
    """
    values = to_numpy(probabilities)
    if values.ndim != 3 or values.size == 0:
        raise ValueError(f"probabilities of tokens have shape [site pos top], got {values.shape}")
    shapes = {(len(row), *{len(cell) for cell in row}) for row in tokens}
    if (len(tokens), shapes, len(sites)) != (values.shape[0], {values.shape[1:]}, values.shape[0]):
        raise ValueError(f"{len(tokens)} sites of tokens and {len(sites)} labels for probabilities {values.shape}")
    n_sites, n_columns = values.shape[:2]
    names = names_of(labels, n_columns, "positions")
    letters = min(16, _LETTERS // n_columns)
    title, unit = place_of_unit(title, "probability", _SITE * n_sites)
    figure = Figure(
        go.Heatmap(
            z=values[:, :, 0],
            x=list(range(n_columns)),
            y=list(range(n_sites)),
            zmin=0.0,
            zmax=1.0,
            colorscale=SEQUENTIAL,
            colorbar=colour_bar(unit),
            xgap=2,
            ygap=2,
            # The cells are small: spaces at the ends of a token are shown on hovering only.
            text=[[shown(cell[0].strip() or cell[0], letters) for cell in row] for row in tokens],
            texttemplate="%{text}" if letters > 2 else None,
            textfont={"size": 11},
            customdata=_hover(tokens, values, sites, _places(names)),
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    figure.update_xaxes(title="position", **ticks(names, most=48))
    figure.update_yaxes(**ticks(sites, most=n_sites))
    longest = max(min(letters, len(cell[0].strip())) for row in tokens for cell in row) if letters > 2 else 2
    return styled(figure, title, 130 + _SITE * n_sites, grid=False, least_width=110 + (8 + 6 * longest) * n_columns)


def site_map(
    values: ArrayLike,
    sites: Sequence[str],
    labels: Sequence[str] | None = None,
    *,
    unit: str = "value",
    title: str = "",
) -> Figure:
    """Return a map with a row for each site, the first on top, and a column for each position.

    Args:
        values: [site pos].
        sites: the labels of the rows.
        labels: of the positions; by default their numbers.
        unit: of the values.
        title: of the figure.

    Raises:
        ValueError: the labels are not as many as rows or columns.
    """
    found = matrix(values, "a map of sites", "site position")
    if len(sites) != found.shape[0]:
        raise ValueError(f"{len(sites)} labels for {found.shape[0]} sites")
    names = names_of(labels, found.shape[1], "positions")
    row = min(22, max(9, 900 // len(sites)))
    title, bar_unit = place_of_unit(title, unit, row * len(sites))
    figure = Figure(
        go.Heatmap(
            z=found,
            x=list(range(found.shape[1])),
            y=list(range(len(sites))),
            # Powers of ten have no 0 to begin at.
            zmin=float(found.min()),
            zmax=float(found.max()),
            colorscale=SEQUENTIAL,
            colorbar=colour_bar(bar_unit, tickformat=".3~g"),
            xgap=1,
            ygap=1,
            customdata=[[f"{text(site)}, position {place}" for place in _places(names)] for site in sites],
            hovertemplate=f"%{{customdata}}<br>{text(unit)} %{{z:.3f}}<extra></extra>",
        )
    )
    figure.update_xaxes(title="position", **ticks(names, most=48))
    figure.update_yaxes(autorange="reversed", **ticks(sites, most=60))
    return styled(figure, title, 150 + row * len(sites), grid=False, least_width=260 + 9 * found.shape[1])


def _places(names: Sequence[str]) -> list[str]:
    """The hover text of each column: its label; with its number, if two columns have the same label."""
    twice = len(set(names)) < len(names)
    return [f"{place} {text(name)}" if twice else text(name) for place, name in enumerate(names)]


def _hover(
    tokens: Sequence[Sequence[Sequence[str]]], values: np.ndarray, sites: Sequence[str], places: Sequence[str]
) -> list[list[str]]:
    """The hover text of each cell: its place, then every token and its probability."""
    return [
        [
            "<br>".join(
                [
                    f"{text(sites[site])}, position {places[column]}",
                    *(
                        f"{text(visible(token))}  {probability:.1%}"
                        for token, probability in zip(cell, values[site, column], strict=True)
                    ),
                ]
            )
            for column, cell in enumerate(row)
        ]
        for site, row in enumerate(tokens)
    ]
