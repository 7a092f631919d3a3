"""The parts of figures that are pages: their styles, their scripts, and tokens as HTML."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from hooked_lm._support.plain_data import PlainData
from hooked_lm.plotting.style import Scale

__all__ = ["ATTENTION_SCRIPT", "ATTENTION_STYLE", "TOKEN_STYLE", "TOOLTIP_SCRIPT", "data_element", "legend", "on_page"]

_HERE = Path(__file__).parent

TOKEN_STYLE = (_HERE / "tokens.css").read_text(encoding="utf-8")
TOOLTIP_SCRIPT = (_HERE / "tooltip.js").read_text(encoding="utf-8")
ATTENTION_STYLE = (_HERE / "attention.css").read_text(encoding="utf-8")
ATTENTION_SCRIPT = (_HERE / "attention.js").read_text(encoding="utf-8")


def on_page(token: str) -> str:
    """Return a token as HTML with visible whitespace: a line break has a mark before it."""
    shown = token.replace("\r", "␍").replace("\t", "⇥\t").replace("\n", "↵\n")
    return escape(shown) if shown else "∅"


def legend(scale: Scale, marks: list[str], unit: str) -> str:
    """Return a colour scale with its unit and marks, as HTML."""
    colours = ", ".join(f"{colour} {place:.1%}" for place, colour in scale)
    numbers = "".join(f"<span>{escape(mark)}</span>" for mark in marks)
    bar = f'<i style="background:linear-gradient(to right, {colours})"></i>'
    return f'<div class="legend"><span>{escape(unit)}</span><div>{bar}<div>{numbers}</div></div></div>'


def data_element(name: str, data: PlainData) -> str:
    """Return data as a script element that a script reads with `JSON.parse`; no string in it can end the element."""
    # In JSON `<` occurs in strings only, where it may be written as an escape.
    written = json.dumps(data, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{written}</script>'
