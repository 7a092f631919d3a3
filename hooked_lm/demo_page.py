"""The demo's result as a page of figures. Needs the extra `viz`."""

from __future__ import annotations

import math
from pathlib import Path

from hooked_lm import plotting
from hooked_lm.demo import DemoResult, label

TITLE = "An induction circuit, found and tested"


def write_demo_page(result: DemoResult, path: str | Path) -> Path:
    """Write the page and return its path."""
    return plotting.write_page(
        path, TITLE, _introduction(result), _sections(result), facts=_facts(result), footer=_footer(result)
    )


def _introduction(result: DemoResult) -> str:
    return (
        f"This model has two layers of attention, {result.n_parameters:,} parameters and no MLPs, and it was trained on "
        "random tokens in which one stretch comes twice. Nothing predicts a stretch the first time, but the second time "
        "a model that looks back can know every next token. Below we find the two heads that do this, read the circuit "
        "that joins them from the weights, and switch them off to see whether it was really them."
    )


def _facts(result: DemoResult) -> list[tuple[str, str]]:
    return [
        (
            f"{min(result.accuracy_by_length.values()):.1%}",
            "of repeated tokens right, at the worst length not trained on",
        ),
        (f"{result.induction_score:.2f}", f"induction score of {label(result.induction_head)}"),
        (f"{result.previous_token_score:.2f}", f"previous-token score of {label(result.previous_token_head)}"),
        (f"{result.circuit_accuracy:.1%}", "of tokens found again by the pair's circuit, from weights alone"),
    ]


def _sections(result: DemoResult) -> list[plotting.PageFigure]:
    previous, induction = label(result.previous_token_head), label(result.induction_head)
    tokens = [str(token) for token in result.tokens]
    n_heads = result.k_composition.shape[0]
    intact = result.ablations[0]
    chance = 1 / result.d_vocab
    return [
        plotting.PageFigure(
            "The second time, it knows",
            f"Each point is the log-probability of one token, averaged over {result.batch} sequences. In the first "
            f"half it is {result.first_half.log_prob:.2f}, about that of a guess ({math.log(chance):.2f}). "
            "The first token of the repeat comes as a surprise; from then on the curve jumps up to "
            f"{result.second_half.log_prob:.2f}, close to certainty.",
            (plotting.log_prob_curve(result.log_prob_by_position, result.length + 1, math.log(chance)),),
        ),
        plotting.PageFigure(
            "Two heads stand out",
            "Each cell is a head. On the left, how much of its attention goes to the token just before: "
            f"{previous} in layer 0 does little else. On the right, how much of it goes, in the repeat, to the token "
            f"that came next the first time: that is {induction} in layer 1.",
            (
                plotting.head_scores(result.previous_token_scores, "previous-token score"),
                plotting.head_scores(result.induction_scores, "induction score"),
            ),
        ),
        plotting.PageFigure(
            "Where they look",
            f"The attention of the two heads on one sequence, labelled by token. {previous} draws one line just below the "
            f"diagonal: always the token before. {induction} draws one in the lower half, where the repeat begins, "
            f"{result.length - 1} positions back: the token after the same one.",
            (
                plotting.attention_pattern(result.previous_token_pattern, tokens, f"{previous}, previous token"),
                plotting.attention_pattern(result.induction_pattern, tokens, f"{induction}, induction"),
            ),
        ),
        plotting.PageFigure(
            "One reads what the other writes",
            "K-composition, from the weights alone: how much of what a head of layer 0 writes is read by the keys of a head "
            f"of layer 1. In the column of {induction} the largest number is that of "
            f"{'the previous-token head' if result.pair_composes_most else 'another head than'} {previous}. "
            f"Multiplied out, the pair's circuit matches each of the {result.d_vocab} tokens with itself: for "
            f"{result.circuit_accuracy:.1%} of them, the position it likes best is the one that comes after the same token.",
            (
                plotting.composition_matrix(
                    result.k_composition,
                    [f"L0H{head}" for head in range(n_heads)],
                    [f"L1H{head}" for head in range(n_heads)],
                ),
            ),
        ),
        plotting.PageFigure(
            "Without them, it is lost",
            f"Each bar is the second half with one head switched off (its output set to zero). The intact model loses "
            f"{intact.loss:.2f} nats per token. If the two heads do the work, their bars are long and the others are not.",
            (
                plotting.ablation_bars(
                    [ablation.label for ablation in result.ablations],
                    [ablation.loss for ablation in result.ablations],
                    [
                        set(ablation.heads) <= {result.induction_head, result.previous_token_head}
                        and bool(ablation.heads)
                        for ablation in result.ablations
                    ],
                    axis="loss on the second half (nats)",
                ),
            ),
        ),
    ]


def _footer(result: DemoResult) -> str:
    return (
        f"{result.model_name}; {result.batch} sequences of {result.length} random tokens, twice, seed {result.seed}. "
        "Made by `hooked-lm demo`. This page is one file and asks the network for nothing."
    )
