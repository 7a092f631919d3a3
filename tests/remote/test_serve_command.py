"""`hooked-lm serve`: what it refuses before it loads anything."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hooked_lm.cli import app
from hooked_lm.cli.serve import _is_loopback, _sources


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["serve", *arguments])
    assert done.exit_code == 2, done.output
    return done.output


def test_other_machines_need_tokens(tmp_path: Path) -> None:
    assert "needs --tokens FILE" in refused("demo-tasks-4l", "--host", "0.0.0.0")
    assert "needs --tokens FILE" in refused("demo-tasks-4l", "--host", "models.example.org")
    empty = tmp_path / "tokens.json"
    empty.write_text("{}")
    assert "a file of tokens is" in refused("demo-tasks-4l", "--host", "0.0.0.0", "--tokens", str(empty))
    assert [_is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "10.0.0.1")] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_models_have_names_of_their_own() -> None:
    found = _sources(["demo-tasks-4l", "mine=/models/a", "/models/b"], None, "cpu", "bfloat16", False, 2)
    assert {name: source.name for name, source in found.items()} == {
        "demo-tasks-4l": "demo-tasks-4l",
        "mine": "/models/a",
        "b": "/models/b",
    }
    assert {(source.dtype, source.processing, source.ranks) for source in found.values()} == {("bfloat16", False, 2)}
    assert "two models cannot be served as 'a'" in refused("/models/a", "/other/a")
    assert "no such device" in refused("demo-tasks-4l", "--device", "cuda:99")


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'hooked-lm[server]'" in refused("demo-tasks-4l")


def test_processes_of_a_launcher_serve_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "has started 2 processes" in refused("demo-tasks-4l", "demo-induction-2l")
    assert "has started 2 processes" in refused("demo-tasks-4l", "--ranks", "4")
