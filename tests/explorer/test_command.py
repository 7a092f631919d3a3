"""`hooked-lm explore`: it says where the page is, and what it cannot open."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from hooked_lm.cli import app
from hooked_lm.cli.explore import _loaded
from tests.remote_helpers import saved_model

ROOT = Path(__file__).parents[2]


def test_the_command_serves_the_page_until_it_is_interrupted() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "hooked_lm.cli", "explore", "demo-induction-2l", "--port", "0", "--no-open"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.fullmatch(r"Exploring demo-induction-2l at (http://127\.0\.0\.1:\d+)\. Ctrl-C ends it\.\n", line)
        assert found, line
        assert "<title>hooked_lm explorer</title>" in httpx.get(found[1]).text
        card = httpx.get(f"{found[1]}/api/model").json()
        assert (card["name"], card["reads_text"]) == ("demo-induction-2l", False)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode in (0, -signal.SIGINT, 130)


def test_a_port_that_is_taken_is_an_error_of_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["explore", "demo-induction-2l", "--port", port, "--no-open"])
    assert result.exit_code == 2
    assert f"--port {port}" in result.output
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [("nowhere/at/all", "nowhere/at/all"), ("http://127.0.0.1:9", "a model on a server is http://HOST/NAME")],
)
def test_a_model_that_is_not_there_is_an_error_of_one_line(given: str, message: str) -> None:
    result = CliRunner().invoke(app, ["explore", given, "--no-open"])
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1


def test_a_model_is_loaded_from_where_it_is_and_the_python_says_how(tmp_path: Path) -> None:
    saved_model(tmp_path / "model", n_layers=1)
    model, name, load = _loaded(str(tmp_path / "model"), "cpu", "float64", None, False, None)
    assert name == str(tmp_path / "model")
    assert load.endswith(f'model = HookedTransformer.from_pretrained_no_processing("{name}", dtype="float64")')
    assert str(model.cfg.dtype) == "torch.float64"
