"""Reading a checkpoint: what is shared with the file, what is copied, what is read at all, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooked_lm import CheckpointError, HookedTransformer
from tests.architectures_helpers import LATENT
from tests.family_rows import ROWS
from tests.helpers import VOCAB, randomise_, tiny_gpt2, tiny_model, tiny_tokens
from tests.loading_helpers import ASSORTED, edit_json, row_model, row_tokens, unprocessed
from weight_conversion.source import SafetensorFiles, TensorsInMemory

Loader = Callable[..., HookedTransformer]
both_ways = pytest.mark.parametrize("load", [unprocessed, HookedTransformer.from_pretrained], ids=["raw", "processed"])


def gpt2_tokens() -> Tensor:
    return tiny_tokens(vocab=VOCAB)


def lies_in(tensor: Tensor, path: Path) -> bool:
    """Whether a tensor's memory is a mapping of a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.endswith(str(path.resolve()))
    return False


def in_files(model: HookedTransformer, folder: Path) -> set[str]:
    """The parameters that lie in a folder's files."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return {name for name, value in model.named_parameters() if any(lies_in(value, file) for file in files)}


def names_of(model: HookedTransformer) -> set[str]:
    return {name for name, _ in model.named_parameters()}


# What lies where


def test_weights_that_need_no_change_lie_in_the_mapped_file(gpt2_folder: Path) -> None:
    model = unprocessed(gpt2_folder)
    # GPT-2's unembedding has no bias, so the file has none either.
    assert in_files(model, gpt2_folder) == names_of(model) - {"unembed.b_U"}


def test_a_projection_that_transposes_its_source_lies_in_the_mapped_file(tmp_path: Path) -> None:
    row_model("llama").save_pretrained(tmp_path)
    mapped = in_files(unprocessed(tmp_path), tmp_path)
    for name in ("attn.W_Q", "attn.W_K", "attn.W_O", "mlp.W_in", "mlp.W_gate", "mlp.W_out", "ln1.w"):
        assert f"blocks.1.{name}" in mapped, name


def test_what_processing_writes_to_is_in_memory_of_its_own_and_the_rest_is_mapped(tmp_path: Path) -> None:
    row_model("llama").save_pretrained(tmp_path)
    model = HookedTransformer.from_pretrained(tmp_path)
    mapped = in_files(model, tmp_path)
    # A model with RMS norms keeps its residual stream's mean, so what writes to the stream is left alone.
    assert {"embed.W_E", "blocks.0.attn.W_O", "blocks.2.attn.W_O"} <= mapped
    assert not any(name.endswith(("W_Q", "W_K", "W_V", "W_in", "W_gate", "W_U")) or ".b_" in name for name in mapped)


def test_another_precision_or_a_pickle_leaves_nothing_mapped(gpt2_folder: Path, tmp_path: Path) -> None:
    assert not in_files(unprocessed(gpt2_folder, dtype=torch.float64), gpt2_folder)
    hf = tiny_gpt2()
    hf.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(hf.state_dict(), tmp_path / "pytorch_model.bin")
    assert not in_files(unprocessed(tmp_path), tmp_path)


@both_ways
@pytest.mark.parametrize("kind", ["safetensors", "shards", "pickle", "own format"])
def test_writing_to_a_model_touches_neither_its_files_nor_another_model_of_them(
    load: Loader, kind: str, tmp_path: Path
) -> None:
    hf = tiny_gpt2()
    hf.save_pretrained(tmp_path, max_shard_size="40KB" if kind == "shards" else "1GB")
    if kind == "pickle":
        (tmp_path / "model.safetensors").unlink()
        torch.save(hf.state_dict(), tmp_path / "pytorch_model.bin")
    if kind == "own format":
        unprocessed(tmp_path).save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    model, other = load(tmp_path), load(tmp_path)
    expected = other(gpt2_tokens())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert torch.equal(other(gpt2_tokens()), expected)
    assert torch.equal(load(tmp_path)(gpt2_tokens()), expected)


@both_ways
@pytest.mark.parametrize("row_id", ASSORTED)
@torch.no_grad()
def test_every_number_of_every_parameter_is_its_own(load: Loader, row_id: str, tmp_path: Path) -> None:
    row_model(row_id).save_pretrained(tmp_path)
    model = load(tmp_path)
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(value.shape, generator=generator) for name, value in model.named_parameters()}
    for name, value in model.named_parameters():
        value.copy_(drawn[name])
    for name, value in model.named_parameters():
        assert torch.equal(value, drawn[name]), name


def test_a_mapped_model_learns(tmp_path: Path) -> None:
    row_model("llama").save_pretrained(tmp_path)
    model, tokens = unprocessed(tmp_path), row_tokens("llama")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    before = model(tokens, return_type="loss")
    before.backward()
    optimiser.step()
    assert model(tokens, return_type="loss") < before
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        assert value.grad.abs().max() > 0, name


@both_ways
def test_shards_hold_the_same_model_as_one_file(load: Loader, gpt2_folder: Path, tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    one, many = load(gpt2_folder), load(tmp_path)
    assert one.state_dict().keys() == many.state_dict().keys()
    assert all(torch.equal(value, many.state_dict()[name]) for name, value in one.state_dict().items())


def test_a_pickle_of_before_the_zip_format_loads(tmp_path: Path) -> None:
    hf = tiny_gpt2()
    hf.save_pretrained(tmp_path)
    expected = unprocessed(tmp_path)(gpt2_tokens())
    (tmp_path / "model.safetensors").unlink()
    torch.save(hf.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(unprocessed(tmp_path)(gpt2_tokens()), expected)


def test_an_index_left_over_from_shards_is_not_preferred_to_the_file_of_now(tmp_path: Path) -> None:
    """As in transformers, whose own `save_pretrained` may leave the old index where it is."""
    index = tmp_path / "model.safetensors.index.json"
    tiny_gpt2(n_layer=1).save_pretrained(tmp_path, max_shard_size="20KB")
    old = index.read_bytes()
    now: Any = randomise_(tiny_gpt2(n_layer=1), seed=5)
    now.save_pretrained(tmp_path)
    index.write_bytes(old)
    torch.testing.assert_close(unprocessed(tmp_path)(gpt2_tokens()), now(gpt2_tokens()).logits)


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("save", ["save_pretrained", "to_huggingface"])
@torch.no_grad()
def test_a_model_saved_over_the_folder_it_is_mapped_from_keeps_its_numbers(
    save: str, shards: bool, tmp_path: Path
) -> None:
    tiny_gpt2().save_pretrained(tmp_path, max_shard_size="40KB" if shards else "1GB")
    model: Any = unprocessed(tmp_path)
    bystander = unprocessed(tmp_path)
    old = unprocessed(tmp_path)(gpt2_tokens())
    model.embed.W_E[:5] += 1.0
    new = model(gpt2_tokens())
    assert not torch.equal(new, old)
    getattr(model, save)(tmp_path)
    assert torch.equal(model(gpt2_tokens()), new)
    assert torch.equal(unprocessed(tmp_path)(gpt2_tokens()), new)
    assert torch.equal(bystander(gpt2_tokens()), old)


@both_ways
@torch.no_grad()
def test_a_model_does_not_follow_the_one_in_memory_that_it_was_made_of(load: Loader, tokenizer: Any) -> None:
    hf = tiny_gpt2()
    model = load("tiny", hf_model=hf, tokenizer=tokenizer)
    before, theirs = model(gpt2_tokens()), hf(gpt2_tokens()).logits
    for parameter in hf.parameters():
        parameter.add_(1.0)
    assert torch.equal(model(gpt2_tokens()), before)
    for parameter in hf.parameters():
        parameter.sub_(1.0)
    for parameter in model.parameters():
        parameter.add_(1.0)
    torch.testing.assert_close(hf(gpt2_tokens()).logits, theirs, atol=1e-4, rtol=0)


# Parts, precisions, devices


@both_ways
@pytest.mark.parametrize(
    ("dtype", "n_layers", "n_ctx"),
    list(itertools.product([None, torch.float64, torch.bfloat16], [None, 0, 1], [None, 5])),
)
def test_a_part_of_a_model_has_the_numbers_of_the_whole(
    load: Loader, dtype: torch.dtype | None, n_layers: int | None, n_ctx: int | None, gpt2_folder: Path
) -> None:
    whole = load(gpt2_folder, dtype=dtype).state_dict()
    part = load(gpt2_folder, dtype=dtype, first_n_layers=n_layers, n_ctx=n_ctx)
    assert part.cfg.n_layers == (3 if n_layers is None else n_layers)
    assert part.cfg.n_ctx == (n_ctx or 32)
    blocks = {name.split(".")[1] for name in part.state_dict() if name.startswith("blocks.")}
    assert blocks == {str(layer) for layer in range(part.cfg.n_layers)}
    for name, value in part.state_dict().items():
        expected = whole[name][: part.cfg.n_ctx] if name == "pos_embed.W_pos" else whole[name]
        assert value.dtype is (dtype or torch.float32)
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("row_id", [row.id for row in ROWS if row.id in {*ASSORTED, "gpt-oss", "qwen3-moe", "gpt-neo"}])
@torch.no_grad()
def test_the_first_layers_of_a_family_write_what_they_write_in_the_whole(row_id: str, tmp_path: Path) -> None:
    row_model(row_id).save_pretrained(tmp_path)
    tokens = row_tokens(row_id)
    expected = unprocessed(tmp_path)(tokens, stop_at_layer=2)
    assert torch.equal(unprocessed(tmp_path, first_n_layers=2)(tokens, stop_at_layer=2), expected)


@both_ways
def test_on_the_meta_device_a_model_has_its_shapes_and_no_numbers(load: Loader, gpt2_folder: Path) -> None:
    real = load(gpt2_folder, dtype=torch.bfloat16, first_n_layers=2)
    model = load(gpt2_folder, dtype=torch.bfloat16, first_n_layers=2, device="meta")
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in real.state_dict().items()
    }
    assert all(value.is_meta and value.dtype is torch.bfloat16 for value in model.parameters())


@pytest.fixture
def was_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors whose values have been asked for."""
    names: list[str] = []
    for source in (SafetensorFiles, TensorsInMemory):
        read = source.__getitem__

        def spied(self: Any, name: str, read: Any = read) -> Tensor:
            names.append(name)
            return read(self, name)

        monkeypatch.setattr(source, "__getitem__", spied)
    return names


@both_ways
def test_nothing_is_read_of_layers_that_are_not_kept(load: Loader, gpt2_folder: Path, was_read: list[str]) -> None:
    load(gpt2_folder, first_n_layers=1)
    assert {name.split(".")[2] for name in was_read if ".h." in name} == {"0"}
    assert len(was_read) == len(set(was_read)) == 16


def test_nothing_is_read_of_layers_that_are_not_kept_in_our_own_format(tmp_path: Path, was_read: list[str]) -> None:
    tiny_model().save_pretrained(tmp_path)
    HookedTransformer.from_pretrained(tmp_path, first_n_layers=1)
    assert {name.split(".")[1] for name in was_read if name.startswith("blocks.")} == {"0"}


# Errors before memory is spent


def spoil(folder: Path, fault: str, name: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    spoilt = {
        "missing": {other: value for other, value in tensors.items() if other != name},
        "surplus": {**tensors, f"{name}_too": torch.ones(2)},
        "mis-shaped": {**tensors, name: torch.ones(3, 2)},
    }
    save_file(spoilt[fault], path)


@both_ways
@pytest.mark.parametrize("fault", ["missing", "surplus", "mis-shaped"])
def test_a_faulty_tensor_is_named_before_any_value_is_read(
    load: Loader, fault: str, gpt2_folder: Path, tmp_path: Path, was_read: list[str]
) -> None:
    shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path, fault, "transformer.h.2.mlp.c_proj.weight")
    with pytest.raises(CheckpointError, match=r"h\.2\.mlp\.c_proj\.weight"):
        load(tmp_path)
    assert was_read == []


OWN_KINDS: dict[str, dict[str, Any]] = {
    "layer norm": {},
    "tied": {"tie_word_embeddings": True},
    "latent attention": LATENT,
    "experts": {"num_experts": 3, "experts_per_token": 2, "gated_mlp": True, "normalization_type": "RMS"},
}


@both_ways
@pytest.mark.parametrize("kind", OWN_KINDS)
@pytest.mark.parametrize("fault", ["missing", "surplus", "mis-shaped"])
def test_a_faulty_tensor_of_our_own_format_is_named_before_any_value_is_read(
    load: Loader, fault: str, kind: str, tmp_path: Path, was_read: list[str]
) -> None:
    model = tiny_model(**OWN_KINDS[kind])
    model.save_pretrained(tmp_path)
    good = (tmp_path / "model.safetensors").read_bytes()
    # Gains and biases too: processing folds them away, and would not miss one.
    for name in (name for name in model.own_tensors() if "blocks.0" not in name):
        spoil(tmp_path, fault, name)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            load(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(good)
    assert was_read == []


@both_ways
def test_an_unembedding_beside_tied_embeddings_is_surplus_in_our_own_format(load: Loader, tmp_path: Path) -> None:
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "unembed.W_U": torch.ones(12, 20).double()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unembed\.W_U has no place"):
        load(tmp_path)


def test_blocks_beyond_those_of_the_config_are_surplus_in_our_own_format(tmp_path: Path) -> None:
    tiny_model(n_layers=3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["config"]
    edit_json(tmp_path / "config.json", config={**config, "n_layers": 2})
    with pytest.raises(CheckpointError, match=r"blocks\.2\..* n_layers=2"):
        unprocessed(tmp_path)


# Precision


def bits_of_bfloat16(model: HookedTransformer) -> dict[str, Tensor]:
    return {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("row_id", ["gpt2", "llama", "gemma", "opt-projected-untied", "mixtral"])
@pytest.mark.parametrize("source", ["safetensors", "memory"])
def test_bfloat16_is_processed_in_float32_and_rounded_once(
    row_id: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse = row_model(row_id).to(torch.bfloat16)
    coarse.save_pretrained(tmp_path / "coarse")
    row_model(row_id).to(torch.bfloat16).float().save_pretrained(tmp_path / "precise")
    # Mapped weights are multiplied in another order than copied ones; in bfloat16 all are copied.
    with monkeypatch.context() as patched:
        patched.setattr(SafetensorFiles, "mapped", False)
        expected = bits_of_bfloat16(HookedTransformer.from_pretrained(tmp_path / "precise", dtype=torch.float32))
    if source == "memory":
        with pytest.warns(UserWarning, match="tokens only"):
            model = HookedTransformer.from_pretrained(str(tmp_path / "coarse"), hf_model=coarse)
    else:
        model = HookedTransformer.from_pretrained(tmp_path / "coarse")
    assert model.cfg.dtype is torch.bfloat16
    assert model.processed
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("row_id", ["granite", "gemma", "cohere"])
@torch.no_grad()
def test_a_bfloat16_checkpoint_asked_for_in_float32_is_not_rounded_on_the_way(row_id: str, tmp_path: Path) -> None:
    """These families multiply weights or add one to gains, which bfloat16 would round."""
    row_model(row_id).to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = row_tokens(row_id)
    expected = theirs(tokens).logits
    for load in (unprocessed, HookedTransformer.from_pretrained):
        difference = load(tmp_path, dtype=torch.float32)(tokens).log_softmax(-1) - expected.log_softmax(-1)
        assert difference.abs().max().item() < 1e-5
