"""Orders in which units are ablated: by how active they are, what they write, how much they matter, or at random."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from hooked_lm._support.integers import entries_of, integer
from hooked_lm._support.precision import at_least_single
from hooked_lm.circuits.last_token import chosen_layers
from hooked_lm.components.stock import require_stock
from hooked_lm.examples.corpus import scored_tokens
from hooked_lm.hooked_model import HookedModel
from hooked_lm.interventions import Intervention, Selections
from hooked_lm.names import UnknownHookError, describe_unknown, get_act_name
from hooked_lm.patching.attribution import differentiated_run
from hooked_lm.sweep import AnyMetric

__all__ = ["ORDERS", "AblatedUnits", "Order", "Place", "UnitKind", "distinct_layers", "given_order"]

UnitKind = Literal["neurons", "heads"]
Order = Literal["activity", "norm", "attribution", "random"]
# A unit: the layer, and the neuron or head in it.
Place = tuple[int, int]

ORDERS = ("activity", "norm", "attribution", "random")
# The unit -> the site whose activation is replaced, the component that it belongs to, and the matrix that it writes by.
_SITES = {"neurons": ("post", "mlp", "W_out"), "heads": ("z", "attn", "W_O")}


@dataclass(frozen=True, eq=False)
class AblatedUnits:
    """The units of some layers, and what their activations are replaced by.

    Attributes:
        model: a `HookedTransformer`.
        unit: `"neurons"` or `"heads"`.
        layers: blocks.
        mean: of each layer's units over the tokens that count, in float64, [unit width] with width 1 for neurons.
        second: the mean of the products of two entries of a unit's activation, [unit width width].
        replaces: whether activations are replaced by the mean, rather than by zero.
    """

    model: HookedModel
    unit: UnitKind
    layers: tuple[int, ...]
    mean: dict[int, Float[Tensor, "unit width"]]
    second: dict[int, Float[Tensor, "unit width width"]]
    replaces: bool

    @classmethod
    @torch.no_grad()
    def measured(
        cls,
        model: HookedModel,
        unit: UnitKind,
        layers: tuple[int, ...],
        tokens: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch pos"],
        *,
        replaces: bool,
        batch_size: int,
    ) -> AblatedUnits:
        """Return the units with their moments over prompts; BOS and padding do not count.

        Args:
            model, unit, layers, replaces: as the attributes.
            tokens, mask: the prompts, and 0 at their padding.
            batch_size: prompts that are run at a time.

        Raises:
            UnknownHookError: a layer has no such units.
            ValueError: the prompts have no tokens that count.
        """
        sites = {layer: get_act_name(_SITES[unit][0], layer) for layer in layers}
        for layer, site in sites.items():
            if site not in model.hook_dict:
                lacking = f"this model has no {unit} in layer {layer}: "
                raise UnknownHookError(lacking + describe_unknown(site, list(model.hook_dict)))
        sums: dict[int, Tensor] = {}
        products: dict[int, Tensor] = {}
        n_tokens = 0
        for first in range(0, len(tokens), batch_size):
            rows = slice(first, first + batch_size)
            counted = scored_tokens(model, tokens[rows], mask[rows])
            n_tokens += int(counted.sum())
            _, cache = model.run_with_cache(
                tokens[rows],
                attention_mask=mask[rows],
                names_filter=list(sites.values()),
                stop_at_layer=model.cfg.stop_after(max(layers)),
                return_type=None,
                return_cache_object=False,
            )
            for layer, site in sites.items():
                x = cache[site][counted.to(cache[site].device)].double().cpu()
                x = x[..., None] if unit == "neurons" else x
                moment = einsum(x, x, "token unit one, token unit other -> unit one other")
                sums[layer] = sums.get(layer, 0) + x.sum(0)
                products[layer] = products.get(layer, 0) + moment
        if not n_tokens:
            raise ValueError("the prompts have no tokens besides BOS and padding")
        mean = {layer: value / n_tokens for layer, value in sums.items()}
        second = {layer: value / n_tokens for layer, value in products.items()}
        return cls(model, unit, layers, mean, second, replaces)

    @property
    def places(self) -> list[Place]:
        """Every unit of every layer."""
        return [(layer, index) for layer in self.layers for index in range(len(self.mean[layer]))]

    def interventions(self, places: Iterable[Place]) -> list[Intervention]:
        """Return the interventions that ablate some units together: one for each layer that has any.

        Args:
            places: the units.
        """
        by_layer: dict[int, list[int]] = {}
        for layer, index in places:
            by_layer.setdefault(layer, []).append(index)
        made = []
        for layer, chosen in sorted(by_layer.items()):
            indices, site = sorted(chosen), get_act_name(_SITES[self.unit][0], layer)
            at: Selections = {"feature" if self.unit == "neurons" else "head": tuple(indices)}  # type: ignore[misc]
            if self.replaces:
                value = self.mean[layer][indices].to(self.model.cfg.dtype)
                made.append(Intervention(site, "replace", value[:, 0] if self.unit == "neurons" else value, **at))
            else:
                made.append(Intervention(site, "zero", **at))
        return made

    def sizes(
        self, order: Order, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], metric: AnyMetric
    ) -> dict[int, Float[Tensor, " unit"]]:
        """Return the number by which each layer's units are ordered, in float64.

        Args:
            order: as for `ablation_curve`, and not `"random"`.
            tokens, mask, metric: what `"attribution"` differentiates.

        Raises:
            ValueError: the metric has no gradient, or a component is overridden, so that its matrix does not tell what
                its units write.
        """
        if order == "attribution":
            return self._attributions(tokens, mask, metric)
        found = {}
        _, part, matrix = _SITES[self.unit]
        for layer in self.layers:
            moved = self.second[layer]
            if self.replaces:
                mean = self.mean[layer]
                moved = moved - einsum(mean, mean, "unit one, unit other -> unit one other")
            if order == "norm":
                component = getattr(self.model.blocks[layer], part)
                require_stock("what a unit writes", f"blocks.{layer}.{part}", component)
                W = getattr(component, matrix).detach().double().cpu()
                W = W[:, None] if self.unit == "neurons" else W
                gram = einsum(W, W, "unit one d_model, unit other d_model -> unit one other")
                squared = (moved * gram).sum((1, 2))
            else:
                squared = moved.diagonal(dim1=1, dim2=2).sum(-1)
            # Rounding leaves a constant activation a little above or below its mean.
            found[layer] = squared.clamp(min=0).sqrt()
        return found

    def _attributions(self, tokens: Tensor, mask: Tensor, metric: AnyMetric) -> dict[int, Tensor]:
        sites = {layer: get_act_name(_SITES[self.unit][0], layer) for layer in self.layers}
        run = differentiated_run(self.model, tokens, mask, metric, list(sites.values()))
        found = {}
        for layer, site in sites.items():
            x, gradient = (at_least_single(one[site]).double().cpu() for one in (run.values, run.grads))
            if self.unit == "neurons":
                x, gradient = x[..., None], gradient[..., None]
            value = self.mean[layer] if self.replaces else 0.0
            found[layer] = ((value - x) * gradient).sum((0, 1, 3)).abs()
        return found


def distinct_layers(model: HookedModel, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Return the chosen layers, counted from 0; all of them by default.

    Args:
        model: a `HookedTransformer`.
        layers: negative ones count from the end; None for all.

    Raises:
        ValueError: a layer that the model lacks or that comes twice, whose units would count twice; or no layer at all.
    """
    chosen = chosen_layers(model, layers)
    twice = sorted({layer for layer in chosen if chosen.count(layer) > 1})
    if twice:
        raise ValueError(f"layers are given once each, and {twice[0]} comes twice in {list(chosen)}")
    return chosen


def given_order(order: Sequence[Sequence[int]], places: Sequence[Place]) -> list[Place]:
    """Return an order of the caller's own, checked.

    Args:
        order: pairs of a layer and a unit in it.
        places: all that there are.

    Raises:
        ValueError: an entry is no such pair, a unit that there is not, one that comes twice, or none.
    """
    known, found = set(places), list[Place]()
    if not isinstance(order, Iterable):
        raise ValueError(f"order is one of {', '.join(ORDERS)}, or pairs (layer, unit); got {order!r}")
    for entry in order:
        pair = entries_of(entry)
        if pair is None or len(pair) != 2:
            raise ValueError(f"an order of your own is of pairs (layer, unit); got {entry!r}")
        place = (integer(pair[0], "a layer"), integer(pair[1], "a unit"))
        if place not in known:
            raise ValueError(f"there is no unit {place[1]} of layer {place[0]} among those to ablate")
        found.append(place)
    if not found or len(set(found)) < len(found):
        raise ValueError("an order of your own has one unit or more, each of them once")
    return found
