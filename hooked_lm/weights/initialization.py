"""Random initial weights of a new model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hooked_lm.config import HookedTransformerConfig

__all__ = [
    "calc_fan_in_and_fan_out",
    "init_kaiming_normal_",
    "init_kaiming_uniform_",
    "init_xavier_normal_",
    "init_xavier_uniform_",
    "initialize_weights",
]


def calc_fan_in_and_fan_out(tensor: Tensor) -> tuple[int, int]:
    """Return how many inputs and outputs a weight connects.

    [in out] for a matrix; [head d_model d_head] counts `d_model` in and all heads out; a vector has one input.

    Raises:
        ValueError: any other number of axes.
    """
    if tensor.ndim == 1:
        return 1, tensor.shape[0]
    if tensor.ndim == 2:
        return tensor.shape[0], tensor.shape[1]
    if tensor.ndim == 3:
        return tensor.shape[1], tensor.shape[0] * tensor.shape[2]
    raise ValueError(f"no fan-in for a tensor with shape {tuple(tensor.shape)}")


@torch.no_grad()
def init_xavier_uniform_(param: Tensor, gain: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Fill from a uniform distribution of variance `gain^2 * 2 / (fan_in + fan_out)` (Glorot and Bengio 2010).

    Args:
        param: the tensor, which is changed and returned.
        gain: a factor.
        generator: the random number generator; by default torch's global one.

    Raises:
        ValueError: a tensor whose fan is not defined.
    """
    bound = gain * math.sqrt(6.0 / sum(calc_fan_in_and_fan_out(param)))
    return param.uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def init_xavier_normal_(param: Tensor, gain: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Fill from a normal distribution of variance `gain^2 * 2 / (fan_in + fan_out)` (Glorot and Bengio 2010).

    Args:
        param: the tensor, which is changed and returned.
        gain: a factor.
        generator: the random number generator; by default torch's global one.

    Raises:
        ValueError: a tensor whose fan is not defined.
    """
    std = gain * math.sqrt(2.0 / sum(calc_fan_in_and_fan_out(param)))
    return param.normal_(0.0, std, generator=generator)


@torch.no_grad()
def init_kaiming_uniform_(
    param: Tensor,
    a: float = 0.0,
    nonlinearity: str = "relu",
    gain: float = 1.0,
    mode: str = "fan_in",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill from a uniform distribution of variance `(gain * g)^2 / fan`, g the nonlinearity's (He et al. 2015).

    Args:
        param: the tensor, which is changed and returned.
        a: the slope below zero, for `"leaky_relu"`.
        nonlinearity: the activation function after the weight, by torch's name.
        gain: a factor.
        mode: `"fan_in"` or `"fan_out"`: which of the two is `fan`.
        generator: the random number generator; by default torch's global one.

    Raises:
        ValueError: another mode or nonlinearity, or a tensor whose fan is not defined.
    """
    bound = math.sqrt(3.0) * _kaiming_std(param, a, nonlinearity, gain, mode)
    return param.uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def init_kaiming_normal_(
    param: Tensor,
    a: float = 0.0,
    nonlinearity: str = "relu",
    gain: float = 1.0,
    mode: str = "fan_in",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill from a normal distribution of variance `(gain * g)^2 / fan`, g the nonlinearity's (He et al. 2015).

    Args:
        param: the tensor, which is changed and returned.
        a: the slope below zero, for `"leaky_relu"`.
        nonlinearity: the activation function after the weight, by torch's name.
        gain: a factor.
        mode: `"fan_in"` or `"fan_out"`: which of the two is `fan`.
        generator: the random number generator; by default torch's global one.

    Raises:
        ValueError: another mode or nonlinearity, or a tensor whose fan is not defined.
    """
    return param.normal_(0.0, _kaiming_std(param, a, nonlinearity, gain, mode), generator=generator)


def _kaiming_std(param: Tensor, a: float, nonlinearity: str, gain: float, mode: str) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode is 'fan_in' or 'fan_out', not {mode!r}")
    fan = calc_fan_in_and_fan_out(param)[0 if mode == "fan_in" else 1]
    return gain * nn.init.calculate_gain(nonlinearity, a) / math.sqrt(fan)  # type: ignore[arg-type]


def initialize_weights(model: nn.Module, cfg: HookedTransformerConfig) -> None:
    """Fill every weight at random by `init_mode` and `initializer_range`; biases become zero, gains one.

    With `cfg.seed` the numbers come from a separate generator: the same seed gives the same weights, and torch's global
    generator keeps its state.

    Args:
        model: its parameters are changed.
        cfg: the config.
    """
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    generator = None if cfg.seed is None else torch.Generator(device).manual_seed(cfg.seed)
    for name, parameter in parameters.items():
        kind = name.rpartition(".")[2]
        if kind.startswith("W_"):
            _draw(parameter, cfg, generator)
        elif not kind.startswith("alpha_"):  # a learned activation function is made with its own values
            nn.init.constant_(parameter, 1.0 if kind == "w" else 0.0)


def _draw(parameter: Tensor, cfg: HookedTransformerConfig, generator: torch.Generator | None) -> None:
    spread = cfg.initializer_range
    if cfg.init_mode == "gpt2":
        nn.init.normal_(parameter, std=spread, generator=generator)
    elif cfg.init_mode == "xavier_uniform":
        init_xavier_uniform_(parameter, gain=spread, generator=generator)
    elif cfg.init_mode == "xavier_normal":
        init_xavier_normal_(parameter, gain=spread, generator=generator)
    elif cfg.init_mode == "kaiming_uniform":
        init_kaiming_uniform_(parameter, gain=spread, generator=generator)
    else:
        init_kaiming_normal_(parameter, gain=spread, generator=generator)
