"""Figures as static images. Needs the extra `png`: kaleido, which drives a Chrome or Chromium on the machine."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from hooked_lm._support.plain_data import PlainData
from hooked_lm.plotting.png import first_rows

__all__ = ["browser_flags", "find_browser", "page_image", "plotly_image"]

_NO_KALEIDO = (
    "a figure becomes an image through kaleido, which is not installed: pip install 'hooked-lm[png]', or save .html"
)
_REMEDY = "install one, or let `kaleido_get_chrome` fetch one, or set BROWSER_PATH to it; .html needs none"
# Extra height of the window, in pixels: more than the browser's own bars, under which a page stays unpainted.
_BARS = 200
# Flags for every page: no background requests of the browser, and no questions to the user.
_FLAGS = (
    *("--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def find_browser() -> str:
    """Return the path of the Chrome or Chromium that images are drawn with: `BROWSER_PATH`, or the one kaleido finds.

    Raises:
        ImportError: kaleido, which finds the browser, is not installed.
        RuntimeError: there is no browser, or `BROWSER_PATH` is no file.
    """
    try:
        from choreographer.browsers.chromium import Chromium
    except ImportError as error:
        raise ImportError(_NO_KALEIDO) from error
    path = os.environ.get("BROWSER_PATH") or Chromium.find_browser(skip_local=False)
    if path is None or not Path(path).is_file():
        raise RuntimeError(_no_browser())
    return str(path)


def browser_flags() -> list[str]:
    """Return the options a browser is started with, besides `--headless`.

    A browser keeps pages in its sandbox, and refuses to when root starts it: only then it goes without.
    """
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    return [*_FLAGS, *(["--no-sandbox"] if is_root else [])]


def _no_browser() -> str:
    named = os.environ.get("BROWSER_PATH")
    found = f"BROWSER_PATH is {named!r}, which is no file" if named else "none was found"
    return f"images are drawn with Chrome or Chromium, and {found}: {_REMEDY}"


def plotly_image(figure: PlainData, ending: str, width: int, height: int, scale: float) -> bytes:
    """Return a plotly figure as an image. It takes about two seconds, most of them the browser's start.

    Args:
        figure: as a dictionary.
        ending: `"png"`, `"svg"` or `"pdf"`.
        width, height: in pixels of the layout.
        scale: pixels of the image for each pixel of the layout.

    Raises:
        ImportError: kaleido is not installed.
        RuntimeError: there is no browser, or it failed.
    """
    try:
        import kaleido
        from choreographer.errors import ChromeNotFoundError
    except ImportError as error:
        raise ImportError(_NO_KALEIDO) from error
    try:
        # Without this option kaleido's page loads the script for formulas from a content network.
        image: bytes = kaleido.calc_fig_sync(
            figure,
            opts={"format": ending, "width": width, "height": height, "scale": scale},
            kopts={"mathjax": False},
        )
        return image
    except ChromeNotFoundError as error:
        raise RuntimeError(_no_browser()) from error


def page_image(html: str, width: int, scale: float) -> bytes:
    """Return a picture (PNG) of a whole HTML document, as high as its content.

    Args:
        html: the document; once it is drawn, `data-height` of its root element is the content's height in pixels.
        width: of the window, in pixels.
        scale: pixels of the image for each pixel of the window.

    Raises:
        ImportError: kaleido, which finds the browser, is not installed.
        RuntimeError: there is no browser, or it failed.
    """
    browser = find_browser()
    with TemporaryDirectory(prefix="hooked-lm-") as folder:
        page, picture = Path(folder) / "page.html", Path(folder) / "page.png"
        page.write_text(html, encoding="utf-8")

        def run(height: int, *options: str) -> str:
            command = [
                *(browser, "--headless", *browser_flags(), "--hide-scrollbars", f"--user-data-dir={folder}/profile"),
                *(f"--force-device-scale-factor={scale}", f"--window-size={width},{height}"),
                *(*options, page.as_uri()),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
            if done.returncode:
                raise RuntimeError(f"{browser} failed: {done.stderr.strip()[-500:]}")
            return done.stdout

        measured = re.search(r'data-height="(\d+)"', run(600, "--dump-dom"))
        if measured is None:
            raise RuntimeError(f"{browser} drew the page, and its height is not in it")
        height = int(measured[1])
        run(height + _BARS, f"--screenshot={picture}")
        return first_rows(picture.read_bytes(), round(height * scale))
