"""Curves over layers and over a training run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hooked_lm.plotting import Figure, layer_curves, training_curves
from hooked_lm.training import TrainingConfig, train
from tests.helpers import tiny_model


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


def test_points_with_the_same_label_have_their_own_places() -> None:
    curve = layer_curves({"one": [1.0, 2.0, 3.0]}, [" a", "b", " a"]).data[0]
    assert len(set(curve.x)) == 3
    assert list(curve.customdata) == [" a", "b", " a"]
    assert [place.strip("\u200b") for place in curve.x] == ["&#x27; a&#x27;", "b", "&#x27; a&#x27;"]


# A training run

RECORDS = [
    {"step": 10, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0},
    {"step": 20, "loss": 1.5, "lr": 0.2, "grad_norm": 2.0, "accuracy": 0.5},
    {"step": 30, "loss": 1.0, "lr": 0.1, "grad_norm": 3.0},
]


def drawn(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    return {curve.name: list(zip(curve.x, curve.y, strict=True)) for curve in figure.data}


def test_a_run_has_a_panel_for_the_loss_and_each_metric_over_the_same_steps() -> None:
    figure = training_curves(RECORDS, title="A run")
    assert drawn(figure) == {"loss": [(10, 2.0), (20, 1.5), (30, 1.0)], "accuracy": [(20, 0.5)]}
    assert [curve.yaxis for curve in figure.data] == ["y", "y2"]
    upper, lower = figure.layout.yaxis.domain, figure.layout.yaxis2.domain
    assert 0 <= lower[0] < lower[1] < upper[0] < upper[1] <= 1
    assert figure.layout.xaxis.anchor == "y2"
    assert [note.text for note in figure.layout.annotations] == ["loss", "accuracy"]


def test_a_run_draws_the_quantities_asked_for_in_their_order() -> None:
    assert list(drawn(training_curves(RECORDS, ["grad_norm", "lr"]))) == ["grad_norm", "lr"]
    one = training_curves(RECORDS, ["loss"])
    assert one.layout.yaxis.domain == (0.0, 1.0)
    assert one.layout.height < training_curves(RECORDS).layout.height


def test_a_run_is_read_from_the_file_that_training_writes(tmp_path: Path) -> None:
    rows = torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(0))
    config = TrainingConfig(steps=4, batch=4, warmup=1, log_every=1, evaluate_every=2)
    records = train(tiny_model(), rows, config, tmp_path, metrics=lambda model: {"norm": 1.0}, verbose=False)
    figure = training_curves(tmp_path / "metrics.jsonl")
    assert drawn(figure) == drawn(training_curves(records))
    assert drawn(figure)["loss"] == [(record["step"], record["loss"]) for record in records]
    assert drawn(figure)["norm"] == [(2, 1.0), (4, 1.0)]


def test_records_that_cannot_be_drawn_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no records"):
        training_curves([])
    with pytest.raises(ValueError, match="record 1 has no 'step', only 'loss'"):
        training_curves([*RECORDS[:1], {"loss": 1.0}])
    with pytest.raises(ValueError, match="no record has 'acuracy': they have step, loss, lr, grad_norm, accuracy"):
        training_curves(RECORDS, ["loss", "acuracy"])
    with pytest.raises(ValueError, match="a quantity"):
        training_curves([{"step": 1}])
    with pytest.raises(ValueError, match="cannot be read"):
        training_curves(tmp_path / "metrics.jsonl")
    for line in ("{", "3"):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n' + line)
        with pytest.raises(ValueError, match="line 2: this is no record"):
            training_curves(str(tmp_path / "metrics.jsonl"))
