"""Bars that are divided into parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hooked_lm.plotting.figure import Figure
from hooked_lm.plotting.style import BLUE, CURVES, GREY, categories, styled, text
from hooked_lm.utils import ArrayLike, to_numpy

__all__ = ["stacked_bars"]

_ROW = 26
# Beyond the colours of curves: tints that differ in lightness too.
_MORE = ("#9ecae1", "#fdd0a2", "#bcbddc")


def stacked_bars(values: Mapping[str, ArrayLike], labels: Sequence[str], *, axis: str = "", title: str = "") -> Figure:
    """Return a horizontal bar for each label, divided into parts, with a legend if there are several.

    Args:
        values: part -> numbers [label], not negative.
        labels: of the bars, from top to bottom.
        axis: the title of the values' axis; by default the only part's name.
        title: of the figure.

    Raises:
        ValueError: there are no parts or more than eight, or one is not as long as the labels.
    """
    colours = ((BLUE, *[one for one in CURVES if one != BLUE], *_MORE))[:7]
    if not 1 <= len(values) <= len(colours) + 1:
        raise ValueError(f"1 to {len(colours) + 1} parts can be told apart; got {len(values)}")
    places = categories(labels, letters=44)
    figure = Figure()
    for index, (name, given) in enumerate(values.items()):
        numbers = to_numpy(given)
        if numbers.shape != (len(labels),):
            raise ValueError(f"the part {name!r} has shape {numbers.shape}, and there are {len(labels)} labels")
        figure.add_bar(
            y=places,
            x=numbers,
            name=text(name),
            orientation="h",
            marker={"color": colours[index] if index < len(colours) else GREY},
            customdata=[text(label) for label in labels],
            hovertemplate=f"{text(name)}<br>%{{customdata}}: %{{x:.4~g}}<extra></extra>",
        )
    several = len(values) > 1
    figure.update_xaxes(title=text(axis or ("" if several else next(iter(values)))))
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=places, autorange="reversed")
    styled(figure, title, height=130 + _ROW * len(labels) + (40 if several else 0))
    if several:
        figure.update_layout(barmode="stack", showlegend=True, margin_t=98 if title else 60)
        figure.update_layout(
            legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0.0, "traceorder": "normal"}
        )
    return figure
