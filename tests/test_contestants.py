"""The benchmark's contestants: what is timed and in which state, and their processes."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.measurements import MINIMAL, OURS, TRANSFORMERS
from benchmarks.peers import process
from benchmarks.peers.contestant import Contestant, Served, Task
from benchmarks.peers.plain_transformers import Plain
from benchmarks.peers.process import start_peer
from benchmarks.runner import import_seconds

TOKENS = torch.tensor([[1, 2], [3, 4]])
MEGABYTE = 2**20


class Watched(Contestant):
    """Notes in which state it is asked to run."""

    size = 2

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[dict[str, bool]] = []

    def load_model(self, folder: Path, way: str) -> nn.Module:
        return nn.Linear(self.size, self.size, bias=False)

    def logits(self, model: Any, tokens: Tensor) -> Tensor:
        self.runs.append({"collects": gc.isenabled(), "inference": torch.is_inference_mode_enabled()})
        return model(tokens.float())

    def tasks(self) -> Mapping[str, Callable[..., Task]]:
        return {"learned": lambda: Task(lambda: self.logits(self.model, TOKENS), lambda x: {"x": x}, gradients=True)}


@pytest.fixture
def served() -> Iterator[Served]:
    threads = torch.get_num_threads()
    yield Served(Watched())
    torch.set_num_threads(threads)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(process.PEERS, "fake", "tests.fake_contestant")


# What is timed


def test_everybody_uses_as_many_threads_as_he_is_told(served: Served) -> None:
    versions = served.begin(threads=3)
    assert torch.get_num_threads() == 3
    assert versions["torch"] == torch.__version__


def test_everybody_computes_where_and_in_the_precision_that_he_is_told(served: Served, tmp_path: Path) -> None:
    try:
        served.begin(threads=1, device="meta", dtype="bfloat16")
        served.load("anywhere")
        weight = served.contestant.model.weight
        assert (weight.device.type, weight.dtype) == ("meta", torch.bfloat16)
        assert torch.tensor([1]).device.type == "meta"
    finally:
        torch.set_default_device(None)


def test_a_loaded_model_is_frozen(served: Served) -> None:
    served.load("anywhere")
    assert not any(parameter.requires_grad for parameter in served.contestant.model.parameters())


def test_a_task_is_done_once_before_its_turns_and_its_values_are_written(served: Served, tmp_path: Path) -> None:
    served.load("anywhere")
    into = tmp_path / "values"
    assert served.prepare("slot", "forward", str(into), {"tokens": TOKENS.tolist()}) == {"held": None}
    assert len(served.contestant.runs) == 1  # type: ignore[attr-defined]
    assert torch.equal(load_file(into)["logits"], served.contestant.model(TOKENS.float()))
    assert served.prepare("slot", "no such task", str(into), {}) is None


@pytest.mark.parametrize(("number", "runs"), [(1, 1), (4, 5)])
def test_garbage_is_collected_before_a_turn_and_not_in_it(
    served: Served, tmp_path: Path, number: int, runs: int
) -> None:
    served.load("anywhere")
    served.prepare("slot", "forward", str(tmp_path / "values"), {"tokens": TOKENS.tolist()})
    contestant: Any = served.contestant
    contestant.runs.clear()
    assert served.run("slot", number) > 0
    timed = [{"collects": False, "inference": True}] * number
    # Short ones are run once more, to warm up.
    assert contestant.runs == [{"collects": True, "inference": True}] * (runs - number) + timed
    assert gc.isenabled()


def test_what_is_differentiated_runs_with_gradients(served: Served, tmp_path: Path) -> None:
    served.load("anywhere")
    served.prepare("slot", "learned", str(tmp_path / "values"), {})
    assert served.contestant.runs[-1]["inference"] is False  # type: ignore[attr-defined]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says how much memory was used")
def test_the_peak_is_that_of_loading_and_not_of_what_was_before(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watched, "size", 4096)
    before = torch.ones(100 * MEGABYTE)  # 400 MB, and gone
    del before
    found = served.peak("anywhere", "anywhere", "unprocessed")
    assert found is not None
    assert found["own"] == 64 * MEGABYTE
    assert 60 * MEGABYTE < found["peak"] < 200 * MEGABYTE
    assert served.peak("anywhere", "anywhere", "processed") is None


def test_transformers_fills_no_key_value_cache_in_a_forward_pass() -> None:
    class Model:
        def __call__(self, tokens: Tensor, **options: Any) -> Any:
            self.options = options
            return self

        logits = torch.zeros(1)

    model = Model()
    Plain().logits(model, TOKENS)
    assert model.options == {"use_cache": False}


# Processes


@pytest.mark.usefixtures("fake")
def test_what_a_peer_prints_is_no_reply_and_its_end_is_an_end() -> None:
    with start_peer("fake") as peer:
        assert peer.ask("load", folder="anywhere") is None
        number = peer.ask("pid")
        assert number != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


@pytest.mark.usefixtures("fake")
def test_a_peer_that_fails_says_how_and_goes_on() -> None:
    with start_peer("fake") as peer:
        with pytest.raises(RuntimeError, match=r"fake could not fail:\n(.*\n)*ValueError: no such luck"):
            peer.ask("fail")
        assert isinstance(peer.ask("pid"), int)


@pytest.mark.usefixtures("fake")
def test_a_peer_that_dies_is_heard_whenever_it_is_asked_again() -> None:
    with start_peer("fake") as peer:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"fake died when asked to die:\n(.*\n)*my last words"):
                peer.ask("die")


@pytest.mark.usefixtures("fake")
def test_a_peer_is_ended_when_something_goes_wrong_here() -> None:
    numbers: list[int] = []

    def go_wrong() -> None:
        with start_peer("fake") as peer:
            numbers.append(peer.ask("pid"))
            raise KeyError("here")

    with pytest.raises(KeyError, match="here"):
        go_wrong()
    with pytest.raises(ProcessLookupError):
        os.kill(numbers[0], 0)


def test_an_import_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="No module named 'nothing_of_that_name'"):
        import_seconds(sys.executable, "import nothing_of_that_name")


def test_fresh_interpreters_import_load_and_say_their_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.__main__.torch.set_num_threads", lambda n: None)
    found, options = tmp_path / "results.json", []
    names = ("import", "from nothing to a tiny model", "load, unprocessed: peak memory")
    for name in names:
        options += ["--only", name]
    done = CliRunner().invoke(app, ["--quick", "--threads", "1", "--json", str(found), *options])
    assert done.exit_code == 0, done.output
    imported, started, peak = json.loads(found.read_text())["results"]
    for result in (imported, started):
        assert set(result["values"]) == {OURS, TRANSFORMERS}
        assert all(0 < seconds < 60 for (seconds,) in result["values"].values())
        assert MINIMAL not in result["values"]
    # Whoever starts imports too, and torch besides.
    assert all(started["values"][name][0] > imported["values"][name][0] for name in started["values"])
    assert {OURS, "the model's own bytes"} <= set(peak["values"])
