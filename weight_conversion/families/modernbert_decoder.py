"""ModernBERT's decoders (Weller et al. 2025, "Seq vs Seq: An Open Suite of Paired Encoders and Decoders")."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families.olmo3 import unscaled_base
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.layer_types import layer_types
from weight_conversion.rotary import rotary
from weight_conversion.rules import Constant, Entry, Rule, RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `ModernBertDecoderConfig`."""
    fields.ignore("attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout")
    fields.ignore("initializer_cutoff_factor", "cls_token_id")
    # `sliding_window`, `layer_types` and `rope_parameters` hold the same.
    fields.ignore("local_attention", "global_attn_every_n_layers", "global_rope_theta", "local_rope_theta")
    # Fields of the encoders, which published files have too.
    fields.require("is_causal", True)
    fields.require("causal_mask", True)
    fields.require("position_embedding_type", "sans_pos")
    d_model, n_heads = fields.take("hidden_size"), fields.take("num_attention_heads")
    by_type = fields.take("rope_parameters")
    return {
        "n_layers": fields.take("num_hidden_layers"),
        "d_model": d_model,
        "n_heads": n_heads,
        "d_mlp": fields.take("intermediate_size"),
        "d_vocab": fields.take("vocab_size"),
        "act_fn": fields.take("hidden_activation"),
        "gated_mlp": True,
        "eps": fields.take("norm_eps"),
        "normalization_type": "LN",
        "first_norm": False,
        "post_embedding_ln": True,
        "unembed_act_fn": fields.take("classifier_activation"),
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
        **layer_types(fields),
        **rotary(fields, d_model // n_heads, parameters=by_type["full_attention"]),
        "rotary_base_local": unscaled_base(fields, by_type["sliding_attention"]),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `ModernBertDecoderForCausalLM`."""
    norm_bias, attention_bias, mlp_bias = (fields.take(f"{part}_bias") for part in ("norm", "attention", "mlp"))
    block, ours, head = "layers.{layer}", "blocks.{layer}", "unembed.transform"

    def norm(source: str, target: str, layers: tuple[int, ...] | None = None) -> tuple[Entry, ...]:
        if norm_bias:
            return tables.norm(source, target, bias=True, layers=layers)
        return tables.biasless_layer_norm(source, target, layers=layers)

    return (
        *tables.embeddings(cfg, "embeddings.tok_embeddings.weight", "decoder", bias=fields.take("decoder_bias")),
        *norm("embeddings.norm", "embed.ln"),
        *norm(f"{block}.attn_norm", f"{ours}.ln1", layers=tuple(range(1, cfg.n_layers))),
        *tables.attention(
            f"{block}.attn",
            names=("q_proj", "k_proj", "v_proj", "Wo"),
            qkv_bias=attention_bias,
            out_bias=attention_bias,
        ),
        *norm(f"{block}.mlp_norm", f"{ours}.ln2"),
        *_mlp(f"{block}.mlp", bias=mlp_bias),
        *norm("final_norm", "ln_final"),
        *tables.linear(
            "lm_head.dense",
            f"{head}.W_dense",
            f"{head}.b_dense",
            ("d_model", "d_dense"),
            bias=fields.take("classifier_bias"),
        ),
        *norm("lm_head.norm", f"{head}.ln"),
    )


def _mlp(module: str, *, bias: bool) -> tuple[Entry, ...]:
    """Return the rows of a gated MLP whose gate and other factor are one layer."""
    ours = "blocks.{layer}.mlp"
    W, b = ((f"{ours}.{kind}_gate", f"{ours}.{kind}_in") for kind in "Wb")
    weight = Rule(f"{module}.Wi.weight", "(part d_mlp) d_model -> part d_model d_mlp", W)
    out = tables.linear(f"{module}.Wo", f"{ours}.W_out", f"{ours}.b_out", ("d_mlp", "d_model"), bias=bias)
    if bias:
        return (weight, Rule(f"{module}.Wi.bias", "(part d_mlp) -> part d_mlp", b), *out)
    return (weight, *(Constant(name, "d_mlp") for name in b), *out)


FAMILY = Family(
    "ModernBERT decoder",
    ("ModernBertDecoderForCausalLM",),
    config,
    rules,
    embedding="embeddings.tok_embeddings.weight",
    unembedding="decoder.weight",
    beside=("lm_head",),
    sites=Sites(attn="attn"),
)
