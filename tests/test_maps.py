"""Maps show the numbers they are given, and tokens as they are."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from hooked_lm import plotting
from hooked_lm.plotting import PageFigure
from hooked_lm.plotting.style import DIVERGING, SEQUENTIAL

TOKENS = [[["<b>", "b"], ["' Paris'", "c"]], [["<|endoftext|>", "e"], ["</script>", "g"]], [["h", "i"], ["j", "k"]]]
PROBABILITIES = torch.tensor([[[0.5, 0.25], [0.75, 0.125]], [[0.9, 0.05], [0.4, 0.3]], [[1.0, 0.0], [0.3, 0.2]]])


# The grid


def test_a_grid_has_a_row_for_each_layer_and_is_centred() -> None:
    scores = torch.tensor([[0.0, 1.0, -0.25], [0.5, 0.0, 0.0]], requires_grad=True)
    figure = plotting.patching_grid(scores, ["' a'", "' b'", "' a'"], unit="share")
    heat = figure.data[0]
    np.testing.assert_array_equal(heat.z, scores.detach().numpy())
    assert (heat.zmin, heat.zmax) == (-1.0, 1.0)
    assert list(heat.x) == [0, 1, 2]  # tokens may come twice: a column is a position
    assert len(figure.layout.xaxis.ticktext) == 3
    assert figure.layout.yaxis.autorange == "reversed"
    assert figure.layout.xaxis.title.text == "position"
    assert "share %{z" in heat.hovertemplate


def test_a_grid_is_centred_where_one_says() -> None:
    heat = plotting.patching_grid([[-2.0, 1.0]], centre=-2.0).data[0]
    assert (heat.zmin, heat.zmax) == (-5.0, 1.0)
    colours = dict(heat.colorscale)
    assert colours[0.5] == "#fbfaf6"
    heat = plotting.patching_grid([[-0.5, 0.2]], axis="head", limit=1.0).data[0]
    assert (heat.zmin, heat.zmax) == (-1.0, 1.0)


def test_a_grid_of_heads_has_its_numbers_in_it_while_there_is_room() -> None:
    assert plotting.patching_grid(np.zeros((2, 4)), axis="head").data[0].texttemplate == "%{z:.2f}"
    assert plotting.patching_grid(np.zeros((2, 40)), axis="head").data[0].texttemplate is None
    assert plotting.patching_grid(np.zeros((2, 4))).data[0].texttemplate is None


def test_a_grid_where_nothing_moves_has_a_scale_all_the_same() -> None:
    heat = plotting.patching_grid(np.full((2, 2), 3.0), centre=3.0).data[0]
    assert (heat.zmin, heat.zmax) == (2.0, 4.0)


def test_a_long_prompt_has_fewer_tick_labels_than_positions() -> None:
    figure = plotting.patching_grid(np.zeros((60, 100)))
    assert list(figure.layout.xaxis.tickvals) == list(range(0, 100, 3))
    assert list(figure.layout.yaxis.tickvals) == list(range(0, 60, 3))
    assert figure.layout.height < 1200


def test_columns_with_the_same_label_are_told_apart_by_their_numbers() -> None:
    twice = plotting.patching_grid(np.zeros((2, 3)), [" a", " b", " a"]).data[0]
    assert list(twice.customdata[1]) == ["0 &#x27; a&#x27;", "1 &#x27; b&#x27;", "2 &#x27; a&#x27;"]
    once = plotting.patching_grid(np.zeros((2, 2)), ["a", "b"]).data[0]
    assert list(once.customdata[0]) == ["a", "b"]


def test_cells_that_were_not_measured_leave_the_scale_alone() -> None:
    heat = plotting.patching_grid([[-0.5, np.nan]]).data[0]
    assert (heat.zmin, heat.zmax) == (-0.5, 0.5)


def test_amounts_have_no_colours_of_what_cannot_be() -> None:
    heat = plotting.patching_grid([[0.0, 3.0, np.nan]], unit="norm").data[0]
    assert (heat.zmin, heat.zmax, list(heat.colorbar.tickvals)) == (0.0, 3.0, [0.0, 1.5, 3.0])
    assert [tuple(mark) for mark in heat.colorscale] == SEQUENTIAL
    around_0 = plotting.patching_grid([[0.0, 3.0]], limit=4.0).data[0]
    around_1 = plotting.patching_grid([[0.0, 3.0]], centre=1.0).data[0]
    assert [(heat.zmin, heat.zmax) for heat in (around_0, around_1)] == [(-4.0, 4.0), (-1.0, 3.0)]
    assert all([tuple(mark) for mark in heat.colorscale] == DIVERGING for heat in (around_0, around_1))


@pytest.mark.parametrize(
    ("rows", "title", "said", "beside"),
    [
        (8, "Heads", "Heads", "logit difference"),
        (2, "Heads", "Heads (logit difference)", ""),
        (2, "", "logit difference", ""),
        (2, "Logit difference by head", "Logit difference by head", ""),
    ],
)
def test_the_unit_is_in_the_title_where_the_bar_is_too_short_for_it(
    rows: int, title: str, said: str, beside: str
) -> None:
    figure = plotting.patching_grid(np.ones((rows, 4)), unit="logit difference", title=title)
    assert (figure.layout.title.text, figure.data[0].colorbar.title.text) == (said, beside)
    assert "logit difference %{z" in figure.data[0].hovertemplate


def test_a_table_of_few_sites_says_in_its_title_what_a_colour_is() -> None:
    few, many = (
        plotting.lens_table([[["a"]]] * n, np.ones((n, 1, 1)), [f"{place}_pre" for place in range(n)], title="Lens")
        for n in (2, 6)
    )
    assert (few.layout.title.text, few.data[0].colorbar.title.text) == ("Lens (probability)", "")
    assert (many.layout.title.text, many.data[0].colorbar.title.text) == ("Lens", "probability")


def test_a_unit_is_no_template() -> None:
    heat = plotting.patching_grid([[0.5]], unit="%{x} <b>").data[0]
    assert "&#37;{x} &lt;b&gt; %{z:.3f}" in heat.hovertemplate
    high = plotting.patching_grid([[0.5]] * 4, unit="%{x} <b>").data[0]
    assert high.colorbar.title.text == "&#37;{x} &lt;b&gt;"


# The lens


def test_the_table_has_the_likeliest_token_in_each_cell_and_the_last_site_on_top() -> None:
    figure = plotting.lens_table(TOKENS, PROBABILITIES, ["0_pre", "0_mid", "0_post"], ["x", "y"], "a title")
    heat = figure.data[0]
    np.testing.assert_array_equal(heat.z, PROBABILITIES[:, :, 0].numpy())
    assert (heat.zmin, heat.zmax) == (0.0, 1.0)
    assert [list(row) for row in heat.text] == [
        ["&lt;b&gt;", "&#x27; Paris&#x27;"],
        ["&lt;|endoftext|&gt;", "&lt;/script&gt;"],
        ["h", "j"],
    ]
    assert heat.customdata[0][1] == "0_pre, position y<br>&#x27; Paris&#x27;  75.0%<br>c  12.5%"
    assert list(figure.layout.yaxis.ticktext) == ["0_pre", "0_mid", "0_post"]
    assert figure.layout.yaxis.autorange is None  # upwards
    assert figure.layout.title.text == "a title"


def test_long_tokens_are_cut_to_the_cell_and_whole_where_one_points() -> None:
    heat = plotting.lens_table([[["a" * 30]] * 20], np.full((1, 20, 1), 0.5), ["end"]).data[0]
    assert heat.text[0][0] == "aaaa…"
    assert "a" * 30 in heat.customdata[0][0]
    assert plotting.lens_table([[["a"]] * 60], np.full((1, 60, 1), 0.5), ["end"]).data[0].texttemplate is None


def test_nothing_of_a_token_is_read_as_part_of_the_page() -> None:
    figure = plotting.lens_table(TOKENS, PROBABILITIES, ["a", "b", "c"], ["</script><script>", "y"])
    page = plotting.page_html("A title", "", [PageFigure("One", "", (figure,))])
    assert page.count("</script><script>") == 0
    json.loads(figure.to_json())


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: plotting.patching_grid(torch.rand(3)), r"has shape \[layer position\], got \(3,\)"),
        (lambda: plotting.patching_grid(torch.rand(2, 3), ["a"]), "1 labels for 3 positions"),
        (lambda: plotting.patching_grid(torch.rand(2, 3), ["a"], axis="head"), "1 labels for 3 heads"),
        (lambda: plotting.patching_grid(torch.rand(2, 3), limit=0.0), "above 0, not 0.0"),
        (lambda: plotting.lens_table(TOKENS, torch.rand(3, 2), ["a", "b", "c"]), r"\[site pos top\], got \(3, 2\)"),
        (lambda: plotting.lens_table(TOKENS, PROBABILITIES, ["a"]), "3 sites of tokens and 1 labels"),
        (lambda: plotting.lens_table(TOKENS[:2], PROBABILITIES, ["a", "b", "c"]), "2 sites of tokens"),
        (lambda: plotting.lens_table(TOKENS, PROBABILITIES[:, :, :1], ["a", "b", "c"]), "for probabilities"),
        (lambda: plotting.lens_table(TOKENS, PROBABILITIES, ["a", "b", "c"], ["x"]), "1 labels for 2 positions"),
    ],
)
def test_arrays_of_the_wrong_shape_raise(draw: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        draw()
