"""The notebooks: each runs from top to bottom, on another model too, and what is stored is what its code gives."""

from __future__ import annotations

import copy
import re
import sys
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from typer.testing import CliRunner

from scripts import run_notebooks
from scripts.run_notebooks import (
    HTML,
    PLOTLY,
    PNG,
    add_pictures,
    differences,
    execute,
    is_figure,
    normalised,
    outputs_of,
)

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
    assert not differences(stored(path), executed(path))


@every_notebook
def test_runs_to_the_end_on_another_model(path: Path, reader_folder: Path) -> None:
    notebook = stored(path)
    cell = first_code(notebook)
    cell.source, switches = SWITCH.subn(lambda _: f"MODEL = {str(reader_folder)!r}", cell.source)
    assert switches == 1
    execute(notebook)


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
WIDGET = """\
class Widget:
    def _repr_html_(self):
        return "<iframe srcdoc='<p>a widget</p>' style='width:100%;height:80px'></iframe>"
Widget()"""


def test_the_kernel_is_this_interpreter_and_draws_figures_as_plotly() -> None:
    done = execute(notebook_of("import sys; print(sys.prefix)", FIGURE, "print(object())"))
    said, figure, thing = (output for _, output in outputs_of(done))
    assert said.text.strip() == sys.prefix
    assert list(figure.data) == [PLOTLY]
    assert thing.text == "<object object>\n"
    assert [cell.get("execution_count") for cell in done.cells] == [None, 1, 2, 3]


def test_progress_bars_are_not_stored_and_warnings_are_refused() -> None:
    bars = [f"from {module} import tqdm\nfor _ in tqdm(range(3)): pass" for module in ("tqdm", "tqdm.auto")]
    assert not list(outputs_of(execute(notebook_of(*bars))))
    with pytest.raises(ValueError, match=r"cell 1 shows what cannot be stored .*beware"):
        execute(notebook_of("import warnings; warnings.warn('beware')"))


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


def test_figures_get_pictures_and_keep_them_while_they_stay_the_same() -> None:
    source = notebook_of(FIGURE, WIDGET, "print(1)")
    done = execute(source)
    add_pictures(done, source)
    plot, widget, said = (output for _, output in outputs_of(done))
    assert plot.data[PNG].startswith("iVBORw0KGgo")
    assert widget.data[PNG].startswith("iVBORw0KGgo")
    assert HTML in widget.data
    assert "data" not in said

    before = copy.deepcopy(done)
    for _, output in outputs_of(before):
        if is_figure(output):
            output.data[PNG] = "as before"
    plot.data[PLOTLY]["data"][0]["y"] = [1.0, 3.0]
    del plot.data[PNG], widget.data[PNG]
    add_pictures(done, before)
    assert plot.data[PNG].startswith("iVBORw0KGgo")
    assert widget.data[PNG] == "as before"


def test_differences_are_found() -> None:
    done = execute(notebook_of(FIGURE, "print(1)", "2"))
    assert differences(done, done) == ["cell 1 has a figure without a picture"]
    for _, output in outputs_of(done):
        if is_figure(output):
            output.data[PNG] = "a picture"
    assert not differences(done, done)
    assert "stores the text\n1" in differences(done, execute(notebook_of(FIGURE, "print(3)", "2")))[0]
    assert "its code gives\n5" in differences(done, execute(notebook_of(FIGURE, "print(1)", "5")))[0]
    assert differences(done, execute(notebook_of("", "print(1)", "2"))) == [
        f"cell 1 stores display_data + {PLOTLY}, and its code gives nothing"
    ]


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
