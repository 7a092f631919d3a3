"""InternLM2 (Cai et al. 2024, "InternLM2 Technical Report") and 2.5 as published: Llama under other names."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import internlm, llama
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import plain_parameters, rotary
from weight_conversion.rules import RuleTable
from weight_conversion.sizes import d_head

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map the fields of a config.json whose `model_type` is "internlm2"."""
    fields.ignore("attn_implementation")
    return {**llama.body(fields), **rotary(fields, d_head(fields), parameters=plain_parameters(fields))}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of an `InternLM2ForCausalLM`."""
    block, bias = "layers.{layer}", fields.take("bias")
    return (
        *tables.embeddings(cfg, "tok_embeddings.weight", "output"),
        *tables.norm(f"{block}.attention_norm", "blocks.{layer}.ln1"),
        *tables.split_qkv(f"{block}.attention.wqkv", grouped=True, bias=bias),
        *tables.attention_output(f"{block}.attention.wo", bias=bias),
        *tables.stored_rotary(f"{block}.attention"),
        *tables.norm(f"{block}.ffn_norm", "blocks.{layer}.ln2"),
        *tables.gated_mlp(f"{block}.feed_forward", names=("w1", "w3", "w2")),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family(
    "InternLM2",
    ("InternLM2ForCausalLM",),
    config,
    rules,
    embedding="tok_embeddings.weight",
    unembedding="output.weight",
    defaults=internlm.DEFAULTS,
)
