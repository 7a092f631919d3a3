"""GPT-2: converted from every kind of checkpoint, it computes what transformers computes."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2LMHeadModel

from hooked_lm import CheckpointError, HookedTransformer
from hooked_lm.weights import STEPS
from tests.gpt2_conversion_helpers import assert_same, tokens
from tests.helpers import VOCAB, randomise_, tiny_gpt2, tiny_tokenizer, tiny_tokens

FLOAT32, FLOAT64 = 1e-4, 1e-9
ALL_STEPS = tuple(STEPS)

Writer = Callable[[GPT2LMHeadModel, Path], None]


def reference(hf: GPT2LMHeadModel, **kwargs: Any) -> Any:
    with torch.no_grad():
        return hf(tokens(), **kwargs)


def convert(hf: GPT2LMHeadModel, tokenizer: Any, processed: bool = False, **kwargs: Any) -> HookedTransformer:
    load = HookedTransformer.from_pretrained if processed else HookedTransformer.from_pretrained_no_processing
    return load("tiny", hf_model=hf, tokenizer=tokenizer, **kwargs)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Every kind of checkpoint


def write_safetensors(hf: GPT2LMHeadModel, folder: Path) -> None:
    hf.save_pretrained(folder)
    assert (folder / "model.safetensors").is_file()


def write_sharded_safetensors(hf: GPT2LMHeadModel, folder: Path) -> None:
    hf.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def write_pickle(hf: GPT2LMHeadModel, folder: Path) -> None:
    hf.config.architectures = ["GPT2LMHeadModel"]
    hf.config.save_pretrained(folder)
    torch.save(hf.state_dict(), folder / "pytorch_model.bin")


def write_sharded_pickle(hf: GPT2LMHeadModel, folder: Path) -> None:
    hf.config.architectures = ["GPT2LMHeadModel"]
    hf.config.save_pretrained(folder)
    state = hf.state_dict()
    half = len(state) // 2
    shards = {"a.bin": dict(list(state.items())[:half]), "b.bin": dict(list(state.items())[half:])}
    for file, content in shards.items():
        torch.save(content, folder / file)
    where = {name: file for file, content in shards.items() for name in content}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))


WRITERS = [write_safetensors, write_sharded_safetensors, write_pickle, write_sharded_pickle]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.float64, FLOAT64)])
def test_logits_from_a_folder_equal_transformers(
    write: Writer, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    hf = tiny_gpt2().to(dtype)
    write(hf, tmp_path)
    model = HookedTransformer.from_pretrained_no_processing(tmp_path)
    assert model.cfg.dtype is dtype
    assert_same(model(tokens()), reference(hf).logits, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.float64, FLOAT64)])
def test_logits_from_a_model_in_memory_equal_transformers(dtype: torch.dtype, tolerance: float, tokenizer: Any) -> None:
    hf = tiny_gpt2().to(dtype)
    assert_same(convert(hf, tokenizer)(tokens()), reference(hf).logits, tolerance)


def test_a_model_in_memory_is_copied_and_left_as_it_was(tokenizer: Any) -> None:
    hf = tiny_gpt2()
    before = {name: value.clone() for name, value in hf.state_dict().items()}
    model = convert(hf, tokenizer, processed=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in hf.state_dict().items())


def test_safetensors_are_preferred_to_a_pickle(tmp_path: Path) -> None:
    hf = tiny_gpt2()
    write_safetensors(hf, tmp_path)
    torch.save(randomise_(tiny_gpt2(), seed=9).state_dict(), tmp_path / "pytorch_model.bin")
    assert_same(HookedTransformer.from_pretrained_no_processing(tmp_path)(tokens()), reference(hf).logits, FLOAT32)


def test_a_bare_model_without_the_prefix_of_its_tensors_converts(tmp_path: Path) -> None:
    hf = tiny_gpt2().double()
    hf.transformer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GPT2Model"]
    assert_same(HookedTransformer.from_pretrained_no_processing(tmp_path)(tokens()), reference(hf).logits, FLOAT64)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_the_mask_buffers_of_old_checkpoints_are_dropped(prefix: str, tmp_path: Path) -> None:
    hf = tiny_gpt2().double()
    hf.config.architectures = ["GPT2LMHeadModel"]
    hf.config.save_pretrained(tmp_path)
    state = {prefix + name: value for name, value in hf.transformer.state_dict().items()}
    for layer in range(3):
        state[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril().bool()
        state[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same(HookedTransformer.from_pretrained_no_processing(tmp_path)(tokens()), reference(hf).logits, FLOAT64)


def test_the_dtype_of_a_checkpoint_is_that_of_its_weights_not_of_an_old_mask(tmp_path: Path) -> None:
    hf = tiny_gpt2().double()
    hf.config.architectures = ["GPT2LMHeadModel"]
    hf.config.save_pretrained(tmp_path)
    buffers = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 32, 32).tril().bool() for layer in range(3)}
    torch.save({**buffers, **hf.state_dict()}, tmp_path / "pytorch_model.bin")
    model = HookedTransformer.from_pretrained_no_processing(tmp_path)
    assert_same(model(tokens()), reference(hf).logits, FLOAT64)


# Site by site


def test_the_residual_stream_equals_transformers_at_every_layer(tokenizer: Any) -> None:
    hf = tiny_gpt2().double()
    states = reference(hf, output_hidden_states=True).hidden_states
    _, cache = convert(hf, tokenizer).run_with_cache(tokens())
    for layer in range(3):
        assert_same(cache["resid_pre", layer], states[layer], FLOAT64)
    for layer in range(2):
        assert_same(cache["resid_post", layer], states[layer + 1], FLOAT64)
    assert_same(cache["unembed.hook_in"], states[3], FLOAT64)


def test_the_attention_patterns_equal_transformers_at_every_layer(tokenizer: Any) -> None:
    hf = tiny_gpt2(attn_implementation="eager").double()
    patterns = reference(hf, output_attentions=True).attentions
    _, cache = convert(hf, tokenizer).run_with_cache(tokens())
    assert len(patterns) == 3
    for layer, pattern in enumerate(patterns):
        assert_same(cache["pattern", layer], pattern, FLOAT64)


# Processing


STEP_SETS = [steps for n in range(len(ALL_STEPS) + 1) for steps in itertools.combinations(ALL_STEPS, n)]


@pytest.mark.parametrize("steps", STEP_SETS, ids=lambda steps: "+".join(steps) or "none")
def test_processing_leaves_log_probabilities_as_transformers_has_them(steps: tuple[str, ...], tokenizer: Any) -> None:
    hf = tiny_gpt2().double()
    model = convert(hf, tokenizer, **{step: step in steps for step in ALL_STEPS})
    assert model.processed == steps
    assert_same(model(tokens()).log_softmax(-1), reference(hf).logits.log_softmax(-1), FLOAT64)


def test_every_processing_step_changes_the_weights(tokenizer: Any) -> None:
    plain = convert(tiny_gpt2(tie_word_embeddings=False).double(), tokenizer).state_dict()
    for step in ALL_STEPS:
        processed = convert(tiny_gpt2(tie_word_embeddings=False).double(), tokenizer, **{step: True}).state_dict()
        shared = set(plain) & set(processed)
        assert shared < set(plain) or any(not torch.equal(plain[name], processed[name]) for name in shared), step


def test_by_default_all_is_processed_but_the_refactoring(tokenizer: Any) -> None:
    model = convert(tiny_gpt2().double(), tokenizer, processed=True)
    assert model.processed == ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    assert model.cfg.normalization_type == "LNPre"
    assert not hasattr(model.blocks[0].ln1, "w") or model.blocks[0].ln1.w is None
    assert model.W_E.mean(-1).abs().max().item() < 1e-12
    assert model.W_U.mean(-1).abs().max().item() < 1e-12
    assert model.b_V.abs().max().item() == 0


def test_no_processing_leaves_every_weight_as_it_was(tokenizer: Any) -> None:
    hf = tiny_gpt2()
    model = convert(hf, tokenizer)
    assert model.processed == ()
    assert model.cfg.normalization_type == "LN"
    assert torch.equal(model.W_E, hf.transformer.wte.weight)
    assert torch.equal(model.W_U, hf.transformer.wte.weight.T)
    assert torch.equal(model.blocks[1].ln2.b, hf.transformer.h[1].ln_2.bias)
    assert torch.equal(model.blocks[1].mlp.W_in, hf.transformer.h[1].mlp.c_fc.weight)


# The fields of its config, each shown to matter


FIELDS: dict[str, dict[str, Any]] = {
    "inverse layer scale": {"scale_attn_by_inverse_layer_idx": True},
    "no attention scale": {"scale_attn_weights": False},
    "epsilon": {"layer_norm_epsilon": 0.3},
    "gelu": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
}


@pytest.mark.parametrize("changes", FIELDS.values(), ids=FIELDS)
def test_a_config_field_is_converted_and_matters(changes: dict[str, Any], tokenizer: Any) -> None:
    hf, plain = tiny_gpt2(attn_implementation="eager", **changes).double(), tiny_gpt2().double()
    ours = convert(hf, tokenizer)(tokens())
    assert_same(ours, reference(hf).logits, FLOAT64)
    assert (ours - reference(plain).logits).abs().max().item() > 1e-3


def test_the_width_of_the_mlp_is_converted(tokenizer: Any) -> None:
    hf = tiny_gpt2(n_inner=40).double()
    model = convert(hf, tokenizer)
    assert model.cfg.d_mlp == 40
    assert_same(model(tokens()), reference(hf).logits, FLOAT64)


def test_untied_embeddings_are_converted(tokenizer: Any, tmp_path: Path) -> None:
    hf = tiny_gpt2(tie_word_embeddings=False).double()
    assert not torch.equal(hf.lm_head.weight, hf.transformer.wte.weight)
    assert_same(convert(hf, tokenizer)(tokens()), reference(hf).logits, FLOAT64)
    hf.save_pretrained(tmp_path)
    assert_same(HookedTransformer.from_pretrained_no_processing(tmp_path)(tokens()), reference(hf).logits, FLOAT64)


def test_tied_embeddings_stay_one_tensor_unless_processing_parts_them(tokenizer: Any) -> None:
    tied, parted = convert(tiny_gpt2(), tokenizer), convert(tiny_gpt2(), tokenizer, processed=True)
    assert tied.W_U.data_ptr() == tied.W_E.data_ptr()
    assert tied.cfg.tie_word_embeddings
    assert "unembed.W_U" not in dict(tied.named_parameters())
    assert parted.W_U.data_ptr() != parted.W_E.data_ptr()
    assert not parted.cfg.tie_word_embeddings
    assert parted.n_params_total - parted.W_U.numel() < tied.n_params_total


def test_a_step_that_leaves_the_embeddings_alone_leaves_them_tied(tokenizer: Any) -> None:
    model = convert(tiny_gpt2(), tokenizer, fold_value_biases=True)
    assert model.processed == ("fold_value_biases",)
    assert model.cfg.tie_word_embeddings


def test_a_config_that_leaves_a_field_out_has_transformers_default_for_it(tmp_path: Path) -> None:
    hf = tiny_gpt2().double()
    hf.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for name in ("layer_norm_epsilon", "scale_attn_weights", "n_inner", "activation_function"):
        content.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert_same(HookedTransformer.from_pretrained_no_processing(tmp_path)(tokens()), reference(hf).logits, FLOAT64)


def test_a_config_field_that_no_conversion_knows_raises_and_is_named(gpt2_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "config.json", attention_chunk_size=5)
    with pytest.raises(CheckpointError, match=r"GPT-2 config has fields .*'attention_chunk_size': 5"):
        HookedTransformer.from_pretrained(tmp_path)


def test_a_config_field_that_no_conversion_knows_raises_for_a_model_in_memory_too(tokenizer: Any) -> None:
    hf = tiny_gpt2()
    hf.config.attention_chunk_size = 5
    with pytest.raises(CheckpointError, match=r"GPT-2 config has fields .*'attention_chunk_size': 5"):
        convert(hf, tokenizer)


def test_cross_attention_is_refused_by_name(gpt2_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "config.json", add_cross_attention=True)
    with pytest.raises(CheckpointError, match="GPT-2 with add_cross_attention=True is not supported"):
        HookedTransformer.from_pretrained(tmp_path)


# What a caller may ask of the loading


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, "bfloat16", "float64"])
def test_the_dtype_asked_for_is_that_of_every_parameter(dtype: torch.dtype | str, gpt2_folder: Path) -> None:
    model = HookedTransformer.from_pretrained(gpt2_folder, dtype=dtype)
    expected = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.cfg.dtype is expected
    assert model(tokens()).dtype is expected


def test_float64_from_a_float32_checkpoint_equals_transformers_in_float64(gpt2_folder: Path) -> None:
    hf = GPT2LMHeadModel.from_pretrained(gpt2_folder, dtype=torch.float64).eval()
    model = HookedTransformer.from_pretrained(gpt2_folder, dtype=torch.float64)
    assert_same(model(tokens()).log_softmax(-1), reference(hf).logits.log_softmax(-1), FLOAT64)


def test_bfloat16_has_the_rounded_weights_of_transformers(gpt2_folder: Path) -> None:
    hf = GPT2LMHeadModel.from_pretrained(gpt2_folder, dtype=torch.bfloat16).eval()
    model = HookedTransformer.from_pretrained_no_processing(gpt2_folder, dtype=torch.bfloat16)
    assert torch.equal(model.W_E, hf.transformer.wte.weight)
    assert torch.equal(model.blocks[2].mlp.W_out, hf.transformer.h[2].mlp.c_proj.weight)


@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_the_first_layers_alone_are_a_shorter_model(n_layers: int, tokenizer: Any) -> None:
    hf = tiny_gpt2().double()
    model = convert(hf, tokenizer, first_n_layers=n_layers)
    hf.transformer.h = hf.transformer.h[:n_layers]
    hf.config.n_layer = n_layers
    assert model.cfg.n_layers == n_layers
    assert_same(model(tokens()), reference(hf).logits, FLOAT64)


def test_the_first_layers_of_a_folder_are_those_of_the_whole(gpt2_folder: Path) -> None:
    whole = HookedTransformer.from_pretrained(gpt2_folder)
    short = HookedTransformer.from_pretrained(gpt2_folder, first_n_layers=2)
    assert torch.equal(short(tokens(), stop_at_layer=2), whole(tokens(), stop_at_layer=2))


def test_a_shorter_context_has_the_same_logits_and_refuses_longer_input(gpt2_folder: Path) -> None:
    whole = HookedTransformer.from_pretrained(gpt2_folder)
    short = HookedTransformer.from_pretrained(gpt2_folder, n_ctx=9)
    assert short.W_pos.shape == (9, 24)
    assert_same(short(tokens()), whole(tokens()), 1e-6)
    with pytest.raises(ValueError, match="10 positions are more than this model's n_ctx of 9"):
        short(tiny_tokens(pos=10, vocab=VOCAB))


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_the_default_bos_can_be_set(prepend_bos: bool, gpt2_folder: Path) -> None:
    model = HookedTransformer.from_pretrained(gpt2_folder, default_prepend_bos=prepend_bos)
    assert model.cfg.default_prepend_bos is prepend_bos
    assert (model.to_tokens("the capital")[0, 0].item() == 0) is prepend_bos


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_default_padding_side_can_be_set(side: Any, gpt2_folder: Path) -> None:
    model = HookedTransformer.from_pretrained(gpt2_folder, default_padding_side=side, default_prepend_bos=False)
    assert model.cfg.default_padding_side == side
    row = model.to_tokens(["the", "the capital of France"])[0].tolist()
    assert row[0 if side == "left" else -1] == 0
    assert row[-1 if side == "left" else 0] != 0


def test_by_default_bos_is_prepended_and_padding_is_on_the_right(gpt2_folder: Path) -> None:
    model = HookedTransformer.from_pretrained(gpt2_folder)
    assert model.cfg.default_prepend_bos is True
    assert model.cfg.default_padding_side == "right"


def test_the_tokenizer_of_the_folder_is_read_and_can_be_replaced(gpt2_folder: Path, tokenizer: Any) -> None:
    model = HookedTransformer.from_pretrained(gpt2_folder)
    assert model.to_string(model.to_tokens("Mary went", prepend_bos=False)[0]) == "Mary went"
    tokenizer = tokenizer.__class__(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="A", eos_token="B", unk_token=None
    )
    replaced = HookedTransformer.from_pretrained(gpt2_folder, tokenizer=tokenizer)
    assert replaced.tokenizer.bos_token == "A"


def test_a_folder_without_a_tokenizer_gives_a_model_that_reads_tokens_only(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    model = HookedTransformer.from_pretrained(tmp_path)
    assert model.tokenizer is None
    assert model(tokens()).shape == (2, 9, VOCAB)
    with pytest.raises(ValueError, match="no tokenizer"):
        model("text")


def test_the_model_says_where_its_weights_came_from(gpt2_folder: Path) -> None:
    model = HookedTransformer.from_pretrained(gpt2_folder)
    assert model.cfg.original_architecture == "GPT2LMHeadModel"
    assert model.cfg.model_name == gpt2_folder.name
    assert HookedTransformer.from_pretrained(str(gpt2_folder) + "/").cfg.model_name == gpt2_folder.name


def test_the_device_asked_for_is_that_of_the_model(gpt2_folder: Path) -> None:
    model = HookedTransformer.from_pretrained(gpt2_folder, device="cpu")
    assert model.cfg.device == "cpu"
    assert model.W_E.device == torch.device("cpu")


@pytest.mark.parametrize("argument", ["checkpoint_index", "checkpoint_value"])
def test_a_training_checkpoint_of_a_family_without_any_is_refused(argument: str, gpt2_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="of no series that publishes training checkpoints"):
        HookedTransformer.from_pretrained(gpt2_folder, **{argument: 0})


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_a_head_of_its_own_wins_over_a_config_that_says_tied(where: str, tmp_path: Path) -> None:
    """As in transformers, which does not tie what a checkpoint gives two different values for."""
    theirs = tiny_gpt2(tie_word_embeddings=False)
    theirs.config.tie_word_embeddings = True
    tokens = tiny_tokens(vocab=VOCAB)
    expected = theirs(tokens).logits
    if where == "folder":
        tensors = {name: value.clone() for name, value in theirs.state_dict().items()}
        theirs.config.architectures = ["GPT2LMHeadModel"]
        theirs.config.save_pretrained(tmp_path)
        save_file(tensors, tmp_path / "model.safetensors")
        ours = HookedTransformer.from_pretrained_no_processing(tmp_path)
    else:
        ours = HookedTransformer.from_pretrained_no_processing("tiny", hf_model=theirs, tokenizer=tiny_tokenizer())
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-4)


def test_low_precision_rounds_once_and_after_processing(tmp_path: Path) -> None:
    theirs = tiny_gpt2().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    precise = HookedTransformer.from_pretrained("tiny", hf_model=theirs.double(), tokenizer=tiny_tokenizer())
    coarse = HookedTransformer.from_pretrained(tmp_path)
    assert coarse.cfg.dtype == torch.bfloat16
    for name, value in coarse.state_dict().items():
        once = precise.state_dict()[name].to(torch.float32).to(torch.bfloat16)
        # Float32 processing may tip a value over to the neighbouring bfloat16, and no further.
        assert ((value.float() - once.float()).abs() <= 2**-7 * once.float().abs() + 1e-6).all(), name
        assert (value == once).float().mean() > 0.99, name
