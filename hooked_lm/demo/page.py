"""The demo's results as one page of figures. Needs the extra `viz`."""

from __future__ import annotations

import math

from hooked_lm import plotting
from hooked_lm.demo.induction import DemoResult, label
from hooked_lm.demo.tour import Tour
from hooked_lm.demo.tour_page import tour_facts, tour_figures, tour_introduction
from hooked_lm.plotting import PageFigure

__all__ = ["FOOTER", "TITLE", "TOUR", "demo_figures", "demo_page"]

TITLE = "Two small models, looked inside"
TOUR = "Five experiments"
FOOTER = (
    "Prompts are drawn with a fixed seed. Made by `hooked-lm demo`. This page is one file and makes no network "
    "requests."
)


def demo_page(result: DemoResult | None, tour: Tour) -> str:
    """Return the page: the induction circuit, unless it is None, and the tour."""
    if result is None:
        title = f"{TOUR} on {tour.model_name}"
        return plotting.page_html(title, tour_introduction(tour), tour_figures(tour), tour_facts(tour), FOOTER)
    sections = [
        PageFigure("Part one: an induction circuit", _introduction(result), ()),
        *demo_figures(result),
        PageFigure(f"Part two: {TOUR.lower()}", tour_introduction(tour), ()),
        *tour_figures(tour),
    ]
    return plotting.page_html(TITLE, _WELCOME, sections, [*_facts(result), *tour_facts(tour)], FOOTER)


_WELCOME = (
    "Language models compute in steps that can be read, changed and tested. Here this is done on two models that are "
    "small enough to be understood: one that continues repeats, and one that knows capitals, opposites and who was "
    "given something. Each section asks a question, shows what was measured, and says what to see in it."
)


def demo_figures(result: DemoResult) -> list[PageFigure]:
    """Return the page's figures, in order."""
    return [_predictions(result), _scores(result), _patterns(result), _composition(result), _ablations(result)]


def _introduction(result: DemoResult) -> str:
    return (
        f"This model has two layers of attention, no MLPs and {result.n_parameters:,} parameters, and was trained on "
        "random tokens in which stretches come twice. Nothing predicts a stretch the first time, but the second time a "
        "model that looks back can know every next token. Here we find the two heads that do this, read the circuit "
        "that joins them from the weights, and switch them off to see whether it was really them."
    )


def _facts(result: DemoResult) -> list[tuple[str, str]]:
    worst = min(result.accuracy_by_length.values())
    return [
        (f"{worst:.1%}", "of repeated tokens right, at the worst of the lengths not trained on"),
        (f"{result.previous_token_score:.2f}", f"previous-token score of {label(result.previous_token_head)}"),
        (f"{result.induction_score:.2f}", f"induction score of {label(result.induction_head)}"),
        (f"{result.circuit_accuracy:.1%}", "of tokens matched with themselves by the pair's circuit"),
    ]


def _predictions(result: DemoResult) -> PageFigure:
    guess = -math.log(result.d_vocab)
    return PageFigure(
        "The second time, it knows",
        f"Each point is the log-probability of one token, averaged over {result.batch} sequences. In the first half it "
        f"is {result.first_half.log_prob:.2f}, about that of a guess ({guess:.2f}). The first token of the repeat is "
        f"a surprise; from then on the curve stays at {result.second_half.log_prob:.3f}, close to certainty.",
        (plotting.log_prob_curve(result.log_prob_by_position, result.length + 1, guess),),
    )


def _scores(result: DemoResult) -> PageFigure:
    previous, induction = label(result.previous_token_head), label(result.induction_head)
    return PageFigure(
        "Two heads stand out",
        f"Each cell is a head. On the left, how much of its attention goes to the token just before: {previous} in "
        "layer 0 does little else. On the right, how much of it goes, in the repeat, to the token that came next the "
        f"first time: that is the business of {induction} in layer 1.",
        (
            plotting.head_scores(result.previous_token_scores, "previous-token score"),
            plotting.head_scores(result.induction_scores, "induction score"),
        ),
    )


def _patterns(result: DemoResult) -> PageFigure:
    previous, induction = label(result.previous_token_head), label(result.induction_head)
    tokens = [str(token) for token in result.tokens]
    return PageFigure(
        "Where they look",
        f"The attention of the two heads on one sequence, labelled by token. {previous} draws one line just below the "
        f"diagonal: always the token before. {induction} draws its line in the lower half, where the repeat begins, "
        f"{result.length - 1} positions back: at the token after the same one. Until then it rests on the start token.",
        (
            plotting.attention_pattern(result.previous_token_pattern, tokens, f"{previous}, previous token"),
            plotting.attention_pattern(result.induction_pattern, tokens, f"{induction}, induction"),
        ),
    )


def _composition(result: DemoResult) -> PageFigure:
    previous, induction = label(result.previous_token_head), label(result.induction_head)
    writers, readers = ([f"L{layer}H{head}" for head in range(n)] for layer, n in enumerate(result.k_composition.shape))
    largest = "is the largest number" if result.pair_composes_most else "is not the largest number"
    return PageFigure(
        "One reads what the other writes",
        "K-composition, from the weights alone: how much of what a head of layer 0 writes is read by the keys of one "
        f"in layer 1. The {result.pair_composition:.2f} of {previous} {largest} in the column of {induction}. The "
        f"pair's whole circuit compares each of the {result.d_vocab} tokens with all of them: for "
        f"{result.circuit_accuracy:.1%}, what it likes best is a position that follows that same token.",
        (plotting.composition_matrix(result.k_composition, writers, readers),),
    )


def _ablations(result: DemoResult) -> PageFigure:
    pair = {result.induction_head, result.previous_token_head}
    return PageFigure(
        "Without them, it is lost",
        "Each bar is the loss on the second half with one head switched off, its output set to zero. If the two heads "
        f"do the work, their bars are long, up to that of a guess ({math.log(result.d_vocab):.2f}) or beyond, and "
        f"those of the others are as short as the intact model's ({result.ablations[0].loss:.3f}).",
        (
            plotting.ablation_bars(
                [ablation.label for ablation in result.ablations],
                [ablation.loss for ablation in result.ablations],
                [ablation.head in pair for ablation in result.ablations],
                axis="loss on the second half (nats)",
            ),
        ),
    )
