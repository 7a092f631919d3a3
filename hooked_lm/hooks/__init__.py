"""Hook points, and the registry that attaches, checks and removes what hooks into them."""

from hooked_lm.hooks.point import Direction, HookFunction, HookHandle, HookPoint, protect
from hooked_lm.hooks.root_module import HookedRootModule, HookSpec, recorded_part

__all__ = [
    "Direction",
    "HookFunction",
    "HookHandle",
    "HookPoint",
    "HookSpec",
    "HookedRootModule",
    "protect",
    "recorded_part",
]
