"""Loading a model in `transformers`, for checkpoints whose weights it has to compute first."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weight_conversion.errors import CheckpointError
from weight_conversion.fields import FieldValue
from weight_conversion.source import first_line

__all__ = ["HFModel", "Tokenizer", "load_in_transformers", "require_packages", "without_quantization"]

# Any: a `PreTrainedModel` and a tokenizer; naming the types would import transformers, in seconds.
HFModel = Any
Tokenizer = Any

_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def require_packages(what: str, packages: tuple[str, ...], install: str) -> None:
    """Check that packages are installed.

    Args:
        what: the checkpoint that needs them, and what it is.
        packages: their names, as imported.
        install: what to give to `pip install`.

    Raises:
        CheckpointError: one is missing; the message names it and how to install it.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise CheckpointError(f"{what}. Reading it takes {' and '.join(missing)}: pip install '{install}'")


def load_in_transformers(what: str, folder: Path, **options: object) -> HFModel:
    """Return a causal language model of `transformers`, in eval mode. No code of the checkpoint's own runs.

    Args:
        what: the checkpoint, for messages.
        folder: of the checkpoint.
        **options: further arguments of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        CheckpointError: transformers raises.
    """
    from transformers import AutoModelForCausalLM

    try:
        model: HFModel = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:  # transformers and the packages behind it raise errors of many types
        raise CheckpointError(
            f"transformers does not load {what}: {type(error).__name__}: {first_line(error)}"
        ) from error
    return model.eval()


def without_quantization(fields: Mapping[str, FieldValue], tensors: Mapping[str, Tensor]) -> dict[str, FieldValue]:
    """Return a model's config without the quantisation that its weights no longer have.

    Args:
        fields: the config.
        tensors: the weights of the model in memory.

    Raises:
        CheckpointError: the weights are still quantised.
    """
    quantization = fields.get("quantization_config")
    packed = [name for name, tensor in tensors.items() if tensor.dtype not in _PLAIN]
    if quantization is not None and packed:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise CheckpointError(
            f"hf_model is quantised ({method}): {packed[0]} has the dtype {tensors[packed[0]].dtype}. Pass one with "
            "plain weights: hf_model.dequantize() where its method has that, or the checkpoint it was quantised from"
        )
    return {name: value for name, value in fields.items() if name != "quantization_config"}
