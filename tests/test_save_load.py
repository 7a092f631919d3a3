"""A model saved is a model got back, bit for bit."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hooked_lm import CheckpointError, HookedTransformer
from hooked_lm.weights import STEPS
from tests.architectures_helpers import LATENT
from tests.helpers import VOCAB, tiny_config, tiny_model, tiny_tokens

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped rotary": {"n_key_value_heads": 1, "positional_embedding_type": "rotary", "normalization_type": "RMS"},
    "latent attention": LATENT,
    "experts": {"num_experts": 3, "experts_per_token": 2, "gated_mlp": True},
    "attention only": {"attn_only": True, "act_fn": None, "normalization_type": None},
    "solu_ln": {"act_fn": "solu_ln"},
    "solu_ln rms": {"act_fn": "solu_ln", "normalization_type": "RMS"},
    "final rms": {"final_rms": True},
    "norms before and after": {"use_normalization_before_and_after": True, "post_embedding_ln": True},
}


def assert_same_bits(one: HookedTransformer, other: HookedTransformer) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert value.dtype is other.state_dict()[name].dtype, name
        assert torch.equal(value, other.state_dict()[name]), name
    assert torch.equal(one(tiny_tokens()), other(tiny_tokens()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processed", [False, True])
def test_a_saved_model_comes_back_bit_for_bit(kind: str, processed: bool, tmp_path: Path) -> None:
    model = tiny_model(**KINDS[kind])
    if processed:
        model.process_weights_()
    model.save_pretrained(tmp_path)
    steps = {} if processed else dict.fromkeys(STEPS, False)
    loaded = HookedTransformer.from_pretrained(tmp_path, **steps)
    assert_same_bits(model, loaded)
    assert loaded.processed == model.processed
    same = {"model_name": "", "init_weights": True}
    assert loaded.cfg.replace(**same) == model.cfg.replace(**same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_precision_of_a_model_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    loaded = HookedTransformer.from_pretrained_no_processing(tmp_path)
    assert loaded.cfg.dtype is dtype
    assert_same_bits(model, loaded)


def test_a_processed_bfloat16_model_comes_back(tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    model.process_weights_()
    model.save_pretrained(tmp_path)
    assert_same_bits(model, HookedTransformer.from_pretrained(tmp_path))


def test_processing_that_a_saved_model_has_been_through_is_not_repeated(tmp_path: Path) -> None:
    model = tiny_model()
    model.center_unembed()
    with torch.no_grad():
        # If centring were done again, this would be undone.
        model.unembed.W_U.add_(1.0)
    model.save_pretrained(tmp_path)
    loaded = HookedTransformer.from_pretrained(tmp_path)
    # Folding ln_final scaled the rows and centred the columns, which leaves rows with a mean.
    assert loaded.W_U.mean(-1).abs().max().item() > 1e-3
    assert loaded.processed == ("center_unembed", "fold_ln", "center_writing_weights", "fold_value_biases")


def test_a_model_saved_unprocessed_is_processed_as_it_is_loaded(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = HookedTransformer.from_pretrained(tmp_path)
    assert loaded.cfg.normalization_type == "LNPre"
    difference = loaded(tiny_tokens()).log_softmax(-1) - model(tiny_tokens()).log_softmax(-1)
    assert difference.abs().max().item() < 1e-9


def test_saving_twice_gives_the_same_files(tmp_path: Path) -> None:
    model = tiny_model()
    model.process_weights_()
    model.save_pretrained(tmp_path / "one")
    HookedTransformer.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two" / "deeper")
    one, two = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("one", "two/deeper"))
    for content in (one, two):
        del content["config"]["model_name"], content["config"]["init_weights"]
    assert one == two
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two/deeper"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_loaded_model_shares_no_memory_with_its_file(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    loaded = HookedTransformer.from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_model_can_be_saved_over_the_folder_it_came_from(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    model = HookedTransformer.from_pretrained(tmp_path)
    with torch.no_grad():
        model.unembed.b_U.add_(1.0)
    model.save_pretrained(tmp_path)
    assert_same_bits(model, HookedTransformer.from_pretrained(tmp_path))


def test_the_tokenizer_is_saved_with_the_model(gpt2_folder: Path, tmp_path: Path) -> None:
    model = HookedTransformer.from_pretrained(gpt2_folder, default_prepend_bos=False, default_padding_side="left")
    model.save_pretrained(tmp_path)
    loaded = HookedTransformer.from_pretrained(tmp_path)
    texts = ["John and Mary went to the store", "Paris"]
    assert torch.equal(loaded.to_tokens(texts), model.to_tokens(texts))
    assert loaded.to_string(loaded.to_tokens(texts[0])[0]) == texts[0]
    assert torch.equal(loaded(texts), model(texts))
    assert torch.equal(loaded(texts[0]), model(texts[0]))


def test_a_model_without_a_tokenizer_comes_back_without_one(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert HookedTransformer.from_pretrained(tmp_path).tokenizer is None


def test_a_model_converted_from_huggingface_comes_back(gpt2_folder: Path, tmp_path: Path) -> None:
    model = HookedTransformer.from_pretrained(gpt2_folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = HookedTransformer.from_pretrained(tmp_path)
    assert_same_bits(model, loaded)
    assert loaded.cfg.original_architecture == "GPT2LMHeadModel"
    tokens = tiny_tokens(vocab=VOCAB)
    assert torch.equal(model(tokens), loaded(tokens))


def test_a_saved_model_can_be_shortened_as_it_is_loaded(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    short = HookedTransformer.from_pretrained_no_processing(tmp_path, first_n_layers=1, n_ctx=7)
    assert (short.cfg.n_layers, short.cfg.n_ctx) == (1, 7)
    assert torch.equal(short(tiny_tokens(), stop_at_layer=1), model(tiny_tokens(), stop_at_layer=1))


def test_a_windowed_model_can_be_shortened_as_it_is_loaded(tmp_path: Path) -> None:
    model = tiny_model(window_size=3, attn_types=["global", "local"])
    model.save_pretrained(tmp_path)
    short = HookedTransformer.from_pretrained_no_processing(tmp_path, first_n_layers=1)
    assert torch.equal(short(tiny_tokens(), stop_at_layer=1), model(tiny_tokens(), stop_at_layer=1))


def test_where_a_model_was_is_no_property_of_it(tmp_path: Path) -> None:
    tiny_model(device="cpu").save_pretrained(tmp_path)
    assert "device" not in json.loads((tmp_path / "config.json").read_text())["config"]


# The version of the format


def change_config(folder: Path, **fields: Any) -> None:
    """Change the fields of a folder's `config.json`; None removes one."""
    content = json.loads((folder / "config.json").read_text()) | fields
    kept = {name: value for name, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def test_a_folder_without_a_version_is_read_as_version_1(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["version"] == 1
    change_config(tmp_path, version=None)
    assert_same_bits(model, HookedTransformer.from_pretrained_no_processing(tmp_path))


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (2, r"config\.json has version 2 of the format; this hooked_lm reads version 1: update hooked_lm"),
        ("1", "'1' is no version number"),
        (0, "0 is no version number"),
        (True, "True is no version number"),
    ],
)
def test_a_folder_of_a_newer_version_or_of_none_is_refused(version: Any, message: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    change_config(tmp_path, version=version)
    with pytest.raises(CheckpointError, match=message):
        HookedTransformer.from_pretrained(tmp_path)


# Copies in memory


def double_layer_0(x: torch.Tensor, hook: Any) -> torch.Tensor:
    return 2 * x


def through_torch_save(model: HookedTransformer) -> HookedTransformer:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_torch_save], ids=["deepcopy", "torch.save"])
def test_a_copy_of_a_model_with_hooks_is_a_model_of_its_own(copied: Any, tokenizer: Any) -> None:
    model = HookedTransformer(tiny_config(d_vocab=VOCAB), tokenizer)
    tokens = tiny_tokens()
    plain = model(tokens)
    model.add_hook("blocks.0.hook_attn_out", double_layer_0)
    model.add_perma_hook("blocks.1.hook_mlp_out", double_layer_0)
    twin = copied(model)
    hooked = model(tokens)
    assert not torch.equal(hooked, plain)
    assert torch.equal(twin(tokens), hooked)
    assert [point.name for point in twin.hook_points()] == [point.name for point in model.hook_points()]

    twin.reset_hooks(including_permanent=True)
    assert torch.equal(twin(tokens), plain)
    assert torch.equal(model(tokens), hooked)
    with torch.no_grad():
        twin.unembed.b_U.add_(1.0)
    assert torch.equal(model(tokens), hooked)

    # The twin's registry points at its own hook points.
    _, cache = twin.run_with_cache(tokens)
    assert torch.allclose(cache["unembed.hook_out"], twin(tokens), atol=1e-5)
    assert all(value is twin.get_submodule(name) for name, value in twin.hook_dict.items())
    assert torch.equal(twin.to_tokens("Mary went"), model.to_tokens("Mary went"))


def test_a_copy_of_a_processed_model_knows_its_processing() -> None:
    model = tiny_model()
    model.process_weights_()
    assert copy.deepcopy(model).processed == model.processed
    assert through_torch_save(model).processed == model.processed


def test_saved_weights_may_be_read_by_whoever_may_read_the_config(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_other_weights_are_not_taken_for_processed_ones_and_a_step_counts_once() -> None:
    model = tiny_model()
    raw = tiny_model().state_dict()
    model.center_unembed()
    model.center_unembed()
    assert model.processed == ("center_unembed",)
    model.load_state_dict(raw)
    assert model.processed == ()
