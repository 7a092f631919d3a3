"""The guide for users of the classic library says what is so: each row's code runs here, and there where it is found.

With the path of a Python that has the classic library 3.9.0 in `HOOKED_LM_CLASSIC_PYTHON`, the stored numbers are made
anew there and compared.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hooked_lm import compat

ROOT = Path(__file__).parents[1]
THERE: dict[str, Any] = json.loads((ROOT / "tests/downstream/guide.json").read_text())
CLASSIC_PYTHON = os.environ.get("HOOKED_LM_CLASSIC_PYTHON")


def rows_of_the_page() -> dict[str, tuple[str, str]]:
    """Return the second and third cell of each row of the guide's tables, by the first."""
    found = {}
    for line in (ROOT / "docs/migrating.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and cells[0] != "there":
            first, second, third = (*cells, "")[:3]
            found[first] = (second, third.strip("|").strip())
    return found


PAGE = rows_of_the_page()


@pytest.fixture(scope="module")
def guide() -> Iterator[ModuleType]:
    """The code of the rows, which imports `transformer_lens`, with this library in its place."""
    compat.install()
    yield importlib.import_module("tests.downstream.guide")
    compat.uninstall()
    for name in [name for name in sys.modules if name.startswith("tests.downstream.")]:
        del sys.modules[name]


def agree(found: Any, expected: Any) -> bool:
    """Whether two nested lists of numbers and texts are the same, up to rounding."""
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(agree, found, expected))
    if isinstance(found, (int, float)) and isinstance(expected, (int, float)):
        return isinstance(found, bool) == isinstance(expected, bool) and abs(found - expected) < 1e-5
    return bool(found == expected)


def test_every_row_of_the_guide_has_its_code(guide: ModuleType) -> None:
    held = {*guide.ROWS, *guide.NOT_RUN, *guide.HELD_BY_THE_CLASSIC_SUITE}
    assert set(PAGE) - held == set(), "add code for these rows to tests/downstream/guide.py"
    assert {*guide.ROWS, *guide.NOT_RUN} - set(PAGE) == set(), "these rows are not in docs/migrating.md"
    assert set(guide.ROWS) == set(THERE)


@pytest.mark.filterwarnings("ignore:this tokenizer has no BOS token")
@pytest.mark.parametrize("cell", THERE)
def test_a_row_of_the_guide_is_so(guide: ModuleType, cell: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = guide.ROWS[cell]
    if row.same:
        found = guide.as_plain(row.run())
        assert agree(found, THERE[cell]), f"here {found}, there {THERE[cell]}"
        return
    second, third = PAGE[cell]
    assert third or second != "the same", "the guide does not say what differs"
    try:
        found = guide.as_plain(row.run())
    except (AttributeError, TypeError, ValueError) as error:
        found = str(error)
    assert not agree(found, THERE[cell]), "the guide names a difference, and there is none"


@pytest.mark.skipif(CLASSIC_PYTHON is None, reason="HOOKED_LM_CLASSIC_PYTHON is not set")
@pytest.mark.parametrize(("module", "stored"), [("guide", "guide.json"), ("recipes", "reference.json")])
def test_the_classic_library_gives_what_is_stored(module: str, stored: str, tmp_path: Path) -> None:
    command = [str(CLASSIC_PYTHON), "-m", f"tests.downstream.{module}", str(tmp_path / stored)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, expected = (json.loads((folder / stored).read_text()) for folder in (tmp_path, ROOT / "tests/downstream"))
    assert {name for name in expected if not agree(found.get(name), expected[name])} == set()
    assert set(found) == set(expected)
