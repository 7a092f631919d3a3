"""Everything this package uses of torch that has no public name, each guarded and with a fallback.

Where a torch of another version lacks a name, what stands here does without: more slowly or more cautiously, never
with another result.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module

__all__ = [
    "ONEDNN_LINEAR",
    "has_global_module_hooks",
    "has_gradient_hooks",
    "has_module_hooks",
    "memory_reference",
    "only_plain_operations",
    "times_written",
    "transforms_active",
    "values_readable",
    "without_torch_functions",
]

try:
    from torch.multiprocessing.reductions import StorageWeakRef
except ImportError:
    StorageWeakRef = None  # type: ignore[assignment, misc]


def in_backward() -> bool:
    """Return whether autograd is running a backward pass in this thread; False where torch does not say."""
    try:
        return bool(torch._C._current_graph_task_id() != -1)
    except AttributeError:
        return False


def has_any_module_hooks(module: nn.Module) -> bool:
    """Return whether torch's own hooks, of either direction, are registered at a module; True where torch is silent."""
    try:
        backward = module._backward_hooks or module._backward_pre_hooks
        return bool(backward or module._forward_hooks or module._forward_pre_hooks)
    except AttributeError:
        return True


def has_gradient_hooks(tensor: Tensor) -> bool:
    """Return whether functions are registered that act on a tensor's gradient; False where torch does not say."""
    return any(bool(getattr(tensor, name, ())) for name in ("_backward_hooks", "_post_accumulate_grad_hooks"))


def has_module_hooks(module: nn.Module) -> bool:
    """Return whether forward hooks of torch's are registered at a module; True where torch does not say."""
    try:
        return bool(module._forward_hooks or module._forward_pre_hooks)
    except AttributeError:
        return True


def has_global_module_hooks() -> bool:
    """Return whether torch runs hooks at every module (`register_module_forward_hook` and its like)."""
    registries = ("_global_forward_hooks", "_global_forward_pre_hooks")
    return any(bool(getattr(_module, name, ())) for name in registries)


def _find_onednn() -> Callable[..., Tensor] | None:
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        found: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
    except (AttributeError, RuntimeError):
        return None
    return found


# `x weight^T + bias` by oneDNN, which torch's compiler puts in place of `F.linear`; None where this torch has none.
ONEDNN_LINEAR = _find_onednn()


def only_plain_operations() -> bool:
    """Return whether an operation that has no registered backward, batching rule or autocast rule may be called now.

    Not under the compiler, autocast, `torch.func` transforms, dispatch modes or forward-mode differentiation. A torch
    that does not say which of them are on counts as one where they are.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    try:
        transformed = torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack()
        return not transformed and forward_ad._current_level < 0
    except AttributeError:
        return False


def without_torch_functions() -> AbstractContextManager[object]:
    """Return a `with` block in which subclasses of Tensor are not asked to compute a function of theirs themselves."""
    disabled: AbstractContextManager[object] = torch._C.DisableTorchFunctionSubclass()
    return disabled


def transforms_active() -> bool:
    """Return whether a `torch.func` transform or forward-mode differentiation is on.

    A tensor's value is then not all there is to it: it may have a tangent too, or stand for a batch. A torch that does
    not say counts as one without them; it raises where it lacks a rule for an operation.
    """
    if torch.compiler.is_compiling():
        return False
    try:
        return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0
    except AttributeError:
        return False


def values_readable(tensor: Tensor) -> bool:
    """Return whether Python can read a tensor's values: not in a compiled graph, nor if `torch.vmap` batches them.

    True where torch does not say; reading then raises.

    Args:
        tensor: of any shape.
    """
    if torch.compiler.is_compiling():
        return False
    try:
        functorch = torch._C._functorch
        while functorch.is_functorch_wrapped_tensor(tensor):
            if functorch.is_batchedtensor(tensor):
                return False
            tensor = functorch.get_unwrapped(tensor)
    except AttributeError:
        return True
    return True


def times_written(tensor: Tensor) -> int:
    """Return how often a tensor was written to; 0 always where torch does not count."""
    return 0 if tensor.is_inference() else int(getattr(tensor, "_version", 0))


def memory_reference(tensor: Tensor) -> Hashable:
    """Return what is equal for tensors that share memory, and for no others as long as one of them lives.

    Weak where torch has a weak reference to memory: it then keeps nothing alive, and memory that has been freed and
    used again is another.
    """
    return tensor.untyped_storage() if StorageWeakRef is None else StorageWeakRef(tensor.untyped_storage())
