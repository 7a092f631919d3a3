"""XGLM (Lin et al. 2021), whose positions are sinusoids rather than learned."""

from __future__ import annotations

import math
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.errors import CheckpointError
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import Computed, Drop, RuleTable

__all__ = ["FAMILY", "OFFSET", "config", "rules", "sinusoids"]

_MOST = 2**30  # numbers in a table of sinusoids; the largest XGLM has 2**23
# The first position takes the third of the sinusoids.
OFFSET = 2


def config(fields: ConfigFields) -> Arguments:
    """Map an `XGLMConfig`."""
    fields.require("add_cross_attention", False)
    fields.ignore("activation_dropout", "attention_dropout", "dropout", "init_std", "layerdrop")
    d_model = fields.take("d_model")
    return {
        "n_layers": fields.take("num_layers"),
        "d_model": d_model,
        "n_heads": fields.take("attention_heads"),
        "d_mlp": fields.take("ffn_dim"),
        "n_ctx": fields.take("max_position_embeddings"),
        "d_vocab": fields.take("vocab_size"),
        "act_fn": fields.take("activation_function"),
        "eps": 1e-5,
        "normalization_type": "LN",
        "embedding_scale": math.sqrt(d_model) if fields.take("scale_embedding") else 1.0,
        "positional_embedding_type": "standard",
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
    }


def sinusoids(cfg: HookedTransformerConfig, padding: int | None) -> Float[Tensor, "n_ctx d_model"]:
    """Return each position's sines, then its cosines, of frequencies from 1 down to 1/10000 (Vaswani et al. 2017).

    The row of the padding token's number is zero: positions once counted from there.
    """
    if cfg.n_ctx * cfg.d_model > _MOST:
        raise CheckpointError(f"sinusoids for {cfg.n_ctx} positions of width {cfg.d_model} are more than any XGLM has")
    half = cfg.d_model // 2
    frequencies = torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
    angles = torch.arange(OFFSET, OFFSET + cfg.n_ctx).float()[:, None] * frequencies
    positions = torch.cat((angles.sin(), angles.cos()), dim=1)
    if padding is not None and OFFSET <= padding < OFFSET + cfg.n_ctx:
        positions[padding - OFFSET] = 0
    return torch.nn.functional.pad(positions, (0, cfg.d_model % 2))


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of an `XGLMForCausalLM`."""
    block = "layers.{layer}"
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    return (
        *tables.embeddings(cfg),
        Computed("pos_embed.W_pos", partial(sinusoids, padding=fields.get("pad_token_id", None))),
        Drop("embed_positions.weights", "the sinusoids of old checkpoints"),
        *tables.norm(f"{block}.self_attn_layer_norm", "blocks.{layer}.ln1", bias=True),
        *tables.attention(f"{block}.self_attn", names=names, qkv_bias=True, out_bias=True),
        *tables.norm(f"{block}.final_layer_norm", "blocks.{layer}.ln2", bias=True),
        *tables.mlp(f"{block}.fc1", f"{block}.fc2", up_bias=True, down_bias=True),
        *tables.norm("layer_norm", "ln_final", bias=True),
    )


FAMILY = Family("XGLM", ("XGLMForCausalLM", "XGLMModel"), config, rules, sites=Sites(mlp="fc2"))
