"""Prompts whose last tokens all stand at the last position, and sweeps over them: what function vectors are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_lm._support.integers import integer, is_integer
from hooked_lm.hooked_model import HookedModel
from hooked_lm.interventions import Intervention
from hooked_lm.metrics import Metric
from hooked_lm.sweep import sweep
from hooked_lm.tokenization import Prompts
from hooked_lm.tokenization.methods import check_attention_mask

__all__ = [
    "Answers",
    "LastTokenPrompts",
    "answer_tokens",
    "check_finite",
    "check_means",
    "chosen_layers",
    "layer_index",
    "sweep_in_batches",
]

Answers = str | int | Sequence[str | int] | Tensor


@dataclass(frozen=True, eq=False)
class LastTokenPrompts:
    """Prompts whose last tokens all stand at the last position.

    Attributes:
        tokens: padded on the left, [batch pos].
        mask: 0 at padding.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]

    @classmethod
    def of(cls, model: HookedModel, prompts: Prompts, attention_mask: Tensor | None) -> LastTokenPrompts:
        """Return the prompts as tokens padded on the left.

        Args:
            model: a `HookedTransformer`.
            prompts: strings of any lengths, or tokens [batch pos].
            attention_mask: [batch pos], 0 at padding, for tokens.

        Raises:
            ValueError: no prompts, an empty one, or tokens that seem padded on the right and come without a mask.
        """
        _check_not_empty(prompts)
        tokens, mask = model.tokens_and_mask(prompts, attention_mask)
        if mask is None:
            mask = torch.ones_like(tokens)
        check_attention_mask(mask, *tokens.shape)
        mask = mask.to(tokens)
        if attention_mask is None and model.tokenizer is not None:
            _check_ends(tokens, mask, model.tokenizer.pad_token_id)
        # A stable sort moves the tokens that are not padding to the right, in the order they have.
        order = mask.argsort(dim=1, stable=True)
        return cls(tokens.gather(1, order), mask.gather(1, order))

    def __len__(self) -> int:
        return len(self.tokens)

    def batches(self, batch_size: int) -> Iterator[slice]:
        """Return slices of at most `batch_size` prompts, which together cover all of them.

        Raises:
            ValueError: `batch_size` is no integer of at least 1.
        """
        if not is_integer(batch_size) or batch_size < 1:
            raise ValueError(f"batch_size is an integer of at least 1, got {batch_size!r}")
        batch_size = integer(batch_size, "batch_size")
        return (slice(start, start + batch_size) for start in range(0, len(self), batch_size))

    def check_position(self, pos: int) -> None:
        """Check that every prompt has a position counted from its end, -1 for the last token.

        Raises:
            ValueError: some prompt is too short, or `pos` counts from the start.
        """
        shortest = int(self.mask.sum(1).min())
        pos = integer(pos, "pos")
        if not -shortest <= pos <= -1:
            raise ValueError(
                f"pos counts from the end of each prompt, and the shortest has {shortest} tokens: give one of "
                f"-{shortest} to -1, got {pos}"
            )


def _check_not_empty(prompts: Prompts) -> None:
    if isinstance(prompts, Tensor) and prompts.numel() == 0:
        raise ValueError(f"tokens have shape [batch pos], neither empty; got {tuple(prompts.shape)}")
    if isinstance(prompts, (str, list, tuple)):
        texts = [prompts] if isinstance(prompts, str) else prompts
        if not texts or any(isinstance(one, str) and not one for one in texts):
            raise ValueError(f"prompts are one or more strings, none empty, or tokens [batch pos]; got {prompts!r}")


def _check_ends(tokens: Tensor, mask: Tensor, pad_token: int) -> None:
    """Refuse tokens padded on the right that came without a mask: their last position is not a prompt's last token."""
    ends_in_padding = (tokens[:, -1] == pad_token) & mask[:, -1].bool()
    if bool(ends_in_padding.any()) and not bool(ends_in_padding.all()):
        raise ValueError(
            "some prompts end in padding tokens, and their last token is what counts here: give the prompts as "
            "strings, or attention_mask with the tokens"
        )


def sweep_in_batches(
    model: HookedModel,
    prompts: LastTokenPrompts,
    cells: Sequence[Intervention | Sequence[Intervention]],
    metric: Callable[[Tensor], Metric],
    answers: Int[Tensor, " batch"],
    *,
    batch_size: int,
    memory_budget: int,
    verbose: bool,
) -> Float[Tensor, "cell batch"]:
    """Return the metric of every cell for every prompt: a `sweep` of the same cells over batches of the prompts.

    Args:
        model: a `HookedTransformer`.
        prompts: all of them.
        cells: as for `sweep`.
        metric: makes the metric of a batch from the answers to its prompts.
        answers: a token for each prompt.
        batch_size: prompts that are swept at a time.
        memory_budget, verbose: as for `sweep`.
    """
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


def answer_tokens(model: HookedModel, answers: Answers, n_prompts: int) -> Int[Tensor, " batch"]:
    """Return the answer to each prompt as a token of the vocabulary, [batch].

    Args:
        model: a `HookedTransformer`.
        answers: one for all prompts or one for each: tokens, or strings that are one token each.
        n_prompts: how many prompts there are.

    Raises:
        ValueError: the answers are no tokens of the vocabulary, or not as many as the prompts.
    """
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


def check_means(model: HookedModel, mean_z: Tensor) -> None:
    """Check that mean head outputs are [layer head d_head] of this model, and finite.

    Args:
        model: a `HookedTransformer`.
        mean_z: the means.

    Raises:
        ValueError: they are not.
    """
    expected = (model.cfg.n_layers, model.cfg.n_heads, model.cfg.value_width)
    if tuple(mean_z.shape) != expected:
        raise ValueError(
            f"mean_z is [layer head d_head] = {expected} for this model, got {tuple(mean_z.shape)}: take it from "
            "mean_head_outputs with the same model"
        )
    check_finite(mean_z, "mean_z")


def check_finite(values: Tensor, what: str) -> None:
    """Check that values are finite.

    Args:
        values: of any shape.
        what: the values are; for the message.

    Raises:
        ValueError: some are NaN or infinite.
    """
    n_wrong = int((~values.isfinite()).sum())
    if n_wrong:
        raise ValueError(f"{what} has {n_wrong} of {values.numel()} entries that are NaN or infinite")


def layer_index(layer: int, n_layers: int) -> int:
    """Return a layer counted from 0; a negative one counts from the end.

    Args:
        layer: the layer.
        n_layers: of the model.

    Raises:
        ValueError: no such layer.
    """
    if not is_integer(layer) or not -n_layers <= layer < n_layers:
        raise ValueError(f"no layer {layer!r}: this model has layers 0-{n_layers - 1}")
    return integer(layer, "layer") % n_layers


def chosen_layers(model: HookedModel, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Return the chosen layers, counted from 0; all of them by default.

    Args:
        model: a `HookedTransformer`.
        layers: negative ones count from the end; None for all.

    Raises:
        ValueError: a layer that the model lacks, or no layer at all.
    """
    n_layers = model.cfg.n_layers
    chosen = tuple(layer_index(layer, n_layers) for layer in (range(n_layers) if layers is None else layers))
    if not chosen:
        raise ValueError("there are no layers to look at" + ("" if n_layers else ": this model has none"))
    return chosen
