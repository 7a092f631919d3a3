"""Where a vector brings a task back: prompts answered with it in the stream of one layer at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from hooked_lm import metrics
from hooked_lm._support.precision import at_least_single
from hooked_lm.circuits.last_token import (
    Answers,
    LastTokenPrompts,
    answer_tokens,
    check_finite,
    chosen_layers,
    sweep_in_batches,
)
from hooked_lm.circuits.task_heads import FunctionVector
from hooked_lm.hooked_model import HookedModel
from hooked_lm.interventions import Intervention
from hooked_lm.names import get_act_name
from hooked_lm.sweep.options import DEFAULT_MEMORY_BUDGET
from hooked_lm.tokenization import Prompts

__all__ = ["Operation", "SteeringEffect", "steering_effect"]

Operation = Literal["add", "replace"]


@dataclass(frozen=True, eq=False)
class SteeringEffect:
    """How prompts are answered with a vector in the stream of one layer at a time.

    The name axis exists when several vectors were given, by name. Controls are the mean over their random draws.

    Attributes:
        names: of the vectors, or None for a single vector.
        layers: the layers that the vectors were put into.
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
    model: HookedModel,
    zero_shot_prompts: Prompts,
    answers: Answers,
    vectors: FunctionVector | Tensor | Mapping[str, FunctionVector | Tensor],
    layers: Sequence[int] | None = None,
    *,
    operation: Operation = "add",
    n_controls: int = 1,
    seed: int = 0,
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    verbose: bool = True,
) -> SteeringEffect:
    """Return how prompts are answered when a vector is put into the stream at their last token, layer by layer.

    Args:
        model: a `HookedTransformer`.
        zero_shot_prompts: prompts without examples: strings of any lengths, or tokens [batch pos].
        answers: the task's answer to each prompt, or one for all: tokens, or strings that are one token each.
        vectors: a vector [d_model], or one for each of the model's layers [layer d_model] as `mean_state` gives; or
            several by name, such as that of the task beside that of prompts with shuffled answers.
        layers: where to put the vector, negative from the end; by default each layer in turn.
        operation: `"add"` the vector to `hook_resid_post` of the layer, or `"replace"` that stream by it.
        n_controls: random directions that the control is averaged over. They are the same for every vector and layer.
        seed: of these directions.
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
    chosen = chosen_layers(model, layers)
    given = _vectors(model, vectors)[:, list(chosen)]
    values = torch.cat((given[None], _random_like(given, n_controls, seed)))
    cells = [
        Intervention(get_act_name("resid_post", layer), operation, vector, pos=-1)
        for by_layer in values.flatten(0, 1)
        for layer, vector in zip(chosen, by_layer, strict=True)
    ]
    prompts = LastTokenPrompts.of(model, zero_shot_prompts, attention_mask)
    column = answer_tokens(model, answers, len(prompts))
    found: dict[str, Tensor] = {}
    for what, metric in (("correct", metrics.accuracy), ("log_probs", metrics.log_prob)):
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
        steered = torch.unflatten(scores[1:], 0, tuple(values.shape[:-1]))  # [variant name layer prompt]
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
    directions: Tensor = (drawn / drawn.norm(dim=-1, keepdim=True)).to(vectors)
    lengths: Tensor = vectors.norm(dim=-1)
    return einsum(directions, lengths, "draw d_model, name layer -> draw name layer d_model")


def _vectors(
    model: HookedModel, vectors: FunctionVector | Tensor | Mapping[str, FunctionVector | Tensor]
) -> Float[Tensor, "name layer d_model"]:
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
        check_finite(vector, name)
        found.append(at_least_single(vector.detach()).to(model.embed.W_E.device).expand(n_layers, d_model))
    return torch.stack(found)
