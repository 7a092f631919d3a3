"""The way back: a model written in HuggingFace's format is the checkpoint it was read from, with its edits."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from hooked_lm import CheckpointError, HookedTransformer
from tests.export_helpers import assert_same_tensors, moved, reference, tensors_in, tokens
from tests.family_rows import ROWS
from tests.helpers import VOCAB, tiny_gpt2, tiny_model, tiny_tokens

unprocessed = HookedTransformer.from_pretrained_no_processing

# Fused and separate projections, tied and not, biases and none, one norm for two, experts, scaled and shifted weights.
ASSORTED = [
    "gpt2",
    "gpt2-scaled-by-layer-untied",
    "llama",
    "llama-biases-tied",
    "falcon",
    "gptj",
    "mixtral",
    "qwen2-moe",
    "bloom",
    "xglm",
]
assorted = pytest.mark.parametrize("row_id", ASSORTED)


def build(row_id: str) -> Any:
    return next(row for row in ROWS if row.id == row_id).build()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a row's checkpoint, as transformers writes it. Do not write to it."""
    folders: dict[str, Path] = {}

    def folder(row_id: str) -> Path:
        if row_id not in folders:
            folders[row_id] = tmp_path_factory.mktemp(row_id)
            build(row_id).save_pretrained(folders[row_id])
        return folders[row_id]

    return folder


# What comes out


@assorted
def test_an_unchanged_model_is_written_as_the_file_it_was_read_from(
    row_id: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    unprocessed(checkpoint(row_id)).to_huggingface(tmp_path)
    assert_same_tensors(tmp_path, checkpoint(row_id))
    reference(tmp_path)


@pytest.mark.parametrize("row_id", ["gpt2", "llama", "mixtral"])
def test_a_bfloat16_model_is_written_bit_for_bit_in_bfloat16(row_id: str, tmp_path: Path) -> None:
    build(row_id).to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    unprocessed(tmp_path / "theirs").to_huggingface(tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"
    assert reference(tmp_path / "ours").dtype is torch.bfloat16


@pytest.mark.parametrize("row_id", ["gpt2", "mixtral", "llama"])
def test_another_precision_is_that_of_the_file_and_of_what_transformers_loads(
    row_id: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    unprocessed(checkpoint(row_id), dtype=torch.float64).to_huggingface(tmp_path)
    assert {value.dtype for value in tensors_in(tmp_path).values()} == {torch.float64}
    assert reference(tmp_path).dtype is torch.float64


@assorted
def test_the_config_is_the_one_that_was_read(row_id: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    unprocessed(checkpoint(row_id)).to_huggingface(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    given = json.loads((checkpoint(row_id) / "config.json").read_text())
    assert {name: written[name] for name in given} == given


@assorted
@torch.no_grad()
def test_a_model_of_our_own_format_still_knows_the_way_back(
    row_id: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    unprocessed(checkpoint(row_id)).save_pretrained(tmp_path / "own")
    again = unprocessed(tmp_path / "own")
    again.to_huggingface(tmp_path / "theirs")
    assert_same_tensors(tmp_path / "theirs", checkpoint(row_id))
    torch.testing.assert_close(reference(tmp_path / "theirs")(tokens()).logits, again(tokens()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("row_id", ["gpt2", "llama", "mixtral"])
def test_a_model_made_of_one_in_memory_can_be_written(row_id: str, tmp_path: Path) -> None:
    theirs = build(row_id)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="tokens only"):
        ours = unprocessed(str(tmp_path), hf_model=theirs)
    ours.to_huggingface(tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")


def test_experts_come_out_one_by_one(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = unprocessed(checkpoint("mixtral"))
    with torch.no_grad():
        model.blocks[1].mlp.W_in[2] = 3.0
    model.to_huggingface(tmp_path)
    written = tensors_in(tmp_path)
    expert = "model.layers.1.block_sparse_moe.experts.{}.w3.weight"
    names = [expert.format(index) for index in range(model.cfg.num_experts or 0)]
    assert [bool((written[name] == 3.0).all()) for name in names] == [index == 2 for index in range(len(names))]
    assert written[names[0]].shape == (model.cfg.d_mlp, model.cfg.d_model)


@pytest.mark.parametrize("row_id", ["gpt2", "llama", "mixtral"])
@torch.no_grad()
def test_a_large_model_is_written_in_shards(
    row_id: str, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = partial(huggingface_hub.save_torch_state_dict, max_shard_size="20KB")
    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", save)
    model = unprocessed(checkpoint(row_id))
    model.to_huggingface(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_same_tensors(tmp_path, checkpoint(row_id))
    reference(tmp_path)
    assert torch.equal(unprocessed(tmp_path)(tokens()), model(tokens()))


@torch.no_grad()
def test_a_smaller_model_written_over_shards_is_the_one_that_is_loaded(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    tiny_gpt2().save_pretrained(tmp_path, max_shard_size="40KB")
    model = unprocessed(checkpoint("gpt2"))
    model.to_huggingface(tmp_path)
    assert torch.equal(unprocessed(tmp_path)(tokens()), model(tokens()))
    torch.testing.assert_close(reference(tmp_path)(tokens()).logits, model(tokens()), atol=1e-4, rtol=0)


@torch.no_grad()
def test_tied_embeddings_are_written_once_and_an_edit_reaches_both_ends(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = unprocessed(checkpoint("llama-biases-tied"))
    before = model(tokens())
    model.embed.W_E[10:30] *= 2.0
    model.to_huggingface(tmp_path)
    assert not any("lm_head" in name for name in tensors_in(tmp_path))
    logits = reference(tmp_path)(tokens()).logits
    torch.testing.assert_close(logits, model(tokens()), atol=1e-4, rtol=0)
    assert (logits - before).abs().max() > 1.0


@torch.no_grad()
def test_embeddings_that_a_config_ties_and_a_file_does_not_are_written_apart(tmp_path: Path) -> None:
    theirs = tiny_gpt2(tie_word_embeddings=False)
    theirs.config.tie_word_embeddings, theirs.config.architectures = True, ["GPT2LMHeadModel"]
    theirs.config.save_pretrained(tmp_path / "theirs")
    save_file(
        {name: value.clone() for name, value in theirs.state_dict().items()}, tmp_path / "theirs/model.safetensors"
    )
    unprocessed(tmp_path / "theirs").to_huggingface(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["tie_word_embeddings"] is False
    prompt = tiny_tokens(vocab=VOCAB)
    expected = theirs(prompt).logits
    torch.testing.assert_close(reference(tmp_path / "ours")(prompt).logits, expected, atol=1e-4, rtol=0)


def test_a_bare_model_is_written_without_the_prefix_it_was_read_without(tmp_path: Path) -> None:
    tiny_gpt2().transformer.save_pretrained(tmp_path / "theirs")
    unprocessed(tmp_path / "theirs").to_huggingface(tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")


def test_the_tokenizer_goes_along(gpt2_folder: Path, tmp_path: Path) -> None:
    model = unprocessed(gpt2_folder)
    model.to_huggingface(tmp_path)
    text = "John and Mary went to the store"
    assert torch.equal(unprocessed(tmp_path).to_tokens(text), model.to_tokens(text))


def test_writing_changes_nothing_in_the_model(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = unprocessed(checkpoint("mixtral"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    origin = json.dumps(model.origin)
    for name in ("once", "twice"):
        model.to_huggingface(tmp_path / name)
    assert_same_tensors(tmp_path / "once", tmp_path / "twice")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert json.dumps(model.origin) == origin


# What cannot come out: an error, and nothing is written


def refuses(model: HookedTransformer, folder: Path, match: str, error: type[ValueError] = CheckpointError) -> None:
    with pytest.raises(error, match=match):
        model.to_huggingface(folder / "refused")
    assert not (folder / "refused").exists()


def test_a_processed_model_names_what_it_has_been_through(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    loaded = HookedTransformer.from_pretrained(checkpoint("gpt2"), fold_ln=False, center_unembed=False)
    refuses(loaded, tmp_path, r"processed \(center_writing_weights, fold_value_biases\)", ValueError)
    later = unprocessed(checkpoint("gpt2"))
    later.fold_value_biases()
    refuses(later, tmp_path, r"processed \(fold_value_biases\).*from_pretrained_no_processing", ValueError)
    later.save_pretrained(tmp_path / "own")
    refuses(HookedTransformer.from_pretrained(tmp_path / "own"), tmp_path, "processed", ValueError)


def test_a_model_that_was_never_of_huggingface_has_no_family(tmp_path: Path) -> None:
    refuses(tiny_model(), tmp_path, "was not loaded from a HuggingFace checkpoint", ValueError)
    tiny_model().save_pretrained(tmp_path / "own")
    refuses(unprocessed(tmp_path / "own"), tmp_path, "was not loaded from a HuggingFace checkpoint", ValueError)


@pytest.mark.parametrize(
    ("cut", "match"),
    [({"first_n_layers": 2}, "n_layers=2 of 3"), ({"first_n_layers": 0}, "n_layers=0 of 3"), ({"n_ctx": 9}, "n_ctx=9")],
)
@pytest.mark.parametrize("row_id", ["gpt2", "llama"])
def test_a_cut_model_is_refused(
    row_id: str, cut: dict[str, int], match: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    refuses(unprocessed(checkpoint(row_id), **cut), tmp_path, rf"{match}.*load the whole model")


@pytest.mark.parametrize(
    ("row_id", "name"),
    [
        ("gpt2", "unembed.b_U"),
        ("llama", "blocks.1.attn.b_K"),
        ("llama", "blocks.2.mlp.b_gate"),
        ("mixtral", "blocks.0.mlp.b_out"),
    ],
)
@torch.no_grad()
def test_a_bias_that_the_family_has_no_place_for_is_left_out_and_named(
    row_id: str, name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = unprocessed(checkpoint(row_id))
    model.get_parameter(name).view(-1)[-1] = 0.25
    with pytest.warns(UserWarning, match=rf"no place for {name} \(by up to 0\.25 from 0\).*left out"):
        model.to_huggingface(tmp_path)
    assert_same_tensors(tmp_path, checkpoint(row_id))
    assert model.get_parameter(name).abs().max() == 0.25


@torch.no_grad()
def test_a_value_bias_goes_into_the_output_bias_where_there_is_one(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = moved(unprocessed(checkpoint("gpt-neo")), "attn.b_V")
    model.to_huggingface(tmp_path)
    torch.testing.assert_close(reference(tmp_path)(tokens()).logits, model(tokens()), atol=1e-4, rtol=0)
    assert (model(tokens()) - unprocessed(checkpoint("gpt-neo"))(tokens())).abs().max() > 0.1


@torch.no_grad()
def test_a_key_bias_without_effect_is_left_out_without_a_word(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = moved(unprocessed(checkpoint("gpt-neo")), "attn.b_K")
    model.to_huggingface(tmp_path)
    torch.testing.assert_close(reference(tmp_path)(tokens()).logits, model(tokens()), atol=1e-4, rtol=0)


# What training moves and what a family has no tensors for, after what can be folded.
LEFT_OUT = {
    "gpt2": ("b_U",),
    "llama": ("b_U", "attn.b_Q", "attn.b_K", "attn.b_V", "attn.b_O", "mlp.b_in", "mlp.b_gate", "mlp.b_out"),
    "gptj": ("attn.b_Q", "attn.b_K", "attn.b_V", "attn.b_O"),
    "gpt-neo": ("b_U", "attn.b_Q"),
}


@pytest.mark.parametrize("row_id", LEFT_OUT)
def test_a_model_trained_by_any_optimizer_can_be_written(
    row_id: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = unprocessed(checkpoint(row_id))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(tokens(), return_type="loss")
        loss.backward()
        optimizer.step()
    with pytest.warns(UserWarning, match="no place for .*b_"):
        model.to_huggingface(tmp_path)
    again = unprocessed(tmp_path)
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if own.endswith(LEFT_OUT[row_id]):
                parameter.zero_()
        torch.testing.assert_close(reference(tmp_path)(tokens()).logits, model(tokens()), atol=1e-3, rtol=0)
        torch.testing.assert_close(again(tokens()), model(tokens()), atol=1e-3, rtol=0)


@torch.no_grad()
def test_an_untied_unembedding_is_written_as_one_of_its_own(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = unprocessed(checkpoint("llama-biases-tied"))
    assert model.unembed.W_U.shape == model.W_U.shape  # asked for, and equal still
    model.to_huggingface(tmp_path / "equal")
    assert_same_tensors(tmp_path / "equal", checkpoint("llama-biases-tied"))
    model.unembed.W_U[:, 3:9] *= 2.0
    model.to_huggingface(tmp_path / "differs")
    torch.testing.assert_close(reference(tmp_path / "differs")(tokens()).logits, model(tokens()), atol=1e-4, rtol=0)
    assert json.loads((tmp_path / "differs" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("changes", [{"eps": 0.5}, {"window_size": 4, "use_local_attn": True}, {"act_fn": "relu"}])
def test_a_config_that_is_no_longer_the_one_that_was_read_is_refused(
    changes: dict[str, Any], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = unprocessed(checkpoint("gpt2"))
    model.cfg.set_unlocked(**changes)
    refuses(model, tmp_path, rf"config is no longer the one .*{next(iter(changes))}=")


def test_weights_put_into_a_model_whose_norms_were_folded_are_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = HookedTransformer.from_pretrained(checkpoint("llama"))
    model.load_state_dict(model.state_dict())
    refuses(model, tmp_path, "normalization_type='RMSPre' was 'RMS'")
