"""Reading a checkpoint into `(config, weights, tokenizer)`: HuggingFace's format or our own, from disk or memory."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.errors import CheckpointError as CheckpointError
from weight_conversion.family import Family
from weight_conversion.fields import ConfigFields
from weight_conversion.registry import ALIASES, family_of
from weight_conversion.rules import convert
from weight_conversion.source import find_folder, open_tensors, read_json

OWN_FORMAT = "hooked_lm"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as read: unbuilt, and unprocessed unless `processed` says otherwise.

    Attributes:
        cfg: the architecture.
        weights: our names -> tensors in the checkpoint's own precision, possibly views of a memory-mapped file.
        tokenizer: a transformers tokenizer, or None if the checkpoint has none.
        processed: the steps of `hooked_lm.weights` that the weights have been through.
    """

    cfg: HookedTransformerConfig
    weights: dict[str, Tensor]
    tokenizer: Any
    processed: tuple[str, ...] = ()


def load(
    name_or_path: str | Path,
    *,
    hf_model: Any = None,
    tokenizer: Any = None,
    revision: str | None = None,
    checkpoint_index: int | None = None,
    checkpoint_value: int | None = None,
    first_n_layers: int | None = None,
    n_ctx: int | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Read a checkpoint. Arguments as for `HookedTransformer.from_pretrained`.

    Raises:
        CheckpointError: it cannot be found, read or converted.
    """
    if checkpoint_index is not None or checkpoint_value is not None:
        raise CheckpointError(f"{name_or_path} belongs to a family that publishes no training checkpoints")
    if hf_model is not None:
        loaded = _from_model(str(name_or_path), hf_model, tokenizer, first_n_layers)
    else:
        folder = find_folder(name_or_path, revision)
        content = read_json(folder / "config.json")
        read = _from_own_folder if content.get("format") == OWN_FORMAT else _from_huggingface_folder
        found = tokenizer if tokenizer is not None else _tokenizer_in(folder, trust_remote_code)
        loaded = read(folder, content, found, first_n_layers)
    cfg, weights = _shorten(loaded.cfg, loaded.weights, n_ctx)
    if dtype is not None:
        cfg = cfg.replace(dtype=dtype)
    return Loaded(cfg.replace(model_name=_short_name(name_or_path)), weights, loaded.tokenizer, loaded.processed)


def _from_huggingface_folder(
    folder: Path, content: dict[str, Any], tokenizer: Any, first_n_layers: int | None
) -> Loaded:
    # transformers knows the defaults of fields that a config.json leaves out; importing it takes seconds.
    from transformers import AutoConfig

    if "model_type" not in content:
        raise CheckpointError(f"{folder / 'config.json'} has no model_type, so no defaults for its fields are known")
    try:
        hf_config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers' validation raises whatever it likes
        raise CheckpointError(f"{folder / 'config.json'} is not accepted by transformers: {error}") from error
    return _convert({**hf_config.to_dict(), **content}, open_tensors(folder), tokenizer, first_n_layers)


def _from_model(name: str, hf_model: Any, tokenizer: Any, first_n_layers: int | None) -> Loaded:
    if tokenizer is None:
        try:
            tokenizer = load_tokenizer(name)
        except CheckpointError as error:
            warnings.warn(f"the model will read tokens only: no tokenizer was given, and {error}", stacklevel=4)
    fields = hf_model.config.to_dict()
    fields["architectures"] = [type(hf_model).__name__]
    with torch.no_grad():
        return _convert(fields, hf_model.state_dict(), tokenizer, first_n_layers)


def _convert(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: Any, first_n_layers: int | None
) -> Loaded:
    architectures = fields.get("architectures") or []
    if len(architectures) != 1:
        raise CheckpointError(f"the config names {len(architectures)} architectures {architectures}, not one")
    family = family_of(architectures[0])
    reader = ConfigFields(fields, family.name)
    arguments = family.config(reader)
    reader.finish()
    try:
        cfg = HookedTransformerConfig(**arguments, original_architecture=architectures[0], dtype=torch.float32)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the {family.name} config cannot be used: {error}") from error
    _check_layers(first_n_layers, cfg.n_layers)
    tied = bool(fields.get("tie_word_embeddings", True)) and _same_embeddings(family, tensors)
    weights = convert(family.rules(tied), tensors, cfg, family.prefix, first_n_layers)
    if first_n_layers is not None:
        cfg = cfg.replace(n_layers=first_n_layers)
    cfg = cfg.replace(dtype=next(iter(weights.values())).dtype)
    return Loaded(cfg, weights, tokenizer)


def _same_embeddings(family: Family, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint that should be tied has no unembedding of its own, as transformers decides it too."""
    own = next((name for name in (family.prefix + family.unembedding, family.unembedding) if name in tensors), None)
    shared = next((name for name in (family.prefix + family.embedding, family.embedding) if name in tensors), None)
    return own is None or shared is None or torch.equal(tensors[own], tensors[shared])


def _from_own_folder(folder: Path, content: dict[str, Any], tokenizer: Any, first_n_layers: int | None) -> Loaded:
    try:
        cfg = HookedTransformerConfig.from_dict(content["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} does not hold a whole config: {error}") from error
    # Which names there are is for the caller to know.
    processed = content.get("processed", [])
    if not isinstance(processed, list):
        raise CheckpointError(f"{folder / 'config.json'}: processed={processed!r} is no list of processing steps")
    weights = dict(open_tensors(folder))
    _check_layers(first_n_layers, cfg.n_layers)
    if first_n_layers is not None:
        weights = {name: value for name, value in weights.items() if _layer(name) < first_n_layers}
        cfg = cfg.replace(n_layers=first_n_layers)
    return Loaded(cfg, weights, tokenizer, tuple(processed))


def _layer(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blocks.") else -1


def _check_layers(first_n_layers: int | None, n_layers: int) -> None:
    if first_n_layers is not None and not 0 <= first_n_layers <= n_layers:
        raise CheckpointError(f"first_n_layers={first_n_layers} is not in 0-{n_layers}, the layers of this checkpoint")


def _shorten(
    cfg: HookedTransformerConfig, weights: dict[str, Tensor], n_ctx: int | None
) -> tuple[HookedTransformerConfig, dict[str, Tensor]]:
    if n_ctx is None:
        return cfg, weights
    positions = weights.get("pos_embed.W_pos")
    if positions is not None:
        if n_ctx > cfg.n_ctx:
            raise CheckpointError(f"n_ctx={n_ctx} is more than the {cfg.n_ctx} positions this model has learned")
        weights = {**weights, "pos_embed.W_pos": positions[:n_ctx]}
    return cfg.replace(n_ctx=n_ctx), weights


def _short_name(name_or_path: str | Path) -> str:
    return str(name_or_path).rstrip("/").rsplit("/", maxsplit=1)[-1]


def _tokenizer_in(folder: Path, trust_remote_code: bool) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return load_tokenizer(str(folder), trust_remote_code)


def load_tokenizer(name_or_path: str, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a folder, an alias or a hub id.

    Raises:
        CheckpointError: there is none to be had.
    """
    # Only reading text needs transformers, whose import takes seconds.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            name_or_path if Path(name_or_path).is_dir() else ALIASES.get(name_or_path, name_or_path),
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # transformers raises many kinds for one cause
        raise CheckpointError(
            f"no tokenizer {name_or_path!r}: {type(error).__name__}: {str(error).splitlines()[0]}. "
            "Pass tokenizer=, or the path of a folder that has one"
        ) from error
