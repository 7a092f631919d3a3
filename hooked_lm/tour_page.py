"""The tour as sections of a page of figures. Needs the extra `viz`."""

from __future__ import annotations

from hooked_lm import plotting
from hooked_lm.demo import label
from hooked_lm.plotting import PageFigure
from hooked_lm.tour import Tour


def tour_figures(tour: Tour) -> list[PageFigure]:
    """Return the figures of the five experiments, in order."""
    return [_early(tour), _patching(tour), _repeats(tour), _vectors(tour), _movers(tour)]


def tour_introduction(tour: Tour) -> str:
    """Return what the tour is about."""
    return (
        f"{tour.model_name} has {tour.n_layers} layers of {tour.n_heads} heads and {tour.n_parameters:,} parameters. "
        "Five of the field's introductory experiments are run on it, on prompts that its training never showed. Most "
        "have a control: what chance, a random direction or another head would do."
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
        f"({repeats.second_log_prob:.2f}). {label(repeats.induction_head)} attends to what came after the earlier copy "
        "of the token at hand, which it finds by what a previous-token head has left there.",
        (
            plotting.head_scores(repeats.previous_token_scores, "previous-token score"),
            plotting.head_scores(repeats.induction_scores, "induction score"),
        ),
    )


def _vectors(tour: Tour) -> PageFigure:
    vectors = tour.vectors
    state, heads, other, shuffled = vectors.accuracy
    names = ", ".join(label(head) for head in vectors.vector.heads)
    return PageFigure(
        "Function vectors: what carries the task?",
        f"Prompts of one word and a colon do not say which relation is asked for: {vectors.base_accuracy:.0%} are "
        "answered with the opposite. Adding, at one layer, the mean state of prompts with examples, or just the "
        f"summed outputs of {names}, tells the model. Random vectors of the same length do not, and the same heads on "
        "examples of other relations tell it something else. On examples with shuffled answers they still help: what "
        "kind of word an answer is can be seen from wrong answers too.",
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


def _movers(tour: Tour) -> PageFigure:
    movers = tour.movers
    names = ", ".join(map(label, movers.movers))
    return PageFigure(
        "Name movers: which heads give the name?",
        "Three measures of each head: what it adds to the answer's logit by itself, what the logit loses when the head "
        "writes what it writes in prompts about other people, and what of that goes straight to the logits. "
        f"{names} have the largest direct effect. When they write their mean over prompts about other people, "
        f"{movers.accuracy_without:.0%} of the answers are given instead of {movers.accuracy:.0%}; with as many other "
        f"heads it is {float(movers.accuracy_without_others.median()):.0%} (the median of "
        f"{len(movers.accuracy_without_others)} draws). Heads that stand out in the middle only act through others.",
        tuple(
            plotting.patching_grid(grid, axis="head", title=title)
            for grid, title in (
                (movers.attribution, "direct logit attribution"),
                (movers.patched, "patched"),
                (movers.direct, "patched, direct path"),
            )
        ),
    )
