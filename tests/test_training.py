"""The trainer: its schedule, its checkpoints, its records, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from hooked_lm import training
from hooked_lm.training import TrainingConfig, make_optimizer, row_batches, train
from tests.helpers import tiny_model, tiny_tokens

CONFIG = TrainingConfig(steps=12, batch=4, lr=1e-2, warmup=3, log_every=2, checkpoint_every=3)


def rows() -> Tensor:
    return tiny_tokens(batch=18, pos=8, seed=3)


def fresh_model() -> Any:
    return tiny_model(dtype=torch.float32)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


class Killed(Exception):
    """Stands for a kill."""


def killed_at(step: int) -> Any:
    """Batches that stop the run when a step's batch is asked for."""
    batch_of = row_batches(rows(), CONFIG.batch, CONFIG.seed)

    def batches(now: int) -> Tensor:
        if now == step:
            raise Killed
        return batch_of(now)

    return batches


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is a whole number, 1 or more, not 0"),
        ({"steps": 2.5}, "steps is a whole number"),
        ({"batch": 0}, "batch is a whole number, 1 or more"),
        ({"warmup": -1}, "warmup is a whole number, 0 or more"),
        ({"warmup": 13}, "warmup is 13 steps, which is more than the run's 12"),
        ({"lr": 0.0}, "lr is a positive number"),
        ({"lr": math.nan}, "lr is a positive number"),
        ({"final_lr": 1.5}, "final_lr is a part of lr"),
        ({"weight_decay": -0.1}, "weight_decay is 0 or more"),
        ({"clip": 0.0}, "clip is a positive number or None"),
        ({"betas": (0.9, 1.0)}, "betas are two numbers"),
        ({"betas": (0.9,)}, "betas are two numbers"),
        ({"seed": -1}, "seed is a whole number, 0 or more"),
        ({"log_every": 0}, "log_every is a whole number, 1 or more"),
        ({"checkpoint_every": True}, "checkpoint_every is a whole number"),
    ],
)
def test_settings_out_of_range_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{"steps": 12, "warmup": 3, **changes})


def test_the_learning_rate_rises_in_a_line_and_falls_by_half_a_cosine() -> None:
    config = TrainingConfig(steps=110, lr=2.0, warmup=10, final_lr=0.1)
    rates = [config.learning_rate(step) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[59] == pytest.approx(2.0 * 0.55)  # half-way down
    assert rates[34] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert rates[-1] == pytest.approx(0.2)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_a_run_may_be_all_warm_up() -> None:
    config = TrainingConfig(steps=4, lr=1.0, warmup=4)
    assert [config.learning_rate(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_only_matrices_decay() -> None:
    model = fresh_model()
    decaying, others = make_optimizer(model, TrainingConfig(steps=1, warmup=0, weight_decay=0.3)).param_groups
    names = {id(value): name for name, value in model.named_parameters()}
    assert decaying["weight_decay"] == 0.3
    assert others["weight_decay"] == 0.0
    assert all(".W_" in names[id(value)] for value in decaying["params"])
    assert not any(".W_" in names[id(value)] for value in others["params"])
    assert len(decaying["params"]) + len(others["params"]) == len(names)


def test_a_model_with_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        train(fresh_model().requires_grad_(False), rows(), CONFIG, verbose=False)


# Batches


def test_each_pass_shows_every_row_once_in_a_new_order() -> None:
    data = torch.arange(12)[:, None]
    batch_of = row_batches(data, 4, seed=0)
    passes = [torch.cat([batch_of(3 * turn + place) for place in range(3)]).flatten() for turn in range(2)]
    assert all(sorted(one.tolist()) == list(range(12)) for one in passes)
    assert passes[0].tolist() != passes[1].tolist()
    assert torch.equal(batch_of(4), row_batches(data, 4, seed=0)(4))
    assert not torch.equal(batch_of(4), row_batches(data, 4, seed=1)(4))


def test_fewer_rows_than_a_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"batches of 32 rows need .* got shape \(18, 8\)"):
        train(fresh_model(), rows(), TrainingConfig(steps=200), verbose=False)


# Training


def test_training_lowers_the_loss_and_leaves_the_mode_as_it_was() -> None:
    model = fresh_model().eval()
    records = train(model, rows(), TrainingConfig(steps=60, batch=8, lr=1e-2, warmup=5), verbose=False)
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert not model.training


def test_training_leaves_torchs_generator_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(fresh_model(), rows(), TrainingConfig(steps=2, warmup=0, batch=4, seed=9), verbose=False)
    assert torch.equal(torch.rand(3), expected)


def test_a_step_is_adamw_with_clipping() -> None:
    batch_of = row_batches(rows(), CONFIG.batch, CONFIG.seed)
    trained, expected = fresh_model(), fresh_model()
    config = TrainingConfig(steps=2, batch=4, lr=1e-2, warmup=2, clip=0.1)
    records = train(trained, rows(), config, verbose=False)
    optimizer = make_optimizer(expected, config)
    for step in range(2):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2 * (step + 1) / 2
        loss = expected(batch_of(step), return_type="loss")
        optimizer.zero_grad()
        loss.backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in expected.parameters()]))
        assert norm > 0.1
        for parameter in expected.parameters():
            parameter.grad *= 0.1 / (norm + 1e-6)
        optimizer.step()
    for name, value in weights_of(expected).items():
        torch.testing.assert_close(trained.state_dict()[name], value)
    assert records[-1]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


class Labelled(NamedTuple):
    values: Tensor
    label: str


def test_a_loss_of_ones_own_gets_the_batch_as_it_came() -> None:
    model = nn.Linear(3, 1)
    batch = {
        "x": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
        "y": Labelled(torch.ones(5, 1), "label"),
    }
    config = TrainingConfig(steps=200, lr=0.05, warmup=1, weight_decay=0.0)

    def squared_error(model: nn.Module, batch: Any) -> Tensor:
        assert batch["y"].label == "label"
        return (model(batch["x"]) - batch["y"].values).square().mean()

    records = train(model, lambda step: batch, config, loss_fn=squared_error, verbose=False)
    assert records[-1]["loss"] < 1e-3


# Records


def test_records_are_means_since_the_last_and_go_to_a_file_of_json_lines(tmp_path: Path) -> None:
    every = train(fresh_model(), rows(), TrainingConfig(steps=7, batch=4, warmup=3, log_every=1), verbose=False)
    config = TrainingConfig(steps=7, batch=4, warmup=3, log_every=3)
    records = train(fresh_model(), rows(), config, tmp_path, verbose=False)
    assert [record["step"] for record in records] == [3, 6, 7]
    losses = [record["loss"] for record in every]
    assert [record["loss"] for record in records] == pytest.approx(
        [sum(losses[:3]) / 3, sum(losses[3:6]) / 3, losses[6]]
    )
    assert [record["lr"] for record in records] == [config.learning_rate(step) for step in (2, 5, 6)]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == records


def test_metrics_are_taken_in_eval_mode_and_do_not_disturb_the_run() -> None:
    def metrics(model: Any) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(3)
        return {"norm": model.W_E.norm()}

    def noisy_loss(model: Any, batch: Tensor) -> Tensor:
        return model(batch, return_type="loss") * (1 + torch.rand(()))

    config = TrainingConfig(steps=5, batch=4, warmup=1, log_every=2, evaluate_every=3)
    with_metrics, without = fresh_model(), fresh_model()
    records = train(with_metrics, rows(), config, loss_fn=noisy_loss, metrics=metrics, verbose=False)
    train(without, rows(), config, loss_fn=noisy_loss, verbose=False)
    assert [record["step"] for record in records] == [2, 3, 4, 5]
    assert ["norm" in record for record in records] == [False, True, False, True]
    assert_same_weights(weights_of(with_metrics), weights_of(without))


def test_the_progress_bar_can_be_turned_off(capfd: pytest.CaptureFixture[str]) -> None:
    train(fresh_model(), rows(), CONFIG, verbose=False)
    assert capfd.readouterr().err == ""
    train(fresh_model(), rows(), CONFIG)
    assert "12/12" in capfd.readouterr().err


# Checkpoints


@pytest.mark.parametrize("step", [1, 5, 6, 11])
def test_a_killed_run_goes_on_to_the_same_weights_and_records(tmp_path: Path, step: int) -> None:
    expected = fresh_model()
    train(expected, rows(), CONFIG, tmp_path / "whole", verbose=False)
    with pytest.raises(Killed):
        train(fresh_model(), killed_at(step), CONFIG, tmp_path / "parted", verbose=False)
    resumed = fresh_model()
    train(resumed, rows(), CONFIG, tmp_path / "parted", verbose=False)
    assert_same_weights(weights_of(resumed), weights_of(expected))
    whole, parted = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parted"))
    assert parted == whole


def test_randomness_of_the_loss_goes_on_where_it_was(tmp_path: Path) -> None:
    def noisy_loss(model: Any, batch: Tensor) -> Tensor:
        return model(batch, return_type="loss") * (1 + torch.rand(()))

    expected, resumed = fresh_model(), fresh_model()
    train(expected, rows(), CONFIG, loss_fn=noisy_loss, verbose=False)
    with pytest.raises(Killed):
        train(fresh_model(), killed_at(8), CONFIG, tmp_path, loss_fn=noisy_loss, verbose=False)
    torch.rand(7)
    train(resumed, rows(), CONFIG, tmp_path, loss_fn=noisy_loss, verbose=False)
    assert_same_weights(weights_of(resumed), weights_of(expected))


def test_a_finished_run_is_loaded_and_not_repeated(tmp_path: Path) -> None:
    model, again = fresh_model(), fresh_model()
    records = train(model, rows(), CONFIG, tmp_path, verbose=False)
    assert train(again, killed_at(0), CONFIG, tmp_path, verbose=False) == records
    assert_same_weights(weights_of(again), weights_of(model))


def test_starting_over_forgets_the_checkpoint_and_its_records(tmp_path: Path) -> None:
    train(fresh_model(), rows(), CONFIG, tmp_path, verbose=False)
    with pytest.raises(Killed):
        train(fresh_model(), killed_at(2), CONFIG, tmp_path, resume=False, verbose=False)
    assert not (tmp_path / "checkpoint.pt").exists()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_kill_while_a_checkpoint_is_written_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fresh_model()
    train(expected, rows(), CONFIG, verbose=False)
    save = torch.save

    def half_a_save(state: dict[str, Any], file: Any) -> None:
        if state["step"] == 6:
            file.write(b"half")
            raise Killed
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(training.torch, "save", half_a_save)
        with pytest.raises(Killed):
            train(fresh_model(), rows(), CONFIG, tmp_path, verbose=False)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    resumed = fresh_model()
    train(resumed, rows(), CONFIG, tmp_path, verbose=False)
    assert_same_weights(weights_of(resumed), weights_of(expected))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "metrics.jsonl"]


def test_a_record_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    expected = train(fresh_model(), rows(), CONFIG, verbose=False)
    with pytest.raises(Killed):
        train(fresh_model(), killed_at(7), CONFIG, tmp_path, verbose=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    assert train(fresh_model(), rows(), CONFIG, tmp_path, verbose=False) == expected


SCRIPT = """
import sys, time, torch
from hooked_lm.training import TrainingConfig, train
torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
def batch_of(step):
    time.sleep(float(sys.argv[2]))
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
config = TrainingConfig(steps=60, lr=1e-2, warmup=5, log_every=1, checkpoint_every=1)
def squared_error(model, x):
    return (model(x) - x.flip(1)).square().mean()
train(model, batch_of, config, sys.argv[1], squared_error, verbose=False)
"""


def test_a_process_killed_outright_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    def start(folder: str, pause: float) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / folder), str(pause)])

    whole, killed = start("whole", 0.0), start("killed", 0.05)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.read_bytes().count(b"\n") > 5):
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert start("killed", 0.0).wait() == whole.wait() == 0
    one, other = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in ("whole", "killed")
    )
    assert_same_weights(one, other)
    assert metrics.read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


# What goes wrong


def test_a_checkpoint_of_other_settings_is_refused_and_names_them(tmp_path: Path) -> None:
    train(fresh_model(), rows(), CONFIG, tmp_path, verbose=False)
    other = TrainingConfig(steps=20, batch=4, lr=1e-2, warmup=3)
    with pytest.raises(ValueError, match=r"is of a run with steps 12 \(now 20\): give the same settings"):
        train(fresh_model(), rows(), other, tmp_path, verbose=False)


def test_how_often_to_log_and_save_may_change(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(fresh_model(), killed_at(5), CONFIG, tmp_path, verbose=False)
    other = TrainingConfig(steps=12, batch=4, lr=1e-2, warmup=3, log_every=4, checkpoint_every=0)
    assert [record["step"] for record in train(fresh_model(), rows(), other, tmp_path, verbose=False)] == [2, 4, 8, 12]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    train(fresh_model(), rows(), CONFIG, tmp_path, verbose=False)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is of another model"):
        train(tiny_model(n_layers=1, dtype=torch.float32), rows(), CONFIG, tmp_path, verbose=False)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    def broken_loss(model: Any, batch: Tensor) -> Tensor:
        loss = model(batch, return_type="loss")
        broken_loss.calls += 1  # type: ignore[attr-defined]
        return loss * math.nan if broken_loss.calls == 8 else loss  # type: ignore[attr-defined]

    broken_loss.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 7, with a learning rate of .*lower lr"):
        train(fresh_model(), rows(), CONFIG, tmp_path, loss_fn=broken_loss, verbose=False)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 6
    assert all(bool(value.isfinite().all()) for value in saved["model"].values())


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(FloatingPointError, match="the gradient's norm is nan at step 0"):
        train(fresh_model(), rows(), CONFIG, loss_fn=lambda model, _: (model.W_E * 0).sum().sqrt(), verbose=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_the_gpu_resumes_to_the_same_weights(tmp_path: Path) -> None:
    expected, resumed = fresh_model().to("cuda"), fresh_model().to("cuda")
    train(expected, rows(), CONFIG, verbose=False)
    with pytest.raises(Killed):
        train(fresh_model().to("cuda"), killed_at(7), CONFIG, tmp_path, verbose=False)
    train(resumed, rows(), CONFIG, tmp_path, verbose=False)
    assert_same_weights(weights_of(resumed), weights_of(expected))
