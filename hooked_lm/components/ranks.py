"""Ranks: the processes that share out a model's heads and neurons, and the sums and gathers between them.

Each rank has some heads and some neurons of every layer, and the whole of everything else. It computes the whole
stream: what its heads and neurons write is added up over the ranks. Backward is the mirror of it (Shoeybi et al. 2019,
"Megatron-LM"): where the stream enters the heads or neurons, its gradients are added up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

__all__ = ["PointOfRanks", "Ranks", "SplitAxis"]


@dataclass(frozen=True)
class SplitAxis:
    """An axis that is shared out.

    Attributes:
        dim: its place.
        copies: how many ranks in a row have the same part.
    """

    dim: int
    copies: int = 1


@dataclass(frozen=True, eq=False)
class Ranks:
    """The group of processes, seen from one of them.

    Attributes:
        group: of `torch.distributed`.
        rank: of this process in it.
        size: how many processes there are.
        kv_copies: how many ranks in a row have the same key-value heads.
        parameters: name of a parameter that is shared out -> along which axis.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    kv_copies: int = 1
    parameters: dict[str, SplitAxis] = field(default_factory=dict)

    def __deepcopy__(self, memo: object) -> Ranks:
        return self  # a group of processes has no copy

    def entering(self, x: Tensor) -> Tensor:
        """Return a tensor that every rank has, where each uses it for its part: backward, gradients are added up."""
        return _Entering.apply(x, self) if x.requires_grad else x  # type: ignore[no-untyped-call]

    def entering_together(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the inputs of queries, keys and values as `entering` does; one that they share, once.

        Args:
            q, k, v: [batch pos d_model], or with a head axis, of this rank's heads.

        Raises:
            NotImplementedError: gradients are recorded, and hooks have separated the heads.
        """
        if any(x.ndim == 4 and x.requires_grad for x in (q, k, v)):
            raise NotImplementedError(
                "gradients of a model on several ranks do not go through hook_attn_in, hook_q_input, hook_k_input or "
                "hook_v_input: run without gradients, or on one device"
            )
        entered = self.entering(q)
        return entered, entered if k is q else self.entering(k), entered if v is q else self.entering(v)

    def summed(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks of what each has computed with its part."""
        return _Summed.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]

    def whole(self, x: Tensor, axis: SplitAxis) -> Tensor:
        """Return the parts of all ranks in one tensor, which each rank gets."""
        return _Whole.apply(x, self, axis)  # type: ignore[no-any-return, no-untyped-call]

    def part(self, x: Tensor, axis: SplitAxis) -> Tensor:
        """Return this rank's part of a tensor that every rank has."""
        return _Part.apply(x, self, axis)  # type: ignore[no-any-return, no-untyped-call]

    def whole_parameter(self, name: str, parameter: Tensor) -> Tensor:
        """Return a parameter with the parts of all ranks.

        Args:
            name: in the model.
            parameter: this rank's.
        """
        axis = self.parameters.get(name)
        return parameter if axis is None else self.whole(parameter, axis)

    def whole_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a whole parameter, given that of this rank's part."""
        axis = self.parameters.get(name)
        if axis is None:
            return shape
        return (*shape[: axis.dim], shape[axis.dim] * self.size // axis.copies, *shape[axis.dim + 1 :])

    def from_first(self, x: Tensor) -> Tensor:
        """Return what the first rank has: ranks may draw different random numbers."""
        x = x.contiguous()
        dist.broadcast(x, dist.get_global_rank(self.group, 0), group=self.group)
        return x

    # Without gradients

    def add_up(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks, in a tensor of its own."""
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def parts_of_all(self, x: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, in their order."""
        x = x.contiguous()
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x, group=self.group)
        return found

    def mean_of_copies(self, x: Tensor) -> Tensor:
        """Return the mean over the ranks that have the same key-value heads as this one."""
        first = self.rank // self.kv_copies * self.kv_copies
        return torch.stack(self.parts_of_all(x)[first : first + self.kv_copies]).mean(0)

    def cut(self, x: Tensor, axis: SplitAxis) -> Tensor:
        """Return this rank's part of a whole tensor, a view."""
        width = x.shape[axis.dim] * axis.copies // self.size
        return x.narrow(axis.dim, self.rank // axis.copies * width, width)


class PointOfRanks:
    """What a hook point does where ranks share out an axis of its activation: hooks see all of it.

    Args:
        ranks: the group.
        dim: the place of the axis.
        copies: how many ranks in a row have the same part, at present.
    """

    def __init__(self, ranks: Ranks, dim: int, copies: Callable[[], int]) -> None:
        self.ranks, self.dim, self.copies = ranks, dim, copies

    def whole(self, x: Tensor) -> Tensor:
        """Return the activation with the parts of all ranks."""
        return self.ranks.whole(x, SplitAxis(self.dim, self.copies()))

    def part(self, x: Tensor) -> Tensor:
        """Return this rank's part of the activation."""
        return self.ranks.part(x, SplitAxis(self.dim, self.copies()))


class _Context(FunctionCtx):
    ranks: Ranks
    axis: SplitAxis


class _Entering(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.summed(gradients[0]), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.add_up(x)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.entering(gradients[0]), None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, ranks: Ranks, axis: SplitAxis) -> Tensor:
        ctx.ranks, ctx.axis = ranks, axis
        return torch.cat(ranks.parts_of_all(x)[:: axis.copies], axis.dim)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, None, None]:
        part = ctx.ranks.part(gradients[0], ctx.axis)
        # Copies get a share each: what they have in common is added up over the ranks.
        return part if ctx.axis.copies == 1 else part / ctx.axis.copies, None, None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, ranks: Ranks, axis: SplitAxis) -> Tensor:
        ctx.ranks, ctx.axis = ranks, axis
        return ranks.cut(x, axis).clone()

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ranks, axis = ctx.ranks, ctx.axis
        if axis.copies == 1:
            return ranks.whole(gradients[0], axis), None, None
        parts = ranks.parts_of_all(gradients[0])
        several = [sum(parts[start : start + axis.copies]) for start in range(0, ranks.size, axis.copies)]
        return torch.cat(several, axis.dim), None, None  # type: ignore[arg-type]
