"""Execute the notebooks and store them with their outputs, figures as plotly and as pictures.

python -m scripts.run_notebooks            # all of them
python -m scripts.run_notebooks 01 03      # those whose names begin so
python -m scripts.run_notebooks --check    # writes nothing; fails where what is stored is not what the code gives

They run in the environment that this runs in, without network. Pictures are taken with Chromium, through playwright.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import sys
import tempfile
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import nbformat
import typer
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from playwright.sync_api import Browser, sync_playwright
from plotly.offline import get_plotlyjs
from tqdm import tqdm

from hooked_lm.files import write_whole

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"

PLOTLY, HTML, PNG = "application/vnd.plotly.v1+json", "text/html", "image/png"
# What tqdm shows where there are widgets.
WIDGET = "application/vnd.jupyter.widget-view+json"
# What a page of text is wide, and how many dots a picture has for each of its points.
WIDTH, DOTS = 860, 2
SECONDS_PER_CELL = 180

_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PROGRESS = re.compile(r"\d+%\||\d+it \[|\d+/\d+ \[")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")


def notebook_paths(names: Sequence[str] = ()) -> list[Path]:
    """Return the notebooks in their order, or those whose names begin as given.

    Raises:
        ValueError: a name that none begins with.
    """
    there = sorted(FOLDER.glob("*.ipynb"))
    unknown = [name for name in names if not any(path.name.startswith(name) for path in there)]
    if unknown:
        raise ValueError(f"no notebook is named {unknown[0]!r}: there are {', '.join(path.stem for path in there)}")
    return [path for path in there if not names or path.name.startswith(tuple(names))]


# Execution


def execute(notebook: NotebookNode) -> NotebookNode:
    """Return the notebook executed from top to bottom in a new kernel, with normalised outputs and no pictures.

    Raises:
        CellExecutionError: a cell fails.
        ValueError: a cell writes to stderr what is no progress bar, such as a warning, or shows another widget.
    """
    fresh = copy.deepcopy(notebook)
    # Without folders to look in there is one kernel, ipykernel's own: the interpreter that this is.
    kernels = KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True)
    with tempfile.TemporaryDirectory() as folder:
        # Through sockets in the folder, not ports of the machine.
        manager = AsyncKernelManager(
            kernel_name="python3", kernel_spec_manager=kernels, transport="ipc", ip=f"{folder}/kernel"
        )
        client = NotebookClient(
            fresh,
            km=manager,
            timeout=SECONDS_PER_CELL,
            record_timing=False,
            store_widget_state=False,
            resources={"metadata": {"path": folder}},
        )
        client.execute(cleanup_kc=True, env=_environment(folder))
    return normalised(fresh)


def _environment(folder: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PLOTLY_RENDERER": "plotly_mimetype",
        "IPYTHONDIR": folder,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # sums in one order
        "PYTHONHASHSEED": "0",
        "PYTHONWARNINGS": "ignore:IProgress not found",
    }


def normalised(notebook: NotebookNode) -> NotebookNode:
    """Return the notebook with nothing in it that changes from run to run or from machine to machine.

    Raises:
        ValueError: there is stderr output or a widget that is no progress bar, or an error.
    """
    cells = [_normalised_cell(cell, number) for number, cell in enumerate(notebook.cells)]
    return nbformat.from_dict({"cells": cells, "metadata": _METADATA, "nbformat": 4, "nbformat_minor": 5})


def _normalised_cell(cell: NotebookNode, number: int) -> dict[str, Any]:
    kept = {"cell_type": cell.cell_type, "id": f"cell-{number:02}", "metadata": {}, "source": cell.source.strip()}
    if cell.cell_type != "code":
        return kept
    outputs: list[NotebookNode] = []
    for output in cell.outputs:
        if output.output_type == "error":
            raise ValueError(f"cell {number} fails with {output.ename}: {output.evalue}")
        if output.output_type == "stream" and output.name == "stderr":
            _check_is_progress(output.text, number)
        elif WIDGET in output.get("data", {}):
            _check_is_progress(output.data["text/plain"], number)
        elif output.output_type == "stream" and outputs and outputs[-1].output_type == "stream":
            outputs[-1].text += output.text
        else:
            outputs.append(_normalised_output(output))
    return {**kept, "execution_count": cell.execution_count, "outputs": outputs}


def _check_is_progress(text: str, number: int) -> None:
    left = [line for line in re.split(r"[\r\n]+", _ESCAPE.sub("", text)) if line.strip() and not _PROGRESS.search(line)]
    if left:
        raise ValueError(f"cell {number} shows what cannot be stored (stderr or a widget): {left[0].strip()!r}")


def _normalised_output(output: NotebookNode) -> NotebookNode:
    output = copy.deepcopy(output)
    if output.output_type == "stream":
        output.text = _ADDRESS.sub("", output.text)
        return output
    output.metadata = {}
    output.data = {
        kind: _ADDRESS.sub("", content) if kind == "text/plain" else content
        for kind, content in sorted(output.data.items())
    }
    return output


# Figures


def outputs_of(notebook: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    """Yield every output with the number of its cell."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            yield number, output


def is_figure(output: Mapping[str, Any]) -> bool:
    """Return whether an output is a figure: plotly's, or a widget in a frame of its own."""
    data = output.get("data", {})
    return PLOTLY in data or ("<iframe" in data.get(HTML, "") and "srcdoc" in data[HTML])


def add_pictures(notebook: NotebookNode, previous: NotebookNode) -> None:
    """Give every figure a PNG, for pages on which nothing moves. Figures that have not changed keep theirs.

    Args:
        notebook: executed; changed in place.
        previous: the notebook as it was before, pictures included.
    """
    known = {_drawing(output): output.data[PNG] for _, output in outputs_of(previous) if _has_picture(output)}
    wanting = [output for _, output in outputs_of(notebook) if is_figure(output)]
    for output in wanting:
        if _drawing(output) in known:
            output.data[PNG] = known[_drawing(output)]
    wanting = [output for output in wanting if PNG not in output.data]
    if wanting:
        with sync_playwright() as playwright:
            path = next(filter(None, map(shutil.which, _BROWSERS)), None)
            browser = playwright.chromium.launch(executable_path=path, args=list(_FLAGS))
            for output in wanting:
                output.data[PNG] = b64encode(_picture(browser, output.data)).decode("ascii")


def _has_picture(output: Mapping[str, Any]) -> bool:
    return is_figure(output) and PNG in output["data"]


def _drawing(output: Mapping[str, Any]) -> str:
    return json.dumps({kind: content for kind, content in output["data"].items() if kind != PNG}, sort_keys=True)


def _picture(browser: Browser, data: Mapping[str, Any]) -> bytes:
    """The screenshot of a figure, on white."""
    page = browser.new_page(viewport={"width": WIDTH, "height": 600}, device_scale_factor=DOTS)
    page.context.set_offline(True)
    try:
        if PLOTLY not in data:
            page.set_content(f"<body style='margin:0'>{data[HTML]}</body>")
            page.wait_for_timeout(500)
            return page.locator("iframe").screenshot()
        page.set_content(f"<body style='margin:0'><div id=figure style='width:{WIDTH}px'></div></body>")
        page.add_script_tag(content=get_plotlyjs())
        draw = "([data, layout, width]) => Plotly.newPlot('figure', data, {width, ...layout}, {staticPlot: true})"
        page.evaluate(f"figure => ({draw})(figure).then(() => null)", [*_parts(data[PLOTLY]), WIDTH])
        return page.locator("#figure .svg-container").screenshot()
    finally:
        page.close()


def _parts(figure: Mapping[str, Any]) -> tuple[Any, Any]:
    return figure["data"], figure["layout"]


# Comparison


def differences(stored: NotebookNode, fresh: NotebookNode) -> list[str]:
    """Return where the outputs that are stored are not those of an execution, a sentence each.

    Texts have to be equal. Of figures it has to be the same kind, and what is stored has to have a picture.
    """
    found = []
    for number, (old, new) in enumerate(zip(stored.cells, fresh.cells, strict=True)):
        before, after = old.get("outputs", []), new.get("outputs", [])
        if list(map(_kinds, before)) != list(map(_kinds, after)):
            found.append(f"cell {number} stores {_named(before)}, and its code gives {_named(after)}")
        elif list(map(_texts, before)) != list(map(_texts, after)):
            found.append(f"cell {number} stores the text\n{_joined(before)}\nand its code gives\n{_joined(after)}")
        found += [
            f"cell {number} has a figure without a picture" for one in before if is_figure(one) and PNG not in one.data
        ]
    return found


def _kinds(output: Mapping[str, Any]) -> list[str]:
    return [output["output_type"], *sorted(kind for kind in output.get("data", {}) if kind != PNG)]


def _named(outputs: Sequence[Mapping[str, Any]]) -> str:
    return ", then ".join(" + ".join(_kinds(output)) for output in outputs) or "nothing"


def _texts(output: Mapping[str, Any]) -> dict[str, str]:
    if output["output_type"] == "stream":
        return {"stdout": output["text"]}
    return {
        kind: content
        for kind, content in output["data"].items()
        if kind.startswith("text/") and not (kind == HTML and is_figure(output))
    }


def _joined(outputs: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(text for output in outputs for text in _texts(output).values())


# The command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    names: Annotated[list[str] | None, typer.Argument(help="How the notebooks' names begin; all by default.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; compare with what is stored.")] = False,
) -> None:
    """Execute the notebooks and store them with their outputs."""
    try:
        paths = notebook_paths(names or ())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    failed = False
    for path in (bar := tqdm(paths, unit="notebook")):
        bar.set_description(path.stem)
        stored = nbformat.read(path, as_version=4)
        fresh = execute(stored)
        if check:
            found = differences(stored, fresh)
            failed = failed or bool(found)
            for difference in found:
                tqdm.write(f"{path.name}: {difference}", file=sys.stderr)
        else:
            add_pictures(fresh, stored)
            write_whole(path, nbformat.writes(fresh).rstrip("\n") + "\n")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
