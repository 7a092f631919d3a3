"""Direct logit attribution: the contribution of each component to a logit, side by side or as a running sum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from hooked_lm._support.plain_data import PlainData
from hooked_lm.plotting.figure import Figure
from hooked_lm.plotting.style import BLUE, GREY, INK, MUTED, ORANGE, categories, number, styled, text, with_room
from hooked_lm.utils import ArrayLike, to_numpy

__all__ = ["attribution_bars", "attribution_waterfall"]


def attribution_bars(
    labels: Sequence[str], values: ArrayLike, unit: str = "logit difference", title: str = ""
) -> Figure:
    """Return a horizontal bar for each component: to the right for a positive value, to the left for a negative one.

    Args:
        labels: of the components, from top to bottom, such as `"L9H6"` or `"MLP 3"`.
        values: the contribution of each, [component].
        unit: of the values.
        title: of the figure.

    Raises:
        ValueError: there are no values, they are not as many as the labels, or not finite.
    """
    lengths = _values(labels, values)
    figure = Figure(
        go.Bar(
            x=lengths,
            y=categories(labels),
            orientation="h",
            marker={"color": [BLUE if value >= 0 else ORANGE for value in lengths], "cornerradius": 2},
            width=0.62,
            **_written([number(value, "+.2f") for value in lengths]),
            customdata=[text(label) for label in labels],
            hovertemplate=f"%{{customdata}}<br>{text(unit)} %{{x:+.3f}}<extra></extra>",
        )
    )
    return _laid_out(figure, lengths, unit, title)


def attribution_waterfall(
    labels: Sequence[str],
    values: ArrayLike,
    total: float | None = None,
    unit: str = "logit difference",
    title: str = "",
) -> Figure:
    """Return the components' running sum: each bar begins where the one above it ended, and the last is the total.

    Args:
        labels: of the components, from top to bottom.
        values: the contribution of each, [component].
        total: the sum over all components, if these are only some of them: a bar `the rest` makes up the difference.
            By default the sum of the values.
        unit: of the values.
        title: of the figure.

    Raises:
        ValueError: there are no values, they are not as many as the labels, or not finite.
    """
    steps = _values(labels, values)
    names, total = list(labels), float(steps.sum()) if total is None else float(total)
    if not np.isfinite(total):
        raise ValueError(f"the total is a finite number, not {total}")
    rest = total - float(steps.sum())
    # Sums in single precision have rounding errors, which are no component.
    if abs(rest) > 1e-4 * max(1.0, float(np.abs(steps).sum())):
        names, steps = [*names, "the rest"], np.append(steps, rest)
    figure = Figure(
        go.Waterfall(
            x=[*steps, total],
            y=categories([*names, "total"]),
            measure=["relative"] * len(steps) + ["total"],
            orientation="h",
            increasing={"marker": {"color": BLUE}},
            decreasing={"marker": {"color": ORANGE}},
            totals={"marker": {"color": INK}},
            connector={"line": {"color": GREY, "width": 1}},
            width=0.62,
            **_written([*(number(value, "+.2f") for value in steps), number(total)]),
            customdata=[
                *(
                    f"{text(name)}<br>{text(unit)} {value:+.3f}<br>so far {sum_:.3f}"
                    for name, value, sum_ in zip(names, steps, steps.cumsum(), strict=True)
                ),
                f"total<br>{text(unit)} {total:.3f}",
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    return _laid_out(figure, np.append(steps.cumsum(), total), unit, title)


def _values(labels: Sequence[str], values: ArrayLike) -> np.ndarray:
    array = to_numpy(values)
    if array.shape != (len(labels),) or not len(labels):
        raise ValueError(f"{len(labels)} labels for values of shape {array.shape}: one each, and at least one")
    if not np.isfinite(array).all():
        raise ValueError(f"what components add is finite; this is not: {labels[int(np.argmin(np.isfinite(array)))]}")
    return array


def _written(numbers: list[str]) -> PlainData:
    """The numbers at the ends of the bars, outside of them."""
    return {
        "text": numbers,
        "textposition": "outside",
        "cliponaxis": False,
        "constraintext": "none",
        "textfont": {"size": 12, "color": MUTED},
    }


def _laid_out(figure: Figure, ends: np.ndarray, unit: str, title: str) -> Figure:
    n_bars = len(ends)
    row = 28 if n_bars <= 24 else 20
    figure.update_xaxes(title=text(unit), range=with_room(ends))
    figure.update_yaxes(type="category", range=[n_bars - 0.4, -0.6], dtick=1)
    styled(figure, title, height=90 + row * n_bars)
    figure.update_yaxes(showgrid=False)
    return figure.update_xaxes(zeroline=True, zerolinecolor=GREY, zerolinewidth=1)
