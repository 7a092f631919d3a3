"""Names that models are loaded by: aliases, folders and the hub, and what is said where nothing is found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

import hooked_lm
from hooked_lm import CheckpointError, HookedTransformer
from tests.gpt2_conversion_helpers import assert_same, tokens
from tests.helpers import VOCAB, tiny_gpt2

# Names


def cache_with(folder: Path, hub_id: str, root: Path) -> None:
    """Lay out a HuggingFace cache that holds one repository."""
    repository = root / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty HuggingFace cache, and no network."""
    root = tmp_path / "hub"
    root.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    return root


@pytest.mark.parametrize(
    ("alias", "hub_id"),
    [
        ("gpt2", "openai-community/gpt2"),
        ("gpt2-small", "openai-community/gpt2"),
        ("gpt2-medium", "openai-community/gpt2-medium"),
        ("gpt2-large", "openai-community/gpt2-large"),
        ("gpt2-xl", "openai-community/gpt2-xl"),
        ("distilgpt2", "distilbert/distilgpt2"),
        ("distillgpt2", "distilbert/distilgpt2"),
        ("someone/their-gpt2", "someone/their-gpt2"),
    ],
)
def test_a_name_stands_for_its_hub_id(alias: str, hub_id: str, gpt2_folder: Path, offline: Path) -> None:
    cache_with(gpt2_folder, hub_id, offline)
    model = HookedTransformer.from_pretrained(alias)
    assert model.cfg.model_name == alias.rpartition("/")[2]
    assert_same(model(tokens()), HookedTransformer.from_pretrained(gpt2_folder)(tokens()), 1e-7)


def test_a_folder_of_that_name_comes_before_the_hub(
    gpt2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: Path
) -> None:
    shutil.copytree(gpt2_folder, tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert HookedTransformer.from_pretrained("gpt2").cfg.n_layers == 3


@pytest.mark.usefixtures("offline")
def test_a_model_that_is_nowhere_offline_raises_and_says_what_was_tried() -> None:
    with pytest.raises(
        CheckpointError, match=r"no checkpoint 'gpt2-small'.*folder .*'openai-community/gpt2'.*hf download"
    ):
        HookedTransformer.from_pretrained("gpt2-small")


@pytest.mark.usefixtures("offline")
def test_a_name_that_no_hub_id_can_have_raises_a_checkpoint_error() -> None:
    with pytest.raises(CheckpointError, match="no checkpoint '/no/such/folder'"):
        HookedTransformer.from_pretrained("/no/such/folder")


def test_with_a_hub_that_does_not_answer_the_error_says_what_was_tried(tmp_path: Path) -> None:
    script = (
        "from hooked_lm import HookedTransformer, CheckpointError\n"
        "try:\n    HookedTransformer.from_pretrained('gpt2')\n"
        "except CheckpointError as error:\n    print(error)"
    )
    # Nothing listens on port 9 of this machine.
    environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "PATH": "", "HOME": str(tmp_path)}
    root = Path(hooked_lm.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, env=environment, check=True
    )
    for part in ("no checkpoint 'gpt2'", "the folder", "openai-community/gpt2", "cache", "hub", "hf download"):
        assert part in done.stdout


def test_a_model_in_memory_without_a_tokenizer_warns_and_reads_tokens_only(offline: Path) -> None:
    with pytest.warns(UserWarning, match="the model will read tokens only"):
        model = HookedTransformer.from_pretrained(str(offline), hf_model=tiny_gpt2())
    assert model.tokenizer is None
    assert model(tokens()).shape == (2, 9, VOCAB)
