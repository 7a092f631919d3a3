"""What the plotting functions return: a plotly figure, or a small HTML page. Both are saved as one file."""

from __future__ import annotations

import sys
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape, unescape
from pathlib import Path
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import plotly.io as pio

from hooked_lm._support.files import write_whole
from hooked_lm._support.plain_data import PlainData
from hooked_lm.plotting.document import document, plotly_div, plotly_document
from hooked_lm.plotting.static import page_image, plotly_image
from hooked_lm.plotting.style import FONT, INK, PAPER

__all__ = ["PLOTLY_MIMETYPE", "WIDTH", "Figure", "HtmlFigure"]

PLOTLY_MIMETYPE = "application/vnd.plotly.v1+json"
# The width of images and of outputs in a notebook: about that of a notebook's cell.
WIDTH = 900
_PLOTLY_HEIGHT = 450
# Plotly's renderers that give the mimetype or an image; the others give HTML.
_NOT_HTML = {"plotly_mimetype", "jupyterlab", "nteract", "vscode", "json", "png", "jpeg", "jpg", "svg", "pdf"}


if TYPE_CHECKING:
    from typing import Any, Self

    class _PlotlyFigure:
        """The part of plotly's figure that is used here: plotly has no annotations."""

        # Any: plotly builds the attributes of layouts and traces from a schema, hundreds of them.
        layout: Any
        data: Sequence[Any]

        def __init__(self, data: object = None) -> None: ...
        def update_layout(self, changes: object = None, **properties: object) -> Self: ...
        def update_xaxes(self, **properties: object) -> Self: ...
        def update_yaxes(self, **properties: object) -> Self: ...
        def add_scatter(self, **properties: object) -> Self: ...
        def add_bar(self, **properties: object) -> Self: ...
        def add_hline(self, y: float, **properties: object) -> Self: ...
        def add_vline(self, x: float, **properties: object) -> Self: ...
        def add_annotation(self, **properties: object) -> Self: ...
        def show(self, *args: object, **kwargs: object) -> None: ...
        def to_dict(self) -> PlainData: ...
        def to_html(self, **options: object) -> str: ...
        def _ipython_display_(self) -> None: ...
else:
    _PlotlyFigure = go.Figure


class Figure(_PlotlyFigure):
    """A plotly figure that can be saved and shown without network requests.

    All of plotly's methods work on it: `figure.update_layout(height=600)`, `figure.add_hline(0.5)`.

    In a notebook its output has plotly's mimetype, which JupyterLab, Notebook 7 and VS Code draw by themselves. For
    pages without scripts, such as a repository's preview of a notebook, set `PLOTLY_RENDERER=plotly_mimetype+png`
    before the notebook runs: each output then holds a PNG as well (extra `png`). Where plotly's renderer writes HTML
    (`notebook`, `colab`, `kaggle`), the output holds plotly's script, some 5 MB, where plotly would write links.
    `.show()` does the same as the end of a cell. Outside of notebooks, plotly shows the figure in its own way.
    """

    def html(self) -> str:
        """Return the figure as a whole HTML document, with plotly's script inside."""
        title = unescape(self.layout.title.text or "Figure")
        return plotly_document(title, _STYLE, f"{plotly_div(self, 'figure', mode_bar=True)}\n<script>{_FIT}</script>")

    def save(self, path: str | Path, width: int = WIDTH, scale: float = 2.0) -> Path:
        """Write the figure to a file, whole or not at all, and return its path.

        Args:
            path: `.html` is one file with plotly's script inside, which needs no network; `.png`, `.svg` and `.pdf` are
                static images (extra `png`; about two seconds each, most of them the start of a browser).
            width: of an image, in pixels of the layout; its height is that of the figure.
            scale: pixels of a PNG for each pixel of the layout.

        Raises:
            ValueError: the path has another ending, or cannot be written.
            ImportError: the file is an image, and kaleido is not installed.
            RuntimeError: the file is an image, and there is no browser to draw it.
        """
        images = {ending: partial(self._image, ending, width, scale) for ending in ("png", "svg", "pdf")}
        return _save(path, self.html, images)

    def show(self, *args: object, **kwargs: object) -> None:
        """Show the figure: in a notebook as the end of a cell does; elsewhere, or with arguments, as plotly does."""
        if args or kwargs or not _in_notebook():
            super().show(*args, **kwargs)
        else:
            self._ipython_display_()

    def _image(self, ending: str, width: int, scale: float) -> bytes:
        layout = self.layout
        size = (layout.width or width, layout.height or _PLOTLY_HEIGHT)
        return plotly_image(self.to_dict(), ending, *size, scale if ending == "png" else 1.0)

    # Output in notebooks. Plotly's own HTML would name a content network.

    def _ipython_display_(self) -> None:
        if not _in_notebook():
            super()._ipython_display_()
            return
        from IPython.display import display

        show: Callable[..., object] = display
        show(self._repr_mimebundle_(), raw=True)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None, **kwargs: object) -> PlainData:
        asked = _renderers()
        bundle: PlainData = {PLOTLY_MIMETYPE: _json(self), "text/plain": self._name()}
        if "png" in asked:
            bundle["image/png"] = b64encode(self._image("png", WIDTH, 2.0)).decode()
        if not asked <= _NOT_HTML:
            bundle["text/html"] = self._repr_html_()
        return bundle

    def _repr_html_(self) -> str:
        return _frame(self.html(), (self.layout.height or _PLOTLY_HEIGHT) + 4)

    def _name(self) -> str:
        return f"Figure({unescape(self.layout.title.text or '')!r})"


class HtmlFigure:
    """A figure that plotly cannot draw: a small page with its own CSS and JavaScript inside.

    In a notebook it is shown in a frame of its own, so that the two styles do not mix.

    Attributes:
        title: of the page and of its window.
        height: of the frame, in pixels, where the page cannot resize the frame.
    """

    def __init__(self, title: str, body: str, style: str, height: int) -> None:
        """Make the page.

        Args:
            title: of the page; it is escaped.
            body: HTML, scripts included.
            style: CSS.
            height: about the height of the page, in pixels, in a window as wide as a notebook's cell.
        """
        self.title, self.height = title, height
        heading = f"<h1>{escape(title)}</h1>\n" if title else ""
        body = f"<main>\n{heading}{body}\n</main>\n<script>{_FIT}</script>"
        self._html = document(title or "Figure", _PAGE_STYLE + style, body)

    def html(self) -> str:
        """Return the whole HTML document."""
        return self._html

    def frame(self) -> str:
        """Return the page in a frame, as a part of another."""
        return _frame(self.html(), self.height)

    def save(self, path: str | Path, width: int = WIDTH, scale: float = 2.0) -> Path:
        """Write the page to a file, whole or not at all, and return its path.

        Args:
            path: `.html`, or `.png` for a picture of the page as it first shows (extra `png`).
            width: of the picture's window, in pixels; it is as high as the page.
            scale: pixels of the picture for each pixel of the window.

        Raises:
            ValueError: the path has another ending, or cannot be written.
            ImportError: the file is a picture, and kaleido is not installed.
            RuntimeError: the file is a picture, and there is no browser to draw it.
        """
        return _save(path, self.html, {"png": lambda: page_image(self.html(), width, scale)})

    def _repr_mimebundle_(self, include: object = None, exclude: object = None, **kwargs: object) -> PlainData:
        bundle: PlainData = {"text/html": self._repr_html_(), "text/plain": repr(self)}
        if "png" in _renderers():
            bundle["image/png"] = b64encode(page_image(self.html(), WIDTH, 2.0)).decode()
        return bundle

    def _repr_html_(self) -> str:
        return self.frame()

    def __repr__(self) -> str:
        return f"HtmlFigure({self.title!r})"


def _save(path: str | Path, html: Callable[[], str], images: Mapping[str, Callable[[], bytes]]) -> Path:
    path = Path(path)
    ending = path.suffix.lower().removeprefix(".")
    if ending == "html":
        return write_whole(path, html())
    if ending not in images:
        endings = ", ".join(f".{name}" for name in ("html", *images))
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'!r}: this figure is saved as one of {endings}")
    image = images[ending]()
    return write_whole(path, lambda place: place.write_bytes(image))


def _frame(html: str, height: int) -> str:
    return (
        f'<iframe srcdoc="{escape(html)}" height="{height}" '
        f'style="width: 100%; border: 0; display: block; color-scheme: light"></iframe>'
    )


def _renderers() -> set[str]:
    """The names of plotly's renderers in use: set by the environment or the user, or detected by plotly."""
    return {name.strip() for name in (pio.renderers.default or "plotly_mimetype").split("+")}


def _in_notebook() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


def _json(figure: Figure) -> object:
    """The figure as a notebook keeps it."""
    return pio.renderers["plotly_mimetype"].to_mimebundle(figure.to_dict())[PLOTLY_MIMETYPE]


# The figure is as wide as a page of text, and on a phone as wide as the screen.
_STYLE = f"""
:root {{ color-scheme: light; }}
body {{ margin: 0; background: {PAPER}; color: {INK}; font-family: {FONT}; }}
body > div {{ max-width: 1100px; margin: 0 auto; padding: 12px; box-sizing: border-box; }}
"""

_PAGE_STYLE = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: {PAPER}; color: {INK}; font: 14px/1.5 {FONT}; }}
main {{ max-width: 1100px; margin: 0 auto; padding: 14px 16px 16px; }}
h1 {{ font-size: 15px; font-weight: 500; margin: 0 0 10px; }}
button {{ font: inherit; color: inherit; cursor: pointer; }}
"""

# Writes the height of the page to the frame around it, where there is one, and to the attribute that screenshots read.
_FIT = """
(() => {
  const root = document.documentElement;
  const fit = () => {
    root.dataset.height = Math.ceil(document.body.getBoundingClientRect().height);
    if (window.frameElement) window.frameElement.style.height = root.dataset.height + "px";
  };
  new ResizeObserver(fit).observe(document.body);
  fit();
})();
"""
