"""Profiles: where a run's time and memory go, and what hooks cost.

    found = profile(model, prompts, fwd_hooks=[("blocks.2.hook_resid_post", hook)])
    print(found.table())

`profile_call` does the same for any function, by operations of torch only.
"""

from __future__ import annotations

from hooked_lm.profiling.measuring import profile, profile_call
from hooked_lm.profiling.result import CallProfile, HookCost, Operation, PartCost, Profile

__all__ = ["CallProfile", "HookCost", "Operation", "PartCost", "Profile", "profile", "profile_call"]
