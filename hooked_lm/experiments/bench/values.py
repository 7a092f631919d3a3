"""Values as plain data beside tensors and figures: how a record keeps arguments and results, and gives them back."""

from __future__ import annotations

import base64
import dataclasses
import enum
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from hooked_lm._support.plain_data import PlainData
from hooked_lm.experiments.bench.fingerprint import ModelFingerprint, fingerprint_of, tensor_sha256
from hooked_lm.experiments.bench.source import source_of

if TYPE_CHECKING:
    from hooked_lm.plotting import Figure, HtmlFigure

__all__ = ["NotKept", "Packed", "pack", "unpack"]

# Files larger than this are known by their size and time alone.
_LARGEST_FILE = 2**30
_DEEPEST = 50


@dataclass(frozen=True)
class NotKept:
    """What stands in a record for a value that it cannot give back.

    Attributes:
        kind: the value's class.
        text: what it printed.
    """

    kind: str
    text: str


@dataclass
class Packed:
    """Values as plain data, and what they refer to.

    Attributes:
        tree: the values: lists and numbers as they are, everything else as an object with one key that says what it is.
        tensors: by the names that the tree has.
        figures: by the names that the tree has.
        not_kept: the paths of values of which only the text is kept.
    """

    tree: PlainData = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    figures: dict[str, Figure | HtmlFigure] = field(default_factory=dict)
    not_kept: list[str] = field(default_factory=list)


def pack(values: Mapping[str, object], prefix: str, known: Mapping[int, object] | None = None) -> Packed:
    """Return values as plain data, with copies of their tensors.

    Args:
        values: by name.
        prefix: of the names of tensors.
        known: the id of an object -> what stands for it, such as a tool's name.
    """
    packing = _Packer(prefix, known or {})
    for name, value in values.items():
        packing.found.tree[name] = packing.pack(value, name, 0)
    return packing.found


class _Packer:
    def __init__(self, prefix: str, known: Mapping[int, object]) -> None:
        self.prefix, self.known, self.found = prefix, known, Packed()

    def pack(self, value: object, path: str, depth: int) -> object:
        if id(value) in self.known:
            return self.known[id(value)]
        if value is None or (isinstance(value, (bool, str)) and not isinstance(value, enum.Enum)):
            return value
        if isinstance(value, (int, float, np.number, np.bool_)) and not isinstance(value, enum.Enum):
            return _number(value.item() if isinstance(value, (np.number, np.bool_)) else value)
        if depth > _DEEPEST:
            return self._text(value, path)
        if isinstance(value, (Tensor, np.ndarray)):
            return self._tensor(value, path)
        packed = self._container(value, path, depth) or self._thing(value, path)
        return self._text(value, path) if packed is None else packed

    def _container(self, value: object, path: str, depth: int) -> object:
        def inner(one: object, name: object) -> object:
            return self.pack(one, f"{path}.{name}", depth + 1)

        if isinstance(value, list):
            return {"list": [inner(one, index) for index, one in enumerate(value)]}
        named = vars(type(value)).get("_fields") if isinstance(value, tuple) else None
        if named is not None:
            return {"fields": {name: inner(getattr(value, name), name) for name in named}, "class": _class(value)}
        if isinstance(value, torch.Size):
            return {"tuple": list(value)}
        if isinstance(value, tuple):
            return {"tuple": [inner(one, index) for index, one in enumerate(value)]}
        if isinstance(value, (set, frozenset)):
            ordered = sorted(value, key=lambda one: (type(one).__name__, repr(one)))
            return {"set": [inner(one, index) for index, one in enumerate(ordered)]}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) for key in value):
                return {"dict": {key: inner(one, key) for key, one in value.items()}}
            return {"pairs": [[inner(key, "key"), inner(one, key)] for key, one in value.items()]}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [one.name for one in dataclasses.fields(value)]
            return {"fields": {name: inner(getattr(value, name), name) for name in names}, "class": _class(value)}
        return None

    def _thing(self, value: object, path: str) -> object:
        if isinstance(value, range):
            return {"range": [value.start, value.stop, value.step]}
        if isinstance(value, complex):
            return {"complex": [_number(value.real), _number(value.imag)]}
        if isinstance(value, bytes):
            return {"bytes": base64.b64encode(value).decode()}
        if isinstance(value, (torch.dtype, torch.device)):
            return {"torch": str(value).removeprefix("torch."), "class": type(value).__name__}
        if isinstance(value, Path):
            return {"path": str(value), **_file(value)}
        if type(value).__module__.startswith("hooked_lm.plotting") and hasattr(value, "save"):
            return self._figure(cast("Figure", value), path)
        fingerprint = fingerprint_of(value)
        if fingerprint is not None:
            return {"model": fingerprint.as_dict()}
        if callable(value) and hasattr(value, "__qualname__"):
            return {"function": f"{value.__module__}.{value.__qualname__}", "sha256": source_of(value).hash}
        return None

    def _tensor(self, value: Tensor | np.ndarray, path: str) -> object:
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "biufc":
                return {"array_of": str(value.dtype), "list": self.pack(value.tolist(), path, 1)}
            made = torch.from_numpy(np.ascontiguousarray(value).copy())
        else:
            made = value.detach()
        if made.is_meta or made.layout != torch.strided or made.is_quantized:
            return self._text(value, path)
        kept = torch.view_as_real(made.resolve_conj()) if made.is_complex() else made
        kept = kept.cpu().clone(memory_format=torch.contiguous_format)
        name = f"{self.prefix}{len(self.found.tensors)}"
        self.found.tensors[name] = kept
        return {
            "array" if isinstance(value, np.ndarray) else "tensor": name,
            "dtype": str(made.dtype).removeprefix("torch."),
            "shape": list(made.shape),
            "sha256": tensor_sha256(kept),
        }

    def _figure(self, value: Figure | HtmlFigure, path: str) -> object:
        name = f"{len(self.found.figures):02}-{''.join(c if c.isalnum() else '-' for c in path)[:60].strip('-')}"
        self.found.figures[name] = value
        return {"figure": name}

    def _text(self, value: object, path: str) -> object:
        self.found.not_kept.append(path)
        return {"text": repr(value)[:2000], "class": _class(value)}


def _class(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _number(value: object) -> object:
    """A number; those that JSON lacks as text."""
    if isinstance(value, complex):
        return {"complex": [_number(value.real), _number(value.imag)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return (
        float(value) if isinstance(value, float) else bool(value) if isinstance(value, bool) else int(cast(int, value))
    )


def _file(path: Path) -> PlainData:
    """What tells whether a file has other contents later."""
    if not path.is_file():
        return {}
    size = path.stat().st_size
    if size > _LARGEST_FILE:
        return {"size": size, "modified": path.stat().st_mtime_ns}
    with path.open("rb") as file:
        return {"size": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def unpack(tree: object, tensor: Callable[[str], Tensor], figure: Callable[[str], Path]) -> object:
    """Return the values that were packed.

    Tensors, arrays, containers and numbers come back as they were; a dataclass as a dictionary of its fields, a figure
    as the path of its page, a model as its fingerprint, and what could not be kept as `NotKept`.

    Args:
        tree: the plain data.
        tensor: gives a tensor by its name.
        figure: gives the path of a figure's page by its name.

    Raises:
        ValueError: a kind of value that this version does not know, or a tensor that is not what was recorded.
    """

    def inner(one: object) -> object:
        return unpack(one, tensor, figure)

    if not isinstance(tree, dict):
        return tree
    readers: dict[str, Callable[[PlainData], object]] = {
        "array_of": lambda one: np.array(inner(one["list"]), dtype=one["array_of"]),
        "list": lambda one: [inner(entry) for entry in one["list"]],
        "tuple": lambda one: tuple(inner(entry) for entry in one["tuple"]),
        "set": lambda one: {inner(entry) for entry in one["set"]},
        "dict": lambda one: {key: inner(entry) for key, entry in one["dict"].items()},
        "pairs": lambda one: {inner(key): inner(entry) for key, entry in one["pairs"]},
        "fields": lambda one: {key: inner(entry) for key, entry in one["fields"].items()},
        "float": lambda one: float(one["float"]),
        "complex": lambda one: complex(*cast(Sequence[float], [inner(part) for part in one["complex"]])),
        "range": lambda one: range(*one["range"]),
        "bytes": lambda one: base64.b64decode(one["bytes"]),
        "torch": lambda one: torch.device(one["torch"]) if one["class"] == "device" else getattr(torch, one["torch"]),
        "path": lambda one: Path(one["path"]),
        "tensor": lambda one: _as_it_was(tensor(one["tensor"]), one),
        "array": lambda one: _as_it_was(tensor(one["array"]), one).numpy(),
        "figure": lambda one: figure(one["figure"]),
        "model": lambda one: ModelFingerprint.from_dict(one["model"]),
        "function": lambda one: NotKept("function", one["function"]),
        "text": lambda one: NotKept(one["class"], one["text"]),
        "tool": lambda one: NotKept("tool", one["tool"]),
    }
    kind = next((key for key in readers if key in tree), None)
    if kind is None:
        raise ValueError(f"a record holds a value of an unknown kind, with the keys {', '.join(map(repr, tree))}")
    return readers[kind](tree)


def _as_it_was(kept: Tensor, described: PlainData) -> Tensor:
    whole = torch.view_as_complex(kept) if described["dtype"].startswith("complex") else kept
    if tensor_sha256(kept) != described["sha256"]:
        raise ValueError(
            f"a tensor of the record, {described['dtype']} {described['shape']}, is not what was recorded: its SHA-256 "
            "differs"
        )
    return whole
