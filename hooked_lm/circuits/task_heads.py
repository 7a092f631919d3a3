"""Which heads bring a task back, and the vector that they write together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from hooked_lm import metrics
from hooked_lm.circuits.last_token import (
    Answers,
    LastTokenPrompts,
    answer_tokens,
    check_finite,
    check_means,
    layer_index,
    sweep_in_batches,
)
from hooked_lm.circuits.stock_only import require_stock_attention
from hooked_lm.hooked_model import HookedModel
from hooked_lm.interventions import Intervention
from hooked_lm.names import get_act_name
from hooked_lm.sweep.options import DEFAULT_MEMORY_BUDGET
from hooked_lm.tokenization import Prompts

__all__ = ["FunctionVector", "Head", "HeadEffects", "Measure", "function_vector", "head_effects"]

Head = tuple[int, int]
Measure = Literal["prob", "log_prob"]

_DEFAULT_N_HEADS = 10


# Which heads bring the task back


@dataclass(frozen=True, eq=False)
class HeadEffects:
    """How much each head's mean output over a task's prompts raises the answer in prompts that do not show the task.

    Attributes:
        measure: `"prob"`, the probability of the answer, or `"log_prob"`, its logarithm, in nats.
        base: the measure in the prompts as they are, [prompt].
        scores: the measure with one head's output replaced, [layer head prompt].
    """

    measure: Measure
    base: Float[Tensor, " prompt"]
    scores: Float[Tensor, "layer head prompt"]

    @property
    def per_prompt(self) -> Float[Tensor, "layer head prompt"]:
        """Each prompt's causal indirect effect: with the replacement less without."""
        return self.scores - self.base

    @property
    def effect(self) -> Float[Tensor, "layer head"]:
        """The average indirect effect, over prompts."""
        return self.per_prompt.mean(-1)

    @property
    def standard_error(self) -> Float[Tensor, "layer head"]:
        """The standard error of `effect`: deviation between prompts over the root of their number.

        Raises:
            ValueError: there is one prompt.
        """
        n_prompts = len(self.base)
        if n_prompts < 2:
            raise ValueError("a standard error needs two prompts or more, and these effects are of one")
        error: Tensor = self.per_prompt.std(-1) / n_prompts**0.5
        return error

    def top(self, n_heads: int = _DEFAULT_N_HEADS) -> list[Head]:
        """Return the (layer, head) of the largest effects, the largest first.

        Raises:
            ValueError: fewer than one, or more than there are.
        """
        return _top_heads(self.effect, n_heads)

    def __repr__(self) -> str:
        layers, heads, prompts = self.scores.shape
        return (
            f"HeadEffects({self.measure!r}, layer {layers}, head {heads}, {prompts} prompts, "
            f"base {float(self.base.mean()):.4g})"
        )


@torch.no_grad()
def head_effects(
    model: HookedModel,
    corrupted_prompts: Prompts,
    answers: Answers,
    mean_z: Float[Tensor, "layer head d_head"],
    *,
    measure: Measure = "prob",
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    verbose: bool = True,
) -> HeadEffects:
    """Return how much the answer gains from each head when its output at the last token is the task's mean.

    Args:
        model: a `HookedTransformer`.
        corrupted_prompts: prompts that do not show the task, in the paper those with shuffled answers; strings of any
            lengths, or tokens [batch pos].
        answers: the right answer to each prompt, or one for all: tokens, or strings that are one token each.
        mean_z: from `mean_head_outputs`.
        measure: `"prob"`, as in the paper, or `"log_prob"`, which also tells small probabilities apart.
        attention_mask: [batch pos], 0 at padding, for tokens.
        batch_size: prompts that are swept at a time.
        memory_budget, verbose: as for `sweep`.

    Raises:
        ValueError: an unknown measure, answers that do not fit the prompts or the vocabulary, means that are not
            [layer head d_head] of this model or not finite, and as for `mean_head_outputs`. Nothing has run then.
    """
    if measure not in get_args(Measure):
        raise ValueError(f"measure is one of {', '.join(get_args(Measure))}; got {measure!r}")
    check_means(model, mean_z)
    prompts = LastTokenPrompts.of(model, corrupted_prompts, attention_mask)
    column = answer_tokens(model, answers, len(prompts))
    grid = itertools.product(range(model.cfg.n_layers), range(model.cfg.n_heads))
    cells = [
        Intervention(get_act_name("z", layer), "replace", mean_z[layer, head], pos=-1, head=head)
        for layer, head in grid
    ]
    metric = metrics.prob if measure == "prob" else metrics.log_prob
    scores = sweep_in_batches(
        model,
        prompts,
        [(), *cells],
        metric,
        column,
        batch_size=batch_size,
        memory_budget=memory_budget,
        verbose=verbose,
    )
    return HeadEffects(measure, scores[0], torch.unflatten(scores[1:], 0, (model.cfg.n_layers, model.cfg.n_heads)))


# The vector that they write


@dataclass(frozen=True, eq=False)
class FunctionVector:
    """What some heads write together at the last token of a task's prompts.

    Attributes:
        vector: the sum of their mean outputs, [d_model].
        heads: the (layer, head) of each of these heads.
        n_layers: how many layers the model has.
    """

    vector: Float[Tensor, " d_model"]
    heads: tuple[Head, ...]
    n_layers: int

    def intervention(self, layer: int, scale: float = 1.0) -> Intervention:
        """Return "add the vector to `hook_resid_post` of this layer, at the newest position".

        In a generation it acts at every step: on the last token of the prompt, then on each new one.

        Args:
            layer: negative counts from the end.
            scale: the factor of the vector.

        Raises:
            ValueError: no such layer.
        """
        site = get_act_name("resid_post", layer_index(layer, self.n_layers))
        return Intervention(site, "add", self.vector * scale, pos=-1)

    def __repr__(self) -> str:
        heads = ", ".join(f"L{layer}H{head}" for layer, head in self.heads)
        return f"FunctionVector(d_model {len(self.vector)}, norm {float(self.vector.norm()):.4g}, heads {heads})"


@torch.no_grad()
def function_vector(
    model: HookedModel,
    mean_z: Float[Tensor, "layer head d_head"],
    effects_or_heads: HeadEffects | Float[Tensor, "layer head"] | Sequence[Head],
    n_heads: int | None = None,
) -> FunctionVector:
    """Return the sum of what the heads that matter most write: `sum(mean_z[l, h] @ W_O[l, h])`, without `b_O`.

    Args:
        model: a `HookedTransformer`.
        mean_z: from `mean_head_outputs`.
        effects_or_heads: from `head_effects`, or any scores [layer head], high for good heads; or the heads.
        n_heads: how many heads of the largest effects, 10 by default; not for given heads.

    Raises:
        ValueError: a head that the model does not have, or twice the same; more heads than there are; means or effects
            that do not fit the model or are not finite; a model that normalises what its attention writes; or a chosen
            layer whose attention is overridden.
    """
    if model.cfg.normalizes_writes:
        raise ValueError(
            f"with norm_placement={model.cfg.norm_placement!r} a norm comes between the heads and the stream, so the "
            "sum of what heads write is not what is added there: take mean_state and steer with that"
        )
    check_means(model, mean_z)
    heads = _heads(model, effects_or_heads, n_heads)
    for layer in sorted({layer for layer, _ in heads}):
        require_stock_attention(model, layer, "what the heads write together")
    # One head's matrix at a time: `model.W_O` would copy the matrices of every layer.
    W_O = torch.stack([model.blocks[layer].attn.W_O[head] for layer, head in heads]).to(mean_z.dtype)
    z = torch.stack([mean_z[layer, head] for layer, head in heads]).to(W_O.device)
    vector = einsum(z, W_O, "chosen d_head, chosen d_head d_model -> d_model")
    return FunctionVector(vector, tuple(heads), model.cfg.n_layers)


def _heads(
    model: HookedModel, effects_or_heads: HeadEffects | Tensor | Sequence[Head], n_heads: int | None
) -> list[Head]:
    """The heads that were given, or those of the largest effects."""
    n_layers, per_layer = model.cfg.n_layers, model.cfg.n_heads
    effects = effects_or_heads.effect if isinstance(effects_or_heads, HeadEffects) else effects_or_heads
    if isinstance(effects, Tensor):
        if tuple(effects.shape) != (n_layers, per_layer):
            expected = f"[layer head] = ({n_layers}, {per_layer})"
            raise ValueError(f"effects are {expected} for this model, got {tuple(effects.shape)}")
        return _top_heads(effects, _DEFAULT_N_HEADS if n_heads is None else n_heads)
    heads: list[Head] = [cast("Head", tuple(one)) for one in effects]
    if n_heads is not None:
        raise ValueError(f"n_heads={n_heads} chooses among effects, and here are the {len(heads)} heads themselves")
    if not heads or len(set(heads)) < len(heads):
        raise ValueError(f"heads are one or more, each once, as (layer, head); got {heads}")
    there = set(itertools.product(range(n_layers), range(per_layer)))
    unknown = [head for head in heads if head not in there]
    if unknown:
        raise ValueError(
            f"{unknown} are no heads: this model has (layer, head) with layers 0-{n_layers - 1} and heads "
            f"0-{per_layer - 1}"
        )
    return heads


def _top_heads(effects: Float[Tensor, "layer head"], n_heads: int) -> list[Head]:
    check_finite(effects, "the grid of effects")
    if not 1 <= n_heads <= effects.numel():
        raise ValueError(f"n_heads is in 1-{effects.numel()}, the heads there are; got {n_heads}")
    best = effects.flatten().argsort(descending=True, stable=True)[:n_heads].tolist()
    return [divmod(index, effects.shape[1]) for index in best]
