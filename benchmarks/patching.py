"""Activation patching by the sweep beside the plain hooked loop: grids on a GPT-2-small-sized random model, as ratios.

python -m benchmarks.patching [--loop-cells 24] [--long] [--json results.json]

The loop's time is that of some of its cells, evenly spread, times their number: every cell of a loop takes as long as
any other. Values are compared on those cells.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.forward import machine
from hooked_lm import HookedTransformer, HookedTransformerConfig, Intervention
from hooked_lm.metrics import logit_diff
from hooked_lm.sweep import sweep

# What the project asks of itself: how many times faster than the loop.
TARGETS = {"residual grid 12x32": 8.0, "head grid 12x12": 4.0, "residual grid 12x128": 12.0}


def build_model() -> HookedTransformer:
    """Return a random model of GPT-2 small's size."""
    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=12, d_model=768, n_heads=12, n_ctx=1024, d_vocab=50257, act_fn="gelu_new", seed=0
        )
    )


def grids(model: HookedTransformer, n_pos: int) -> dict[str, Callable[[], tuple[torch.Tensor, list[Intervention]]]]:
    """Return, by name, functions that make a corrupted prompt and the cells of a grid."""
    layers, heads = range(model.cfg.n_layers), range(model.cfg.n_heads)
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = (torch.randint(0, model.cfg.d_vocab, (1, n_pos), generator=generator) for _ in range(2))
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, names_filter=["blocks.*.hook_resid_pre", "blocks.*.attn.hook_z"])

    def residual() -> tuple[torch.Tensor, list[Intervention]]:
        return corrupted, [
            Intervention(f"blocks.{layer}.hook_resid_pre", "replace", cache["resid_pre", layer][:, pos], pos=pos)
            for layer in layers
            for pos in range(n_pos)
        ]

    def by_head() -> tuple[torch.Tensor, list[Intervention]]:
        return corrupted, [
            Intervention(f"blocks.{layer}.attn.hook_z", "replace", cache["z", layer][:, :, head], head=head)
            for layer in layers
            for head in heads
        ]

    def by_head_and_position() -> tuple[torch.Tensor, list[Intervention]]:
        return corrupted, [
            Intervention(f"blocks.{layer}.attn.hook_z", "replace", cache["z", layer][:, pos, head], head=head, pos=pos)
            for layer in layers
            for head in heads
            for pos in range(n_pos)
        ]

    return {
        f"residual grid 12x{n_pos}": residual,
        "head grid 12x12": by_head,
        f"head-by-position grid 12x12x{n_pos}": by_head_and_position,
    }


def measure(
    model: HookedTransformer, tokens: torch.Tensor, cells: Sequence[Intervention], n_loop: int
) -> dict[str, Any]:
    """Return the seconds of sweep and loop, their ratio, and the largest difference of their values."""
    metric = logit_diff(3, 4)
    sample = torch.linspace(0, len(cells) - 1, min(n_loop, len(cells))).long().tolist()

    def seconds(function: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        values = function()
        return time.perf_counter() - start, values

    picked = [cells[index] for index in sample]
    before, looped = seconds(lambda: sweep(model, tokens, picked, metric, incremental=False, verbose=False))
    swept, values = seconds(lambda: sweep(model, tokens, cells, metric, verbose=False))
    after, _ = seconds(lambda: sweep(model, tokens, picked, metric, incremental=False, verbose=False))
    loop = (before + after) / 2 * len(cells) / len(sample)
    return {
        "cells": len(cells),
        "sweep_seconds": swept,
        "loop_seconds": loop,
        "ratio": loop / swept,
        "largest_difference": (values[sample] - looped).abs().max().item(),
    }


def main() -> None:
    """Measure, print, and write the results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loop-cells", type=int, default=24, help="cells of the loop that are timed")
    parser.add_argument("--long", action="store_true", help="the residual grid at 128 tokens too")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = build_model()
    wanted = grids(model, 32)
    if arguments.long:
        wanted |= {name: make for name, make in grids(model, 128).items() if name.startswith("residual")}
    results = {}
    for name, make in wanted.items():
        tokens, cells = make()
        result = results[name] = measure(model, tokens, cells, arguments.loop_cells)
        target = TARGETS.get(name)
        verdict = "" if target is None else f"   target {target}  {'met' if result['ratio'] >= target else 'MISSED'}"
        print(
            f"{name:34} {result['sweep_seconds']:7.1f} s, loop {result['loop_seconds']:7.1f} s, "
            f"ratio {result['ratio']:5.1f}, difference {result['largest_difference']:.1e}{verdict}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
