"""Affine maps from the states of one layer to those of another, fitted to prompts and judged on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm._support.integers import at_least_one
from hooked_lm.circuits.last_token import LastTokenPrompts, chosen_layers, layer_index
from hooked_lm.hooked_model import HookedModel
from hooked_lm.patchscopes.run import ScopeSite
from hooked_lm.probing.division import hold_out, numbered
from hooked_lm.probing.fitting import check_penalty, fit_affine, ridge
from hooked_lm.probing.positions import Positions, TokensAt, activations_at
from hooked_lm.tokenization import Prompts

if TYPE_CHECKING:
    from hooked_lm.plotting import Figure

__all__ = ["AffineMaps", "fit_affine_maps"]

# A line of `AffineMaps.rows`.
Row = dict[str, int | float]


@dataclass(frozen=True, eq=False)
class AffineMaps:
    """For pairs of layers the map `W s + b` that is closest to the later state of the same token. Call it as a mapping.

    Attributes:
        site: whose states were read.
        source_layers, target_layers: the blocks.
        weights: W of each pair, [source target d_model d_model].
        biases: b of each pair, [source target d_model].
        r2: the share of the target states' variance that the map explains on held-out prompts, [source target]; below 0
            where it is further away than the mean of the states fitted.
        n_fitted, n_held_out: how many states.
    """

    site: str
    source_layers: tuple[int, ...]
    target_layers: tuple[int, ...]
    weights: Float[Tensor, "source target d_model d_model2"]
    biases: Float[Tensor, "source target d_model"]
    r2: Float[Tensor, "source target"]
    n_fitted: int
    n_held_out: int

    def __call__(
        self, states: Float[Tensor, "*example d_model"], source_layer: int, target_layer: int
    ) -> Float[Tensor, "*example d_model"]:
        """Return states of the source layer as the target layer would have them.

        Args:
            states: at the site.
            source_layer, target_layer: the blocks, by their numbers in the model.

        Raises:
            ValueError: no map of these layers was fitted, or states have another width.
        """
        at = (self._place(source_layer, self.source_layers), self._place(target_layer, self.target_layers))
        if states.shape[-1] != self.weights.shape[-1]:
            raise ValueError(f"states are [*example {self.weights.shape[-1]}], got {tuple(states.shape)}")
        exact = states.to(self.weights)
        return (exact @ self.weights[at].T + self.biases[at]).to(states)

    @staticmethod
    def _place(layer: int, layers: tuple[int, ...]) -> int:
        if layer not in layers:
            raise ValueError(f"there is no map of layer {layer!r}: there are {', '.join(map(str, layers))}")
        return layers.index(layer)

    def top(self, k: int = 5) -> list[tuple[int, int, float]]:
        """Return the `k` pairs whose map explains most, as (source layer, target layer, r2).

        Args:
            k: how many; fewer where there are fewer.

        Raises:
            ValueError: `k` is below 1.
        """
        at_least_one(k, "k")
        best = self.r2.flatten().argsort(descending=True, stable=True)[:k].tolist()
        width = len(self.target_layers)
        return [
            (self.source_layers[at // width], self.target_layers[at % width], float(self.r2.flatten()[at]))
            for at in best
        ]

    def rows(self) -> list[Row]:
        """Return a dictionary for each pair of layers; `pandas.DataFrame` takes them.

        Keys: `source_layer`, `target_layer`, `r2`.
        """
        return [
            {"source_layer": source, "target_layer": target, "r2": float(self.r2[row, column])}
            for row, source in enumerate(self.source_layers)
            for column, target in enumerate(self.target_layers)
        ]

    def table(self) -> str:
        """Return the variance explained as text: a line for each source layer, a column for each target layer."""
        lines = [["r2 of layer", *(f"to {layer}" for layer in self.target_layers)]]
        lines += [
            [str(layer), *(f"{value:.3f}" for value in row)]
            for layer, row in zip(self.source_layers, self.r2.tolist(), strict=True)
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)

    def __str__(self) -> str:
        return self.table()

    def figure(self, title: str = "") -> Figure:
        """Return the variance explained over source layers, a curve for each target layer. Needs the extra `viz`.

        Args:
            title: of the figure.

        Raises:
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import layer_curves

        curves = {f"to layer {layer}": self.r2[:, column] for column, layer in enumerate(self.target_layers)}
        labels = [str(layer) for layer in self.source_layers]
        return layer_curves(curves, labels, axis="variance explained, held out", title=title)


@torch.no_grad()
def fit_affine_maps(
    model: HookedModel,
    prompts: Prompts,
    target_layers: Sequence[int] = (-1,),
    *,
    source_layers: Sequence[int] | None = None,
    site: ScopeSite = "resid_post",
    pos: Positions | None = None,
    l2: float = 1e-4,
    test_share: float = 0.25,
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    verbose: bool = True,
) -> AffineMaps:
    """Fit maps from each source layer's states to each target layer's states of the same tokens, by least squares.

    Source: Din et al. 2023, "Jump to Conclusions: Short-Cutting Transformers With Linear Transformations"; as the
    mapping of a patchscope Ghandeharioun et al. 2024. All tokens of a prompt are on one side of the division, and so
    are equal prompts. Hooks and interventions that are in place act.

    Args:
        model: a `HookedTransformer`.
        prompts: strings of any lengths, or tokens [batch pos]. Of states fitted there should be several times d_model.
        target_layers: the blocks whose states are mapped to; negative from the end.
        source_layers: the blocks whose states are mapped; by default all.
        site: the stream before, within or after a block.
        pos: which tokens, as for `TokensAt.of`; by default all but each prompt's first, whose state is often unlike any
            other (`activations_at` reads all of one prompt's).
        l2: the penalty, as for `probing.fit_probe`.
        test_share: the share of the states to hold out.
        attention_mask: [batch pos], 0 at padding, for tokens.
        batch_size: prompts that are run at a time.
        device: where states are kept and maps are fitted.
        seed: of the division.
        verbose: show a progress bar.

    Raises:
        UnknownHookError: the model has no such site.
        ValueError: a layer or position that is not there, fewer than four different prompts, states that are NaN or
            infinite, or a setting out of range.
    """
    check_penalty(l2)
    n_layers = model.cfg.n_layers
    sources, targets = chosen_layers(model, source_layers), tuple(layer_index(one, n_layers) for one in target_layers)
    if not targets:
        raise ValueError("there are no layers to map to: target_layers is empty")
    tokens = TokensAt.of(
        model, prompts, _all_but_first(model, prompts, attention_mask) if pos is None else pos, attention_mask
    )
    groups = numbered(tokens.same_prompt, len(tokens), "prompts")
    held_out = hold_out(groups, test_share, torch.Generator().manual_seed(seed))
    read = tuple(dict.fromkeys((*sources, *targets)))
    states = activations_at(model, tokens, site, read, batch_size=batch_size, device=device, verbose=verbose)
    at = {layer: states[row] for row, layer in enumerate(read)}
    maps, explained = list[tuple[Tensor, Tensor]](), list[float]()
    for source in sources:
        for target in targets:
            x, y = at[source], at[target].to(torch.promote_types(states.dtype, torch.float32))
            weights, bias = fit_affine(x[~held_out], y[~held_out], ridge, l2)
            maps.append((weights, bias))
            error = x[held_out].to(weights) @ weights.T + bias - y[held_out]
            spread = y[held_out] - y[~held_out].mean(0)
            explained.append(float(1 - error.square().sum() / spread.square().sum()))
    shape = (len(sources), len(targets))
    return AffineMaps(
        site=site,
        source_layers=sources,
        target_layers=targets,
        weights=torch.stack([weights for weights, _ in maps]).unflatten(0, shape),
        biases=torch.stack([bias for _, bias in maps]).unflatten(0, shape),
        r2=torch.tensor(explained, dtype=torch.float64).unflatten(0, shape),
        n_fitted=int((~held_out).sum()),
        n_held_out=int(held_out.sum()),
    )


def _all_but_first(model: HookedModel, prompts: Prompts, attention_mask: Tensor | None) -> list[list[int]]:
    lengths = LastTokenPrompts.of(model, prompts, attention_mask).mask.sum(1).tolist()
    return [list(range(1, length)) for length in lengths]
