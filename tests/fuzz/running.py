"""Running cases one after another, in a process of their own."""

from __future__ import annotations

import collections
import time
import traceback

import torch

from tests.fuzz.case import Case
from tests.fuzz.ways import WAYS


def run_case(way: str, seed: int) -> str | None:
    """Run one case; return what went wrong, or None."""
    try:
        WAYS[way](Case(f"{way} {seed}"))
    except Exception:
        return traceback.format_exc()
    return None


def work(
    start: int, step: int, ways: list[str], until: float
) -> tuple[collections.Counter[str], list[tuple[str, int, str]]]:
    """Run every `step`-th seed until a time; return how many cases of each way there were, and the findings."""
    torch.set_num_threads(1)
    counts: collections.Counter[str] = collections.Counter()
    findings = []
    seed = start
    while time.monotonic() < until and len(findings) < 5:
        for way in ways:
            wrong = run_case(way, seed)
            counts[way] += 1
            if wrong is not None:
                findings.append((way, seed, wrong))
        seed += step
    return counts, findings
