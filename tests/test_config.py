"""The config: what it accepts, fills in, refuses and gives back; and how a new model's weights are drawn from it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_lm import HookedTransformer, HookedTransformerConfig
from hooked_lm.config import ACTIVATIONS, INIT_MODES
from hooked_lm.config.lock import ASSIGNABLE
from tests.helpers import tiny_config, tiny_tokens

# Every field the contract names, with a value that is not its default where one goes with a plain model.
CLASSIC_FIELDS: dict[str, Any] = {
    "n_layers": 3,
    "d_model": 12,
    "n_ctx": 9,
    "d_head": 4,
    "n_heads": 6,
    "d_mlp": 20,
    "d_vocab": 11,
    "act_fn": "silu",
    "attn_only": False,
    "normalization_type": "RMS",
    "positional_embedding_type": "rotary",
    "attention_dir": "bidirectional",
    "n_key_value_heads": 2,
    "gated_mlp": True,
    "parallel_attn_mlp": True,
    "window_size": 3,
    "attn_types": ["local", "global", "local"],
    "rotary_dim": 2,
    "rotary_base": 5000.0,
    "seed": 3,
    "init_mode": "xavier_normal",
    "dtype": torch.float64,
    "device": "cpu",
    "eps": 1e-6,
    "final_rms": True,
    "attn_scale": 3.0,
    "use_attn_scale": True,
    "attn_scores_soft_cap": 5.0,
    "output_logits_soft_cap": 7.0,
    "scale_attn_by_inverse_layer_idx": True,
    "use_local_attn": True,
    "use_qk_norm": True,
    "use_normalization_before_and_after": True,
    "post_embedding_ln": True,
    "rotary_adjacent_pairs": True,
    "rotary_base_local": 100.0,
    "use_NTK_by_parts_rope": True,
    "NTK_by_parts_factor": 4.0,
    "NTK_by_parts_low_freq_factor": 2.0,
    "NTK_by_parts_high_freq_factor": 3.0,
    "NTK_original_ctx_len": 16,
    "num_experts": 4,
    "experts_per_token": 2,
    "d_vocab_out": 13,
    "tokenizer_name": "some/name",
    "model_name": "mine",
    "original_architecture": "SomeForCausalLM",
    "default_prepend_bos": False,
    "init_weights": False,
    "initializer_range": 0.5,
    "use_attn_result": True,
    "use_split_qkv_input": True,
    "use_attn_in": True,
    "use_hook_mlp_in": True,
    "use_hook_tokens": True,
    "ungroup_grouped_query_attention": True,
    "from_checkpoint": True,
    "checkpoint_index": 5,
    "checkpoint_label_type": "step",
    "checkpoint_value": 512,
    "tokenizer_prepends_bos": True,
}


EXPERTS: dict[str, Any] = {"num_experts": 4, "experts_per_token": 2}
SHARED: dict[str, Any] = {**EXPERTS, "gated_mlp": True, "d_shared_expert": 7, "shared_expert_gate": True}
ROTARY: dict[str, Any] = {"positional_embedding_type": "rotary"}
YARN: dict[str, Any] = {**ROTARY, "use_yarn_rope": True, "yarn_factor": 4.0}
DYNAMIC: dict[str, Any] = {**ROTARY, "use_dynamic_rope": True, "dynamic_rope_factor": 4.0}
BY_PARTS: dict[str, Any] = {**ROTARY, "use_NTK_by_parts_rope": True}
LONGROPE: dict[str, Any] = {
    **ROTARY,
    "use_longrope": True,
    "longrope_short_factors": [1.0, 2.0],
    "longrope_long_factors": [3.0, 4.0],
}

# The fields that came later, each in a config that it goes with.
LATER_FIELDS: list[dict[str, Any]] = [
    {"norm_placement": "after", "final_norm": False},
    {"norm_placement": "residual"},
    {"use_qk_norm": True, "qk_norm_type": "LN", "qk_norm_per_head_gains": True},
    {"use_qk_norm": True, "qk_norm_type": "RMSPre", "qk_norm_across_heads": True, "qk_norm_after_rotary": True},
    {"embedding_scale": 2.5, "logit_scale": 0.5, "tie_word_embeddings": True},
    {**ROTARY, "rotary_layers": [True, False]},
    {**YARN, "yarn_beta_fast": 3.0, "yarn_beta_slow": 0.5, "yarn_truncate": False, "yarn_attention_factor": 1.5},
    {**YARN, "yarn_original_max_position_embeddings": 9},
    {**DYNAMIC, "dynamic_rope_original_ctx_len": 9},
    {**LONGROPE, "longrope_attention_factor": 1.2, "longrope_original_ctx_len": 9},
    {"positional_embedding_type": "alibi", "alibi_scale": 0.5, "alibi_in_bfloat16": True},
    {"clip_qkv": 3.0, "attention_sinks": True},
    {**SHARED, "d_expert": 9, "moe_layers": [True, False], "norm_topk_prob": False},
    {**EXPERTS, "sparsemixer_jitter": 0.1},
    {**EXPERTS, "gated_mlp": True, "gated_limit": 7.0},
    {"act_fn": "xielu"},
]


@pytest.mark.parametrize("fields", LATER_FIELDS)
def test_every_later_field_is_kept_and_survives_the_way_through_json(fields: dict[str, Any]) -> None:
    cfg = tiny_config(**fields)
    assert {name: getattr(cfg, name) for name in fields} == fields
    assert HookedTransformerConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    assert cfg.replace() == cfg
    with torch.no_grad():
        assert HookedTransformer(cfg)(tiny_tokens()).isfinite().all()


def test_the_table_of_later_fields_leaves_none_out() -> None:
    named = {name for fields in LATER_FIELDS for name in fields} | set(CLASSIC_FIELDS)
    every = {field.name for field in dataclasses.fields(HookedTransformerConfig)}
    assert every - named == {"rotary_scaling_factor", "default_padding_side", "n_params"}


def test_every_classic_field_is_accepted_and_kept() -> None:
    cfg = HookedTransformerConfig(**CLASSIC_FIELDS)
    assert {name: getattr(cfg, name) for name in CLASSIC_FIELDS} == CLASSIC_FIELDS


def test_the_classic_number_of_parameters_is_accepted_and_counted_anew() -> None:
    cfg = tiny_config(n_params=7)
    assert cfg.n_params == 2 * (4 * 12 * 12 + 2 * 12 * 48)


def test_the_parameter_count_is_that_of_the_weights_of_blocks() -> None:
    for changes in (
        {},
        {"gated_mlp": True, "n_key_value_heads": 1},
        {"attn_only": True},
        {"num_experts": 3, "experts_per_token": 2, "gated_mlp": True},
        {**SHARED, "moe_layers": [False, True], "d_expert": 5},
        {"tie_word_embeddings": True, "attention_sinks": True, "act_fn": "xielu"},
    ):
        model = HookedTransformer(tiny_config(**changes))
        weights = [value for name, value in model.named_parameters() if ".W_" in name and name.startswith("blocks")]
        assert model.cfg.n_params == sum(value.numel() for value in weights), changes


# Defaults


def test_d_head_defaults_to_d_model_over_n_heads() -> None:
    assert HookedTransformerConfig(n_layers=1, d_model=12, n_ctx=4, n_heads=3, act_fn="relu").d_head == 4


def test_n_heads_defaults_to_d_model_over_d_head() -> None:
    assert HookedTransformerConfig(n_layers=1, d_model=12, n_ctx=4, d_head=2, act_fn="relu").n_heads == 6


def test_d_head_need_not_divide_d_model_when_both_are_given() -> None:
    cfg = tiny_config(d_head=5, n_heads=2)
    assert (cfg.d_head, cfg.n_heads, cfg.attn_scale) == (5, 2, math.sqrt(5))


def test_d_mlp_defaults_to_four_times_d_model_and_to_none_without_mlps() -> None:
    assert tiny_config().d_mlp == 48
    assert tiny_config(d_mlp=7).d_mlp == 7
    assert tiny_config(attn_only=True, act_fn=None).d_mlp is None


def test_the_other_defaults_follow_from_the_fields_given() -> None:
    cfg = tiny_config(positional_embedding_type="rotary")
    assert cfg.d_vocab_out == 20
    assert cfg.attn_scale == 2.0
    assert cfg.rotary_dim == 4
    assert cfg.initializer_range == 0.8 / math.sqrt(12)
    assert tiny_config(init_mode="xavier_uniform").initializer_range == 1.0
    assert cfg.n_kv_heads == 3
    assert cfg.normalization_type == "LN"
    assert not cfg.use_local_attn


def test_use_attn_scale_false_leaves_scores_unscaled_also_in_a_config_whose_scale_was_filled_in() -> None:
    assert tiny_config(use_attn_scale=False).score_scale(1) == 1.0
    assert tiny_config().replace(use_attn_scale=False).score_scale(1) == 1.0


def test_score_scale_divides_by_the_scale_and_by_the_layer_where_asked() -> None:
    assert tiny_config(attn_scale=5.0).score_scale(1) == 0.2
    assert tiny_config(attn_scale=5.0, scale_attn_by_inverse_layer_idx=True).score_scale(1) == 0.1


def test_a_window_alone_makes_every_layer_local() -> None:
    cfg = tiny_config(window_size=3)
    assert [cfg.window(0), cfg.window(1)] == [3, 3]


def test_attn_types_say_which_layers_are_local() -> None:
    cfg = tiny_config(window_size=3, attn_types=["global", "local"])
    assert [cfg.window(0), cfg.window(1)] == [None, 3]


def test_use_local_attn_false_wins_over_a_window() -> None:
    assert tiny_config(use_local_attn=False, window_size=3).window(0) is None


def test_is_layer_norm_activation_is_true_for_solu_ln_alone() -> None:
    assert [name for name in ACTIVATIONS if tiny_config(act_fn=name).is_layer_norm_activation()] == ["solu_ln"]
    assert not tiny_config(attn_only=True, act_fn=None).is_layer_norm_activation()


# Refusals


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n_layers": -1}, "n_layers is an integer of at least 0"),
        ({"n_layers": 2.0}, "n_layers is an integer"),
        ({"n_layers": True}, "n_layers is an integer"),
        ({"d_model": 0}, "d_model is an integer of at least 1"),
        ({"n_ctx": 0}, "n_ctx is an integer of at least 1"),
        ({"n_heads": -1}, "give n_heads or d_head"),
        ({"n_heads": 5}, "d_model 12 is not a multiple of n_heads 5"),
        ({"n_heads": -1, "d_head": 5}, "d_model 12 is not a multiple of d_head 5"),
        ({"n_heads": 0}, "n_heads is an integer of at least 1"),
        ({"n_key_value_heads": 2}, "n_heads 3 is not a multiple of n_key_value_heads 2"),
        ({"n_key_value_heads": 0}, "n_key_value_heads is an integer of at least 1"),
        ({"attn_scale": 0.0}, "attn_scale"),
        ({"attn_scale": -2.0}, "attn_scale"),
        ({"d_mlp": 0}, "d_mlp is an integer of at least 1"),
        ({"d_vocab": 0}, "d_vocab is an integer of at least 1"),
        ({"d_vocab_out": 0}, "d_vocab_out is an integer of at least 1"),
        ({"act_fn": None}, "act_fn is missing"),
        ({"act_fn": "gelu_nwe"}, "did you mean 'gelu_new'"),
        ({"attn_only": True, "gated_mlp": True}, "attn_only means no MLP"),
        ({"attn_only": True, "num_experts": 2, "experts_per_token": 1}, "attn_only means no MLP"),
        ({"num_experts": 2}, "num_experts and experts_per_token go together"),
        ({"experts_per_token": 2}, "num_experts and experts_per_token go together"),
        ({"num_experts": 2, "experts_per_token": 3}, "experts_per_token 3 is not in 1-2"),
        ({"gated_mlp": True, "act_fn": "solu_ln"}, "solu_ln is not defined for a gated MLP"),
        ({"num_experts": 2, "experts_per_token": 1, "act_fn": "solu_ln"}, "solu_ln is not defined for a mixture"),
        ({"normalization_type": "LNpre"}, "did you mean 'LNPre'"),
        ({"positional_embedding_type": "rotery"}, "did you mean 'rotary'"),
        ({"positional_embedding_type": "rotary", "rotary_dim": 3}, "rotary_dim 3 is not even"),
        ({"positional_embedding_type": "rotary", "rotary_dim": 6}, "rotary_dim 6 is not even and at most d_head 4"),
        ({"rotary_base": 0.0}, "rotary_base is positive"),
        ({"attention_dir": "casual"}, "did you mean 'causal'"),
        ({"init_mode": "xavier"}, "init_mode='xavier' is none of"),
        ({"default_padding_side": "rigth"}, "did you mean 'right'"),
        ({"use_local_attn": True}, "use_local_attn needs window_size"),
        ({"attn_types": ["local", "global"]}, "give window_size"),
        ({"window_size": 3, "attn_types": ["local"]}, "for each of 2 layers"),
        ({"window_size": 3, "attn_types": ["local", "lcoal"]}, "'global' or 'local'"),
        ({"window_size": 0}, "window_size is an integer of at least 1"),
        ({"eps": -1e-5}, "eps is not negative"),
        ({"dtype": "float23"}, "dtype is a floating-point torch dtype"),
        ({"dtype": torch.int64}, "dtype is a floating-point torch dtype"),
        # Norms
        ({"norm_placement": "befor"}, "norm_placement='befor' is none of .*did you mean 'before'"),
        (
            {"norm_placement": "after", "use_normalization_before_and_after": True},
            "use_normalization_before_and_after contradicts norm_placement='after'",
        ),
        ({"norm_placement": "residual", "parallel_attn_mlp": True}, "norms on the residual stream .*not in parallel"),
        ({"final_norm": False, "final_rms": True}, "final_rms is about the final norm"),
        ({"use_qk_norm": True, "qk_norm_type": "LNPre"}, "qk_norm_type='LNPre' is none of"),
        ({"qk_norm_across_heads": True}, "qk_norm_across_heads .* needs use_qk_norm=True"),
        ({"qk_norm_per_head_gains": True}, "qk_norm_per_head_gains .* needs use_qk_norm=True"),
        ({"qk_norm_after_rotary": True}, "qk_norm_after_rotary .* needs use_qk_norm=True"),
        # Embeddings, logits, scores
        ({"embedding_scale": 0.0}, "embedding_scale is positive; got 0.0"),
        ({"logit_scale": None}, "logit_scale is positive; got None"),
        ({"logit_scale": math.nan}, "logit_scale is positive; got nan"),
        ({"clip_qkv": -1.0}, "clip_qkv is positive; got -1.0"),
        ({"tie_word_embeddings": True, "d_vocab_out": 7}, "one vocabulary, not 20 in and 7 out"),
        # Positions
        ({"rotary_base_local": -1.0}, "rotary_base_local is positive; got -1.0"),
        ({"rotary_layers": [True, False]}, "rotary_layers goes with rotary positions, not 'standard'"),
        ({**ROTARY, "rotary_layers": [True]}, "rotary_layers holds True or False for each of 2 layers; got .True."),
        ({**ROTARY, "rotary_layers": [1, 0]}, "rotary_layers holds True or False for each of 2 layers"),
        ({**ROTARY, "rotary_layers": True}, "rotary_layers holds True or False for each of 2 layers; got True"),
        ({**YARN, "use_dynamic_rope": True}, "scaled in one way, not by use_yarn_rope and use_dynamic_rope"),
        ({**LONGROPE, "rotary_scaling_factor": 2.0}, "not by use_longrope and rotary_scaling_factor"),
        ({**BY_PARTS, "use_yarn_rope": True}, "not by use_NTK_by_parts_rope and use_yarn_rope"),
        ({**ROTARY, "rotary_scaling_factor": 0.0}, "rotary_scaling_factor divides positions"),
        ({**BY_PARTS, "NTK_by_parts_factor": 0.0}, "NTK_by_parts_factor is positive"),
        ({**BY_PARTS, "NTK_original_ctx_len": 0}, "NTK_original_ctx_len is positive"),
        ({**BY_PARTS, "NTK_by_parts_low_freq_factor": 4.0}, "NTK_by_parts_low_freq_factor 4.0 is not .*below .* 4.0"),
        ({**YARN, "yarn_factor": -4.0}, "yarn_factor is positive; got -4.0"),
        ({**YARN, "yarn_beta_fast": 0.0}, "yarn_beta_fast is positive"),
        ({**YARN, "yarn_beta_slow": 0.0}, "yarn_beta_slow is positive"),
        ({**YARN, "yarn_attention_factor": 0.0}, "yarn_attention_factor is positive"),
        ({**YARN, "yarn_original_max_position_embeddings": 0}, "yarn_original_max_position_embeddings is positive"),
        ({**DYNAMIC, "dynamic_rope_factor": "4"}, "dynamic_rope_factor is positive; got '4'"),
        ({**DYNAMIC, "dynamic_rope_original_ctx_len": 0}, "dynamic_rope_original_ctx_len is positive"),
        ({**DYNAMIC, "rotary_dim": 2}, "use_dynamic_rope .*rotary_dim 2"),
        ({**LONGROPE, "longrope_long_factors": None}, "longrope_long_factors holds one .* each of 2 pairs; got None"),
        ({**LONGROPE, "longrope_short_factors": [1.0]}, "longrope_short_factors holds one .* each of 2 pairs"),
        ({**LONGROPE, "longrope_short_factors": [1.0, 0.0]}, "longrope_short_factors holds one positive factor"),
        ({**LONGROPE, "longrope_original_ctx_len": -1}, "longrope_original_ctx_len is positive"),
        ({**LONGROPE, "longrope_attention_factor": 0}, "longrope_attention_factor is positive"),
        ({"alibi_scale": 0.0}, "alibi_scale is positive"),
        (
            {"positional_embedding_type": "alibi", "alibi_in_bfloat16": True, "attention_dir": "bidirectional"},
            "alibi_in_bfloat16",
        ),
        # Experts
        ({"moe_layers": [True, False]}, "moe_layers goes with num_experts"),
        ({"d_expert": 3}, "d_expert goes with num_experts"),
        ({"d_shared_expert": 3}, "d_shared_expert goes with num_experts"),
        ({"shared_expert_gate": True}, "shared_expert_gate goes with num_experts"),
        ({"sparsemixer_jitter": 0.1}, "sparsemixer_jitter goes with num_experts"),
        ({"gated_limit": 7.0}, "gated_limit goes with num_experts"),
        ({"attn_only": True, "d_shared_expert": 3}, "d_shared_expert goes with num_experts"),
        ({"num_experts": 4.0, "experts_per_token": 2}, "num_experts is an integer of at least 1; got 4.0"),
        ({**EXPERTS, "act_fn": "xielu"}, "xielu is not defined for a mixture of experts"),
        ({**EXPERTS, "moe_layers": [True]}, "moe_layers holds True or False for each of 2 layers"),
        ({**EXPERTS, "d_expert": 0}, "d_expert is an integer of at least 1; got 0"),
        ({**SHARED, "d_shared_expert": 0}, "d_shared_expert is an integer of at least 1; got 0"),
        ({**SHARED, "d_shared_expert": None}, "shared_expert_gate needs a shared expert: give d_shared_expert"),
        ({**SHARED, "gated_mlp": False}, "d_shared_expert needs gated_mlp=True"),
        (
            {"num_experts": 4, "experts_per_token": 3, "sparsemixer_jitter": 0.1},
            "SparseMixer picks two experts, not experts_per_token=3",
        ),
        ({**EXPERTS, "sparsemixer_jitter": -0.1}, "sparsemixer_jitter is positive"),
        ({**EXPERTS, "gated_limit": 7.0}, "give gated_mlp=True"),
        ({**EXPERTS, "gated_mlp": True, "gated_limit": -7.0}, "gated_limit is positive; got -7.0"),
    ],
)
def test_a_contradiction_or_a_value_out_of_range_raises_and_is_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tiny_config(**changes)


def test_a_misspelt_field_raises_and_names_the_nearest() -> None:
    with pytest.raises(TypeError, match="no field 'n_head'; did you mean 'n_heads'"):
        tiny_config(n_head=3)


def test_a_misspelt_field_in_a_dictionary_raises_and_names_the_nearest() -> None:
    with pytest.raises(TypeError, match="no field 'normalisation_type'; did you mean 'normalization_type'"):
        HookedTransformerConfig.from_dict({**tiny_config().to_dict(), "normalisation_type": "LN"})


def test_a_misspelt_field_in_replace_raises() -> None:
    with pytest.raises(TypeError, match="no field 'd_modle'; did you mean 'd_model'"):
        tiny_config().replace(d_modle=24)


@pytest.mark.parametrize("name", ["n_layers", "d_model", "n_ctx"])
def test_a_dictionary_that_lacks_a_required_field_raises_and_names_it(name: str) -> None:
    fields = tiny_config().to_dict()
    del fields[name]
    with pytest.raises(ValueError, match=f"the config lacks {name}"):
        HookedTransformerConfig.from_dict(fields)


def test_from_dict_takes_a_dictionary_only() -> None:
    with pytest.raises(TypeError, match="built from a dictionary, got list"):
        HookedTransformerConfig.from_dict([("n_layers", 2)])  # type: ignore[arg-type]


RETIRED = {
    "load_in_4bit": (False, True),
    "n_devices": (1, 2),
    "relative_attention_max_distance": (None, 128),
    "relative_attention_num_buckets": (None, 32),
    "decoder_start_token_id": (None, 0),
    "trust_remote_code": (False, True),
}


@pytest.mark.parametrize("name", RETIRED)
def test_a_retired_field_is_dropped_at_its_default_and_refused_at_any_other_value(name: str) -> None:
    harmless, other = RETIRED[name]
    cfg = tiny_config(**{name: harmless})
    assert cfg == tiny_config()
    assert name not in cfg.to_dict()
    with pytest.raises(ValueError, match=f"{name}={other!r} is not supported; only {harmless!r} is"):
        tiny_config(**{name: other})


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

ACTING: dict[str, Any] = {
    "attn_scores_soft_cap": 5.0,
    "output_logits_soft_cap": 7.0,
    "attention_dir": "bidirectional",
    "n_ctx": 5,
    "dtype": torch.float16,
    "device": "meta",
    "default_prepend_bos": False,
    "default_padding_side": "left",
    "use_attn_result": True,
    "use_split_qkv_input": True,
    "use_attn_in": True,
    "use_hook_mlp_in": True,
    "use_hook_tokens": True,
    "model_name": "mine",
    "tokenizer_name": "some/name",
    "tokenizer_prepends_bos": True,
    "original_architecture": "SomeForCausalLM",
    "from_checkpoint": True,
    "checkpoint_index": 5,
    "checkpoint_label_type": "step",
    "checkpoint_value": 512,
    "seed": 3,
    "init_mode": "xavier_normal",
    "initializer_range": 0.5,
    "init_weights": False,
}


class Owner:
    """Stands for a model: writes down what its config asks of it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def told(self, name: str, value: object) -> None:
        self.calls.append((name, value))


def locked_config(owner: Owner | None = None, **fields: Any) -> HookedTransformerConfig:
    cfg = tiny_config(**fields)
    cfg.lock((owner or Owner()).told)
    return cfg


def test_the_table_of_acting_fields_is_the_configs_own() -> None:
    assert set(ACTING) == set(ASSIGNABLE)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(HookedTransformerConfig)])
def test_a_field_of_a_locked_config_acts_or_refuses_to_be_assigned(name: str) -> None:
    owner = Owner()
    cfg = locked_config(owner)
    if name in ACTING:
        setattr(cfg, name, ACTING[name])
        assert getattr(cfg, name) == ACTING[name]
        assert owner.calls == ([(name, ACTING[name])] if name in {"dtype", "device"} else [])
        return
    before = getattr(cfg, name)
    with pytest.raises(AttributeError, match=f"cfg.{name} = 'other' would change nothing: this config belongs to a"):
        setattr(cfg, name, "other")
    setattr(cfg, name, copy.deepcopy(before))
    assert getattr(cfg, name) is before
    assert owner.calls == []


def test_the_refusal_says_how_to_build_a_model_with_the_field() -> None:
    cfg = locked_config()
    with pytest.raises(AttributeError) as caught:
        cfg.n_heads = 6
    assert str(caught.value) == (
        "cfg.n_heads = 6 would change nothing: this config belongs to a model that is already built. "
        "Build a model anew: HookedTransformer(model.cfg.replace(n_heads=6))"
    )
    assert cfg.replace(n_heads=6).n_heads == 6


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("attn_scores_soft_cap", "5", "attn_scores_soft_cap is a finite number; got '5'"),
        ("attn_scores_soft_cap", True, "attn_scores_soft_cap is a finite number; got True"),
        ("output_logits_soft_cap", math.inf, "output_logits_soft_cap is a finite number; got inf"),
        ("output_logits_soft_cap", None, "output_logits_soft_cap is a finite number; got None"),
        ("attention_dir", "casual", "did you mean 'causal'"),
        ("n_ctx", 0, "n_ctx is an integer of at least 1; got 0"),
        ("n_ctx", 5.0, "n_ctx is an integer of at least 1; got 5.0"),
        ("dtype", "float23", "dtype is a floating-point torch dtype or its name; got 'float23'"),
        ("device", None, "device is a torch device or its name; got None"),
        ("default_prepend_bos", "yes", "default_prepend_bos is True or False; got 'yes'"),
        ("default_padding_side", "rigth", "did you mean 'right'"),
        ("use_attn_result", None, "use_attn_result is True or False; got None"),
        ("init_mode", "xavier", "init_mode='xavier' is none of"),
    ],
)
def test_a_bad_value_for_an_acting_field_raises_and_is_not_stored(name: str, value: object, match: str) -> None:
    owner = Owner()
    cfg = locked_config(owner, device="cpu")
    before = getattr(cfg, name)
    with pytest.raises(ValueError, match=match):
        setattr(cfg, name, value)
    assert getattr(cfg, name) == before
    assert owner.calls == []


def test_a_locked_model_with_learned_positions_refuses_a_longer_context_and_one_without_takes_it() -> None:
    learned, rotary = locked_config(n_ctx=8), locked_config(n_ctx=8, **ROTARY)
    learned.n_ctx = 4
    learned.n_ctx = 8
    with pytest.raises(ValueError, match="n_ctx=9 is more than the 8 positions this model has learned"):
        learned.n_ctx = 9
    rotary.n_ctx = 9
    assert (learned.n_ctx, rotary.n_ctx) == (8, 9)


def test_a_locked_config_refuses_a_direction_that_contradicts_its_other_fields() -> None:
    cfg = locked_config(positional_embedding_type="alibi", alibi_in_bfloat16=True)
    with pytest.raises(ValueError, match="alibi_in_bfloat16"):
        cfg.attention_dir = "bidirectional"


def test_dtype_and_device_are_parsed_and_the_owner_is_told_only_of_a_change() -> None:
    owner = Owner()
    cfg = locked_config(owner, device="cpu")
    cfg.dtype = "bfloat16"  # type: ignore[assignment]
    cfg.device = torch.device("meta")  # type: ignore[assignment]
    cfg.dtype, cfg.device = torch.bfloat16, "meta"
    cfg.device = torch.device("meta")  # type: ignore[assignment]
    assert (cfg.dtype, cfg.device) == (torch.bfloat16, "meta")
    assert owner.calls == [("dtype", torch.bfloat16), ("device", "meta")]


def test_a_move_that_fails_leaves_the_config_as_it_was_and_one_that_names_the_place_has_the_last_word() -> None:
    cfg, other = tiny_config(device="cpu"), tiny_config(device="cpu")

    def fails(name: str, value: object) -> None:
        raise RuntimeError("out of memory")

    cfg.lock(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        cfg.device = "cuda"
    assert cfg.device == "cpu"
    other.lock(lambda name, value: other.set_unlocked(device=f"{value}:0"))
    other.device = "cuda"
    assert other.device == "cuda:0"


def test_the_model_itself_sets_any_field_of_its_locked_config_and_no_other() -> None:
    owner = Owner()
    cfg = locked_config(owner)
    cfg.set_unlocked(normalization_type="LNPre", tie_word_embeddings=False, dtype=torch.float64, attn_types=["global"])
    assert (cfg.normalization_type, cfg.dtype, cfg.attn_types) == ("LNPre", torch.float64, ["global"])
    assert owner.calls == []
    with pytest.raises(AttributeError, match="no field 'd_modle'"):
        cfg.set_unlocked(n_heads=7, d_modle=3)
    assert cfg.n_heads == 3
    with pytest.raises(TypeError, match="changing this list"):
        cfg.attn_types.append("local")
    with pytest.raises(AttributeError, match=r"cfg.eps = 0.1 would change nothing"):
        cfg.eps = 0.1


def test_a_locked_config_cannot_be_locked_again_unlocked_or_robbed_of_a_field() -> None:
    cfg = locked_config()
    with pytest.raises(RuntimeError, match="belongs to a model already"):
        cfg.lock(Owner().told)
    with pytest.raises(AttributeError, match="cannot be unlocked"):
        cfg._lock = None  # type: ignore[assignment]
    for name in ("n_heads", "n_ctx", "_lock"):
        with pytest.raises(AttributeError, match=f"cfg.{name} cannot be deleted"):
            delattr(cfg, name)
    assert cfg.is_locked


@pytest.mark.parametrize("locked", [False, True])
def test_an_attribute_that_is_no_field_raises_locked_or_not(locked: bool) -> None:
    cfg = locked_config() if locked else tiny_config()
    with pytest.raises(AttributeError, match="no attribute 'n_head'"):
        cfg.n_head = 3  # type: ignore[attr-defined]


COPIES: dict[str, Any] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cfg: pickle.loads(pickle.dumps(cfg)),
    "dataclasses.replace": dataclasses.replace,
    "replace": lambda cfg: cfg.replace(),
    "to_dict": lambda cfg: HookedTransformerConfig.from_dict(cfg.to_dict()),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_locked_config_is_equal_unlocked_and_without_an_owner(way: str) -> None:
    owner = Owner()
    cfg = locked_config(owner, **ROTARY, window_size=3, attn_types=["local", "global"], rotary_layers=[True, False])
    copied = COPIES[way](cfg)
    assert (
        copied
        == cfg
        == tiny_config(**ROTARY, window_size=3, attn_types=["local", "global"], rotary_layers=[True, False])
    )
    assert cfg.is_locked
    assert not copied.is_locked
    copied.n_heads, copied.dtype = 6, torch.float16
    copied.attn_types[0] = copied.rotary_layers[0] = "other"
    assert (cfg.n_heads, cfg.dtype) == (3, torch.float64)
    assert (cfg.attn_types, cfg.rotary_layers) == (["local", "global"], [True, False])
    assert owner.calls == []


def test_a_locked_config_reads_as_an_unlocked_one() -> None:
    plain, locked = tiny_config(window_size=3), locked_config(window_size=3)
    assert repr(locked) == repr(plain)
    assert locked.to_dict() == plain.to_dict()
    assert type(locked.to_dict()["attn_types"]) is list
    assert json.dumps(dataclasses.asdict(locked) | {"dtype": ""}) == json.dumps(
        dataclasses.asdict(plain) | {"dtype": ""}
    )
    assert "_lock" not in {field.name for field in dataclasses.fields(locked)}


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: layers.append("local"),
        lambda layers: layers.pop(),
        lambda layers: layers.sort(),
        lambda layers: layers.__setitem__(0, "global"),
        lambda layers: layers.__delitem__(0),
        lambda layers: layers.__iadd__(["local"]),
        lambda layers: layers.extend(["local"]),
    ],
)
def test_a_list_of_a_locked_config_cannot_be_changed_in_place(change: Callable[[list[str]], object]) -> None:
    cfg = locked_config(window_size=3, attn_types=["local", "global"])
    assert cfg.attn_types is not None
    with pytest.raises(TypeError, match="changing this list would change nothing"):
        change(cfg.attn_types)
    assert cfg.attn_types == ["local", "global"]


def test_the_lock_does_not_keep_a_weakly_held_owner_alive() -> None:
    owner = Owner()
    cfg = tiny_config()
    told = weakref.WeakMethod(owner.told)
    cfg.lock(lambda name, value: told())
    gone = weakref.ref(owner)
    del owner
    assert gone() is None


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


def test_the_seed_leaves_torchs_global_generator_alone() -> None:
    before = torch.get_rng_state()
    HookedTransformer(tiny_config(seed=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("init_mode", INIT_MODES)
def test_the_same_seed_gives_the_same_model_and_another_seed_another(init_mode: str) -> None:
    one, same, other = (HookedTransformer(tiny_config(seed=seed, init_mode=init_mode)) for seed in (1, 1, 2))
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
        if ".W_" in name:
            assert not torch.equal(value, other.state_dict()[name])
    tokens = tiny_tokens()
    assert torch.equal(one(tokens), same(tokens))


def test_without_a_seed_the_global_generator_decides() -> None:
    models = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        models.append(HookedTransformer(tiny_config(seed=None)))
    assert torch.equal(models[0].W_E, models[1].W_E)
    assert not torch.equal(models[0].W_E, models[2].W_E)


def fans(name: str, value: torch.Tensor) -> tuple[int, int]:
    """Inputs and outputs a weight connects: the heads of a weight side by side."""
    if value.ndim == 3:
        return value.shape[1], value.shape[0] * value.shape[2]
    return value.shape[0], value.shape[1]


@pytest.mark.parametrize("init_mode", INIT_MODES)
@pytest.mark.parametrize("spread", [-1.0, 0.3])
def test_weights_have_the_spread_and_shape_of_their_init_mode(init_mode: str, spread: float) -> None:
    cfg = tiny_config(
        d_model=64, n_heads=4, d_vocab=200, n_ctx=50, n_layers=1, init_mode=init_mode, initializer_range=spread
    )
    gain = spread if spread > 0 else 0.1 if init_mode == "gpt2" else 1.0
    for name, value in HookedTransformer(cfg).named_parameters():
        kind = name.rpartition(".")[2]
        if not kind.startswith("W_"):
            assert torch.equal(value, torch.full_like(value, 1.0 if kind == "w" else 0.0)), name
            continue
        fan_in, fan_out = fans(name, value)
        expected = {
            "gpt2": gain,
            "xavier": gain * math.sqrt(2 / (fan_in + fan_out)),
            "kaiming": gain * math.sqrt(2 / fan_in),
        }
        std = expected[init_mode.split("_")[0]]
        assert abs(value.mean().item()) < 0.1 * std, name
        assert value.std().item() == pytest.approx(std, rel=0.05), name
        largest = value.abs().max().item() / std
        if init_mode.endswith("uniform"):
            assert 1.65 < largest <= math.sqrt(3), name
        else:
            assert largest > 2.5, name


def test_init_weights_false_draws_nothing() -> None:
    before = torch.get_rng_state()
    HookedTransformer(tiny_config(seed=None, init_weights=False))
    assert torch.equal(torch.get_rng_state(), before)


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
