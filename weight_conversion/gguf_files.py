"""GGUF files, read by `transformers` and dequantised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from weight_conversion.errors import CheckpointError
from weight_conversion.in_transformers import HFModel, load_in_transformers, require_packages
from weight_conversion.source import has_weights

__all__ = ["GGUFFile", "find_gguf"]


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file: config, weights and tokenizer in one."""

    path: Path

    def load(self, dtype: torch.dtype | str | None, **options: object) -> HFModel:
        """Return its model, dequantised.

        Args:
            dtype: of the weights; float32 by default, because their own has no name in torch.
            **options: further arguments of `from_pretrained`.

        Raises:
            CheckpointError: a package is missing, or transformers does not read the file.
        """
        require_packages(f"{self.path} is a GGUF file", ("gguf", "accelerate"), "hooked-lm[gguf]")
        return load_in_transformers(
            str(self.path), self.path.parent, gguf_file=self.path.name, dtype=dtype or torch.float32, **options
        )

    @property
    def tokenizer_places(self) -> tuple[Path, ...]:
        """Where its tokenizer is: in the file itself."""
        return (self.path,)


def find_gguf(place: Path) -> GGUFFile | None:
    """Return the GGUF file that a path is, or that a folder without other weights holds; None if there is none.

    Raises:
        CheckpointError: the folder holds several.
    """
    if place.is_file():
        return GGUFFile(place) if place.suffix == ".gguf" else None
    found = sorted(place.glob("*.gguf"))
    if not found or has_weights(place):
        return None
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{place} holds {len(found)} GGUF files: {names}. Give the path of one of them")
    return GGUFFile(found[0])
