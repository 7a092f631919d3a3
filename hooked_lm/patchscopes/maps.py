"""Affine maps from the stream of one layer to that of another, fitted by least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm._support.integers import integer
from hooked_lm.circuits.last_token import chosen_layers
from hooked_lm.hooked_model import HookedModel
from hooked_lm.probing import Positions, TokensAt, activations_at
from hooked_lm.tokenization import Prompts

if TYPE_CHECKING:
    from hooked_lm.plotting import Figure

__all__ = ["AffineMaps", "fit_affine_maps"]


@dataclass(frozen=True, eq=False)
class AffineMaps:
    """Maps between the activations of layers. A `mapping` of `patchscope`.

    Attributes:
        source_layers, target_layers: the layers between which there are maps.
        weights: [source target d_model d_model]; a row vector is multiplied from the left.
        biases: [source target d_model].
        explained: the share of the variance of held-out activations that each map explains, [source target].
        n_fitted, n_held_out: the tokens that maps were fitted to, and tested on.
    """

    source_layers: tuple[int, ...]
    target_layers: tuple[int, ...]
    weights: Float[Tensor, "source target d_model out"]
    biases: Float[Tensor, "source target out"]
    explained: Float[Tensor, "source target"]
    n_fitted: int
    n_held_out: int

    def __call__(
        self, activations: Float[Tensor, "example d_model"], source_layer: int, target_layer: int
    ) -> Float[Tensor, "example d_model"]:
        """Return activations of one layer as those of another.

        Args:
            activations: of the source layer.
            source_layer, target_layer: between which there is a map.

        Raises:
            ValueError: there is none.
        """
        if source_layer not in self.source_layers or target_layer not in self.target_layers:
            raise ValueError(
                f"no map from layer {source_layer} to {target_layer}: there are maps from {list(self.source_layers)} "
                f"to {list(self.target_layers)}"
            )
        places = self.source_layers.index(source_layer), self.target_layers.index(target_layer)
        weight, bias = (one[places].to(activations) for one in (self.weights, self.biases))
        return activations @ weight + bias

    def top(self, k: int = 5) -> list[tuple[int, int, float]]:
        """Return the `k` maps that explain most, as (source layer, target layer, share).

        Args:
            k: how many.

        Raises:
            ValueError: `k` is below 1.
        """
        if integer(k, "k") < 1:
            raise ValueError(f"k is at least 1, got {k}")
        order = self.explained.flatten().argsort(descending=True, stable=True)[:k].tolist()
        width = len(self.target_layers)
        return [
            (self.source_layers[i // width], self.target_layers[i % width], float(self.explained.flatten()[i]))
            for i in order
        ]

    def rows(self) -> list[dict[str, int | float]]:
        """Return a dictionary for each map: `source`, `target` (layers), `explained`; `pandas.DataFrame` takes them."""
        return [
            {"source": source, "target": target, "explained": float(self.explained[i, j])}
            for i, source in enumerate(self.source_layers)
            for j, target in enumerate(self.target_layers)
        ]

    def table(self) -> str:
        """Return the shares of the variance as text: a row for each source layer, a column for each target layer."""
        lines = ["from layer  " + "  ".join(f"into {layer}".rjust(7) for layer in self.target_layers)]
        for layer, shares in zip(self.source_layers, self.explained.tolist(), strict=True):
            lines.append(f"{layer:>10}  " + "  ".join(f"{share:>7.3f}" for share in shares))
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def figure(self, title: str = "") -> Figure:
        """Return the shares of the variance as a map. Needs the extra `viz`.

        Args:
            title: of the figure.

        Raises:
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import composition_matrix

        writers = [f"from {layer}" for layer in self.source_layers]
        return composition_matrix(self.explained, writers, [f"into {layer}" for layer in self.target_layers], title)


@torch.no_grad()
def fit_affine_maps(
    model: HookedModel,
    prompts: Prompts,
    pos: Positions = -1,
    *,
    source_layers: Sequence[int] | None = None,
    target_layers: Sequence[int] | None = None,
    site: str = "resid_post",
    penalty: float = 1e-6,
    test_share: float = 0.25,
    seed: int = 0,
    batch_size: int = 32,
    verbose: bool = True,
) -> AffineMaps:
    """Fit an affine map from each source layer's activations to each target layer's, at the same tokens.

    Least squares with a small penalty on the weights, in units of the mean variance. A quarter of the prompts is held
    out, to say how much of the variance the map explains there.

    Args:
        model: a `HookedTransformer`.
        prompts, pos: the tokens, as for `probing.probe_layers`.
        source_layers, target_layers: by default all.
        site: a site of every layer.
        penalty: of ridge regression.
        test_share: of the prompts that are held out.
        seed: of the division.
        batch_size: prompts that are run at a time.
        verbose: show a progress bar.

    Raises:
        ValueError: a setting out of range, or too few prompts to hold any out.
    """
    if not penalty >= 0 or not 0 < test_share < 1:
        raise ValueError(f"penalty is not negative and test_share between 0 and 1, got {penalty} and {test_share}")
    tokens = TokensAt.of(model, prompts, pos)
    sources, targets = chosen_layers(model, source_layers), chosen_layers(model, target_layers)
    layers = sorted({*sources, *targets})
    found = activations_at(model, tokens, site, layers, batch_size=batch_size, verbose=verbose).double()
    n_prompts = len(tokens.prompts)
    held = torch.randperm(n_prompts, generator=torch.Generator().manual_seed(seed))[: int(n_prompts * test_share)]
    out = torch.isin(tokens.rows, held)
    if not bool(out.any()) or not bool((~out).any()):
        raise ValueError(f"{n_prompts} prompts are too few to hold {100 * test_share:g} % out")
    by_layer = {layer: found[index] for index, layer in enumerate(layers)}
    weights, biases, explained = [], [], []
    for source in sources:
        x = by_layer[source]
        mean = x[~out].mean(0)
        centred = x[~out] - mean
        gram = centred.T @ centred
        gram += penalty * (gram.trace() / len(gram)).clamp(min=1e-12) * torch.eye(len(gram), dtype=gram.dtype)
        for target in targets:
            y = by_layer[target]
            middle = y[~out].mean(0)
            weight = torch.linalg.solve(gram, centred.T @ (y[~out] - middle))
            weights.append(weight)
            biases.append(middle - mean @ weight)
            error = ((x[out] @ weight + biases[-1] - y[out]) ** 2).sum()
            explained.append(1 - error / ((y[out] - y[out].mean(0)) ** 2).sum().clamp(min=1e-300))
    shape = (len(sources), len(targets))
    return AffineMaps(
        tuple(sources),
        tuple(targets),
        torch.stack(weights).unflatten(0, shape),
        torch.stack(biases).unflatten(0, shape),
        torch.stack(explained).unflatten(0, shape),
        int((~out).sum()),
        int(out.sum()),
    )
