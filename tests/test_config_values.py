"""A config's equality, dictionaries and copies, and what follows from its fields."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_lm import HookedTransformer, HookedTransformerConfig
from hooked_lm.config import INIT_MODES
from tests.config_helpers import CLASSIC_FIELDS, EXPERTS, ROTARY, SHARED
from tests.helpers import tiny_config

# Equality, dictionaries, copies


def test_configs_compare_equal_by_value() -> None:
    assert tiny_config() == tiny_config()
    for field in dataclasses.fields(HookedTransformerConfig):
        if field.name in {"n_params", "device"}:
            continue
        plain, changed = tiny_config(num_experts=4, experts_per_token=2), None
        # d_mlp and the like are derived too, so each is changed after the config has been built.
        changed = copy.copy(plain)
        setattr(changed, field.name, object())
        assert changed != plain, field.name


def test_the_device_is_no_part_of_a_configs_value() -> None:
    assert tiny_config(device="cpu") == tiny_config(device="meta")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attn_only": True, "act_fn": None, "normalization_type": None},
        {"window_size": 3, "attn_types": ["local", "global"], "dtype": torch.bfloat16, "device": "cpu"},
        {"positional_embedding_type": "rotary", "rotary_dim": 2, "n_key_value_heads": 1, "gated_mlp": True},
        {"num_experts": 4, "experts_per_token": 2, "use_attn_scale": False, "d_vocab_out": 5},
    ],
)
def test_a_config_survives_the_way_through_json(changes: dict[str, Any]) -> None:
    cfg = tiny_config(**changes)
    again = HookedTransformerConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert again == cfg
    assert again.device == cfg.device
    assert again.dtype is cfg.dtype


def test_every_field_survives_the_way_through_json() -> None:
    cfg = HookedTransformerConfig(**CLASSIC_FIELDS)
    again = HookedTransformerConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert again == cfg
    assert again.to_dict() == cfg.to_dict()


def test_to_dict_has_every_field_and_shares_nothing_with_the_config() -> None:
    cfg = tiny_config(window_size=3)
    fields = cfg.to_dict()
    assert set(fields) == {field.name for field in dataclasses.fields(HookedTransformerConfig)}
    fields["attn_types"][0] = "global"
    assert cfg.attn_types == ["local", "local"]


def test_unwrap_takes_a_config_or_a_dictionary() -> None:
    cfg = tiny_config()
    assert HookedTransformerConfig.unwrap(cfg) is cfg
    assert HookedTransformerConfig.unwrap(cfg.to_dict()) == cfg


def test_replace_gives_a_changed_copy_and_checks_it() -> None:
    cfg = tiny_config()
    assert cfg.replace(eps=1e-3) == tiny_config(eps=1e-3)
    assert cfg == tiny_config()
    with pytest.raises(ValueError, match="n_heads is an integer of at least 1"):
        cfg.replace(n_heads=0)


def test_a_config_can_be_copied_and_pickled() -> None:
    cfg = tiny_config(window_size=3)
    assert copy.deepcopy(cfg) == cfg
    assert pickle.loads(pickle.dumps(cfg)) == cfg


# The lock on a built model's config


def test_the_dtype_may_be_named() -> None:
    assert tiny_config(dtype="bfloat16").dtype is torch.bfloat16
    assert tiny_config(dtype="torch.float64").dtype is torch.float64


def test_a_model_keeps_its_own_copy_of_the_config() -> None:
    cfg = tiny_config(window_size=3)
    model = HookedTransformer(cfg)
    model.to(torch.float32)
    model.fold_layer_norm()
    assert cfg == tiny_config(window_size=3)
    assert (model.cfg.dtype, model.cfg.normalization_type) == (torch.float32, "LNPre")


def test_a_model_takes_a_dictionary_for_its_config() -> None:
    assert HookedTransformer(tiny_config().to_dict()).cfg == tiny_config()


# The draw of a new model's weights


def test_a_model_without_a_vocabulary_raises() -> None:
    with pytest.raises(ValueError, match="d_vocab is missing"):
        HookedTransformer(tiny_config(d_vocab=-1))


def test_replacing_a_field_works_out_anew_what_follows_from_it() -> None:
    config = tiny_config(d_vocab_out=-1)
    changed = config.replace(d_model=24, d_head=8, d_vocab=30)
    assert (changed.attn_scale, changed.d_mlp, changed.d_vocab_out) == (8**0.5, 96, 30)
    kept = tiny_config(attn_scale=5.0, d_mlp=7, d_vocab_out=11).replace(d_model=24, d_head=8, d_vocab=30)
    assert (kept.attn_scale, kept.d_mlp, kept.d_vocab_out) == (5.0, 7, 11)


def test_a_final_rms_norm_without_norms_is_a_contradiction() -> None:
    with pytest.raises(ValueError, match="final_rms"):
        tiny_config(normalization_type=None, final_rms=True)


@pytest.mark.parametrize("how", ["config", "argument"])
def test_a_model_is_made_on_the_device_that_is_asked_for(how: str, gpt2_folder: Path) -> None:
    if how == "config":
        model = HookedTransformer(tiny_config(device="meta", init_weights=False))
    else:
        model = HookedTransformer.from_pretrained(gpt2_folder, device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.cfg.device == "meta"


def test_the_two_names_of_norms_before_and_after_follow_each_other() -> None:
    both = tiny_config(norm_placement="before_and_after")
    assert both.use_normalization_before_and_after
    assert both == tiny_config(use_normalization_before_and_after=True)
    assert both.replace(norm_placement="after") == tiny_config(norm_placement="after")
    assert both.replace(use_normalization_before_and_after=False) == tiny_config()
    assert tiny_config().replace(use_normalization_before_and_after=True) == both
    assert both.replace(eps=1e-3).norm_placement == "before_and_after"
    with pytest.raises(ValueError, match="contradicts norm_placement='after'"):
        both.replace(norm_placement="after", use_normalization_before_and_after=True)


@pytest.mark.parametrize(
    ("name", "fields"), [("moe_layers", {**EXPERTS, "d_expert": 9}), ("rotary_layers", {**ROTARY, "rotary_dim": 2})]
)
def test_what_is_said_per_layer_is_a_list_of_the_configs_own(name: str, fields: dict[str, Any]) -> None:
    mine = [True, False, True]  # longer than there are layers: what is left of a longer model
    cfg = tiny_config(**fields, **{name: mine})
    mine[0] = False
    assert getattr(cfg, name) == [True, False, True]
    assert tiny_config(**fields, **{name: (True, False, True)}) == cfg


def test_layers_have_experts_and_rotate_as_the_config_says() -> None:
    mixed = tiny_config(**EXPERTS, moe_layers=[False, True])
    assert [mixed.has_experts(layer) for layer in range(2)] == [False, True]
    assert [tiny_config(**EXPERTS).has_experts(layer) for layer in range(2)] == [True, True]
    assert not tiny_config().has_experts(0)
    turning = tiny_config(**ROTARY, rotary_layers=[False, True])
    assert [turning.rotates(layer) for layer in range(2)] == [False, True]
    assert not tiny_config().rotates(0)


def test_experts_are_as_wide_as_the_mlps_unless_they_have_a_width_of_their_own() -> None:
    assert tiny_config(**EXPERTS).expert_width == 48
    assert tiny_config(**EXPERTS, d_expert=5).expert_width == 5
    with pytest.raises(ValueError, match="attn_only: it has no MLP"):
        tiny_config(attn_only=True).expert_width  # noqa: B018 (the property raises)


@pytest.mark.parametrize("init_mode", INIT_MODES)
def test_a_new_models_later_parameters_start_as_what_they_are(init_mode: str) -> None:
    experts = HookedTransformer(tiny_config(**SHARED, attention_sinks=True, init_mode=init_mode))
    for block in experts.blocks:
        assert not block.attn.sinks.any()
        assert block.mlp.W_shared_gate.std() > 0
        assert block.mlp.shared.W_in.std() > 0
        assert not block.mlp.b_shared_gate.any()
        assert not block.mlp.shared.b_out.any()
    xielu = HookedTransformer(tiny_config(act_fn="xielu", use_qk_norm=True, qk_norm_type="LN", init_mode=init_mode))
    for block in xielu.blocks:
        # A learned activation function starts with its own values, 0.8 both.
        assert block.mlp.act_fn.alpha_p.exp().log1p().item() == pytest.approx(0.8)
        assert block.mlp.act_fn.alpha_n.exp().log1p().item() + 0.5 == pytest.approx(0.8)
        assert bool((block.attn.q_norm.w == 1).all())
        assert not block.attn.k_norm.b.any()
