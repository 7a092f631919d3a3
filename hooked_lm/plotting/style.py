"""What the figures share: colours, letters, ticks, and how a text gets into a figure as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from hooked_lm.utils import to_numpy

INK, MUTED, GRID, PAPER = "#1c1c1a", "#63625c", "#e7e5de", "#ffffff"
BLUE, ORANGE, GREY = "#2a6fbb", "#d9661f", "#b3b1a8"
# Orange as bright as that of a line is too pale for letters.
RUST = "#a8480c"
# Told apart also by the colour-blind.
CURVES = (BLUE, ORANGE, "#3d8b5f", "#8757b0", GREY)
FONT = "-apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, system-ui, sans-serif"

Scale = list[tuple[float, str]]

# One hue from light to dark: lightness says how much, also in print and to the colour-blind.
SEQUENTIAL: Scale = [(0.0, "#fbfaf6"), (0.15, "#dbe8f5"), (0.4, "#92bde6"), (0.7, "#2f7bc8"), (1.0, "#0f3d73")]
# Paper in the middle: blue is above it, orange below, and both darken with the distance.
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


def styled(figure: Any, title: str, height: int, grid: bool = True, least_width: int = 0) -> Any:
    """Return the figure in the common style.

    The paper is white and not transparent: the dark letters stay readable on a dark page, and what one sees there is
    what is printed.

    Args:
        figure: a plotly figure, which is changed.
        title: over it; shown as it is, with no part of it read as markup.
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


def colour_bar(unit: str, **changes: Any) -> dict[str, Any]:
    """Return a narrow colour bar beside a map, with its unit along it; by default of shares from 0 to 1."""
    title = {"text": text(unit), "side": "right", "font": {"color": MUTED, "size": 13}}
    bar = {"thickness": 8, "outlinewidth": 0, "tickvals": [0, 0.5, 1], "tickfont": {"color": MUTED}, "title": title}
    # Between the numbers and the unit there is otherwise no space at all.
    return bar | {"ticksuffix": "\u2002"} | changes


def place_of_unit(title: str, unit: str, length: float) -> tuple[str, str]:
    """Return the title of a map, and what stands along its colour bar: the unit.

    Where the bar is too short for it, nothing stands there, and the title says it.

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
        """Return the values that a legend names: the ends and the middle."""
        return [self.low, (self.low + self.high) / 2, self.high]

    def colour(self, value: float) -> str:
        """Return the colour of a value."""
        return colour_at(self.scale, (value - self.low) / (self.high - self.low))


def span_of(values: np.ndarray, centre: float, limit: float | None) -> Span:
    """Return the span of values around a centre, up to the limit or the furthest of them; NaN counts for nothing.

    Amounts, which are values above 0 around which nobody asked for a limit, go from 0 to the largest: half of the
    colours would be of values that there cannot be.

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
    # What is below 0 by rounding alone is no sign.
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

    With black it is 4.5 or more on any colour, which WCAG 2 asks for; with the softer ink of other letters it is not.
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
    """Return a text so that plotly shows it as it is: no part is read as markup, as a formula or as a template."""
    return escape(words).replace("$", "&#36;").replace("%{", "&#37;{")


def visible(label: str) -> str:
    """Return a label of which one sees all: in quotes, if it is empty, has a space at an end, or has line breaks."""
    return label if label and label == label.strip() and label.isprintable() else repr(label)


def shown(label: str, letters: int) -> str:
    """Return a label as plotly shows it: visible, not too long, and no part of it read as markup."""
    label = visible(label)
    return text(label if len(label) <= letters else label[: letters - 1] + "…")


def names_of(labels: Sequence[str] | None, n: int, what: str) -> list[str]:
    """Return the labels, visible; by default the numbers.

    Raises:
        ValueError: they are not `n`.
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


def ticks(names: Sequence[str], most: int) -> dict[str, Any]:
    """Return tick labels for cells 0, 1, ...: all of them, or as many as there is room for.

    Places are numbers and not their labels, which may be the same for two.
    """
    places = range(0, len(names), -(-len(names) // most))
    return {"tickvals": list(places), "ticktext": [shown(names[place], 22) for place in places]}


# Arrays


def matrix(values: Any, what: str, axes: str) -> np.ndarray:
    """Return the values as an array of two axes.

    Raises:
        ValueError: they have another number of axes, or there are none.
    """
    array = to_numpy(values)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{what} has shape [{axes}], got {array.shape}")
    return array


def require_attention(values: np.ndarray) -> None:
    """Check that attention is between 0 and 1.

    Raises:
        ValueError: some is not.
    """
    low, high = float(values.min()), float(values.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(
            f"attention is between 0 and 1, and this is between {low:.3g} and {high:.3g}: hook_pattern has it, "
            "hook_attn_scores is before the softmax"
        )
