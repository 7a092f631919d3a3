"""Activation functions by name, and `register_activation` to add a name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_FUNCTIONS",
    "LEARNED_ACTIVATIONS",
    "Activation",
    "activation_names",
    "gelu_fast",
    "gelu_new",
    "identity",
    "quick_gelu",
    "register_activation",
    "relu2",
    "solu",
]

Activation = Callable[[Float[Tensor, "..."]], Float[Tensor, "..."]]


def gelu_new(input: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return GPT-2's GELU, the tanh approximation (Hendrycks and Gimpel 2016), as one fused operation."""
    return F.gelu(input, approximate="tanh")


def gelu_fast(input: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return the tanh approximation of GELU in the form some checkpoints were trained with."""
    return 0.5 * input * (1.0 + torch.tanh(input * 0.7978845608 * (1.0 + 0.044715 * input * input)))


def quick_gelu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return `x * sigmoid(1.702 x)`."""
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return `relu(x) ** 2` (So et al. 2021, "Primer")."""
    return F.relu(x).square()


def solu(input: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return `input * softmax(input)` over the last axis (Elhage et al. 2022, "Softmax Linear Units")."""
    return input * F.softmax(input, dim=-1)


def identity(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return `x`: a linear MLP."""
    return x


# Every activation function without parameters. `solu_ln` is `solu` here: its layer norm is a module of the MLP.
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

# Functions with learned parameters: each MLP has a module of its own (`components.activations`).
LEARNED_ACTIVATIONS = ("xielu",)

# The names that come with the package; `activation_names()` has the registered names too.
ACTIVATIONS = (*ACTIVATION_FUNCTIONS, *LEARNED_ACTIVATIONS)


def activation_names() -> tuple[str, ...]:
    """Return the names that a config's `act_fn` may have, registered ones included."""
    return (*ACTIVATION_FUNCTIONS, *LEARNED_ACTIVATIONS)


def register_activation(name: str, function: Activation, *, replace: bool = False) -> None:
    """Add an activation function under a name, which a config can give as `act_fn`.

    A config is saved with the name alone: register the function again before such a config is loaded.

    Args:
        name: the name; those that come with the package cannot be taken.
        function: [... d_mlp] -> [... d_mlp]. It may mix entries along the last axis only, because engines run it on
            some of the prompts and positions at a time, and a mixture of experts on some tokens at a time. It does not
            change its input in place, and has no learned parameters, because all layers share it.
        replace: take a name that has been registered before. Models that are built keep the function they have.

    Raises:
        ValueError: the name is taken, or is no name.
        TypeError: the function cannot be called, or has parameters.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"an activation function's name is an identifier; got {name!r}")
    if not callable(function):
        raise TypeError(f"an activation function is called with a tensor; {function!r} cannot be called")
    if isinstance(function, nn.Module) and next(function.parameters(), None) is not None:
        raise TypeError(f"{name} has parameters, which all layers would share: a registered function has none")
    known = ACTIVATION_FUNCTIONS.get(name)
    if name in ACTIVATIONS:
        raise ValueError(f"{name!r} comes with the package: register the function under another name")
    if known is not None and known is not function and not replace:
        raise ValueError(f"{name!r} is registered already: give another name, or replace=True")
    ACTIVATION_FUNCTIONS[name] = function
