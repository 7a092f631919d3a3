"""A self-contained HTML page of figures: plotly's own script is inside it, and it makes no requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import plotly.graph_objects as go

from hooked_lm._support.files import write_whole
from hooked_lm.plotting.document import plotly_div, plotly_document
from hooked_lm.plotting.figure import HtmlFigure
from hooked_lm.plotting.style import FONT

__all__ = ["PageFigure", "page_html", "write_page"]


@dataclass(frozen=True)
class PageFigure:
    """One figure of a page, several side by side, or a text without any.

    Attributes:
        heading: of the section.
        caption: the explanation of the figures, in plain text.
        figures: left to right.
    """

    heading: str
    caption: str
    figures: tuple[go.Figure | HtmlFigure, ...]


def page_html(
    title: str,
    introduction: str,
    sections: Sequence[PageFigure],
    facts: Sequence[tuple[str, str]] = (),
    footer: str = "",
) -> str:
    """Return a whole HTML page. Texts are escaped.

    Args:
        title: of the page.
        introduction: the paragraph under it.
        sections: the figures, in order.
        facts: pairs (number, meaning), shown large above the figures.
        footer: the last line.
    """
    tiles = "".join(f"<li><b>{escape(number)}</b><span>{escape(meaning)}</span></li>" for number, meaning in facts)
    tiles = f"<ul>{tiles}</ul>" if tiles else ""
    body = "".join(_section(section, number) for number, section in enumerate(sections, start=1))
    return plotly_document(
        title,
        _STYLE,
        f"<main>\n<header><h1>{escape(title)}</h1><p>{escape(introduction)}</p></header>\n"
        f"{tiles}\n{body}\n<footer>{escape(footer)}</footer>\n</main>",
    )


def write_page(
    path: str | Path,
    title: str,
    introduction: str,
    sections: Sequence[PageFigure],
    facts: Sequence[tuple[str, str]] = (),
    footer: str = "",
) -> Path:
    """Write a page to a file, whole or not at all, and return its path.

    Args:
        path: of the file; missing folders are made.
        title, introduction, sections, facts, footer: as for `page_html`.

    Raises:
        ValueError: it cannot be written there.
    """
    return write_whole(path, page_html(title, introduction, sections, facts, footer))


def _section(section: PageFigure, number: int) -> str:
    plots = "".join(
        figure.frame() if isinstance(figure, HtmlFigure) else plotly_div(figure, f"figure-{number}-{place}")
        for place, figure in enumerate(section.figures)
    )
    # The columns are fixed in the style: the script of each figure measures its element as soon as it runs.
    row = f'<div class="row" style="--columns: {len(section.figures)}">{plots}</div>' if plots else ""
    return f"<section><h2>{escape(section.heading)}</h2>{row}<p>{escape(section.caption)}</p></section>\n"


_STYLE = (
    """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f3ec; color: #1c1c1a; font: 17px/1.6 """
    + FONT
    + """; }
main { max-width: 980px; margin: 0 auto; padding: 56px 24px 40px; }
h1 { font-size: 34px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 16px; }
header p { font-size: 18px; max-width: 46em; margin: 0 0 32px; color: #3a3935; }
ul { list-style: none; display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px;
  margin: 0 0 28px; padding: 0; }
li { background: #fff; border: 1px solid #e7e5de; border-radius: 10px; padding: 16px 18px; }
li b { display: block; font-size: 26px; line-height: 1.2; letter-spacing: -0.01em; }
li span { display: block; margin-top: 4px; font-size: 14px; line-height: 1.4; color: #6b6a64; }
section { background: #fff; border: 1px solid #e7e5de; border-radius: 10px; padding: 24px 26px; margin: 0 0 20px; }
h2 { font-size: 21px; line-height: 1.3; margin: 0 0 8px; }
section p { margin: 10px 0 0; font-size: 15.5px; max-width: 50em; color: #3a3935; }
.row { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 20px; }
@media (max-width: 760px) { .row { grid-template-columns: minmax(0, 1fr); } }
.row > div { min-width: 0; }
footer { font-size: 14px; color: #6b6a64; margin-top: 28px; }
"""
)
