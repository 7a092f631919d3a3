"""The notebooks: each runs from top to bottom, on another model too, and what is stored is what its code gives."""

from __future__ import annotations

import copy
import re
import sys
from base64 import b64encode
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import nbformat
import numpy as np
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from typer.testing import CliRunner

from hooked_lm import plotting
from scripts import run_notebooks
from scripts.run_notebooks import (
    HTML,
    PLOTLY,
    PNG,
    SHOWN,
    VARYING,
    add_pictures,
    differences,
    execute,
    is_figure,
    kernel,
    normalised,
    outputs_of,
)
from tests.browser import launched

PATHS = run_notebooks.notebook_paths()
SWITCH = re.compile(r'^MODEL = "(?P<name>[^"]+)"  # or .*$', re.MULTILINE)
# Where machines keep things. No output says where it was made.
PLACES = (
    "/home/",
    "/Users/",
    "/root/",
    "/tmp/",
    "/usr/",
    "/opt/",
    "/work/",
    "C:\\\\",
    str(run_notebooks.ROOT),
    sys.prefix,
)

every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def stored(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


@cache
def executed(path: Path) -> NotebookNode:
    return execute(stored(path))


def first_code(notebook: NotebookNode) -> NotebookNode:
    return next(cell for cell in notebook.cells if cell.cell_type == "code")


# Each notebook


def test_the_notebooks_are_numbered_from_one() -> None:
    assert [path.name[:3] for path in PATHS] == [f"{number:02}_" for number in range(1, len(PATHS) + 1)]


@every_notebook
def test_runs_from_top_to_bottom_and_gives_what_is_stored(path: Path) -> None:
    assert not differences(stored(path), executed(path), numbers=path.stem not in VARYING)


@pytest.fixture(scope="module")
def shared_kernel() -> Iterator[AsyncKernelManager]:
    """A kernel for what need not be alone: it has imported what all of them import."""
    with kernel() as manager:
        yield manager


def test_no_notebook_varies_that_is_not_there() -> None:
    assert set(VARYING) <= {path.stem for path in PATHS}


@every_notebook
def test_runs_to_the_end_on_another_model(path: Path, reader_folder: Path, shared_kernel: AsyncKernelManager) -> None:
    notebook = stored(path)
    cell = first_code(notebook)
    cell.source, switches = SWITCH.subn(lambda _: f"MODEL = {str(reader_folder)!r}", cell.source)
    assert switches == 1
    # As in a new kernel: no names of the notebook before, and the modes that notebooks set are as they were.
    notebook.cells.insert(0, new_code_cell("%reset -f\nimport torch\ntorch.set_grad_enabled(True)\ndel torch"))
    execute(notebook, shared_kernel)


@every_notebook
def test_the_first_code_has_the_switch_and_the_rest_reads_it(path: Path) -> None:
    notebook = stored(path)
    switch = SWITCH.search(first_code(notebook).source)
    assert switch is not None
    assert '"gpt2"' in switch.group()
    code = [SWITCH.sub("", cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    assert any(re.search(r"\bMODEL\b", source) for source in code)


@every_notebook
def test_is_stored_in_normal_form(path: Path) -> None:
    notebook = stored(path)
    assert path.read_text(encoding="utf-8") == nbformat.writes(notebook).rstrip("\n") + "\n"
    without_pictures = normalised(notebook)
    assert nbformat.writes(without_pictures) == nbformat.writes(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


@every_notebook
def test_has_figures_that_a_static_page_shows(path: Path) -> None:
    figures = [output for _, output in outputs_of(stored(path)) if is_figure(output)]
    assert len(figures) >= 2
    assert all(PNG in figure.data for figure in figures)


@every_notebook
def test_shows_its_figures_where_html_is_sanitised(path: Path) -> None:
    figures = [output for _, output in outputs_of(stored(path)) if is_figure(output)]
    html, _ = HTMLExporter(sanitize_html=True).from_filename(str(path))
    assert html.count('src="data:image/png') == len(figures)
    assert not re.search("(<|&lt;)iframe|srcdoc", html)


@every_notebook
def test_says_nothing_of_the_machine(path: Path) -> None:
    for number, output in outputs_of(stored(path)):
        said = str(
            {kind: content for kind, content in output.get("data", output).items() if not kind.startswith("image/")}
        )
        assert not [place for place in PLACES if place in said], f"cell {number}"


@every_notebook
def test_is_no_larger_than_a_page_should_be(path: Path) -> None:
    assert path.stat().st_size < 1_500_000


# The runner


def notebook_of(*sources: str) -> NotebookNode:
    return new_notebook(cells=[new_markdown_cell("# A notebook"), *map(new_code_cell, sources)])


FIGURE = """\
import plotly.graph_objects as go
go.Figure(go.Bar(x=["one", "two"], y=[1.0, 2.0]), layout={"height": 200})"""


def test_the_kernel_is_this_interpreter_and_draws_figures_as_plotly() -> None:
    done = execute(notebook_of("import sys; print(sys.prefix)", FIGURE, "print(object())"))
    said, figure, thing = (output for _, output in outputs_of(done))
    assert said.text.strip() == sys.prefix
    assert list(figure.data) == [PLOTLY]
    assert thing.text == "<object object>\n"
    assert [cell.get("execution_count") for cell in done.cells] == [None, 1, 2, 3]


def test_progress_bars_are_not_stored_and_warnings_are_refused(shared_kernel: AsyncKernelManager) -> None:
    loops = [f"from {module} import tqdm\nfor _ in tqdm(range(3)): pass" for module in ("tqdm", "tqdm.auto")]
    assert not list(outputs_of(execute(notebook_of(*loops), shared_kernel)))
    with pytest.raises(ValueError, match=r"cell 1 shows what cannot be stored .*beware"):
        execute(notebook_of("import warnings; warnings.warn('beware')"), shared_kernel)


def test_widgets_that_are_no_progress_bars_are_refused() -> None:
    notebook = notebook_of("slider")
    shown = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "IntSlider(value=0)"}
    notebook.cells[1].outputs = [new_output("display_data", data=shown)]
    with pytest.raises(ValueError, match=r"cell 1 shows what cannot be stored .*IntSlider"):
        normalised(notebook)


def test_normal_form_has_no_times_and_one_stream_where_there_were_several() -> None:
    notebook = notebook_of("print(1)")
    cell = notebook.cells[1]
    cell.metadata = {"execution": {"iopub.execute_input": "2026-01-01T00:00:00Z"}, "collapsed": True}
    cell.outputs = [new_output("stream", name="stdout", text="1\n"), new_output("stream", name="stdout", text="2\n")]
    notebook.metadata = {"kernelspec": {"name": "mine"}, "signature": "x"}
    done = normalised(notebook)
    assert [dict(cell.metadata) for cell in done.cells] == [{}, {}]
    assert [cell.id for cell in done.cells] == ["cell-00", "cell-01"]
    assert [output.text for _, output in outputs_of(done)] == ["1\n2\n"]
    assert dict(done.metadata.kernelspec) == {"display_name": "Python 3", "language": "python", "name": "python3"}
    cell.outputs = [new_output("error", ename="KeyError", evalue="'x'", traceback=[])]
    with pytest.raises(ValueError, match="cell 1 fails with KeyError: 'x'"):
        normalised(notebook)


@pytest.fixture
def browser() -> None:
    """Where there is none the test is skipped, or fails, as those do that look at pages."""
    with launched():
        pass


def outputs_with(*figures: object, said: str = "1") -> NotebookNode:
    """An executed notebook of figures, a cell for each, and a text."""
    notebook = notebook_of(*["" for _ in figures], "")
    for cell, figure in zip(notebook.cells[1:], figures, strict=False):
        cell.outputs = [new_output("display_data", data=figure._repr_mimebundle_())]
    notebook.cells[-1].outputs = [new_output("stream", name="stdout", text=said)]
    return notebook


def with_pictures(notebook: NotebookNode) -> NotebookNode:
    """The notebook as it is stored, without the work: its pictures are a PNG of nothing."""
    nothing = b64encode(b"\x89PNG\r\n\x1a\n").decode()
    before = copy.deepcopy(notebook)
    for _, output in outputs_of(before):
        if is_figure(output):
            output.data[PNG] = nothing
    done = copy.deepcopy(notebook)
    add_pictures(done, before)
    return done


def bars(*values: float, title: str = "Bars") -> plotting.Figure:
    return plotting.ablation_bars([f"part {n}" for n in range(len(values))], values, [False] * len(values), title=title)


def heads(*first: float, tokens: str = "abc") -> plotting.HtmlFigure:
    patterns = np.tile(np.tril(np.full((3, 3), 0.25)), (2, 1, 1))
    patterns[0, 2] = first
    return plotting.attention_heads(patterns, list(tokens), title="Two heads")


def test_figures_get_pictures_and_keep_them_while_they_stay_the_same(browser: None) -> None:
    fresh = outputs_with(bars(1.0, 2.0), heads(0.5, 0.25, 0.25))
    done = copy.deepcopy(fresh)
    add_pictures(done, fresh)
    plot, widget, said = (output for _, output in outputs_of(done))
    assert plot.data[PNG].startswith("iVBORw0KGgo")
    assert widget.data[PNG].startswith("iVBORw0KGgo")
    assert set(widget.data) == {PNG, "text/plain"}
    assert "data" not in said
    assert normalised(done) == normalised(normalised(done))
    kept = [output.get("metadata") for _, output in outputs_of(normalised(done))]
    assert kept == [{}, widget.metadata, None]
    assert set(widget.metadata) == {SHOWN}

    before = copy.deepcopy(done)
    marks = [b64encode(b"\x89PNG\r\n\x1a\n\0" + name).decode() for name in (b"plot", b"widget")]
    for (_, output), mark in zip(outputs_of(before), marks, strict=False):
        output.data[PNG] = mark
    changed = outputs_with(bars(1.0, 3.0), heads(0.5, 0.25, 0.25))
    add_pictures(changed, before)
    pictures = [output.data[PNG] for _, output in outputs_of(changed) if is_figure(output)]
    assert len(pictures[0]) > 1000
    assert pictures[1] == marks[1]


def test_without_a_browser_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match=r"Chrome or Chromium, and BROWSER_PATH is .*none', which is no file"):
        add_pictures(outputs_with(bars(1.0)), notebook_of())


def test_texts_and_kinds_of_output_are_compared() -> None:
    fresh = outputs_with(bars(1.0, 2.0))
    done = with_pictures(fresh)
    assert not differences(done, fresh)
    assert differences(fresh, fresh) == ["cell 1 has a figure without a picture"]
    assert "stores the text\n1\nand its code gives\n3" in differences(done, outputs_with(bars(1.0, 2.0), said="3"))[0]
    nothing = copy.deepcopy(fresh)
    nothing.cells[1].outputs = []
    assert differences(done, nothing) == [
        f"cell 1 stores display_data + {PLOTLY} + text/plain, and its code gives nothing"
    ]
    done.cells[1].outputs[0].data[PNG] = "x"
    assert differences(done, fresh) == ["cell 1 has a figure without a picture"]


OTHER_DATA = ["cell 1 stores a figure of other data than its code gives"]


def test_a_figure_with_other_numbers_is_found_and_rounding_is_not() -> None:
    done = with_pictures(outputs_with(plotting.patching_grid([[1.0, 200.0], [0.5, 1e-9]])))

    def found(*values: float, **options: bool) -> list[str]:
        grid = np.reshape(values, (2, 2))
        return differences(done, outputs_with(plotting.patching_grid(grid)), **options)

    assert found(1.0 + 1e-4, 200.001, 0.5, 2e-9) == []
    assert found(1.1, 200.0, 0.5, 0.0) == OTHER_DATA
    assert found(1.0, 200.0, 0.5, 0.02) == OTHER_DATA
    assert found(7.0, 8.0, 9.0, 1.0, numbers=False) == []


def test_a_figure_with_other_words_or_none_is_found() -> None:
    done = with_pictures(outputs_with(bars(1.0, 2.0)))
    other_layout = bars(1.0, 2.0).update_xaxes(title="nats")
    assert differences(done, outputs_with(other_layout)) == OTHER_DATA
    assert differences(done, outputs_with(bars(1.0, 2.0, 3.0)), numbers=False) == OTHER_DATA
    emptied = copy.deepcopy(done)
    emptied.cells[1].outputs[0].data[PLOTLY]["data"] = []
    for options in ({}, {"numbers": False}):
        assert differences(emptied, outputs_with(bars(1.0, 2.0)), **options) == OTHER_DATA


def test_a_widget_that_shows_something_else_is_found_though_its_page_is_not_stored() -> None:
    done = with_pictures(outputs_with(heads(0.5, 0.25, 0.25)))
    (widget,) = (output for _, output in outputs_of(done) if is_figure(output))
    assert HTML not in widget.data
    assert differences(done, outputs_with(heads(0.50001, 0.25, 0.25))) == []
    assert differences(done, outputs_with(heads(0.25, 0.5, 0.25))) == OTHER_DATA
    assert differences(done, outputs_with(heads(0.25, 0.5, 0.25)), numbers=False) == []
    assert differences(done, outputs_with(heads(0.5, 0.25, 0.25, tokens="abd"))) == OTHER_DATA
    widget.metadata[SHOWN]["numbers"] = ""
    assert differences(done, outputs_with(heads(0.5, 0.25, 0.25)), numbers=False) == OTHER_DATA

    words = with_pictures(outputs_with(plotting.coloured_tokens(["a", "b"], [0.5, 2.0])))
    assert differences(words, outputs_with(plotting.coloured_tokens(["a", "b"], [0.500001, 2.000001]))) == []
    assert differences(words, outputs_with(plotting.coloured_tokens(["a", "b"], [0.6, 2.0]))) == OTHER_DATA
    assert differences(words, outputs_with(bars(1.0))) != []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of notebooks that are not executed yet: one that works and one that fails."""
    monkeypatch.setattr(run_notebooks, "FOLDER", tmp_path)
    nbformat.write(notebook_of("print('fine')"), tmp_path / "01_works.ipynb")
    nbformat.write(notebook_of("print('so far')", "1 / 0"), tmp_path / "02_fails.ipynb")
    return tmp_path


def test_the_command_writes_a_notebook_whole_or_not_at_all(folder: Path) -> None:
    before = (folder / "02_fails.ipynb").read_bytes()
    runner = CliRunner()
    assert runner.invoke(run_notebooks.app, ["01"]).exit_code == 0
    assert "fine" in (folder / "01_works.ipynb").read_text()
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        runner.invoke(run_notebooks.app, ["02"], catch_exceptions=False)
    assert (folder / "02_fails.ipynb").read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {"01_works.ipynb", "02_fails.ipynb"}


def test_the_check_writes_nothing_and_fails_where_outputs_are_not_those_of_the_code(folder: Path) -> None:
    path, runner = folder / "01_works.ipynb", CliRunner()
    before = path.read_bytes()
    run = runner.invoke(run_notebooks.app, ["--check", "01"])
    assert run.exit_code == 1
    assert "01_works.ipynb: cell 1 stores nothing, and its code gives stream" in run.output
    assert path.read_bytes() == before
    runner.invoke(run_notebooks.app, ["01"])
    assert runner.invoke(run_notebooks.app, ["--check", "01"]).exit_code == 0


def test_a_name_that_no_notebook_has_is_refused(folder: Path) -> None:
    run = CliRunner().invoke(run_notebooks.app, ["03"])
    assert run.exit_code == 2
    assert "no notebook is named '03'" in run.output
