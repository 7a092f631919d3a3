"""Hook points, and the registry that attaches, checks and removes hooks."""

from hooked_lm.hooks.caching import HookedRootModule
from hooked_lm.hooks.handle import Direction, HookFunction, HookHandle
from hooked_lm.hooks.holder import HookHolder
from hooked_lm.hooks.point import HookPoint, any_live, carries_run, is_live, may_edit_forward
from hooked_lm.hooks.recorder import Recorder, recorded_part
from hooked_lm.hooks.root_module import HookSpec, ModelOutput
from hooked_lm.hooks.thread import (
    KeptPositions,
    Pass,
    current_pass,
    in_pass,
    new_pass,
    passes_begun,
    reading_again,
    without_hooks,
)

__all__ = [
    "Direction",
    "HookFunction",
    "HookHandle",
    "HookHolder",
    "HookPoint",
    "HookSpec",
    "HookedRootModule",
    "KeptPositions",
    "ModelOutput",
    "Pass",
    "Recorder",
    "any_live",
    "carries_run",
    "current_pass",
    "in_pass",
    "is_live",
    "may_edit_forward",
    "new_pass",
    "passes_begun",
    "reading_again",
    "recorded_part",
    "without_hooks",
]
