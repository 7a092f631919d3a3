"""The graph joins the heads that compose most, and says which way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hooked_lm import HookedTransformer, plotting
from hooked_lm.circuits.composition import head_composition


def made_up() -> np.ndarray:
    scores = np.zeros((3, 2, 3, 2))
    scores[0, 1, 1, 0], scores[0, 0, 2, 1], scores[1, 0, 2, 0], scores[0, 0, 1, 1] = 0.9, 0.5, 0.3, -0.2
    return scores


def parts(figure: plotting.Figure) -> tuple[list[Any], Any, Any]:
    """The edges' lines, the dots that name them, the heads."""
    *lines, dots, heads = figure.data
    return lines, dots, heads


def test_the_highest_scores_are_edges_from_writer_up_to_reader() -> None:
    lines, dots, heads = parts(plotting.composition_graph(torch.tensor(made_up()), top=2, unit="K", title="Who"))
    assert list(dots.customdata) == ["L0H0 → L2H1", "L0H1 → L1H0"]
    assert list(dots.marker.color) == [0.5, 0.9]
    assert "K %{marker.color" in dots.hovertemplate
    # Heads stand side by side, half a step left and right of the middle, each layer above the one before.
    assert list(heads.x) == [-0.5, 0.5] * 3
    assert list(heads.y) == [0, 0, 1, 1, 2, 2]
    assert [(line.x[0], line.y[0], line.x[-1], line.y[-1]) for line in lines] == [
        pytest.approx((-0.5, 0, 0.5, 2)),
        pytest.approx((0.5, 0, -0.5, 1)),
    ]


def test_a_higher_score_is_wider_and_darker() -> None:
    lines, _, _ = parts(plotting.composition_graph(made_up()))
    widths = [line.line.width for line in lines]
    shades = [sum(int(line.line.color[at : at + 2], 16) for at in (1, 3, 5)) for line in lines]
    assert widths == sorted(widths)
    assert shades == sorted(shades, reverse=True)
    assert len(set(widths)) == len(set(shades)) == 3


def test_only_scores_above_zero_are_edges_and_the_heads_they_join_stand_out() -> None:
    lines, dots, heads = parts(plotting.composition_graph(made_up(), top=100))
    assert len(lines) == len(dots.x) == 3
    assert heads.customdata[0] == "L0H0<br>writes to 1, reads from 0 of these"
    assert heads.customdata[2] == "L1H0<br>writes to 1, reads from 1 of these"
    assert heads.marker.color[3] != heads.marker.color[0] == heads.marker.color[1]


def test_heads_that_do_not_compose_are_drawn_without_edges() -> None:
    figure = plotting.composition_graph(np.zeros((2, 3, 2, 3)))
    assert len(figure.data) == 1
    assert len(figure.data[0].x) == 6


def test_equal_scores_are_drawn_alike() -> None:
    scores = np.zeros((2, 2, 2, 2))
    scores[0, :, 1] = 0.25
    lines, _, _ = parts(plotting.composition_graph(scores))
    assert len({(line.line.width, line.line.color) for line in lines}) == 1


def test_labels_are_shown_as_they_are() -> None:
    labels = ["<b>a</b>", "b", "c", "d", "e", "f"]
    _, dots, heads = parts(plotting.composition_graph(made_up(), labels, top=2))
    assert dots.customdata[0] == "&lt;b&gt;a&lt;/b&gt; → f"
    assert heads.text[0] == "&lt;b&gt;a&lt;/…"


def test_the_bundled_models_induction_pair_is_the_darkest_edge() -> None:
    model = HookedTransformer.from_pretrained("demo-induction-2l")
    found = head_composition(model, "K", verbose=False)
    _, dots, _ = parts(plotting.composition_graph(found.scores, model.all_head_labels, top=5))
    assert dots.customdata[-1] == found.top(1, by="score")[0].label.replace("->", "→")


@pytest.mark.parametrize(
    ("scores", "options", "said"),
    [
        (np.zeros((2, 2)), {}, r"\[layer head layer head\], got \(2, 2\)"),
        (np.zeros((2, 3, 3, 2)), {}, r"got \(2, 3, 3, 2\)"),
        (np.full((1, 1, 1, 1), np.nan), {}, "finite"),
        (made_up().transpose(2, 3, 0, 1), {}, r"L1H0 -> L0H1 has score 0.9.*the writer's axes come first"),
        (made_up(), {"labels": ["a"]}, "1 labels for 3 layers of 2 heads"),
        (made_up(), {"top": 0}, "1 or more, not 0"),
    ],
)
def test_scores_that_do_not_fit_raise(scores: np.ndarray, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plotting.composition_graph(scores, **options)
