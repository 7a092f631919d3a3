"""PEFT adapters: a folder with one, or a model in memory that has some, merged into plain weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from weight_conversion.errors import CheckpointError
from weight_conversion.fields import FieldValue
from weight_conversion.in_transformers import HFModel, require_packages
from weight_conversion.source import first_line, has_weights, read_json

__all__ = ["AdapterFolder", "find_adapter", "merged"]

_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class AdapterFolder:
    """A folder with a PEFT adapter.

    Attributes:
        folder: the folder.
        base: the name or path of the model that the adapter is for.
        load_base: returns that model, given a dtype and further arguments of `from_pretrained`.
        base_folder: returns where that model is.
    """

    folder: Path
    base: str
    load_base: Callable[..., HFModel]
    base_folder: Callable[[], Path]

    @property
    def tokenizer_places(self) -> tuple[Path, ...]:
        """Where its tokenizer may be: beside the adapter, which may have added tokens, else beside the base model."""
        return (self.folder, self.base_folder())

    def load(self, dtype: torch.dtype | str | None, **options: object) -> HFModel:
        """Return the base model with the adapter merged into its weights.

        Args:
            dtype: of the weights; by default the base model's.
            **options: further arguments of `from_pretrained`, for the base model.

        Raises:
            CheckpointError: `peft` is missing, the base model is not found, or the adapter cannot be merged.
        """
        _require_peft(self.folder)
        return with_adapter(self.load_base(dtype, **options), self.folder)


def find_adapter(
    folder: Path, load_base: Callable[[str], Callable[..., HFModel]], base_folder: Callable[[str], Path]
) -> AdapterFolder | None:
    """Return the adapter that a folder holds; None if it holds none.

    Args:
        folder: the folder.
        load_base: returns a loader of the model that a name or path stands for.
        base_folder: returns the folder that a name or path stands for.

    Raises:
        CheckpointError: the folder holds the weights of a whole model too, or the adapter names no base model.
    """
    if not (folder / _CONFIG).is_file():
        return None
    if has_weights(folder):
        raise CheckpointError(
            f"{folder} holds the weights of a whole model and a PEFT adapter ({_CONFIG}): it could mean the model with "
            "or without it. Move the adapter to a folder of its own, and give the path of the one you mean"
        )
    base: FieldValue = read_json(folder / _CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{folder / _CONFIG} names no base model (base_model_name_or_path): pass the base model as hf_model="
        )
    return AdapterFolder(folder, base, load_base(base), lambda: base_folder(base))


def with_adapter(base: HFModel, folder: Path) -> HFModel:
    """Return a model with the adapter of a folder merged into its weights, which are changed in place.

    Raises:
        CheckpointError: `peft` is missing, or the adapter does not fit the model or cannot be merged.
    """
    _require_peft(folder)
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(base, folder, is_trainable=False)
    except Exception as error:  # peft raises errors of many types
        raise CheckpointError(
            f"peft does not load the adapter in {folder}: {type(error).__name__}: {first_line(error)}"
        ) from error
    return _merge_in_place(adapted, str(folder))


def _require_peft(folder: Path) -> None:
    require_packages(f"{folder} holds a PEFT adapter", ("peft",), "hooked-lm[peft]")


def merged(hf_model: HFModel) -> HFModel:
    """Return a model in memory with its adapters merged into a copy of its weights; one without adapters as it is.

    Raises:
        CheckpointError: the adapters cannot be merged, or are switched off.
    """
    if getattr(hf_model, "_hf_peft_config_loaded", False):
        raise CheckpointError(
            "hf_model has PEFT adapters that transformers loaded into it: pass the PeftModel of peft instead "
            "(peft.PeftModel.from_pretrained(base, adapter)), which is merged here"
        )
    layers = _adapted_layers(hf_model)
    if layers and not hasattr(hf_model, "get_base_model"):
        raise CheckpointError(
            "hf_model is the model inside a PeftModel, its adapters still in it: pass the PeftModel, which is merged "
            "here, or what its merge_and_unload() (with the adapters) or unload() (without) returns"
        )
    if any(getattr(layer, "disable_adapters", False) for layer in layers):
        raise CheckpointError(
            "the adapters of hf_model are disabled: enable them, or pass hf_model.unload() to go without them"
        )
    if not hasattr(hf_model, "get_base_model"):
        return hf_model
    return _merge_in_place(copy.deepcopy(hf_model), "hf_model")


def _adapted_layers(model: HFModel) -> list[nn.Module]:
    """The layers that peft has put in place of a model's own."""
    return [module for module in model.modules() if hasattr(module, "base_layer")]


def _untie_adapted(adapted: HFModel) -> None:
    """Give the unembedding weights of its own, where it shares them with the embedding and one of the two is adapted.

    Merged into weights that both use, what is learnt for one would change the other too.
    """
    model = adapted.get_base_model()
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if not any(isinstance(getattr(end, "base_layer", None), nn.Module) for end in ends):
        return
    embedding, unembedding = (getattr(end, "base_layer", end) for end in ends)
    weight: object = getattr(unembedding, "weight", None)
    shared = weight is getattr(embedding, "weight", None)
    if shared and isinstance(weight, Tensor):
        unembedding.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        model.config.tie_word_embeddings = False


def _merge_in_place(adapted: HFModel, what: str) -> HFModel:
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kinds = sorted({str(config.peft_type.value) for config in adapted.peft_config.values()})
        raise CheckpointError(
            f"the adapter of {what} ({', '.join(kinds)}) changes the input and not the weights: it cannot be merged"
        )
    try:
        _untie_adapted(adapted)
        return adapted.merge_and_unload(safe_merge=True).eval()
    except Exception as error:  # peft raises errors of many types
        raise CheckpointError(
            f"the adapter of {what} cannot be merged: {type(error).__name__}: {first_line(error)}"
        ) from error
