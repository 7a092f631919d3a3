"""Whether an error is a want of memory: torch raises errors of several types for it."""

from __future__ import annotations

import torch

__all__ = ["is_out_of_memory"]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory has run out, of the processor or of an accelerator.

    Args:
        error: as it was raised.
    """
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
