"""Attention's inputs where heads read copies of the stream of their own, and how the block's norm applies to them.

`hook_attn_in`, `hook_q_input`, `hook_k_input` and `hook_v_input` show a copy of the stream per head, before the norm.
The norm's own hook points show the shared stream. What a head reads is then

    shared + (norm(copy) - norm(stream))

where `shared` is the norm of the stream as the norm's hooks leave it. A copy that nobody has edited adds exactly
nothing, so observing the copies changes no number; and the gradient at the norm's hook points is that of all heads,
while each copy's is that of its own head.
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
    """What queries, keys or values read before the norm.

    Attributes:
        stream: the shared stream [batch pos d_model], or a copy of it per head [batch pos head d_model].
        before: pairs of copies before and after a hook point where they may have been edited; none if all are alike.
    """

    stream: Tensor
    edits: tuple[tuple[Tensor, Tensor], ...] = ()

    def edited_heads(self) -> list[bool]:
        """Return, for each head, whether its copy differs from the stream."""
        heads = self.stream.shape[2]
        found = torch.zeros(heads, dtype=torch.bool, device=self.stream.device)
        for before, after in self.edits:
            if before.shape != after.shape:  # another number of prompts
                return [True] * heads
            different = (before != after).flatten(3).any(3).flatten(0, 1).any(0)
            # Copies per query head, of which several share a key-value head.
            found |= different if len(different) == heads else different.unflatten(0, (heads, -1)).any(1)
        return found.tolist()

    def shown_to(self, point: nn.Module, heads: int) -> HeadSource:
        """Return the source as a hook point leaves its copies.

        Where a key-value head serves several query heads whose `hook_attn_in` differ, it reads their mean.
        """
        stream = self.stream
        if stream.ndim == 4 and stream.shape[2] != heads:
            stream = stream.unflatten(2, (heads, -1)).mean(3)
        if not is_live(point):
            return HeadSource(stream, self.edits)
        # A view of its own: its gradient is that of these readings alone.
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
        ln1: the norm that attention reads through; None for none.
        points: `hook_attn_in`, `hook_q_input`, `hook_k_input`, `hook_v_input`.
        resid_pre: the stream that enters the block.
        n_heads, n_kv_heads: how many copies queries, and keys and values, have.
    """
    attn_in, q_input, k_input, v_input = points
    source = HeadSource(resid_pre).shown_to(attn_in, n_heads)
    sources = (
        source.shown_to(q_input, n_heads),
        source.shown_to(k_input, n_kv_heads),
        source.shown_to(v_input, n_kv_heads),
    )
    if ln1 is None:
        return sources[0].stream, sources[1].stream, sources[2].stream
    if all(one.stream is resid_pre for one in sources):
        shared = ln1(resid_pre)
        return shared, shared, shared
    norm = _HookedNorm(ln1, resid_pre)
    return norm(sources[0]), norm(sources[1]), norm(sources[2])


class _HookedNorm:
    """The norm of the stream, as its hooks leave it, and of copies of the stream in terms of it."""

    def __init__(self, ln1: nn.Module, resid_pre: Tensor) -> None:
        self.ln1, self.resid_pre = ln1, resid_pre
        points = [module for name, module in ln1.named_children() if name.startswith("hook_")]
        self.hooked = any_live(points)
        self.edited = any(may_edit_forward(point) for point in points)
        # With hooks it is computed for them to see, even if no head reads it.
        self.shared: Tensor | None = ln1(resid_pre) if self.hooked else None

    def __call__(self, source: HeadSource) -> Tensor:
        stream: Tensor = source.stream
        if stream is self.resid_pre:
            shared: Tensor = self.ln1(stream) if self.shared is None else self.shared
            self.shared = shared
            return shared
        if not self.hooked or self.shared is None:
            return self._quietly(stream)
        if stream.shape[0] != self.shared.shape[0]:
            return self._head_by_head(stream, range(stream.shape[2]))
        if not self.edited:
            return self.shared[:, :, None] + (self._quietly(stream) - self._quietly(self.resid_pre)[:, :, None])
        return self._edited_norm(source)

    def _quietly(self, x: Tensor) -> Tensor:
        with without_hooks():
            normalized: Tensor = self.ln1(x)
        return normalized

    def _as_edited(self, x: Tensor) -> Tensor:
        """The norm under its editing hooks."""
        with editing_hooks_only():
            normalized: Tensor = self.ln1(x)
        return normalized

    def _head_by_head(self, stream: Tensor, heads: range) -> Tensor:
        # Hooks at a norm know activations without a head axis.
        return torch.stack([self._as_edited(stream[:, :, head]) for head in heads], 2)

    def _edited_norm(self, source: HeadSource) -> Tensor:
        """The norm of the copies where hooks edit the norm: its hooks act on each edited copy too.

        Copies that are the stream itself read what the hooks have made of the stream's norm, once.
        """
        assert self.shared is not None
        stream, shared = source.stream, self.shared[:, :, None].expand_as(source.stream)
        edited = source.edited_heads()
        if not any(edited) and not torch.is_grad_enabled():
            return shared
        change = self._head_by_head(stream, range(stream.shape[2])) - self._as_edited(self.resid_pre)[:, :, None]
        unedited = torch.tensor([not one for one in edited], device=stream.device)[:, None]
        # Where nothing was edited the change is nothing, whatever the norm's hooks draw; only its gradient counts.
        return shared + torch.where(unedited, change - change.detach(), change)
