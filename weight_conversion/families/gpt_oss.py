"""GPT-OSS (OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card")."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.errors import CheckpointError
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.layer_types import layer_types
from weight_conversion.rotary import rotary
from weight_conversion.rules import Rule, RuleTable
from weight_conversion.sizes import d_head, sizes

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `GptOssConfig`."""
    _refuse_quantised(fields)
    fields.ignore("attention_dropout", "output_router_logits", "router_aux_loss_coef")
    # It says "silu", but the experts are written out: `gate * sigmoid(swiglu_alpha * gate)`, which has a name of its
    # own only for 1.702.
    fields.ignore("hidden_act")
    fields.require("swiglu_alpha", 1.702)
    # Published files have these names too; transformers reads the same values under other names.
    fields.ignore("experts_per_token", "initial_context_length")
    return {
        **sizes(fields),
        "act_fn": "quick_gelu",
        "gated_mlp": True,
        "gated_limit": fields.take("swiglu_limit"),
        "num_experts": fields.take("num_local_experts"),
        "experts_per_token": fields.take("num_experts_per_tok"),
        "norm_topk_prob": True,
        "eps": fields.take("rms_norm_eps"),
        "normalization_type": "RMS",
        "attention_sinks": True,
        **layer_types(fields),
        **rotary(fields, d_head(fields)),
    }


def _refuse_quantised(fields: ConfigFields) -> None:
    quantisation = fields.get("quantization_config", None)
    if quantisation is None:
        return
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
    raise CheckpointError(
        f"this {fields.family} checkpoint is quantised ({method}), and quantised weights are not read. Have "
        "transformers dequantise it (from_pretrained with quantization_config=Mxfp4Config(dequantize=True)) and pass "
        "that model as hf_model, or load a copy in bfloat16"
    )


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `GptOssForCausalLM`. Its experts are kept as [in out], gate and linear columns by turns."""
    block, mlp, bias = "layers.{layer}", "blocks.{layer}.mlp", fields.take("attention_bias")
    experts = f"{block}.mlp.experts"
    weights, biases = (f"{mlp}.W_gate", f"{mlp}.W_in"), (f"{mlp}.b_gate", f"{mlp}.b_in")
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        Rule(f"{block}.self_attn.sinks", "head -> head", "blocks.{layer}.attn.sinks"),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *tables.router(f"{block}.mlp.router", bias=True),
        Rule(f"{experts}.gate_up_proj", "expert d_model (d_expert part) -> part expert d_model d_expert", weights),
        Rule(f"{experts}.gate_up_proj_bias", "expert (d_expert part) -> part expert d_expert", biases),
        Rule(f"{experts}.down_proj", "expert d_expert d_model -> expert d_expert d_model", f"{mlp}.W_out"),
        Rule(f"{experts}.down_proj_bias", "expert d_model -> expert d_model", f"{mlp}.b_out"),
        *tables.norm("norm", "ln_final"),
    )


FAMILY = Family("GPT-OSS", ("GptOssForCausalLM",), config, rules, prepend_bos=True)
