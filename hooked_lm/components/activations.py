"""Activation functions by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm.config import HookedTransformerConfig

Activation = Callable[[Float[Tensor, "..."]], Float[Tensor, "..."]]


def gelu_new(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return GPT-2's GELU, the tanh approximation (Hendrycks and Gimpel 2016), as one fused operation."""
    return F.gelu(x, approximate="tanh")


def gelu_fast(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return the tanh approximation of GELU in the form some checkpoints were trained with."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def quick_gelu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return `x * sigmoid(1.702 x)`."""
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return `relu(x) ** 2` (So et al. 2021, "Primer")."""
    return F.relu(x).square()


def solu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return `x * softmax(x)` over the last axis (Elhage et al. 2022, "Softmax Linear Units")."""
    return x * F.softmax(x, dim=-1)


def identity(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return `x`: a linear MLP."""
    return x


class XIELU(nn.Module):
    """`alpha_p x^2 + beta x` where x is positive, `alpha_n (exp(x) - 1 - x) + beta x` elsewhere.

    Huang and Schlag 2024, with `beta` 1/2. The two alphas are learned, as numbers whose softplus counts; `alpha_n` has
    `beta` added to that.
    """

    beta = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.tensor([math.log(math.expm1(0.8))]))
        self.alpha_n = nn.Parameter(torch.tensor([math.log(math.expm1(0.8 - self.beta))]))

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        alpha_p, alpha_n = F.softplus(self.alpha_p), self.beta + F.softplus(self.alpha_n)
        # Just below zero the difference of two nearly equal numbers would be rounded away.
        negative = (torch.expm1(x.clamp(max=-1e-6)) - x) * alpha_n
        return torch.where(x > 0, alpha_p * x * x, negative) + self.beta * x


# `solu_ln` is `solu` here: its layer norm is a module of the MLP.
ACTIVATION_FUNCTIONS: dict[str, Activation] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "gelu_new": gelu_new,
    "gelu_fast": gelu_fast,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu2": relu2,
    "identity": identity,
    "solu": solu,
    "solu_ln": solu,
}


def make_activation(cfg: HookedTransformerConfig) -> Activation:
    """Return a config's activation function; a module where it has parameters."""
    return XIELU() if cfg.act_fn == "xielu" else ACTIVATION_FUNCTIONS[str(cfg.act_fn)]


def is_registered_activation(function: Activation) -> bool:
    """Return whether an activation function is one that a config can name."""
    return isinstance(function, XIELU) or any(function is known for known in ACTIVATION_FUNCTIONS.values())


def soft_cap(x: Float[Tensor, "..."], cap: float) -> Float[Tensor, "..."]:
    """Return `cap * tanh(x / cap)`, or `x` itself when the cap is off (not positive)."""
    return cap * torch.tanh(x / cap) if cap > 0 else x
