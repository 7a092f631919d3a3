"""The rule engine: every source tensor is used once or dropped by name, and everything else raises and is named."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import CheckpointError, HookedTransformerConfig
from tests.helpers import tiny_config, tiny_gpt2
from weight_conversion.checkpoint import read_family
from weight_conversion.conversion import Conversion
from weight_conversion.families import gpt2
from weight_conversion.fields import ConfigFields
from weight_conversion.left_out import why_left_out
from weight_conversion.registry import FAMILIES, family_of
from weight_conversion.rules import Computed, Constant, Drop, Piece, Product, Rule, RuleTable, Split, axis_sizes
from weight_conversion.source import TensorsInMemory, TensorSource

# d_model 12, 3 heads of 4, 2 layers, vocabulary 20.
TABLE: RuleTable = (
    Rule("wte", "vocab d_model -> vocab d_model", ("embed.W_E",)),
    Rule("h.{layer}.q", "(head d_head) d_model -> head d_model d_head", ("blocks.{layer}.attn.W_Q",)),
    Rule(
        "h.{layer}.kv",
        "(part head d_head) -> part head d_head",
        ("blocks.{layer}.attn.b_K", "blocks.{layer}.attn.b_V"),
    ),
    Constant("blocks.{layer}.attn.b_O", "d_model"),
    Constant("unembed.b_U", "vocab_out"),
    Drop("h.{layer}.mask", "a constant"),
    Drop("version", "a constant"),
)


def source(**changes: Tensor | None) -> dict[str, Tensor]:
    """Random tensors that the table accounts for, some replaced or (None) left out."""
    shapes = {"wte": (20, 12), "h.0.q": (12, 12), "h.1.q": (12, 12), "h.0.kv": (24,), "h.1.kv": (24,)}
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor | None] = {
        name: torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in tensors.items() if value is not None}


class Counting(TensorsInMemory):
    """A checkpoint that remembers how often each tensor was read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.reads = dict.fromkeys(tensors, 0)

    def __getitem__(self, name: str) -> Tensor:
        self.reads[name] += 1
        return super().__getitem__(name)


def convert(
    table: RuleTable, tensors: TensorSource | dict[str, Tensor], cfg: HookedTransformerConfig, *args: Any, **kwargs: Any
) -> dict[str, Tensor]:
    """Everything that a conversion makes, in one dictionary."""
    opened = tensors if isinstance(tensors, TensorSource) else TensorsInMemory(tensors)
    conversion = Conversion(table, opened, cfg, *args, **kwargs)
    weights = {name: tensor for chunk in conversion for name, tensor in chunk.items()}
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == conversion.shapes
    return weights


def test_a_rule_rearranges_as_its_axes_say() -> None:
    tensors = source()
    weights = convert(TABLE, tensors, tiny_config())
    for layer in range(2):
        q, kv = tensors[f"h.{layer}.q"], tensors[f"h.{layer}.kv"]
        for head in range(3):
            rows = slice(4 * head, 4 * head + 4)
            assert torch.equal(weights[f"blocks.{layer}.attn.W_Q"][head], q[rows].T)
            assert torch.equal(weights[f"blocks.{layer}.attn.b_K"][head], kv[:12][rows])
            assert torch.equal(weights[f"blocks.{layer}.attn.b_V"][head], kv[12:][rows])


def test_constants_have_the_shape_of_their_axes_and_the_dtype_of_the_config() -> None:
    weights = convert(TABLE, source(), tiny_config(d_vocab_out=7, dtype=torch.bfloat16))
    assert torch.equal(weights["blocks.1.attn.b_O"], torch.zeros(12, dtype=torch.bfloat16))
    assert torch.equal(weights["unembed.b_U"], torch.zeros(7, dtype=torch.bfloat16))


def test_the_targets_are_those_of_every_layer_and_no_others() -> None:
    per_layer = [f"blocks.{layer}.attn.{name}" for layer in range(2) for name in ("W_Q", "b_K", "b_V", "b_O")]
    assert set(convert(TABLE, source(), tiny_config())) == {"embed.W_E", "unembed.b_U", *per_layer}


def test_what_can_be_a_view_of_the_source_is_one() -> None:
    tensors = source()
    weights = convert(TABLE, tensors, tiny_config())
    assert weights["embed.W_E"].data_ptr() == tensors["wte"].data_ptr()
    assert weights["blocks.0.attn.W_Q"].data_ptr() == tensors["h.0.q"].data_ptr()


def test_each_tensor_is_read_once_and_a_dropped_one_never() -> None:
    tensors = Counting(source(h__0__mask=torch.ones(1), h__1__mask=torch.ones(1), version=torch.ones(1)))
    convert(TABLE, tensors, tiny_config())
    dropped = {"h.0.mask", "h.1.mask", "version"}
    assert tensors.reads == {name: int(name not in dropped) for name in tensors}


def test_tensors_of_layers_that_are_not_kept_are_never_read() -> None:
    tensors = Counting(source())
    weights = convert(TABLE, tensors, tiny_config(), keep_layers=1)
    assert {name for name in weights if name.startswith("blocks.1")} == set()
    assert tensors.reads == {"wte": 1, "h.0.q": 1, "h.0.kv": 1, "h.1.q": 0, "h.1.kv": 0}


def test_a_dropped_tensor_may_be_absent() -> None:
    assert (
        convert(TABLE, source(), tiny_config()).keys()
        == convert(TABLE, source(version=torch.ones(1)), tiny_config()).keys()
    )


def test_a_missing_tensor_raises_and_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors that the config implies: wte, h\.1\.q$"):
        convert(TABLE, source(wte=None, h__1__q=None), tiny_config())


def test_a_surplus_tensor_raises_and_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"has 1 tensors that no rule accounts for: h\.0\.gate$"):
        convert(TABLE, source(h__0__gate=torch.ones(1)), tiny_config())


def test_a_tensor_of_a_layer_too_many_is_surplus() -> None:
    with pytest.raises(CheckpointError, match=r"no rule accounts for: h\.2\.mask, h\.2\.q$"):
        convert(TABLE, source(h__2__q=torch.ones(12, 12), h__2__mask=torch.ones(1)), tiny_config())


def test_missing_and_surplus_are_named_together() -> None:
    with pytest.raises(CheckpointError, match=r"lacks 1 .*: wte, and has 1 .*: wet$"):
        convert(TABLE, source(wte=None, wet=torch.ones(20, 12)), tiny_config())


def test_a_long_list_of_offenders_is_cut_and_counted() -> None:
    extra = {f"x{i:02}": torch.ones(1) for i in range(11)}
    with pytest.raises(CheckpointError, match=r"has 11 tensors .*: x00, .*x07 and 3 more$"):
        convert(TABLE, {**source(), **extra}, tiny_config())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("wte", (21, 12)),
        ("wte", (20, 13)),
        ("wte", (20,)),
        ("h__1__q", (12, 13)),
        ("h__1__q", (16, 12)),
        ("h__0__kv", (36,)),
    ],
)
def test_a_misshapen_tensor_raises_and_is_named_with_its_shape(name: str, shape: tuple[int, ...]) -> None:
    shown = re.escape(f"{name.replace('__', '.')} has shape {shape}")
    with pytest.raises(CheckpointError, match=shown + ".*the weights do not belong to this config"):
        convert(TABLE, source(**{name: torch.ones(shape)}), tiny_config())


def test_the_prefix_may_stand_before_every_name_or_none() -> None:
    tensors = source()
    prefixed = {f"model.{name}": value for name, value in tensors.items()}
    bare, with_prefix = (convert(TABLE, given, tiny_config(), prefix="model.") for given in (tensors, prefixed))
    assert bare.keys() == with_prefix.keys()
    assert all(torch.equal(bare[name], with_prefix[name]) for name in bare)


def test_a_tensor_that_is_there_with_and_without_the_prefix_raises() -> None:
    tensors = {**source(), "model.wte": torch.zeros(20, 12)}
    with pytest.raises(CheckpointError, match="wte"):
        convert(TABLE, tensors, tiny_config(), prefix="model.")


def test_a_table_that_uses_a_tensor_twice_without_saying_so_raises() -> None:
    table = (*TABLE, Rule("wte", "vocab d_model -> d_model vocab", ("unembed.W_U",)))
    with pytest.raises(CheckpointError, match="wte"):
        convert(table, source(), tiny_config())


def test_a_table_may_use_a_tensor_twice_when_it_says_so() -> None:
    table = (*TABLE, Rule("wte", "vocab d_model -> d_model vocab", ("unembed.W_U",), again=True))
    weights = convert(table, source(), tiny_config())
    assert torch.equal(weights["unembed.W_U"], weights["embed.W_E"].T)


def test_a_table_that_makes_a_tensor_twice_raises() -> None:
    table = (*TABLE, Rule("other", "vocab d_model -> vocab d_model", ("embed.W_E",)))
    with pytest.raises(CheckpointError, match=r"embed\.W_E"):
        convert(table, source(other=torch.ones(20, 12)), tiny_config())


def test_axis_sizes_are_those_of_the_glossary() -> None:
    cfg = tiny_config(
        n_heads=4, d_head=5, n_key_value_heads=2, d_mlp=7, d_vocab_out=9, num_experts=3, experts_per_token=1
    )
    assert axis_sizes(cfg) == {
        "head": 4,
        "kv_head": 2,
        "group": 2,
        "d_head": 5,
        "d_value": 5,
        "d_model": 12,
        "d_mlp": 7,
        "vocab": 20,
        "vocab_out": 9,
        "n_ctx": 16,
        "expert": 3,
        "choice": 3,
        "d_expert": 7,
        "1": 1,
    }
    assert "d_mlp" not in axis_sizes(tiny_config(attn_only=True, act_fn=None))


# What else an entry can be

GROUPED = {"n_heads": 4, "n_key_value_heads": 2, "d_head": 3, "num_experts": 3, "experts_per_token": 2}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_split_takes_apart_pieces_of_different_sizes() -> None:
    # Per key-value head: its two query heads, its key, its value.
    split = Split(
        "qkv",
        "(kv_head part d_head) d_model -> part kv_head d_model d_head",
        (
            Piece("W_Q", "group", "group kv_head d_model d_head -> (kv_head group) d_model d_head"),
            Piece("W_K", "1", "1 kv_head d_model d_head -> kv_head d_model d_head"),
            Piece("W_V", "1", "1 kv_head d_model d_head -> kv_head d_model d_head"),
        ),
    )
    fused, cfg = random(24, 12), tiny_config(**GROUPED)
    weights = convert((split,), {"qkv": fused}, cfg)
    blocks = fused.reshape(2, 4, 3, 12)
    for head in range(4):
        assert torch.equal(weights["W_Q"][head], blocks[head // 2, head % 2].T)
    assert torch.equal(weights["W_K"], blocks[:, 2].mT)
    assert torch.equal(weights["W_V"], blocks[:, 3].mT)
    assert torch.equal(split.invert(weights, cfg)["qkv"], fused)


def test_a_source_per_expert_is_stacked() -> None:
    rule = Rule("experts.{expert}.w", "expert d_expert d_model -> expert d_model d_expert", "W_in")
    tensors = {f"experts.{index}.w": random(48, 12) + index for index in range(3)}
    weights = convert((rule,), tensors, tiny_config(**GROUPED))
    assert all(torch.equal(weights["W_in"][index], tensors[f"experts.{index}.w"].T) for index in range(3))


def test_experts_of_different_shapes_raise() -> None:
    rule = Rule("experts.{expert}.w", "expert d_expert d_model -> expert d_model d_expert", "W_in")
    tensors = {f"experts.{index}.w": random(48 + index, 12) for index in range(3)}
    with pytest.raises(CheckpointError, match=r"experts\.\{expert\}\.w stands for tensors of different shapes"):
        convert((rule,), tensors, tiny_config(**GROUPED))


def test_a_missing_expert_raises_and_is_named() -> None:
    rule = Rule("experts.{expert}.w", "expert d_expert d_model -> expert d_model d_expert", "W_in")
    tensors = {f"experts.{index}.w": random(48, 12) for index in (0, 2)}
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors that the config implies: experts\.1\.w"):
        convert((rule,), tensors, tiny_config(**GROUPED))


def test_a_rule_scales_adds_and_skips_and_its_inverse_undoes_it() -> None:
    rule = Rule("positions", "n_ctx d_model -> n_ctx d_model", "W", scale=2.0, add=1.0, skip=2)
    table, cfg = random(18, 12), tiny_config()
    weights = convert((rule,), {"positions": table}, cfg)
    assert torch.equal(weights["W"], table[2:].double() * 2 + 1)
    back = rule.invert(weights, cfg)["positions"]
    assert torch.allclose(back[2:], table[2:].double())
    assert not back[:2].any()


def test_an_entry_for_some_layers_is_about_those_alone() -> None:
    table = (
        Rule("h.{layer}.dense", "d_mlp -> d_mlp", "blocks.{layer}.dense", layers=(0,)),
        Rule("h.{layer}.sparse", "d_mlp -> d_mlp", "blocks.{layer}.sparse", layers=(1,)),
    )
    weights = convert(table, {"h.0.dense": random(48), "h.1.sparse": random(48)}, tiny_config())
    assert set(weights) == {"blocks.0.dense", "blocks.1.sparse"}


def test_a_product_multiplies_and_cannot_be_taken_apart() -> None:
    product, cfg = Product("a", "b.T", "W"), tiny_config()
    weights = convert((product,), {"a": random(20, 5), "b": random(12, 5)}, cfg)
    assert torch.equal(weights["W"], random(20, 5).double() @ random(12, 5).double().T)
    with pytest.raises(CheckpointError, match="cannot be told apart again"):
        product.invert(weights, cfg)


def test_factors_that_do_not_multiply_raise() -> None:
    with pytest.raises(CheckpointError, match=r"a has shape \(20, 5\) and b\.T \(6, 12\): they do not multiply"):
        convert((Product("a", "b.T", "W"),), {"a": random(20, 5), "b": random(12, 6)}, tiny_config())


def test_a_dropped_tensor_that_has_to_hold_a_value_is_checked() -> None:
    drop, good, bad = Drop("beta", "a constant", value=0.5), torch.full((1,), 0.5), torch.full((1,), 0.6)
    rule = Rule("wte", "vocab d_model -> vocab d_model", "W")
    convert((rule, drop), {"wte": random(20, 12), "beta": good}, tiny_config())
    convert((rule, drop), {"wte": random(20, 12)}, tiny_config())
    with pytest.raises(CheckpointError, match=r"beta holds \[0\.6.*only 0\.5 is supported"):
        convert((rule, drop), {"wte": random(20, 12), "beta": bad}, tiny_config())


def test_a_constant_takes_no_memory_and_has_no_way_back_once_it_is_changed() -> None:
    constant, cfg = Constant("b", "d_model", 1.0), tiny_config()
    weights = convert((constant,), {}, cfg)
    assert weights["b"].untyped_storage().nbytes() == weights["b"].element_size()
    assert constant.invert(weights, cfg) == {}
    with pytest.raises(CheckpointError, match=r"b is not 1\.0 everywhere"):
        constant.invert({"b": weights["b"] + 1}, cfg)


def test_a_computed_tensor_has_no_way_back_once_it_is_changed() -> None:
    computed, cfg = Computed("W", lambda cfg: torch.ones(cfg.n_ctx, cfg.d_model)), tiny_config()
    weights = convert((computed,), {}, cfg)
    assert computed.invert(weights, cfg) == {}
    with pytest.raises(CheckpointError, match="W has been changed"):
        computed.invert({"W": weights["W"] * 2}, cfg)


# The families' tables


def test_every_architecture_belongs_to_one_family() -> None:
    names = [name for family in FAMILIES for name in family.architectures]
    assert len(set(names)) == len(names)
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize(
    "missing", ["transformer.wpe.weight", "transformer.h.1.mlp.c_fc.bias", "transformer.ln_f.bias"]
)
def test_a_gpt2_checkpoint_that_lacks_a_tensor_raises_and_names_it(missing: str) -> None:
    hf = tiny_gpt2()
    state = hf.state_dict()
    del state[missing]
    fields = {**hf.config.to_dict(), "architectures": ["GPT2LMHeadModel"]}
    cfg, table = read_family(gpt2.FAMILY, fields, "GPT2LMHeadModel")
    with pytest.raises(CheckpointError, match=re.escape(missing.removeprefix("transformer."))):
        convert(table, state, cfg, "transformer.")


def test_an_unknown_architecture_raises_and_names_the_nearest() -> None:
    with pytest.raises(
        CheckpointError, match=r"'GPT2LMHaedModel' is not among the supported ones; the nearest are GPT2"
    ):
        family_of("GPT2LMHaedModel")


def test_an_architecture_like_no_other_raises_without_a_list_of_all() -> None:
    with pytest.raises(CheckpointError, match=r"'Xyz' is not among .*docs/families\.md lists them") as raised:
        family_of("Xyz")
    assert "GPT2LMHeadModel" not in str(raised.value)


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("BertForMaskedLM", "BERT and other encoders: this library is about decoders"),
        ("T5ForConditionalGeneration", "T5, BART and other encoder-decoders"),
        ("JambaForCausalLM", "recurrent"),
        ("Gemma3nForCausalLM", "share keys and values"),
    ],
)
def test_an_architecture_of_a_kind_that_is_left_out_says_why(architecture: str, why: str) -> None:
    with pytest.raises(CheckpointError, match=rf"'{architecture}' is not supported \(.*{why}") as raised:
        family_of(architecture)
    assert "\n" not in str(raised.value)


def test_no_supported_architecture_is_of_a_kind_that_is_left_out() -> None:
    left_out = [name for family in FAMILIES for name in family.architectures if why_left_out(name) is not None]
    assert left_out == []


# The fields of a config


def test_a_field_that_is_taken_ignored_or_generic_is_accounted_for() -> None:
    fields = ConfigFields({"width": 3, "dropout": 0.1, "use_cache": True, "bias": False}, "Some")
    assert fields.take("width") == 3
    fields.ignore("dropout", "not there")
    fields.require("bias", False)
    fields.finish()


def test_a_field_that_nobody_read_raises_with_its_value() -> None:
    fields = ConfigFields({"width": 3, "logit_scale": 0.5}, "Some")
    fields.take("width")
    with pytest.raises(CheckpointError, match=r"the Some config has fields .*\{'logit_scale': 0.5\}"):
        fields.finish()


def test_a_field_that_is_not_there_raises_when_taken() -> None:
    with pytest.raises(CheckpointError, match=r"the Some config lacks 'width'; it has \['depth'\]"):
        ConfigFields({"depth": 3}, "Some").take("width")


def test_a_field_with_another_than_the_required_value_raises() -> None:
    with pytest.raises(CheckpointError, match="Some with bias=True is not supported; only False is"):
        ConfigFields({"bias": True}, "Some").require("bias", False)
