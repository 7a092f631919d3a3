"""Interventions as data: the object, its files, and the model's methods that run it (`running`)."""

from hooked_lm.interventions.axis_sizes import axis_size
from hooked_lm.interventions.files import load_interventions, save_interventions
from hooked_lm.interventions.intervention import (
    OPERATIONS,
    Intervention,
    Operation,
    Recorded,
    Selection,
    Selections,
    draw_prompts,
)

__all__ = [
    "OPERATIONS",
    "Intervention",
    "Operation",
    "Recorded",
    "Selection",
    "Selections",
    "axis_size",
    "draw_prompts",
    "load_interventions",
    "save_interventions",
]
