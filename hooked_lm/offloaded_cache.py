"""Activations that go to a file as they are computed, in safetensors format.

The format puts a table of contents first. Room for it is left at the start of the file, filled with spaces at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hooked_lm.files import whole_file

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
_LENGTH = 8  # bytes of the table's length, which come before it
_PADDING = "padding {}"


class Offloading(dict[str, Tensor]):
    """A dictionary for the length of a `with` block that writes what is assigned to it, and holds nothing of it.

    An entry that is the same tensor as one before is written once. The file is there whole or not at all.

    Args:
        path: of the file.
        names: those that may come, with or without `_grad`, for the length of the table.
        has_batch_dim: said in the file, for `ActivationCache.load`.
    """

    def __init__(self, path: str | Path, names: Iterable[str], has_batch_dim: bool = True) -> None:
        super().__init__()
        self.path, self.has_batch_dim = Path(path), has_batch_dim
        # Of each name: its entry, one of padding before it, its place in the order, and a name it is the same as.
        lengths = [len(name) + len("_grad") for name in names]
        self._room = 1024 + 2 * sum(3 * length + max(lengths) + 512 for length in lengths)
        self._room += -self._room % _LENGTH
        self._table: dict[str, Any] = {}
        self._order: list[str] = []
        self._aliases: dict[str, str] = {}
        self._written: dict[tuple[Any, ...], str] = {}
        self._at = 0
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        self._file = self._exit.enter_context(whole_file(self.path))
        self._file.write(bytes(_LENGTH + self._room))
        return self

    def __exit__(self, *error: Any) -> Any:
        if error[0] is None:
            with self._exit:
                self._finish()
            return None
        return self._exit.__exit__(*error)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if name in self._order:
            raise ValueError(f"{name!r} has been written to {self.path} already")
        self._order.append(name)
        # A weak reference tells memory that is there still from memory that has been used again.
        memory = (StorageWeakRef(tensor.untyped_storage()), tensor.storage_offset(), tensor.shape, tensor.stride())
        same = self._written.setdefault((*memory, tensor.dtype), name)
        if same != name:
            self._aliases[name] = same
            return
        # A map of the file can be read as numbers only where they begin at a multiple of their size.
        gap = -(_LENGTH + self._room + self._at) % tensor.element_size()
        if gap:
            self._write(_PADDING.format(len(self._table)), torch.zeros(gap, dtype=torch.uint8))
        self._write(name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        end = self._at + data.nbytes
        kind = _TYPES[tensor.dtype]
        self._table[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [self._at, end]}
        self._file.write(data.data)
        self._at = end

    def _finish(self) -> None:
        about = {
            "has_batch_dim": str(self.has_batch_dim),
            "aliases": json.dumps(self._aliases),
            "order": json.dumps(self._order),
        }
        table = json.dumps({"__metadata__": about, **self._table}).encode()
        self._file.seek(0)
        self._file.write(self._room.to_bytes(_LENGTH, "little") + table.ljust(self._room))
