"""The rotary positions of a HuggingFace config."""

from __future__ import annotations

import math
from collections.abc import Mapping

from weight_conversion.errors import CheckpointError
from weight_conversion.fields import Arguments, ConfigFields, FieldValue, HFConfig

__all__ = ["LEGACY_FIELDS", "plain_parameters", "rotary", "yarn_amplitude"]

# Fields from before `rope_parameters`. transformers fills in `rope_parameters` from them.
LEGACY_FIELDS = ("rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings")


def rotary(
    fields: ConfigFields,
    d_head: int,
    *,
    partial: bool = False,
    parameters: Mapping[str, FieldValue] | None = None,
    context: str = "max_position_embeddings",
) -> Arguments:
    """Return the rotary arguments of a `HookedTransformerConfig`, and `n_ctx`.

    Args:
        fields: the fields of a config with `rope_parameters` and the length of the context.
        d_head: width of a head.
        partial: the family uses `partial_rotary_factor`, the part of a head that rotates. For others transformers
            ignores that field and rotates whole heads, so any value but 1 is refused.
        parameters: to be read in place of `rope_parameters`, such as those of one layer type if it has an entry per
            layer type.
        context: the field with the length of the context.

    Raises:
        CheckpointError: the kind of scaling is not supported, or one of its parameters is not.
    """
    fields.ignore(*LEGACY_FIELDS)
    given = dict(fields.take("rope_parameters") if parameters is None else parameters)
    n_ctx = fields.take(context)
    kind = given.pop("rope_type", "default")
    given.pop("type", None)
    part = given.pop("partial_rotary_factor", 1.0)
    if part != 1.0 and not partial:
        raise CheckpointError(f"{fields.family} rotates whole heads; partial_rotary_factor={part} is not supported")
    arguments = {
        "positional_embedding_type": "rotary",
        "rotary_dim": int(d_head * part),
        "rotary_base": float(given.pop("rope_theta")),
        "n_ctx": n_ctx,
    }
    if kind not in _SCALINGS:
        raise CheckpointError(f"{fields.family} with rope_type={kind!r} is not supported; {sorted(_SCALINGS)} are")
    arguments |= _SCALINGS[kind](given, n_ctx)
    unread = {name: value for name, value in given.items() if value is not None}
    fields.part(unread, f"rotary parameters ({kind})").finish()
    return arguments


def plain_parameters(fields: ConfigFields) -> HFConfig:
    """Return the parameters for `rotary` of a config that transformers has not read: it has none in `rope_parameters`.

    Args:
        fields: of the config: `rope_theta`, and `rope_scaling`, in which the kind may have its old name "type".
    """
    scaling = dict(fields.get("rope_scaling", None) or {})
    old_name = scaling.pop("type", "default")
    return {"rope_type": old_name, "rope_theta": fields.get("rope_theta", 10000.0), **scaling}


def _default(given: HFConfig, n_ctx: int) -> Arguments:
    # Parameters of scalings, left in the file: without a scaling they have no effect.
    for name in ("original_max_position_embeddings", "factor"):
        given.pop(name, None)
    return {}


def _linear(given: HFConfig, n_ctx: int) -> Arguments:
    given.pop("original_max_position_embeddings", None)
    return {"rotary_scaling_factor": float(given.pop("factor"))}


def _dynamic(given: HFConfig, n_ctx: int) -> Arguments:
    """NTK scaling starts where the model's trained context ends, so its context is `factor` times that."""
    given.pop("original_max_position_embeddings", None)
    factor = float(given.pop("factor"))
    return {
        "use_dynamic_rope": True,
        "dynamic_rope_factor": factor,
        "dynamic_rope_original_ctx_len": n_ctx,
        "n_ctx": math.ceil(n_ctx * factor),
    }


def _llama3(given: HFConfig, n_ctx: int) -> Arguments:
    return {
        "use_NTK_by_parts_rope": True,
        "NTK_by_parts_factor": float(given.pop("factor")),
        "NTK_by_parts_low_freq_factor": float(given.pop("low_freq_factor")),
        "NTK_by_parts_high_freq_factor": float(given.pop("high_freq_factor")),
        "NTK_original_ctx_len": given.pop("original_max_position_embeddings"),
    }


def _yarn(given: HFConfig, n_ctx: int) -> Arguments:
    original = given.pop("original_max_position_embeddings")
    factor = given.pop("factor", None) or n_ctx / original
    attention_factor = given.pop("attention_factor", None)
    mscale, mscale_all = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    if attention_factor is None and mscale and mscale_all:
        attention_factor = yarn_amplitude(factor, mscale) / yarn_amplitude(factor, mscale_all)
    return {
        "use_yarn_rope": True,
        "yarn_factor": float(factor),
        "yarn_attention_factor": yarn_amplitude(factor, 1.0) if attention_factor is None else float(attention_factor),
        "yarn_beta_fast": float(given.pop("beta_fast", None) or 32),
        "yarn_beta_slow": float(given.pop("beta_slow", None) or 1),
        "yarn_original_max_position_embeddings": original,
        "yarn_truncate": bool(given.pop("truncate", True)),
    }


def yarn_amplitude(factor: float, mscale: float) -> float:
    """Return the factor on queries and keys under YaRN (Peng et al. 2023, equation 22).

    Args:
        factor: by which the context grows.
        mscale: a factor on its logarithm.
    """
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(given: HFConfig, n_ctx: int) -> Arguments:
    original = given.pop("original_max_position_embeddings")
    factor = given.pop("factor", None) or n_ctx / original
    amplitude = given.pop("attention_factor", None)
    if amplitude is None:
        amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "use_longrope": True,
        "longrope_short_factors": [float(divisor) for divisor in given.pop("short_factor")],
        "longrope_long_factors": [float(divisor) for divisor in given.pop("long_factor")],
        "longrope_attention_factor": float(amplitude),
        "longrope_original_ctx_len": original,
    }


_SCALINGS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
