"""Named ranges around the parts of a model and around hooks, by which a profile knows what an operation belongs to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.autograd.profiler import record_function

from hooked_lm.hooked_model import HookedModel
from hooked_lm.hooks import HookPoint

__all__ = ["HOOK", "PART", "in_range", "parts_of", "ranges_around"]

PART, HOOK = "hooked_lm part: ", "hooked_lm hook: "


def parts_of(model: HookedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that a profile tells apart: embeddings, blocks with their norms, attention and MLP, the end.

    Args:
        model: a `HookedTransformer`.
    """
    for name in ("embed", "pos_embed", "ln_final", "unembed"):
        module = getattr(model, name, None)
        if isinstance(module, nn.Module):
            yield name, module
    for layer, block in enumerate(model.blocks):
        yield f"blocks.{layer}", block
        for name, child in block.named_children():
            if not isinstance(child, HookPoint):
                yield f"blocks.{layer}.{name}", child


@contextmanager
def ranges_around(model: HookedModel) -> Generator[None, None, None]:
    """Within the `with` block, give each part of a model a range in the profiler's record. It is left as it was.

    Args:
        model: a `HookedTransformer`.
    """
    open_ranges: list[record_function] = []

    def begin(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object) -> None:
            open_ranges.append(record_function(PART + name))
            open_ranges[-1].__enter__()

        return hook

    def end(module: nn.Module, args: object, output: object) -> None:
        open_ranges.pop().__exit__(None, None, None)

    handles = []
    try:
        for name, part in parts_of(model):
            handles.append(part.register_forward_pre_hook(begin(name)))
            handles.append(part.register_forward_hook(end, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        while open_ranges:  # an interrupt runs no hooks after it
            end(nn.Identity(), None, None)


def in_range(function: Callable[[Tensor, HookPoint], object], name: str) -> Callable[[Tensor, HookPoint], object]:
    """Return a hook function whose work has a range in the profiler's record.

    Args:
        function: the hook.
        name: of the range.
    """

    @functools.wraps(function)
    def named(activation: Tensor, hook: HookPoint) -> object:
        with record_function(HOOK + name):
            return function(activation, hook)

    return named
