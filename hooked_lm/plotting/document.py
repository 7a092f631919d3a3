"""A whole HTML document, and plotly's drawing inside one. It makes no requests, and its policy forbids them."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from plotly.offline import get_plotlyjs

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["POLICY", "document", "plotly_div", "plotly_document"]

# Scripts, styles and pictures inside the file are allowed; the browser refuses any request.
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


def plotly_div(figure: go.Figure, name: str, mode_bar: bool = False) -> str:
    """Return the element of a figure and the script that draws it there, for a document with plotly's script.

    Args:
        figure: a plotly figure.
        name: the id of the element, unique in the document.
        mode_bar: whether the buttons (save as PNG, zoom back) appear when the mouse is over the figure.
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
