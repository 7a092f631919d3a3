"""StableLM (Bellagente et al. 2024): LayerNorms around gated MLPs, and a norm for each head's queries and keys."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import rotary
from weight_conversion.rules import Constant, Entry, Rule, RuleTable
from weight_conversion.sizes import d_head, sizes

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `StableLmConfig`."""
    fields.ignore("attention_dropout", "hidden_dropout")
    return {
        **sizes(fields),
        "gated_mlp": True,
        "eps": fields.take("layer_norm_eps"),
        "normalization_type": "LN",
        "parallel_attn_mlp": fields.take("use_parallel_residual"),
        "use_qk_norm": fields.take("qk_layernorm"),
        "qk_norm_type": "LN",
        "qk_norm_per_head_gains": fields.take("qk_layernorm"),
        **rotary(fields, d_head(fields), partial=True),
    }


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `StableLmForCausalLM`. In parallel, attention and MLP share a norm."""
    block, attention = "layers.{layer}", "layers.{layer}.self_attn"
    shared = cfg.parallel_attn_mlp
    second = "input_layernorm" if shared else "post_attention_layernorm"
    return (
        *tables.embeddings(cfg),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1", bias=True),
        *tables.attention(attention, qkv_bias=fields.take("use_qkv_bias")),
        *(_head_norms(attention) if cfg.use_qk_norm else ()),
        *tables.stored_rotary(attention),
        *tables.norm(f"{block}.{second}", "blocks.{layer}.ln2", bias=True, again=shared),
        *tables.gated_mlp(f"{block}.mlp"),
        *tables.norm("norm", "ln_final", bias=True),
    )


def _head_norms(attention: str) -> tuple[Entry, ...]:
    """Each head's LayerNorm is a module of its own, without a bias."""
    rows: list[Entry] = []
    for letter, head in (("q", "head"), ("k", "kv_head")):
        target, source = (
            f"blocks.{{layer}}.attn.{letter}_norm",
            f"{attention}.{letter}_layernorm.norms.{{{head}}}.weight",
        )
        rows += [
            Rule(source, f"{head} d_head -> {head} d_head", f"{target}.w"),
            Constant(f"{target}.b", f"{head} d_head"),
        ]
    return tuple(rows)


FAMILY = Family("StableLM", ("StableLmForCausalLM",), config, rules)
