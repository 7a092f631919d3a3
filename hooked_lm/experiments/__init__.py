"""The field's introductory experiments, as functions: each returns its numbers, on any model that can do the task.

`decode_early`: when an answer appears; `patch_ioi`: where two names are told apart; `continue_repeats`: how a repeat is
recognised; `transplant_task`: the vector that carries a task; `find_name_movers`: the heads that give the name.

`Bench(folder)` records any experiment: its code, arguments, model, seeds, environment and results.
"""

from __future__ import annotations

from hooked_lm.experiments.bench import (
    Bench,
    Difference,
    ModelFingerprint,
    NotKept,
    Record,
    RecordDiff,
    RecordEntry,
    Rerun,
    Tool,
    Tools,
    Versions,
)
from hooked_lm.experiments.early_decoding import EarlyDecoding, decode_early
from hooked_lm.experiments.name_movers import NameMovers, find_name_movers
from hooked_lm.experiments.repeats import Repeats, continue_repeats
from hooked_lm.experiments.residual_patching import IOIPatching, patch_ioi
from hooked_lm.experiments.task_vectors import TaskVectors, transplant_task

__all__ = [
    "Bench",
    "Difference",
    "EarlyDecoding",
    "IOIPatching",
    "ModelFingerprint",
    "NameMovers",
    "NotKept",
    "Record",
    "RecordDiff",
    "RecordEntry",
    "Repeats",
    "Rerun",
    "TaskVectors",
    "Tool",
    "Tools",
    "Versions",
    "continue_repeats",
    "decode_early",
    "find_name_movers",
    "patch_ioi",
    "transplant_task",
]
