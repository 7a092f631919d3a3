"""Checkpoints saved during training: which there are, and that the hub is asked for the right one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RevisionNotFoundError

from hooked_lm import CheckpointError, HookedTransformer
from tests.family_rows import ROWS
from tests.helpers import tiny_gpt2
from weight_conversion.training_checkpoints import training_checkpoint

unprocessed = HookedTransformer.from_pretrained_no_processing


@pytest.fixture(scope="module")
def neox() -> Any:
    return next(row for row in ROWS if row.id == "gpt-neox").build()


@pytest.fixture
def asked(
    neox: Any, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, str | None]]:
    """A hub that gives the same tiny model for everything -> the (repository, revision) it is asked for."""
    calls: list[tuple[str, str | None]] = []
    folder = tmp_path_factory.mktemp("hub")
    neox.save_pretrained(folder)

    def snapshot_download(repo_id: str, revision: str | None = None, **patterns: Any) -> str:
        calls.append((repo_id, revision))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    # Nothing of these names lies in the working directory.
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    return calls


PYTHIA = "EleutherAI/pythia-70m"


@pytest.mark.parametrize(
    ("arguments", "index", "step"),
    [
        ({"checkpoint_index": 0}, 0, 0),
        ({"checkpoint_index": 1}, 1, 1),
        ({"checkpoint_index": 10}, 10, 512),
        ({"checkpoint_index": 11}, 11, 1000),
        ({"checkpoint_index": 153}, 153, 143_000),
        ({"checkpoint_index": -1}, 153, 143_000),
        ({"checkpoint_index": -154}, 0, 0),
        ({"checkpoint_value": 0}, 0, 0),
        ({"checkpoint_value": 64}, 7, 64),
        ({"checkpoint_value": 3000}, 13, 3000),
        ({"checkpoint_value": 143_000}, 153, 143_000),
    ],
)
@pytest.mark.parametrize("name", ["pythia-70m", PYTHIA])
def test_the_hub_is_asked_for_the_revision_of_a_step(
    name: str, arguments: dict[str, int], index: int, step: int, asked: list[tuple[str, str | None]]
) -> None:
    model = unprocessed(name, first_n_layers=0, **arguments)
    assert asked == [(PYTHIA, f"step{step}")]
    assert (model.cfg.checkpoint_index, model.cfg.checkpoint_value) == (index, step)
    assert model.cfg.from_checkpoint
    assert model.cfg.checkpoint_label_type == "step"
    assert model.cfg.model_name == "pythia-70m"


def test_without_a_step_the_hub_is_asked_for_its_latest(asked: list[tuple[str, str | None]]) -> None:
    model = unprocessed("pythia-70m", first_n_layers=0)
    assert asked == [(PYTHIA, None)]
    assert not model.cfg.from_checkpoint
    assert model.cfg.checkpoint_index is None
    assert model.cfg.checkpoint_value is None


def test_a_revision_is_passed_on_as_it_is(asked: list[tuple[str, str | None]]) -> None:
    model = unprocessed("someone/their-model", revision="v2", first_n_layers=0)
    assert asked == [("someone/their-model", "v2")]
    assert not model.cfg.from_checkpoint


@pytest.mark.usefixtures("asked")
def test_a_step_has_the_weights_that_the_hub_gave_and_is_remembered_on_disk(neox: Any, tmp_path: Path) -> None:
    tokens = torch.arange(3, 13)[None]
    model = unprocessed("pythia-70m", checkpoint_value=512)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), neox(tokens).logits, atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path)
    cfg = unprocessed(tmp_path).cfg
    assert (cfg.from_checkpoint, cfg.checkpoint_index, cfg.checkpoint_value) == (True, 10, 512)


# Which there are


def steps(name: str) -> list[int]:
    """All steps of a model, by asking for one index after the other."""
    found: list[int] = []
    while True:
        try:
            found.append(training_checkpoint(name, len(found), None).value)
        except CheckpointError:
            return found


def test_pythia_has_154_checkpoints_the_first_eleven_spaced_by_powers_of_two() -> None:
    for name in ("pythia-70m", "EleutherAI/pythia-6.9b-deduped", "EleutherAI/pythia-410m-seed3"):
        found = steps(name)
        assert len(found) == 154
        assert found[:12] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
        assert all(late - early == 1000 for early, late in itertools.pairwise(found[11:]))


def test_the_first_version_of_pythia_has_only_every_thousandth_step() -> None:
    assert steps("EleutherAI/pythia-70m-v0") == list(range(1000, 143_001, 1000))
    assert steps("EleutherAI/pythia-1.4b-deduped-v0") == list(range(1000, 143_001, 1000))


def test_the_stanford_models_have_609_checkpoints_each_at_its_own_revision() -> None:
    name = "stanford-crfm/alias-gpt2-small-x21"
    found = steps(name)
    assert len(found) == 609
    assert found == sorted(set(found))
    for index, step in [(0, 0), (9, 90), (10, 100), (48, 2000), (228, 20_000), (608, 400_000)]:
        assert found[index] == step
        assert training_checkpoint(name, None, step).revision == f"checkpoint-{step}"


# Errors


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        (
            "pythia-70m",
            {"checkpoint_index": 154},
            r"pythia-70m has 154 checkpoints.*checkpoint_index=154 is out of range",
        ),
        ("pythia-70m", {"checkpoint_index": -155}, "checkpoint_index=-155 is out of range"),
        ("pythia-70m", {"checkpoint_value": 999}, r"no checkpoint at step 999; the nearest are \[256, 512, 1000\]"),
        ("pythia-70m", {"checkpoint_value": -1}, r"no checkpoint at step -1; the nearest are \[0, 1, 2\]"),
        ("EleutherAI/pythia-70m-v0", {"checkpoint_value": 512}, r"no checkpoint at step 512; the nearest are \[1000"),
        (
            "pythia-70m",
            {"checkpoint_index": 3, "checkpoint_value": 4},
            "checkpoint_index and checkpoint_value each say which checkpoint: give one of them",
        ),
        (
            "pythia-70m",
            {"checkpoint_value": 4, "revision": "main"},
            "checkpoint_value and revision each say which checkpoint",
        ),
        ("gpt2", {"checkpoint_index": 0}, r"gpt2 is of no series .* those are EleutherAI/pythia"),
        ("EleutherAI/gpt-neox-20b", {"checkpoint_value": 1000}, "is of no series"),
    ],
)
def test_a_checkpoint_that_is_none_is_refused_before_the_hub_is_asked(
    name: str, arguments: dict[str, Any], match: str, asked: list[tuple[str, str | None]]
) -> None:
    with pytest.raises(CheckpointError, match=match):
        unprocessed(name, **arguments)
    assert asked == []


@pytest.mark.parametrize("name", ["pythia-70m", PYTHIA])
def test_a_folder_of_a_models_name_is_not_taken_for_one_of_its_steps(
    name: str, neox: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    neox.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert not unprocessed(name).cfg.from_checkpoint
    with pytest.raises(CheckpointError, match=f"{name} is a folder.*no revision 'step1000'"):
        unprocessed(name, checkpoint_value=1000)


def test_a_model_in_memory_is_not_labelled_with_a_step(tokenizer: Any) -> None:
    with pytest.raises(CheckpointError, match="hf_model, so checkpoint_value=1000 would have no effect"):
        unprocessed("pythia-70m", hf_model=tiny_gpt2(), tokenizer=tokenizer, checkpoint_value=1000)


def test_a_step_that_the_hub_does_not_have_says_how_to_fetch_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def snapshot_download(repo_id: str, **arguments: Any) -> str:
        raise RevisionNotFoundError(f"404: {repo_id} has no {arguments['revision']}", response=response)

    response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"hf download EleutherAI/pythia-70m --revision step2000 --local-dir"):
        unprocessed("pythia-70m", checkpoint_value=2000)
