"""Checksums of tensors: what tells whether a tensor's bytes have changed, whichever way they were written."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["checksum"]

# Words are added up in so many columns, before each column gets its factor. Primes, so that a matrix whose rows or
# columns change places is another sum. The widest that leaves several rows is the fastest.
_WIDTHS = (131_071, 16_381, 1_021)
_LEAST_ROWS = 8


def checksum(tensor: Tensor) -> Tensor:
    """Return a whole number [] that another content of the same tensor does not have, but by chance.

    The bytes are read as words of 64 bits, and the sum of `factor[i % width] * word[i]` is taken modulo 2**64. Factors
    are odd, so that a change of a single word always changes the sum. Reads the tensor once, in any dtype, and makes no
    copy of it if its memory has no gaps; on an accelerator nothing waits for the result.
    """
    if tensor.is_meta or tensor.numel() == 0:
        return torch.zeros((), dtype=torch.int64)
    content = _flat(tensor.detach()).view(torch.uint8)
    if content.storage_offset() % 8:
        content = content.clone()
    n_words = content.numel() // 8
    words, rest = content[: 8 * n_words].view(torch.int64), content[8 * n_words :]
    width = next((width for width in _WIDTHS if n_words >= _LEAST_ROWS * width), n_words)
    total = _weighted(rest.long())
    if n_words:
        columns = words[: n_words // width * width].view(-1, width).sum(0)
        total = total + _weighted(columns) + 3 * _weighted(words[n_words // width * width :])
    return total


def _flat(tensor: Tensor) -> Tensor:
    """Return the entries in the order of memory, as a view; in their own order if the memory has gaps or repeats."""
    in_memory = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    return (in_memory if in_memory.is_contiguous() else tensor.contiguous()).view(-1)


def _weighted(numbers: Tensor) -> Tensor:
    return (numbers * _factors(numbers.device)[: len(numbers)]).sum()


@cache
def _factors(device: torch.device) -> Tensor:
    """Return odd whole numbers of 64 bits, the same in every process, [_WIDTHS[0]]."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(-(2**62), 2**62, (_WIDTHS[0],), generator=generator)
    return (2 * made + 1).to(device)
