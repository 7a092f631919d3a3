"""Folders with quantised weights: `transformers` dequantises those of some methods, and the others are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from weight_conversion.errors import CheckpointError
from weight_conversion.fields import FieldValue
from weight_conversion.in_transformers import HFModel, load_in_transformers, require_packages

__all__ = ["QuantizedFolder", "find_quantized"]

# Methods that transformers dequantises on any machine: its config class, and the packages that it takes.
_DEQUANTIZED: dict[str, tuple[str, tuple[str, ...]]] = {
    "fp8": ("FineGrainedFP8Config", ("accelerate",)),
    "mxfp4": ("Mxfp4Config", ("accelerate",)),
    "compressed-tensors": ("CompressedTensorsConfig", ("accelerate", "compressed_tensors")),
}
# This one loads quantised, and is dequantised afterwards.
_BITSANDBYTES = "bitsandbytes"


@dataclass(frozen=True)
class QuantizedFolder:
    """A folder in HuggingFace's format whose weights are quantised.

    Attributes:
        folder: the folder.
        method: of the quantisation, as its config names it.
    """

    folder: Path
    method: str

    @property
    def tokenizer_places(self) -> tuple[Path, ...]:
        """Where its tokenizer is."""
        return (self.folder,)

    def load(self, dtype: torch.dtype | str | None, **options: object) -> HFModel:
        """Return its model, dequantised.

        Args:
            dtype: of the weights; by default the one that the config names.
            **options: further arguments of `from_pretrained`.

        Raises:
            CheckpointError: transformers cannot dequantise the method, or a package is missing.
        """
        what = f"{self.folder} is quantised ({self.method})"
        if self.method == _BITSANDBYTES:
            require_packages(what, ("accelerate", _BITSANDBYTES), "accelerate bitsandbytes")
            model = load_in_transformers(str(self.folder), self.folder, dtype=dtype or "auto", **options).dequantize()
            return _in_precision(model, dtype)
        if self.method not in _DEQUANTIZED:
            raise CheckpointError(
                f"{what}, and transformers cannot turn such weights back into plain ones: load the checkpoint that it "
                "was quantised from, or one that its tool has dequantised"
            )
        config, packages = _DEQUANTIZED[self.method]
        require_packages(what, packages, " ".join(packages).replace("_", "-"))
        plain = config_class(config)(dequantize=True)
        with warnings.catch_warnings():
            # transformers says that the file's own settings go before these, which only ask for plain weights.
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            model = load_in_transformers(
                str(self.folder), self.folder, quantization_config=plain, dtype=dtype or "auto", **options
            )
        return _in_precision(model, dtype)


def config_class(name: str) -> Callable[..., object]:
    """Return a class of `transformers` for the config of a quantisation, by its name."""
    import transformers

    found: Callable[..., object] = getattr(transformers, name)
    return found


def _in_precision(model: HFModel, dtype: torch.dtype | str | None) -> HFModel:
    """Return a model with all its parameters in one precision: transformers leaves those that were never quantised."""
    if isinstance(dtype, torch.dtype):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model


def find_quantized(folder: Path, content: Mapping[str, FieldValue]) -> QuantizedFolder | None:
    """Return a folder whose config says that its weights are quantised; None if they are not.

    Args:
        folder: the folder.
        content: of its `config.json`.
    """
    quantization = content.get("quantization_config")
    if not quantization:
        return None
    said = quantization if isinstance(quantization, Mapping) else {"quant_method": quantization}
    # Files of bitsandbytes from before methods had names say how many bits.
    old = _BITSANDBYTES if said.get("load_in_4bit") or said.get("load_in_8bit") else None
    return QuantizedFolder(folder, str(said.get("quant_method") or old or "by a method that its config does not name"))
