"""Figures show the numbers they are given; a page holds everything it needs."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from plotly.offline import get_plotlyjs

from hooked_lm import plotting
from hooked_lm.plotting import PageFigure


def test_an_attention_pattern_puts_queries_in_rows_and_keys_in_columns() -> None:
    pattern = torch.rand(3, 3, requires_grad=True)
    figure = plotting.attention_pattern(pattern, ["a", "b", "c"], "a title")
    heat = figure.data[0]
    np.testing.assert_array_equal(heat.z, pattern.detach().numpy())
    assert (heat.zmin, heat.zmax) == (0.0, 1.0)
    assert heat.customdata[2][0] == "c → a"
    assert "key" in figure.layout.xaxis.title.text
    assert "query" in figure.layout.yaxis.title.text
    assert figure.layout.yaxis.autorange == "reversed"
    assert figure.layout.title.text == "a title"


def test_fewer_queries_than_keys_are_the_last_positions() -> None:
    heat = plotting.attention_pattern([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]]).data[0]
    assert list(heat.y) == [1, 2]
    assert list(heat.x) == [0, 1, 2]


def test_the_log_prob_curve_starts_at_position_one_and_marks_chance_and_repeat() -> None:
    figure = plotting.log_prob_curve([-3.0, -2.0, -0.1], repeat_at=2, chance=-4.5)
    assert list(figure.data[0].x) == [1, 2, 3]
    np.testing.assert_array_equal(figure.data[0].y, [-3.0, -2.0, -0.1])
    across, down = figure.layout.shapes
    assert (across.y0, across.y1) == (-4.5, -4.5)
    assert (down.x0, down.x1) == (1.5, 1.5)


def test_head_scores_have_a_row_for_each_layer() -> None:
    heat = plotting.head_scores(np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])).data[0]
    assert list(heat.y) == ["layer 0", "layer 1"]
    assert list(heat.x) == ["head 0", "head 1", "head 2"]
    assert heat.z[1][0] == 0.4


def test_the_composition_matrix_has_writers_in_rows_and_readers_in_columns() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    heat = plotting.composition_matrix(scores, ["L0H0", "L0H1"], ["L1H0", "L1H1", "L1H2"]).data[0]
    assert list(heat.y) == ["L0H0", "L0H1"]
    assert heat.zmax == pytest.approx(0.6)
    np.testing.assert_allclose(heat.z, scores)


def test_ablation_bars_write_their_values_and_colour_what_is_highlighted() -> None:
    bars = plotting.ablation_bars(["intact", "without"], [0.04, 5.5], [False, True], axis="loss").data[0]
    assert list(bars.y) == ["intact", "without"]
    assert list(bars.x) == [0.04, 5.5]
    assert list(bars.text) == ["0.04", "5.50"]
    assert bars.marker.color[0] != bars.marker.color[1]


def test_scores_of_both_signs_are_around_zero() -> None:
    heads = plotting.head_scores([[0.5, -0.25]]).data[0]
    assert (heads.zmin, heads.zmax) == (-1.0, 1.0)
    assert dict(heads.colorscale)[0.5] == "#fbfaf6"
    pairs = plotting.composition_matrix([[0.5, -0.75]], ["L0H0"], ["L1H0", "L1H1"]).data[0]
    assert (pairs.zmin, pairs.zmax) == (-0.75, 0.75)


def test_a_map_of_many_heads_has_a_colour_bar_for_numbers() -> None:
    few, many = (plotting.head_scores(np.zeros((2, n))) for n in (16, 17))
    assert (few.data[0].texttemplate, few.data[0].showscale) == ("%{z:.2f}", False)
    assert (many.data[0].texttemplate, many.data[0].showscale) == (None, True)
    assert plotting.head_scores(np.zeros((80, 80))).layout.height < 1600


def test_tokens_are_escaped_made_visible_and_told_apart_by_their_positions() -> None:
    figure = plotting.attention_pattern(np.eye(3), [" a", "<b>", " a"])
    assert list(figure.layout.xaxis.ticktext) == ["&#x27; a&#x27;", "&lt;b&gt;", "&#x27; a&#x27;"]
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 2]
    assert figure.data[0].customdata[1][0] == "&lt;b&gt; → &#x27; a&#x27;"
    # With a format plotly says the number and not the label.
    assert "from position %{y:d} to %{x:d}" in figure.data[0].hovertemplate


def test_a_title_is_shown_as_it_is() -> None:
    assert plotting.head_scores([[0.5]], "a <b> title").layout.title.text == "a &lt;b&gt; title"


def test_conditions_with_the_same_label_have_their_own_bars() -> None:
    bars = plotting.ablation_bars(["a", "a"], [1.0, 2.0], [True, False]).data[0]
    assert len(set(bars.y)) == 2


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: plotting.attention_pattern(torch.rand(1, 3, 3)), r"has shape \[query key\], got \(1, 3, 3\)"),
        (lambda: plotting.attention_pattern(torch.rand(3, 3), ["a"]), "1 labels for a pattern of 3 queries and 3 keys"),
        (lambda: plotting.attention_pattern(torch.rand(3, 2)), "3 queries and 2 keys"),
        (lambda: plotting.attention_pattern(torch.tensor([[3.0]])), "between 3 and 3: hook_pattern has it"),
        (lambda: plotting.attention_pattern(torch.tensor([[-0.5]])), "between -0.5 and -0.5"),
        (lambda: plotting.attention_pattern(torch.tensor([[torch.nan]])), "between nan and nan"),
        (
            lambda: plotting.head_scores(torch.tensor([[0.5, 2.5]])),
            r"furthest is 2.5: patching_grid\(scores, axis='head'\)",
        ),
        (lambda: plotting.head_scores(torch.tensor([[torch.nan]])), "furthest is nan"),
        (lambda: plotting.log_prob_curve(torch.rand(2, 3)), r"log-probabilities \[pos\]"),
        (lambda: plotting.head_scores(torch.rand(3)), r"has shape \[layer head\]"),
        (lambda: plotting.composition_matrix(torch.rand(2, 2), ["a"], ["b", "c"]), "1 writers and 2 readers"),
        (lambda: plotting.ablation_bars(["a"], [1.0, 2.0], [True]), "1 labels and 1 highlights"),
    ],
)
def test_arrays_of_the_wrong_shape_raise(draw: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        draw()  # type: ignore[operator]


# The page


class References(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(tag, name) for name, _ in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag in ("link", "iframe", "object", "embed", "base"):
            self.found.append((tag, ""))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    figure = plotting.head_scores([[0.25, 0.75]])
    sections = [PageFigure("One <b>", "see this & that", (figure, figure)), PageFigure("Two", "then this", (figure,))]
    return plotting.page_html("A title", "Three sentences.", sections, [("97%", "right")], "the end")


def test_a_page_asks_the_network_for_nothing(page: str) -> None:
    parser = References()
    parser.feed(page)
    assert parser.found == []
    ours = page.replace(get_plotlyjs(), "")
    assert not re.search(r"@import|url\(|https?://|<script[^>]+src", ours)


def test_a_page_holds_plotly_once_and_every_figure(page: str) -> None:
    assert page.count(get_plotlyjs()) == 1
    for figure in ("figure-1-0", "figure-1-1", "figure-2-0"):
        assert f'id="{figure}"' in page


def test_the_text_of_a_page_is_escaped(page: str) -> None:
    assert "<h2>One &lt;b&gt;</h2>" in page
    assert "see this &amp; that" in page
    assert "<b>97%</b><span>right</span>" in page


def test_a_page_is_written_into_folders_that_do_not_exist_yet(tmp_path: Path) -> None:
    path = plotting.write_page(tmp_path / "new" / "page.html", "A title", "Words.", [])
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_without_plotly_the_import_names_the_extra() -> None:
    code = "import sys; sys.modules['plotly'] = None\nimport hooked_lm.plotting"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "ImportError" in run.stderr
    assert "pip install 'hooked-lm[viz]'" in run.stderr
