"""nanochat (Karpathy 2025): RMS norms without gains everywhere, also after the embedding and after rotation."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.families.gemma2 import soft_cap
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import Constant, RuleTable

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `NanoChatConfig`."""
    arguments = llama.config(fields)
    return {
        **arguments,
        "gated_mlp": False,
        "normalization_type": "RMSPre",
        "post_embedding_ln": True,
        "use_qk_norm": True,
        "qk_norm_type": "RMSPre",
        "qk_norm_after_rotary": True,
        "output_logits_soft_cap": soft_cap(fields, "final_logit_softcapping"),
        # It rotates backwards, as if positions were negative.
        "rotary_scaling_factor": -arguments.get("rotary_scaling_factor", 1.0),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `NanoChatForCausalLM`."""
    block, bias = "layers.{layer}", fields.take("attention_bias")
    return (
        *tables.embeddings(cfg),
        Constant("embed.ln.w", "d_model", value=1.0),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        *tables.mlp(f"{block}.mlp.fc1", f"{block}.mlp.fc2"),
    )


FAMILY = Family("nanochat", ("NanoChatForCausalLM",), config, rules)
