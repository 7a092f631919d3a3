"""Function vectors: the task that a few examples in the prompt define, as one direction that can be put elsewhere.

At the last token of an in-context prompt ("hot:cold, big:small, up:") a few heads write what the task is. Their mean
outputs over many such prompts sum to a vector that, added to the stream of a prompt without examples, makes the model
do the task (Todd et al. 2024, "Function Vectors in Large Language Models"). The whole stream there serves in the same
way (Hendel et al. 2023, "In-Context Learning Creates Task Vectors").

    mean_z = mean_head_outputs(model, task_prompts)                      # what the heads hold while doing the task
    effects = head_effects(model, shuffled_prompts, answers, mean_z)     # which of them bring the task back
    task = function_vector(model, mean_z, effects, n_heads=10)           # what these heads write
    steering_effect(model, zero_shot_prompts, answers, task)             # where it works
    model.generate(prompt, interventions=[task.intervention(layer=9)])

Streams are read and changed where they leave a block, `hook_resid_post`, and every prompt at its own last token:
padding on either side makes no difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm import metrics
from hooked_lm._support.precision import at_least_single
from hooked_lm.interventions import Intervention
from hooked_lm.metrics import Metric
from hooked_lm.names import get_act_name
from hooked_lm.sweep import sweep
from hooked_lm.tokenization.methods import check_attention_mask

Head = tuple[int, int]
Measure = Literal["prob", "log_prob"]
Operation = Literal["add", "replace"]
Answers = str | int | Sequence[str | int] | Tensor

_DEFAULT_N_HEADS = 10


# What a task's prompts have in common


@torch.no_grad()
def mean_head_outputs(
    model: Any,
    prompts: Any,
    pos: int = -1,
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
    verbose: bool = True,
) -> Float[Tensor, "layer head d_head"]:
    """Return what every head holds at the last token, `hook_z`, averaged over prompts: [layer head d_head].

    Args:
        model: a `HookedTransformer`.
        prompts: in-context prompts of one task: strings of any lengths, or tokens [batch pos].
        pos: which token, counted from the end of each prompt: -1 is the last.
        attention_mask: [batch pos], 0 at padding, for tokens.
        batch_size: prompts that are run at a time.
        verbose: show a progress bar.

    Raises:
        ValueError: no prompts, a position that some prompt lacks, or tokens whose padding is not marked.
    """
    layers = _chosen_layers(model, None)
    sites = [get_act_name("z", layer) for layer in layers]
    return _mean_activations(
        model, sites, layers[-1], _Prompts.of(model, prompts, attention_mask), pos, batch_size, verbose
    )


@torch.no_grad()
def mean_state(
    model: Any,
    prompts: Any,
    layer: int | None = None,
    pos: int = -1,
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
    verbose: bool = True,
) -> Float[Tensor, "*layer d_model"]:
    """Return the residual stream that leaves a layer at the last token, averaged over prompts: [d_model].

    Hendel et al. 2023 put it in the place of the stream at the same layer: `steering_effect(..., operation="replace")`.

    Args:
        model, prompts: as for `mean_head_outputs`.
        layer: which one, negative from the end; by default all of them, [layer d_model]. No later layer is run.
        pos, attention_mask, batch_size, verbose: as for `mean_head_outputs`.

    Raises:
        ValueError: a layer out of range, and as for `mean_head_outputs`.
    """
    layers = _chosen_layers(model, None if layer is None else [layer])
    sites = [get_act_name("resid_post", one) for one in layers]
    read = _Prompts.of(model, prompts, attention_mask)
    states = _mean_activations(model, sites, layers[-1], read, pos, batch_size, verbose)
    return states if layer is None else states[0]


def _mean_activations(
    model: Any, sites: Sequence[str], last_layer: int, prompts: _Prompts, pos: int, batch_size: int, verbose: bool
) -> Float[Tensor, "site *head width"]:
    """The mean of each site's activation at a position, over prompts."""
    prompts.check_position(pos)
    batches = list(prompts.batches(batch_size))
    sums = []
    for rows in tqdm(batches, disable=not verbose, desc="means", leave=False):
        # Stopping after the last layer that is read also spares the unembedding of every position.
        _, cache = model.run_with_cache(
            prompts.tokens[rows],
            attention_mask=prompts.mask[rows],
            names_filter=list(sites),
            pos_slice=pos,
            stop_at_layer=last_layer + 1,
            return_cache_object=False,
        )
        sums.append(torch.stack([at_least_single(cache[site]).sum(0) for site in sites]))
    return torch.stack(sums).sum(0) / len(prompts)


# Which heads bring the task back


@dataclass(frozen=True, eq=False)
class HeadEffects:
    """How much each head's mean output over a task's prompts does for the answer where the task is not to be seen.

    Attributes:
        measure: `"prob"`, the probability of the answer, or `"log_prob"`, its logarithm, in nats.
        base: of the prompts as they are, [prompt].
        scores: with one head's output replaced, [layer head prompt].
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
        return self.per_prompt.std(-1) / n_prompts**0.5

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
    model: Any,
    corrupted_prompts: Any,
    answers: Answers,
    mean_z: Float[Tensor, "layer head d_head"],
    *,
    measure: Measure = "prob",
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
    memory_budget: int = 2**29,
    verbose: bool = True,
) -> HeadEffects:
    """Return what each head does for the answer when its output at the last token is the task's mean.

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
    _check_means(model, mean_z)
    prompts = _Prompts.of(model, corrupted_prompts, attention_mask)
    column = _answers(model, answers, len(prompts))
    grid = itertools.product(range(model.cfg.n_layers), range(model.cfg.n_heads))
    cells = [
        Intervention(get_act_name("z", layer), "replace", mean_z[layer, head], pos=-1, head=head)
        for layer, head in grid
    ]
    options: dict[str, Any] = {"batch_size": batch_size, "memory_budget": memory_budget, "verbose": verbose}
    metric = metrics.prob if measure == "prob" else metrics.log_prob
    scores = _scores(model, prompts, [(), *cells], metric, column, **options)
    return HeadEffects(measure, scores[0], scores[1:].unflatten(0, (model.cfg.n_layers, model.cfg.n_heads)))


# What they write


@dataclass(frozen=True, eq=False)
class FunctionVector:
    """What some heads write together at the last token of a task's prompts.

    Attributes:
        vector: the sum of their mean outputs, [d_model].
        heads: the (layer, head) of each.
        n_layers: of the model.
    """

    vector: Float[Tensor, " d_model"]
    heads: tuple[Head, ...]
    n_layers: int

    def intervention(self, layer: int, scale: float = 1.0) -> Intervention:
        """Return "add the vector to the stream that leaves this layer, at the newest position".

        In a generation it acts at every step: on the last token of the prompt, then on each new one.

        Args:
            layer: negative counts from the end.
            scale: what the vector is multiplied by.

        Raises:
            ValueError: no such layer.
        """
        site = get_act_name("resid_post", _layer_index(layer, self.n_layers))
        return Intervention(site, "add", self.vector * scale, pos=-1)

    def __repr__(self) -> str:
        heads = ", ".join(f"L{layer}H{head}" for layer, head in self.heads)
        return f"FunctionVector(d_model {len(self.vector)}, norm {float(self.vector.norm()):.4g}, heads {heads})"


@torch.no_grad()
def function_vector(
    model: Any,
    mean_z: Float[Tensor, "layer head d_head"],
    effects_or_heads: HeadEffects | Float[Tensor, "layer head"] | Sequence[Head],
    n_heads: int | None = None,
) -> FunctionVector:
    """Return the sum of what the heads that matter most write: `sum(mean_z[l, h] @ W_O[l, h])`, without `b_O`.

    Args:
        model: a `HookedTransformer`.
        mean_z: from `mean_head_outputs`.
        effects_or_heads: from `head_effects`, or any grid [layer head] in which large is good; or the heads themselves.
        n_heads: how many heads of the largest effects, 10 by default; not for given heads.

    Raises:
        ValueError: a head that the model does not have, or twice the same; more heads than there are; means or effects
            that do not fit the model or are not finite; or a model that normalises what its attention writes.
    """
    if model.cfg.normalizes_writes:
        raise ValueError(
            f"with norm_placement={model.cfg.norm_placement!r} a norm comes between the heads and the stream, so the "
            "sum of what heads write is not what is added there: take mean_state and steer with that"
        )
    _check_means(model, mean_z)
    heads = _heads(model, effects_or_heads, n_heads)
    # Matrix by matrix: `model.W_O` would copy those of every layer.
    W_O = torch.stack([model.blocks[layer].attn.W_O[head] for layer, head in heads]).to(mean_z.dtype)
    z = torch.stack([mean_z[layer, head] for layer, head in heads]).to(W_O.device)
    vector = einsum(z, W_O, "chosen d_head, chosen d_head d_model -> d_model")
    return FunctionVector(vector, tuple(heads), model.cfg.n_layers)


# Where it works


@dataclass(frozen=True, eq=False)
class SteeringEffect:
    """How prompts are answered with a vector in the stream of one layer at a time.

    The name axis is there when several vectors were given, by name. Controls are the mean over their draws.

    Attributes:
        names: of the vectors, or None for a single one.
        layers: where they were put.
        base_correct, base_log_probs: without a vector: whether the answer is the likeliest token (1 or 0), and its
            log-probability in nats, [prompt].
        correct, log_probs: with the vector, [*name layer prompt].
        control_correct, control_log_probs: with a random direction of the same norm, [*name layer prompt].
    """

    names: tuple[str, ...] | None
    layers: tuple[int, ...]
    base_correct: Float[Tensor, " prompt"]
    base_log_probs: Float[Tensor, " prompt"]
    correct: Float[Tensor, "*name layer prompt"]
    log_probs: Float[Tensor, "*name layer prompt"]
    control_correct: Float[Tensor, "*name layer prompt"]
    control_log_probs: Float[Tensor, "*name layer prompt"]

    @property
    def accuracy(self) -> Float[Tensor, "*name layer"]:
        """The share of prompts that are answered right with the vector."""
        return self.correct.mean(-1)

    @property
    def log_prob(self) -> Float[Tensor, "*name layer"]:
        """The mean log-probability of the answer with the vector."""
        return self.log_probs.mean(-1)

    @property
    def control_accuracy(self) -> Float[Tensor, "*name layer"]:
        """The share of prompts that are answered right with a random vector."""
        return self.control_correct.mean(-1)

    @property
    def control_log_prob(self) -> Float[Tensor, "*name layer"]:
        """The mean log-probability of the answer with a random vector."""
        return self.control_log_probs.mean(-1)

    @property
    def base_accuracy(self) -> float:
        """The share of prompts that are answered right as they are."""
        return float(self.base_correct.mean())

    @property
    def base_log_prob(self) -> float:
        """The mean log-probability of the answer as the prompts are."""
        return float(self.base_log_probs.mean())

    def __repr__(self) -> str:
        which = "one vector" if self.names is None else ", ".join(self.names)
        return (
            f"SteeringEffect({which}; layers {', '.join(map(str, self.layers))}; {len(self.base_correct)} prompts; "
            f"accuracy at best {float(self.accuracy.max()):.3g}, without {self.base_accuracy:.3g}, "
            f"random {float(self.control_accuracy.max()):.3g})"
        )


@torch.no_grad()
def steering_effect(
    model: Any,
    zero_shot_prompts: Any,
    answers: Answers,
    vectors: FunctionVector | Tensor | Mapping[str, FunctionVector | Tensor],
    layers: Sequence[int] | None = None,
    *,
    operation: Operation = "add",
    n_controls: int = 1,
    seed: int = 0,
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
    memory_budget: int = 2**29,
    verbose: bool = True,
) -> SteeringEffect:
    """Return how prompts are answered when a vector joins the stream at their last token, layer by layer.

    Args:
        model: a `HookedTransformer`.
        zero_shot_prompts: prompts without examples: strings of any lengths, or tokens [batch pos].
        answers: the task's answer to each prompt, or one for all: tokens, or strings that are one token each.
        vectors: a vector [d_model], or one for each of the model's layers [layer d_model] as `mean_state` gives; or
            several by name, such as that of the task beside that of prompts with shuffled answers.
        layers: where to put it, negative from the end; by default each layer in turn.
        operation: `"add"` it to the stream that leaves the layer, or `"replace"` that stream by it.
        n_controls: random directions that the control is averaged over. They are the same for every vector and layer.
        seed: of these.
        attention_mask: [batch pos], 0 at padding, for tokens.
        batch_size: prompts that are swept at a time.
        memory_budget, verbose: as for `sweep`.

    Raises:
        ValueError: no vector, or one of another width or not finite; a layer out of range or none; an unknown
            operation; fewer than one control; answers that do not fit the prompts or the vocabulary; and as for
            `mean_head_outputs`. Nothing has run then.
    """
    if operation not in get_args(Operation):
        raise ValueError(f"operation is one of {', '.join(get_args(Operation))}; got {operation!r}")
    names = tuple(vectors) if isinstance(vectors, Mapping) else None
    chosen = _chosen_layers(model, layers)
    given = _vectors(model, vectors)[:, list(chosen)]
    values = torch.cat((given[None], _random_like(given, n_controls, seed)))
    cells = [
        Intervention(get_act_name("resid_post", layer), operation, vector, pos=-1)
        for by_layer in values.flatten(0, 1)
        for layer, vector in zip(chosen, by_layer, strict=True)
    ]
    prompts = _Prompts.of(model, zero_shot_prompts, attention_mask)
    column = _answers(model, answers, len(prompts))
    options: dict[str, Any] = {"batch_size": batch_size, "memory_budget": memory_budget, "verbose": verbose}
    found: dict[str, Tensor] = {}
    for what, metric in (("correct", metrics.accuracy), ("log_probs", metrics.log_prob)):
        scores = _scores(model, prompts, [(), *cells], metric, column, **options)
        steered = scores[1:].unflatten(0, tuple(values.shape[:-1]))  # [variant name layer prompt]
        steered = steered[:, 0] if names is None else steered
        found |= {f"base_{what}": scores[0], what: steered[0], f"control_{what}": steered[1:].mean(0)}
    return SteeringEffect(names, chosen, **found)


def _random_like(
    vectors: Float[Tensor, "name layer d_model"], n_draws: int, seed: int
) -> Float[Tensor, "draw name layer d_model"]:
    """Random directions, each as long as the vector whose place it takes."""
    if n_draws < 1:
        raise ValueError(f"n_controls is at least 1, got {n_draws}: an effect means little without a control")
    drawn = torch.randn(n_draws, vectors.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    directions = (drawn / drawn.norm(dim=-1, keepdim=True)).to(vectors)
    return einsum(directions, vectors.norm(dim=-1), "draw d_model, name layer -> draw name layer d_model")


# Running prompts in portions


@dataclass(frozen=True, eq=False)
class _Prompts:
    """Prompts whose last tokens all stand at the last position.

    Attributes:
        tokens: padded on the left, [batch pos].
        mask: 0 at padding.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]

    @classmethod
    def of(cls, model: Any, prompts: Any, attention_mask: Tensor | None) -> _Prompts:
        _check_not_empty(prompts)
        tokens, mask = model.tokens_and_mask(prompts, attention_mask)
        if mask is None:
            mask = torch.ones_like(tokens)
        check_attention_mask(mask, *tokens.shape)
        mask = mask.to(tokens)
        if attention_mask is None and model.tokenizer is not None:
            _check_ends(tokens, mask, model.tokenizer.pad_token_id)
        # Stable, so that what is not padding moves to the right in the order it has.
        order = mask.argsort(dim=1, stable=True)
        return cls(tokens.gather(1, order), mask.gather(1, order))

    def __len__(self) -> int:
        return len(self.tokens)

    def batches(self, batch_size: int) -> Iterator[slice]:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is an integer of at least 1, got {batch_size!r}")
        return (slice(start, start + batch_size) for start in range(0, len(self), batch_size))

    def check_position(self, pos: int) -> None:
        shortest = int(self.mask.sum(1).min())
        if not -shortest <= pos <= -1:
            raise ValueError(
                f"pos counts from the end of each prompt, and the shortest has {shortest} tokens: give one of "
                f"-{shortest} to -1, got {pos}"
            )


def _check_not_empty(prompts: Any) -> None:
    if isinstance(prompts, Tensor) and prompts.numel() == 0:
        raise ValueError(f"tokens have shape [batch pos], neither empty; got {tuple(prompts.shape)}")
    if isinstance(prompts, (str, list, tuple)):
        texts = [prompts] if isinstance(prompts, str) else prompts
        if not texts or any(isinstance(one, str) and not one for one in texts):
            raise ValueError(f"prompts are one or more strings, none empty, or tokens [batch pos]; got {prompts!r}")


def _check_ends(tokens: Tensor, mask: Tensor, pad_token: int) -> None:
    """Refuse tokens padded on the right that came without a mask: what was read there would not be of the prompt."""
    ends_in_padding = (tokens[:, -1] == pad_token) & mask[:, -1].bool()
    if bool(ends_in_padding.any()) and not bool(ends_in_padding.all()):
        raise ValueError(
            "some prompts end in padding tokens, and their last token is what counts here: give the prompts as "
            "strings, or attention_mask with the tokens"
        )


def _scores(
    model: Any,
    prompts: _Prompts,
    cells: Sequence[Any],
    metric: Callable[[Tensor], Metric],
    answers: Int[Tensor, " batch"],
    *,
    batch_size: int,
    memory_budget: int,
    verbose: bool,
) -> Float[Tensor, "cell batch"]:
    """Sweep the same cells over all prompts, so many at a time."""
    parts = [
        sweep(
            model,
            prompts.tokens[rows],
            cells,
            metric(answers[rows]),
            attention_mask=prompts.mask[rows],
            per_prompt=True,
            memory_budget=memory_budget,
            verbose=verbose,
        )
        for rows in prompts.batches(batch_size)
    ]
    return torch.cat(parts, 1)


# What is asked for


def _answers(model: Any, answers: Answers, n_prompts: int) -> Int[Tensor, " batch"]:
    """The answer of each prompt as a token of the vocabulary."""
    if isinstance(answers, str):
        answers = model.to_single_token(answers)
    elif isinstance(answers, (list, tuple)) and any(isinstance(one, str) for one in answers):
        answers = [model.to_single_token(one) if isinstance(one, str) else one for one in answers]
    column = torch.as_tensor(answers)
    if column.is_floating_point() or column.dtype == torch.bool or column.ndim > 1:
        raise ValueError(f"answers are tokens, or strings of one token, one for each prompt; got {answers!r}")
    if column.ndim == 1 and len(column) != n_prompts:
        raise ValueError(
            f"{len(column)} answers came for {n_prompts} prompts: give one for each, or a single one for all"
        )
    limit = model.cfg.d_vocab_out
    wrong = column[(column < 0) | (column >= limit)].flatten().tolist()
    if wrong:
        raise ValueError(f"answers {wrong} are out of range: this model's vocabulary is 0-{limit - 1}")
    return column.long().expand(n_prompts)


def _check_means(model: Any, mean_z: Tensor) -> None:
    expected = (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head)
    if tuple(mean_z.shape) != expected:
        raise ValueError(
            f"mean_z is [layer head d_head] = {expected} for this model, got {tuple(mean_z.shape)}: take it from "
            "mean_head_outputs with the same model"
        )
    _check_finite(mean_z, "mean_z")


def _check_finite(values: Tensor, what: str) -> None:
    n_wrong = int((~values.isfinite()).sum())
    if n_wrong:
        raise ValueError(f"{what} has {n_wrong} of {values.numel()} entries that are NaN or infinite")


def _layer_index(layer: int, n_layers: int) -> int:
    if isinstance(layer, bool) or not isinstance(layer, int) or not -n_layers <= layer < n_layers:
        raise ValueError(f"no layer {layer!r}: this model has layers 0-{n_layers - 1}")
    return layer % n_layers


def _chosen_layers(model: Any, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The chosen layers, counted from 0; all of them by default."""
    n_layers = model.cfg.n_layers
    chosen = tuple(_layer_index(layer, n_layers) for layer in (range(n_layers) if layers is None else layers))
    if not chosen:
        raise ValueError("there are no layers to look at" + ("" if n_layers else ": this model has none"))
    return chosen


def _vectors(model: Any, vectors: Any) -> Float[Tensor, "name layer d_model"]:
    """Every vector at every layer of the model."""
    by_name = vectors if isinstance(vectors, Mapping) else {"the vector": vectors}
    if not by_name:
        raise ValueError("there are no vectors: give one, or several by name")
    n_layers, d_model = model.cfg.n_layers, model.cfg.d_model
    found = []
    for name, given in by_name.items():
        vector = given.vector if isinstance(given, FunctionVector) else given
        if not isinstance(vector, Tensor) or tuple(vector.shape) not in ((d_model,), (n_layers, d_model)):
            came = tuple(vector.shape) if isinstance(vector, Tensor) else repr(vector)
            raise ValueError(
                f"{name} is a tensor [d_model] = ({d_model},), or [layer d_model] = ({n_layers}, {d_model}) with one "
                f"for each layer; got {came}"
            )
        _check_finite(vector, name)
        found.append(at_least_single(vector.detach()).to(model.W_E.device).expand(n_layers, d_model))
    return torch.stack(found)


def _heads(model: Any, effects_or_heads: Any, n_heads: int | None) -> list[Head]:
    """The heads that were given, or those of the largest effects."""
    n_layers, per_layer = model.cfg.n_layers, model.cfg.n_heads
    effects = effects_or_heads.effect if isinstance(effects_or_heads, HeadEffects) else effects_or_heads
    if isinstance(effects, Tensor):
        if tuple(effects.shape) != (n_layers, per_layer):
            expected = f"[layer head] = ({n_layers}, {per_layer})"
            raise ValueError(f"effects are {expected} for this model, got {tuple(effects.shape)}")
        return _top_heads(effects, _DEFAULT_N_HEADS if n_heads is None else n_heads)
    heads = [tuple(one) for one in effects]
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
    _check_finite(effects, "the grid of effects")
    if not 1 <= n_heads <= effects.numel():
        raise ValueError(f"n_heads is in 1-{effects.numel()}, the heads there are; got {n_heads}")
    best = effects.flatten().argsort(descending=True, stable=True)[:n_heads].tolist()
    return [divmod(index, effects.shape[1]) for index in best]
