"""A model's config is what its forward pass computes with: changing a field acts on everything, or raises."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from hooked_lm import HookedTransformer, HookedTransformerConfig, Intervention, metrics
from hooked_lm.circuits.logit_lens import logit_lens
from hooked_lm.sweep import sweep
from tests.helpers import randomise_, tiny_config, tiny_model, tiny_tokens

# Another value of every field that says what is computed.
OTHER: dict[str, Any] = {
    "n_layers": 1,
    "d_model": 24,
    "d_head": 6,
    "n_heads": 2,
    "n_key_value_heads": 1,
    "d_mlp": 20,
    "d_vocab": 30,
    "d_vocab_out": 30,
    "act_fn": "relu",
    "attn_only": True,
    "gated_mlp": True,
    "parallel_attn_mlp": True,
    "normalization_type": "RMS",
    "eps": 0.5,
    "final_rms": True,
    "final_norm": False,
    "first_norm": False,
    "unembed_act_fn": "relu",
    "norm_placement": "after",
    "use_qk_norm": True,
    "post_embedding_ln": True,
    "embedding_scale": 3.0,
    "logit_scale": 3.0,
    "tie_word_embeddings": True,
    "positional_embedding_type": "rotary",
    "rotary_dim": 2,
    "rotary_base": 100.0,
    "rotary_scaling_factor": 2.0,
    "alibi_scale": 2.0,
    "attn_types": ["local", "global"],
    "use_local_attn": True,
    "window_size": 2,
    "use_attn_scale": False,
    "attn_scale": 3.0,
    "scale_attn_by_inverse_layer_idx": True,
    "clip_qkv": 0.1,
    "attention_sinks": True,
    "attention_gate": True,
    "num_experts": 2,
    "experts_per_token": 1,
}


def logits(model: HookedTransformer) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_tokens())


@pytest.mark.parametrize("field", OTHER)
def test_a_field_that_was_built_in_raises_and_says_how_to_build_anew(field: str) -> None:
    model = tiny_model()
    before = logits(model)
    with pytest.raises(AttributeError, match=rf"cfg\.{field} = .*HookedTransformer\(model\.cfg\.replace\({field}="):
        setattr(model.cfg, field, OTHER[field])
    assert getattr(model.cfg, field) == getattr(tiny_config(), field)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("field", "value"),
    [("attn_scores_soft_cap", 0.5), ("output_logits_soft_cap", 0.5), ("attention_dir", "bidirectional")],
)
def test_a_field_that_acts_gives_the_model_that_it_would_have_built(field: str, value: Any) -> None:
    model = tiny_model()
    before = logits(model)
    setattr(model.cfg, field, value)
    built = randomise_(HookedTransformer(tiny_config(**{field: value})))
    assert torch.equal(logits(model), logits(built))
    assert (logits(model) - before).abs().max() > 1e-3
    # Everything that works with the model computes with the new value too.
    lens = logit_lens(model, tiny_tokens(), verbose=False)
    expected = logits(model).log_softmax(-1).topk(5, -1).values
    torch.testing.assert_close(lens.top_log_probs[-1], expected, rtol=0, atol=1e-9)
    cell = Intervention("blocks.0.attn.hook_z", "zero", pos=2)
    swept = sweep(model, tiny_tokens(), [cell], metrics.logit(3), verbose=False)
    run = metrics.logit(3)(model.run(tiny_tokens(), interventions=[cell]).detach())
    torch.testing.assert_close(swept[0], run, rtol=0, atol=1e-9)


def test_a_shorter_context_refuses_longer_prompts() -> None:
    model = tiny_model()
    model.cfg.n_ctx = 6
    with pytest.raises(ValueError, match="7 positions are more than this model's n_ctx of 6"):
        model(tiny_tokens(pos=7))
    with pytest.raises(ValueError, match="n_ctx"):
        model.cfg.n_ctx = 17  # there are sixteen learned positions


def test_dtype_and_device_move_the_model() -> None:
    model = tiny_model()
    model.cfg.dtype = torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model(tiny_tokens()).dtype == torch.float32
    model.cfg.device = "meta"
    assert model.W_E.is_meta
    model = tiny_model().to(torch.bfloat16)
    assert model.cfg.dtype == torch.bfloat16


def test_the_gates_are_set_by_their_setters() -> None:
    model = tiny_model()
    for gate in ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in"):
        getattr(model, f"set_{gate}")(True)
        assert getattr(model.cfg, gate)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda cfg: cfg.replace(), HookedTransformerConfig.unwrap]
)
def test_a_copy_of_the_config_is_free_and_does_nothing_to_the_model(copied: Any) -> None:
    model = tiny_model()
    if copied == HookedTransformerConfig.unwrap:
        cfg = copied(model.cfg.to_dict())
    else:
        cfg = copied(model.cfg)
    cfg.n_layers = 1
    assert HookedTransformer(cfg).cfg.n_layers == 1
    assert model.cfg.n_layers == 2


def test_a_copy_of_the_model_has_a_locked_config_of_its_own() -> None:
    model = tiny_model()
    twin = copy.deepcopy(model)
    with pytest.raises(AttributeError, match="would change nothing"):
        twin.cfg.n_heads = 2
    twin.cfg.output_logits_soft_cap = 0.1
    assert torch.equal(logits(model), logits(tiny_model()))
    assert not torch.equal(logits(twin), logits(model))
    twin.cfg.dtype = torch.float32
    assert model.W_E.dtype == torch.float64


def test_another_config_cannot_be_put_in_its_place() -> None:
    model = tiny_model()
    with pytest.raises(AttributeError, match="keeps the config it was built with"):
        model.cfg = tiny_config(n_layers=1)


def test_the_table_of_this_file_has_every_field_that_describes_an_architecture() -> None:
    scalings = ("NTK_", "yarn_", "use_yarn", "use_NTK", "dynamic_", "use_dynamic", "longrope_", "use_longrope")
    acting = {"attn_scores_soft_cap", "output_logits_soft_cap", "attention_dir", "n_ctx", "dtype", "device"}
    acting.add("ungroup_grouped_query_attention")
    described = {
        *("qk_norm_type", "qk_norm_across_heads", "qk_norm_per_head_gains", "qk_norm_after_rotary"),
        *("rotary_base_local", "rotary_adjacent_pairs", "rotary_layers", "alibi_in_bfloat16", "moe_layers", "d_expert"),
        *("d_shared_expert", "shared_expert_gate", "norm_topk_prob", "sparsemixer_jitter", "gated_limit", "n_params"),
        "use_normalization_before_and_after",
        *("query_scale_beta", "query_scale_ctx_len", "d_latent_kv", "d_latent_q", "d_value", "latent_eps"),
        *("norm_topk_min", "routed_scale", "router_scores", "router_correction", "router_in_float32"),
        *("expert_groups", "expert_groups_per_token", "expert_group_score", "identity_experts", "shortcut_experts"),
    }
    free = {"init_mode", "initializer_range", "init_weights", "seed", "from_checkpoint", "original_architecture"}
    for field in dataclasses.fields(HookedTransformerConfig):
        name = field.name
        words = name.startswith(("default_", "tokenizer_", "model_name", "checkpoint_", "use_attn_result", "use_split"))
        words = words or name in ("use_attn_in", "use_hook_mlp_in", "use_hook_tokens")
        assert name in OTHER or name in acting | described | free or name.startswith(scalings) or words, name
        if name in described or name.startswith(scalings):
            model = tiny_model(n_layers=1)
            with pytest.raises(AttributeError):
                setattr(model.cfg, name, "something else")
