"""Reading a checkpoint into `(config, weights, tokenizer)`: HuggingFace's format or our own, from disk or memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.adapters import merged, with_adapter
from weight_conversion.classic_format import is_classic_format, read_classic_folder
from weight_conversion.conversion import MOST_MISSING, Conversion
from weight_conversion.errors import CheckpointError
from weight_conversion.family import Family
from weight_conversion.fields import ConfigFields, FieldValue, HFConfig
from weight_conversion.foreign import find_foreign
from weight_conversion.hub import Hub
from weight_conversion.in_transformers import HFModel, Tokenizer, without_quantization
from weight_conversion.loaded import Loaded, Shortened, Weights
from weight_conversion.multimodal import is_multimodal, text_part
from weight_conversion.own_format import (
    OWN_FORMAT,
    OwnWeights,
    check_saved_together,
    processed_steps,
    read_own_config,
)
from weight_conversion.reference import Reference
from weight_conversion.registry import family_of
from weight_conversion.rules import RuleTable
from weight_conversion.source import TensorsInMemory, TensorSource, find_folder, open_tensors, read_json
from weight_conversion.tokenizers import (
    adds_bos,
    auto_map,
    has_tokenizer,
    is_trusted,
    load_tokenizer,
    tokenizer_in,
    with_bos_of_config,
)
from weight_conversion.training_checkpoints import training_checkpoint

__all__ = [
    "IGNORED",
    "CheckpointError",
    "HFModel",
    "Loaded",
    "Tokenizer",
    "Weights",
    "architecture_of",
    "load",
    "load_tokenizer",
    "read_family",
]

# What the families call their number of layers. Each layer has at least one tensor.
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HUB = Hub()
# In `origin`, beside the config's own fields: the names of those that the user asked to ignore.
IGNORED = "ignore_config_fields"
# Model types that transformers reads into the class of another family, from files whose tensors have other names.
_NAMED_BY_TYPE = {"exaone": "ExaoneForCausalLM", "sarvam_moe": "SarvamMoEForCausalLM"}


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
    ignore_config_fields: Collection[str] = (),
    hub: Hub = _HUB,
) -> Loaded:
    """Read a checkpoint.

    Args:
        name_or_path: an alias, a hub id, a folder or a GGUF file; not needed with `hf_model`.
        hf_model, tokenizer, revision, checkpoint_index, checkpoint_value: as for `HookedTransformer.from_pretrained`.
        first_n_layers, n_ctx, dtype, trust_remote_code, ignore_config_fields: as there.
        hub: how files are fetched.

    Raises:
        CheckpointError: it cannot be found, read or converted, or needs code that comes with it and may not run.
        TypeError: neither a name nor a model is given, `trust_remote_code` is no bool, or `ignore_config_fields` no
            collection of names.
    """
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
    trusted, ignored = is_trusted(trust_remote_code), _names(ignore_config_fields)
    how = _Choices(tokenizer, first_n_layers, dtype, trusted, ignored, hub)
    if hf_model is not None:
        loaded = _from_given_model(name_or_path, hf_model, how)
    else:
        loaded = _from_place(find_folder(name_or_path or "", revision, hub), how)
    name_or_path = name_or_path or _name_of(hf_model)
    cfg, weights = loaded.cfg, loaded.weights
    if n_ctx is not None:
        weights = Shortened(weights, cfg.n_ctx, n_ctx)
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
class _Choices:
    """What the caller of `load` chose that reading a config or a tokenizer depends on.

    Attributes:
        tokenizer: to use instead of the checkpoint's; False for none.
        first_n_layers: how many blocks to keep; None for all.
        dtype: of the weights; None for the checkpoint's.
        trust_remote_code: whether code that comes with a checkpoint may run.
        ignored: config fields to ignore.
        hub: how files are fetched.
    """

    tokenizer: Tokenizer
    first_n_layers: int | None
    dtype: torch.dtype | str | None
    trust_remote_code: bool
    ignored: tuple[str, ...]
    hub: Hub

    @property
    def given_tokenizer(self) -> Tokenizer:
        """The tokenizer that was passed; None if none was, or if there is to be none."""
        return None if self.tokenizer is False else self.tokenizer


def _from_place(place: Path, how: _Choices) -> Loaded:
    """Read a folder or a GGUF file."""
    foreign = find_foreign(place, how.hub)
    if foreign is not None:
        model = foreign.load(how.dtype)
        return _with_bos(
            _with_tokenizer(_from_model(model, how), foreign.tokenizer_places, how), model.config.to_dict()
        )
    content = read_json(place / "config.json")
    own = content.get("format") == OWN_FORMAT
    if own and how.ignored:
        raise CheckpointError(
            f"ignore_config_fields={list(how.ignored)} is about HuggingFace configs; {place} is in hooked_lm's own "
            "format, whose fields all count"
        )
    if not own and is_classic_format(content):
        return _from_classic_folder(place, content, how)
    read = _from_own_folder if own else _from_huggingface_folder
    loaded = _with_tokenizer(read(place, content, how), (place,), how)
    return loaded if own else _with_bos(loaded, content)


def _with_tokenizer(loaded: Loaded, places: Sequence[Path], how: _Choices) -> Loaded:
    """Add the tokenizer of the first place that has one, unless another was given, or none is wanted."""
    if how.tokenizer is False:
        return replace(loaded, cfg=loaded.cfg.replace(tokenizer_name=None), tokenizer=None)
    if how.tokenizer is not None:
        return loaded
    # After the config has been checked: transformers reads it too, to find the tokenizer's class.
    holds = next((place for place in places if has_tokenizer(place)), None)
    return loaded if holds is None else replace(loaded, tokenizer=tokenizer_in(holds, how.trust_remote_code))


def _from_given_model(name: str | Path | None, hf_model: HFModel, how: _Choices) -> Loaded:
    """Take the weights of a model in memory; a name beside it is that of its tokenizer, or of an adapter for it."""
    place = None if name is None else Path(name).expanduser()
    if place is not None and (place / "adapter_config.json").is_file():
        hf_model = with_adapter(copy.deepcopy(hf_model), place)
    hf_model = merged(hf_model)
    loaded = _from_model(hf_model, how)
    if how.tokenizer is None:
        try:
            # Without a name the network is never asked: only this machine is searched.
            found = _local_tokenizer(hf_model, how.hub) if name is None else name
            loaded = replace(loaded, tokenizer=load_tokenizer(found, how.trust_remote_code, how.hub))
        except CheckpointError as error:
            warnings.warn(f"the model will read tokens only: no tokenizer was given, and {error}", stacklevel=4)
    return _with_bos(loaded, hf_model.config.to_dict())


def _local_tokenizer(hf_model: HFModel, hub: Hub) -> Path:
    """Return the folder on this machine that a model in memory was loaded from."""
    origin = getattr(hf_model.config, "_name_or_path", "")
    if not origin:
        raise CheckpointError("hf_model does not say which checkpoint it is of. Pass tokenizer=")
    return find_folder(origin, hub=replace(hub, local_files_only=True))


def _name_of(hf_model: HFModel) -> str:
    """The name or path that a model in memory was loaded from, or what it is."""
    return str(getattr(hf_model.config, "_name_or_path", "") or type(hf_model).__name__)


def _from_huggingface_folder(folder: Path, content: HFConfig, how: _Choices) -> Loaded:
    # transformers knows the defaults of fields that a config.json leaves out; importing it takes seconds.
    from transformers import CONFIG_MAPPING, AutoConfig

    named = content.get("architectures") and not is_multimodal(content)
    family = family_of(architecture_of(content)) if named else None
    if "model_type" not in content:
        raise CheckpointError(f"{folder / 'config.json'} has no model_type, so no defaults for its fields are known")
    if not isinstance(content["model_type"], str):
        raise CheckpointError(
            f"{folder / 'config.json'} has model_type {content['model_type']!r}: it is a name, such as 'gpt2'"
        )
    if family is not None and family.defaults is not None:
        tensors = open_tensors(folder)
        _check_counts(folder / "config.json", content, len(tensors))
        return _convert(content, tensors, None, how)
    # Code that comes with a checkpoint never reads a config that transformers can read.
    foreign = content["model_type"] not in CONFIG_MAPPING and "AutoConfig" in auto_map(content)
    if foreign and not how.trust_remote_code:
        raise CheckpointError(
            f"{folder / 'config.json'} has model_type {content['model_type']!r}, which transformers does not know, and "
            "names code of its own to read it (auto_map). Code that comes with a checkpoint runs only if you ask for "
            "it: look at it, then pass trust_remote_code=True to from_pretrained"
        )
    if not foreign and content["model_type"] not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{folder / 'config.json'} is not accepted by transformers {version('transformers')}: it does not know the "
            f"model_type {content['model_type']!r}, so that there are no defaults for the fields"
        )
    tensors = open_tensors(folder)
    for part in (content, content.get("text_config")):
        if isinstance(part, Mapping):
            _check_counts(folder / "config.json", part, len(tensors))
    try:
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=foreign)
    except Exception as error:  # transformers' validation raises errors of many types
        raise CheckpointError(f"{folder / 'config.json'} is not accepted by transformers: {error}") from error
    fields = {**content, **hf_config.to_dict()}
    reference = None if foreign else Reference(type(hf_config))
    return _convert(fields, tensors, reference, how)


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


def _from_model(hf_model: HFModel, how: _Choices) -> Loaded:
    """Take the weights of a model in memory, without a tokenizer unless one was given."""
    reference = Reference(type(hf_model.config), type(hf_model))
    with torch.no_grad():
        fields = without_quantization(hf_model.config.to_dict(), hf_model.state_dict())
        fields["architectures"] = [type(hf_model).__name__]
        return _convert(fields, TensorsInMemory(_as_on_disk(hf_model)), reference, how)


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
    fields: Mapping[str, FieldValue], tensors: TensorSource, reference: Reference | None, how: _Choices
) -> Loaded:
    if is_multimodal(fields):
        fields, tensors = text_part(fields, tensors)
        reference = Reference.of_model_type(fields.get("model_type"))
    architecture = architecture_of(fields)
    fields = {**fields, "architectures": [architecture]}
    absent = [name for name in how.ignored if name not in fields]
    if absent:
        raise CheckpointError(f"ignore_config_fields names {absent}, which this config lacks; it has {sorted(fields)}")
    if how.ignored:
        fields[IGNORED] = list(how.ignored)
    family = family_of(architecture)
    named = {family.renamed.get(name, name): value for name, value in fields.items()}
    fields = {**(family.defaults or {}), **named}
    cfg, table, idle = _read(family, fields, architecture, reference)
    tied = fields.get("tie_word_embeddings", cfg.tie_word_embeddings)
    if tied and not _same_embeddings(family, tensors):
        fields = {**fields, "tie_word_embeddings": False}
        cfg, table, idle = _read(family, fields, architecture, reference)
    _check_layers(how.first_n_layers, cfg.n_layers)
    cfg = cfg.replace(dtype=_dtype(family, tensors))
    weights = Conversion(table, tensors, cfg, family.prefix, how.first_n_layers)
    if idle:
        warnings.warn(
            f"the {family.name} config has fields that transformers neither defines nor reads for this model type, so "
            f"that they change nothing there and nothing here: {idle}",
            stacklevel=5,
        )
    if how.first_n_layers is not None:
        cfg = cfg.replace(n_layers=how.first_n_layers)
    return Loaded(cfg, weights, how.given_tokenizer, origin=fields)


def architecture_of(fields: Mapping[str, FieldValue]) -> str:
    """Return the class name that a config gives; without one, that of transformers' causal model for its type.

    Args:
        fields: of the config.

    Raises:
        CheckpointError: it gives several, or none that is known.
    """
    architectures = fields.get("architectures") or []
    if not isinstance(architectures, (list, tuple)):
        raise CheckpointError(f"architectures in the config is a list of one name; got {architectures!r}")
    if not architectures:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        model_type = str(fields.get("model_type"))
        if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise CheckpointError(
                f"the config names no architectures, and transformers has no causal language model of the model_type "
                f"{model_type!r} to take in their place: add architectures, a list of one class name, to config.json"
            )
        return _NAMED_BY_TYPE.get(model_type, str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]))
    if len(architectures) != 1:
        raise CheckpointError(f"the config names {len(architectures)} architectures {architectures}, not one")
    return _NAMED_BY_TYPE.get(str(fields.get("model_type")), str(architectures[0]))


def read_family(
    family: Family, fields: Mapping[str, FieldValue], architecture: str
) -> tuple[HookedTransformerConfig, RuleTable]:
    """Return the architecture that a HuggingFace config describes, and the rules for its tensors.

    Args:
        family: how the config is read.
        fields: the config, as in `config.json`; those that it lists under `ignore_config_fields` are left out.
        architecture: the class name that the config gives.

    Raises:
        CheckpointError: the config has a field that has an effect and that the family does not know, or a value that
            it does not support.
    """
    cfg, table, _ = _read(family, fields, architecture, Reference.of_model_type(fields.get("model_type")))
    return cfg, table


def _read(
    family: Family, fields: Mapping[str, FieldValue], architecture: str, reference: Reference | None
) -> tuple[HookedTransformerConfig, RuleTable, dict[str, FieldValue]]:
    """As `read_family`, and the fields that have no effect in the reference."""
    ignored = (*fields.get(IGNORED, ()), IGNORED)
    reader = ConfigFields(fields, family.name, reference, ignored)
    try:
        cfg = HookedTransformerConfig(**family.config(reader), original_architecture=architecture)
        table = family.rules(cfg, reader)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        if isinstance(error, CheckpointError):
            raise
        # Configs that transformers has not checked may lack an entry of a dictionary, or hold something else there.
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"the {family.name} config cannot be used: {reason}") from error
    reader.finish()
    return cfg, table, reader.without_effect


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


def _from_own_folder(folder: Path, content: HFConfig, how: _Choices) -> Loaded:
    path, tensors = folder / "config.json", open_tensors(folder)
    cfg = read_own_config(path, content, tensors)
    processed = processed_steps(path, content)
    _check_layers(how.first_n_layers, cfg.n_layers)
    kept = cfg.n_layers if how.first_n_layers is None else how.first_n_layers
    weights = OwnWeights(tensors, cfg.n_layers, kept, partial(check_saved_together, path, content, tensors))
    return Loaded(cfg.replace(n_layers=kept), weights, how.given_tokenizer, processed, content.get("origin"))


def _from_classic_folder(folder: Path, content: HFConfig, how: _Choices) -> Loaded:
    cfg, tensors = read_classic_folder(folder, content)
    _check_layers(how.first_n_layers, cfg.n_layers)
    kept = cfg.n_layers if how.first_n_layers is None else how.first_n_layers
    weights = OwnWeights(TensorsInMemory(tensors), cfg.n_layers, kept)
    # Such folders rarely hold a tokenizer: their config names one.
    name = folder if has_tokenizer(folder) else content.get("tokenizer_name")
    tokenizer = how.given_tokenizer
    if how.tokenizer is None and name is not None:
        try:
            tokenizer = load_tokenizer(name, how.trust_remote_code, how.hub)
        except CheckpointError as error:
            warnings.warn(f"the model will read tokens only: {error}", stacklevel=4)
    return Loaded(cfg.replace(n_layers=kept), weights, tokenizer)


def _check_layers(first_n_layers: int | None, n_layers: int) -> None:
    if first_n_layers is not None and not 0 <= first_n_layers <= n_layers:
        raise CheckpointError(f"first_n_layers={first_n_layers} is not in 0-{n_layers}, the layers of this checkpoint")


def _short_name(name_or_path: str | Path) -> str:
    return str(name_or_path).rstrip("/").rsplit("/", maxsplit=1)[-1]


def _names(ignore_config_fields: object) -> tuple[str, ...]:
    given = () if ignore_config_fields is None else ignore_config_fields
    if isinstance(given, str) or not isinstance(given, Collection) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"ignore_config_fields is a list of names of config fields, got {ignore_config_fields!r}")
    return tuple(given)


def _with_bos(loaded: Loaded, content: HFConfig) -> Loaded:
    """Set whether prompts start with BOS as the family says, or else as the checkpoint's tokenizer does it.

    The content is that of the file itself: a default of transformers says nothing about this checkpoint's tokens.
    """
    assert loaded.origin is not None
    tokenizer = with_bos_of_config(loaded.tokenizer, content)
    prepend = family_of(loaded.origin["architectures"][0]).prepend_bos
    if prepend is None:
        # Without a BOS token the model turns it off, with a warning.
        prepend = getattr(tokenizer, "bos_token_id", None) is None or adds_bos(tokenizer)
    return replace(loaded, cfg=loaded.cfg.replace(default_prepend_bos=prepend), tokenizer=tokenizer)
