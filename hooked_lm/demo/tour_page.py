"""The tour as sections of a page of figures. Needs the extra `viz`."""

from __future__ import annotations

from torch import Tensor

from hooked_lm import plotting
from hooked_lm.demo.induction import label
from hooked_lm.demo.tour import Tour
from hooked_lm.experiments import Repeats
from hooked_lm.plotting import Figure, PageFigure

__all__ = ["tour_facts", "tour_figures", "tour_introduction"]


def tour_figures(tour: Tour) -> list[PageFigure]:
    """Return the figures of the five experiments, in order."""
    return [_early(tour), _patching(tour), _repeats(tour), _vectors(tour), _movers(tour)]


def tour_introduction(tour: Tour) -> str:
    """Return what the tour is about."""
    return (
        f"{tour.model_name} has {tour.n_layers} layers of {tour.n_heads} heads. "
        "Five of the field's introductory experiments are run on it, on prompts drawn with a fixed seed. Where "
        "something is said to matter, a control stands beside it: another layer, a random direction, other heads."
    )


def tour_facts(tour: Tour) -> list[tuple[str, str]]:
    """Return the headline of each experiment."""
    return [(number, f"{name}: {meaning}") for name, number, meaning in tour.headlines()]


def _early(tour: Tour) -> PageFigure:
    early = tour.early
    layers = [f"layer {layer}" for layer in range(tour.n_layers)]
    question = early.prompt.strip().replace("\n", " ")
    return PageFigure(
        "Early decoding: when is the answer there?",
        f"Questions such as “{question}”. On the left, the residual stream after each step is read as if it were the "
        f"last one: the mean probability of the right capital. On the right, the same at the model's output, when one "
        f"MLP's update is taken away at the last token: without that of layer {early.decisive_mlp} the capital is "
        f"{float(early.probability_without.min()):.2f} probable, with it {float(early.probability[-1]):.2f}.",
        (
            plotting.layer_curves(
                {"probability of the answer": early.probability}, early.labels, "probability of the answer"
            ),
            plotting.ablation_bars(
                ["intact", *(f"without the MLP of {layer}" for layer in layers)],
                [float(early.probability[-1]), *early.probability_without.tolist()],
                [False, *(layer == early.decisive_mlp for layer in range(tour.n_layers))],
                axis="probability of the answer",
            ),
        ),
    )


def _patching(tour: Tour) -> PageFigure:
    patching = tour.patching
    return PageFigure(
        "Residual patching: where are the names told apart?",
        f"Two prompts differ in who gives: the answer is the other one. The clean prompts' logit difference is "
        f"{float(patching.clean.mean()):.2f}, the corrupted ones' {float(patching.corrupted.mean()):.2f}. Each cell "
        "puts the clean stream into the corrupted run at one layer and position, and shows how much of the way "
        "back that goes, averaged over prompts. The difference enters at the name that was changed and ends at the "
        "last token; where it moves from one to the other, heads have read it.",
        (plotting.patching_grid(patching.grid, patching.labels, unit="brought back", limit=1.0),),
    )


def _repeats(tour: Tour) -> PageFigure:
    repeats = tour.repeats
    return PageFigure(
        "Repeated tokens: how is a repeat continued?",
        f"{repeats.length} random tokens, twice. Of the first half {repeats.first_accuracy:.0%} are predicted (mean "
        f"log-probability {repeats.first_log_prob:.2f}), of the second {repeats.second_accuracy:.0%} "
        f"({repeats.second_log_prob:.2f}). An induction head attends to what came after the earlier copy of the token "
        f"at hand: the highest score is that of {label(repeats.induction_head)}. {_pair(repeats)}{_mlps(repeats)}",
        (
            plotting.head_scores(repeats.previous_token_scores, "previous-token score"),
            plotting.head_scores(repeats.induction_scores, "induction score"),
            *([_mlp_bars(repeats)] if len(repeats.accuracy_without_mlp) else []),
        ),
    )


def _pair(repeats: Repeats) -> str:
    """The previous-token head that it may read from, and what the weights of the two say."""
    if repeats.previous_token_head is None or repeats.circuit_accuracy is None:
        return "No layer is below it that a previous-token head could be in. "
    effective = (
        ""
        if repeats.effective_accuracy is None
        else (f", and {repeats.effective_accuracy:.1%} with the token at hand as it is after the first MLP")
    )
    return (
        "It can find the place by what a previous-token head below it has left there: the highest score is that of "
        f"{label(repeats.previous_token_head)}. By the weights of the two alone, {repeats.circuit_accuracy:.1%} of the "
        f"vocabulary's tokens are matched best with a position that follows that same token{effective}. "
    )


def _mlps(repeats: Repeats) -> str:
    if not len(repeats.accuracy_without_mlp):
        return ""
    return (
        "The bars are the second half's accuracy when one MLP writes there what it wrote at the same place of the "
        "first half: a long bar means that this MLP does nothing for the repeat that it did not do the first time."
    )


def _mlp_bars(repeats: Repeats) -> Figure:
    least = int(repeats.accuracy_without_mlp.argmin())
    n_layers = len(repeats.accuracy_without_mlp)
    return plotting.ablation_bars(
        ["intact", *(f"MLP of layer {layer}" for layer in range(n_layers))],
        [repeats.second_accuracy, *repeats.accuracy_without_mlp.tolist()],
        [False, *(layer == least for layer in range(n_layers))],
        axis="accuracy",
        title="an MLP as in the first half",
    )


def _vectors(tour: Tour) -> PageFigure:
    vectors = tour.vectors
    state, heads, other, shuffled = vectors.accuracy
    names = ", ".join(label(head) for head in vectors.vector.heads)
    return PageFigure(
        "Function vectors: what carries the task?",
        f"Prompts of one word and a colon do not say which relation is asked for: {vectors.base_accuracy:.0%} are "
        "answered with the opposite. At one layer a vector is added to the last token: the mean state of prompts with "
        f"examples ({_best(state)} at the best layer), or just the summed outputs of {names} ({_best(heads)}). Beside "
        f"them the controls: random vectors of the same length ({vectors.random_accuracy:.0%}), the same heads on "
        f"examples of other relations ({_best(other)}) and on examples whose answers are shuffled ({_best(shuffled)}; "
        "even wrong answers show what kind of word an answer is, so this one need not fail). No query that is steered "
        "was asked in the prompts that the vectors are made from.",
        (
            plotting.layer_curves(
                {
                    "mean state": state,
                    f"{len(vectors.vector.heads)} heads": heads,
                    "heads, other relations": other,
                    "heads, shuffled answers": shuffled,
                },
                [f"layer {layer}" for layer in vectors.steering.layers],
                "accuracy",
                {"with examples": vectors.with_examples, "random vectors": vectors.random_accuracy},
            ),
        ),
    )


def _best(by_layer: Tensor) -> str:
    return f"{float(by_layer.max()):.0%}"


def _movers(tour: Tour) -> PageFigure:
    movers = tour.movers
    names = ", ".join(map(label, movers.movers))
    return PageFigure(
        "Name movers: which heads give the name?",
        "Three measures of each head: what it adds to the answer's logit directly, what the logit loses when the head "
        "writes what it writes in prompts about other people, and what of that goes straight to the logits. "
        f"{names} have the largest direct effect. When they write their mean over prompts about other people, "
        f"{movers.accuracy_without:.0%} of the answers are given instead of {movers.accuracy:.0%}; with as many other "
        f"heads it is {float(movers.accuracy_without_others.median()):.0%} (the median of "
        f"{len(movers.accuracy_without_others)} draws). The heads were chosen on the same prompts. One that stands out "
        "in the middle and not on the right acts through others.",
        tuple(
            plotting.patching_grid(grid, axis="head", title=title)
            for grid, title in (
                (movers.attribution, "direct logit attribution"),
                (movers.patched, "patched"),
                (movers.direct, "patched, direct path"),
            )
        ),
    )
