"""Reading a checkpoint into `(config, weights, tokenizer)`: HuggingFace's format or our own, from disk or memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.adapters import merged, with_adapter
from weight_conversion.aliases import hub_id
from weight_conversion.classic_format import is_classic_format, read_classic_folder
from weight_conversion.conversion import MOST_MISSING, Conversion
from weight_conversion.errors import CheckpointError
from weight_conversion.family import Family
from weight_conversion.fields import ConfigFields, FieldValue, HFConfig
from weight_conversion.foreign import find_foreign
from weight_conversion.hub import Hub
from weight_conversion.in_transformers import HFModel, Tokenizer, without_quantization
from weight_conversion.multimodal import is_multimodal, text_part
from weight_conversion.own_format import (
    OWN_FORMAT,
    OwnWeights,
    check_saved_together,
    processed_steps,
    read_own_config,
)
from weight_conversion.registry import family_of
from weight_conversion.rules import RuleTable
from weight_conversion.source import TensorsInMemory, TensorSource, find_folder, first_line, open_tensors, read_json
from weight_conversion.training_checkpoints import training_checkpoint

__all__ = [
    "CheckpointError",
    "HFModel",
    "Loaded",
    "Tokenizer",
    "Weights",
    "load",
    "load_tokenizer",
    "read_family",
]

# What the families call their number of layers. Each layer has at least one tensor.
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_POSITIONS = "pos_embed.W_pos"
_HUB = Hub()
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model", "spiece.model")


class Weights(Protocol):
    """Our weights, not read yet: iterating reads them chunk by chunk, first the weights outside the blocks.

    Attributes:
        shapes: every name and its shape.
    """

    shapes: dict[str, tuple[int, ...]]

    @property
    def mapped(self) -> bool:
        """Whether the tensors that are read are private views of a file, so that a model can keep them uncopied."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]: ...

    def release(self) -> None:
        """Free the memory of the tensors that have been read, except those still referenced elsewhere."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that has been opened and checked: unbuilt, and unprocessed unless `processed` says otherwise.

    Attributes:
        cfg: the architecture.
        weights: our names -> tensors in the checkpoint's own precision, possibly views of a memory-mapped file.
        tokenizer: a transformers tokenizer, or None if the checkpoint has none.
        processed: the steps of `hooked_lm.weights` that the weights have been through.
        origin: the HuggingFace config that the architecture was read from, which an export needs; None if there was
            none.
    """

    cfg: HookedTransformerConfig
    weights: Weights
    tokenizer: Tokenizer
    processed: tuple[str, ...] = ()
    origin: HFConfig | None = None


def load(
    name_or_path: str | Path | None = None,
    *,
    hf_model: HFModel = None,
    tokenizer: Tokenizer = None,
    revision: str | None = None,
    checkpoint_index: int | None = None,
    checkpoint_value: int | None = None,
    first_n_layers: int | None = None,
    n_ctx: int | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    hub: Hub = _HUB,
) -> Loaded:
    """Read a checkpoint.

    Args:
        name_or_path: an alias, a hub id, a folder or a GGUF file; not needed with `hf_model`.
        hf_model, tokenizer, revision, checkpoint_index, checkpoint_value: as for `HookedTransformer.from_pretrained`.
        first_n_layers, n_ctx, dtype, trust_remote_code: as there.
        hub: how files are fetched.

    Raises:
        CheckpointError: it cannot be found, read or converted, or needs code that comes with it and may not run.
        TypeError: neither a name nor a model is given, or `trust_remote_code` is no bool.
    """
    trust_remote_code = _trusted(trust_remote_code)
    if name_or_path is None and hf_model is None:
        raise TypeError("from_pretrained takes the name or path of a model, or a model of transformers as hf_model=")
    asked = {"revision": revision, "checkpoint_index": checkpoint_index, "checkpoint_value": checkpoint_value}
    if hf_model is not None and any(value is not None for value in asked.values()):
        given = ", ".join(f"{name}={value!r}" for name, value in asked.items() if value is not None)
        raise CheckpointError(f"the weights are those of hf_model, so {given} would have no effect: leave it out")
    step = None
    if checkpoint_index is not None or checkpoint_value is not None:
        step = training_checkpoint(str(name_or_path), checkpoint_index, checkpoint_value, revision)
        revision = step.revision
    options = _Options(tokenizer, first_n_layers, dtype, trust_remote_code, hub)
    if hf_model is not None:
        loaded = _from_given_model(name_or_path, hf_model, options)
    else:
        loaded = _from_place(find_folder(name_or_path or "", revision, hub), options)
    name_or_path = name_or_path or _name_of(hf_model)
    cfg, weights = loaded.cfg, loaded.weights
    if n_ctx is not None:
        weights = _Shortened(weights, cfg.n_ctx, n_ctx)
        cfg = cfg.replace(n_ctx=n_ctx)
    if dtype is not None:
        cfg = cfg.replace(dtype=dtype)
    if step is not None:
        cfg = cfg.replace(
            from_checkpoint=True,
            checkpoint_index=step.index,
            checkpoint_value=step.value,
            checkpoint_label_type="step",
        )
    return replace(loaded, cfg=cfg.replace(model_name=_short_name(name_or_path)), weights=weights)


@dataclass(frozen=True)
class _Options:
    """What a caller asks of every kind of checkpoint."""

    tokenizer: Tokenizer
    first_n_layers: int | None
    dtype: torch.dtype | str | None
    trust_remote_code: bool
    hub: Hub


def _from_place(place: Path, options: _Options) -> Loaded:
    """Read a folder or a GGUF file."""
    foreign = find_foreign(place, options.hub)
    if foreign is not None:
        loaded = _from_model(foreign.load(options.dtype), options)
        places = foreign.tokenizer_places
    else:
        content = read_json(place / "config.json")
        if content.get("format") == OWN_FORMAT:
            loaded = _from_own_folder(place, content, options.tokenizer, options.first_n_layers)
        elif is_classic_format(content):
            return _from_classic_folder(place, content, options)
        else:
            loaded = _from_huggingface_folder(
                place, content, options.tokenizer, options.first_n_layers, options.trust_remote_code
            )
        places = (place,)
    if options.tokenizer is not None:
        return loaded
    # After the config has been checked: transformers reads it too, to find the tokenizer's class.
    holds = next((one for one in places if _has_tokenizer(one)), None)
    return loaded if holds is None else replace(loaded, tokenizer=load_tokenizer(holds, options.trust_remote_code))


def _from_given_model(name: str | Path | None, hf_model: HFModel, options: _Options) -> Loaded:
    """Take the weights of a model in memory; a name beside it is that of its tokenizer, or of an adapter for it."""
    place = None if name is None else Path(name).expanduser()
    if place is not None and (place / "adapter_config.json").is_file():
        hf_model = with_adapter(copy.deepcopy(hf_model), place)
    loaded = _from_model(merged(hf_model), options)
    if options.tokenizer is not None:
        return loaded
    try:
        # Without a name nobody has named a place on the hub, so that none is asked.
        found = _local_tokenizer(hf_model, options.hub) if name is None else name
        return replace(loaded, tokenizer=load_tokenizer(found, options.trust_remote_code, options.hub))
    except CheckpointError as error:
        warnings.warn(f"the model will read tokens only: no tokenizer was given, and {error}", stacklevel=4)
        return loaded


def _local_tokenizer(hf_model: HFModel, hub: Hub) -> Path:
    """Return the folder on this machine that a model in memory was loaded from."""
    origin = getattr(hf_model.config, "_name_or_path", "")
    if not origin:
        raise CheckpointError("hf_model does not say which checkpoint it is of. Pass tokenizer=")
    return find_folder(origin, hub=replace(hub, local_files_only=True))


def _name_of(hf_model: HFModel) -> str:
    """The name or path that a model in memory was loaded from, or what it is."""
    return str(getattr(hf_model.config, "_name_or_path", "") or type(hf_model).__name__)


def _from_huggingface_folder(
    folder: Path, content: HFConfig, tokenizer: Tokenizer, first_n_layers: int | None, trust_remote_code: bool
) -> Loaded:
    # transformers knows the defaults of fields that a config.json leaves out; importing it takes seconds.
    from transformers import CONFIG_MAPPING, AutoConfig

    if not is_multimodal(content):
        family_of(_architecture(content))
    if "model_type" not in content:
        raise CheckpointError(f"{folder / 'config.json'} has no model_type, so no defaults for its fields are known")
    if not isinstance(content["model_type"], str):
        raise CheckpointError(
            f"{folder / 'config.json'} has model_type {content['model_type']!r}: it is a name, such as 'gpt2'"
        )
    tensors = open_tensors(folder)
    for fields in (content, content.get("text_config")):
        if isinstance(fields, Mapping):
            _check_counts(folder / "config.json", fields, len(tensors))
    # Code that comes with a checkpoint never reads a config that transformers can read.
    foreign = content["model_type"] not in CONFIG_MAPPING and "AutoConfig" in _auto_map(content)
    if foreign and not trust_remote_code:
        raise CheckpointError(
            f"{folder / 'config.json'} has model_type {content['model_type']!r}, which transformers does not know, and "
            "names code of its own to read it (auto_map). Code that comes with a checkpoint runs only if you ask for "
            "it: look at it, then pass trust_remote_code=True to from_pretrained"
        )
    try:
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=foreign)
    except Exception as error:  # transformers' validation raises errors of many types
        raise CheckpointError(f"{folder / 'config.json'} is not accepted by transformers: {error}") from error
    return _convert({**content, **hf_config.to_dict()}, tensors, tokenizer, first_n_layers)


def _check_counts(path: Path, content: Mapping[str, FieldValue], n_tensors: int) -> None:
    """Check that there are not far more layers than tensors: transformers' config classes make lists of that length."""
    counts = {name: content[name] for name in _LAYER_COUNTS if name in content}
    pending = [content.get("attention_types")]  # GPT-Neo's [[["global", "local"], 6]]
    while pending:
        one = pending.pop()
        pending += one if isinstance(one, list) else []
        counts |= {"attention_types": one} if isinstance(one, int) and one > n_tensors + MOST_MISSING else {}
    for name, count in counts.items():
        if isinstance(count, int) and count > n_tensors + MOST_MISSING:
            raise CheckpointError(f"{path} says {name}={count}, and the weights beside it are {n_tensors} tensors")


def _from_model(hf_model: HFModel, options: _Options) -> Loaded:
    """Take the weights of a model in memory, without a tokenizer unless one was given."""
    with torch.no_grad():
        fields = without_quantization(hf_model.config.to_dict(), hf_model.state_dict())
        fields["architectures"] = [type(hf_model).__name__]
        return _convert(fields, TensorsInMemory(_as_on_disk(hf_model)), options.tokenizer, options.first_n_layers)


def _as_on_disk(hf_model: HFModel) -> dict[str, Tensor]:
    """A model's tensors as its checkpoint has them, where transformers packs them differently in memory (experts)."""
    from transformers.core_model_loading import revert_weight_conversion

    # A model remembers the conversions it was loaded by. Those of a quantised file would bring back the names of its
    # quantised tensors, so the ones that belong to the architecture are used.
    plain = copy.copy(hf_model)
    plain.__dict__.pop("_weight_conversions", None)
    on_disk: dict[str, Tensor] = revert_weight_conversion(plain, hf_model.state_dict())
    return on_disk


def _convert(
    fields: Mapping[str, FieldValue], tensors: TensorSource, tokenizer: Tokenizer, first_n_layers: int | None
) -> Loaded:
    if is_multimodal(fields):
        fields, tensors = text_part(fields, tensors)
    architecture = _architecture(fields)
    family = family_of(architecture)
    cfg, table = read_family(family, fields, architecture)
    tied = fields.get("tie_word_embeddings", cfg.tie_word_embeddings)
    if tied and not _same_embeddings(family, tensors):
        fields = {**fields, "tie_word_embeddings": False}
        cfg, table = read_family(family, fields, architecture)
    _check_layers(first_n_layers, cfg.n_layers)
    cfg = cfg.replace(dtype=_dtype(family, tensors))
    weights = Conversion(table, tensors, cfg, family.prefix, first_n_layers)
    if first_n_layers is not None:
        cfg = cfg.replace(n_layers=first_n_layers)
    return Loaded(cfg, weights, tokenizer, origin=dict(fields))


def _architecture(fields: Mapping[str, FieldValue]) -> str:
    architectures = fields.get("architectures") or []
    if not isinstance(architectures, (list, tuple)):
        raise CheckpointError(f"architectures in the config is a list of one name; got {architectures!r}")
    if len(architectures) != 1:
        raise CheckpointError(f"the config names {len(architectures)} architectures {architectures}, not one")
    return str(architectures[0])


def read_family(
    family: Family, fields: Mapping[str, FieldValue], architecture: str
) -> tuple[HookedTransformerConfig, RuleTable]:
    """Return the architecture that a HuggingFace config describes, and the rules for its tensors.

    Args:
        family: how the config is read.
        fields: the config, as in `config.json`.
        architecture: the class name that the config gives.

    Raises:
        CheckpointError: the config has a field that the family does not know, or a value that it does not support.
    """
    reader = ConfigFields(fields, family.name)
    try:
        cfg = HookedTransformerConfig(**family.config(reader), original_architecture=architecture)
    except (ValueError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the {family.name} config cannot be used: {error}") from error
    table = family.rules(cfg, reader)
    reader.finish()
    return cfg, table


def _same_embeddings(family: Family, tensors: TensorSource) -> bool:
    """Whether a checkpoint that should be tied has no unembedding of its own, as transformers decides it too."""
    own, shared = _name_in(tensors, family, family.unembedding), _name_in(tensors, family, family.embedding)
    if own is None or shared is None:
        return True
    common = torch.promote_types(tensors.dtype(own), tensors.dtype(shared))
    return torch.equal(tensors[own].to(common), tensors[shared].to(common))


def _name_in(tensors: TensorSource, family: Family, name: str) -> str | None:
    return next((full for full in (family.prefix + name, name) if full in tensors), None)


def _dtype(family: Family, tensors: TensorSource) -> torch.dtype:
    """The precision of the token embedding, which stands for the checkpoint's."""
    name = _name_in(tensors, family, family.embedding)
    return torch.float32 if name is None else tensors.dtype(name)


def _from_own_folder(folder: Path, content: HFConfig, tokenizer: Tokenizer, first_n_layers: int | None) -> Loaded:
    path, tensors = folder / "config.json", open_tensors(folder)
    cfg = read_own_config(path, content, tensors)
    processed = processed_steps(path, content)
    _check_layers(first_n_layers, cfg.n_layers)
    kept = cfg.n_layers if first_n_layers is None else first_n_layers
    weights = OwnWeights(tensors, cfg.n_layers, kept, partial(check_saved_together, path, content, tensors))
    return Loaded(cfg.replace(n_layers=kept), weights, tokenizer, processed, content.get("origin"))


def _from_classic_folder(folder: Path, content: HFConfig, options: _Options) -> Loaded:
    cfg, tensors = read_classic_folder(folder, content)
    _check_layers(options.first_n_layers, cfg.n_layers)
    kept = cfg.n_layers if options.first_n_layers is None else options.first_n_layers
    weights = OwnWeights(TensorsInMemory(tensors), cfg.n_layers, kept)
    # Such folders rarely hold a tokenizer: their config names one.
    name = folder if _has_tokenizer(folder) else content.get("tokenizer_name")
    tokenizer = options.tokenizer
    if tokenizer is None and name is not None:
        try:
            tokenizer = load_tokenizer(name, options.trust_remote_code, options.hub)
        except CheckpointError as error:
            warnings.warn(f"the model will read tokens only: {error}", stacklevel=4)
    return Loaded(cfg.replace(n_layers=kept), weights, tokenizer)


class _Shortened:
    """Weights with fewer learned positions."""

    def __init__(self, weights: Weights, had: int, n_ctx: int) -> None:
        self._weights, self._n_ctx = weights, n_ctx
        self.shapes = dict(weights.shapes)
        if _POSITIONS in self.shapes:
            if n_ctx > had:
                raise CheckpointError(f"n_ctx={n_ctx} is more than the {had} positions this model has learned")
            self.shapes[_POSITIONS] = (n_ctx, *self.shapes[_POSITIONS][1:])

    @property
    def mapped(self) -> bool:
        return self._weights.mapped

    def release(self) -> None:
        self._weights.release()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for chunk in self._weights:
            if _POSITIONS in chunk:
                chunk[_POSITIONS] = chunk[_POSITIONS][: self._n_ctx]
            yield chunk


def _check_layers(first_n_layers: int | None, n_layers: int) -> None:
    if first_n_layers is not None and not 0 <= first_n_layers <= n_layers:
        raise CheckpointError(f"first_n_layers={first_n_layers} is not in 0-{n_layers}, the layers of this checkpoint")


def _short_name(name_or_path: str | Path) -> str:
    return str(name_or_path).rstrip("/").rsplit("/", maxsplit=1)[-1]


def _has_tokenizer(folder: Path) -> bool:
    return _is_gguf(folder) or any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _is_gguf(path: Path) -> bool:
    return path.is_file() and path.suffix == ".gguf"


def load_tokenizer(name_or_path: str | Path, trust_remote_code: bool = False, hub: Hub = _HUB) -> Tokenizer:
    """Return the tokenizer of a folder, a GGUF file, an alias or a hub id.

    Args:
        name_or_path: the folder, file, alias or hub id.
        trust_remote_code: whether code that comes with the tokenizer may run. Nobody is asked in between.
        hub: how it is fetched.

    Raises:
        CheckpointError: the tokenizer cannot be found or read, or it needs code that may not run.
        TypeError: `trust_remote_code` is no bool.
    """
    trust_remote_code = _trusted(trust_remote_code)
    path, name_or_path = Path(name_or_path), str(name_or_path)
    # From a folder without a tokenizer, transformers makes an empty one instead of raising.
    if path.is_dir() and not _has_tokenizer(path):
        raise CheckpointError(f"no tokenizer: the folder {name_or_path} has none of {', '.join(_TOKENIZER_FILES)}")
    # Only reading text needs transformers, whose import takes seconds.
    from transformers import AutoTokenizer

    try:
        # An explicit False: with None, transformers asks on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent if _is_gguf(path) else name_or_path if path.is_dir() else hub_id(name_or_path),
            trust_remote_code=trust_remote_code,
            **({"gguf_file": path.name} if _is_gguf(path) else hub.keywords()),
        )
    except Exception as error:  # transformers raises many kinds for one cause
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise CheckpointError(_OWN_CODE.format(name_or_path)) from error
        raise CheckpointError(
            f"no tokenizer {name_or_path!r}: {type(error).__name__}: {first_line(error)}. "
            "Pass tokenizer=, or the path of a folder that has one"
        ) from error
    # In place of a class of the checkpoint's own, transformers may take a general one, whose tokens can be others.
    own = "AutoTokenizer" in _auto_map(getattr(tokenizer, "init_kwargs", {}))
    if own and not trust_remote_code and type(tokenizer).__name__ in _GENERAL_TOKENIZERS:
        raise CheckpointError(_OWN_CODE.format(name_or_path))
    return tokenizer


_OWN_CODE = (
    "the tokenizer {!r} is code that comes with it (auto_map in its tokenizer_config.json). Such code runs only if you "
    "ask for it: look at it, then pass trust_remote_code=True to from_pretrained, or load the tokenizer yourself and "
    "pass tokenizer="
)
_GENERAL_TOKENIZERS = ("TokenizersBackend", "PythonBackend", "PreTrainedTokenizerFast", "PreTrainedTokenizer")


def _auto_map(content: Mapping[str, object]) -> Mapping[str, object]:
    """The classes of its own that a checkpoint names, by what they stand for; a list is an old form for tokenizers."""
    found = content.get("auto_map") or {}
    return found if isinstance(found, Mapping) else {"AutoTokenizer": found}


def _trusted(trust_remote_code: object) -> bool:
    """Whether code may run: only for True itself; None is False."""
    if trust_remote_code is not None and not isinstance(trust_remote_code, bool):
        raise TypeError(f"trust_remote_code is True or False, got {trust_remote_code!r}")
    return trust_remote_code is True
