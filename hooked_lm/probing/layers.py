"""probe_layers: one probe for each layer, all on the same examples, the same division and the same control tasks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm._support.integers import at_least_one
from hooked_lm.circuits.last_token import chosen_layers
from hooked_lm.hooked_model import HookedModel
from hooked_lm.probing.division import Entries, listed
from hooked_lm.probing.evaluation import ProbeResult, evaluate_probe
from hooked_lm.probing.labels import LabelledExamples, Labels
from hooked_lm.probing.positions import Positions, TokensAt, activations_at
from hooked_lm.probing.probe import Kind, check_settings
from hooked_lm.tokenization import Prompts

if TYPE_CHECKING:
    from hooked_lm.plotting import Figure

__all__ = ["LayerProbes", "probe_layers"]

# A line of `LayerProbes.rows`.
Row = dict[str, int | float | None]


@dataclass(frozen=True, eq=False)
class LayerProbes:
    """A probe for each layer, and what it is worth.

    Attributes:
        site: whose activations were read.
        layers: the blocks, in the order asked for.
        results: of each block.
    """

    site: str
    layers: tuple[int, ...]
    results: tuple[ProbeResult, ...]

    @property
    def accuracy(self) -> Float[Tensor, " layer"]:
        """The accuracy on held-out examples."""
        return torch.tensor([result.accuracy for result in self.results])

    @property
    def majority(self) -> float:
        """The accuracy of always giving the commonest label."""
        return self.results[0].majority

    @property
    def selectivity(self) -> Float[Tensor, " layer"] | None:
        """The accuracy less that on control tasks; None without types."""
        values = [result.selectivity for result in self.results if result.selectivity is not None]
        return torch.tensor(values) if values else None

    def __getitem__(self, layer: int) -> ProbeResult:
        """Return the result of a block, by its number in the model.

        Raises:
            KeyError: the block was not probed.
        """
        if layer not in self.layers:
            raise KeyError(f"layer {layer!r} was not probed: there are {', '.join(map(str, self.layers))}")
        return self.results[self.layers.index(layer)]

    def top(self, k: int = 5) -> list[tuple[int, float]]:
        """Return the `k` layers with the highest accuracy, as (layer, accuracy); of equal ones the first comes first.

        Args:
            k: how many layers.

        Raises:
            ValueError: `k` is below 1.
        """
        at_least_one(k, "k")
        best = self.accuracy.argsort(descending=True, stable=True)[:k].tolist()
        return [(self.layers[index], self.results[index].accuracy) for index in best]

    def rows(self) -> list[Row]:
        """Return a dictionary for each layer; `pandas.DataFrame` takes them.

        Keys: `layer`, `accuracy`, `low`, `high`, `majority`, `fitted_accuracy`, `control_accuracy`, `selectivity`.
        """
        keys = ("accuracy", "low", "high", "majority", "fitted_accuracy", "control_accuracy", "selectivity")
        return [
            {"layer": layer, **{key: getattr(result, key) for key in keys}}
            for layer, result in zip(self.layers, self.results, strict=True)
        ]

    def table(self) -> str:
        """Return the layers as text: accuracy with its interval, the majority class, and selectivity with types."""
        selective = self.selectivity is not None
        lines = [f"layer  accuracy  interval      majority{'  selectivity' if selective else ''}"]
        for layer, result in zip(self.layers, self.results, strict=True):
            interval = f"{result.low:.2f} to {result.high:.2f}"
            line = f"{layer:>5}  {result.accuracy:>8.2f}  {interval:<12}  {result.majority:>8.2f}"
            lines.append(line if result.selectivity is None else f"{line}  {result.selectivity:>+11.2f}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def figure(self, title: str = "") -> Figure:
        """Return the accuracy over layers as curves, with the majority class as a level. Needs the extra `viz`.

        Args:
            title: of the figure.

        Raises:
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import layer_curves

        curves = {"accuracy": self.accuracy}
        selectivity = self.selectivity
        if selectivity is not None:
            curves["on control tasks"] = torch.tensor([float(one.control_accuracy or 0) for one in self.results])
            curves["selectivity"] = selectivity
        labels = [str(layer) for layer in self.layers]
        return layer_curves(curves, labels, axis="held out", levels={"majority class": self.majority}, title=title)


def probe_layers(
    model: HookedModel,
    prompts: Prompts,
    labels: Labels | Sequence[Labels],
    site: str = "resid_post",
    pos: Positions = -1,
    *,
    layers: Sequence[int] | None = None,
    kind: Kind = "logistic",
    l2: float = 0.01,
    groups: Entries | None = None,
    types: Literal["token"] | Entries | None = None,
    n_controls: int = 3,
    test_share: float = 0.25,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    verbose: bool = True,
) -> LayerProbes:
    """Fit a probe at every layer to the activations of chosen tokens, and score it on prompts held out.

    The model runs once over each batch of prompts, and only the positions asked for are kept. Every layer has the same
    held-out prompts and the same control tasks, so that layers can be compared.

    Args:
        model: a `HookedTransformer`.
        prompts: strings of any lengths, or tokens [batch pos].
        labels: one for each prompt; where `pos` gives several positions for a prompt, a list of as many labels.
        site, layers: as for `activations_at`.
        pos: a position in every prompt, -1 for the last token; or for each prompt a position or a list of them, as for
            `TokensAt.of`.
        kind, l2: as for `fit_probe`.
        groups: one for each prompt: prompts of one group, such as those about one person, are held out together. By
            default the prompts that are equal are a group. All positions of a prompt are on one side in any case.
        types: for control tasks, one for each prompt or, as the labels, for each position; or `"token"`, the token that
            an activation is of. None for no control task.
        n_controls, test_share: as for `probe_activations`.
        confidence, n_resamples: of the bootstrap interval; groups are drawn.
        attention_mask: [batch pos], 0 at padding, for tokens.
        batch_size: prompts that are run at a time.
        device: where the activations are kept and the probes are fitted.
        seed: of the division, the control tasks and the bootstrap.
        verbose: show a progress bar.

    Raises:
        UnknownHookError: a layer has no such hook.
        ValueError: as `TokensAt.of`, `activations_at`, `LabelledExamples.divided` and `fit_probe`; or lists that do not
            have an entry for each prompt.
    """
    check_settings(kind, l2)
    tokens = TokensAt.of(model, prompts, pos, attention_mask)
    label_of = _by_example(labels, tokens, "labels")
    group_of = tokens.same_prompt if groups is None else _by_example(groups, tokens, "groups", by_prompt=True)
    by_token = isinstance(types, str) and types == "token"
    type_of = tokens.tokens if by_token else None if types is None else _by_example(types, tokens, "types")
    examples = LabelledExamples.divided(
        label_of,  # type: ignore[arg-type]
        group_of,
        type_of,
        n_controls=n_controls,
        test_share=test_share,
        seed=seed,
    )
    chosen = chosen_layers(model, layers)
    activations = activations_at(model, tokens, site, chosen, batch_size=batch_size, device=device, verbose=verbose)
    results = [
        evaluate_probe(activations[index], examples, kind, l2, confidence, n_resamples, seed)
        for index in tqdm(range(len(chosen)), disable=not verbose, desc="probes", leave=False)
    ]
    return LayerProbes(site, chosen, tuple(results))


def _by_example(
    given: Sequence[object] | Tensor | np.ndarray, tokens: TokensAt, what: str, by_prompt: bool = False
) -> list[Hashable]:
    """What is given for each prompt, or for each of its positions, as one for each example."""
    n_prompts = len(tokens.prompts)
    entries = listed(given)
    if len(entries) != n_prompts or isinstance(given, str):
        raise ValueError(f"{what} are one for each of the {n_prompts} prompts, got {len(entries)}")
    counts = tokens.rows.bincount(minlength=n_prompts).tolist()
    found: list[Hashable] = []
    for row, (entry, count) in enumerate(zip(entries, counts, strict=True)):
        several = [entry] * count if by_prompt or not isinstance(entry, (list, tuple)) else list(entry)
        if len(several) != count:
            raise ValueError(f"prompt {row} has {count} positions and {len(several)} {what}: give one for each")
        found += several
    return found
