"""Checksums of tensors: what tells whether a tensor's bytes have changed, whichever way they were written."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["checksums"]

# Words are added up in so many columns, before each column gets its factor. Primes, so that a matrix whose rows or
# columns change places is another sum. The widest that leaves enough rows is the fastest.
_WIDTHS = (131_071, 16_381, 1_021)
_ENOUGH_ROWS = 64
# Smaller tensors are summed together: the calls would take longer than the sums.
_SMALL = 2**16  # bytes, fewer than 64 rows of words


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """Return for each tensor a whole number that another content of the same tensor does not have, but by chance.

    The bytes are read as words of 64 bits, and the sum of `factor[i % width] * word[i]` is taken modulo 2**64. Factors
    are odd, so that a change of a single word always changes the sum. Reads a tensor once, in any dtype, and makes no
    copy of a large one if its memory has no gaps. Nothing waits for an accelerator until all sums are under way.

    Args:
        tensors: on any devices; those without contents, empty or on the meta device, have the number 0.
    """
    sums: dict[int, Tensor] = {}
    small: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.is_meta or tensor.numel() == 0:
            continue
        if tensor.nbytes < _SMALL:
            small.setdefault(tensor.device, []).append(i)
        else:
            sums[i] = _large(_words(tensor))
    for places in small.values():
        together = _together([_words(tensors[i]) for i in places])
        sums |= zip(places, together.unbind(), strict=True)
    return [int(sums[i]) if i in sums else 0 for i in range(len(tensors))]


def _words(tensor: Tensor) -> Tensor:
    """Return the bytes in the order of memory, a view if that is possible, as words of 64 bits; the last is padded."""
    content = tensor.detach()
    in_memory = content.permute(sorted(range(content.ndim), key=content.stride, reverse=True))
    flat = (in_memory if in_memory.is_contiguous() else content.contiguous()).view(-1).view(torch.uint8)
    if flat.numel() % 8:
        return F.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
    return (flat.clone() if flat.storage_offset() % 8 else flat).view(torch.int64)


def _large(words: Tensor) -> Tensor:
    width = next((width for width in _WIDTHS if len(words) >= _ENOUGH_ROWS * width), _WIDTHS[-1])
    whole = len(words) // width * width
    factors, rest = _factors(words.device), words[whole:]
    columns = words[:whole].view(-1, width).sum(0)
    return (columns * factors[:width]).sum() + 3 * (rest * factors[: len(rest)]).sum()


def _together(pieces: Sequence[Tensor]) -> Tensor:
    """Return the sums of several tensors' words, [piece]."""
    words = torch.cat(tuple(pieces))
    lengths = torch.tensor([len(piece) for piece in pieces], device=words.device)
    piece = torch.repeat_interleave(lengths, output_size=len(words))
    place = torch.arange(len(words), device=words.device) - (lengths.cumsum(0) - lengths)[piece]
    return words.new_zeros(len(pieces)).index_add_(0, piece, words * _factors(words.device)[place])


@cache
def _factors(device: torch.device) -> Tensor:
    """Return odd whole numbers of 64 bits, the same in every process, [_WIDTHS[0]]."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(-(2**62), 2**62, (_WIDTHS[0],), generator=generator)
    return (2 * made + 1).to(device)
