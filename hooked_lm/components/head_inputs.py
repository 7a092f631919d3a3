"""Attention's inputs when hooks give each head a copy of the stream, and how the block's norm applies to the copies.

`hook_attn_in`, `hook_q_input`, `hook_k_input` and `hook_v_input` have a copy of the stream per head, before the norm.
The norm's own hook points have the shared stream. The input of a head is then

    shared + (norm(copy) - norm(stream))

where `shared` is the norm of the stream after the norm's hooks. The difference is exactly zero for an unedited copy, so
observing the copies changes no number. The gradient at the norm's hook points is that of all heads, and the gradient at
a copy is that of its head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm.hooks import any_live, carries_run, is_live, may_edit_forward, without_hooks
from hooked_lm.hooks.thread import editing_hooks_only

__all__ = ["HeadInputs", "HeadSource", "per_head_inputs"]

HeadInputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class HeadSource:
    """The input of queries, keys or values, before the norm.

    Attributes:
        stream: the shared stream [batch pos d_model], or a copy of it per head [batch pos head d_model].
        edits: for each hook point that may have edited the copies, the copies before and after it.
    """

    stream: Tensor
    edits: tuple[tuple[Tensor, Tensor], ...] = ()

    def edited_heads(self) -> list[bool]:
        """Return, for each head, whether its copy differs from the stream."""
        heads = self.stream.shape[2]
        found = torch.zeros(heads, dtype=torch.bool, device=self.stream.device)
        for before, after in self.edits:
            if before.shape != after.shape:  # a hook changed the number of prompts
                return [True] * heads
            different = (before != after).flatten(3).any(3).flatten(0, 1).any(0)
            # With one copy per query head, a key-value head differs if one of its query heads' copies does.
            found |= different if len(different) == heads else different.unflatten(0, (heads, -1)).any(1)
        return found.tolist()

    def through(self, point: nn.Module, heads: int) -> HeadSource:
        """Return the source after a hook point.

        If the query heads of a key-value head have different copies at `hook_attn_in`, the key-value head gets their
        mean.
        """
        stream = self.stream
        if stream.ndim == 4 and stream.shape[2] != heads:
            stream = stream.unflatten(2, (heads, -1)).mean(3)
        if not is_live(point):
            return HeadSource(stream, self.edits)
        # A separate view, so that the gradient at the hook point is that of these heads alone.
        copies = stream[:, :, None].expand(-1, -1, heads, -1) if stream.ndim == 3 else stream.view_as(stream)
        carries = stream.ndim == 4 or carries_run(point, torch.is_grad_enabled())
        edited = may_edit_forward(point)
        shown = point(copies)
        if not carries:
            return self
        return HeadSource(shown, (*self.edits, (copies, shown)) if edited else self.edits)


def per_head_inputs(
    ln1: nn.Module | None,
    points: tuple[nn.Module, nn.Module, nn.Module, nn.Module],
    resid_pre: Float[Tensor, "batch pos d_model"],
    n_heads: int,
    n_kv_heads: int,
) -> HeadInputs:
    """Return the normalised inputs of queries, keys and values, [batch pos d_model] or with a head axis.

    Args:
        ln1: the norm before attention; None for none.
        points: `hook_attn_in`, `hook_q_input`, `hook_k_input`, `hook_v_input`.
        resid_pre: the residual stream at the block's input.
        n_heads, n_kv_heads: the number of copies for queries, and for keys and values.
    """
    attn_in, q_input, k_input, v_input = points
    source = HeadSource(resid_pre).through(attn_in, n_heads)
    sources = (
        source.through(q_input, n_heads),
        source.through(k_input, n_kv_heads),
        source.through(v_input, n_kv_heads),
    )
    if ln1 is None:
        return sources[0].stream, sources[1].stream, sources[2].stream
    if all(one.stream is resid_pre for one in sources):
        shared = ln1(resid_pre)
        return shared, shared, shared
    norm = _HookedNorm(ln1, resid_pre)
    return norm(sources[0]), norm(sources[1]), norm(sources[2])


class _HookedNorm:
    """The norm of the stream after its hooks, and the norms of copies of the stream computed from it."""

    def __init__(self, ln1: nn.Module, resid_pre: Tensor) -> None:
        self.ln1, self.resid_pre = ln1, resid_pre
        points = [module for name, module in ln1.named_children() if name.startswith("hook_")]
        self.hooked = any_live(points)
        self.edited = any(may_edit_forward(point) for point in points)
        # With hooks it is computed even if no head uses it, so that the hooks run.
        self.shared: Tensor | None = ln1(resid_pre) if self.hooked else None

    def __call__(self, source: HeadSource) -> Tensor:
        stream: Tensor = source.stream
        if stream is self.resid_pre:
            shared: Tensor = self.ln1(stream) if self.shared is None else self.shared
            self.shared = shared
            return shared
        if not self.hooked or self.shared is None:
            return self._without_hooks(stream)
        if stream.shape[0] != self.shared.shape[0]:
            return self._head_by_head(stream, range(stream.shape[2]))
        if not self.edited:
            return self.shared[:, :, None] + (
                self._without_hooks(stream) - self._without_hooks(self.resid_pre)[:, :, None]
            )
        return self._edited_norm(source)

    def _without_hooks(self, x: Tensor) -> Tensor:
        with without_hooks():
            normalized: Tensor = self.ln1(x)
        return normalized

    def _as_edited(self, x: Tensor) -> Tensor:
        """Return the norm with its editing hooks only."""
        with editing_hooks_only():
            normalized: Tensor = self.ln1(x)
        return normalized

    def _head_by_head(self, stream: Tensor, heads: range) -> Tensor:
        # Hooks at a norm are written for activations without a head axis.
        return torch.stack([self._as_edited(stream[:, :, head]) for head in heads], 2)

    def _edited_norm(self, source: HeadSource) -> Tensor:
        """Return the norm of the copies when hooks edit the norm: they act on each edited copy too.

        An unedited copy gets the norm of the stream, on which the hooks have run once.
        """
        assert self.shared is not None
        stream, shared = source.stream, self.shared[:, :, None].expand_as(source.stream)
        edited = source.edited_heads()
        if not any(edited) and not torch.is_grad_enabled():
            return shared
        change = self._head_by_head(stream, range(stream.shape[2])) - self._as_edited(self.resid_pre)[:, :, None]
        unedited = torch.tensor([not one for one in edited], device=stream.device)[:, None]
        # An unedited copy has change 0, even if the norm's hooks draw random numbers; only its gradient is kept.
        return shared + torch.where(unedited, change - change.detach(), change)
