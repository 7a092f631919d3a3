"""Phi-3.5-MoE (Abdin et al. 2024), whose experts are weighted as SparseMixer does (Liu et al. 2024, "GRIN")."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.errors import CheckpointError
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields, HFConfig
from weight_conversion.rotary import rotary
from weight_conversion.rules import RuleTable
from weight_conversion.sizes import d_head, sizes

__all__ = ["FAMILY", "config", "rules"]


def config(fields: ConfigFields) -> Arguments:
    """Map a `PhimoeConfig`."""
    fields.ignore("attention_dropout", "output_router_logits", "router_aux_loss_coef")
    fields.ignore("input_jitter_noise", "hidden_dropout")
    return {
        **sizes(fields),
        "gated_mlp": True,
        "num_experts": fields.take("num_local_experts"),
        "experts_per_token": fields.take("num_experts_per_tok"),
        "sparsemixer_jitter": fields.take("router_jitter_noise"),
        "eps": fields.take("rms_norm_eps"),
        "normalization_type": "LN",
        "window_size": fields.take("sliding_window"),
        **rotary(fields, d_head(fields), parameters=_rope_parameters(fields)),
    }


def _rope_parameters(fields: ConfigFields) -> HFConfig:
    """The rotary parameters under the names that other families use.

    Transformers works out the frequencies without being told how long the prompt is, so that it divides by the short
    factors however long it is. Only the amplitude may change with the length, which is not supported.
    """
    given = dict(fields.take("rope_parameters"))
    kind = given.get("rope_type", "default")
    if kind == "default":
        return given
    if kind != "longrope":
        raise CheckpointError(f"{fields.family} with rope_type={kind!r} is not supported; 'default' and 'longrope' are")
    short, long = given.pop("short_mscale"), given.pop("long_mscale")
    if short != long:
        raise CheckpointError(
            f"{fields.family} with short_mscale={short} and long_mscale={long} is not supported; only equal ones are"
        )
    return {**given, "attention_factor": short, "long_factor": given["short_factor"]}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `PhimoeForCausalLM`, whose files name the experts as Mixtral's do."""
    block, bias = "layers.{layer}", fields.take("attention_bias")
    return (
        *tables.embeddings(cfg, bias=fields.take("lm_head_bias")),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1", bias=True),
        *tables.attention(f"{block}.self_attn", qkv_bias=bias, out_bias=bias),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2", bias=True),
        *tables.router(f"{block}.block_sparse_moe.gate"),
        *tables.experts(f"{block}.block_sparse_moe.experts", names=("w1", "w3", "w2")),
        *tables.norm("norm", "ln_final", bias=True),
    )


# Published checkpoints name the second.
FAMILY = Family("Phi-MoE", ("PhimoeForCausalLM", "PhiMoEForCausalLM"), config, rules)
