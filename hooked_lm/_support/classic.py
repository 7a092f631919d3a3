"""Small helpers of the classic library that need no domain knowledge."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from typing import TypeVar

import torch

__all__ = ["filter_dict_by_prefix", "get_device", "get_nested_attr", "is_library_available", "set_nested_attr"]

T = TypeVar("T")


def get_nested_attr(obj: object, attr_str: str) -> object:
    """Return the attribute at a dotted path, such as `"cfg.n_ctx"`.

    Args:
        obj: where the path starts.
        attr_str: the path.
    """
    return functools.reduce(getattr, attr_str.split("."), obj)


def set_nested_attr(obj: object, attr_str: str, value: object) -> None:
    """Set the attribute at a dotted path.

    Args:
        obj: where the path starts.
        attr_str: the path.
        value: the new value.
    """
    path, _, last = attr_str.rpartition(".")
    setattr(get_nested_attr(obj, path) if path else obj, last, value)


def filter_dict_by_prefix(dictionary: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Return the entries whose keys begin with a prefix and a dot, under the rest of their keys.

    Args:
        dictionary: such as a state dict.
        prefix: with or without the dot at its end.
    """
    start = f"{prefix.removesuffix('.')}."
    return {name.removeprefix(start): value for name, value in dictionary.items() if name.startswith(start)}


def get_device() -> str:
    """Return `"cuda"` if there is a GPU that torch can use, and `"cpu"` otherwise; Apple's GPU has to be named."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def is_library_available(name: str) -> bool:
    """Return whether a package is installed, without importing it.

    Args:
        name: of the package as it is imported.
    """
    return importlib.util.find_spec(name) is not None
