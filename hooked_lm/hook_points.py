"""The classic library's path to `HookPoint` and `HookedRootModule`, for existing imports."""

from hooked_lm.hooks import HookedRootModule, HookPoint

__all__ = ["HookPoint", "HookedRootModule"]
