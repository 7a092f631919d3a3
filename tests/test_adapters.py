"""PEFT adapters: merged from a folder or from memory, against the adapted model of peft."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hooked_lm import CheckpointError, HookedTransformer, verify
from tests.loading_helpers import edit_json, row_model, row_tokens, unprocessed
from weight_conversion import in_transformers

pytestmark = [
    # peft reads an attribute that this transformers is about to rename.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:the model will read tokens only"),
]

TOKENS = row_tokens("llama")
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


@pytest.fixture
def adapted(peft: Any, tmp_path: Path) -> Any:
    """A Llama with a LoRA that changes its logits; base and adapter are saved beside each other in `tmp_path`."""
    row_model("llama").save_pretrained(tmp_path / "base")
    base = type(row_model("llama")).from_pretrained(tmp_path / "base").eval()
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, 0.0, 0.2)
    model.save_pretrained(tmp_path / "adapter")
    return model


def close(ours: HookedTransformer, theirs: Any) -> bool:
    with torch.no_grad():
        return bool((ours(TOKENS) - theirs(TOKENS).logits).abs().max() < 1e-4)


def test_a_folder_with_an_adapter_is_merged_into_its_base(adapted: Any, tmp_path: Path) -> None:
    ours = unprocessed(tmp_path / "adapter")
    assert close(ours, adapted)
    assert not close(unprocessed(tmp_path / "base"), adapted)


def test_a_merged_model_is_certified(adapted: Any, tmp_path: Path) -> None:
    certificate = verify(tmp_path / "adapter", positions=12)
    assert certificate.passed, certificate


def test_a_peft_model_is_merged_and_left_as_it_was(adapted: Any) -> None:
    before = copy.deepcopy(adapted.state_dict())
    assert close(unprocessed(hf_model=adapted), adapted)
    after = adapted.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_base_can_be_given_beside_the_adapter_s_folder(adapted: Any, tmp_path: Path) -> None:
    base: Any = row_model("llama")
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="/no/such/folder")
    ours = unprocessed(tmp_path / "adapter", hf_model=base)
    assert close(ours, adapted)
    assert not any("lora" in name for name, _ in base.named_parameters())
    assert close(unprocessed(hf_model=base), row_model("llama"))


@pytest.mark.parametrize(("base", "message"), [("/no/such/folder", "no checkpoint '/no/such"), (..., "names no base")])
def test_an_adapter_without_its_base_says_so(adapted: Any, base: Any, message: str, tmp_path: Path) -> None:
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(CheckpointError, match=message):
        unprocessed(tmp_path / "adapter")


def test_a_whole_model_and_an_adapter_in_one_folder_are_refused(tmp_path: Path) -> None:
    row_model("llama").save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    with pytest.raises(CheckpointError, match="weights of a whole model and a PEFT adapter"):
        unprocessed(tmp_path)


def test_a_config_beside_an_adapter_is_no_whole_model(adapted: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter" / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    assert close(unprocessed(tmp_path / "adapter"), adapted)


def test_without_peft_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_transformers, "find_spec", lambda name: None)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    with pytest.raises(CheckpointError, match=r"holds a PEFT adapter.*peft: pip install 'hooked-lm\[peft\]'"):
        unprocessed(tmp_path)


def test_an_adapter_that_changes_no_weights_cannot_be_merged(peft: Any) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(row_model("llama"), config)
    with pytest.raises(CheckpointError, match=r"\(PROMPT_TUNING\) changes the input and not the weights"):
        unprocessed(hf_model=model)


def test_adapters_that_transformers_loaded_itself_are_refused(peft: Any) -> None:
    model: Any = row_model("llama")
    model.add_adapter(peft.LoraConfig(target_modules=TARGETS))
    with pytest.raises(CheckpointError, match="pass the PeftModel of peft instead"):
        unprocessed(hf_model=model)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("row_id", ["llama-biases-tied", "gpt2"])
@pytest.mark.parametrize("end", ["embedding", "unembedding"])
def test_an_adapter_of_one_of_two_tied_ends_leaves_the_other_as_it_was(
    peft: Any, row_id: str, end: str, tmp_path: Path
) -> None:
    row_model(row_id).save_pretrained(tmp_path / "base")
    base = type(row_model(row_id)).from_pretrained(tmp_path / "base").eval()
    target = {"embedding": ["wte", "embed_tokens"], "unembedding": ["lm_head"]}[end]
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    config = peft.LoraConfig(r=3, target_modules=[name for name in target if name in names], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    for ours in (unprocessed(hf_model=model), unprocessed(tmp_path / "adapter")):
        assert close(ours, model)
        assert not ours.cfg.tie_word_embeddings
    assert not close(ours, row_model(row_id))


def test_adapters_that_are_switched_off_are_refused(adapted: Any) -> None:
    with adapted.disable_adapter(), pytest.raises(CheckpointError, match=r"are disabled: enable them, or.*unload\(\)"):
        unprocessed(hf_model=adapted)
    assert close(unprocessed(hf_model=adapted), adapted)


def test_the_model_inside_a_peft_model_is_refused_until_it_is_merged(adapted: Any) -> None:
    with pytest.raises(CheckpointError, match=r"is the model inside a PeftModel.*pass the PeftModel"):
        unprocessed(hf_model=adapted.get_base_model())
    assert close(unprocessed(hf_model=copy.deepcopy(adapted).merge_and_unload()), adapted)
    assert close(unprocessed(hf_model=copy.deepcopy(adapted).unload()), row_model("llama"))
