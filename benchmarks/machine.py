"""Where measurements are made."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from hooked_lm.components.kernels import describe_kernels, processor_vendor


def machine(threads: int | None = None) -> dict[str, Any]:
    """Describe this machine and what computes on it.

    Args:
        threads: of every contestant; by default this process's.
    """
    return {
        "cpu": cpu_name(),
        "vendor": processor_vendor(),
        "kernels": describe_kernels(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if threads is None else threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def device_name(device: str) -> str:
    """Return what an accelerator calls itself; `"cpu"` for the CPU."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def cpu_name() -> str:
    """Return what Linux calls the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
