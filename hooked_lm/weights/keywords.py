"""Keywords of `from_pretrained` that code for the classic library passes: second names, and some without effect."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping

__all__ = ["check_same", "check_without_effect"]

# Keywords that cannot act here, and the reason. Values that ask for nothing (None, False, one device) give no warning.
_WITHOUT_EFFECT = {
    "attn_implementation": "attention is this library's own",
    "device_map": "load on one device, then model.spread(devices)",
    "force_download": "delete the checkpoint from the cache instead",
    "load_in_4bit": "weights are plain numbers: pass dtype=torch.bfloat16 for a smaller model",
    "load_in_8bit": "weights are plain numbers: pass dtype=torch.bfloat16 for a smaller model",
    "low_cpu_mem_usage": "loading takes about one copy of the weights as it is",
    "n_devices": "load on one device, then model.spread(devices)",
    "resume_download": "the hub's client resumes by itself",
}


def check_same(name: str, value: object, classic: str, classic_value: object) -> None:
    """Check that an argument with two names was not given two values.

    Args:
        name, value: its name, and what was given under it; None for nothing.
        classic, classic_value: its name in the classic library, and what was given under that.

    Raises:
        TypeError: the values differ.
    """
    if value is not None and classic_value is not None and value != classic_value:
        raise TypeError(f"from_pretrained got {name}={value!r} and {classic}={classic_value!r}, two names of one thing")


def check_without_effect(given: Mapping[str, object], known: Iterable[str]) -> None:
    """Warn, once for all, of classic keywords that cannot act.

    Args:
        given: keywords that are no arguments of `from_pretrained`.
        known: the names of its arguments.

    Raises:
        TypeError: one is unknown.
    """
    for name in given:
        if name not in _WITHOUT_EFFECT:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"from_pretrained got an unexpected keyword argument {name!r}{hint}")
    asked = [name for name, value in given.items() if value is True or value not in (None, False, 1)]
    if asked:
        reasons = "; ".join(f"{name} ({_WITHOUT_EFFECT[name]})" for name in asked)
        warnings.warn(f"these keywords have no effect here: {reasons}", stacklevel=3)
