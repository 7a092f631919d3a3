"""Text with each token on the colour of its value."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from hooked_lm.plotting.figure import HtmlFigure
from hooked_lm.plotting.style import Span, ink_on, span_of
from hooked_lm.plotting.widgets import TOKEN_STYLE, TOOLTIP_SCRIPT, legend, on_page
from hooked_lm.utils import ArrayLike, to_numpy

__all__ = ["coloured_tokens"]


def coloured_tokens(
    tokens: Sequence[str],
    values: ArrayLike,
    centre: float = 0.0,
    limit: float | None = None,
    unit: str = "value",
    title: str = "",
) -> HtmlFigure:
    """Return the text, each token on the colour of its value: blue above the centre, orange below.

    Where no value is negative, as with losses, larger values are bluer if centre and limit are the defaults. The value
    is shown on hovering and on keyboard focus.

    Args:
        tokens: the text, in pieces, as the tokenizer gives them, with spaces and line breaks.
        values: [pos]; NaN for a token that has none, such as the loss of the first.
        centre: the value that has no colour.
        limit: the distance from the centre at which the colour is full; by default the largest there is.
        unit: of the values.
        title: of the figure.

    Raises:
        ValueError: there are no tokens, or not as many as values, or a value is infinite, or the limit is not positive.
    """
    numbers = to_numpy(values)
    if numbers.shape != (len(tokens),) or not len(tokens):
        raise ValueError(f"{len(tokens)} tokens for values of shape {numbers.shape}: one each, and at least one")
    if np.isinf(numbers).any():
        raise ValueError(
            f"values are finite, or NaN where there is none; {tokens[int(np.argmax(np.isinf(numbers)))]!r} is not"
        )
    span = span_of(numbers, centre, limit)
    pieces = "".join(
        _piece(place, token, float(value), span, unit)
        for place, (token, value) in enumerate(zip(tokens, numbers, strict=True))
    )
    scale = legend(span.scale, [f"{mark:.3g}" for mark in span.marks], unit)
    tip = f'<div id="tip" role="status"></div>\n<script>{TOOLTIP_SCRIPT}</script>'
    body = f'{scale}\n<p class="tokens">{pieces}</p>\n{tip}'
    # About 110 letters fit into a line, and a line break ends one.
    lines = 1 + sum(map(len, tokens)) // 100 + sum(token.count("\n") for token in tokens)
    return HtmlFigure(title, body, TOKEN_STYLE, height=110 + 30 * lines)


def _piece(place: int, token: str, value: float, span: Span, unit: str) -> str:
    said = f"position {place}  {token!r}\n" + ("no value" if np.isnan(value) else f"{unit} {value:.4g}")
    colours = ""
    if not np.isnan(value):
        colour = span.colour(value)
        colours = f' style="background:{colour};color:{ink_on(colour)}"'
    return f'<span class="token" tabindex="0" data-tip="{escape(said)}"{colours}>{on_page(token)}</span>'
