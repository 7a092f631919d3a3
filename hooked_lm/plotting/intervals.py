"""Effects with their intervals, one under the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hooked_lm.plotting.figure import Figure
from hooked_lm.plotting.style import BLUE, GREY, MUTED, categories, styled, text
from hooked_lm.utils import ArrayLike, to_numpy

__all__ = ["effect_intervals"]

_ROW = 26


def effect_intervals(
    labels: Sequence[str],
    means: ArrayLike,
    lows: ArrayLike,
    highs: ArrayLike,
    *,
    marked: Sequence[bool] | None = None,
    axis: str = "mean difference",
    title: str = "",
) -> Figure:
    """Return a row for each effect: a point at its mean and a line over its interval, with a line at 0.

    Args:
        labels: of the rows, from top to bottom.
        means, lows, highs: [row].
        marked: which rows have the full colour; by default all.
        axis: the title of the values' axis.
        title: of the figure.

    Raises:
        ValueError: there are no rows, the numbers are not as many as the labels, or an interval ends below its start.
    """
    centre, low, high = (to_numpy(values).astype(float) for values in (means, lows, highs))
    if not labels or any(values.shape != (len(labels),) for values in (centre, low, high)):
        raise ValueError(f"{len(labels)} labels for means {centre.shape}, lows {low.shape} and highs {high.shape}")
    if bool((low > high).any()):
        raise ValueError("an interval ends below its start")
    shown = np.ones(len(labels), bool) if marked is None else np.asarray(marked, bool)
    if shown.shape != (len(labels),):
        raise ValueError(f"{len(shown)} marks for {len(labels)} labels")
    places = categories(labels, letters=40)
    figure = Figure()
    for is_marked, colour in ((True, BLUE), (False, GREY)):
        rows = [row for row in range(len(labels)) if shown[row] == is_marked]
        if not rows:
            continue
        # A bootstrap interval need not hold the mean.
        figure.add_scatter(
            x=[value for row in rows for value in (low[row], high[row], None)],
            y=[place for row in rows for place in (places[row], places[row], None)],
            mode="lines",
            line={"color": colour, "width": 2},
            hoverinfo="skip",
        )
        figure.add_scatter(
            x=centre[rows],
            y=[places[row] for row in rows],
            mode="markers",
            marker={"color": colour, "size": 9},
            customdata=[[text(labels[row]), low[row], high[row]] for row in rows],
            hovertemplate="%{customdata[0]}<br>%{x:.4g} (%{customdata[1]:.4g} to %{customdata[2]:.4g})<extra></extra>",
        )
    figure.add_vline(0.0, line={"color": MUTED, "width": 1, "dash": "dot"})
    # Plotly leaves no room beyond the ends of lines.
    ends = [min(0.0, *low, *centre), max(0.0, *high, *centre)]
    room = 0.04 * ((ends[1] - ends[0]) or 1.0)
    figure.update_xaxes(title=text(axis), range=[ends[0] - room, ends[1] + room])
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=places, autorange="reversed")
    return styled(figure, title, height=130 + _ROW * len(labels))
