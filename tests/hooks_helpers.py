"""Subjects for tests of hooks: a transformer and any other network, with simple hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hooked_lm import HookedRootModule, HookPoint
from tests.helpers import randomise_, tiny_model, tiny_tokens

SUBJECTS = ("transformer", "any module")
FIRST, SECOND = "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hook_resid_pre = HookPoint("batch d_model")
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(self.hook_resid_pre(x)))


class Network(HookedRootModule):
    """A module that is no transformer, with hook points of the same names as those of one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 4, dtype=torch.float64)
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList([Layer(), Layer()])
        self.setup()

    def forward(self, tokens: Tensor, stop_at_layer: int | None = None) -> Tensor:
        x = self.hook_embed(self.embed(tokens[:, 0]))
        for block in self.blocks[:stop_at_layer]:
            x = block(x)
        return x


@dataclass
class Subject:
    """A model, its input, and a weight that everything before `FIRST` hangs on."""

    model: HookedRootModule
    tokens: Tensor
    first_weight: nn.Parameter

    def output(self) -> Tensor:
        return self.model(self.tokens)

    def handles(self) -> list[Callable[..., Any]]:
        return [handle.hook for point in self.model.hook_points() for handle in (*point.fwd_hooks, *point.bwd_hooks)]


def subject_of(kind: str) -> Subject:
    """Return the subject of a kind, one of `SUBJECTS`."""
    if kind == "transformer":
        transformer = tiny_model()
        return Subject(transformer, tiny_tokens(), transformer.embed.W_E)
    network = Network()
    randomise_(network)
    return Subject(network, tiny_tokens(), network.embed.weight)


def double(x: Tensor, hook: HookPoint) -> Tensor:
    return 2 * x


def shift(x: Tensor, hook: HookPoint) -> Tensor:
    return x + torch.arange(x.shape[-1], dtype=x.dtype)


def look(x: Tensor, hook: HookPoint) -> None:
    return None


def zero_in_place(x: Tensor, hook: HookPoint) -> None:
    x.zero_()
