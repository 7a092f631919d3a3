"""A sweep of 10,000 cells by spawned workers, beside one process: `python -m benchmarks.workers`.

Not part of `python -m benchmarks`: it wants as many free processors as there are workers, and a minute.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from hooked_lm import HookedTransformer, HookedTransformerConfig, Intervention, metrics
from hooked_lm.components.kernels import describe_kernels
from hooked_lm.sweep import sweep
from hooked_lm.workers import Spawned

__all__ = ["main"]

_SITES = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out")
_LENGTH = 32


def main() -> None:
    """Print the ratio of times, round by round, and whether the scores are equal to the bit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    # One thread here and in each worker: sums depend on the number of threads.
    torch.set_num_threads(1)
    model = _model(asked.layers, asked.width)
    cells = _cells(model, asked.cells)
    tokens = torch.randint(0, model.cfg.d_vocab, (1, _LENGTH), generator=torch.Generator().manual_seed(0))
    metric = metrics.logit_diff([1], [2])
    ratios = []
    with Spawned(model, asked.workers, threads=1) as workers:
        sweep(model, tokens, cells[:8], metric, workers=workers, verbose=False)
        for _ in range(asked.rounds):
            here, alone = _timed(lambda: sweep(model, tokens, cells, metric, verbose=False))
            there, shared = _timed(lambda: sweep(model, tokens, cells, metric, workers=workers, verbose=False))
            ratios.append(shared / alone)
            sys.stdout.write(f"{alone:.2f} s alone, {shared:.2f} s shared out, equal: {torch.equal(here, there)}\n")
    ratio, processor = statistics.median(ratios), describe_kernels()["processor"]
    sys.stdout.write(
        f"{asked.workers} workers take {ratio:.2f} of the time of one process ({processor}, one thread each)\n"
    )


def _timed(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    begun = time.perf_counter()
    found = work()
    return found, time.perf_counter() - begun


def _model(n_layers: int, width: int) -> HookedTransformer:
    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=n_layers,
            d_model=width,
            n_heads=width // 32,
            d_head=32,
            d_mlp=4 * width,
            n_ctx=_LENGTH,
            d_vocab=1000,
            act_fn="gelu",
            seed=0,
        )
    )


def _cells(model: HookedTransformer, number: int) -> list[Intervention]:
    generator = torch.Generator().manual_seed(1)
    places = [(layer, site, pos) for layer in range(model.cfg.n_layers) for site in _SITES for pos in range(_LENGTH)]
    return [
        Intervention(f"blocks.{layer}.{site}", "add", torch.randn(model.cfg.d_model, generator=generator), pos=pos)
        for layer, site, pos in (places[index % len(places)] for index in range(number))
    ]


if __name__ == "__main__":
    main()
