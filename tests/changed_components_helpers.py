"""Models with one component that is no longer stock, in each of the ways there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from hooked_lm import HookedTransformer
from tests.helpers import tiny_model

COMPONENTS: dict[str, Callable[[HookedTransformer], nn.Module]] = {
    "block": lambda model: model.blocks[1],
    "attention": lambda model: model.blocks[1].attn,
    "MLP": lambda model: model.blocks[1].mlp,
    "norm": lambda model: model.blocks[2].ln1,
    "unembed": lambda model: model.unembed,
}
PARAMETER = {"attention": "W_O", "MLP": "W_in", "norm": "w", "unembed": "W_U"}


class Scaled(nn.Module):
    """A parametrisation: half as large again."""

    def forward(self, parameter: Tensor) -> Tensor:
        return parameter * 1.5


def subclassed(module: nn.Module, _: str) -> None:
    kind = type(module)
    module.__class__ = type(
        "Hot", (kind,), {"forward": lambda self, *args, **how: kind.forward(self, *args, **how) * 1.5}
    )


def given_a_method(module: nn.Module, _: str) -> None:
    stock = module.forward
    module.forward = lambda *args, **how: stock(*args, **how) * 1.5  # type: ignore[method-assign]


def parametrised(module: nn.Module, component: str) -> None:
    parametrize.register_parametrization(module, PARAMETER[component], Scaled())


def hooked(module: nn.Module, _: str) -> None:
    module.register_forward_hook(lambda module, args, output: output * 1.5)


WAYS: dict[str, Callable[[nn.Module, str], None]] = {
    "subclass": subclassed,
    "method": given_a_method,
    "parametrisation": parametrised,
    "torch hook": hooked,
}
CASES = [
    (component, way) for component in COMPONENTS for way in WAYS if (component, way) != ("block", "parametrisation")
]


def changed_model(component: str, way: str, **changes: Any) -> HookedTransformer:
    model = tiny_model(n_layers=3, **changes)
    WAYS[way](COMPONENTS[component](model), component)
    return model
