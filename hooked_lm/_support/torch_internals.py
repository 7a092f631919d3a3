"""Everything this package uses of torch that has no public name, each guarded and with a fallback.

Where a torch of another version lacks a name, what stands here does without: more slowly or more cautiously, never
with another result.
"""

from __future__ import annotations

from torch.nn.modules import module as _module


def has_global_module_hooks() -> bool:
    """Return whether torch runs hooks at every module (`register_module_forward_hook` and its like)."""
    registries = ("_global_forward_hooks", "_global_forward_pre_hooks")
    return any(bool(getattr(_module, name, ())) for name in registries)
