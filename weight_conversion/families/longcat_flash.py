"""LongCat-Flash (Meituan 2025, "LongCat-Flash Technical Report"): two blocks to a layer, experts across the two."""

from __future__ import annotations

import math

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family, Sites
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.latents import latent_attention, latent_config
from weight_conversion.rules import Drop, Entry, RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `LongcatFlashConfig`."""
    fields.ignore("attention_dropout", "output_router_logits")
    # Transformers has the first field and leaves the bias out; published files give the others, which it does not read.
    fields.require("router_bias", False)
    fields.require("zero_expert_type", "identity")
    fields.require("attention_method", "MLA")
    fields.require("mla_scale_q_lora", True)
    fields.require("mla_scale_kv_lora", True)
    identities = fields.take("zero_expert_num") or 0
    return {
        "n_layers": 2 * fields.take("num_layers"),
        "d_model": fields.take("hidden_size"),
        "n_heads": fields.take("num_attention_heads"),
        "d_mlp": fields.take("ffn_hidden_size"),
        "d_vocab": fields.take("vocab_size"),
        "act_fn": fields.take("hidden_act"),
        "gated_mlp": True,
        "eps": fields.take("rms_norm_eps"),
        "normalization_type": "RMS",
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
        **latent_config(fields, adjacent=True),
        "shortcut_experts": True,
        "num_experts": fields.take("n_routed_experts") + identities,
        "identity_experts": identities,
        "experts_per_token": fields.take("moe_topk"),
        "d_expert": fields.take("expert_ffn_hidden_size"),
        "norm_topk_prob": False,
        "routed_scale": float(fields.take("routed_scaling_factor")),
        "router_correction": True,
        "router_in_float32": True,
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `LongcatFlashForCausalLM`. What multiplies the latents goes into their norms' gains."""
    layer, block = "layers.{pair}", "blocks.{layer}"
    widths = (cfg.d_latent_q or cfg.d_model, cfg.d_latent_kv or cfg.d_model)
    scales = (math.sqrt(cfg.d_model / widths[0]), math.sqrt(cfg.d_model / widths[1]))
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{layer}.input_layernorm.{{half}}", f"{block}.ln1"),
        *latent_attention(cfg, f"{layer}.self_attn.{{half}}", bias=fields.take("attention_bias"), latent_scales=scales),
        *tables.norm(f"{layer}.post_attention_layernorm.{{half}}", f"{block}.ln2"),
        *tables.gated_mlp(f"{layer}.mlps.{{half}}"),
        *_experts(cfg, f"{layer}.mlp", f"{block}.shortcut"),
        *tables.norm("norm", "ln_final"),
        Drop("mtp.*", "it predicts the tokens after the next one"),
    )


def _experts(cfg: HookedTransformerConfig, module: str, target: str) -> tuple[Entry, ...]:
    """Return the rows of the experts, which the first block of each pair has."""
    first = tuple(filter(cfg.has_shortcut, range(cfg.n_layers)))
    # Transformers writes the first two matrices of an expert for those without weights too, and reads neither.
    unread = [
        f"{module}.experts.{number}.{name}.weight"
        for number in range(cfg.weighted_experts, cfg.num_experts or 0)
        for name in ("gate_proj", "up_proj")
    ]
    return (
        *tables.router(f"{module}.router.classifier", target=target, layers=first),
        *tables.router_correction(f"{module}.router.e_score_correction_bias", target=target, layers=first),
        *tables.experts(f"{module}.experts", target=target, layers=first),
        *(Drop(name, "this expert has no weights", axes="d_expert d_model", layers=first) for name in unread),
    )


FAMILY = Family(
    "LongCat-Flash",
    ("LongcatFlashForCausalLM",),
    config,
    rules,
    sites=Sites(blocks_per_layer=2, attn="self_attn.{half}", mlp=None),
)
