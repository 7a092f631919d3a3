"""The bench: a folder in which experiments are recorded, listed, compared, tested and run again."""

from __future__ import annotations

from hooked_lm.experiments.bench.bench import Bench
from hooked_lm.experiments.bench.diff import Difference, RecordDiff
from hooked_lm.experiments.bench.fingerprint import ModelFingerprint
from hooked_lm.experiments.bench.listing import Versions
from hooked_lm.experiments.bench.record import Record
from hooked_lm.experiments.bench.rerun import Rerun
from hooked_lm.experiments.bench.store import RecordEntry
from hooked_lm.experiments.bench.tools import Tool, Tools
from hooked_lm.experiments.bench.values import NotKept

__all__ = [
    "Bench",
    "Difference",
    "ModelFingerprint",
    "NotKept",
    "Record",
    "RecordDiff",
    "RecordEntry",
    "Rerun",
    "Tool",
    "Tools",
    "Versions",
]
