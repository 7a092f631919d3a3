"""Lenses compared: from which layer on can the model's own next token be read, by a patchscope and by other lenses?

As in Ghandeharioun et al. 2024, "Patchscopes", figure on the next token: states of every layer are read by a patchscope
(into the same layer of a prompt that repeats words), by the logit lens (nostalgebraist 2020: the final norm and the
unembedding), and by an affine map to the last layer before these (Din et al. 2023), if maps are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_lm._support.integers import at_least_one
from hooked_lm._support.precision import at_least_single
from hooked_lm.circuits.last_token import chosen_layers
from hooked_lm.circuits.logit_lens import read_out
from hooked_lm.hooked_model import HookedModel
from hooked_lm.patching.statistics import bootstrap_interval
from hooked_lm.patchscopes.mapping import AffineMaps
from hooked_lm.patchscopes.run import patchscope, require_next_token
from hooked_lm.patchscopes.target import TargetPrompt, identity_prompt
from hooked_lm.probing.positions import Positions, TokensAt, activations_at
from hooked_lm.tokenization import Prompts

if TYPE_CHECKING:
    from hooked_lm.plotting import Figure

__all__ = ["LensComparison", "compare_lenses"]

# A line of `LensComparison.rows`.
Row = dict[str, str | int | float]

PATCHSCOPE, LOGIT_LENS, AFFINE = "patchscope", "logit lens", "affine map"


@dataclass(frozen=True, eq=False)
class LensComparison:
    """How well lenses read the model's own next token at each layer.

    Attributes:
        lenses: `"patchscope"`, `"logit lens"`, and with maps `"affine map"`.
        layers: the blocks after which states were read.
        target: the prompt of the patchscope.
        answers: the model's own next token, [prompt].
        correct: whether a lens has it as the likeliest token, [lens layer prompt].
        surprisal: its negative log-probability in a lens, in nats, [lens layer prompt].
        low, high: the ends of the precision's bootstrap interval, [lens layer]; prompts are drawn.
        confidence: of the interval.
    """

    lenses: tuple[str, ...]
    layers: tuple[int, ...]
    target: TargetPrompt
    answers: Int[Tensor, " prompt"]
    correct: Float[Tensor, "lens layer prompt"]
    surprisal: Float[Tensor, "lens layer prompt"]
    low: Float[Tensor, "lens layer"]
    high: Float[Tensor, "lens layer"]
    confidence: float

    @property
    def precision(self) -> Float[Tensor, "lens layer"]:
        """The share of prompts whose next token a lens has as the likeliest (precision@1)."""
        return self.correct.mean(-1)

    def top(self, k: int = 5) -> list[tuple[str, int, float]]:
        """Return the `k` most precise lenses and layers, as (lens, layer, precision); of equal ones the first.

        Args:
            k: how many; fewer where there are fewer.

        Raises:
            ValueError: `k` is below 1.
        """
        at_least_one(k, "k")
        found = self.precision.flatten()
        width = len(self.layers)
        best = found.argsort(descending=True, stable=True)[:k].tolist()
        return [(self.lenses[at // width], self.layers[at % width], float(found[at])) for at in best]

    def rows(self) -> list[Row]:
        """Return a dictionary for each lens and layer; `pandas.DataFrame` takes them.

        Keys: `lens`, `layer`, `precision`, `low`, `high`, `surprisal` (the mean).
        """
        return [
            {
                "lens": lens,
                "layer": layer,
                "precision": float(self.precision[row, column]),
                "low": float(self.low[row, column]),
                "high": float(self.high[row, column]),
                "surprisal": float(self.surprisal[row, column].mean()),
            }
            for row, lens in enumerate(self.lenses)
            for column, layer in enumerate(self.layers)
        ]

    def table(self) -> str:
        """Return the precision of each lens as text, with its interval and the mean surprisal in nats."""
        lines = [["lens", "layer", "precision", "interval", "surprisal"]]
        lines += [
            [
                *(str(row["lens"]), str(row["layer"]), f"{row['precision']:.2f}"),
                *(f"{row['low']:.2f} to {row['high']:.2f}", f"{row['surprisal']:.2f}"),
            ]
            for row in self.rows()
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    def __str__(self) -> str:
        return self.table()

    def figure(self, title: str = "") -> Figure:
        """Return the precision over layers, a curve for each lens. Needs the extra `viz`.

        Args:
            title: of the figure.

        Raises:
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import layer_curves

        curves: Mapping[str, Tensor] = dict(zip(self.lenses, self.precision, strict=True))
        return layer_curves(dict(curves), [str(layer) for layer in self.layers], axis="precision@1", title=title)


@torch.no_grad()
def compare_lenses(
    model: HookedModel,
    prompts: Prompts,
    *,
    target: TargetPrompt | Prompts | None = None,
    pos: Positions = -1,
    layers: Sequence[int] | None = None,
    maps: AffineMaps | None = None,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    batch_size: int = 32,
    verbose: bool = True,
) -> LensComparison:
    """Return how well states after each layer give the model's own next token, by a patchscope and other lenses.

    The model's own token is the likeliest that its final norm and unembedding read from the last layer's state. Hooks
    and interventions that are in place act in the runs, not in that reading nor in the logit lens.

    Args:
        model: a `HookedTransformer`, causal.
        prompts: two or more: strings of any lengths, or tokens [batch pos].
        target: where the patchscope puts states; by default `identity_prompt(model)`, which needs a tokenizer.
        pos: which token's state, and whose next token: a position in every prompt, or one for each.
        layers: the blocks; by default all.
        maps: from these layers' `"resid_post"` to the last layer's, as `fit_affine_maps` returns by default, fitted to
            other prompts.
        confidence, n_resamples, seed: of the bootstrap interval.
        attention_mask: [batch pos], 0 at padding, for tokens.
        batch_size: prompts that are run at a time.
        verbose: show a progress bar.

    Raises:
        ValueError: fewer than two prompts, maps of other layers or another site, or as `patchscope`.
    """
    require_next_token(model, "a comparison of lenses")
    chosen, last = chosen_layers(model, layers), model.cfg.n_layers - 1
    _check_maps(maps, chosen, last)
    scope = identity_prompt(model) if target is None else target
    tokens = TokensAt.of(model, prompts, pos, attention_mask)
    read = tuple(dict.fromkeys((*chosen, last)))
    home = model.embed.W_E.device
    states = activations_at(model, tokens, "resid_post", read, device=home, batch_size=batch_size, verbose=verbose)
    at = {layer: states[row] for row, layer in enumerate(read)}
    answers = torch.cat([read_out(model, part).argmax(-1) for part in at[last].split(batch_size)]).cpu()
    found = patchscope(
        model,
        prompts,
        scope,
        source_pos=pos,
        source_layers=chosen,
        answers=answers,
        top_k=1,
        attention_mask=attention_mask,
        batch_size=batch_size,
        verbose=verbose,
    )
    assert found.answer_ranks is not None
    assert found.answer_log_probs is not None
    ranks, log_probs = [found.answer_ranks], [found.answer_log_probs]
    streams = [[at[layer] for layer in chosen]]
    if maps is not None:
        streams.append([maps(at[layer], layer, last) for layer in chosen])
    for several in streams:
        readings = [_read(model, stream, answers, batch_size) for stream in several]
        ranks.append(torch.stack([rank for rank, _ in readings]))
        log_probs.append(torch.stack([log_prob for _, log_prob in readings]))
    correct = (torch.stack(ranks) == 0).double()
    low, high = bootstrap_interval(correct, confidence, n_resamples, seed)
    lenses = (PATCHSCOPE, LOGIT_LENS) if maps is None else (PATCHSCOPE, LOGIT_LENS, AFFINE)
    return LensComparison(
        lenses, chosen, found.target, answers, correct, -torch.stack(log_probs), low, high, confidence
    )


def _check_maps(maps: AffineMaps | None, layers: tuple[int, ...], last: int) -> None:
    if maps is None:
        return
    missing = sorted(set(layers) - set(maps.source_layers))
    if maps.site != "resid_post" or missing or last not in maps.target_layers:
        raise ValueError(
            f"maps go from 'resid_post' of layers {list(layers)} to that of layer {last}; these are of {maps.site!r}, "
            f"from {list(maps.source_layers)} to {list(maps.target_layers)}"
        )


def _read(
    model: HookedModel, states: Float[Tensor, "prompt d_model"], answers: Int[Tensor, " prompt"], batch_size: int
) -> tuple[Int[Tensor, " prompt"], Float[Tensor, " prompt"]]:
    """The rank and the log-probability of answers where the final norm and the unembedding read states."""
    ranks, log_probs = [], []
    for part, asked in zip(states.split(batch_size), answers.split(batch_size), strict=True):
        all_tokens = at_least_single(read_out(model, part)).log_softmax(-1)
        own = all_tokens.gather(-1, asked[:, None].to(all_tokens.device))
        ranks.append((all_tokens > own).sum(-1).cpu())
        log_probs.append(own[:, 0].cpu())
    return torch.cat(ranks), torch.cat(log_probs)
