"""Which kernel computes a product on the CPU: by a rule for this processor, or as `HOOKED_LM_KERNELS` says.

A rule, and not a measurement at start: the same call on the same machine is then the same sum, to the bit, in every
process.
"""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from hooked_lm._support.torch_internals import ONEDNN_LINEAR

__all__ = [
    "SETTINGS",
    "Kernel",
    "describe_kernels",
    "kernel_setting",
    "large_kernel",
    "processor_vendor",
    "splits_few_rows",
]

# `torch` is `F.linear`; `onednn` is oneDNN's product, which torch ships too.
Kernel = Literal["torch", "onednn"]
SETTINGS = ("auto", "torch", "onednn")
_VARIABLE = "HOOKED_LM_KERNELS"
_AMD = "AuthenticAMD"


@cache
def processor_vendor() -> str:
    """Return the processor's vendor as the processor says it, `"GenuineIntel"`; "" where the system does not tell."""
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:
        described = platform.processor()  # on Windows the vendor is its last word
    found = re.search(r"\b(AuthenticAMD|GenuineIntel|HygonGenuine)\b", described)
    return found[1] if found else ""


@cache
def kernel_setting() -> str:
    """Return what the environment variable `HOOKED_LM_KERNELS` says when it is first needed; `"auto"` if nothing.

    Raises:
        ValueError: it is none of `SETTINGS`.
    """
    setting = os.environ.get(_VARIABLE, "").strip().lower() or "auto"
    if setting not in SETTINGS:
        raise ValueError(f"{_VARIABLE} is one of {', '.join(SETTINGS)}; it is {setting!r}")
    return setting


@cache
def large_kernel() -> Kernel:
    """Return the kernel of products with large matrices in float32, of more than a few rows.

    torch's own choice is MKL where it has been built with it. MKL is written for Intel's processors, where it is as
    fast as oneDNN or faster; on AMD's, oneDNN takes 0.5 to 0.8 times as long.
    """
    setting = kernel_setting()
    wanted = setting == "onednn" or (setting == "auto" and processor_vendor() == _AMD)
    return "onednn" if wanted and ONEDNN_LINEAR is not None else "torch"


@cache
def splits_few_rows() -> bool:
    """Return whether products of one or two rows are shared out among the threads."""
    return kernel_setting() != "torch"


def describe_kernels() -> dict[str, str | int]:
    """Return how products are computed on the CPU in this process, in words: what is asked for, and what follows."""
    large = "oneDNN" if large_kernel() == "onednn" and torch.backends.mkldnn.enabled else "PyTorch's choice"
    return {
        "processor": processor_vendor() or "of a vendor that the system does not name",
        "threads": torch.get_num_threads(),
        _VARIABLE: kernel_setting(),
        "one or two rows": "a part of the matrix for each thread" if splits_few_rows() else "PyTorch's choice",
        "more rows, float32": large,
        "small matrices, other precisions": "PyTorch's choice",
    }
