"""Parts of all figures: colours, fonts, ticks, and texts that are shown without markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from hooked_lm._support.plain_data import PlainData
from hooked_lm.utils import ArrayLike, to_numpy

if TYPE_CHECKING:
    from hooked_lm.plotting.figure import Figure

__all__ = [
    "BLUE",
    "CURVES",
    "DIVERGING",
    "FONT",
    "GREY",
    "GRID",
    "INK",
    "MUTED",
    "ORANGE",
    "PAPER",
    "RUST",
    "SEQUENTIAL",
    "Scale",
    "Span",
    "categories",
    "colour_at",
    "colour_bar",
    "ink_on",
    "matrix",
    "names_of",
    "number",
    "place_of_unit",
    "require_attention",
    "shown",
    "span_of",
    "styled",
    "text",
    "ticks",
    "visible",
    "with_room",
]

INK, MUTED, GRID, PAPER = "#1c1c1a", "#63625c", "#e7e5de", "#ffffff"
BLUE, ORANGE, GREY = "#2a6fbb", "#d9661f", "#b3b1a8"
# The orange of lines is too pale for letters.
RUST = "#a8480c"
# Distinguishable also for the colour-blind.
CURVES = (BLUE, ORANGE, "#3d8b5f", "#8757b0", GREY)
FONT = "-apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, system-ui, sans-serif"

Scale = list[tuple[float, str]]

# One hue from light to dark: lightness shows the value, also in print and for the colour-blind.
SEQUENTIAL: Scale = [(0.0, "#fbfaf6"), (0.15, "#dbe8f5"), (0.4, "#92bde6"), (0.7, "#2f7bc8"), (1.0, "#0f3d73")]
# Paper in the middle: values above it are blue, below it orange, and darker with the distance.
DIVERGING: Scale = [
    (0.0, "#7a3208"),
    (0.15, "#d9661f"),
    (0.3, "#efa878"),
    (0.425, "#f8dfcd"),
    (0.5, "#fbfaf6"),
    (0.575, "#dbe8f5"),
    (0.7, "#92bde6"),
    (0.85, "#2f7bc8"),
    (1.0, "#0f3d73"),
]


def styled(figure: Figure, title: str, height: int, grid: bool = True, least_width: int = 0) -> Figure:
    """Return the figure in the common style.

    The paper is white and not transparent: the dark letters stay readable on a dark page, and the figure is printed as
    it is shown.

    Args:
        figure: a plotly figure, which is changed.
        title: of the figure; shown as it is, without markup.
        height: in pixels, with the margins.
        grid: whether the axes have grid lines.
        least_width: in pixels; on a narrower page the figure is scrolled and not made smaller.
    """
    figure.update_layout(
        meta={"least_width": least_width} if least_width else None,
        title={"text": text(title), "font": {"size": 15, "color": INK}, "x": 0.0, "xref": "paper"} if title else None,
        height=height,
        margin={"l": 10, "r": 24, "t": 48 if title else 20, "b": 10},
        font={"family": FONT, "size": 13, "color": INK},
        hoverlabel={"font": {"family": FONT, "size": 13}, "align": "left"},
        paper_bgcolor=PAPER,
        plot_bgcolor=PAPER,
        showlegend=False,
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": MUTED},
    )
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(
            showgrid=grid,
            gridcolor=GRID,
            zeroline=False,
            automargin=True,
            tickfont={"color": MUTED},
            title_font={"color": MUTED, "size": 13},
            ticklabelstandoff=3,
        )
    return figure


def colour_bar(unit: str, **changes: object) -> PlainData:
    """Return a narrow colour bar beside a map, with its unit along it; by default of shares from 0 to 1."""
    title = {"text": text(unit), "side": "right", "font": {"color": MUTED, "size": 13}}
    bar = {"thickness": 8, "outlinewidth": 0, "tickvals": [0, 0.5, 1], "tickfont": {"color": MUTED}, "title": title}
    # Without this suffix the unit would touch the numbers.
    return bar | {"ticksuffix": "\u2002"} | changes


def place_of_unit(title: str, unit: str, length: float) -> tuple[str, str]:
    """Return the title of a map and the text along its colour bar: the unit.

    Where the bar is too short for the unit, its text is empty and the unit joins the title.

    Args:
        title: of the map.
        unit: of its values.
        length: of the colour bar, in pixels.
    """
    if 6.5 * len(unit) <= length:
        return title, unit
    if not title:
        return unit, ""
    return title if unit.lower() in title.lower() else f"{title} ({unit})", ""


def number(value: float, form: str = ".2f") -> str:
    """Return a number with a minus sign like that on plotly's axes."""
    return format(value, form).replace("-", "\u2212")


def with_room(values: np.ndarray) -> list[float]:
    """Return the range of an axis of bars from 0 to the values, with room for a number at the end of each."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    room = 0.14 * ((high - low) or 1.0)
    return [low - room if low < 0 else 0.0, high + room if high > 0 or low == 0 else 0.0]


@dataclass(frozen=True)
class Span:
    """The values that colours stand for.

    Attributes:
        low, high: the values of the first and last colour.
        scale: the colours between them.
    """

    low: float
    high: float
    scale: Scale

    @property
    def marks(self) -> list[float]:
        """The values that a legend names: the ends and the middle."""
        return [self.low, (self.low + self.high) / 2, self.high]

    def colour(self, value: float) -> str:
        """Return the colour of a value."""
        return colour_at(self.scale, (value - self.low) / (self.high - self.low))


def span_of(values: np.ndarray, centre: float, limit: float | None) -> Span:
    """Return the span of values around a centre, up to the limit or the furthest of them; NaN counts for nothing.

    Values that are not negative, around a centre of 0 and without a limit, get a span from 0 to the largest: otherwise
    half of the colours would stand for values that do not occur.

    Args:
        values: of any shape.
        centre: the value that has no colour.
        limit: the distance from the centre at which the colour is full; None for the largest there is.

    Raises:
        ValueError: the limit is not positive.
    """
    if limit is not None and not limit > 0:
        raise ValueError(f"limit is the distance from the centre at which the colour is full, above 0, not {limit!r}")
    furthest = float(np.nanmax(np.abs(values - centre), initial=0.0)) if limit is None else float(limit)
    furthest = furthest or 1.0
    # Values slightly below 0 are rounding errors, not negative values.
    if centre == 0 and limit is None and not (values < -1e-3 * furthest).any():
        return Span(0.0, furthest, SEQUENTIAL)
    return Span(centre - furthest, centre + furthest, DIVERGING)


def colour_at(scale: Scale, share: float) -> str:
    """Return the colour, such as `"#2f7bc8"`, at a share of the way along a scale, 0 to 1; beyond, that of the end."""
    share = min(max(share, 0.0), 1.0)
    places = [place for place, _ in scale]
    channels = np.array([[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for _, colour in scale])
    mixed = [round(float(np.interp(share, places, channels[:, channel]))) for channel in range(3)]
    return "#" + "".join(f"{value:02x}" for value in mixed)


def ink_on(colour: str) -> str:
    """Return the colour of letters that can be read on a colour: black or white, whichever has more contrast.

    The contrast is 4.5 or more on any colour, as WCAG 2 asks; with the softer ink of other letters it would not be.
    """
    luminance = _luminance(colour)
    return "#000000" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "#ffffff"


def _luminance(colour: str) -> float:
    """The relative luminance of WCAG 2."""
    shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


# Texts


def text(words: str) -> str:
    """Return a text escaped for plotly, so that it is shown as it is: without markup, formulas or templates."""
    return escape(words).replace("$", "&#36;").replace("%{", "&#37;{")


def visible(label: str) -> str:
    """Return a label that shows every character: in quotes if it is empty, or has spaces at its ends or line breaks."""
    return label if label and label == label.strip() and label.isprintable() else repr(label)


def shown(label: str, letters: int) -> str:
    """Return a label for plotly: visible, not too long, and without markup."""
    label = visible(label)
    return text(label if len(label) <= letters else label[: letters - 1] + "…")


def names_of(labels: Sequence[str] | None, n: int, what: str) -> list[str]:
    """Return the labels, visible; by default the numbers.

    Raises:
        ValueError: there are not `n` labels.
    """
    names = [str(place) for place in range(n)] if labels is None else [visible(str(label)) for label in labels]
    if len(names) != n:
        raise ValueError(f"{len(names)} labels for {n} {what}")
    return names


def categories(labels: Sequence[str], letters: int = 40) -> list[str]:
    """Return labels as the places of an axis of categories: a label that comes twice has two places."""
    places: list[str] = []
    for label in labels:
        place = shown(str(label), letters)
        # Plotly takes equal names for one place; these differ by letters without width.
        while place in places:
            place += "\u200b"
        places.append(place)
    return places


def ticks(names: Sequence[str], most: int) -> PlainData:
    """Return tick labels for cells 0, 1, ...: all of them, or evenly spaced ones, at most `most`.

    The ticks' places are numbers, because two labels may be the same.
    """
    places = range(0, len(names), -(-len(names) // most))
    return {"tickvals": list(places), "ticktext": [shown(names[place], 22) for place in places]}


# Arrays


def matrix(values: ArrayLike, what: str, axes: str) -> np.ndarray:
    """Return the values as an array of two axes.

    Raises:
        ValueError: the values have another number of axes, or are none.
    """
    array = to_numpy(values)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{what} has shape [{axes}], got {array.shape}")
    return array


def require_attention(values: np.ndarray) -> None:
    """Check that attention is between 0 and 1.

    Raises:
        ValueError: some of it is not.
    """
    low, high = float(values.min()), float(values.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(
            f"attention is between 0 and 1, and this is between {low:.3g} and {high:.3g}: hook_pattern has it, "
            "hook_attn_scores is before the softmax"
        )
