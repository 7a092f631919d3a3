"""Every scenario gives what it gave in the classic library, but for the differences that are meant."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.classic import store
from tests.classic.known import KNOWN, LOOSE, Known, compared
from tests.classic.outcomes import assert_same, here, stored, there
from tests.classic.rules import CONFIGS
from tests.classic.scenario import scenarios, topics

NAMES = [name for topic in topics() for name in scenarios(topic)]
# The interpreter of an environment with the classic library, for who wants its outcomes made anew.
CLASSIC_PYTHON = os.environ.get("CLASSIC_PYTHON")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", NAMES)
def test_a_scenario_gives_what_it_gave_in_the_classic_library(name: str) -> None:
    assert_same(name)


def test_every_scenario_is_stored_and_every_stored_one_is_run() -> None:
    assert [name for topic in topics() for name in stored(topic)] == NAMES
    assert len(CONFIGS) >= 30
    assert len(NAMES) > 700


@pytest.mark.parametrize("topic", topics())
def test_outcomes_say_which_version_gave_them(topic: str) -> None:
    assert store.read(topic)[1].startswith("transformer_lens 3.9.0, torch ")


def test_outcomes_are_small() -> None:
    assert sum(path.stat().st_size for path in store.FOLDER.iterdir()) < 1.5 * 2**20


@pytest.mark.parametrize("one", KNOWN, ids=lambda one: f"{one.why}: {one.scenario} {one.path}")
def test_what_is_left_out_of_the_comparison_does_differ(one: Known) -> None:
    for name in filter(re.compile(one.scenario).fullmatch, NAMES):
        if any(one.covers(name, found.path) for found in store.differences(there(name), here(name))):
            return
    pytest.fail(f"nothing differs at {one.path} of {one.scenario}: compare it")


def test_every_config_acts() -> None:
    """No two configs give the same logits, so that none of their fields could be ignored unseen."""
    found = {name: there(f"models/logits[{name}]")["two prompts"] for name in CONFIGS}
    # To ungroup queries changes what is hooked, not what is computed.
    pairs = [pair for pair in itertools.combinations(found, 2) if set(pair) != {"grouped", "ungrouped"}]
    same = [
        pair for pair in pairs if found[pair[0]].shape == found[pair[1]].shape and torch.allclose(*map(found.get, pair))
    ]
    assert same == []


def test_a_difference_is_found() -> None:
    name = "models/logits[plain]"
    changed = {path: value + 1e-3 if hasattr(value, "shape") else value for path, value in here(name).items()}
    found = store.differences(compared(name, there(name)), compared(name, changed))
    assert len(found) == 4
    assert all("away" in str(one) for one in found)
    assert [str(one) for one in store.differences({"a": 1}, {"b": 1})] == ["  a: is missing here", "  b: is not there"]
    assert set(LOOSE) <= {re.sub(r"\[.*", "", scenario) for scenario in NAMES}


@pytest.mark.skipif(CLASSIC_PYTHON is None, reason="CLASSIC_PYTHON names no interpreter with the classic library")
def test_the_classic_library_gives_the_stored_outcomes_again(tmp_path: Path) -> None:
    assert CLASSIC_PYTHON is not None
    program = [CLASSIC_PYTHON, "-m", "tests.classic.make_reference", str(tmp_path)]
    subprocess.run(program, cwd=ROOT, env={**os.environ, "TQDM_DISABLE": "1"}, check=True, capture_output=True)
    for topic in topics():
        again, _ = store.read(topic, tmp_path)
        assert list(again) == list(stored(topic))
        for name, outcome in again.items():
            tolerance = LOOSE.get(re.sub(r"\[.*", "", name), store.TOLERANCE)
            assert store.differences(stored(topic)[name], outcome, tolerance) == [], name
