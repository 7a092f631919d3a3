"""Direct logit attribution as bars and as a running sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hooked_lm import plotting
from hooked_lm.plotting.style import BLUE, ORANGE

LABELS, VALUES = ["embed", "L0H1", "MLP 0"], [0.5, -1.25, 2.0]


def test_bars_go_to_both_sides_of_zero_and_say_their_numbers() -> None:
    figure = plotting.attribution_bars(LABELS, torch.tensor(VALUES, requires_grad=True), unit="logit <b>", title="All")
    bars = figure.data[0]
    assert list(bars.x) == VALUES
    assert list(bars.y) == LABELS
    assert list(bars.marker.color) == [BLUE, ORANGE, BLUE]
    assert list(bars.text) == ["+0.50", "\u22121.25", "+2.00"]
    assert bars.hovertemplate.startswith("%{customdata}<br>logit &lt;b&gt; %{x:+.3f}")
    low, high = figure.layout.xaxis.range
    assert low < -1.25
    assert high > 2.0
    top, bottom = figure.layout.yaxis.range[::-1]
    assert top < bottom  # the first is on top
    assert figure.layout.title.text == "All"


def test_labels_that_come_twice_have_two_bars() -> None:
    bars = plotting.attribution_bars(["a", "a", "a", " b"], [1.0, 2.0, 3.0, 4.0]).data[0]
    assert len(set(bars.y)) == 4
    assert [label.strip("\u200b") for label in bars.y] == ["a", "a", "a", "&#x27; b&#x27;"]
    assert list(bars.customdata) == ["a", "a", "a", " b"]


def test_the_waterfall_sums_to_its_total() -> None:
    fall = plotting.attribution_waterfall(LABELS, VALUES).data[0]
    assert list(fall.x) == [0.5, -1.25, 2.0, 1.25]
    assert list(fall.measure) == ["relative"] * 3 + ["total"]
    assert list(fall.y) == [*LABELS, "total"]
    assert (fall.increasing.marker.color, fall.decreasing.marker.color) == (BLUE, ORANGE)
    assert fall.customdata[1] == "L0H1<br>logit difference -1.250<br>so far -0.750"
    assert fall.customdata[-1] == "total<br>logit difference 1.250"


def test_what_the_components_leave_out_is_the_rest() -> None:
    fall = plotting.attribution_waterfall(LABELS, VALUES, total=4.0).data[0]
    assert list(fall.x) == pytest.approx([0.5, -1.25, 2.0, 2.75, 4.0])
    assert list(fall.y) == [*LABELS, "the rest", "total"]


def test_rounding_is_no_component() -> None:
    values = torch.full((1000,), 0.1)
    fall = plotting.attribution_waterfall([str(i) for i in range(1000)], values, total=100.0).data[0]
    assert "the rest" not in fall.y
    assert fall.x[-1] == 100.0


def test_a_running_sum_below_zero_has_room() -> None:
    low, high = plotting.attribution_waterfall(["a", "b"], [-2.0, -1.0]).layout.xaxis.range
    assert low < -3.0
    assert high == 0.0


@pytest.mark.parametrize("draw", [plotting.attribution_bars, plotting.attribution_waterfall])
@pytest.mark.parametrize(
    ("labels", "values", "said"),
    [
        (["a"], [1.0, 2.0], r"1 labels for values of shape \(2,\)"),
        (["a", "b"], [[1.0, 2.0]], r"2 labels for values of shape \(1, 2\)"),
        ([], [], "at least one"),
        (["a", "b"], [1.0, np.nan], "is finite; this is not: b"),
    ],
)
def test_values_that_do_not_fit_raise(draw: Any, labels: list[str], values: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        draw(labels, values)


def test_a_total_that_is_no_number_raises() -> None:
    with pytest.raises(ValueError, match="finite number, not nan"):
        plotting.attribution_waterfall(["a"], [1.0], total=float("nan"))
