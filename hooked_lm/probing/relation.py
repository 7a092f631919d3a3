"""Relation probes: an affine map from the stream at a subject to the stream that the model answers from.

"The capital of Namibia is" has an answer, which the model finds from its subject, " Namibia". Is that an affine map of
the subject's stream? The map is fitted to some subjects and held to others: it is faithful where the model's own
unembedding reads the model's own answer from it. Hernandez et al. 2024, "Linearity of Relation Decoding in Transformer
Language Models", take the model's derivative by that stream for the map; here it is regression, so that what later
layers find at other tokens counts too, as far as it goes with the subject's stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_lm._support.integers import at_least_one
from hooked_lm.circuits.last_token import chosen_layers
from hooked_lm.circuits.logit_lens import read_out
from hooked_lm.hooked_model import HookedModel
from hooked_lm.probing.division import Entries, grouped_interval, hold_out, numbered
from hooked_lm.probing.fitting import check_penalty, fit_affine, ridge
from hooked_lm.probing.positions import Positions, TokensAt, activations_at
from hooked_lm.tokenization import Prompts

if TYPE_CHECKING:
    from hooked_lm.plotting import Figure

__all__ = ["RelationProbes", "probe_relation"]

# A line of `RelationProbes.rows`.
Row = dict[str, int | float]


@dataclass(frozen=True, eq=False)
class RelationProbes:
    """For each layer the map `W s + b` from subjects to final streams, and the answers read from it.

    Attributes:
        site: where subjects were read.
        layers: in which blocks.
        weights: W of each layer, [layer d_model width].
        biases: b of each layer, [layer d_model].
        subjects: the subject's token in each held-out prompt, [prompt].
        answers: the model's own answer to each, [prompt].
        predicted: the answer read from the map, [layer prompt].
        low, high: the ends of the bootstrap interval of the faithfulness, [layer]; groups of prompts are drawn.
        confidence: of the interval.
        shuffled: the faithfulness of maps that are fitted to the final streams of other subjects: what is left of it
            where there is nothing to find, [layer].
        majority: the share of held-out prompts whose answer is the commonest among those fitted: the faithfulness of a
            map that looks at no subject.
        n_fitted: how many prompts the maps are fitted to.
        strings: the tokens above as strings; None without a tokenizer.
    """

    site: str
    layers: tuple[int, ...]
    weights: Float[Tensor, "layer d_model width"]
    biases: Float[Tensor, "layer d_model"]
    subjects: Int[Tensor, " prompt"]
    answers: Int[Tensor, " prompt"]
    predicted: Int[Tensor, "layer prompt"]
    low: Float[Tensor, " layer"]
    high: Float[Tensor, " layer"]
    confidence: float
    shuffled: Float[Tensor, " layer"]
    majority: float
    n_fitted: int
    strings: Mapping[int, str] | None

    @property
    def faithfulness(self) -> Float[Tensor, " layer"]:
        """The share of held-out prompts on which the map gives the model's own answer."""
        return (self.predicted == self.answers).to(self.low.dtype).mean(-1)

    def decode(self, subjects: Float[Tensor, "*example width"], layer: int) -> Float[Tensor, "*example d_model"]:
        """Return the final streams of subjects; `circuits.logit_lens.read_out` turns them into logits.

        Args:
            subjects: their streams at the site.
            layer: the block, by its number in the model.

        Raises:
            ValueError: the block was not probed, or streams have another width.
        """
        place, width = self._place(layer), self.weights.shape[-1]
        if subjects.shape[-1] != width:
            raise ValueError(f"subjects are [*example {width}], got {tuple(subjects.shape)}")
        return subjects.to(self.weights) @ self.weights[place].T + self.biases[place]

    def _place(self, layer: int) -> int:
        if layer not in self.layers:
            raise ValueError(f"layer {layer!r} was not probed: there are {', '.join(map(str, self.layers))}")
        return self.layers.index(layer)

    def top(self, k: int = 5) -> list[tuple[int, float]]:
        """Return the `k` most faithful layers, as (layer, faithfulness); of equal ones the first comes first.

        Args:
            k: how many layers.

        Raises:
            ValueError: `k` is below 1.
        """
        at_least_one(k, "k")
        found = self.faithfulness
        return [(self.layers[at], float(found[at])) for at in found.argsort(descending=True, stable=True)[:k].tolist()]

    def errors(self, layer: int) -> list[tuple[str, str, str]]:
        """Return (subject, the map's answer, the model's answer) where the two differ.

        Args:
            layer: the block, by its number in the model.

        Raises:
            ValueError: the block was not probed.
        """
        predicted = self.predicted[self._place(layer)]
        wrong = predicted != self.answers
        triples = torch.stack([self.subjects, predicted, self.answers], 1)[wrong].tolist()
        return [(self._named(a), self._named(b), self._named(c)) for a, b, c in triples]

    def _named(self, token: int) -> str:
        return str(token) if self.strings is None else self.strings[token]

    def rows(self) -> list[Row]:
        """Return a dictionary for each layer; `pandas.DataFrame` takes them.

        Keys: `layer`, `faithfulness`, `low`, `high`, `shuffled`, `majority`.
        """
        keys = ("layer", "faithfulness", "low", "high", "shuffled", "majority")
        columns = (one.tolist() for one in (self.faithfulness, self.low, self.high, self.shuffled))
        lines = zip(self.layers, *columns, [self.majority] * len(self.layers), strict=True)
        return [dict(zip(keys, line, strict=True)) for line in lines]

    def table(self) -> str:
        """Return the layers as text: faithfulness with its interval, that of shuffled pairs, and the majority."""
        lines = ["layer  faithfulness  interval      shuffled  majority"]
        for row in self.rows():
            interval = f"{row['low']:.2f} to {row['high']:.2f}"
            line = f"{row['layer']:>5}  {row['faithfulness']:>12.2f}  {interval:<12}"
            lines.append(f"{line}  {row['shuffled']:>8.2f}  {row['majority']:>8.2f}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def figure(self, title: str = "") -> Figure:
        """Return the faithfulness over layers, with the majority as a level. Needs the extra `viz`.

        Args:
            title: of the figure.

        Raises:
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import layer_curves

        labels = [str(layer) for layer in self.layers]
        levels = {"majority": self.majority}
        curves = {"faithfulness": self.faithfulness, "shuffled pairs": self.shuffled}
        return layer_curves(curves, labels, axis="held out", levels=levels, title=title)


@torch.no_grad()
def probe_relation(
    model: HookedModel,
    prompts: Prompts,
    subject_pos: Positions,
    site: str = "resid_post",
    *,
    layers: Sequence[int] | None = None,
    l2: float = 0.01,
    groups: Entries | None = None,
    test_share: float = 0.25,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    verbose: bool = True,
) -> RelationProbes:
    """Fit, at every layer, a map from the subject's activation to the final stream at the last token of the prompt.

    The map is ridge regression in closed form, as the linear kind of `fit_probe`, and is scored on subjects held out.
    Hooks and interventions that are in place act in the runs, not in the final norm and unembedding that read answers.

    Args:
        model: a `HookedTransformer`.
        prompts: of one relation, about several subjects: strings of any lengths, or tokens [batch pos].
        subject_pos: the subject's token, the last if it has several: a position in every prompt, or one for each.
        site, layers: where the subject is read, as for `activations_at`.
        l2: the penalty, as for `fit_probe`.
        groups: one for each prompt: prompts of one group are held out together. By default those whose subjects end in
            one token are a group.
        test_share: the share of the prompts to hold out.
        confidence, n_resamples: of the bootstrap interval; groups are drawn.
        attention_mask: [batch pos], 0 at padding, for tokens.
        batch_size: prompts that are run at a time.
        device: where streams are kept and maps are fitted.
        seed: of the division and the bootstrap.
        verbose: show a progress bar.

    Raises:
        UnknownHookError: a layer has no such hook.
        ValueError: a layer or position that is not there, several positions for a prompt, too few groups, groups for
            another number of prompts, streams that are NaN or infinite, or a setting out of range.
    """
    check_penalty(l2)
    chosen = chosen_layers(model, layers)
    subjects = TokensAt.of(model, prompts, subject_pos, attention_mask)
    ends = TokensAt.of(model, prompts, -1, attention_mask)
    if not torch.equal(subjects.rows, ends.rows):
        raise ValueError("a relation has one subject in each prompt: give one position for each")
    group_of = numbered(subjects.tokens if groups is None else groups, len(ends), "groups")
    generator = torch.Generator().manual_seed(seed)
    held_out = hold_out(group_of, test_share, generator)
    streams, (finals,) = (
        activations_at(model, tokens, at, there, batch_size=batch_size, device=device, verbose=verbose)
        for tokens, at, there in ((subjects, site, chosen), (ends, "resid_post", (-1,)))
    )
    answers, mixed = _answers(model, finals), torch.randperm(int((~held_out).sum()), generator=generator)
    maps = [_map(stream, finals, held_out, l2) for stream in streams]
    predicted = _read(model, streams[:, held_out], maps)
    to_others = finals.clone()
    to_others[~held_out] = finals[~held_out][mixed.to(finals.device)]
    shuffled = _read(model, streams[:, held_out], [_map(stream, to_others, held_out, l2) for stream in streams])
    correct = predicted == answers[held_out]
    ends_of = [grouped_interval(one, group_of[held_out], confidence, n_resamples, seed) for one in correct]
    low, high = torch.tensor(ends_of).T
    occurring = torch.cat([answers, predicted.flatten(), subjects.tokens]).unique().tolist()
    return RelationProbes(
        site=site,
        layers=chosen,
        weights=torch.stack([weights for weights, _ in maps]),
        biases=torch.stack([bias for _, bias in maps]),
        subjects=subjects.tokens[held_out],
        answers=answers[held_out],
        predicted=predicted,
        low=low,
        high=high,
        confidence=confidence,
        shuffled=(shuffled == answers[held_out]).to(low.dtype).mean(-1),
        majority=float((answers[held_out] == answers[~held_out].mode().values).double().mean()),
        n_fitted=int((~held_out).sum()),
        strings=None if model.tokenizer is None else {one: model.to_single_str_token(one) for one in occurring},
    )


def _answers(model: HookedModel, finals: Float[Tensor, "example d_model"]) -> Int[Tensor, " example"]:
    """The likeliest token of final streams."""
    return read_out(model, finals.to(model.W_U)).argmax(-1).cpu()


_Map = tuple[Float[Tensor, "d_model width"], Float[Tensor, " d_model"]]


def _map(
    stream: Float[Tensor, "example width"], finals: Float[Tensor, "example d_model"], held_out: Tensor, l2: float
) -> _Map:
    return fit_affine(stream[~held_out], finals[~held_out], ridge, l2)


def _read(
    model: HookedModel, streams: Float[Tensor, "layer example width"], maps: Sequence[_Map]
) -> Int[Tensor, "layer example"]:
    decoded = [stream.to(weight) @ weight.T + bias for stream, (weight, bias) in zip(streams, maps, strict=True)]
    return torch.stack([_answers(model, one) for one in decoded])
