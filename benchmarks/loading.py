"""Loading a GPT-2-small-sized checkpoint: peak memory against the model's own size, and time beside `transformers`.

python -m benchmarks.loading [--rounds 7] [--json results.json]

Memory is measured in a process of its own, as the rise of the peak resident set (Linux: VmHWM, reset before loading)
over what was resident before, with everything imported and a tiny model loaded. Pages of the checkpoint that are mapped
and have been read count; at the end of a load that needs no processing, hardly any have been. So that this does not
flatter anybody, "read" also reads every weight once: memory is what the model comes to take, and "read" times are
those of models whose weights have all been in the processor's hands.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.forward import compare, machine
from hooked_lm import HookedTransformer

# What the project asks of itself: peak memory over the model's bytes, and time over transformers'.
TARGETS = {
    "memory unprocessed": 1.15,
    "memory processed": 1.15,
    "time unprocessed": 1.0,
    "time processed": 2.0,
}

REFERENCE = "transformers"
LOADERS: dict[str, Callable[[str], torch.nn.Module]] = {
    "unprocessed": HookedTransformer.from_pretrained_no_processing,
    "processed": HookedTransformer.from_pretrained,
    REFERENCE: GPT2LMHeadModel.from_pretrained,
}


def load_and_read(loader: str, path: str) -> torch.nn.Module:
    """Load a model and read every weight once."""
    model = LOADERS[loader](path)
    for parameter in model.parameters():
        parameter.detach().sum()
    return model


def make_checkpoint(folder: Path, **changes: Any) -> str:
    """Write a random GPT-2 to a folder and return its path; GPT-2 small unless changed."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**changes)).save_pretrained(folder)
    return str(folder)


def own_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, shared ones counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def resident(which: str) -> int:
    """Return this process's resident set in bytes: `VmRSS` now, `VmHWM` at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def measure_memory(loader: str, path: str, tiny: str) -> dict[str, float]:
    """Return bytes of the model, and the rise of the peak while it is loaded. In this process: see `memory`."""
    LOADERS[loader](tiny)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    model = load_and_read(loader, path)
    return {"bytes": own_bytes(model), "peak": resident("VmHWM") - before}


def memory(loader: str, path: str, tiny: str) -> dict[str, float]:
    """Return what `measure_memory` does in a fresh process, and the ratio of peak to model."""
    command = [sys.executable, "-m", "benchmarks.loading", "--measure", loader, path, tiny]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {**result, "ratio": result["peak"] / result["bytes"]}


def measure(rounds: int) -> dict[str, dict[str, Any]]:
    """Return all comparisons."""
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(Path(folder) / "small")
        tiny = make_checkpoint(Path(folder) / "tiny", n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8)
        for loader in LOADERS:
            results[f"memory {loader}"] = memory(loader, path, tiny)
        for loader in ("unprocessed", "processed"):
            results[f"time {loader}"] = compare(
                partial(LOADERS[loader], path), partial(LOADERS[REFERENCE], path), rounds
            )
            results[f"time {loader}, read"] = compare(
                partial(load_and_read, loader, path), partial(load_and_read, REFERENCE, path), rounds
            )
    return results


def main() -> None:
    """Measure, print, and write the results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--measure", nargs=3, metavar=("LOADER", "PATH", "TINY"), help="one memory measurement, as JSON"
    )
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if arguments.measure:
        print(json.dumps(measure_memory(*arguments.measure)))
        return
    results = measure(arguments.rounds)
    for name, result in results.items():
        target = TARGETS.get(name)
        verdict = "" if target is None else f"   target {target}  {'met' if result['ratio'] <= target else 'MISSED'}"
        print(f"{name:24} {result['ratio']:.3f}{verdict}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
