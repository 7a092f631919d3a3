"""Configs of checkpoints: old fields, unknown ones, and code that comes with them."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_lm import CheckpointError, verify
from tests.helpers import tiny_gpt2
from tests.loading_helpers import ASSORTED, edit_json, row_model, row_tokens, unprocessed

# Configs

OLD_ROTARY: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Pythia": (
        "gpt-neox",
        {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
        {"rotary_emb_base": 300, "rotary_pct": 0.5},
    ),
    "Llama 2": ("llama", {"rope_type": "default", "rope_theta": 300.0}, {"rope_theta": 300.0, "rope_scaling": None}),
    "Llama long": (
        "llama",
        {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0},
        {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "Llama 3.1": (
        "llama",
        {
            "rope_type": "llama3",
            "rope_theta": 300.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {
            "rope_theta": 300.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "Phi": (
        "phi",
        {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
        {"rope_theta": 300.0, "partial_rotary_factor": 0.5},
    ),
}


@pytest.mark.parametrize("kind", OLD_ROTARY)
@torch.no_grad()
def test_the_fields_that_old_configs_describe_rotary_positions_with_are_heeded(kind: str, tmp_path: Path) -> None:
    row_id, parameters, old = OLD_ROTARY[kind]
    theirs, tokens = row_model(row_id, rope_parameters=parameters), row_tokens(row_id)
    theirs.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", rope_parameters=..., **old)
    expected = theirs(tokens).logits
    assert (unprocessed(tmp_path)(tokens) - expected).abs().max().item() < 1e-4
    edit_json(tmp_path / "config.json", **dict.fromkeys(old, ...))
    assert (unprocessed(tmp_path)(tokens) - expected).abs().max().item() > 1e-2


def test_an_unknown_rotary_parameter_and_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    row_model("llama").save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 9.0, "twist": 2.0})
    with pytest.raises(CheckpointError, match=r"Llama.*twist"):
        unprocessed(tmp_path)
    edit_json(tmp_path / "config.json", rope_parameters={"rope_type": "spiral", "rope_theta": 9.0})
    with pytest.raises(CheckpointError, match="spiral"):
        unprocessed(tmp_path)


def test_a_config_field_of_no_family_is_refused_by_every_assorted_one(tmp_path: Path) -> None:
    for row_id in ASSORTED:
        row_model(row_id).save_pretrained(tmp_path / row_id)
        edit_json(tmp_path / row_id / "config.json", residual_twist=0.5)
        with pytest.raises(CheckpointError, match=r"'residual_twist': 0\.5.*weight_conversion/families"):
            unprocessed(tmp_path / row_id)


def test_an_unknown_architecture_says_where_to_add_it(gpt2_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "config.json", architectures=["LlamaForCausalLN"], model_type="never heard of")
    with pytest.raises(CheckpointError, match=r"nearest are LlamaForCausalLM.*write a family"):
        unprocessed(tmp_path)


# What would go unnoticed


def test_a_folder_has_no_revisions(gpt2_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no revision 'step1000'"):
        unprocessed(gpt2_folder, revision="step1000")


def test_a_folder_without_a_tokenizer_gives_none_for_a_model_in_memory(tmp_path: Path) -> None:
    """transformers would make one that knows no words."""
    hf = tiny_gpt2()
    hf.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"tokens only.*has none of tokenizer\.json"):
        assert unprocessed(tmp_path, hf_model=hf).tokenizer is None


@pytest.mark.parametrize("argument", [{"revision": "main"}, {"checkpoint_index": 0}, {"checkpoint_value": 0}])
def test_a_model_in_memory_has_no_revisions(argument: dict[str, Any], tokenizer: Any) -> None:
    with pytest.raises(CheckpointError, match=f"hf_model, so {next(iter(argument))}="):
        unprocessed("pythia-70m", hf_model=tiny_gpt2(), tokenizer=tokenizer, **argument)


# Code that comes with a checkpoint


@pytest.fixture
def trapped(gpt2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A checkpoint whose own code would make a file if it ran, with a user who says yes to everything -> (it, file)."""
    folder, trap = tmp_path / "model", tmp_path / "it ran"
    shutil.copytree(gpt2_folder, folder)
    (folder / "code.py").write_text(f"from pathlib import Path\nPath({str(trap)!r}).touch()\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder, trap


@pytest.mark.parametrize("use", [unprocessed, verify])
def test_the_code_of_a_checkpoint_is_not_run_for_its_config(use: Any, trapped: tuple[Path, Path]) -> None:
    folder, trap = trapped
    edit_json(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(CheckpointError, match="code of its own"):
        use(folder)
    assert not trap.exists()


def test_the_code_of_a_checkpoint_is_not_run_for_its_tokenizer(trapped: tuple[Path, Path]) -> None:
    folder, trap = trapped
    edit_json(
        folder / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["code.Mine", "code.Mine"]}
    )
    with contextlib.suppress(CheckpointError):
        unprocessed(folder)
    assert not trap.exists()
