"""Checkpoints whose weights `transformers` computes: GGUF files, PEFT adapters, quantised weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from weight_conversion.adapters import find_adapter
from weight_conversion.gguf_files import find_gguf
from weight_conversion.hub import Hub
from weight_conversion.in_transformers import HFModel, load_in_transformers
from weight_conversion.quantized import find_quantized
from weight_conversion.source import find_folder, read_json

__all__ = ["Foreign", "find_foreign"]


class Foreign(Protocol):
    """A checkpoint that is a model of `transformers` first."""

    @property
    def tokenizer_places(self) -> tuple[Path, ...]:
        """Where a tokenizer may be: the first place that has one counts."""

    def load(self, dtype: torch.dtype | str | None, **options: object) -> HFModel:
        """Return the model, its weights plain numbers.

        Args:
            dtype: of the weights; None for their own.
            **options: further arguments of `from_pretrained`.

        Raises:
            CheckpointError: it cannot be loaded, or a package for it is missing.
        """


def find_foreign(place: Path, hub: Hub) -> Foreign | None:
    """Return the checkpoint at a path if it is of such a kind; None for a folder that is read without transformers.

    Args:
        place: a folder, or a GGUF file.
        hub: how an adapter's base model is fetched.

    Raises:
        CheckpointError: the path holds two checkpoints, and either could be meant.
    """
    found: Foreign | None = find_gguf(place) or find_adapter(
        place, lambda base: partial(_load_base, base, hub), lambda base: find_folder(base, hub=hub)
    )
    if found is not None or not (place / "config.json").is_file():
        return found
    return find_quantized(place, read_json(place / "config.json"))


def _load_base(base: str, hub: Hub, dtype: torch.dtype | str | None, **options: object) -> HFModel:
    place = find_folder(base, hub=hub)
    foreign = find_foreign(place, hub)
    if foreign is not None:
        return foreign.load(dtype, **options)
    return load_in_transformers(str(place), place, dtype=dtype or "auto", **options)
