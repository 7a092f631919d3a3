"""The config: what it accepts, fills in, refuses and gives back; and how a new model's weights are drawn from it."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from hooked_lm import HookedTransformer, HookedTransformerConfig
from hooked_lm.config import ACTIVATIONS
from tests.architectures_helpers import LATENT
from tests.config_helpers import CLASSIC_FIELDS, EXPERTS, GROUPS, ROTARY, ROUTER, SHARED
from tests.helpers import tiny_config, tiny_tokens

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
    {"first_norm": False, "unembed_act_fn": "gelu"},
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
    {"query_scale_beta": 0.1, "query_scale_ctx_len": 9},
    {"clip_qkv": 3.0, "attention_sinks": True, "attention_gate": True},
    {**SHARED, "d_expert": 9, "moe_layers": [True, False], "norm_topk_prob": False},
    {**EXPERTS, "sparsemixer_jitter": 0.1},
    {**ROUTER, "routed_scale": 2.5, "norm_topk_min": 0.1, "router_in_float32": True},
    {**GROUPS, "expert_group_score": "max"},
    {**LATENT, "latent_eps": 1e-5},
    {**EXPERTS, "gated_mlp": True, "gated_limit": 7.0},
    {**EXPERTS, "identity_experts": 1, "shortcut_experts": True},
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
        {"attention_gate": True, "n_key_value_heads": 1, "unembed_act_fn": "relu"},
        {"num_experts": 4, "experts_per_token": 2, "identity_experts": 1, "gated_mlp": True},
        {"num_experts": 4, "experts_per_token": 2, "identity_experts": 1, "shortcut_experts": True, "d_expert": 5},
        LATENT,
        {**LATENT, "d_latent_q": None, "d_value": None},
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
        ({"first_norm": False, "norm_placement": "after"}, "a norm that norm_placement='after' does not have"),
        ({"unembed_act_fn": "xielu"}, "unembed_act_fn='xielu' is none of"),
        ({"use_qk_norm": True, "qk_norm_type": "LNPre"}, "qk_norm_type='LNPre' is none of"),
        ({"qk_norm_across_heads": True}, "qk_norm_across_heads .* needs use_qk_norm=True"),
        ({"qk_norm_per_head_gains": True}, "qk_norm_per_head_gains .* needs use_qk_norm=True"),
        ({"qk_norm_after_rotary": True}, "qk_norm_after_rotary .* needs use_qk_norm=True"),
        # Embeddings, logits, scores
        ({"embedding_scale": 0.0}, "embedding_scale is positive; got 0.0"),
        ({"logit_scale": None}, "logit_scale is positive; got None"),
        ({"logit_scale": math.nan}, "logit_scale is positive; got nan"),
        ({"clip_qkv": -1.0}, "clip_qkv is positive; got -1.0"),
        ({"query_scale_beta": -0.1}, "query_scale_beta is not negative; got -0.1"),
        ({"query_scale_beta": math.nan}, "query_scale_beta is a finite number; got nan"),
        ({"query_scale_ctx_len": 0}, "query_scale_ctx_len is an integer of at least 1; got 0"),
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
        # Latent attention
        ({"d_latent_q": 5}, "d_latent_q is about latent attention: give d_latent_kv"),
        ({"d_value": 5}, "d_value is about latent attention: give d_latent_kv"),
        ({**LATENT, "d_latent_kv": 0}, "d_latent_kv is an integer of at least 1; got 0"),
        ({**LATENT, "d_value": 2.5}, "d_value is an integer of at least 1; got 2.5"),
        ({**LATENT, "rotary_dim": None}, "give positional_embedding_type='rotary' and a rotary_dim below d_head 6"),
        ({**LATENT, "positional_embedding_type": "alibi"}, "some of a head's dimensions rotate"),
        ({**LATENT, "n_key_value_heads": 1}, "leave out n_key_value_heads"),
        ({**LATENT, "use_qk_norm": True}, "are not defined for latent attention"),
        ({**LATENT, "clip_qkv": 1.0}, "are not defined for latent attention"),
        ({**LATENT, "latent_eps": -1.0}, "latent_eps is not negative; got -1.0"),
        ({**LATENT, "attention_gate": True}, "attention_gate is not defined for latent attention"),
        ({"attention_gate": True, "positional_embedding_type": "shortformer"}, "not defined for shortformer"),
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
        ({"router_scores": "sigmoid"}, "router_scores goes with num_experts"),
        ({"router_correction": True}, "router_correction goes with num_experts"),
        ({"router_in_float32": True}, "router_in_float32 goes with num_experts"),
        ({"routed_scale": 2.0}, "routed_scale goes with num_experts"),
        ({"expert_groups": 2}, "expert_groups goes with num_experts"),
        ({"identity_experts": 1}, "identity_experts goes with num_experts"),
        ({"shortcut_experts": True}, "shortcut_experts goes with num_experts"),
        ({**EXPERTS, "identity_experts": -1}, "identity_experts is an integer of at least 0; got -1"),
        ({**EXPERTS, "identity_experts": 4}, "identity_experts 4 leaves none of 4 experts with weights"),
        ({**EXPERTS, "shortcut_experts": True, "n_layers": 3}, "blocks in pairs, so n_layers is even; got 3"),
        ({**EXPERTS, "shortcut_experts": True, "moe_layers": [True, False]}, "needs moe_layers=None; got"),
        (
            {**EXPERTS, "shortcut_experts": True, "norm_placement": "after"},
            "needs norm_placement='before'; got 'after'",
        ),
        ({**EXPERTS, "shortcut_experts": True, "use_normalization_before_and_after": True}, "got 'before_and_after'"),
        ({**EXPERTS, "shortcut_experts": True, "parallel_attn_mlp": True}, "needs parallel_attn_mlp=False; got True"),
        ({**EXPERTS, "router_scores": "tanh"}, "router_scores='tanh' is none of"),
        ({**EXPERTS, "routed_scale": 0}, "routed_scale is positive; got 0"),
        ({**EXPERTS, "norm_topk_min": -1.0}, "norm_topk_min is a least sum of weights"),
        ({**ROUTER, "sparsemixer_jitter": 0.1}, "SparseMixer has weights of its own"),
        (
            {**EXPERTS, "expert_groups": 2, "expert_groups_per_token": 1, "sparsemixer_jitter": 0.1},
            "SparseMixer chooses among all experts",
        ),
        ({**EXPERTS, "expert_groups": 2}, "expert_groups and expert_groups_per_token go together"),
        ({**GROUPS, "expert_groups": 3}, "num_experts 4 is not a multiple of expert_groups 3"),
        ({**GROUPS, "expert_groups_per_token": 3}, "expert_groups_per_token 3 is not in 1-2"),
        ({**GROUPS, "expert_groups": 4}, "expert_group_score='top2' is the sum of a group's two best experts"),
        ({**GROUPS, "expert_group_score": "mean"}, "expert_group_score='mean' is none of"),
        ({**GROUPS, "experts_per_token": 3}, "experts_per_token 3 is more than the 2 experts of 1 groups"),
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
