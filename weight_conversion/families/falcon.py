"""Falcon (Almazrouei et al. 2023): its three ways to keep queries, keys and values, its three ways to place norms."""

from __future__ import annotations

import math

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.errors import CheckpointError
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import LEGACY_FIELDS, rotary
from weight_conversion.rules import Entry, RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `FalconConfig`."""
    fields.require("apply_residual_connection_post_layernorm", False)
    fields.ignore("attention_dropout", "hidden_dropout")
    # `ffn_hidden_size` holds the same.
    fields.ignore("ff_factor")
    n_heads = fields.take("num_attention_heads")
    d_head = fields.take("hidden_size") // n_heads
    kv_heads, multi_query = fields.take("num_kv_heads"), fields.take("multi_query")
    # `num_kv_heads` holds only for the new architecture.
    if not fields.take("new_decoder_architecture"):
        kv_heads = 1 if multi_query else n_heads
    return {
        "n_layers": fields.take("num_hidden_layers"),
        "d_model": fields.take("hidden_size"),
        "n_heads": n_heads,
        "n_key_value_heads": kv_heads,
        "d_mlp": fields.take("ffn_hidden_size"),
        "d_vocab": fields.take("vocab_size"),
        "act_fn": fields.take("activation"),
        "eps": fields.take("layer_norm_epsilon"),
        "normalization_type": "LN",
        "parallel_attn_mlp": fields.take("parallel_attn"),
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
        **(_alibi(fields, d_head) if fields.take("alibi") else rotary(fields, d_head)),
    }


def _alibi(fields: ConfigFields, d_head: int) -> Arguments:
    """ALiBi as Falcon was trained with it: added before scores are divided, and rounded."""
    fields.ignore("rope_parameters", *LEGACY_FIELDS)
    return {
        "positional_embedding_type": "alibi",
        "alibi_scale": 1 / math.sqrt(d_head),
        "alibi_in_bfloat16": True,
        "n_ctx": fields.take("max_position_embeddings"),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `FalconForCausalLM`."""
    block, bias = "h.{layer}", fields.take("bias")
    return (
        *tables.embeddings(cfg, "word_embeddings.weight"),
        *_norms(cfg, fields),
        *_queries_keys_values(fields, f"{block}.self_attention.query_key_value", bias),
        *tables.attention_output(f"{block}.self_attention.dense", bias=bias),
        *tables.mlp(f"{block}.mlp.dense_h_to_4h", f"{block}.mlp.dense_4h_to_h", up_bias=bias, down_bias=bias),
        *tables.norm("ln_f", "ln_final", bias=True),
    )


def _norms(cfg: HookedTransformerConfig, fields: ConfigFields) -> tuple[Entry, ...]:
    """Attention and MLP one after the other have a norm each; in parallel, one between them or, in new models, two."""
    is_new, parallel = fields.take("new_decoder_architecture"), cfg.parallel_attn_mlp
    n_norms = fields.get("num_ln_in_parallel_attn", None)
    if is_new and n_norms is None:
        n_norms = 2
    # Transformers refuses these too, when the model runs.
    if is_new and not (parallel and n_norms in (1, 2)):
        raise CheckpointError(
            f"Falcon with new_decoder_architecture, parallel_attn={parallel} and num_ln_in_parallel_attn={n_norms}: "
            "new models have attention and MLP in parallel, with one norm or two"
        )
    if parallel and not is_new and n_norms == 2:
        raise CheckpointError("Falcon with num_ln_in_parallel_attn=2 is only defined with new_decoder_architecture")
    first, second = "input_layernorm", "post_attention_layernorm"
    if parallel:
        first, second = ("ln_attn", "ln_mlp") if n_norms == 2 else (first, first)
    return (
        *tables.norm(f"h.{{layer}}.{first}", "blocks.{layer}.ln1", bias=True),
        *tables.norm(f"h.{{layer}}.{second}", "blocks.{layer}.ln2", bias=True, again=first == second),
    )


def _queries_keys_values(fields: ConfigFields, source: str, bias: bool) -> tuple[Entry, ...]:
    """One layer makes all three: by group in new models, queries first in multi-query ones, else head by head."""
    grouped, multi_query = fields.take("new_decoder_architecture"), fields.take("multi_query")
    if grouped or multi_query:
        return tables.split_qkv(source, grouped=grouped, bias=bias)
    return tables.fused_qkv(source, bias=bias)


FAMILY = Family(
    "Falcon",
    ("FalconForCausalLM", "FalconModel"),
    config,
    rules,
    embedding="word_embeddings.weight",
    prefix="transformer.",
    # With attention and MLP in parallel, transformers adds attention's output to that of the MLP in place.
    sites=Sites(layers="transformer.h", attn="self_attention", mlp="mlp", attention="sdpa"),
)
