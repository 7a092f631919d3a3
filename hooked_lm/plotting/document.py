"""A whole HTML document, and plotly's drawing inside one. Nothing in it is fetched, and its policy forbids it too."""

from __future__ import annotations

from html import escape
from typing import Any

from plotly.offline import get_plotlyjs

# Scripts and styles in the file itself may run, and pictures in it be shown; the browser refuses any request.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; worker-src blob:"
)


def document(title: str, style: str, body: str, script: str = "") -> str:
    """Return a whole HTML document.

    Args:
        title: of the window; it is escaped.
        style: CSS.
        body: HTML.
        script: JavaScript that runs before the body is read.
    """
    scripts = f"<script>{script}</script>\n" if script else ""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n{scripts}</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def plotly_document(title: str, style: str, body: str) -> str:
    """Return a document that has plotly's script inside."""
    return document(title, style, body, get_plotlyjs())


def plotly_div(figure: Any, name: str, mode_bar: bool = False) -> str:
    """Return the place of a figure and the script that draws it there, for a document with plotly's script.

    Args:
        figure: a plotly figure.
        name: the place's id, unlike any other in the document.
        mode_bar: whether its buttons (save as PNG, zoom back) appear when one points at it.
    """
    config = {
        "displaylogo": False,
        "responsive": True,
        "displayModeBar": "hover" if mode_bar else False,
        "modeBarButtons": [["toImage", "resetScale2d"]],
    }
    drawn = figure.to_html(full_html=False, include_plotlyjs=False, include_mathjax=False, div_id=name, config=config)
    least = (figure.layout.meta or {}).get("least_width", 0)
    return f'<div class="plot" style="overflow-x: auto"><div style="min-width: {least}px">{drawn}</div></div>'
