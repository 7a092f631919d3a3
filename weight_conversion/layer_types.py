"""The window of each layer, read from a HuggingFace config."""

from __future__ import annotations

from weight_conversion.errors import CheckpointError
from weight_conversion.fields import Arguments, ConfigFields

__all__ = ["layer_types"]

_KINDS = {"sliding_attention": "local", "full_attention": "global"}


def layer_types(fields: ConfigFields) -> Arguments:
    """Return the window arguments of a `HookedTransformerConfig` from `layer_types` and `sliding_window`.

    Raises:
        CheckpointError: a layer is of a kind that is not known.
    """
    given = fields.take("layer_types")
    unknown = sorted(set(given) - set(_KINDS))
    if unknown:
        raise CheckpointError(f"{fields.family} with layers of type {unknown} is not supported; {sorted(_KINDS)} are")
    # In some families a window of 0 means none.
    return {"window_size": fields.take("sliding_window") or None, "attn_types": [_KINDS[kind] for kind in given]}
