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


@pytest.mark.parametrize("page", ["README.md"])
def test_the_python_blocks_of_a_page_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    blocks = python_blocks(page)
    assert blocks
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    assert "without it" in capsys.readouterr().out


def test_the_example_of_the_readme_shows_what_it_says() -> None:
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    exec(python_blocks("README.md")[0], namespace)
    assert namespace["ablated"] > namespace["loss"] + 0.5


def test_the_paths_that_the_readme_names_exist() -> None:
    named = re.findall(r"`((?:hooked_lm|weight_conversion|benchmarks)[\w/.]*)`", (ROOT / "README.md").read_text())
    missing = [path for path in named if "/" in path and not (ROOT / path).exists()]
    assert missing == []
