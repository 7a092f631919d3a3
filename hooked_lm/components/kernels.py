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
from jaxtyping import Float
from torch import Tensor

from hooked_lm._support.torch_internals import ONEDNN_LINEAR

__all__ = [
    "SETTINGS",
    "Kernel",
    "describe_kernels",
    "kernel_rule",
    "kernel_setting",
    "processor_vendor",
    "product_kernel",
]

# `torch` is `F.linear`; `onednn` is oneDNN's product, which torch ships too; `parts` is a product for each thread.
Kernel = Literal["torch", "onednn", "parts"]
# Of the products of a process. `amd` is what the setting `onednn` asks for too.
Rule = Literal["amd", "intel", "torch"]
SETTINGS = ("auto", "torch", "onednn")
_VARIABLE = "HOOKED_LM_KERNELS"
_RULES: dict[str, Rule] = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}
# Rows: at most so many are multiplied part by part (AMD); from and to which oneDNN is faster (Intel).
_FEW, _FEW_ROWS, _MOST_ROWS = 2, 4, 192
_MILLIONS = 2**21


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
def kernel_rule() -> Rule:
    """Return the rule of this process: the setting's, or this processor's."""
    setting = kernel_setting()
    if setting == "auto":
        return _RULES.get(processor_vendor(), "torch")
    return "amd" if setting == "onednn" else "torch"


def product_kernel(rows: int, weight: Float[Tensor, "d_out d_in"]) -> Kernel:
    """Return the kernel for the product of so many rows with a large matrix, by the rule of this process.

    AMD (measured on an EPYC): torch chooses MKL, which is written for Intel's processors; oneDNN takes 0.5 to 0.8 times
    as long. One or two rows take the time to read the matrix, which `F.linear` does with one thread; a batch of
    products with parts of the matrix reads it with all, 1.8 times as fast if stored `[d_in d_out]`, 3 times if
    `[d_out d_in]`.

    Intel (measured on a Xeon with AVX-512 and AMX, one thread and two): MKL reads the matrix with all threads, and
    parts take up to 2.7 times as long. For matrices stored `[d_out d_in]` of two million entries and more, oneDNN takes
    0.5 to 1 times as long from 8 rows to 192, or from 4 where the matrix is an unembedding's; otherwise longer.

    Args:
        rows: how many.
        weight: the matrix, of `LARGE` entries or more.
    """
    rule = kernel_rule()
    if rule == "amd":
        return "parts" if rows <= _FEW else "onednn"
    if rule == "intel" and weight.stride(1) == 1 and rows <= _MOST_ROWS:
        entries = weight.numel()
        if entries >= _MILLIONS and rows >= (_FEW_ROWS if entries >= 8 * _MILLIONS else 2 * _FEW_ROWS):
            return "onednn"
    return "torch"


def describe_kernels() -> dict[str, str | int]:
    """Return how products are computed on the CPU in this process, in words: what is asked for, and what follows."""
    rule = kernel_rule() if torch.backends.mkldnn.enabled and ONEDNN_LINEAR is not None else "torch"
    torch_chooses = "PyTorch's choice"
    large = {
        "amd": "oneDNN",
        "intel": f"oneDNN for {2 * _FEW_ROWS} to {_MOST_ROWS} rows of matrices stored by outputs, or {torch_chooses}",
        "torch": torch_chooses,
    }
    return {
        "processor": processor_vendor() or "of a vendor that the system does not name",
        "threads": torch.get_num_threads(),
        _VARIABLE: kernel_setting(),
        "one or two rows": "a part of the matrix for each thread" if kernel_rule() == "amd" else torch_chooses,
        "more rows, float32": large[rule],
        "small matrices, other precisions": torch_chooses,
    }
