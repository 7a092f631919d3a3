"""Offloading: a dictionary that writes activations to a safetensors file as they are computed.

The format begins with a table of contents. Its space is reserved at the start of the file and padded with spaces.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import torch
from torch import Tensor

from hooked_lm._support.files import explained, whole_file
from hooked_lm._support.plain_data import PlainData
from hooked_lm._support.tensor_bytes import bytes_of
from hooked_lm._support.torch_internals import memory_reference, times_written

__all__ = ["CACHE_DTYPES", "CACHE_FORMAT", "CACHE_VERSION", "MASK", "Memory", "Offloading", "memory_of"]

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CACHE_DTYPES = frozenset(_TYPES.values())
CACHE_FORMAT, CACHE_VERSION = "hooked_lm activations", 1
_LENGTH = 8  # bytes, in front of the table, that hold its length
_PADDING = "padding {}"
MASK = "attention mask"  # the name of the tensor that says which positions of the run are padding
# Bytes of one entry besides its name: type, a shape of few axes, two offsets, and the JSON punctuation.
_ENTRY = 160

Memory = tuple[object, ...]


def memory_of(tensor: Tensor) -> Memory:
    """Return a key that is equal for tensors with the same memory, layout and write count.

    The reference to the memory is weak: it does not keep the tensor alive, and reused memory gives another key.
    """
    place = memory_reference(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()
    return (*place, tensor.dtype, times_written(tensor))


class Offloading(dict[str, Tensor]):
    """A dictionary that, within a `with` block, writes each assigned tensor to a file and does not hold it.

    An entry that is the same tensor as an earlier entry is written once. The file appears whole or not at all.

    Args:
        path: of the file.
        names: the names that may be assigned; they determine the space reserved for the table.
        has_batch_dim: recorded in the file, for `ActivationCache.load`.
        sizes: of the model, recorded in the file likewise; None to record none.
        reader: called with the path of the complete file just before it gets its name, so that what it opens is this
            file, whatever another writer puts in its place afterwards.

    Attributes:
        attention_mask: of the run, [batch pos], 0 at padding; None if nothing is padded. Written at the end.
        read: what `reader` returned; None before.

    Raises:
        ValueError: the file cannot be written, a name is assigned twice, or the format lacks a tensor's dtype.
    """

    def __init__(
        self,
        path: str | Path,
        names: Iterable[str],
        has_batch_dim: bool = True,
        sizes: Mapping[str, int | None] | None = None,
        reader: Callable[[Path], object] | None = None,
    ) -> None:
        super().__init__()
        self.reader, self.read, self._sizes = reader, cast(object, None), sizes
        self.attention_mask: Tensor | None = None
        self.path, self.has_batch_dim = Path(path).resolve(), has_batch_dim
        lengths = [len(_json(name).encode()) for name in names]
        # For each name: its entry, an entry of padding before it, its place in the order, and the name it aliases.
        self._room = 2048 + sum(3 * length + 2 * _ENTRY for length in lengths) + len(lengths) * max(lengths, default=0)
        self._room += -self._room % _LENGTH
        self._table: PlainData = {}
        self._order: dict[str, None] = {}
        self._aliases: dict[str, str] = {}
        self._written: dict[Memory, str] = {}
        self._at = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._file = stack.enter_context(whole_file(self.path))
            with explained(self.path):
                self._file.write(bytes(_LENGTH + self._room))
            stack.push(self._finish)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exit.__exit__(kind, error, traceback)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if name in self._order:
            raise ValueError(f"{name!r} has been written to {self.path} already")
        if tensor.dtype not in _TYPES:
            raise ValueError(f"{name!r} has dtype {tensor.dtype}, which these safetensors files do not support")
        self._order[name] = None
        same = self._written.setdefault(memory_of(tensor), name)
        if same != name:
            self._aliases[name] = same
            return
        self._write_aligned(name, tensor)

    def _write_aligned(self, name: str, tensor: Tensor) -> None:
        # A map of the file can be read as numbers only where they begin at a multiple of their size.
        gap = -(_LENGTH + self._room + self._at) % tensor.element_size()
        if gap:
            self._write(_PADDING.format(len(self._table)), torch.zeros(gap, dtype=torch.uint8))
        self._write(name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        data = bytes_of(tensor).numpy()
        end = self._at + data.nbytes
        kind = _TYPES[tensor.dtype]
        self._table[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [self._at, end]}
        with explained(self.path):
            self._file.write(data.data)
        self._at = end

    def _finish(self, error: type[BaseException] | None, *_: object) -> None:
        """Write the table, unless the `with` block raised."""
        if error is not None:
            return
        if self.attention_mask is not None:
            self._write_aligned(MASK, self.attention_mask)
        about = {
            "format": CACHE_FORMAT,
            "version": str(CACHE_VERSION),
            "has_batch_dim": str(self.has_batch_dim),
            "aliases": _json(self._aliases),
            "order": _json(list(self._order)),
        }
        if self._sizes is not None:
            about["model"] = _json(dict(self._sizes))
        table = _json({"__metadata__": about, **self._table}).encode()
        if len(table) > self._room:
            raise ValueError(f"{self.path} has room for {self._room} bytes of names, and these take {len(table)}")
        with explained(self.path):
            self._file.seek(0)
            self._file.write(self._room.to_bytes(_LENGTH, "little") + table.ljust(self._room))
            self._file.flush()
        if self.reader is not None:
            self.read = self.reader(Path(self._file.name))


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
