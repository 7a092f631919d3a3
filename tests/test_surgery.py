"""`model.with_layers`: each block computes in its new place what it computed in its old one, to the bit."""

from __future__ import annotations

import copy
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooked_lm import HookedTransformer, HookedTransformerConfig
from hooked_lm.components import Attention
from hooked_lm.hooks import HookPoint
from hooked_lm.weights import select_layers
from hooked_lm.weights.surgery import PER_LAYER
from tests.family_rows import ROWS, Row
from tests.helpers import tiny_config, tiny_model, tiny_tokenizer, tiny_tokens

# One row of each architecture: a few with the suite, all of them with HOOKED_LM_FAMILIES=1.
ALL_ROWS = list({row.architecture: row for row in ROWS}.values())
SOME = ("GPT2LMHeadModel", "Gemma3ForCausalLM", "GptOssForCausalLM", "LongcatFlashForCausalLM", "DeepseekV3ForCausalLM")
FEW = [row for row in ALL_ROWS if row.architecture in SOME]
CHOSEN = ROWS if os.environ.get("HOOKED_LM_FAMILIES") else FEW

TOKENS = tiny_tokens(2, 7)
# Small models with a setting for each layer that matters on seven tokens.
ROTARY: dict[str, Any] = {"positional_embedding_type": "rotary", "gated_mlp": True, "normalization_type": "RMS"}
KINDS: dict[str, dict[str, Any]] = {
    "windows": {"attn_types": ["local", "global", "local", "global"], "window_size": 2},
    "local rotary base": {
        **ROTARY,
        "attn_types": ["global", "local", "global", "local"],
        "window_size": 3,
        "rotary_base_local": 10.0,
    },
    "some layers rotate": {**ROTARY, "rotary_layers": [True, False, False, True]},
    "some layers have experts": {
        "num_experts": 3,
        "experts_per_token": 2,
        "gated_mlp": True,
        "moe_layers": [False, True, True, False],
    },
    "norms on the stream": {"norm_placement": "residual", "positional_embedding_type": "shortformer"},
    "norms folded": {"normalization_type": "LNPre"},
    "tied": {"tie_word_embeddings": True},
    "inverse of the layer": {"scale_attn_by_inverse_layer_idx": True, "attn_scores_soft_cap": 2.0},
    "attention only": {"attn_only": True, "positional_embedding_type": "alibi"},
}
ORDERS = ([0, 2, 1, 1, 3], [-1, 0])


def deep(**changes: Any) -> HookedTransformer:
    return tiny_model(**{"n_layers": 4, **changes})


def by_hand(model: HookedTransformer, layers: list[int], tokens: Tensor = TOKENS) -> Tensor:
    """The logits of a model that runs its blocks in an order, one after the other."""
    n_layers = model.cfg.n_layers
    stream, _, positions, _ = model.input_to_embed(tokens)
    for layer in (layer % n_layers for layer in layers):
        stop = layer + 1
        stream = model(stream, start_at_layer=layer, stop_at_layer=stop, shortformer_pos_embed=positions)
    return model.logits_of(stream)


@pytest.mark.parametrize("row", CHOSEN, ids=lambda row: row.id)
@torch.no_grad()
def test_all_layers_are_the_model_and_some_are_its_prefix(row: Row, tmp_path: Path) -> None:
    row.save(row.build(), tmp_path)
    model = HookedTransformer.from_pretrained_no_processing(tmp_path)
    tokens, whole = row.tokens(), range(model.cfg.n_layers)
    same = model.with_layers(whole)
    assert same.cfg == model.cfg
    assert torch.equal(same(tokens), model(tokens))
    stop = model.cfg.stop_after(0)
    prefix = model.with_layers(whole[:stop])
    expected = model.logits_of(model(tokens, stop_at_layer=stop)) if stop < len(whole) else model(tokens)
    assert torch.equal(prefix(tokens), expected)
    assert prefix.cfg.n_params == HookedTransformerConfig.from_dict(prefix.cfg.to_dict()).n_params


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", ORDERS, ids=str)
@torch.no_grad()
def test_every_order_runs_the_blocks_in_that_order(kind: str, layers: list[int]) -> None:
    model = deep(**KINDS[kind])
    found, expected = model.with_layers(layers)(TOKENS), by_hand(model, layers)
    assert (found - expected).abs().max() < 1e-12
    assert kind == "inverse of the layer" or torch.equal(found, expected)
    assert (found - model(TOKENS)).abs().max() > 1e-3


@torch.no_grad()
def test_blocks_in_pairs_move_in_pairs() -> None:
    model = deep(
        num_experts=4, experts_per_token=2, identity_experts=1, gated_mlp=True, shortcut_experts=True, d_expert=8
    )
    moved = model.with_layers([2, 3, 0, 1])
    stream = model(model(TOKENS, stop_at_layer=0), start_at_layer=2, stop_at_layer=4)
    assert torch.equal(moved(TOKENS), model.logits_of(model(stream, start_at_layer=0, stop_at_layer=2)))
    for apart in ([0, 1, 2], [1, 0], [0, 3], [1, 2], [0, 0]):
        with pytest.raises(ValueError, match="keep pairs together"):
            model.with_layers(apart)


@torch.no_grad()
def test_a_first_block_without_norm_stays_the_first() -> None:
    model = deep(first_norm=False, normalization_type="RMSPre")
    assert torch.equal(model.with_layers([0, 3, 1])(TOKENS), by_hand(model, [0, 3, 1]))
    for wrong in ([1, 2], [1, 0], [0, 0]):
        with pytest.raises(ValueError, match="layer 0 comes first"):
            model.with_layers(wrong)


@pytest.mark.parametrize("changes", [{"use_qk_norm": True}, {"clip_qkv": 3.0}], ids=str)
def test_a_divisor_by_layer_that_weights_cannot_carry_raises(changes: dict[str, Any]) -> None:
    model = deep(scale_attn_by_inverse_layer_idx=True, **changes)
    assert torch.equal(model.with_layers([0, 1])(TOKENS), by_hand(model, [0, 1]))
    with pytest.raises(ValueError, match=r"scores in block 3 are divided by 4 .* by 2 in its new place"):
        model.with_layers([0, 3])


def test_the_fields_that_move_are_all_that_hold_an_entry_for_each_layer() -> None:
    lists = {field.name for field in fields(HookedTransformerConfig) if "list" in str(field.type)}
    # Rotary scaling has a factor for each pair of dimensions.
    assert lists == {*PER_LAYER, "longrope_short_factors", "longrope_long_factors"}


@torch.no_grad()
def test_no_layers_leave_the_embeddings() -> None:
    model = deep()
    empty = model.with_layers([])
    assert empty.cfg.n_layers == 0
    assert torch.equal(empty(TOKENS), model.logits_of(model(TOKENS, stop_at_layer=0)))


# What the new model has


@pytest.mark.parametrize("kind", ["tied", "windows"])
@torch.no_grad()
def test_no_memory_is_shared_with_the_model_or_between_repeats(kind: str) -> None:
    model = deep(**KINDS[kind])
    before, made = model(TOKENS), model.with_layers([1, 1, 0])
    after = made(TOKENS)
    starts = [one.untyped_storage().data_ptr() for one in (*model.parameters(), *made.parameters())]
    assert len(set(starts)) == len(starts)
    for parameter in made.blocks[0].parameters():
        parameter.zero_()
    assert torch.equal(model(TOKENS), before)
    # A block of zeros adds nothing.
    without = made(TOKENS)
    assert torch.equal(without, by_hand(model, [1, 0]))
    for parameter in model.parameters():
        parameter.add_(1.0)
    assert torch.equal(made(TOKENS), without)
    assert not torch.equal(after, without)


def test_views_of_a_file_are_copied(tmp_path: Path) -> None:
    deep(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = HookedTransformer.from_pretrained_no_processing(tmp_path)
    made = model.with_layers([0, 0])
    with torch.no_grad():
        made.blocks[0].attn.W_O.zero_()
        made.embed.W_E.zero_()
    again = HookedTransformer.from_pretrained_no_processing(tmp_path)
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert made.blocks[1].attn.W_O.any()


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    made = deep(**KINDS["local rotary base"]).with_layers([1, 0, 0])
    made.save_pretrained(tmp_path)
    again = HookedTransformer.from_pretrained_no_processing(tmp_path)
    assert again.cfg.attn_types == ["local", "global", "global"]
    assert torch.equal(again(TOKENS), made(TOKENS))


class Named(HookedTransformer):
    """A class of one's own that adds a method."""

    def n_blocks(self) -> int:
        return len(self.blocks)


def test_class_tokenizer_settings_and_training_flags_are_kept() -> None:
    model = Named(
        tiny_config(d_vocab=300, n_layers=3, dtype=torch.float32, default_prepend_bos=False), tiny_tokenizer()
    )
    model.eval()
    model.processed, model.cfg.attn_scores_soft_cap = ("fold_value_biases",), 1.5
    model.blocks[2].requires_grad_(False)
    model.embed.W_E.requires_grad_(False)
    made = model.with_layers([2, 0])
    assert isinstance(made, Named)
    assert made.n_blocks() == 2
    assert made.cfg == model.cfg.replace(n_layers=2)
    assert made.processed == ("fold_value_biases",)
    assert not made.training
    assert made.to_str_tokens("When John") == model.to_str_tokens("When John")
    frozen = {name for name, one in made.named_parameters() if not one.requires_grad}
    assert frozen == {name for name, _ in made.named_parameters() if name.startswith("blocks.0.")} | {"embed.W_E"}
    assert made(TOKENS, return_type="loss").requires_grad


def test_a_copied_model_can_be_cut_too() -> None:
    model = copy.deepcopy(deep())
    assert torch.equal(model.with_layers([1])(TOKENS), by_hand(model, [1]))


@torch.no_grad()
def test_precision_is_kept_weight_by_weight() -> None:
    model = deep(dtype=torch.bfloat16, scale_attn_by_inverse_layer_idx=True)
    model.blocks[1].ln1.w.data = model.blocks[1].ln1.w.data.float()
    made = model.with_layers([1])
    assert made.cfg.dtype == torch.bfloat16
    assert made.blocks[0].attn.W_Q.dtype == torch.bfloat16
    assert made.blocks[0].ln1.w.dtype == torch.float32


def test_a_model_without_memory_stays_one() -> None:
    with torch.device("meta"):
        model = HookedTransformer(tiny_config(n_layers=3, init_weights=False), move_to_device=False)
    assert {one.device.type for one in model.with_layers([2, 2]).parameters()} == {"meta"}


def test_blocks_of_a_spread_model_stay_where_they_are() -> None:
    # The meta device is a second device that every machine has.
    model = deep().spread({"cpu": 2, "meta": 2})
    made = model.with_layers([3, 0, 3])
    assert made.spread_over is not None
    assert (made.spread_over.home.type, made.cfg.device) == ("cpu", model.cfg.device)
    assert [one.type for one in made.spread_over.blocks] == ["meta", "cpu", "meta"]
    here = model.with_layers([1, 0])
    assert here.spread_over is None
    assert torch.equal(here(TOKENS), by_hand(deep(), [1, 0]))


# What the new model would lack


def double(x: Tensor, hook: Any) -> Tensor:
    return 2 * x


class Louder(Attention):
    """A component of one's own."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


def test_hooks_raise_rather_than_be_lost() -> None:
    model = deep()
    model.add_perma_hook("blocks.1.hook_resid_pre", double)
    with pytest.raises(ValueError, match=r"hooks are attached at blocks\.1\.hook_resid_pre, .*remove them first"):
        model.with_layers([1])
    model.reset_hooks(including_permanent=True)
    model.add_hook("*hook_z", double, dir="bwd")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.hook_z and at 3 other hook points"):
        model.with_layers([1])
    model.reset_hooks()
    assert model.with_layers([1]).cfg.n_layers == 1


def own_attention(model: HookedTransformer) -> None:
    model.blocks[2].attn = Louder(model.cfg, layer_id=2)


def own_module(model: HookedTransformer) -> None:
    model.probe = nn.Linear(3, 3)


def own_attribute(model: HookedTransformer) -> None:
    model.note = "mine"


def own_forward(model: HookedTransformer) -> None:
    model.forward = lambda *args, **kwargs: None  # type: ignore[method-assign]


def torch_hook(model: HookedTransformer) -> None:
    model.register_forward_hook(lambda *args: None)


def gradient_hook(model: HookedTransformer) -> None:
    model.blocks[2].attn.W_O.register_hook(lambda gradient: 2 * gradient)


def own_scale(model: HookedTransformer) -> None:
    model.blocks[2].attn.scale = 3.0


def own_embedding_scale(model: HookedTransformer) -> None:
    model.embed.scale = 3.0


def own_hook_point(model: HookedTransformer) -> None:
    model.blocks[2].hook_mine = HookPoint("batch pos d_model")


def other_norm(model: HookedTransformer) -> None:
    model.blocks[2].ln1.centred = False


def own_note(model: HookedTransformer) -> None:
    model.blocks[2].mlp.note = "mine"


def own_block_forward(model: HookedTransformer) -> None:
    model.blocks[3].forward = model.blocks[2].forward


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (own_attention, r"blocks\.2\.attn is a Louder, which overrides forward"),
        (own_module, "probe is a Linear"),
        (own_attribute, "note"),
        (own_forward, "forward"),
        (torch_hook, "hooks of torch's"),
        (gradient_hook, r"hooks on the gradient of blocks\.2\.attn\.W_O"),
        (own_scale, r"blocks\.2\.attn\.scale is 3\.0"),
        (own_embedding_scale, r"embed\.scale is 3\.0"),
        (own_hook_point, r"blocks\.2\.hook_mine|blocks\.2 has a hook_mine"),
        (other_norm, r"blocks\.2\.ln1\.centred is False"),
        (own_note, r"blocks\.2\.mlp\.note is 'mine'"),
        (own_block_forward, r"blocks\.3 has a forward of its own"),
    ],
)
def test_what_is_no_weight_raises_rather_than_be_lost(change: Any, named: str) -> None:
    model = deep()
    change(model)
    with pytest.raises(ValueError, match=named):
        model.with_layers([0, 2, 3])


def test_a_part_of_a_model_that_is_shared_out_raises() -> None:
    model = deep()
    model.ranks = object()
    with pytest.raises(ValueError, match="this process has a part of the model's weights"):
        model.with_layers([0])


def test_components_of_layers_that_are_left_out_do_not_matter() -> None:
    model = deep()
    own_attention(model)
    assert torch.equal(model.with_layers([0, 1])(TOKENS), by_hand(model, [0, 1]))


@pytest.mark.parametrize("kind", ["windows", "norms folded", "tied"])
@torch.no_grad()
def test_a_model_that_was_processed_in_place_can_be_cut(kind: str) -> None:
    model = deep(**KINDS[kind])
    model.process_weights_(refactor_factored_attn_matrices=True)
    made = model.with_layers([2, 0])
    assert torch.equal(made(TOKENS), by_hand(model, [2, 0]))
    assert made.processed == model.processed


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([0, 4], ValueError, "there is no layer 4: this model has layers 0-3"),
        ([-5], ValueError, "there is no layer -5"),
        (2, TypeError, "sequence of indices"),
        ("01", TypeError, "sequence of indices"),
        ([1.0], TypeError, "a layer"),
        ([True], TypeError, "a layer"),
    ],
)
def test_layers_are_checked(layers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        deep().with_layers(layers)


def test_the_pure_function_leaves_its_arguments_alone() -> None:
    model = deep(**KINDS["inverse of the layer"])
    weights = model.own_tensors()
    before = {name: value.clone() for name, value in weights.items()}
    cfg, made = select_layers(model.cfg, weights, [3, 1])
    assert (cfg.n_layers, model.cfg.n_layers) == (2, 4)
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], value) for name, value in before.items())
    assert torch.equal(made["blocks.0.attn.W_Q"], weights["blocks.3.attn.W_Q"] / 4)
    assert made["blocks.1.attn.W_Q"] is weights["blocks.1.attn.W_Q"]
    assert made["blocks.0.attn.W_K"] is weights["blocks.3.attn.W_K"]
