"""Every variant of the architecture beside a reference that shares no code with it, and beside transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer
from tests.architectures_helpers import BY_PARTS, ROTARY, Weights
from tests.helpers import randomise_, tiny_config, tiny_model, tiny_tokens

EXACT = {"atol": 1e-10, "rtol": 0.0}


# The reference: one prompt, one head, one query at a time.


def reference_logits(model: HookedTransformer, tokens: list[int]) -> Tensor:
    """Return the logits [pos vocab] of one prompt, from the config's fields and the weights alone."""
    cfg, weights = model.cfg, model.state_dict()
    writing = (cfg.normalization_type or "").removesuffix("Pre") or None
    stream = torch.stack([weights["embed.W_E"][token] for token in tokens])
    if cfg.post_embedding_ln:
        stream = normalise(stream, writing, weights, "embed.ln", cfg.eps)
    if cfg.positional_embedding_type == "standard":
        stream = stream + weights["pos_embed.W_pos"][: len(tokens)]
    for layer in range(cfg.n_layers):
        name = f"blocks.{layer}"
        attn_out = attention(cfg, weights, layer, normalise_for(cfg, stream, weights, f"{name}.ln1"))
        if cfg.use_normalization_before_and_after:
            attn_out = normalise(attn_out, writing, weights, f"{name}.ln1_post", cfg.eps)
        mlp_in = stream if cfg.parallel_attn_mlp else stream + attn_out
        stream = stream + attn_out
        if not cfg.attn_only:
            mlp_out = mlp(cfg, weights, f"{name}.mlp", normalise_for(cfg, mlp_in, weights, f"{name}.ln2"))
            if cfg.use_normalization_before_and_after:
                mlp_out = normalise(mlp_out, writing, weights, f"{name}.ln2_post", cfg.eps)
            stream = stream + mlp_out
    final = cfg.normalization_type
    if cfg.final_rms and final is not None:
        final = final.replace("LN", "RMS")
    logits = normalise(stream, final, weights, "ln_final", cfg.eps) @ weights["unembed.W_U"] + weights["unembed.b_U"]
    return capped(logits, cfg.output_logits_soft_cap)


def normalise_for(cfg: Any, stream: Tensor, weights: Weights, name: str) -> Tensor:
    return normalise(stream, cfg.normalization_type, weights, name, cfg.eps)


def normalise(x: Tensor, kind: str | None, weights: Weights, name: str, eps: float) -> Tensor:
    if kind is None:
        return x
    if kind in ("LN", "LNPre"):
        x = x - x.sum(-1, keepdim=True) / x.shape[-1]
    x = x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps)
    if kind in ("LN", "RMS"):
        x = x * weights[f"{name}.w"]
    return x + weights[f"{name}.b"] if kind == "LN" else x


def capped(x: Tensor, cap: float) -> Tensor:
    return torch.tanh(x / cap) * cap if cap > 0 else x


def attention(cfg: Any, weights: Weights, layer: int, normalised: Tensor) -> Tensor:
    """Return what attention writes [pos d_model], given its normalised input."""
    w = {name.split(".")[-1]: value for name, value in weights.items() if name.startswith(f"blocks.{layer}.attn.")}
    positions = len(normalised)
    reads = normalised
    if cfg.positional_embedding_type == "shortformer":
        reads = normalised + weights["pos_embed.W_pos"][:positions]
    local = cfg.use_local_attn and cfg.attn_types[layer] == "local"
    out = w["b_O"].repeat(positions, 1)
    for head in range(cfg.n_heads):
        shared = head if cfg.n_key_value_heads is None else head // (cfg.n_heads // cfg.n_key_value_heads)
        q = reads @ w["W_Q"][head] + w["b_Q"][head]
        k = reads @ w["W_K"][shared] + w["b_K"][shared]
        v = normalised @ w["W_V"][shared] + w["b_V"][shared]
        if cfg.use_qk_norm:
            q = normalise(q, "RMS", weights, f"blocks.{layer}.attn.q_norm", cfg.eps)
            k = normalise(k, "RMS", weights, f"blocks.{layer}.attn.k_norm", cfg.eps)
        if cfg.positional_embedding_type == "rotary":
            turns = rotations(cfg, positions, local)
            q = torch.stack([turns[i] @ q[i] for i in range(positions)])
            k = torch.stack([turns[i] @ k[i] for i in range(positions)])
        # In float32, as the angles are.
        contexts = torch.arange(positions) // cfg.query_scale_ctx_len
        q = q * (1 + cfg.query_scale_beta * torch.log(1.0 + contexts))[:, None].to(q)
        for query in range(positions):
            keys = [key for key in range(positions) if may_look(cfg, query, key, local)]
            scores = torch.stack([q[query] @ k[key] for key in keys])
            if cfg.use_attn_scale:
                scores = scores / cfg.attn_scale
            if cfg.scale_attn_by_inverse_layer_idx:
                scores = scores / (layer + 1)
            scores = capped(scores, cfg.attn_scores_soft_cap)
            if cfg.positional_embedding_type == "alibi":
                scores = scores - slope(head, cfg.n_heads) * torch.tensor([abs(query - key) for key in keys]).double()
            pattern = torch.exp(scores - scores.max())
            pattern = pattern / pattern.sum()
            z = sum(weight * v[key] for weight, key in zip(pattern, keys, strict=True))
            out[query] += z @ w["W_O"][head]
    return out


def may_look(cfg: Any, query: int, key: int, local: bool) -> bool:
    if cfg.attention_dir == "causal" and key > query:
        return False
    return not (local and abs(query - key) >= cfg.window_size)


def slope(head: int, n_heads: int) -> float:
    """ALiBi's slopes: 2^(-8 (i+1) / n) for a power of two; the rest are every second one of twice as many heads."""
    n = 1
    while 2 * n <= n_heads:
        n *= 2
    if head < n:
        return 2.0 ** (-8.0 * (head + 1) / n)
    return 2.0 ** (-8.0 * (2 * (head - n) + 1) / (2 * n))


def rotations(cfg: Any, positions: int, local: bool) -> Tensor:
    """Return the matrix [pos d_head d_head] by which each position turns its queries and keys."""
    special = local and cfg.rotary_base_local is not None
    base = cfg.rotary_base_local if special else cfg.rotary_base
    pairs = cfg.rotary_dim // 2
    # Angles are a matter of convention down to the last bit: checkpoints are trained with them in float32.
    frequency = 1.0 / base ** (2 * torch.arange(pairs).float() / cfg.rotary_dim)
    if not special:
        if cfg.use_NTK_by_parts_rope:
            for i in range(pairs):
                frequency[i] = by_parts(cfg, frequency[i])
        frequency = frequency / cfg.rotary_scaling_factor
    angle = torch.arange(positions).float()[:, None] * frequency
    cos, sin = angle.cos().double(), angle.sin().double()
    turns = torch.eye(cfg.d_head, dtype=torch.float64).repeat(positions, 1, 1)
    for i in range(pairs):
        a, b = (2 * i, 2 * i + 1) if cfg.rotary_adjacent_pairs else (i, i + pairs)
        turns[:, a, a] = turns[:, b, b] = cos[:, i]
        turns[:, a, b], turns[:, b, a] = -sin[:, i], sin[:, i]
    return turns


def by_parts(cfg: Any, frequency: Tensor) -> Tensor:
    """Llama 3: leave what turns often in the original context, slow what turns seldom, blend between."""
    wavelength = 2 * math.pi / frequency
    if wavelength < cfg.NTK_original_ctx_len / cfg.NTK_by_parts_high_freq_factor:
        return frequency
    slowed = frequency / cfg.NTK_by_parts_factor
    if wavelength > cfg.NTK_original_ctx_len / cfg.NTK_by_parts_low_freq_factor:
        return slowed
    low, high = cfg.NTK_by_parts_low_freq_factor, cfg.NTK_by_parts_high_freq_factor
    smooth = (cfg.NTK_original_ctx_len * frequency / (2 * math.pi) - low) / (high - low)
    return smooth * frequency + (1 - smooth) * slowed


def mlp(cfg: Any, weights: Weights, name: str, x: Tensor) -> Tensor:
    """Return what the MLP, or the mixture of MLPs, writes [pos d_model]."""
    w = {key[len(name) + 1 :]: value for key, value in weights.items() if key.startswith(f"{name}.")}
    if cfg.num_experts is None:
        return one_mlp(cfg, w, weights, name, x)
    out = torch.zeros_like(x)
    for pos in range(len(x)):
        scores = torch.exp(x[pos] @ w["W_router"] + w["b_router"])
        scores = scores / scores.sum()
        chosen = sorted(range(cfg.num_experts), key=lambda e: float(scores[e]))[-cfg.experts_per_token :]
        total = sum(scores[e] for e in chosen) if cfg.norm_topk_prob else 1.0
        for expert in chosen:
            own = {key: value[expert] for key, value in w.items() if "router" not in key}
            out[pos] += scores[expert] / total * one_mlp(cfg, own, weights, name, x[pos][None])[0]
    return out


def one_mlp(cfg: Any, w: Weights, weights: Weights, name: str, x: Tensor) -> Tensor:
    hidden = x @ w["W_in"] + w["b_in"]
    if cfg.gated_mlp:
        hidden = activate(cfg.act_fn, x @ w["W_gate"] + w["b_gate"]) * hidden
    else:
        hidden = activate(cfg.act_fn, hidden)
    if cfg.act_fn == "solu_ln":
        hidden = normalise(
            hidden, "LNPre" if cfg.normalization_type == "LNPre" else "LN", weights, f"{name}.ln", cfg.eps
        )
    return hidden @ w["W_out"] + w["b_out"]


def activate(kind: str, x: Tensor) -> Tensor:
    formulas = {
        "relu": lambda: torch.where(x > 0, x, 0.0),
        "relu2": lambda: torch.where(x > 0, x, 0.0) ** 2,
        "gelu": lambda: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "silu": lambda: x / (1 + torch.exp(-x)),
        "gelu_new": lambda: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "gelu_pytorch_tanh": lambda: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "gelu_fast": lambda: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3))),
        "quick_gelu": lambda: x / (1 + torch.exp(-1.702 * x)),
        "identity": lambda: x,
        "solu": lambda: x * torch.exp(x) / torch.exp(x).sum(-1, keepdim=True),
        "solu_ln": lambda: x * torch.exp(x) / torch.exp(x).sum(-1, keepdim=True),
    }
    return formulas[kind]()


# The variants: the fields that make one, and those that unmake it.


LOCAL = {"window_size": 3, "use_local_attn": True, "attn_types": ["global", "local"]}

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LN": ({}, {"normalization_type": "RMS"}),
    "LNPre": ({"normalization_type": "LNPre"}, {"normalization_type": "RMSPre"}),
    "RMS": ({"normalization_type": "RMS"}, {"normalization_type": "LN"}),
    "RMSPre": ({"normalization_type": "RMSPre"}, {"normalization_type": "LNPre"}),
    "no norm": ({"normalization_type": None}, {"normalization_type": "RMSPre"}),
    "eps": ({"eps": 0.3}, {"eps": 1e-5}),
    "final RMS": ({"final_rms": True}, {"final_rms": False}),
    "final RMS folded": ({"final_rms": True, "normalization_type": "LNPre"}, {"final_rms": False}),
    "learned positions": ({}, {"positional_embedding_type": "none"}),
    "no positions": ({"positional_embedding_type": "none"}, {"positional_embedding_type": "alibi"}),
    "shortformer": ({"positional_embedding_type": "shortformer"}, {"positional_embedding_type": "standard"}),
    "alibi, 4 heads": ({"positional_embedding_type": "alibi", "n_heads": 4}, {"positional_embedding_type": "none"}),
    "alibi, 3 heads": ({"positional_embedding_type": "alibi"}, {"positional_embedding_type": "none"}),
    "alibi, 6 heads": ({"positional_embedding_type": "alibi", "n_heads": 6}, {"positional_embedding_type": "none"}),
    "rotary": (ROTARY, {"positional_embedding_type": "none"}),
    "rotary base": ({**ROTARY, "rotary_base": 7.0}, {"rotary_base": 100.0}),
    "rotary, adjacent pairs": ({**ROTARY, "rotary_adjacent_pairs": True}, {"rotary_adjacent_pairs": False}),
    "rotary, half of the head": ({**ROTARY, "rotary_dim": 4}, {"rotary_dim": 8}),
    "rotary, adjacent, half of the head": (
        {**ROTARY, "rotary_dim": 4, "rotary_adjacent_pairs": True},
        {"rotary_adjacent_pairs": False},
    ),
    "rotary, scaled": ({**ROTARY, "rotary_scaling_factor": 4.0}, {"rotary_scaling_factor": 1.0}),
    "rotary, by parts": ({**ROTARY, **BY_PARTS}, {"use_NTK_by_parts_rope": False}),
    "rotary, by parts, factor": ({**ROTARY, **BY_PARTS}, {"NTK_by_parts_factor": 2.0}),
    "rotary, by parts, context": ({**ROTARY, **BY_PARTS}, {"NTK_original_ctx_len": 64}),
    "rotary, by parts, high": ({**ROTARY, **BY_PARTS}, {"NTK_by_parts_high_freq_factor": 2.0}),
    "rotary, by parts, low": ({**ROTARY, **BY_PARTS}, {"NTK_by_parts_low_freq_factor": 0.25}),
    "rotary, local base": ({**ROTARY, **LOCAL, "rotary_base_local": 5.0}, {"rotary_base_local": None}),
    "rotary, local base, scaled": (
        {**ROTARY, **LOCAL, "rotary_base_local": 5.0, "rotary_scaling_factor": 4.0},
        {"rotary_scaling_factor": 1.0},
    ),
    "local layers": (LOCAL, {"attn_types": ["local", "global"]}),
    "local everywhere": ({"window_size": 2}, {"window_size": 3}),
    "window unused": ({"window_size": 2, "use_local_attn": False}, {"use_local_attn": True}),
    "bidirectional": ({"attention_dir": "bidirectional"}, {"attention_dir": "causal"}),
    "bidirectional local": ({"attention_dir": "bidirectional", "window_size": 3}, {"use_local_attn": False}),
    "bidirectional alibi": (
        {"attention_dir": "bidirectional", "positional_embedding_type": "alibi"},
        {"positional_embedding_type": "none"},
    ),
    "score cap": ({"attn_scores_soft_cap": 0.8}, {"attn_scores_soft_cap": -1.0}),
    "score cap, alibi": (
        {"attn_scores_soft_cap": 0.8, "positional_embedding_type": "alibi"},
        {"attn_scores_soft_cap": -1.0},
    ),
    "logit cap": ({"output_logits_soft_cap": 1.5}, {"output_logits_soft_cap": -1.0}),
    "inverse layer": ({"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_by_inverse_layer_idx": False}),
    "no scale": ({"use_attn_scale": False}, {"use_attn_scale": True, "attn_scale": 2.0}),
    "no scale, whatever it is": ({"use_attn_scale": False, "attn_scale": 7.0}, {"use_attn_scale": True}),
    "another scale": ({"attn_scale": 0.7}, {"attn_scale": 2.0}),
    "head of another width": ({"d_head": 6}, {"attn_scale": 2.0}),
    "grouped": ({"n_heads": 4, "n_key_value_heads": 2}, {"attn_scale": 9.0}),
    "queries scaled by position": (
        {**ROTARY, "query_scale_beta": 0.8, "query_scale_ctx_len": 2},
        {"query_scale_beta": 0.0},
    ),
    "queries scaled by position, context": (
        {"query_scale_beta": 0.8, "query_scale_ctx_len": 2},
        {"query_scale_ctx_len": 3},
    ),
    "one key-value head": ({"n_heads": 4, "n_key_value_heads": 1, **ROTARY}, {"rotary_base": 7.0}),
    "query and key norm": ({"use_qk_norm": True}, {"use_qk_norm": False}),
    "query and key norm, grouped": (
        {"use_qk_norm": True, "n_heads": 4, "n_key_value_heads": 2, **ROTARY},
        {"eps": 0.1},
    ),
    "norms before and after": (
        {"use_normalization_before_and_after": True},
        {"use_normalization_before_and_after": False},
    ),
    "norms before and after, folded": (
        {"use_normalization_before_and_after": True, "normalization_type": "RMSPre"},
        {"use_normalization_before_and_after": False},
    ),
    "embedding norm": ({"post_embedding_ln": True}, {"post_embedding_ln": False}),
    "embedding norm, folded": (
        {"post_embedding_ln": True, "normalization_type": "LNPre", "positional_embedding_type": "alibi"},
        {"post_embedding_ln": False},
    ),
    "parallel": ({"parallel_attn_mlp": True}, {"parallel_attn_mlp": False}),
    "attention only": ({"attn_only": True, "act_fn": None}, {"attn_only": False, "act_fn": "relu"}),
    "gated": ({"gated_mlp": True, "act_fn": "silu"}, {"gated_mlp": False}),
    "experts": ({"num_experts": 4, "experts_per_token": 2}, {"experts_per_token": 1}),
    "experts, rescaled": (
        {"num_experts": 4, "experts_per_token": 2, "norm_topk_prob": True},
        {"norm_topk_prob": False},
    ),
    "experts, gated": ({"num_experts": 3, "experts_per_token": 2, "gated_mlp": True}, {"gated_mlp": False}),
    "experts, gated, rescaled": (
        {"num_experts": 3, "experts_per_token": 2, "gated_mlp": True, "norm_topk_prob": True, "act_fn": "silu"},
        {"norm_topk_prob": False},
    ),
    "other tokens out": ({"d_vocab_out": 5}, {"eps": 0.3}),
    "width of the MLP": ({"d_mlp": 7}, {"act_fn": "relu"}),
    # Whole families.
    "as Gemma 2": (
        {
            **ROTARY,
            **LOCAL,
            "n_heads": 4,
            "n_key_value_heads": 2,
            "normalization_type": "RMS",
            "use_normalization_before_and_after": True,
            "attn_scores_soft_cap": 1.0,
            "output_logits_soft_cap": 2.0,
            "gated_mlp": True,
            "act_fn": "gelu_pytorch_tanh",
        },
        {"attn_scores_soft_cap": -1.0},
    ),
    "as GPT-J": (
        {**ROTARY, "rotary_dim": 4, "rotary_adjacent_pairs": True, "parallel_attn_mlp": True},
        {"parallel_attn_mlp": False},
    ),
    "as Llama 3": (
        {
            **ROTARY,
            **BY_PARTS,
            "n_heads": 4,
            "n_key_value_heads": 2,
            "normalization_type": "RMS",
            "gated_mlp": True,
            "act_fn": "silu",
            "final_rms": True,
        },
        {"use_NTK_by_parts_rope": False},
    ),
    "as Mixtral": (
        {
            **ROTARY,
            "window_size": 4,
            "n_heads": 4,
            "n_key_value_heads": 2,
            "normalization_type": "RMSPre",
            "num_experts": 4,
            "experts_per_token": 2,
            "norm_topk_prob": True,
            "gated_mlp": True,
            "act_fn": "silu",
        },
        {"window_size": 2},
    ),
}
for _name in ("relu", "gelu", "silu", "quick_gelu", "relu2", "identity", "solu", "solu_ln"):
    VARIANTS[f"act_fn {_name}"] = ({"act_fn": _name}, {"act_fn": "gelu_new"})
VARIANTS["act_fn gelu_new"] = ({"act_fn": "gelu_new"}, {"act_fn": "gelu"})
# These two differ from gelu_new in name, or in the tenth digit of a constant.
VARIANTS["act_fn gelu_fast"] = ({"act_fn": "gelu_fast"}, {"act_fn": "gelu"})
VARIANTS["act_fn gelu_pytorch_tanh"] = ({"act_fn": "gelu_pytorch_tanh"}, {"act_fn": "gelu"})
VARIANTS["act_fn solu_ln, folded"] = ({"act_fn": "solu_ln", "normalization_type": "LNPre"}, {"act_fn": "solu"})
VARIANTS["act_fn solu_ln, RMS"] = ({"act_fn": "solu_ln", "normalization_type": "RMS"}, {"act_fn": "solu"})


def fields_of(variant: str) -> dict[str, Any]:
    fields = {"n_heads": 3, **VARIANTS[variant][0]}
    # Twelve dimensions do not divide into every number of heads, nor into heads of even width.
    return {"d_head": 4, **fields}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_computes_what_the_reference_does(variant: str) -> None:
    model, tokens = tiny_model(**fields_of(variant)), tiny_tokens(2, 7)
    expected = torch.stack([reference_logits(model, row) for row in tokens.tolist()])
    torch.testing.assert_close(model(tokens), expected, **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_feature_bites(variant: str) -> None:
    fields, tokens = fields_of(variant), tiny_tokens(2, 7)
    model = tiny_model(**fields)
    without = randomise_(HookedTransformer(tiny_config(**{**fields, **VARIANTS[variant][1]})))
    weights = model.state_dict()
    shared = {name: weights[name] for name, value in without.state_dict().items() if name in weights}
    without.load_state_dict(shared, strict=False)
    assert (model(tokens) - without(tokens)).abs().max() > 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_and_eager_attention_agree(variant: str) -> None:
    model, tokens = tiny_model(**fields_of(variant)), tiny_tokens(2, 7)
    fused = model(tokens)
    for site in ("hook_pattern", "hook_attn_scores"):
        shapes: list[tuple[int, ...]] = []
        hooks = [(f"blocks.*.attn.{site}", lambda x, hook, seen=shapes: seen.append(tuple(x.shape)))]
        eager = model.run_with_hooks(tokens, fwd_hooks=hooks)
        assert shapes == [(2, model.cfg.n_heads, 7, 7)] * 2
        torch.testing.assert_close(eager, fused, **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_under_every_hook_gives_the_same_logits(variant: str) -> None:
    model, tokens = tiny_model(**fields_of(variant)), tiny_tokens(2, 7)
    plain = model(tokens)
    logits, cache = model.run_with_cache(tokens, names_filter="*")
    assert set(cache) == set(model.hook_dict)
    torch.testing.assert_close(logits, plain, **EXACT)
    edited = model.run_with_hooks(tokens, fwd_hooks=[(model.hook_names("*attn.*"), lambda x, hook: x.clone())])
    torch.testing.assert_close(edited, plain, **EXACT)


@pytest.mark.parametrize("layer", [0, 1])
def test_eager_attention_in_one_layer_leaves_the_other_fused(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model(), tiny_tokens()
    plain, ran = model(tokens), []
    for number, block in enumerate(model.blocks):
        fused = block.attn.fused_attention
        monkeypatch.setattr(
            block.attn, "fused_attention", lambda *args, number=number, fused=fused: ran.append(number) or fused(*args)
        )
    logits = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", lambda x, hook: None)])
    assert ran == [1 - layer]
    torch.testing.assert_close(logits, plain, **EXACT)


def test_turning_the_attention_scale_off_in_a_config_turns_it_off() -> None:
    fresh = HookedTransformer(tiny_config(use_attn_scale=False))
    changed = HookedTransformer(tiny_config().replace(use_attn_scale=False))
    changed.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(changed(tiny_tokens()), fresh(tiny_tokens()), **EXACT)
