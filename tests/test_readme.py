"""Every Python block of the README and of CONTRIBUTING runs, in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


PAGES = ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]


def test_the_file_in_adding_a_family_is_the_file_there_is() -> None:
    shown = python_blocks("docs/adding_a_family.md")[0]
    assert shown == (ROOT / "weight_conversion/families/helium.py").read_text()


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_the_python_blocks_of_a_page_run(page: str) -> None:
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    for block in python_blocks(page):
        exec(compile(block, page, "exec"), namespace)


def test_the_example_of_the_readme_shows_what_it_says() -> None:
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    exec(python_blocks("README.md")[0], namespace)
    assert namespace["ablated"] > namespace["loss"] + 0.5


def test_the_paths_that_the_readme_names_exist() -> None:
    named = re.findall(r"`((?:hooked_lm|weight_conversion|benchmarks)[\w/.]*)`", (ROOT / "README.md").read_text())
    missing = [path for path in named if "/" in path and not (ROOT / path).exists()]
    assert missing == []
