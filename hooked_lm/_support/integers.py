"""Whole numbers that callers give: Python's, NumPy's, and tensors of one; no bool, no float."""

from __future__ import annotations

import operator

import numpy as np
import torch

__all__ = ["at_least_one", "entries_of", "integer", "is_integer"]


def is_integer(value: object) -> bool:
    """Return whether a value is a whole number: an int, one of NumPy's, or a tensor or array of one without axes."""
    if isinstance(value, (bool, np.bool_)):
        return False
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.ndim == 0 and "int" in str(value.dtype)
    # Under torch.compile sizes are symbolic integers, which are no `int`.
    return isinstance(value, (int, np.integer, torch.SymInt))


def entries_of(value: object) -> tuple[object, ...] | None:
    """Return the entries of a tuple, list or range, or of an array or tensor with one axis; None for anything else.

    Args:
        value: an index, perhaps of several entries.
    """
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return tuple(value.tolist()) if value.ndim == 1 else None
    return tuple(value) if isinstance(value, (tuple, list, range)) else None


def integer(value: object, what: str) -> int:
    """Return a whole number as an int.

    Args:
        value: the number.
        what: the name of the argument, for the message.

    Raises:
        TypeError: it is none; bools and floats are none.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not is_integer(value):
        raise TypeError(f"{what} is an integer, got {type(value).__name__} {value!r}")
    return operator.index(value)  # type: ignore[arg-type]


def at_least_one(value: object, what: str) -> int:
    """Return a whole number from 1 as an int: a count of what is asked for.

    Args:
        value: the number.
        what: the name of the argument, for the message.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is below 1.
    """
    found = integer(value, what)
    if found < 1:
        raise ValueError(f"{what} is at least 1, got {found}")
    return found
