"""Multimodal checkpoints: their text part, from a folder and from a model in memory, against the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hooked_lm import CheckpointError, HookedTransformer, verify
from tests.helpers import tiny_tokens
from tests.loading_helpers import edit_json, unprocessed
from tests.multimodal_helpers import CONFIGS, multimodal_model
from weight_conversion.multimodal import MULTIMODAL

# Above the first ids, which stand for pictures and padding in some of these configs.
TOKENS = tiny_tokens(batch=2, pos=12, vocab=40) + 5
every_kind = pytest.mark.parametrize("architecture", sorted(CONFIGS))


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Some of these configs have special tokens outside a tiny vocabulary, which transformers logs."""
    transformers.utils.logging.set_verbosity_error()


def close(ours: HookedTransformer, theirs: Any, tolerance: float = 1e-4) -> bool:
    with torch.no_grad():
        return bool((ours(TOKENS) - theirs(TOKENS).logits).abs().max() < tolerance)


def test_every_kind_that_is_loaded_is_compared() -> None:
    assert set(CONFIGS) == MULTIMODAL


@every_kind
def test_the_text_part_in_a_folder_has_the_logits_of_the_whole_model(architecture: str, tmp_path: Path) -> None:
    theirs = multimodal_model(architecture)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"of this {architecture} only the text decoder is loaded.*are left out"):
        ours = unprocessed(tmp_path)
    assert close(ours, theirs)


@every_kind
def test_the_text_part_of_a_model_in_memory_has_its_logits(architecture: str, tokenizer: Any) -> None:
    theirs = multimodal_model(architecture)
    with pytest.warns(UserWarning, match="only the text decoder"):
        ours = unprocessed(hf_model=theirs, tokenizer=tokenizer)
    assert close(ours, theirs)


@every_kind
def test_in_float64_the_text_part_is_as_close_as_rounding_in_the_reference_allows(
    architecture: str, tokenizer: Any
) -> None:
    theirs = multimodal_model(architecture).double()
    with pytest.warns(UserWarning, match="only the text decoder"):
        ours = unprocessed(hf_model=theirs, tokenizer=tokenizer, dtype=torch.float64)
    assert close(ours, theirs, 2e-5)


def test_the_decoder_s_own_soft_cap_is_left_out_where_the_whole_model_has_none(tokenizer: Any) -> None:
    theirs = multimodal_model("Gemma3ForConditionalGeneration")
    theirs.config.text_config.final_logit_softcapping = 0.5
    with pytest.warns(UserWarning, match="only the text decoder"):
        ours = unprocessed(hf_model=theirs, tokenizer=tokenizer)
    assert theirs(TOKENS).logits.abs().max() > 0.5
    assert close(ours, theirs)


@pytest.mark.parametrize("old_prefix", ["language_model.model.", "model.language_model."])
def test_both_names_that_files_give_the_decoder_s_tensors_are_read(old_prefix: str, tmp_path: Path) -> None:
    theirs = multimodal_model("LlavaForConditionalGeneration")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("language_model.model.", old_prefix): value for name, value in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="multi_modal_projector, vision_tower"):
        assert close(unprocessed(tmp_path), theirs)


def test_a_tensor_that_is_of_no_part_is_surplus(tmp_path: Path) -> None:
    multimodal_model("LlavaForConditionalGeneration").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "audio_tower.weight": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    unknown = pytest.raises(CheckpointError, match=r"no rule accounts for: audio_tower\.weight")
    with pytest.warns(UserWarning, match="only the text decoder"), unknown:
        unprocessed(tmp_path)


def test_a_decoder_of_no_supported_kind_is_named(tmp_path: Path) -> None:
    multimodal_model("LlavaForConditionalGeneration").save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    edit_json(tmp_path / "config.json", text_config={**text, "model_type": "opt"})
    with pytest.raises(CheckpointError, match="text decoder is of the kind 'opt'"):
        unprocessed(tmp_path)


def test_far_more_layers_than_tensors_are_refused_before_the_config_is_made(tmp_path: Path) -> None:
    multimodal_model("Gemma3ForConditionalGeneration").save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    edit_json(tmp_path / "config.json", text_config={**text, "num_hidden_layers": 10**9})
    with pytest.raises(CheckpointError, match="num_hidden_layers=1000000000"):
        unprocessed(tmp_path)


@torch.no_grad()
def test_the_text_part_goes_back_as_a_model_of_the_decoder_s_own_class(tmp_path: Path) -> None:
    theirs = multimodal_model("AyaVisionForConditionalGeneration")
    theirs.save_pretrained(tmp_path / "whole")
    with pytest.warns(UserWarning, match="only the text decoder"):
        ours = unprocessed(tmp_path / "whole")
    ours.to_huggingface(tmp_path / "text")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", attn_implementation="eager").eval()
    assert type(again).__name__ == "Cohere2ForCausalLM"
    assert (again(TOKENS).logits - theirs(TOKENS).logits).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:of this")
@pytest.mark.parametrize("architecture", ["Gemma3ForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"])
def test_the_certificate_compares_the_text_part_with_the_whole_model(architecture: str, tmp_path: Path) -> None:
    multimodal_model(architecture).save_pretrained(tmp_path)
    certificate = verify(tmp_path, positions=12)
    assert certificate.passed, certificate
    assert certificate.architecture == architecture
