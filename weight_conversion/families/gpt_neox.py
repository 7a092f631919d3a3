"""GPT-NeoX (Black et al. 2022) and Pythia (Biderman et al. 2023)."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import rotary
from weight_conversion.rules import RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `GPTNeoXConfig`."""
    fields.ignore("attention_dropout", "hidden_dropout", "classifier_dropout", "is_decoder")
    # Old names of the dropouts and of the fields in `rope_parameters`, and the training steps of Polyglot.
    fields.ignore("attention_probs_dropout_prob", "hidden_dropout_prob", "rotary_emb_base", "rotary_pct", "num_steps")
    d_model, n_heads = fields.take("hidden_size"), fields.take("num_attention_heads")
    return {
        "n_layers": fields.take("num_hidden_layers"),
        "d_model": d_model,
        "n_heads": n_heads,
        "d_mlp": fields.take("intermediate_size"),
        "d_vocab": fields.take("vocab_size"),
        "act_fn": fields.take("hidden_act"),
        "eps": fields.take("layer_norm_eps"),
        "normalization_type": "LN",
        "parallel_attn_mlp": fields.take("use_parallel_residual"),
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
        **rotary(fields, d_model // n_heads, partial=True),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `GPTNeoXForCausalLM`."""
    block, attention = "layers.{layer}", "layers.{layer}.attention"
    bias = fields.take("attention_bias")
    return (
        # On disk the unembedding keeps the name it had before it became `lm_head` in memory.
        *tables.embeddings(cfg, "embed_in.weight", "embed_out"),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1", bias=True),
        *tables.fused_qkv(f"{attention}.query_key_value", bias=bias),
        *tables.attention_output(f"{attention}.dense", bias=bias),
        *tables.stored_rotary(attention),
        *tables.stored_mask(attention),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2", bias=True),
        *tables.mlp(f"{block}.mlp.dense_h_to_4h", f"{block}.mlp.dense_4h_to_h", up_bias=True, down_bias=True),
        *tables.norm("final_layer_norm", "ln_final", bias=True),
    )


FAMILY = Family(
    "GPT-NeoX",
    ("GPTNeoXForCausalLM",),
    config,
    rules,
    embedding="embed_in.weight",
    unembedding="embed_out.weight",
    prefix="gpt_neox.",
    sites=Sites(layers="gpt_neox.layers", attn="attention"),
    prepend_bos=False,
)
