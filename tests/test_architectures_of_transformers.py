"""Architectures beside those of transformers, with weights copied by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from hooked_lm import HookedTransformer
from tests.architectures_helpers import BY_PARTS, ROTARY, Weights
from tests.helpers import randomise_, tiny_config, tiny_tokens

# transformers as a second oracle, with weights copied by hand


def heads_in(weight: Tensor, heads: int) -> Tensor:
    """A HuggingFace projection [(head d_head) d_model] as [head d_model d_head]."""
    return weight.unflatten(0, (heads, -1)).transpose(1, 2)


def heads_out(weight: Tensor, heads: int) -> Tensor:
    """A HuggingFace projection [d_model (head d_head)] as [head d_head d_model]."""
    return weight.T.unflatten(0, (heads, -1))


def fill(model: HookedTransformer, given: Weights) -> HookedTransformer:
    """Load the given weights; the biases that the other model does not have are zero."""
    weights = {}
    for name, value in model.state_dict().items():
        assert name in given or ".b_" in name, name
        weights[name] = given[name] if name in given else torch.zeros_like(value)
    model.load_state_dict(weights)
    return model


def llama_weights(theirs: Any, heads: int, kv_heads: int) -> Weights:
    """Return the weights of a model built as Llama is, under our names."""
    weights = {
        "embed.W_E": theirs.model.embed_tokens.weight,
        "ln_final.w": theirs.model.norm.weight,
        "unembed.W_U": theirs.lm_head.weight.T,
    }
    for layer, block in enumerate(theirs.model.layers):
        at = f"blocks.{layer}"
        weights |= {
            f"{at}.ln1.w": block.input_layernorm.weight,
            f"{at}.ln2.w": block.post_attention_layernorm.weight,
            f"{at}.attn.W_Q": heads_in(block.self_attn.q_proj.weight, heads),
            f"{at}.attn.W_K": heads_in(block.self_attn.k_proj.weight, kv_heads),
            f"{at}.attn.W_V": heads_in(block.self_attn.v_proj.weight, kv_heads),
            f"{at}.attn.W_O": heads_out(block.self_attn.o_proj.weight, heads),
            f"{at}.mlp.W_gate": block.mlp.gate_proj.weight.T,
            f"{at}.mlp.W_in": block.mlp.up_proj.weight.T,
            f"{at}.mlp.W_out": block.mlp.down_proj.weight.T,
        }
    return {name: weight.detach() for name, weight in weights.items()}


def assert_same_logits(model: HookedTransformer, theirs: Any, tokens: Tensor) -> None:
    """Both in float64; their norms, and some of their attention, compute in float32 all the same."""
    with torch.no_grad():
        expected = theirs(tokens).logits
    torch.testing.assert_close(model(tokens).detach(), expected, atol=2e-5, rtol=0, check_dtype=False)


@pytest.mark.parametrize("scaling", ["default", "linear", "llama3"])
def test_a_llama_of_transformers_gives_the_same_logits(scaling: str) -> None:
    rope: dict[str, Any] = {"rope_type": scaling, "rope_theta": 100.0}
    changes: dict[str, Any] = {}
    if scaling == "linear":
        rope["factor"] = 4.0
        changes = {"rotary_scaling_factor": 4.0}
    elif scaling == "llama3":
        rope |= {"factor": 6.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
        changes = BY_PARTS
    theirs = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=20,
            max_position_embeddings=32,
            rope_parameters=rope,
            rms_norm_eps=1e-5,
        )
    )
    theirs = randomise_(theirs.eval()).double()
    fields = {
        **ROTARY,
        **changes,
        "d_model": 24,
        "d_mlp": 40,
        "n_heads": 4,
        "n_key_value_heads": 2,
        "normalization_type": "RMS",
        "gated_mlp": True,
        "act_fn": "silu",
        "n_ctx": 32,
    }
    model = fill(HookedTransformer(tiny_config(**fields)), llama_weights(theirs, 4, 2))
    tokens = tiny_tokens(2, 24)
    assert_same_logits(model, theirs, tokens)
    if changes:
        unscaled = HookedTransformer(tiny_config(**{name: fields[name] for name in fields if name not in changes}))
        unscaled.load_state_dict(model.state_dict())
        assert (unscaled(tokens) - model(tokens)).abs().max() > 1e-2


def test_a_gpt_j_of_transformers_gives_the_same_logits() -> None:
    config = GPTJConfig(vocab_size=20, n_positions=32, n_embd=24, n_layer=2, n_head=3, rotary_dim=4)
    theirs = randomise_(GPTJForCausalLM(config).eval()).double()
    weights = {
        "embed.W_E": theirs.transformer.wte.weight,
        "ln_final.w": theirs.transformer.ln_f.weight,
        "ln_final.b": theirs.transformer.ln_f.bias,
        "unembed.W_U": theirs.lm_head.weight.T,
        "unembed.b_U": theirs.lm_head.bias,
    }
    for layer, block in enumerate(theirs.transformer.h):
        at = f"blocks.{layer}"
        for norm in ("ln1", "ln2"):  # one norm for both, there
            weights |= {f"{at}.{norm}.w": block.ln_1.weight, f"{at}.{norm}.b": block.ln_1.bias}
        weights |= {
            f"{at}.attn.W_Q": heads_in(block.attn.q_proj.weight, 3),
            f"{at}.attn.W_K": heads_in(block.attn.k_proj.weight, 3),
            f"{at}.attn.W_V": heads_in(block.attn.v_proj.weight, 3),
            f"{at}.attn.W_O": heads_out(block.attn.out_proj.weight, 3),
            f"{at}.mlp.W_in": block.mlp.fc_in.weight.T,
            f"{at}.mlp.b_in": block.mlp.fc_in.bias,
            f"{at}.mlp.W_out": block.mlp.fc_out.weight.T,
            f"{at}.mlp.b_out": block.mlp.fc_out.bias,
        }
    fields = {
        "positional_embedding_type": "rotary",
        "rotary_dim": 4,
        "rotary_adjacent_pairs": True,
        "parallel_attn_mlp": True,
        "d_model": 24,
        "n_ctx": 32,
    }
    model = HookedTransformer(tiny_config(**fields))
    fill(model, {name: weight.detach() for name, weight in weights.items()})
    assert_same_logits(model, theirs, tiny_tokens(2, 24))


@pytest.mark.parametrize("heads", [4, 6])
def test_a_bloom_of_transformers_gives_the_same_logits(heads: int) -> None:
    config = BloomConfig(vocab_size=20, hidden_size=24, n_layer=2, n_head=heads)
    theirs = randomise_(BloomForCausalLM(config).eval()).double()
    weights = {
        "embed.W_E": theirs.transformer.word_embeddings.weight,
        "embed.ln.w": theirs.transformer.word_embeddings_layernorm.weight,
        "embed.ln.b": theirs.transformer.word_embeddings_layernorm.bias,
        "ln_final.w": theirs.transformer.ln_f.weight,
        "ln_final.b": theirs.transformer.ln_f.bias,
        "unembed.W_U": theirs.lm_head.weight.T,
    }
    for layer, block in enumerate(theirs.transformer.h):
        at, fused = f"blocks.{layer}", block.self_attention.query_key_value
        weight, bias = fused.weight.unflatten(0, (heads, 3, -1)), fused.bias.unflatten(0, (heads, 3, -1))
        for index, letter in enumerate("QKV"):
            weights[f"{at}.attn.W_{letter}"] = weight[:, index].transpose(1, 2)
            weights[f"{at}.attn.b_{letter}"] = bias[:, index]
        weights |= {
            f"{at}.ln1.w": block.input_layernorm.weight,
            f"{at}.ln1.b": block.input_layernorm.bias,
            f"{at}.ln2.w": block.post_attention_layernorm.weight,
            f"{at}.ln2.b": block.post_attention_layernorm.bias,
            f"{at}.attn.W_O": heads_out(block.self_attention.dense.weight, heads),
            f"{at}.attn.b_O": block.self_attention.dense.bias,
            f"{at}.mlp.W_in": block.mlp.dense_h_to_4h.weight.T,
            f"{at}.mlp.b_in": block.mlp.dense_h_to_4h.bias,
            f"{at}.mlp.W_out": block.mlp.dense_4h_to_h.weight.T,
            f"{at}.mlp.b_out": block.mlp.dense_4h_to_h.bias,
        }
    fields = {
        "positional_embedding_type": "alibi",
        "post_embedding_ln": True,
        "n_heads": heads,
        "d_model": 24,
        "n_ctx": 32,
    }
    model = HookedTransformer(tiny_config(**fields))
    fill(model, {name: weight.detach() for name, weight in weights.items()})
    assert_same_logits(model, theirs, tiny_tokens(2, 24))


def test_a_gemma_2_of_transformers_gives_the_same_logits() -> None:
    config = Gemma2Config(
        vocab_size=20,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        sliding_window=5,
        query_pre_attn_scalar=3,
        attn_logit_softcapping=1.0,
        final_logit_softcapping=4.0,
        attn_implementation="eager",
        rms_norm_eps=1e-6,
    )
    theirs = randomise_(Gemma2ForCausalLM(config).eval()).double()
    weights = llama_weights(theirs, 4, 2)
    weights["embed.W_E"] = weights["embed.W_E"] * math.sqrt(24)
    for layer, block in enumerate(theirs.model.layers):
        at = f"blocks.{layer}"
        weights[f"{at}.ln1_post.w"] = block.post_attention_layernorm.weight.detach()
        weights[f"{at}.ln2.w"] = block.pre_feedforward_layernorm.weight.detach()
        weights[f"{at}.ln2_post.w"] = block.post_feedforward_layernorm.weight.detach()
    # Their gains are stored as what they differ from one by.
    weights = {name: weight + 1 if name.endswith(".w") else weight for name, weight in weights.items()}
    fields = {
        "positional_embedding_type": "rotary",
        "d_model": 24,
        "d_head": 8,
        "d_mlp": 40,
        "n_heads": 4,
        "n_key_value_heads": 2,
        "n_ctx": 32,
        "normalization_type": "RMS",
        "eps": 1e-6,
        "use_normalization_before_and_after": True,
        "gated_mlp": True,
        "act_fn": "gelu_pytorch_tanh",
        "attn_scale": math.sqrt(3),
        "attn_scores_soft_cap": 1.0,
        "output_logits_soft_cap": 4.0,
        "window_size": 5,
        "attn_types": ["local", "global"],
    }
    model = fill(HookedTransformer(tiny_config(**fields)), weights)
    assert_same_logits(model, theirs, tiny_tokens(2, 24))
