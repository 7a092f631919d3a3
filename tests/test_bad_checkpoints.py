"""A checkpoint that cannot be used raises a CheckpointError that names the cause."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hooked_lm import CheckpointError, HookedTransformer
from tests.helpers import tiny_gpt2, tiny_model


@pytest.fixture
def folder(gpt2_folder: Path, tmp_path: Path) -> Path:
    """A good GPT-2 checkpoint, to be spoilt."""
    return Path(shutil.copytree(gpt2_folder, tmp_path / "model"))


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """A good checkpoint in our own format, to be spoilt."""
    tiny_model().save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; `...` removes one."""
    content = {**json.loads((folder / "config.json").read_text()), **changes}
    content = {name: value for name, value in content.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(content))


def fails(folder: Path | str, match: str, **kwargs: Any) -> None:
    with pytest.raises(CheckpointError, match=match):
        HookedTransformer.from_pretrained(folder, **kwargs)


def test_the_good_checkpoints_load(folder: Path, own_folder: Path) -> None:
    assert HookedTransformer.from_pretrained(folder).cfg.n_layers == 3
    assert HookedTransformer.from_pretrained(own_folder).cfg.n_layers == 2


# Tensors


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
@pytest.mark.parametrize("which", ["folder", "own_folder"])
def test_a_truncated_safetensors_file_is_refused(which: str, kept: float, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(which) / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    fails(path.parent, r"model\.safetensors is damaged or not a safetensors file")


def test_a_safetensors_file_of_something_else_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>" * 50)
    fails(folder, r"model\.safetensors is damaged or not a safetensors file")


def test_a_pointer_of_git_lfs_in_place_of_the_weights_is_refused(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n"
    (folder / "model.safetensors").write_text(pointer)
    fails(folder, r"model\.safetensors is damaged or not a safetensors file")


def test_a_folder_without_weights_is_refused(folder: Path, own_folder: Path) -> None:
    for path in (folder, own_folder):
        (path / "model.safetensors").unlink()
        fails(path, r"has no weights: expected model\.safetensors, pytorch_model\.bin")


def test_an_empty_safetensors_file_is_refused(folder: Path, own_folder: Path) -> None:
    for path, named in ((folder, r"wte\.weight"), (own_folder, r"embed\.W_E")):
        save_file({}, path / "model.safetensors")
        fails(path, named)


def sharded(folder: Path) -> Path:
    shutil.rmtree(folder)
    tiny_gpt2().save_pretrained(folder, max_shard_size="40KB")
    return folder


def test_an_absent_shard_is_refused(folder: Path) -> None:
    gone = sorted(sharded(folder).glob("model-*.safetensors"))[1]
    gone.unlink()
    fails(folder, rf"index\.json names files that are absent: {re.escape(gone.name)}$")


def test_a_damaged_shard_is_refused(folder: Path) -> None:
    shard = sorted(sharded(folder).glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    fails(folder, rf"{re.escape(shard.name)} is damaged")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": ["a"]}',
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": ["b"]}}',
        '{"weight_map": {"a": ""}}',
    ],
)
def test_an_index_that_is_not_one_is_refused(content: str, folder: Path) -> None:
    (sharded(folder) / "model.safetensors.index.json").write_text(content)
    fails(folder, r"model\.safetensors\.index\.json")


def test_a_tensor_that_the_index_promises_and_no_shard_holds_is_refused(folder: Path) -> None:
    shard = next(
        path for path in sharded(folder).glob("model-*.safetensors") if "h.1.ln_2" in str(load_file(path).keys())
    )
    save_file({name: value for name, value in load_file(shard).items() if "h.1.ln_2" not in name}, shard)
    fails(folder, r"lacks 2 tensors that the config implies: h\.1\.ln_2\.weight, h\.1\.ln_2\.bias$")


def test_integers_in_place_of_the_embedding_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    embedding = torch.ones(300, 24, dtype=torch.int8)
    save_file({**tensors, "transformer.wte.weight": embedding}, folder / "model.safetensors")
    fails(folder, r"transformer\.wte\.weight has the dtype I8")


def test_a_missing_a_surplus_and_a_misshapen_tensor_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    good = load_file(path)
    save_file({name: value for name, value in good.items() if name != "transformer.h.1.ln_2.bias"}, path)
    fails(folder, r"lacks 1 tensors .*h\.1\.ln_2\.bias")
    save_file({**good, "transformer.h.1.gate": torch.ones(2)}, path)
    fails(folder, r"1 tensors that no rule accounts for: h\.1\.gate")
    save_file({**good, "transformer.wpe.weight": torch.ones(31, 24)}, path)
    fails(folder, r"wpe\.weight has shape \(31, 24\)")


def test_a_missing_a_surplus_and_a_misshapen_tensor_of_our_own_format_are_named(own_folder: Path) -> None:
    path = own_folder / "model.safetensors"
    good = load_file(path)
    for missing in ("blocks.1.attn.W_K", "blocks.1.attn.W_O", "blocks.1.attn.b_V", "blocks.1.mlp.b_in", "embed.W_E"):
        save_file({name: value for name, value in good.items() if name != missing}, path)
        fails(own_folder, re.escape(missing))
    save_file({**good, "blocks.1.attn.W_X": torch.ones(2)}, path)
    fails(own_folder, r"blocks\.1\.attn\.W_X")
    save_file({**good, "embed.W_E": torch.ones(21, 12)}, path)
    fails(own_folder, r"embed\.W_E")
    for name in ("blocks.x.attn.W_K", "blocks.-1.attn.W_K", "blocks.", "blocks.2.attn.W_K", "blocks.01.attn.W_K"):
        save_file({**good, name: torch.ones(2)}, path)
        fails(own_folder, re.escape(name))


# Pickles


class Payload:
    """A pickle of this would make a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def write_old_format(value: Any, path: Path) -> None:
    """As PyTorch did before 1.6."""
    torch.save(value, path, _use_new_zipfile_serialization=False)


def write_plain_pickle(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("write", [torch.save, write_old_format, write_plain_pickle])
def test_code_in_a_pickle_is_not_run(write: Any, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    trap = tmp_path / "it ran"
    write({"transformer.wte.weight": Payload(trap)}, folder / "pytorch_model.bin")
    fails(folder, r"pytorch_model\.bin is damaged, or holds more than tensors, and is not unpickled")
    assert not trap.exists()


def test_the_payload_would_run_if_it_were_read(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "it ran")))
    assert (tmp_path / "it ran").exists()


@pytest.mark.parametrize("write", [torch.save, write_old_format])
@pytest.mark.parametrize("kept", [0.2, 0.9, 0.999])
def test_a_truncated_pickle_is_refused(kept: float, write: Any, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    write(tiny_gpt2().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    fails(folder, r"pytorch_model\.bin is damaged")


def test_code_in_one_of_several_pickles_is_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    trap, state = tmp_path / "it ran", tiny_gpt2().state_dict()
    torch.save(state, folder / "a.bin")
    torch.save({"transformer.wte.weight": Payload(trap)}, folder / "b.bin")
    where = {**dict.fromkeys(state, "a.bin"), "transformer.wte.weight": "b.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    fails(folder, r"b\.bin is damaged, or holds more than tensors")
    assert not trap.exists()
    (folder / "b.bin").unlink()
    fails(folder, r"pytorch_model\.bin\.index\.json names files that are absent: b\.bin")


@pytest.mark.parametrize("content", [b"", b"rubbish" * 20])
def test_a_damaged_pickle_is_refused(content: bytes, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    fails(folder, r"pytorch_model\.bin is damaged")


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), {"state_dict": {"a": torch.ones(2)}}, {"a": 3}])
def test_a_pickle_of_something_else_than_tensors_by_name_is_refused(content: Any, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    fails(folder, r"pytorch_model\.bin")


# Configs


def test_a_folder_without_a_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    fails(folder, r"has no config\.json: it is not the folder of a checkpoint")


@pytest.mark.parametrize("content", [b"", b"{", b"not json", b"\xff\xfe\x00"])
def test_a_config_that_is_not_json_is_refused(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    fails(folder, r"config\.json is not JSON")


def test_a_config_that_is_no_object_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")
    fails(folder, r"config\.json holds a list, not an object")


def test_a_config_without_a_model_type_is_refused(folder: Path) -> None:
    edit_config(folder, model_type=...)
    fails(folder, r"config\.json has no model_type")


@pytest.mark.parametrize("model_type", [[], {}, [["gpt2"]], 3, None])
def test_a_config_with_a_model_type_that_is_no_name_is_refused(model_type: Any, folder: Path) -> None:
    edit_config(folder, model_type=model_type)
    fails(folder, r"config\.json has model_type .*: it is a name")


def test_a_config_with_a_model_type_that_transformers_does_not_know_is_refused(folder: Path) -> None:
    edit_config(folder, model_type="gtp2")
    fails(folder, r"config\.json is not accepted by transformers.*gtp2")


@pytest.mark.parametrize("architectures", [..., [], None])
def test_a_config_that_names_no_architecture_is_read_by_its_model_type(architectures: Any, folder: Path) -> None:
    expected = HookedTransformer.from_pretrained(folder)
    edit_config(folder, architectures=architectures)
    model = HookedTransformer.from_pretrained(folder)
    assert model.cfg == expected.cfg
    assert model.origin is not None
    assert model.origin["architectures"] == ["GPT2LMHeadModel"]
    edit_config(folder, model_type="vit")
    fails(folder, r"names no architectures, and transformers has no causal language model of the model_type 'vit'")


def test_a_config_that_names_two_architectures_is_refused(folder: Path) -> None:
    edit_config(folder, architectures=["GPT2LMHeadModel", "GPT2Model"])
    fails(folder, "names 2 architectures")


def test_an_unknown_architecture_names_the_nearest(folder: Path) -> None:
    edit_config(folder, architectures=["GPT2LMHeadModle"])
    fails(folder, r"'GPT2LMHeadModle' is not among the supported ones; the nearest are GPT2LMHeadModel")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n_head": 5}, "d_model 24 is not a multiple of n_heads 5"),
        ({"activation_function": "swiglu"}, "act_fn='swiglu' is none of"),
        ({"n_layer": 4}, r"lacks 12 tensors that the config implies: h\.3\.ln_1\.weight"),
        ({"n_layer": 2}, r"12 tensors that no rule accounts for: h\.2\."),
        ({"vocab_size": 301}, r"wte\.weight has shape \(300, 24\)"),
        ({"n_inner": 100}, r"mlp\.c_fc\.weight has shape \(24, 96\)"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_or_itself_is_refused(
    changes: dict[str, Any], match: str, folder: Path
) -> None:
    edit_config(folder, **changes)
    fails(folder, match)


@pytest.mark.parametrize("missing", ["n_layers", "d_model", "n_ctx"])
def test_a_config_of_our_own_format_that_lacks_a_field_is_refused(missing: str, own_folder: Path) -> None:
    config = json.loads((own_folder / "config.json").read_text())["config"]
    del config[missing]
    edit_config(own_folder, config=config)
    fails(own_folder, rf"config\.json does not hold a whole config: the config lacks {missing}")


def test_a_config_of_our_own_format_with_a_misspelt_field_is_refused(own_folder: Path) -> None:
    config = json.loads((own_folder / "config.json").read_text())["config"]
    edit_config(own_folder, config={**config, "n_head": 3})
    fails(own_folder, r"no field 'n_head'; did you mean 'n_heads'")


@pytest.mark.parametrize("config", [..., None, [], 3])
def test_a_config_of_our_own_format_that_holds_none_is_refused(config: Any, own_folder: Path) -> None:
    edit_config(own_folder, config=config)
    fails(own_folder, r"config\.json does not hold a whole config")


@pytest.mark.parametrize("processed", ["fold_ln", ["fold_nl"], [3], None])
def test_a_list_of_processing_steps_that_is_none_is_refused(processed: Any, own_folder: Path) -> None:
    edit_config(own_folder, processed=processed)
    fails(own_folder, r"config\.json.*processed")


# What the caller asks for


@pytest.mark.parametrize("first_n_layers", [-1, 4])
def test_layers_that_are_not_there_are_refused(first_n_layers: int, folder: Path) -> None:
    fails(folder, rf"first_n_layers={first_n_layers} is not in 0-3", first_n_layers=first_n_layers)


@pytest.mark.parametrize("first_n_layers", [-1, 3])
def test_layers_that_are_not_there_in_our_own_format_are_refused(first_n_layers: int, own_folder: Path) -> None:
    fails(own_folder, rf"first_n_layers={first_n_layers} is not in 0-2", first_n_layers=first_n_layers)


def test_a_context_longer_than_the_learned_positions_is_refused(folder: Path, own_folder: Path) -> None:
    fails(folder, "n_ctx=33 is more than the 32 positions this model has learned", n_ctx=33)
    fails(own_folder, "n_ctx=17 is more than the 16 positions this model has learned", n_ctx=17)


def test_the_longest_context_and_every_layer_may_be_asked_for(folder: Path) -> None:
    model = HookedTransformer.from_pretrained(folder, n_ctx=32, first_n_layers=3)
    assert (model.cfg.n_ctx, model.cfg.n_layers) == (32, 3)


@pytest.mark.parametrize("n_ctx", [0, -1])
def test_a_context_of_no_length_is_refused(n_ctx: int, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"n_ctx is an integer of at least 1; got {n_ctx}"):
        HookedTransformer.from_pretrained(folder, n_ctx=n_ctx)


def test_a_dtype_that_is_none_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="dtype is a floating-point torch dtype or its name; got 'float23'"):
        HookedTransformer.from_pretrained(folder, dtype="float23")


def test_a_file_in_place_of_a_folder_is_refused(folder: Path) -> None:
    fails(folder / "config.json", r"config\.json is a file: give the folder")


def test_a_damaged_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    fails(folder, "no tokenizer")


def test_a_checkpoint_error_is_a_value_error() -> None:
    assert issubclass(CheckpointError, ValueError)
