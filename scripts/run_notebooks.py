"""Execute the notebooks and store them with their outputs: figures as plotly and as pictures, widgets as pictures.

python -m scripts.run_notebooks            # all of them
python -m scripts.run_notebooks 01 03      # those whose names begin so
python -m scripts.run_notebooks --check    # writes nothing; fails where what is stored is not what the code gives

They run in the environment that this runs in, without network. Pictures are taken with Chrome or Chromium, through
playwright: the one that `BROWSER_PATH` names, or one that is found.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import tempfile
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from html import unescape
from pathlib import Path
from typing import Annotated, Any

import nbformat
import numpy as np
import typer
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbformat import NotebookNode
from playwright.sync_api import Browser, sync_playwright
from plotly.offline import get_plotlyjs
from tqdm import tqdm

from hooked_lm._support.files import write_whole
from hooked_lm.plotting.static import browser_flags, find_browser
from scripts.printed import agree

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"

PLOTLY, HTML, PNG = "application/vnd.plotly.v1+json", "text/html", "image/png"
# What tqdm shows where there are widgets.
WIDGET = "application/vnd.jupyter.widget-view+json"
# What a page of text is wide, and how many dots a picture has for each of its points.
WIDTH, DOTS = 860, 2
SECONDS_PER_CELL = 180
# In which numbers differ from machine to machine: one trains its model anew, one measures errors of rounding.
VARYING = ("07_train_a_toy", "08_any_model")
# The key, in an output's metadata, of what a widget shows.
SHOWN = "shown"

_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PROGRESS = re.compile(r"\d+%\||\d+it \[|\d+/\d+ \[")
# How a PNG begins, in base64.
_SIGNATURE = "iVBORw0KGgo"
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
_SCRIPTS = re.compile(r"<(style|script)>.*?</\1>", re.DOTALL)
_PATTERNS = re.compile(r'"parts": (?P<parts>\d+), "patterns": "(?P<patterns>[^"]*)"')
# What is drawn after the numbers: thumbnails, and the colours of tokens.
_DRAWN = re.compile(r"data:image/png;base64,[^\"]*|#[0-9a-f]{6}")


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


def execute(notebook: NotebookNode, manager: AsyncKernelManager | None = None) -> NotebookNode:
    """Return the notebook executed from top to bottom, with normalised outputs and no pictures.

    Args:
        notebook: as it is stored, or without outputs.
        manager: of a kernel that runs; by default a new one, for this notebook alone.

    Raises:
        CellExecutionError: a cell fails.
        ValueError: a cell writes to stderr what is no progress bar, such as a warning, or shows another widget.
    """
    if manager is None:
        with kernel() as new:
            return execute(notebook, new)
    fresh = copy.deepcopy(notebook)
    client = NotebookClient(fresh, km=manager, timeout=SECONDS_PER_CELL, record_timing=False, store_widget_state=False)
    try:
        client.execute(cleanup_kc=False)
    finally:
        if client.kc is not None:
            client.kc.stop_channels()
    return normalised(fresh)


@contextmanager
def kernel() -> Iterator[AsyncKernelManager]:
    """Yield the manager of a new kernel, in an empty folder; it ends with the block."""
    # Without folders to look in there is one kernel, ipykernel's own: the interpreter that this is.
    kernels = KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True)
    with tempfile.TemporaryDirectory() as folder:
        # Through sockets in the folder, not ports of the machine.
        manager = AsyncKernelManager(
            kernel_name="python3", kernel_spec_manager=kernels, transport="ipc", ip=f"{folder}/kernel"
        )
        run_sync(manager.start_kernel)(cwd=folder, env=_environment(folder))
        try:
            yield manager
        finally:
            run_sync(manager.shutdown_kernel)(now=True)


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
    output.metadata = {SHOWN: output.metadata[SHOWN]} if SHOWN in output.metadata else {}
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
    """Return whether an output is a figure: plotly's, or a widget, in a frame of its own or as it is stored."""
    return PLOTLY in output.get("data", {}) or is_widget(output)


def is_widget(output: Mapping[str, Any]) -> bool:
    """Return whether an output is a widget: a page in a frame, or what is stored of one."""
    html = output.get("data", {}).get(HTML, "")
    return SHOWN in output.get("metadata", {}) or ("<iframe" in html and "srcdoc" in html)


def add_pictures(notebook: NotebookNode, previous: NotebookNode) -> None:
    """Give every figure a PNG, for pages on which nothing moves. Figures that have not changed keep theirs.

    Of a widget only the picture is stored, and what it shows: where frames are forbidden, as on the pages of code
    hosts, its HTML would hide the picture. Who runs the notebook has the widget.

    Args:
        notebook: executed; changed in place.
        previous: the notebook as it was before, pictures included.

    Raises:
        RuntimeError: a picture is wanted, and there is no browser to take it.
    """
    known = {_drawing(output): output.data[PNG] for _, output in outputs_of(previous) if _has_picture(output)}
    figures = [output for _, output in outputs_of(notebook) if is_figure(output)]
    for output in figures:
        if _drawing(output) in known:
            output.data[PNG] = known[_drawing(output)]
    wanting = [output for output in figures if PNG not in output.data]
    if wanting:
        path = find_browser()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=browser_flags())
            for output in wanting:
                output.data[PNG] = b64encode(_picture(browser, output.data)).decode("ascii")
    for output in filter(is_widget, figures):
        output.metadata[SHOWN] = _shown(output)
        output.data.pop(HTML, None)


def _has_picture(output: Mapping[str, Any]) -> bool:
    return is_figure(output) and output["data"].get(PNG, "").startswith(_SIGNATURE)


def _drawing(output: Mapping[str, Any]) -> str:
    return json.dumps(_shown(output) if is_widget(output) else output["data"][PLOTLY], sort_keys=True)


def _shown(output: Mapping[str, Any]) -> dict[str, str]:
    """What a widget shows: the digest of its page without numbers, and the numbers."""
    if SHOWN in output["metadata"]:
        return dict(output["metadata"][SHOWN])
    page = unescape(output["data"][HTML])
    numbers: list[float] = []
    for match in _PATTERNS.finditer(page):
        numbers += (np.frombuffer(b64decode(match["patterns"]), "<u2") / int(match["parts"])).tolist()
    page = _DRAWN.sub("", _PATTERNS.sub("", page))
    numbers += map(float, _NUMBER.findall(_SCRIPTS.sub("", page)))
    return {
        "page": sha256(_NUMBER.sub("0", page).encode()).hexdigest(),
        "numbers": " ".join(f"{number:.4g}" for number in np.round(numbers, 4)),
    }


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


def differences(stored: NotebookNode, fresh: NotebookNode, numbers: bool = True) -> list[str]:
    """Return where the outputs that are stored are not those of an execution, a sentence each.

    Texts have to be equal, but for one in the last digit of a decimal. Figures have to be of the same parts and words,
    their numbers within a hundredth, and what is stored has to have a picture.

    Args:
        stored: with pictures.
        fresh: executed.
        numbers: False where those of figures differ from machine to machine, and the words that are made of them: then
            only how many there are is compared.
    """
    found = []
    for number, (old, new) in enumerate(zip(stored.cells, fresh.cells, strict=True)):
        before, after = old.get("outputs", []), new.get("outputs", [])
        if list(map(_kinds, before)) != list(map(_kinds, after)):
            found.append(f"cell {number} stores {_named(before)}, and its code gives {_named(after)}")
            continue
        if not all(agree(str(_texts(new)), str(_texts(old))) for old, new in zip(before, after, strict=True)):
            found.append(f"cell {number} stores the text\n{_joined(before)}\nand its code gives\n{_joined(after)}")
        figures = [pair for pair in zip(before, after, strict=True) if is_figure(pair[0])]
        if not all(_alike(*pair, numbers) for pair in figures):
            found.append(f"cell {number} stores a figure of other data than its code gives")
        if not all(_has_picture(figure) for figure, _ in figures):
            found.append(f"cell {number} has a figure without a picture")
    return found


def _kinds(output: Mapping[str, Any]) -> list[str]:
    kinds = sorted(kind for kind in output.get("data", {}) if kind != PNG)
    if is_widget(output):
        kinds = ["a widget", *(kind for kind in kinds if kind != HTML)]
    return [output["output_type"], *kinds]


def _alike(stored: Mapping[str, Any], fresh: Mapping[str, Any], numbers: bool) -> bool:
    """Whether two figures of the same kind show the same."""
    (words, values), (new_words, new_values) = map(_content, (stored, fresh))
    same_size = len(words) == len(new_words) and [v.shape for v in values] == [v.shape for v in new_values]
    if not (numbers and same_size):
        return same_size
    return words == new_words and all(map(_close, values, new_values))


def _close(stored: np.ndarray, fresh: np.ndarray) -> bool:
    largest = float(np.nanmax(np.abs(fresh), initial=0.0))
    return np.allclose(stored, fresh, rtol=0.01, atol=1e-3 * min(largest, 1.0) + 1e-6, equal_nan=True)


def _content(figure: Mapping[str, Any]) -> tuple[list[str], list[np.ndarray]]:
    """The words of a figure, and its numbers: an array for each array of it."""
    if is_widget(figure):
        shown = _shown(figure)
        return [shown["page"]], [np.array(shown["numbers"].split(), dtype=float)]
    words: list[str] = []
    arrays: list[np.ndarray] = []

    def take(part: Any) -> None:
        if isinstance(part, Mapping) and "bdata" in part:
            arrays.append(np.frombuffer(b64decode(part["bdata"]), part["dtype"]).astype(float))
        elif isinstance(part, Mapping):
            for name in sorted(part):
                words.append(name)
                take(part[name])
        elif isinstance(part, list) and part and all(one is None or _is_number(one) for one in part):
            arrays.append(np.array(part, dtype=float))
        elif isinstance(part, list):
            words.append(f"{len(part)} parts")
            for one in part:
                take(one)
        elif _is_number(part):
            arrays.append(np.array([part], dtype=float))
        else:
            words.append(str(part))

    take([*_parts(figure["data"][PLOTLY])])
    return words, arrays


def _is_number(part: Any) -> bool:
    return isinstance(part, int | float) and not isinstance(part, bool)


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
            found = differences(stored, fresh, numbers=path.stem not in VARYING)
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
