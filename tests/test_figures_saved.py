"""Figures save and show themselves: one file that asks for nothing, a static image, a notebook's output."""

from __future__ import annotations

import copy
import os
import pickle
import struct
import subprocess
import sys
import zlib
from base64 import b64decode
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import plotly.graph_objects as go
import pytest
from nbclient import NotebookClient
from plotly.offline import get_plotlyjs

from hooked_lm import plotting
from hooked_lm.plotting import Figure, HtmlFigure
from hooked_lm.plotting.figure import PLOTLY_MIMETYPE
from hooked_lm.plotting.png import first_rows, written
from hooked_lm.plotting.static import browser_flags, find_browser, page_image
from tests.browser import chromium, gallery, required

FIGURES = gallery()


def scores() -> Figure:
    return plotting.head_scores([[0.25, 0.75]], "A <title>")


def words() -> HtmlFigure:
    return plotting.coloured_tokens(["a", " b"], [1.0, -1.0], title="A <title>")


@pytest.fixture
def with_browser() -> None:
    if chromium() is None:
        (pytest.fail if required() else pytest.skip)("no Chromium or Chrome is installed")


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_every_function_returns_a_figure_that_saves_itself() -> None:
    for name, figure in FIGURES.items():
        kind = HtmlFigure if name.startswith(("attention_heads", "coloured_tokens")) else Figure
        assert type(figure) is kind, name


def test_a_figure_is_plotlys_and_stays_ours_when_it_is_changed_or_copied() -> None:
    figure = scores()
    assert isinstance(figure, go.Figure)
    assert type(figure.update_layout(height=500)) is Figure
    assert type(copy.deepcopy(figure)) is Figure
    assert pickle.loads(pickle.dumps(figure)).to_dict() == figure.to_dict()


# HTML


def test_a_saved_figure_is_one_file_with_plotly_once(tmp_path: Path) -> None:
    path = scores().save(tmp_path / "new" / "scores.html")
    assert path == tmp_path / "new" / "scores.html"
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert page.count(get_plotlyjs()) == 1
    ours = page.replace(get_plotlyjs(), "")
    assert "http" not in ours.replace("http-equiv", "")
    assert "<title>A &lt;title&gt;</title>" in page
    assert "default-src 'none'" in page


def test_a_saved_page_of_our_own_refers_to_nothing(tmp_path: Path) -> None:
    for figure in (words(), FIGURES["attention_heads"]):
        page = figure.save(tmp_path / "page.html").read_text(encoding="utf-8")
        assert "http" not in page.replace("http-equiv", "")
        assert "default-src 'none'" in page
    assert "<h1>A &lt;title&gt;</h1>" in words().html()


@pytest.mark.parametrize(
    ("make", "name", "endings"),
    [
        (scores, "x.gif", "'.gif': this figure is saved as one of .html, .png, .svg, .pdf"),
        (scores, "x", "'nothing': this figure is saved as one of .html"),
        (words, "x.svg", "'.svg': this figure is saved as one of .html, .png"),
    ],
)
def test_another_ending_raises_and_says_which_there_are(
    tmp_path: Path, make: Callable[[], Any], name: str, endings: str
) -> None:
    with pytest.raises(ValueError, match=endings):
        make().save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_raises_and_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="cannot be written"):
        scores().save(tmp_path / "file" / "scores.html")
    assert (tmp_path / "file").read_text() == "kept"


# Static images


@pytest.mark.usefixtures("with_browser")
def test_a_figure_becomes_an_image(tmp_path: Path) -> None:
    figure = scores()
    png = figure.save(tmp_path / "scores.PNG", width=600).read_bytes()
    assert size(png) == (1200, 2 * figure.layout.height)
    svg = figure.save(tmp_path / "scores.svg", width=600).read_text(encoding="utf-8")
    assert svg.startswith('<svg class="main-svg"')
    assert 'width="600"' in svg.partition(">")[0]
    assert ">0.75</text>" in svg
    assert "A &#60;title&#62;" in svg
    assert figure.save(tmp_path / "scores.pdf").read_bytes().startswith(b"%PDF")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.PNG", "scores.pdf", "scores.svg"]


@pytest.mark.usefixtures("with_browser")
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_a_picture_is_painted_to_its_last_row(scale: float) -> None:
    striped = "<body style='margin: 0'><div style='height: 90px; background: #fff'></div><div style='height: 10px; "
    page = f"<!doctype html><html data-height='100'>{striped} background: #f00'></div>"
    below = rows_of(page_image(page, 300, scale))[round(90 * scale) :]
    assert len(below) == round(10 * scale)
    assert all(set(zip(row[::3], row[1::3], row[2::3], strict=True)) == {(255, 0, 0)} for row in below)


def test_the_first_rows_of_a_picture_are_a_picture() -> None:
    header = struct.pack(">IIBBBBB", 2, 3, 8, 0, 0, 0, 0)
    whole = written([(b"IHDR", header), (b"IDAT", zlib.compress(b"\0ab\0cd\0ef")), (b"tEXt", b"kept")])
    cut = first_rows(whole, 2)
    assert size(cut) == (2, 2)
    assert rows_of(cut) == [b"ab", b"cd"]
    assert b"tEXtkept" in cut
    with pytest.raises(ValueError, match="4 rows or more, 8 bits and not interlaced is expected, got 3"):
        first_rows(whole, 4)
    with pytest.raises(ValueError, match="no PNG: it begins with b'GIF8"):
        first_rows(b"GIF89a", 1)


def rows_of(png: bytes) -> list[bytes]:
    """The numbers in each row of a picture of 8-bit RGB or grey, as it is filtered by browsers."""
    width, height = size(png)
    channels = {0: 1, 2: 3}[png[25]]
    parts, place = b"", 8
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        name, content = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        assert png[place + 8 + length : place + 12 + length] == struct.pack(">I", zlib.crc32(name + content))
        parts += content if name == b"IDAT" else b""
        place += 12 + length
    data, long = zlib.decompress(parts), 1 + width * channels
    assert len(data) == height * long
    rows = [bytes(long - 1)]
    for start in range(0, len(data), long):
        row = bytearray(data[start + 1 : start + long])
        for at, above in enumerate(rows[-1]):
            left = row[at - channels] if at >= channels else 0
            corner = rows[-1][at - channels] if at >= channels else 0
            # The neighbour nearest to left + above - corner; of equals, the first.
            nearest = min((left, above, corner), key=lambda value, to=left + above - corner: abs(to - value))
            row[at] = (row[at] + (0, left, above, (left + above) // 2, nearest)[data[start]]) % 256
        rows.append(bytes(row))
    return rows[1:]


def test_an_image_is_drawn_without_the_script_that_kaleido_would_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("kaleido.calc_fig_sync", lambda figure, **options: asked.append(options) or b"image")
    assert scores().save(tmp_path / "x.png").read_bytes() == b"image"
    assert asked[0]["kopts"] == {"mathjax": False}


@pytest.mark.usefixtures("with_browser")
def test_a_page_of_our_own_becomes_a_picture_as_high_as_it_is(tmp_path: Path) -> None:
    narrow = size(FIGURES["attention_heads"].save(tmp_path / "narrow.png", width=400, scale=1.0).read_bytes())
    wide = size(FIGURES["attention_heads"].save(tmp_path / "wide.png").read_bytes())
    assert narrow[0] == 400
    assert wide[0] == 1800
    assert 400 < wide[1] / 2 < narrow[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["narrow.png", "wide.png"]


@pytest.mark.parametrize("make", [scores, words])
def test_without_a_browser_an_image_says_what_to_do_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/nowhere/chrome")
    said = r"Chromium, and BROWSER_PATH is '/nowhere/chrome', which is no file: install one.*kaleido_get_chrome"
    with pytest.raises(RuntimeError, match=said):
        make().save(tmp_path / "x.png")
    monkeypatch.delenv("BROWSER_PATH")
    monkeypatch.setattr("choreographer.browsers.chromium.Chromium.find_browser", lambda **options: None)
    with pytest.raises(RuntimeError, match="Chromium, and none was found: install one"):
        make().save(tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_the_browser_is_the_one_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("choreographer.browsers.chromium.Chromium.find_browser", lambda **options: sys.executable)
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    assert find_browser() == sys.executable
    (tmp_path / "chrome").touch()
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "chrome"))
    assert find_browser() == str(tmp_path / "chrome")


@pytest.mark.parametrize(("user", "without"), [(0, True), (1000, False)])
def test_pages_leave_the_sandbox_only_where_root_draws_them(
    monkeypatch: pytest.MonkeyPatch, user: int, without: bool
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user, raising=False)
    started: list[list[str]] = []

    def refuse(command: list[str], **options: Any) -> Any:
        started.append(command)
        raise OSError("not started")

    monkeypatch.setattr("hooked_lm.plotting.static.find_browser", lambda: "chrome")
    monkeypatch.setattr("subprocess.run", refuse)
    with pytest.raises(OSError, match="not started"):
        words().save("x.png")
    assert ("--no-sandbox" in started[0]) is ("--no-sandbox" in browser_flags()) is without


@pytest.mark.parametrize("make", [scores, words])
def test_without_kaleido_an_image_names_the_extra_and_html_is_saved_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    for name in ("kaleido", "choreographer.errors", "choreographer.browsers.chromium"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'hooked-lm\[png\]', or save .html"):
        make().save(tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
    make().save(tmp_path / "x.html")


def test_plotting_imports_nothing_that_draws_images() -> None:
    code = "import sys, hooked_lm.plotting; sys.exit(bool({'kaleido', 'choreographer', 'IPython'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Notebooks


def outputs(code: str, **environment: str) -> list[dict[str, Any]]:
    """Run a cell in a notebook and return the data of what it puts out."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    # A kernel otherwise writes to the user's own folders.
    env = {**os.environ, "IPYTHONDIR": environment.pop("folder"), **environment}
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute(env=env)
    # A browser that is slow to end has a line about it written to stderr; that is no output of the cell.
    shown = [output for output in notebook.cells[0].outputs if output.get("name") != "stderr"]
    return [output["data"] for output in shown]


CELL = """from IPython.display import display
from hooked_lm import plotting
display(plotting.coloured_tokens(["a"], [1.0]))
plotting.head_scores([[0.25, 0.75]], "A title").show()
plotting.head_scores([[0.25, 0.75]], "A title")"""


def test_a_notebook_holds_the_figure_and_no_link(tmp_path: Path) -> None:
    tokens, shown, last = outputs(CELL, folder=str(tmp_path), PLOTLY_RENDERER="")
    for data in (shown, last):
        assert set(data) == {PLOTLY_MIMETYPE, "text/plain"}
        assert data["text/plain"] == "Figure('A title')"
        assert data[PLOTLY_MIMETYPE]["layout"]["title"]["text"] == "A title"
        assert data[PLOTLY_MIMETYPE]["data"][0]["type"] == "heatmap"
        assert "http" not in str(data)
    assert set(tokens) == {"text/html", "text/plain"}
    assert tokens["text/html"].startswith("<iframe srcdoc=")
    page = unescape(tokens["text/html"].partition('srcdoc="')[2].partition('" height=')[0])
    assert page == plotting.coloured_tokens(["a"], [1.0]).html()


@pytest.mark.usefixtures("with_browser")
def test_a_notebook_holds_an_image_too_if_asked_to(tmp_path: Path) -> None:
    cell = CELL.replace('plotting.head_scores([[0.25, 0.75]], "A title").show()\n', "")
    tokens, last = outputs(cell, folder=str(tmp_path), PLOTLY_RENDERER="plotly_mimetype+png")
    assert set(last) == {PLOTLY_MIMETYPE, "image/png", "text/plain"}
    assert size(b64decode(last["image/png"]))[0] == 1800
    assert set(tokens) == {"text/html", "image/png", "text/plain"}


def test_where_html_is_asked_for_it_holds_plotlys_script_and_not_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plotly.io.renderers.default", "notebook_connected")
    bundle = scores()._repr_mimebundle_()
    page = unescape(bundle["text/html"])
    assert get_plotlyjs() in page
    assert "http" not in page.replace(get_plotlyjs(), "").replace("http-equiv", "")


def test_a_notebooks_numbers_are_those_of_the_figure() -> None:
    values = np.random.default_rng(0).uniform(size=(3, 4))
    kept = plotting.head_scores(values)._repr_mimebundle_()[PLOTLY_MIMETYPE]
    z = kept["data"][0]["z"]
    found = np.frombuffer(b64decode(z["bdata"]), z["dtype"]).reshape(values.shape)
    np.testing.assert_array_equal(found, values)
