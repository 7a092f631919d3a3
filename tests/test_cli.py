"""The command line, run as a user would."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from typer.testing import CliRunner

import hooked_lm
from hooked_lm.cli import app, report
from hooked_lm.demo import label, run_demo

runner = CliRunner()


def test_version_prints_the_version() -> None:
    run = runner.invoke(app, ["version"])
    assert run.exit_code == 0
    assert run.output.strip() == hooked_lm.__version__


def test_help_answers_without_importing_torch() -> None:
    code = "import sys, hooked_lm.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_demo_writes_the_page_and_the_numbers(tmp_path: Path) -> None:
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    run = runner.invoke(app, ["demo", "--html", str(page), "--json", str(numbers)])
    assert run.exit_code == 0, run.output
    written = json.loads(numbers.read_text())
    assert f"accuracy {written['second_half']['accuracy']:6.1%}" in run.output
    assert "lengths it was never trained on" in run.output
    assert str(page) in run.output
    assert str(numbers) in run.output
    text = page.read_text(encoding="utf-8")
    assert text.count("<section>") == 5
    for head in ("previous_token_head", "induction_head"):
        assert label(tuple(written[head])) in text


def test_without_plotly_demo_gives_the_numbers_and_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find_spec: Callable[..., ModuleSpec | None] = importlib.util.find_spec
    monkeypatch.setattr("hooked_lm.cli.find_spec", lambda name: None if name == "plotly" else find_spec(name))
    page = tmp_path / "page.html"
    run = runner.invoke(app, ["demo", "--html", str(page)])
    assert run.exit_code == 0, run.output
    assert "second half" in run.output
    assert "pip install 'hooked-lm[viz]'" in run.output
    assert not page.exists()


def test_an_unknown_command_fails() -> None:
    assert runner.invoke(app, ["dmeo"]).exit_code == 2


def test_the_report_says_each_number() -> None:
    result = run_demo()
    text = report(result)
    for number in (
        f"{result.first_half.log_prob:7.3f}",
        f"{result.second_half.accuracy:6.1%}",
        f"{result.previous_token_score:.2f} of its attention",
        f"{result.induction_score:.2f} of its attention",
        f"{result.pair_composition:.2f}, the most of all heads in layer 0",
        f"for {result.circuit_accuracy:.1%} of tokens",
        *(f"loss {ablation.loss:6.3f}" for ablation in result.ablations),
        *(f"{length}: {accuracy:.1%}" for length, accuracy in result.accuracy_by_length.items()),
    ):
        assert number in text
