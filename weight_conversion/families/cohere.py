"""Cohere (Command R and Aya, Cohere 2024): attention and MLP in parallel behind one LayerNorm without bias."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import rotary
from weight_conversion.rules import Constant, Entry, Rule, RuleTable
from weight_conversion.sizes import d_head, sizes

__all__ = ["FAMILY", "config", "rules", "shared_config"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `CohereConfig`."""
    per_head = fields.take("use_qk_norm")
    return {
        **shared_config(fields),
        "use_qk_norm": per_head,
        "qk_norm_type": "LN",
        "qk_norm_per_head_gains": per_head,
    }


def shared_config(fields: ConfigFields) -> Arguments:
    """Map the fields that both generations of Cohere's configs have. Adjacent dimensions rotate together."""
    fields.ignore("attention_dropout", "pretraining_tp")
    # The longest prompt of the tokenizer.
    fields.ignore("model_max_length")
    return {
        **sizes(fields),
        "gated_mlp": True,
        "parallel_attn_mlp": True,
        "eps": fields.take("layer_norm_eps"),
        "normalization_type": "LN",
        "logit_scale": fields.take("logit_scale"),
        "rotary_adjacent_pairs": True,
        **rotary(fields, d_head(fields)),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `CohereForCausalLM`."""
    block, bias = "layers.{layer}", fields.take("attention_bias")
    return (
        *tables.embeddings(cfg),
        *tables.biasless_layer_norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        *(_head_norms(f"{block}.self_attn") if cfg.use_qk_norm else ()),
        *tables.biasless_layer_norm(f"{block}.input_layernorm", "blocks.{layer}.ln2", again=True),
        *tables.gated_mlp(f"{block}.mlp"),
        *tables.biasless_layer_norm("norm", "ln_final"),
    )


def _head_norms(attention: str) -> tuple[Entry, ...]:
    """Return the rows of a LayerNorm for each head's queries and keys, with gains of its own and no bias."""
    rows: list[Entry] = []
    for name, head in (("q_norm", "head"), ("k_norm", "kv_head")):
        target = f"blocks.{{layer}}.attn.{name}"
        gains = Rule(f"{attention}.{name}.weight", f"{head} d_head -> {head} d_head", f"{target}.w")
        rows += [gains, Constant(f"{target}.b", f"{head} d_head")]
    return tuple(rows)


FAMILY = Family("Cohere", ("CohereForCausalLM", "CohereModel"), config, rules)
