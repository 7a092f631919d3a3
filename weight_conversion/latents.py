"""Latent attention, with the config fields and tensor names of DeepSeek-V2."""

from __future__ import annotations

import math

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import rotary, yarn_amplitude
from weight_conversion.rules import Constant, Entry, Piece, Rule, Split
from weight_conversion.tables import BLOCK, attention_output, linear

__all__ = ["latent_attention", "latent_config"]


def latent_config(fields: ConfigFields, *, adjacent: bool) -> Arguments:
    """Return the arguments about heads, latents and rotary positions.

    Here the dimensions of a head that rotate come first; in checkpoints they come last.

    Args:
        fields: of the config.
        adjacent: dimensions rotate with their neighbours.

    Raises:
        CheckpointError: `head_dim` is not the number of dimensions that rotate.
    """
    # They are sums of other fields, or the number of query heads.
    fields.ignore("qk_head_dim", "num_key_value_heads")
    rotating = fields.take("qk_rope_head_dim")
    # transformers takes the number of rotary frequencies from it.
    fields.require("head_dim", rotating)
    d_head = fields.take("qk_nope_head_dim") + rotating
    return {
        "n_key_value_heads": None,
        "d_head": d_head,
        "d_latent_kv": fields.take("kv_lora_rank"),
        "d_latent_q": fields.take("q_lora_rank"),
        "d_value": fields.take("v_head_dim"),
        **rotary(fields, rotating),
        "rotary_adjacent_pairs": adjacent,
        "attn_scale": math.sqrt(d_head) / _yarn_factor_on_scores(fields),
    }


def _yarn_factor_on_scores(fields: ConfigFields) -> float:
    """The factor that scaled rotary positions put on all scores, those of dimensions that do not rotate included."""
    given = fields.take("rope_parameters")
    mscale = given.get("mscale_all_dim") or 0
    if given.get("rope_type", "default") == "default" or not mscale:
        return 1.0
    return yarn_amplitude(given["factor"], mscale) ** 2


def latent_attention(
    cfg: HookedTransformerConfig,
    module: str,
    *,
    bias: bool = False,
    out_scale: float = 1.0,
    latent_scales: tuple[float, float] = (1.0, 1.0),
) -> tuple[Entry, ...]:
    """Return the rows of latent attention.

    Args:
        cfg: says whether queries have a latent, and how many dimensions rotate.
        module: the attention module, with `{layer}`.
        bias: the layers that compress have biases, and so has the output.
        out_scale: a factor on the output before it is added to the stream.
        latent_scales: factors on the latent of queries and on that of keys and values, after their norms.
    """
    ours, turn = f"{BLOCK}.attn", cfg.rotary_dim or 0
    down, norm = f"{module}.kv_a_proj_with_mqa", f"{module}.kv_a_layernorm.weight"
    latent, rotating = (f"{ours}.W_DKV", f"{ours}.b_DKV"), (f"{ours}.W_KR", f"{ours}.b_KR")
    weights = (
        Piece(latent[0], "d_latent_kv", "d_latent_kv d_model -> d_model d_latent_kv"),
        Piece(rotating[0], "rotary", "rotary d_model -> d_model rotary"),
    )
    up = (
        Piece(f"{ours}.W_UK", "d_content", "d_content head d_latent_kv -> head d_latent_kv d_content"),
        Piece(f"{ours}.W_UV", "d_value", "d_value head d_latent_kv -> head d_latent_kv d_value"),
    )
    rows: list[Entry] = [
        Split(f"{down}.weight", "part d_model -> part d_model", weights),
        Rule(norm, "d_latent_kv -> d_latent_kv", f"{ours}.latent_kv_norm.w", scale=latent_scales[1]),
        Split(f"{module}.kv_b_proj.weight", "(head part) d_latent_kv -> part head d_latent_kv", up),
    ]
    if bias:
        biases = (Piece(latent[1], "d_latent_kv"), Piece(rotating[1], "rotary"))
        rows.append(Split(f"{down}.bias", "part -> part", biases))
    else:
        rows += [Constant(latent[1], "d_latent_kv"), Constant(rotating[1], "rotary")]
    if cfg.d_latent_q is None:
        queries = "(head d_head) d_model -> head d_model d_head"
        rows.append(Rule(f"{module}.q_proj.weight", queries, f"{ours}.W_Q", turn=turn))
        rows.append(Constant(f"{ours}.b_Q", "head d_head"))
    else:
        queries = "(head d_head) d_latent_q -> head d_latent_q d_head"
        rows += linear(f"{module}.q_a_proj", f"{ours}.W_DQ", f"{ours}.b_DQ", ("d_model", "d_latent_q"), bias=bias)
        norm = f"{module}.q_a_layernorm.weight"
        rows.append(Rule(norm, "d_latent_q -> d_latent_q", f"{ours}.latent_q_norm.w", scale=latent_scales[0]))
        rows.append(Rule(f"{module}.q_b_proj.weight", queries, f"{ours}.W_UQ", turn=turn))
    return (*rows, *attention_output(f"{module}.o_proj", bias=bias, scale=out_scale, width="d_value"))
