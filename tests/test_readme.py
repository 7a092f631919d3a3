"""Every Python block of the README, of CONTRIBUTING and of the documentation runs, and prints what is shown below it.

The blocks of a page run in order, in one namespace. A text block right after a Python block is what that printed.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from hooked_lm import compat, metrics, patching, tasks
from hooked_lm.circuits import heads
from hooked_lm.config import activations as config_activations
from scripts.printed import agree
from scripts.readme_figure import draw
from weight_conversion import registry

ROOT = Path(__file__).parents[1]

_BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```$(?:\n\n^```text\n(?P<shown>.*?)^```$)?", flags=re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    """A Python block, and what the page says it prints (None if it does not say)."""

    code: str
    shown: str | None


def python_blocks(page: str) -> list[Block]:
    return [Block(match["code"], match["shown"]) for match in _BLOCK.finditer((ROOT / page).read_text())]


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md"))),
]


@pytest.fixture(autouse=True)
def grad_mode_as_it_was() -> Iterator[None]:
    """A page may turn gradients off for all of itself."""
    with torch.enable_grad():
        yield


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page writes lands in no checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def registries_as_they_were() -> Iterator[None]:
    """What a page registers is gone after it."""
    registries: tuple[dict[Any, Any], ...] = (
        config_activations.ACTIVATION_FUNCTIONS,
        heads.DETECTION_PATTERNS,
        metrics._MAKERS,
        patching.GRIDS,
        patching.PATCHES,
        registry._BY_ARCHITECTURE,
        tasks.TASKS,
    )
    before = [dict(one) for one in registries]
    yield
    compat.uninstall()
    for one, entries in zip(registries, before, strict=True):
        one.clear()
        one.update(entries)


def run(page: str) -> Iterator[tuple[Block, str, dict[str, Any]]]:
    """Run a page's blocks; yield each with what it printed and the namespace as it then is."""
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    for number, block in enumerate(python_blocks(page)):
        printed, name = io.StringIO(), f"<{page}, block {number}>"
        # So that the source of what a block defines can be read, as that of a notebook's cell can.
        linecache.cache[name] = (len(block.code), None, block.code.splitlines(keepends=True), name)
        with contextlib.redirect_stdout(printed):
            exec(compile(block.code, name, "exec", dont_inherit=True), namespace)
        yield block, printed.getvalue(), namespace


@pytest.mark.parametrize(
    ("printed", "same"),
    [("loss 5.54", True), ("loss 5.55", True), ("loss 5.56", False), ("loss 5.540", False), ("lost 5.54", False)],
)
def test_shown_numbers_may_differ_by_one_in_the_last_digit_and_nothing_else(printed: str, same: bool) -> None:
    assert agree(printed, "loss 5.54") is same
    assert not agree("head 2", "head 1")


def test_the_file_in_adding_a_family_is_the_file_there_is() -> None:
    shown = python_blocks("docs/adding_a_family.md")[0].code
    assert shown == (ROOT / "weight_conversion/families/helium.py").read_text()


def test_no_block_is_missed() -> None:
    for page in PAGES:
        assert len(python_blocks(page)) == (ROOT / page).read_text().count("```python"), page


# torch imports its own forward-mode rules at the first `jvp` (docs/howto/derivatives.md).
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_the_python_blocks_of_a_page_run_and_print_what_is_shown(page: str) -> None:
    for block, printed, _ in run(page):
        assert block.shown is None or agree(printed, block.shown), f"printed:\n{printed}\nshown:\n{block.shown}"


def test_the_figure_of_the_readme_shows_what_is_said_of_it() -> None:
    by_position, by_head = (np.asarray(trace.z) for trace in draw().data)
    giver = 10  # the position of the second "John"
    assert by_position[0].argmax() == giver
    assert by_position[0, giver] == pytest.approx(1.0, abs=1e-4)
    assert np.unravel_index(by_head.argmax(), by_head.shape) == (0, 4)
    assert by_head[0, 4] > 2 * np.partition(by_head.flatten(), -2)[-2]


def test_the_paths_that_the_readme_names_exist() -> None:
    named = re.findall(r"`((?:hooked_lm|weight_conversion|benchmarks)[\w/.]*)`", (ROOT / "README.md").read_text())
    missing = [path for path in named if "/" in path and not (ROOT / path).exists()]
    assert missing == []
