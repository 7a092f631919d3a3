"""Configs of checkpoints: old fields, unknown ones, and code that comes with them."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hooked_lm import CheckpointError, verify
from tests.helpers import tiny_gpt2
from tests.loading_helpers import ASSORTED, edit_json, row_model, row_tokens, unprocessed
from weight_conversion.reference import Reference

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


def test_an_unknown_kind_of_rotary_scaling_is_refused(tmp_path: Path) -> None:
    row_model("llama").save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", rope_parameters={"rope_type": "spiral", "rope_theta": 9.0})
    with pytest.raises(CheckpointError, match="spiral"):
        unprocessed(tmp_path)


@pytest.mark.filterwarnings("ignore:.*Unrecognized keys.*")
@torch.no_grad()
def test_a_rotary_parameter_that_transformers_does_not_read_is_kept_with_a_warning(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 9.0, "factor": 2.0, "original_max_position_embeddings": 16}
    theirs = row_model("llama", rope_parameters=yarn)
    theirs.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", rope_parameters={**yarn, "attn_factor": 2.0})
    with pytest.warns(UserWarning, match=r"neither defines nor reads.*\{'attn_factor': 2\.0\}"):
        ours = unprocessed(tmp_path)
    assert (ours(row_tokens("llama")) - theirs(row_tokens("llama")).logits).abs().max().item() < 1e-4


def test_a_rotary_parameter_that_transformers_reads_for_another_scaling_is_refused(tmp_path: Path) -> None:
    row_model("llama").save_pretrained(tmp_path)
    parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0, "attention_factor": 2.0}
    edit_json(tmp_path / "config.json", rope_parameters=parameters)
    with pytest.raises(CheckpointError, match=r"Llama rotary parameters \(linear\).*'attention_factor'"):
        unprocessed(tmp_path)


# Fields that no conversion handles


@torch.no_grad()
def test_a_field_that_transformers_does_not_read_is_kept_with_one_warning_by_every_assorted_family(
    tmp_path: Path,
) -> None:
    for row_id in ASSORTED:
        theirs = row_model(row_id)
        theirs.save_pretrained(tmp_path / row_id)
        edit_json(tmp_path / row_id / "config.json", residual_twist=0.5, neftune_noise_alpha=5, text_config=None)
        with pytest.warns(UserWarning, match="config has fields") as caught:
            ours = unprocessed(tmp_path / row_id)
        (warning,) = caught
        assert "{'neftune_noise_alpha': 5, 'residual_twist': 0.5" in str(warning.message)
        assert ours.origin is not None
        assert ours.origin["residual_twist"] == 0.5
        tokens = row_tokens(row_id)
        assert (ours(tokens) - theirs(tokens).logits).abs().max().item() < 1e-4


# `is_causal` is read where masks are made for all families, `sliding_window` in the key-value cache.
@pytest.mark.parametrize(
    ("row_id", "field", "value"),
    [
        ("llama", "is_causal", False),
        ("llama", "sliding_window", 2),
        ("llama", "per_layer_config", {"0": {"intermediate_size": 3}}),
        ("gpt2", "is_causal", None),
    ],
)
def test_a_field_that_transformers_reads_and_no_rule_handles_is_refused(
    row_id: str, field: str, value: Any, tmp_path: Path
) -> None:
    row_model(row_id).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **{field: value})
    with pytest.raises(CheckpointError, match=rf"'{field}': .*ignore_config_fields=\['{field}'\]"):
        unprocessed(tmp_path)


def test_a_field_that_the_user_asks_to_ignore_is_read_as_if_it_were_not_there_and_recorded(tmp_path: Path) -> None:
    row_model("llama").save_pretrained(tmp_path / "theirs")
    expected = unprocessed(tmp_path / "theirs")
    edit_json(tmp_path / "theirs" / "config.json", sliding_window=2)
    ours = unprocessed(tmp_path / "theirs", ignore_config_fields=["sliding_window"])
    assert torch.equal(ours(row_tokens("llama")), expected(row_tokens("llama")))
    assert ours.origin is not None
    assert (ours.origin["ignore_config_fields"], ours.origin["sliding_window"]) == (["sliding_window"], 2)
    # The record stays with a saved model, and does not go into a config that transformers reads.
    ours.save_pretrained(tmp_path / "own")
    kept = unprocessed(tmp_path / "own").origin
    assert kept is not None
    assert kept["ignore_config_fields"] == ["sliding_window"]
    ours.to_huggingface(tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["sliding_window"] == 2
    assert "ignore_config_fields" not in written


def test_ignoring_a_field_that_is_not_there_raises(gpt2_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ignore_config_fields names \['twist'\], which this config lacks"):
        unprocessed(gpt2_folder, ignore_config_fields=["twist"])
    for given in ("twist", [3], 3):
        with pytest.raises(TypeError, match="ignore_config_fields is a list of names"):
            unprocessed(gpt2_folder, ignore_config_fields=given)
    unprocessed(gpt2_folder).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="own format"):
        unprocessed(tmp_path, ignore_config_fields=["twist"])


class TwistedModel(LlamaForCausalLM):
    """A model of the user's own, under a known name, that reads one more field."""

    def twist(self) -> float:
        return float(self.config.residual_twist)


def test_what_a_model_of_the_users_own_reads_counts_too(tokenizer: Any) -> None:
    config = row_model("llama").config
    config.residual_twist = 0.5
    theirs = type("LlamaForCausalLM", (TwistedModel,), {})(config)
    with pytest.raises(CheckpointError, match=r"'residual_twist': 0\.5"):
        unprocessed("tiny", hf_model=theirs, tokenizer=tokenizer)


def test_the_fields_of_the_reference_are_told_apart() -> None:
    reference = Reference(LlamaConfig)
    assert reference.matters("attention_bias", True)
    assert not reference.matters("attention_bias", False)
    assert reference.matters("num_hidden_layers", 3)
    assert not reference.matters("output_projection", True)
    assert Reference.of_model_type("none such") is None
    # A class whose code cannot be read may read anything.
    assert Reference(type("Own", (LlamaConfig,), {"__module__": "nowhere"})).matters("output_projection", True)


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
