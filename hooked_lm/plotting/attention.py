"""The attention of many heads at once: pointing at a head or a token shows its attention."""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode
from collections.abc import Sequence
from html import escape

import numpy as np

from hooked_lm._support.plain_data import PlainData
from hooked_lm.plotting.figure import HtmlFigure
from hooked_lm.plotting.png import written
from hooked_lm.plotting.style import SEQUENTIAL, colour_at, ink_on, require_attention
from hooked_lm.plotting.widgets import ATTENTION_SCRIPT, ATTENTION_STYLE, data_element, legend, on_page
from hooked_lm.utils import ArrayLike, to_numpy

__all__ = ["attention_heads"]

# Attention is stored as integers of two bytes, in units of 1 / 65535.
_PARTS = 65535
# From this share of the scale on, white letters have more contrast than black ones.
_WHITE_FROM = next(step / 100 for step in range(101) if ink_on(colour_at(SEQUENTIAL, step / 100)) == "#ffffff")
# More heads than these are drawn small, in a box that scrolls, so that the tokens stay visible.
_FEW = 24
_PALETTE = b"".join(bytes.fromhex(colour_at(SEQUENTIAL, step / 255)[1:]) for step in range(256))


def attention_heads(
    patterns: ArrayLike, tokens: Sequence[str], names: Sequence[str] | None = None, title: str = "", start: int = 0
) -> HtmlFigure:
    """Return the attention of several heads over one text: a thumbnail of each, one large, and the tokens.

    Pointing at a head shows that head; pointing at a token, or at a row of the large pattern, shows where the token
    attends, or, after the switch, which tokens attend to it. A click selects the head or token; a second click, a click
    elsewhere or Escape deselects it. Without a selection, each token shows the mean attention that it receives.

    Args:
        patterns: [head query key], between 0 and 1: those of one layer, or of several layers in one axis
            (`patterns.flatten(0, 1)` of [layer head query key]). Fewer queries than keys are the last ones.
        tokens: of the positions, as the tokenizer gives them.
        names: of the heads; by default `head 0`, `head 1`, ...
        title: of the figure.
        start: the head that is large at first, and in a static picture.

    Raises:
        ValueError: the patterns are not [head query key] or not between 0 and 1, the tokens or names are not as many
            as the keys or heads, or there is no such head to start with.
    """
    values, labels = _checked(patterns, tokens, names, start)
    pictures = [_picture(pattern) for pattern in values]
    many = " many" if len(values) > _FEW else ""
    body = _BODY.format(
        many=many,
        heads=_buttons(labels, pictures),
        picture=pictures[start],
        words=_words(tokens),
        scale=legend(SEQUENTIAL, ["0", "0.5", "1"], "attention"),
    )
    data = data_element("data", _data(values, tokens, labels, start))
    above = 300 if many else 92 * -(-len(values) // 12)
    lines = 1 + sum(map(len, tokens)) // 64 + sum(token.count("\n") for token in tokens)
    height = 90 + above + max(330, 110 + 30 * lines)
    return HtmlFigure(title, f"{body}\n{data}\n<script>{ATTENTION_SCRIPT}</script>", ATTENTION_STYLE, height)


def _checked(
    patterns: ArrayLike, tokens: Sequence[str], names: Sequence[str] | None, start: int
) -> tuple[np.ndarray, list[str]]:
    """The patterns as numbers from 0 to 1, and the names of the heads; raises the errors of `attention_heads`."""
    values = to_numpy(patterns)
    if values.ndim != 3 or values.size == 0:
        raise ValueError(f"patterns of attention have shape [head query key], got {values.shape}")
    require_attention(values)
    n_heads, n_query, n_key = values.shape
    if len(tokens) != n_key or n_query > n_key:
        raise ValueError(f"{len(tokens)} tokens for patterns of {n_query} queries and {n_key} keys")
    labels = [f"head {head}" for head in range(n_heads)] if names is None else list(names)
    if len(labels) != n_heads:
        raise ValueError(f"{len(labels)} names for {n_heads} heads")
    if not 0 <= start < n_heads:
        raise ValueError(f"start is one of the heads 0-{n_heads - 1}, not {start}")
    return np.clip(values.astype(np.float64), 0.0, 1.0), labels


def _data(values: np.ndarray, tokens: Sequence[str], labels: list[str], start: int) -> PlainData:
    """The data of the script."""
    return {
        "tokens": [repr(token) for token in tokens],
        "names": labels,
        "start": start,
        "queries": values.shape[1],
        "parts": _PARTS,
        "patterns": b64encode(np.rint(values * _PARTS).astype("<u2").tobytes()).decode(),
        "scale": SEQUENTIAL,
        "white_from": _WHITE_FROM,
    }


def _buttons(labels: list[str], pictures: list[str]) -> str:
    """The thumbnails of the heads, which are buttons."""
    return "".join(
        f'<button class="head" data-head="{head}" aria-pressed="false"><img src="{picture}" alt=""><span>{escape(name)}'
        "</span></button>"
        for head, (name, picture) in enumerate(zip(labels, pictures, strict=True))
    )


def _words(tokens: Sequence[str]) -> str:
    """The tokens, as elements that can be pointed at and selected."""
    return "".join(
        f'<span class="token" role="button" tabindex="0" data-token="{place}" aria-pressed="false">'
        f"{on_page(token)}</span>"
        for place, token in enumerate(tokens)
    )


_BODY = """<div class="heads{many}">{heads}</div>
<div class="shown">
<div class="large"><div class="pattern"><img src="{picture}" alt="" draggable="false"><i class="row"></i></div>
<small><span>key &rarr;</span><span>query &darr;</span></small></div>
<div class="reading">
<div class="bar"><b class="name"></b>
<div class="switch" role="group" aria-label="what is shown of a token">
<button data-side="destination" aria-pressed="true" title="the token is the destination: the query">attends to</button>
<button data-side="source" aria-pressed="false" title="the token is the source: the key">is attended to by</button>
</div>{scale}</div>
<p class="said" role="status"></p>
<p class="tokens">{words}</p>
</div>
</div>"""


def _picture(pattern: np.ndarray) -> str:
    """A pattern as a PNG in a `data:` address, a pixel for each entry: it is visible without scripts."""
    n_query, n_key = pattern.shape
    rows = np.zeros((n_query, n_key + 1), dtype=np.uint8)  # each row of pixels begins with its filter, 0: none
    rows[:, 1:] = np.rint(pattern * 255)
    header = struct.pack(">IIBBBBB", n_key, n_query, 8, 3, 0, 0, 0)  # 8 bits, a palette
    png = written([(b"IHDR", header), (b"PLTE", _PALETTE), (b"IDAT", zlib.compress(rows.tobytes(), 9))])
    return f"data:image/png;base64,{b64encode(png).decode()}"
