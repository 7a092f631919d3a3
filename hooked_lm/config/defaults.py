"""The defaults of the process: the device and precision of models, and what happens to hooks that never ran."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch

__all__ = ["CLASSIC", "STANDARD", "Defaults", "defaults", "report_silent_hook", "set_defaults"]


@dataclass(frozen=True)
class Defaults:
    """What is done where a call says nothing.

    Attributes:
        dtype: the precision that `from_pretrained` loads in; None for the checkpoint's.
        use_gpu: new and loaded models are put on the GPU, if there is one.
        silent_hook: what happens when a hook that was given by its name never ran.
    """

    dtype: torch.dtype | None = None
    use_gpu: bool = False
    silent_hook: Literal["raise", "warn"] = "raise"

    def device(self) -> str | None:
        """Return the device of new and loaded models; None where nothing is moved."""
        return "cuda" if self.use_gpu and torch.cuda.is_available() else None


STANDARD = Defaults()
# Those of the classic library; `hooked_lm.compat.install` sets them.
CLASSIC = Defaults(dtype=torch.float32, use_gpu=True, silent_hook="warn")

_current = STANDARD


def defaults() -> Defaults:
    """Return the defaults in force."""
    return _current


def set_defaults(new: Defaults) -> None:
    """Put other defaults in force, in all threads.

    Args:
        new: the defaults.
    """
    global _current  # noqa: PLW0603 - one setting of the process, changed by this function only
    _current = new


def report_silent_hook(message: str) -> None:
    """Do what the defaults say with a hook that was given by its name and never ran.

    Args:
        message: what is said of it.

    Raises:
        RuntimeError: with the message, unless it is a warning.
    """
    if _current.silent_hook == "raise":
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=4)
