"""Counts for Prometheus, and a log of one JSON object a line."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Mapping

__all__ = ["Counts", "log"]

_LOGGER = logging.getLogger("hooked_lm.remote")


def log(event: str, **fields: object) -> None:
    """Write one line of JSON to the log `hooked_lm.remote`.

    Args:
        event: what happened.
        **fields: its circumstances; never a token or a prompt.
    """
    _LOGGER.info(json.dumps({"time": round(time.time(), 3), "event": event, **fields}))


class Counts:
    """Counters, which only grow."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def add(self, name: str, labels: str = "", amount: float = 1) -> None:
        """Add to a counter.

        Args:
            name: of the counter, without the prefix.
            labels: in Prometheus' form, `state="done"`.
            amount: what to add.
        """
        with self._lock:
            self._counts[name][labels] += amount

    def text(self, gauges: Mapping[str, float]) -> str:
        """Return counters and gauges in Prometheus' text format.

        Args:
            gauges: name -> present value.
        """
        lines = []
        with self._lock:
            for name, by_labels in sorted(self._counts.items()):
                lines.append(f"# TYPE hooked_lm_{name} counter")
                for labels, value in sorted(by_labels.items()):
                    shown = f"{{{labels}}}" if labels else ""
                    lines.append(f"hooked_lm_{name}{shown} {value:.17g}")
        for name, value in sorted(gauges.items()):
            lines += [f"# TYPE hooked_lm_{name} gauge", f"hooked_lm_{name} {value:.17g}"]
        return "\n".join(lines) + "\n"
