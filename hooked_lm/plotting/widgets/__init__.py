"""The parts of figures that are pages: their styles, their scripts, and how a token stands in them."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from hooked_lm.plotting.style import Scale

_HERE = Path(__file__).parent

TOKEN_STYLE = (_HERE / "tokens.css").read_text(encoding="utf-8")
TOOLTIP_SCRIPT = (_HERE / "tooltip.js").read_text(encoding="utf-8")
ATTENTION_STYLE = (_HERE / "attention.css").read_text(encoding="utf-8")
ATTENTION_SCRIPT = (_HERE / "attention.js").read_text(encoding="utf-8")


def on_page(token: str) -> str:
    """Return a token as HTML that shows all of it: a line break is marked before it breaks the line."""
    shown = token.replace("\r", "␍").replace("\t", "⇥\t").replace("\n", "↵\n")
    return escape(shown) if shown else "∅"


def legend(scale: Scale, marks: list[str], unit: str) -> str:
    """Return a colour scale with what stands under it, as HTML."""
    colours = ", ".join(f"{colour} {place:.1%}" for place, colour in scale)
    numbers = "".join(f"<span>{escape(mark)}</span>" for mark in marks)
    bar = f'<i style="background:linear-gradient(to right, {colours})"></i>'
    return f'<div class="legend"><span>{escape(unit)}</span><div>{bar}<div>{numbers}</div></div></div>'


def data_element(name: str, data: Any) -> str:
    """Return data as a script element that a script reads with `JSON.parse`; no text in it can end the element."""
    # `<` is only ever part of a string in JSON, and there may be written so.
    written = json.dumps(data, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{written}</script>'
