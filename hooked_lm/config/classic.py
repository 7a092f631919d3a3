"""Fields of the classic library's configs that this library does not keep, or names otherwise."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["RENAMED", "RETIRED", "ConfigDict", "FieldValue", "checked_fields", "completed"]

# A field's value as a caller gives it, or as JSON holds it: which type it has to be depends on the field's name, and
# `checks` looks at it when the config is made.
FieldValue = Any
ConfigDict = dict[str, FieldValue]

# Fields of the classic library's configs that this one does not keep: name -> the values that change nothing here.
# Those are dropped, any other value raises. `...` stands for every value.
RETIRED: dict[str, tuple[object, ...]] = {
    "load_in_4bit": (False, None),
    "n_devices": (1, None),
    "relative_attention_max_distance": (None,),
    "relative_attention_num_buckets": (None,),
    "decoder_start_token_id": (None,),
    "trust_remote_code": (False, None),
    "layer_norm_folding": (False, None),
    # Version 3.9 added these. The first three only describe a model.
    "quantization_method": (...,),
    "train_seq_length": (...,),
    "uses_rms_norm": (...,),
    # Qwen's first rotary scaling, and its factor on late queries; both begin beyond the length of training.
    "use_dynamic_ntk_rope": (False,),
    "use_logn_attn": (False,),
    "yarn_global_attn_only": (False,),
}
# Classic name -> name here.
RENAMED = {"use_attention_sinks": "attention_sinks"}


def checked_fields(fields: Mapping[str, object], known: Collection[str]) -> dict[str, object]:
    """Return the fields that a config keeps; retired ones are dropped.

    Args:
        fields: name -> value, as given.
        known: the names of a config's fields.

    Raises:
        TypeError: an unknown field; the message names the nearest.
        ValueError: a retired field with a value that is not supported.
    """
    kept = {}
    for given, value in fields.items():
        name = RENAMED.get(given, given)
        if name in known:
            kept[name] = value
        elif name not in RETIRED:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"a config has no field {name!r}{hint}")
        elif ... not in RETIRED[name] and value not in RETIRED[name]:
            raise ValueError(f"{name}={value!r} is not supported; only {RETIRED[name][0]!r} is")
    return kept


def completed(config_dict: ConfigDict) -> ConfigDict:
    """Return a dictionary with what a config saved before version 3 meant and had no field for.

    Args:
        config_dict: as saved, or as written by hand, which is returned as it is.
    """
    saved_whole = "n_params" in config_dict and config_dict.get("num_experts") is not None
    if saved_whole and "norm_topk_prob" not in config_dict:
        # Until then every mixture divided the chosen experts' weights by their sum.
        return {**config_dict, "norm_topk_prob": True}
    return config_dict
