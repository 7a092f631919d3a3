"""Attention's inputs when hooks give each head a copy of the stream, and how the block's norm applies to the copies.

`hook_attn_in`, `hook_q_input`, `hook_k_input` and `hook_v_input` have a copy of the stream per head, before the norm.
The norm's own hook points have the shared stream, once. A head whose copy is unedited reads the shared norm after its
hooks, so observing the copies changes no number and calls no hook of the norm a second time; the gradient at its copy
is that of its own head. A head whose copy is edited reads the norm of that copy, on which the norm's editing hooks,
and backward hooks, act too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from hooked_lm._support.torch_internals import transforms_active
from hooked_lm.components.norm import is_plain_norm
from hooked_lm.components.ranks import Ranks
from hooked_lm.hooks import HookPoint, any_live, carries_run, is_live, may_edit_forward
from hooked_lm.hooks.thread import GradientSwitch, editing_hooks_only, switched_gradients

__all__ = ["HeadInputs", "HeadSource", "ReadOfCopies", "per_head_inputs"]

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
            if before.shape != after.shape or after.is_meta:  # another number of prompts, or no values to compare
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
    *,
    with_shared: bool = False,
    ranks: Ranks | None = None,
) -> HeadInputs:
    """Return the normalised inputs of queries, keys and values, [batch pos d_model] or with a head axis.

    Args:
        ln1: the norm before attention; None for none.
        points: `hook_attn_in`, `hook_q_input`, `hook_k_input`, `hook_v_input`.
        resid_pre: the residual stream at the block's input.
        n_heads, n_kv_heads: the number of copies for queries, and for keys and values.
        with_shared: where heads have copies, one more follows, the shared stream's, which no hook at the copies edits.
        ranks: processes that share out the heads, if several of them have the same key-value heads.
    """
    attn_in, q_input, k_input, v_input = points
    source = HeadSource(resid_pre).through(attn_in, n_heads)
    of_groups = source if ranks is None else _over_ranks(source, resid_pre, n_kv_heads, ranks)
    sources = (
        source.through(q_input, n_heads),
        of_groups.through(k_input, n_kv_heads),
        of_groups.through(v_input, n_kv_heads),
    )
    shared = resid_pre
    if ln1 is None:
        q, k, v = (one.stream for one in sources)
    elif all(one.stream is resid_pre for one in sources):
        q = k = v = ln1(resid_pre)
    else:
        points_of_norm = [module for module in ln1.modules() if isinstance(module, HookPoint)]
        norm = ReadOfCopies(ln1, points_of_norm, resid_pre, plain=is_plain_norm(ln1))
        q, k, v = (norm(one) for one in sources)
        shared = norm.of_the_stream() if with_shared else shared
    if not with_shared:
        return q, k, v
    q, k, v = (one if one.ndim == 3 else torch.cat((one, shared[:, :, None]), 2) for one in (q, k, v))
    return q, k, v


def _over_ranks(
    source: HeadSource, resid_pre: Float[Tensor, "batch pos d_model"], n_kv_heads: int, ranks: Ranks
) -> HeadSource:
    """The mean copy of each key-value head's query heads, those on other ranks among them."""
    if source.stream.ndim == 3:
        return source
    own = source.stream.unflatten(2, (n_kv_heads, -1)).mean(3)
    mean = ranks.mean_of_copies(own)
    return HeadSource(mean, ((resid_pre[:, :, None].expand_as(mean), mean),))


class ReadOfCopies:
    """What heads read of their copies of a stream by way of something with hook points, such as a norm.

    Args:
        read: a function of the stream, position by position.
        points: the hook points within it.
        stream: that the heads share, [batch pos d_model].
        plain: without hooks, `read` takes all copies at once, [batch pos head d_model].
    """

    def __init__(
        self, read: Callable[[Tensor], Tensor], points: Sequence[HookPoint], stream: Tensor, *, plain: bool
    ) -> None:
        self.read, self.points, self.given = read, points, stream
        self.direct = plain and not any_live(points)
        self.switch = GradientSwitch()
        # The stream as this computation begins with it, and what is read of it after the hooks.
        self.stream = stream.view_as(stream)
        self.shared: Tensor | None = None
        if not self.direct:
            # Hooks run once, whether or not a head reads the shared stream.
            with switched_gradients(self.switch):
                self.shared = read(self.stream)

    def __call__(self, source: HeadSource) -> Tensor:
        """What is read of a source: of the stream itself, or copy by copy."""
        copies = source.stream
        if copies is self.given:
            return self.of_the_stream()
        if self.direct:
            return self.read(copies)
        # Under torch.func an equal copy may have a tangent of its own, or be one of a batch.
        edited = [True] * copies.shape[2] if transforms_active() else source.edited_heads()
        if all(edited):
            return torch.stack([self._of_an_edited_copy(copies[:, :, head]) for head in range(len(edited))], 2)
        unedited = self._of_unedited_copies(copies)
        if not any(edited):
            return unedited
        heads = [
            self._of_an_edited_copy(copies[:, :, head]) if one else unedited[:, :, head]
            for head, one in enumerate(edited)
        ]
        return torch.stack(heads, 2)

    def of_the_stream(self) -> Tensor:
        """What is read of the shared stream."""
        self.shared = self.read(self.stream) if self.shared is None else self.shared
        return self.shared

    def _of_an_edited_copy(self, copy: Float[Tensor, "batch pos d_model"]) -> Tensor:
        """What is read of one head's copy, under the editing hooks; they get activations without a head axis."""
        with editing_hooks_only(self.points):
            return self.read(copy)

    def _of_unedited_copies(self, copies: Float[Tensor, "batch pos head d_model"]) -> Tensor:
        shared = self.of_the_stream()
        if torch.is_grad_enabled() and copies.requires_grad:
            heads: Tensor = _UneditedCopies.apply(copies, self.given, shared, self)  # type: ignore[no-untyped-call]
            return heads
        return shared[:, :, None].expand(-1, -1, copies.shape[2], -1)

    def gradient_at(self, gradient: Float[Tensor, "batch pos d_model"]) -> Tensor:
        """Return the gradient at the stream for one at what is read, through hooks' edits and past backward hooks."""
        assert self.shared is not None
        if not self.shared.requires_grad:
            return torch.zeros_like(self.stream)
        self.switch.on = False
        try:
            (found,) = torch.autograd.grad(self.shared, self.stream, gradient, retain_graph=True, allow_unused=True)
        finally:
            self.switch.on = True
        return torch.zeros_like(self.stream) if found is None else found


if TYPE_CHECKING:

    class _CopiesContext(FunctionCtx):
        """What `_UneditedCopies` keeps for its backward pass."""

        norm: ReadOfCopies

else:
    _CopiesContext = FunctionCtx


class _UneditedCopies(torch.autograd.Function):
    """The shared norm for every head, differentiated as if each head's copy were normalised by itself.

    The gradient at a copy is that of its own head. The stream gets the gradient of all heads through the shared norm,
    where backward hooks act on it; so what it gets through the copies is subtracted again.
    """

    @staticmethod
    def forward(ctx: _CopiesContext, copies: Tensor, resid_pre: Tensor, shared: Tensor, norm: ReadOfCopies) -> Tensor:
        ctx.norm = norm
        return shared[:, :, None].expand(-1, -1, copies.shape[2], -1).clone()

    @staticmethod
    def backward(ctx: _CopiesContext, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        with torch.no_grad():
            heads = torch.stack([ctx.norm.gradient_at(gradient[:, :, head]) for head in range(gradient.shape[2])], 2)
        if torch.is_grad_enabled():  # the gradient may be differentiated
            heads = _Once.apply(heads, gradient)  # type: ignore[no-untyped-call]
        return heads, -heads.sum(2), gradient.sum(2), None


class _Once(torch.autograd.Function):
    """The gradient at the copies of the stream, which raises where it is differentiated.

    It is computed at the stream, so its derivative at a copy is not known: that of each norm by itself is another.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, heads: Tensor, gradient: Tensor) -> Tensor:
        return heads.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "hooks at hook_attn_in, hook_q_input, hook_k_input or hook_v_input together with hooks at the norm before "
            "attention have no second derivative by backward: take one by torch.func (hessian, jacfwd, grad of grad), "
            "which normalises each head's copy by itself, or remove the hooks at one of the two"
        )
