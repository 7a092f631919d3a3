"""The architecture of a checkpoint from its config alone, before its weights are there."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from hooked_lm._support.reading import read_json_object
from hooked_lm.config import HookedTransformerConfig
from weight_conversion.checkpoint import architecture_of, read_family
from weight_conversion.errors import CheckpointError
from weight_conversion.own_format import OWN_FORMAT
from weight_conversion.registry import family_of

__all__ = ["read_config", "without_weights"]

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth", "*.safetensors.index.json")


def without_weights(place: str | Path) -> bool:
    """Return whether a folder has a config and no weights.

    Args:
        place: a path, or another name of a model.
    """
    folder = Path(place)
    if not folder.joinpath("config.json").is_file():
        return False
    return not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern))


def read_config(folder: str | Path, ignore_config_fields: Collection[str] = ()) -> HookedTransformerConfig:
    """Return the architecture that a folder's `config.json` describes; no weights are needed or looked at.

    Its precision is that which the config names. Where the config says that the embeddings are tied, they are.

    Args:
        folder: with a `config.json` in HuggingFace's format or our own.
        ignore_config_fields: as for `from_pretrained`.

    Raises:
        CheckpointError: there is no such file, or the family is not supported.
    """
    path = Path(folder) / "config.json"
    content = read_json_object(path, CheckpointError)
    if content.get("format") == OWN_FORMAT:
        fields = content.get("config")
        if not isinstance(fields, dict):
            raise CheckpointError(f"{path} has no config")
        return HookedTransformerConfig.from_dict(fields)
    from transformers import AutoConfig

    try:
        hf_config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers' validation raises errors of many types
        raise CheckpointError(f"{path} is not accepted by transformers: {error}") from error
    fields = {**content, **hf_config.to_dict()}
    fields = {name: value for name, value in fields.items() if name not in ignore_config_fields}
    architecture = architecture_of(fields)
    family = family_of(architecture)
    named = {family.renamed.get(name, name): value for name, value in fields.items()}
    cfg, _ = read_family(family, {**(family.defaults or {}), **named, "architectures": [architecture]}, architecture)
    said = content.get("dtype", content.get("torch_dtype"))
    known = said in ("float16", "bfloat16", "float32", "float64")
    return cfg.replace(model_name=Path(folder).name, **({"dtype": said} if known else {}))
