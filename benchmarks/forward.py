"""Forward passes of a GPT-2-small-sized random model beside those of `transformers`, as ratios.

python -m benchmarks.forward [--rounds 15] [--json results.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.timing import time_in_turn
from hooked_lm import HookedTransformer

SHAPES = ((1, 128), (8, 128), (1, 1024))
RESIDUAL = ("blocks.*.hook_resid_pre", "blocks.*.hook_resid_mid", "blocks.*.hook_resid_post")
# What the project asks of itself; None where nothing is asked.
TARGETS = {
    "forward 1x128": 1.0,
    "forward 8x128": 0.9,
    "forward 1x1024": 0.9,
    "residual cache": 1.03,
    "no-op hooks": None,
}


def build_models() -> tuple[HookedTransformer, GPT2LMHeadModel]:
    """Return our model and transformers', with the same random weights, the latter with its default attention."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config()).eval()
    ours = HookedTransformer.from_pretrained_no_processing("gpt2-random", hf_model=theirs, tokenizer=_NoTokenizer())
    return ours, theirs


class _NoTokenizer:
    """Stands in for a tokenizer: the benchmark reads tokens only."""

    bos_token = eos_token = pad_token = "<none>"

    def get_vocab(self) -> dict[str, int]:
        return {"<none>": 0}


def measure(rounds: int) -> dict[str, dict[str, Any]]:
    """Return, for each comparison, the seconds of both sides and their ratio (median, smallest, largest)."""
    ours, theirs = build_models()
    results = {}
    for batch, pos in SHAPES:
        tokens = torch.randint(0, ours.cfg.d_vocab, (batch, pos))
        check_equal(ours, theirs, tokens)
        results[f"forward {batch}x{pos}"] = compare(
            lambda tokens=tokens: ours(tokens), lambda tokens=tokens: theirs(tokens, use_cache=False).logits, rounds
        )
    tokens = torch.randint(0, ours.cfg.d_vocab, (1, 128))
    results["residual cache"] = compare(
        lambda: ours.run_with_cache(tokens, names_filter=RESIDUAL), lambda: ours(tokens), 3 * rounds
    )
    # Hooks that came and went: nothing listens any more.
    with ours.hooks(fwd_hooks=[(lambda name: True, lambda value, hook: None)]):
        pass
    results["no-op hooks"] = compare(lambda: ours(tokens), lambda: ours(tokens), 3 * rounds)
    return results


def check_equal(ours: HookedTransformer, theirs: GPT2LMHeadModel, tokens: torch.Tensor) -> None:
    """Fail unless both sides compute the same thing."""
    error = (ours(tokens) - theirs(tokens).logits).abs().max().item()
    if error > 1e-4:
        raise AssertionError(f"the logits differ by {error}: there is nothing to compare")


def compare(mine: Callable[[], object], other: Callable[[], object], rounds: int) -> dict[str, Any]:
    """Return the medians in seconds and the ratio mine / other."""
    timings = time_in_turn({"mine": mine, "other": other}, rounds)
    median, low, high = timings["mine"].over(timings["other"])
    return {
        "seconds": timings["mine"].median,
        "seconds_other": timings["other"].median,
        "ratio": median,
        "ratio_range": [low, high],
    }


def import_seconds(rounds: int = 5) -> dict[str, float]:
    """Return what `import hooked_lm` adds to `import torch`, in a fresh interpreter: the median of differences."""

    def seconds(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    pairs = [(seconds("import torch"), seconds("import torch, hooked_lm")) for _ in range(rounds)]
    differences = sorted(both - alone for alone, both in pairs)
    return {"torch": sorted(alone for alone, _ in pairs)[rounds // 2], "hooked_lm adds": differences[rounds // 2]}


def machine() -> dict[str, Any]:
    """Describe where this was measured."""
    cpu = next((line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")), "unknown")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| what | ours, ms | other, ms | ratio | range | target |", "|---|---|---|---|---|---|"]
    for name, row in results.items():
        low, high = row["ratio_range"]
        target = TARGETS[name]
        lines.append(
            f"| {name} | {1e3 * row['seconds']:.1f} | {1e3 * row['seconds_other']:.1f} | {row['ratio']:.3f} "
            f"| {low:.3f}-{high:.3f} | {'' if target is None else target} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        results = measure(arguments.rounds)
    imports = import_seconds()
    print(table(results))
    print(f"\nimport torch: {imports['torch']:.2f} s; hooked_lm adds {imports['hooked_lm adds']:.3f} s")
    print(machine())
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "results": results, "import": imports}, indent=2))


if __name__ == "__main__":
    main()
