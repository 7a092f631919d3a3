"""The demo: find the induction circuit of a small trained model, and show by ablation that the model needs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm._support.plain_data import PlainData
from hooked_lm.circuits.full_circuits import top1_accuracy
from hooked_lm.circuits.induction import (
    Head,
    induction_scores,
    k_composition_qk_circuit,
    next_token_scores,
    previous_token_scores,
    repeated_random_tokens,
    strongest_head,
)
from hooked_lm.hooks import HookPoint
from hooked_lm.transformer import HookedTransformer

__all__ = [
    "BATCH",
    "HELD_OUT_LENGTHS",
    "MODEL",
    "SHOWN_LENGTH",
    "STEPS",
    "Ablation",
    "DemoResult",
    "Half",
    "label",
    "plain_data",
    "random_tokens",
    "run_demo",
]

MODEL = "demo-induction-2l"
# Block lengths that the training script leaves out.
HELD_OUT_LENGTHS = (8, 12, 16, 20, 24, 28)
SHOWN_LENGTH = 24
BATCH = 64
# The steps of `run_demo`, for a progress bar.
STEPS = ("load the model", "predict repeated tokens", "score the heads", "read the circuit", "ablate heads")


@dataclass(frozen=True)
class Half:
    """How well the tokens of one half are predicted: mean log-probability in nats, and the share predicted right."""

    log_prob: float
    accuracy: float


@dataclass(frozen=True)
class Ablation:
    """How well the second half is predicted when a head writes nothing.

    Attributes:
        label: the name of the ablation.
        head: (layer, head); None for the intact model.
        loss: mean loss in nats.
        accuracy: share of tokens predicted right.
    """

    label: str
    head: Head | None
    loss: float
    accuracy: float


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo. Arrays are tensors on the CPU.

    Attributes:
        model_name, n_parameters, d_vocab: of the model.
        length, batch, seed: of the tokens in the figures.
        first_half, second_half: the scores at that length.
        accuracy_by_length: second-half accuracy at every length that training left out.
        log_prob_by_position: mean over the batch, [pos-1]; entry `i` is about the token at position `i + 1`.
        previous_token_scores, induction_scores: [layer head].
        previous_token_head, induction_head: the heads with the highest scores in layer 0 and in layer 1.
        previous_token_pattern, induction_pattern: those heads' attention on the first sequence, [query key].
        tokens: the tokens of that sequence.
        k_composition: [writer reader], heads of layer 0 by heads of layer 1.
        circuit_accuracy: top-1 accuracy of the pair's full QK circuit over the vocabulary.
        ablations: the results of ablations, the intact model first.
    """

    model_name: str
    n_parameters: int
    d_vocab: int
    length: int
    batch: int
    seed: int
    first_half: Half
    second_half: Half
    accuracy_by_length: dict[int, float]
    log_prob_by_position: Float[Tensor, " pos_minus_one"]
    previous_token_scores: Float[Tensor, "layer head"]
    induction_scores: Float[Tensor, "layer head"]
    previous_token_head: Head
    induction_head: Head
    previous_token_pattern: Float[Tensor, "query key"]
    induction_pattern: Float[Tensor, "query key"]
    tokens: tuple[int, ...]
    k_composition: Float[Tensor, "writer reader"]
    circuit_accuracy: float
    ablations: tuple[Ablation, ...]

    @property
    def previous_token_score(self) -> float:
        """The score of the previous-token head."""
        return float(self.previous_token_scores[self.previous_token_head])

    @property
    def induction_score(self) -> float:
        """The score of the induction head."""
        return float(self.induction_scores[self.induction_head])

    @property
    def pair_composition(self) -> float:
        """The K-composition of the two heads."""
        return float(self.k_composition[self.previous_token_head[1], self.induction_head[1]])

    @property
    def pair_composes_most(self) -> bool:
        """Whether no head of layer 0 is read more by the induction head's keys than the previous-token head."""
        return int(self.k_composition[:, self.induction_head[1]].argmax()) == self.previous_token_head[1]

    def to_dict(self) -> PlainData:
        """Return everything as plain data that JSON can hold."""
        return {name: plain_data(getattr(self, name)) for name in (*self.__dataclass_fields__, *_DERIVED)}


_DERIVED = ("previous_token_score", "induction_score", "pair_composition", "pair_composes_most")


@torch.no_grad()
def run_demo(
    name_or_path: str | Path = MODEL, seed: int = 0, on_step: Callable[[str], None] | None = None
) -> DemoResult:
    """Load a model with two layers, find its induction circuit, and return the results.

    Args:
        name_or_path: the bundled model's name, or the folder of another model of two layers whose context holds blocks
            of `HELD_OUT_LENGTHS` twice.
        seed: of the random tokens.
        on_step: called with the name of each of `STEPS` when it is done.
    """
    done = on_step or (lambda step: None)
    model = HookedTransformer.from_pretrained(name_or_path)
    done(STEPS[0])

    accuracy_by_length = {
        length: _second_half(model, random_tokens(model, length, seed)).accuracy for length in HELD_OUT_LENGTHS
    }
    tokens = random_tokens(model, SHOWN_LENGTH, seed)
    logits, cache = model.run_with_cache(tokens, names_filter="blocks.*.attn.hook_pattern")
    scores = next_token_scores(logits, tokens)
    done(STEPS[1])

    previous_scores, ind_scores = previous_token_scores(cache), induction_scores(cache, SHOWN_LENGTH)
    previous, induction = strongest_head(previous_scores, 0), strongest_head(ind_scores, 1)
    done(STEPS[2])

    k_composition = model.all_composition_scores("K")[0, :, 1]
    circuit_accuracy = top1_accuracy(k_composition_qk_circuit(model, previous, induction), verbose=False)
    done(STEPS[3])

    ablations = _ablations(model, tokens, previous, induction, previous_scores, ind_scores)
    done(STEPS[4])
    return DemoResult(
        model_name=model.cfg.model_name,
        n_parameters=model.n_params_total,
        d_vocab=model.cfg.d_vocab,
        length=SHOWN_LENGTH,
        batch=BATCH,
        seed=seed,
        first_half=Half(scores.first_half().mean_log_prob(), scores.first_half().accuracy()),
        second_half=Half(scores.second_half().mean_log_prob(), scores.second_half().accuracy()),
        accuracy_by_length=accuracy_by_length,
        log_prob_by_position=scores.log_prob.mean(0),
        previous_token_scores=previous_scores,
        induction_scores=ind_scores,
        previous_token_head=previous,
        induction_head=induction,
        previous_token_pattern=cache["pattern", 0][0, previous[1]],
        induction_pattern=cache["pattern", 1][0, induction[1]],
        tokens=tuple(tokens[0].tolist()),
        k_composition=k_composition,
        circuit_accuracy=circuit_accuracy,
        ablations=ablations,
    )


def random_tokens(model: HookedTransformer, length: int, seed: int) -> Tensor:
    """Return the repeated random tokens that the demo and the training script evaluate on, [BATCH 2*length+1]."""
    return repeated_random_tokens(BATCH, length, model.cfg.d_vocab, torch.Generator().manual_seed(seed))


def _second_half(model: HookedTransformer, tokens: Tensor, silent: Head | None = None) -> Half:
    """The second half's scores, while a head writes nothing."""

    hooks = []
    if silent is not None:
        layer, head = silent

        def silence(z: Tensor, hook: HookPoint) -> Tensor:
            z[:, :, head] = 0.0
            return z

        hooks = [(f"blocks.{layer}.attn.hook_z", silence)]
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    scores = next_token_scores(logits, tokens).second_half()
    return Half(scores.mean_log_prob(), scores.accuracy())


def _ablations(
    model: HookedTransformer,
    tokens: Tensor,
    previous: Head,
    induction: Head,
    previous_scores: Tensor,
    ind_scores: Tensor,
) -> tuple[Ablation, ...]:
    # The controls are the heads of the same layers that look least like the pair.
    controls = ((0, int(previous_scores[0].argmin())), (1, int(ind_scores[1].argmin())))
    conditions: list[tuple[str, Head | None]] = [
        ("intact", None),
        (f"without {label(induction)}, the induction head", induction),
        (f"without {label(previous)}, the previous-token head", previous),
        *((f"without {label(head)}, another head of its layer", head) for head in controls),
    ]
    halves = [_second_half(model, tokens, head) for _, head in conditions]
    return tuple(
        Ablation(name, head, loss=-half.log_prob, accuracy=half.accuracy)
        for (name, head), half in zip(conditions, halves, strict=True)
    )


def label(head: Head) -> str:
    """Return a head's label, such as `"L1H0"`."""
    return f"L{head[0]}H{head[1]}"


def plain_data(value: object) -> object:
    """Return dataclasses, tensors, tuples and dictionaries as lists and dictionaries that JSON can hold."""
    if isinstance(value, Tensor):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain_data(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(entry) for entry in value]
    return value
