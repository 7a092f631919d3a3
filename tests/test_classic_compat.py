"""What the classic library left behind still runs: its state dicts, its configs, its notebooks."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hooked_lm import HookedTransformer, HookedTransformerConfig, utils
from hooked_lm.components import GroupedQueryAttention
from hooked_lm.hooks import HookPoint
from tests.helpers import randomise_, tiny_config, tiny_model, tiny_tokens

# A config as the classic library's `to_dict` gives it, for the tiny model of the tests.
CLASSIC_CONFIG: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 12,
    "n_ctx": 16,
    "d_head": 4,
    "model_name": "custom",
    "n_heads": 3,
    "d_mlp": 48,
    "act_fn": "gelu_new",
    "d_vocab": 20,
    "eps": 1e-5,
    "use_attn_result": False,
    "use_attn_scale": True,
    "attn_scale": 2.0,
    "use_split_qkv_input": False,
    "use_hook_mlp_in": False,
    "use_attn_in": False,
    "use_qk_norm": False,
    "use_local_attn": False,
    "ungroup_grouped_query_attention": False,
    "original_architecture": None,
    "from_checkpoint": False,
    "checkpoint_index": None,
    "checkpoint_label_type": None,
    "checkpoint_value": None,
    "tokenizer_name": None,
    "window_size": None,
    "attn_types": None,
    "init_mode": "gpt2",
    "normalization_type": "LN",
    "device": "cpu",
    "n_devices": 1,
    "attention_dir": "causal",
    "attn_only": False,
    "seed": 0,
    "initializer_range": 0.23094010767585033,
    "init_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "positional_embedding_type": "standard",
    "final_rms": False,
    "d_vocab_out": 20,
    "parallel_attn_mlp": False,
    "rotary_dim": None,
    "n_params": 3456,
    "use_hook_tokens": False,
    "gated_mlp": False,
    "default_prepend_bos": True,
    "dtype": torch.float64,
    "tokenizer_prepends_bos": None,
    "n_key_value_heads": None,
    "post_embedding_ln": False,
    "rotary_base": 10000,
    "rotary_base_local": None,
    "rotary_scaling_factor": 1.0,
    "trust_remote_code": False,
    "rotary_adjacent_pairs": False,
    "load_in_4bit": False,
    "num_experts": None,
    "experts_per_token": None,
    "relative_attention_max_distance": None,
    "relative_attention_num_buckets": None,
    "decoder_start_token_id": None,
    "tie_word_embeddings": False,
    "use_normalization_before_and_after": False,
    "attn_scores_soft_cap": -1.0,
    "output_logits_soft_cap": -1.0,
    "use_NTK_by_parts_rope": False,
    "NTK_by_parts_low_freq_factor": 1.0,
    "NTK_by_parts_high_freq_factor": 4.0,
    "NTK_by_parts_factor": 8.0,
    "NTK_original_ctx_len": 8192,
}


def as_classic(model: HookedTransformer) -> dict[str, Tensor]:
    """The model's state dict as the classic library would have saved it."""
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        *path, last = name.split(".")
        if model.cfg.n_key_value_heads is not None and path[-1] == "attn" and last in ("W_K", "W_V", "b_K", "b_V"):
            last = f"_{last}"
        state[".".join([*path, last])] = value.clone()
    for layer in range(model.cfg.n_layers):
        n_ctx = model.cfg.n_ctx
        state[f"blocks.{layer}.attn.mask"] = torch.ones(n_ctx, n_ctx).tril().bool()
        state[f"blocks.{layer}.attn.IGNORE"] = torch.tensor(float("-inf"))
        if model.cfg.positional_embedding_type == "rotary":
            state[f"blocks.{layer}.attn.rotary_sin"] = torch.zeros(n_ctx, 4)
            state[f"blocks.{layer}.attn.rotary_cos"] = torch.ones(n_ctx, 4)
    return state


def fresh_like(model: HookedTransformer) -> HookedTransformer:
    return HookedTransformer(model.cfg.replace(seed=99))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positional_embedding_type": "rotary"},
        {"n_key_value_heads": 1, "positional_embedding_type": "rotary", "normalization_type": "RMS"},
        {"act_fn": "solu_ln", "positional_embedding_type": "shortformer"},
        {"attn_only": True, "act_fn": None, "normalization_type": None},
    ],
)
def test_a_classic_state_dict_loads(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    loaded = fresh_like(model)
    assert not torch.equal(loaded(tiny_tokens()), model(tiny_tokens()))
    loaded.load_state_dict(as_classic(model))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(loaded(tiny_tokens()), model(tiny_tokens()))


def test_loading_a_classic_state_dict_leaves_it_as_it_was() -> None:
    model = tiny_model(n_key_value_heads=1)
    state = as_classic(model)
    names = list(state)
    fresh_like(model).load_state_dict(state)
    assert list(state) == names


def test_a_classic_state_dict_loads_into_a_gated_model() -> None:
    model = tiny_model(gated_mlp=True, act_fn="silu")
    for block in model.blocks:
        torch.nn.init.zeros_(block.mlp.b_gate)
        torch.nn.init.zeros_(block.mlp.b_in)
    state = {name: value for name, value in as_classic(model).items() if not name.endswith("b_gate")}
    loaded = randomise_(fresh_like(model), seed=7)
    loaded.load_state_dict(state)
    assert torch.equal(loaded(tiny_tokens()), model(tiny_tokens()))


def test_a_classic_gated_bias_that_cannot_be_expressed_raises() -> None:
    model = tiny_model(gated_mlp=True, act_fn="silu")
    state = {name: value for name, value in as_classic(model).items() if not name.endswith("b_gate")}
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.b_in is not zero"):
        fresh_like(model).load_state_dict(state)


def classic_experts(model: HookedTransformer, linear: bool) -> dict[str, Tensor]:
    """A mixture as the classic library saved it: experts one by one, the router as `W_gate`, no router bias.

    Early releases kept matrices as [in out] parameters, with biases; later ones as `nn.Linear` without.
    """
    state = {name: value for name, value in as_classic(model).items() if ".mlp." not in name}
    for layer, block in enumerate(model.blocks):
        prefix = f"blocks.{layer}.mlp"
        router = block.mlp.W_router.detach()
        state[f"{prefix}.W_gate.weight" if linear else f"{prefix}.W_gate"] = router.T if linear else router
        for expert in range(model.cfg.num_experts):
            for name in ("W_in", "W_gate", "W_out"):
                value = getattr(block.mlp, name)[expert].detach()
                full = f"{prefix}.experts.{expert}.{name}"
                state[f"{full}.weight" if linear else full] = value.T if linear else value
            if not linear:
                for name in ("b_in", "b_out"):
                    state[f"{prefix}.experts.{expert}.{name}"] = getattr(block.mlp, name)[expert].detach()
    return state


@pytest.mark.parametrize("linear", [False, True], ids=["parameters", "linear modules"])
def test_classic_experts_load(linear: bool) -> None:
    model = tiny_model(num_experts=12, experts_per_token=2, gated_mlp=True, act_fn="silu", d_mlp=5)
    for block in model.blocks:
        for bias in (block.mlp.b_router, block.mlp.b_gate, block.mlp.b_in, *([block.mlp.b_out] if linear else [])):
            torch.nn.init.zeros_(bias)
    loaded = randomise_(fresh_like(model), seed=7)
    loaded.load_state_dict(classic_experts(model, linear))
    assert torch.equal(loaded(tiny_tokens()), model(tiny_tokens()))


def test_a_classic_mixture_rescales_the_chosen_experts_weights() -> None:
    """The classic mixture divided the chosen weights by their sum, and its config had no field to say otherwise."""
    fields = {**CLASSIC_CONFIG, "num_experts": 4, "experts_per_token": 2, "gated_mlp": True, "act_fn": "silu"}
    model = randomise_(HookedTransformer(fields))
    mlp = model.blocks[0].mlp
    x = torch.randn(1, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        chosen, indices = F.softmax(x @ mlp.W_router + mlp.b_router, -1).topk(2, -1)
        chosen = chosen / chosen.sum(-1, keepdim=True)
        expected = torch.zeros_like(x)
        for pos in range(5):
            for weight, expert in zip(chosen[0, pos], indices[0, pos], strict=True):
                gate = F.silu(x[0, pos] @ mlp.W_gate[expert] + mlp.b_gate[expert])
                hidden = gate * (x[0, pos] @ mlp.W_in[expert] + mlp.b_in[expert])
                expected[0, pos] += weight * (hidden @ mlp.W_out[expert] + mlp.b_out[expert])
        assert torch.allclose(mlp(x), expected, atol=1e-10)
    # Version 3.9 has the field, False unless it is given.
    assert not HookedTransformer({**fields, "norm_topk_prob": False}).cfg.norm_topk_prob
    assert not HookedTransformerConfig(
        n_layers=2, d_model=12, n_ctx=8, d_head=4, act_fn="silu", num_experts=4, experts_per_token=2
    ).norm_topk_prob


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attn.masks",
        "blocks.0.mlp.mask",
        "blocks.0.attn.W_X",
        "blocks.2.ln1.w",
        "unembed.W_X",
        "attn.mask",
        "extra",
    ],
)
def test_any_other_unexpected_tensor_raises_and_is_named(name: str) -> None:
    model = tiny_model()
    with pytest.raises(RuntimeError, match=rf"Unexpected key.*{name}"):
        fresh_like(model).load_state_dict({**as_classic(model), name: torch.ones(1)})


@pytest.mark.parametrize("name", ["embed.W_E", "blocks.1.attn.b_K", "ln_final.b"])
def test_a_missing_tensor_raises_and_is_named(name: str) -> None:
    model = tiny_model()
    state = as_classic(model)
    del state[name]
    with pytest.raises(RuntimeError, match=rf"Missing key.*{name}"):
        fresh_like(model).load_state_dict(state)


def test_an_expert_that_is_missing_raises() -> None:
    model = tiny_model(num_experts=3, experts_per_token=2, gated_mlp=True, act_fn="silu")
    state = classic_experts(model, linear=False)
    state = {name: value for name, value in state.items() if not name.startswith("blocks.0.mlp.experts.1.W_in")}
    for name in list(state):
        if name.endswith("b_in"):
            state[name] = torch.zeros_like(state[name])
    with pytest.raises((RuntimeError, ValueError), match=r"W_in"):
        fresh_like(model).load_state_dict(state)


def test_a_tensor_of_the_wrong_shape_raises_and_is_named() -> None:
    model = tiny_model()
    with pytest.raises(RuntimeError, match=r"size mismatch for embed\.W_E"):
        fresh_like(model).load_state_dict({**as_classic(model), "embed.W_E": torch.ones(21, 12)})


def test_a_classic_state_dict_can_be_processed_as_it_is_loaded() -> None:
    model = tiny_model(n_key_value_heads=1)
    loaded = fresh_like(model)
    loaded.load_and_process_state_dict(as_classic(model), fold_ln=True, center_unembed=True)
    difference = loaded(tiny_tokens()).log_softmax(-1) - model(tiny_tokens()).log_softmax(-1)
    assert difference.abs().max().item() < 1e-9
    assert loaded.cfg.normalization_type == "LNPre"


# Configs


def test_a_classic_config_dictionary_builds_the_same_model_as_ours() -> None:
    assert HookedTransformerConfig.from_dict(CLASSIC_CONFIG) == tiny_config()
    assert torch.equal(
        HookedTransformer(CLASSIC_CONFIG)(tiny_tokens()), HookedTransformer(tiny_config())(tiny_tokens())
    )


def test_the_classic_gates_are_accepted_and_change_nothing() -> None:
    gates = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in", "use_hook_tokens")
    fields = {**CLASSIC_CONFIG, **dict.fromkeys(gates, True)}
    gated, plain = HookedTransformer(fields), HookedTransformer(CLASSIC_CONFIG)
    assert list(gated.hook_dict) == list(plain.hook_dict)
    assert torch.equal(gated(tiny_tokens()), plain(tiny_tokens()))
    for gate in ("attn_result", "split_qkv_input", "attn_in", "hook_mlp_in"):
        getattr(plain, f"set_use_{gate}")(True)
    assert torch.equal(gated(tiny_tokens()), plain(tiny_tokens()))


# Features that classic notebooks use


def test_replaced_tokens_are_the_tokens_the_model_reads() -> None:
    model = tiny_model()
    clean, other = tiny_tokens(seed=1), tiny_tokens(seed=2)
    swapped = model.run_with_hooks(clean, fwd_hooks=[("hook_tokens", lambda tokens, hook: other)])
    assert torch.equal(swapped, model(other))
    assert not torch.equal(swapped, model(clean))


def test_tokens_edited_in_place_leave_the_callers_tensor_alone() -> None:
    model = tiny_model()
    tokens = tiny_tokens()
    before = tokens.clone()

    def mask_second(tokens: Tensor, hook: HookPoint) -> None:
        tokens[:, 1] = 3

    edited = model.run_with_hooks(tokens, fwd_hooks=[("hook_tokens", mask_second)])
    assert torch.equal(tokens, before)
    before[:, 1] = 3
    assert torch.equal(edited, model(before))


def test_bidirectional_attention_sees_what_comes_after() -> None:
    model, causal = tiny_model(attention_dir="bidirectional"), tiny_model()
    tokens = tiny_tokens(batch=1)
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 20
    assert not torch.allclose(model(tokens)[0, 0], model(changed)[0, 0])
    assert torch.equal(causal(tokens)[0, 0], causal(changed)[0, 0])
    _, cache = model.run_with_cache(tokens)
    assert bool((cache["pattern", 0] > 0).all())
    assert torch.allclose(model(tokens), cache["unembed.hook_out"], atol=1e-12)


def test_an_output_vocabulary_of_another_size() -> None:
    model = tiny_model(d_vocab_out=7)
    logits, cache = model.run_with_cache(tiny_tokens())
    assert logits.shape == (2, 7, 7)
    assert torch.allclose(logits, cache["ln_final.hook_normalized"] * model.ln_final.w @ model.W_U
                          + model.ln_final.b @ model.W_U + model.b_U, atol=1e-12)  # fmt: skip
    assert model.tokens_to_residual_directions(torch.tensor([6])).shape == (12,)
    with pytest.raises(ValueError, match="not all in 0-6"):
        model.tokens_to_residual_directions(torch.tensor([7]))


def test_a_permanent_hook_stays_until_it_is_removed_by_name() -> None:
    model = tiny_model()
    plain = model(tiny_tokens())
    model.add_perma_hook("blocks.0.hook_attn_out", lambda x, hook: torch.zeros_like(x))
    model.add_hook("blocks.1.hook_attn_out", lambda x, hook: torch.zeros_like(x))
    both = model(tiny_tokens())
    model.reset_hooks()
    one = model(tiny_tokens())
    # A run with hooks takes away its own and no others.
    model.run_with_hooks(tiny_tokens(), fwd_hooks=[("hook_embed", lambda x, hook: None)])
    assert torch.equal(model(tiny_tokens()), one)
    model.reset_hooks(including_permanent=True)
    assert torch.equal(model(tiny_tokens()), plain)
    assert not torch.equal(one, plain)
    assert not torch.equal(one, both)


def test_the_classic_component_names_are_those_of_the_models_modules() -> None:
    model = tiny_model(n_key_value_heads=1)
    assert isinstance(model.blocks[0].attn, GroupedQueryAttention)
    assert model.mod_dict["blocks.0.attn"] is model.blocks[0].attn


def test_a_classic_notebook_runs_from_config_to_patching() -> None:
    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        n_layers=2,
        d_model=16,
        n_ctx=8,
        d_head=4,
        n_heads=4,
        d_mlp=32,
        d_vocab=11,
        act_fn="relu",
        normalization_type=None,
        device="cpu",
        seed=42,
    )
    model = HookedTransformer(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    tokens = tiny_tokens(batch=8, pos=6, vocab=11)
    losses = []
    for _ in range(3):
        loss = model(tokens, return_type="loss")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]

    checkpoint = copy.deepcopy(model.state_dict())
    trained = HookedTransformer(cfg)
    trained.load_state_dict(checkpoint)
    assert torch.equal(trained(tokens), model(tokens))

    clean, corrupted = tokens[:1], tokens[1:2]
    clean_logits = trained(clean)
    cached_logits, clean_cache = trained.run_with_cache(clean)
    assert torch.allclose(cached_logits, clean_logits, atol=1e-5)
    assert clean_cache[utils.get_act_name("pattern", 1)].shape == (1, 4, 6, 6)

    def patch_position(resid: Tensor, hook: HookPoint, pos: int) -> Tensor:
        resid[:, pos, :] = clean_cache[hook.name][:, pos, :]
        return resid

    results = torch.zeros(2, 6)
    for layer in range(2):
        for pos in range(6):
            patched = trained.run_with_hooks(
                corrupted,
                fwd_hooks=[(utils.get_act_name("resid_pre", layer), lambda x, hook, p=pos: patch_position(x, hook, p))],
            )
            results[layer, pos] = (patched[0, -1] - clean_logits[0, -1]).abs().max()
    assert bool((results > 0).all())

    _, stream = trained.run_with_cache(clean, names_filter=lambda name: name.endswith("resid_pre"))

    def patch_all(resid: Tensor, hook: HookPoint) -> Tensor:
        return stream[hook.name]

    restored = trained.run_with_hooks(corrupted, fwd_hooks=[(utils.get_act_name("resid_pre", 1), patch_all)])
    assert torch.equal(restored, clean_logits)
    assert not any(point.has_hooks() for point in trained.hook_points())


# State dicts, in part or of other norms


def test_classic_names_are_translated_whether_strict_or_not() -> None:
    source = tiny_model(n_key_value_heads=1)
    classic = {
        re.sub(r"attn\.([Wb]_[KV])$", r"attn._\1", name): value.clone() for name, value in source.state_dict().items()
    }
    assert "blocks.0.attn._W_K" in classic
    for strict in (True, False):
        model = tiny_model(n_key_value_heads=1, seed=3)
        result = model.load_state_dict({**classic, "blocks.0.attn.mask": torch.ones(16, 16)}, strict=strict)
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert torch.equal(model(tiny_tokens()), source(tiny_tokens()))


def test_a_part_of_a_state_dict_changes_what_is_in_it_alone() -> None:
    model, other = tiny_model(gated_mlp=True), tiny_model(gated_mlp=True, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    name = "blocks.0.mlp.W_gate"
    model.load_state_dict({name: 2 * other.state_dict()[name]}, strict=False)
    changed = [one for one, value in model.state_dict().items() if not torch.equal(value, before[one])]
    assert changed == [name]


def test_positions_that_an_alibi_model_of_the_classic_library_holds_are_dropped() -> None:
    source = tiny_model(positional_embedding_type="alibi")
    model = tiny_model(positional_embedding_type="alibi", seed=2)
    model.load_state_dict({**source.state_dict(), "pos_embed.W_pos": torch.randn(16, 12)})
    assert torch.equal(model(tiny_tokens()), source(tiny_tokens()))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**source.state_dict(), "pos_embed.W_posn": torch.randn(16, 12)})


@pytest.mark.parametrize("kind", ["LN", "RMS"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"gated_mlp": True}], ids=str)
def test_weights_with_gains_are_folded_into_a_model_whose_norms_have_none(kind: str, changes: dict[str, Any]) -> None:
    source = tiny_model(normalization_type=kind, **changes)
    model = HookedTransformer(tiny_config(normalization_type=f"{kind}Pre", **changes))
    model.load_and_process_state_dict(source.state_dict())
    assert "fold_ln" in model.processed
    expected = source(tiny_tokens()).log_softmax(-1)
    torch.testing.assert_close(model(tiny_tokens()).log_softmax(-1), expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=f"have none: they are folded.*normalization_type='{kind}'"):
        model.load_and_process_state_dict(source.state_dict(), fold_ln=False)
    # Weights without gains load as before.
    again = HookedTransformer(
        tiny_config(
            normalization_type=f"{kind}Pre",
            tie_word_embeddings=False,
            **{name: value for name, value in changes.items() if name != "tie_word_embeddings"},
        )
    )
    again.load_and_process_state_dict(model.state_dict(), center_unembed=False)
    torch.testing.assert_close(again(tiny_tokens()), model(tiny_tokens()), rtol=0, atol=1e-10)


def test_the_embedding_is_what_the_model_looks_up() -> None:
    model = tiny_model(embedding_scale=3.5, tie_word_embeddings=True)
    _, cache = model.run_with_cache(tiny_tokens())
    assert torch.equal(model.W_E[tiny_tokens()], cache["hook_embed"])
    assert torch.equal(model.W_E, 3.5 * model.embed.W_E)
    assert torch.equal(model.W_U, model.embed.W_E.T)
