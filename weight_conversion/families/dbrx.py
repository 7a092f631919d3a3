"""DBRX (Databricks 2024): experts, LayerNorms without biases, and queries, keys and values clipped."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.errors import CheckpointError
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import rotary
from weight_conversion.rules import Rule, RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `DbrxConfig`."""
    fields.ignore("emb_pdrop", "resid_pdrop", "output_router_logits")
    # `attn_config` holds the same, and transformers reads that.
    fields.ignore("num_key_value_heads")
    d_model, n_heads = fields.take("d_model"), fields.take("n_heads")
    attention = ConfigFields(fields.take("attn_config"), f"{fields.family} attn_config")
    experts = ConfigFields(fields.take("ffn_config"), f"{fields.family} ffn_config")
    arguments = {
        "n_layers": fields.take("n_layers"),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_key_value_heads": attention.take("kv_n_heads"),
        "clip_qkv": attention.take("clip_qkv"),
        "d_vocab": fields.take("vocab_size"),
        "eps": 1e-5,
        "normalization_type": "LN",
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
        **_experts(experts),
        **rotary(fields, d_model // n_heads, context="max_seq_len"),
    }
    _check_base(arguments["rotary_base"], attention.take("rope_theta"))
    attention.ignore("attn_pdrop")
    attention.finish()
    experts.finish()
    return arguments


def _experts(fields: ConfigFields) -> Arguments:
    """Map a `DbrxFFNConfig`."""
    fields.ignore("moe_jitter_eps", "moe_loss_weight", "hidden_size")
    activation = ConfigFields(fields.take("ffn_act_fn"), f"{fields.family} ffn_act_fn")
    # The exponent of the norm that the chosen experts' weights are divided by: 1 is their sum, None no division.
    exponent = fields.take("moe_normalize_expert_weights")
    if exponent not in (1, None):
        raise CheckpointError(f"{fields.family} with moe_normalize_expert_weights={exponent!r} is not supported")
    arguments = {
        "act_fn": activation.get("name", "silu"),
        "gated_mlp": True,
        "d_mlp": fields.take("ffn_hidden_size"),
        "num_experts": fields.take("moe_num_experts"),
        "experts_per_token": fields.take("moe_top_k"),
        "norm_topk_prob": exponent is not None,
    }
    activation.finish()
    return arguments


def _check_base(base: float, trained: float) -> None:
    """Check that the rotary base that transformers uses is the one that the model was trained with."""
    if base != trained:
        raise CheckpointError(
            f"DBRX with two rotary bases: attn_config has rope_theta={trained}, with which it was trained, and this "
            f"version of transformers rotates with {base}, that of rope_parameters. Give config.json "
            f'"rope_parameters": {{"rope_type": "default", "rope_theta": {trained}}}'
        )


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `DbrxForCausalLM`. The experts' matrices stand one below the other, `w2` as [in out]."""
    block, mlp = "blocks.{layer}", "blocks.{layer}.mlp"
    attention, experts = f"{block}.norm_attn_norm", f"{block}.ffn.experts.mlp"
    inward = "(expert d_expert) d_model -> expert d_model d_expert"
    outward = "(expert d_expert) d_model -> expert d_expert d_model"
    return (
        *tables.embeddings(cfg, "wte.weight"),
        *tables.biasless_layer_norm(f"{attention}.norm_1", "blocks.{layer}.ln1"),
        *tables.split_qkv(f"{attention}.attn.Wqkv"),
        *tables.attention_output(f"{attention}.attn.out_proj"),
        *tables.biasless_layer_norm(f"{attention}.norm_2", "blocks.{layer}.ln2"),
        *tables.router(f"{block}.ffn.router.layer"),
        Rule(f"{experts}.w1", inward, f"{mlp}.W_gate"),
        Rule(f"{experts}.v1", inward, f"{mlp}.W_in"),
        Rule(f"{experts}.w2", outward, f"{mlp}.W_out"),
        *tables.no_expert_biases(),
        *tables.biasless_layer_norm("norm_f", "ln_final"),
    )


FAMILY = Family(
    "DBRX",
    ("DbrxForCausalLM", "DbrxModel"),
    config,
    rules,
    embedding="wte.weight",
    prefix="transformer.",
    # Its eager attention computes the softmax in float32 for weights of any dtype.
    sites=Sites(layers="transformer.blocks", attn="norm_attn_norm.attn", mlp="ffn", attention="sdpa"),
)
