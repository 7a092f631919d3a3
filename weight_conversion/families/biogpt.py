"""BioGPT (Luo et al. 2022, "BioGPT: generative pre-trained transformer for biomedical text generation and mining")."""

from __future__ import annotations

import math

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import opt
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import Rule, RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `BioGptConfig`."""
    fields.ignore("activation_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "layerdrop")
    # Files say 1e-12, and the model has PyTorch's default whatever they say.
    fields.ignore("layer_norm_eps")
    d_model = fields.take("hidden_size")
    return {
        "n_layers": fields.take("num_hidden_layers"),
        "d_model": d_model,
        "n_heads": fields.take("num_attention_heads"),
        "d_mlp": fields.take("intermediate_size"),
        "n_ctx": fields.take("max_position_embeddings"),
        "d_vocab": fields.take("vocab_size"),
        "act_fn": fields.take("hidden_act"),
        "eps": 1e-5,
        "normalization_type": "LN",
        "embedding_scale": math.sqrt(d_model) if fields.take("scale_embedding") else 1.0,
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `BioGptForCausalLM`."""
    block, names = "layers.{layer}", ("q_proj", "k_proj", "v_proj", "out_proj")
    positions = "n_ctx d_model -> n_ctx d_model"
    return (
        *tables.embeddings(cfg, unembedding="output_projection"),
        # As in OPT, the first rows of positions are not in use.
        Rule("embed_positions.weight", positions, "pos_embed.W_pos", skip=opt.OFFSET),
        *tables.norm(f"{block}.self_attn_layer_norm", "blocks.{layer}.ln1", bias=True),
        *tables.attention(f"{block}.self_attn", names=names, qkv_bias=True, out_bias=True),
        *tables.norm(f"{block}.final_layer_norm", "blocks.{layer}.ln2", bias=True),
        *tables.mlp(f"{block}.fc1", f"{block}.fc2", up_bias=True, down_bias=True),
        *tables.norm("layer_norm", "ln_final", bias=True),
    )


FAMILY = Family(
    "BioGPT",
    ("BioGptForCausalLM", "BioGptModel"),
    config,
    rules,
    unembedding="output_projection.weight",
    prefix="biogpt.",
    sites=Sites(layers="biogpt.layers", mlp="fc2"),
)
