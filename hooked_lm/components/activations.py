"""A config's activation function, and the one that has learned parameters. The others are in `config.activations`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm.config import HookedTransformerConfig
from hooked_lm.config.activations import (
    ACTIVATION_FUNCTIONS,
    Activation,
    gelu_fast,
    gelu_new,
    identity,
    quick_gelu,
    relu2,
    solu,
)

__all__ = [
    "ACTIVATION_FUNCTIONS",
    "XIELU",
    "Activation",
    "gelu_fast",
    "gelu_new",
    "identity",
    "is_registered_activation",
    "make_activation",
    "quick_gelu",
    "relu2",
    "soft_cap",
    "solu",
]


class XIELU(nn.Module):
    """`alpha_p x^2 + beta x` where x is positive, `alpha_n (exp(x) - 1 - x) + beta x` elsewhere.

    Huang and Schlag 2024, with `beta` 1/2. The two alphas are learned, through a softplus; `beta` is
    added to `alpha_n` after it.
    """

    beta = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.tensor([math.log(math.expm1(0.8))]))
        self.alpha_n = nn.Parameter(torch.tensor([math.log(math.expm1(0.8 - self.beta))]))

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        alpha_p, alpha_n = F.softplus(self.alpha_p), self.beta + F.softplus(self.alpha_n)
        # expm1 and a clamp, since exp(x) - 1 - x loses all digits just below zero.
        negative = (torch.expm1(x.clamp(max=-1e-6)) - x) * alpha_n
        return torch.where(x > 0, alpha_p * x * x, negative) + self.beta * x


def make_activation(cfg: HookedTransformerConfig) -> Activation:
    """Return a config's activation function; a module if it has parameters."""
    return XIELU() if cfg.act_fn == "xielu" else ACTIVATION_FUNCTIONS[str(cfg.act_fn)]


def is_registered_activation(function: Activation) -> bool:
    """Return whether an activation function is one that a config can name."""
    return isinstance(function, XIELU) or any(function is known for known in ACTIVATION_FUNCTIONS.values())


def soft_cap(x: Float[Tensor, "..."], cap: float) -> Float[Tensor, "..."]:
    """Return `cap * tanh(x / cap)`, or `x` itself when the cap is off (not positive)."""
    return cap * torch.tanh(x / cap) if cap > 0 else x
