"""GPT-BigCode: SantaCoder (Ben Allal et al. 2023) and StarCoder (Li et al. 2023), where one head's keys serve all."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import Rule, RuleTable
from weight_conversion.sizes import gpt2_sizes

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `GPTBigCodeConfig`."""
    fields.require("add_cross_attention", False)
    fields.ignore("attn_pdrop", "embd_pdrop", "resid_pdrop")
    # The precision in which scores are computed.
    fields.ignore("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    # `multi_query` decides, and this follows.
    fields.ignore("num_key_value_heads")
    # Settings of an old version, about inference.
    fields.ignore("inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length")
    fields.ignore("pre_allocate_kv_cache", "validate_runner_input")
    return {
        **gpt2_sizes(fields),
        "n_key_value_heads": 1 if fields.take("multi_query") else None,
        "use_attn_scale": fields.take("scale_attn_weights"),
        "positional_embedding_type": "standard",
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `GPTBigCodeForCausalLM`."""
    block, c_attn = "h.{layer}", "h.{layer}.attn.c_attn"
    return (
        *tables.embeddings(cfg, "wte.weight"),
        Rule("wpe.weight", "n_ctx d_model -> n_ctx d_model", "pos_embed.W_pos"),
        *tables.norm(f"{block}.ln_1", "blocks.{layer}.ln1", bias=True),
        *(tables.split_qkv if fields.take("multi_query") else tables.fused_qkv)(c_attn, bias=True),
        *tables.attention_output(f"{block}.attn.c_proj", bias=True),
        *tables.norm(f"{block}.ln_2", "blocks.{layer}.ln2", bias=True),
        *tables.mlp(f"{block}.mlp.c_fc", f"{block}.mlp.c_proj", up_bias=True, down_bias=True),
        *tables.norm("ln_f", "ln_final", bias=True),
    )


FAMILY = Family(
    "GPT-BigCode",
    ("GPTBigCodeForCausalLM", "GPTBigCodeModel"),
    config,
    rules,
    embedding="wte.weight",
    prefix="transformer.",
    sites=Sites(layers="transformer.h", attn="attn"),
    prepend_bos=True,
)
