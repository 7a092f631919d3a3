"""Timing in turn: A B A B ..., so that a machine whose speed drifts treats both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of several runs.

    Attributes:
        seconds: one entry a round.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: Timing) -> tuple[float, float, float]:
        """Return the (median, smallest, largest) ratio to another timing, round by round."""
        ratios = [mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def time_in_turn(functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Time each function once a round, one after the other, and return what each took."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(warmup + rounds):
        # Every other round goes backwards, so that nobody always follows the same neighbour.
        order = list(functions.items())[:: 1 if index % 2 else -1]
        for name, function in order:
            start = time.perf_counter()
            function()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
