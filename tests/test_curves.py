"""Curves over layers."""

from __future__ import annotations

import pytest
import torch

from hooked_lm.plotting import layer_curves


def test_each_curve_has_its_values_and_each_level_its_line() -> None:
    figure = layer_curves(
        {"one": torch.tensor([0.1, 0.5]), "two": [0.2, 0.3]}, ["layer 0", "layer 1"], "accuracy", {"chance": 0.25}
    )
    assert [(curve.name, list(curve.y)) for curve in figure.data] == [
        ("one", pytest.approx([0.1, 0.5])),
        ("two", [0.2, 0.3]),
    ]
    assert list(figure.data[0].x) == ["layer 0", "layer 1"]
    assert figure.layout.shapes[0].y0 == 0.25
    assert figure.layout.annotations[0].text == "chance"
    assert figure.layout.showlegend


def test_curves_that_do_not_fit_raise() -> None:
    with pytest.raises(ValueError, match=r"'one' has shape \(3,\), and there are 2 labels"):
        layer_curves({"one": [0.0, 0.0, 0.0]}, ["a", "b"])
    with pytest.raises(ValueError, match="1 to 5 curves can be told apart; got 0"):
        layer_curves({}, ["a"])
