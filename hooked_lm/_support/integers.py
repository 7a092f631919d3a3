"""Whole numbers that callers give: Python's, NumPy's, and tensors of one; no bool, no float."""

from __future__ import annotations

import operator

import numpy as np
import torch

__all__ = ["integer", "is_integer"]


def is_integer(value: object) -> bool:
    """Return whether a value is a whole number: an int, one of NumPy's, or a tensor or array of one without axes."""
    if isinstance(value, (bool, np.bool_)):
        return False
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.ndim == 0 and "int" in str(value.dtype)
    # Under torch.compile sizes are symbolic integers, which are no `int`.
    return isinstance(value, (int, np.integer, torch.SymInt))


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
