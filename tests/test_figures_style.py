"""What the figures share: texts that stay texts, labels one can see, colours that say what they mean."""

from __future__ import annotations

import numpy as np
import pytest

from hooked_lm import plotting
from hooked_lm.plotting.style import (
    DIVERGING,
    INK,
    MUTED,
    PAPER,
    RUST,
    SEQUENTIAL,
    categories,
    colour_at,
    ink_on,
    shown,
    text,
    ticks,
    visible,
)
from tests.browser import gallery
from tests.helpers import luminance


@pytest.mark.parametrize(
    ("label", "seen"),
    [
        ("Paris", "Paris"),
        (" Paris", "' Paris'"),
        ("' Paris'", "' Paris'"),
        ("", "''"),
        ("a b", "a b"),
        ("\n", r"'\n'"),
        ("a\tb", r"'a\tb'"),
        ("é日本", "é日本"),
        ("\u200b", r"'\u200b'"),
    ],
)
def test_a_label_shows_what_one_would_not_see(label: str, seen: str) -> None:
    assert visible(label) == seen


def test_a_text_is_no_markup_no_formula_and_no_template() -> None:
    assert text("<b>&") == "&lt;b&gt;&amp;"
    assert "$" not in text("$x$")
    assert "%{" not in text("%{z} 50%")
    assert text("50%") == "50%"


def test_a_long_label_is_cut_before_it_is_escaped() -> None:
    assert shown("<" * 30, 5) == "&lt;" * 4 + "…"


def test_places_of_an_axis_are_as_many_as_the_labels() -> None:
    assert categories(["a", "b"]) == ["a", "b"]
    assert len(set(categories(["a"] * 4))) == 4
    assert len(set(categories(["x" * 50, "x" * 50 + "y"]))) == 2


def test_there_are_at_most_so_many_ticks() -> None:
    assert ticks(["a", "b", "c"], most=3)["tickvals"] == [0, 1, 2]
    assert ticks(["a", "b", "c"], most=2) == {"tickvals": [0, 2], "ticktext": ["a", "c"]}


def test_colours_lie_between_their_marks() -> None:
    for scale in (SEQUENTIAL, DIVERGING):
        for place, colour in scale:
            assert colour_at(scale, place) == colour
        assert colour_at(scale, -1) == scale[0][1]
        assert colour_at(scale, 2) == scale[-1][1]
    assert colour_at([(0.0, "#000000"), (1.0, "#ff8000")], 0.5) == "#804000"


def test_the_scales_darken_with_the_distance() -> None:
    along = [luminance(colour_at(SEQUENTIAL, share)) for share in np.linspace(0, 1, 41)]
    assert along == sorted(along, reverse=True)
    for side in (np.linspace(0.5, 1, 41), np.linspace(0.5, 0, 41)):
        along = [luminance(colour_at(DIVERGING, share)) for share in side]
        assert along == sorted(along, reverse=True)


@pytest.mark.parametrize("colour", [INK, MUTED, RUST])
def test_letters_have_contrast_on_paper(colour: str) -> None:
    assert (luminance(PAPER) + 0.05) / (luminance(colour) + 0.05) >= 4.5


def test_letters_are_dark_on_light_and_white_on_dark() -> None:
    assert ink_on("#ffffff") == "#000000"
    assert ink_on("#0f3d73") == "#ffffff"


def test_every_figure_of_plotly_has_the_common_style() -> None:
    figures = {name: figure for name, figure in gallery().items() if isinstance(figure, plotting.Figure)}
    for name, figure in figures.items():
        layout = figure.layout
        assert layout.paper_bgcolor == layout.plot_bgcolor == PAPER, name
        assert layout.font.color == INK, name
        assert layout.height, name
        for trace in figure.data:
            assert trace.hoverinfo == "skip" or trace.hovertemplate.endswith("<extra></extra>"), name


def test_every_map_has_a_scale_of_its_kind() -> None:
    for name, figure in gallery().items():
        if isinstance(figure, plotting.Figure) and figure.data[0].type == "heatmap":
            heat = figure.data[0]
            colours = [colour for _, colour in heat.colorscale]
            if name.startswith("patching_grid"):
                assert colours == [colour for _, colour in DIVERGING], name
                assert heat.zmin == -heat.zmax, name
            else:
                assert colours == [colour for _, colour in SEQUENTIAL], name
                # A map of sites is of powers of ten, which have no 0 to begin at.
                assert heat.zmin == (heat.z.min() if name == "site_map" else 0.0), name
