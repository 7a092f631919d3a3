"""Curves over layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from hooked_lm.plotting.figures import BLUE, GREY, MUTED, ORANGE, _styled
from hooked_lm.utils import to_numpy

_COLOURS = (BLUE, ORANGE, "#3d8b5f", "#8757b0", GREY)


def layer_curves(
    curves: Mapping[str, Any],
    labels: Sequence[str],
    axis: str = "",
    levels: Mapping[str, float] | None = None,
    title: str = "",
) -> go.Figure:
    """Return one curve for each name, over the same labelled points, with its name at its end.

    Args:
        curves: name -> values [point].
        labels: of the points, from left to right.
        axis: what the values are.
        levels: name -> a value that does not depend on the point, drawn as a dotted line.
        title: over the curves.

    Raises:
        ValueError: there are no curves, more than five, or one is not as long as the labels.
    """
    if not 1 <= len(curves) <= len(_COLOURS):
        raise ValueError(f"1 to {len(_COLOURS)} curves can be told apart; got {len(curves)}")
    figure = go.Figure()
    for (name, values), colour in zip(curves.items(), _COLOURS, strict=False):
        points = to_numpy(values)
        if points.shape != (len(labels),):
            raise ValueError(f"the curve {name!r} has shape {points.shape}, and there are {len(labels)} labels")
        figure.add_scatter(
            x=list(labels),
            y=points,
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker={"size": 6},
            hovertemplate=f"{name}<br>%{{x}}: %{{y:.3f}}<extra></extra>",
        )
    for name, level in (levels or {}).items():
        figure.add_hline(level, line={"color": MUTED, "width": 1, "dash": "dot"})
        figure.add_annotation(
            x=1,
            y=level,
            xref="paper",
            text=name,
            showarrow=False,
            yanchor="bottom",
            xanchor="right",
            font={"color": MUTED},
        )
    figure.update_yaxes(title=axis, rangemode="tozero")
    figure = _styled(figure, title, height=340)
    return figure.update_layout(showlegend=len(curves) > 1, legend={"orientation": "h", "y": 1.12, "x": 0.0})
