"""`Loaded`: a checkpoint that has been opened and checked, and is not built yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.errors import CheckpointError
from weight_conversion.fields import HFConfig
from weight_conversion.in_transformers import Tokenizer

__all__ = ["Loaded", "Shortened", "Weights"]

_POSITIONS = "pos_embed.W_pos"


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


class Shortened:
    """Weights with fewer learned positions.

    Args:
        weights: with all of them.
        had: how many positions those have.
        n_ctx: how many to keep.

    Raises:
        CheckpointError: there are not so many.
    """

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
