"""What a sweep refuses, and how it names what is at fault."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import Intervention, UnknownHookError
from hooked_lm.components.attention import Attention
from hooked_lm.metrics import accuracy, kl_to, log_prob, logit, logit_diff, rank
from hooked_lm.sweep import sweep
from tests.helpers import counted, tiny_model
from tests.hook_sites_helpers import ARCHITECTURES, POS, TOKENS
from tests.sweep_helpers import as_data, grid, model_named, reads_everything

# Errors

GOOD = Intervention("blocks.0.hook_resid_pre", "zero", pos=1)


@pytest.mark.parametrize(
    ("cell", "error", "message"),
    [
        (Intervention("blocks.7.attn.hook_z", "zero"), UnknownHookError, "layers run 0-1"),
        (Intervention("blocks.0.hook_resid_pree", "zero"), UnknownHookError, "did you mean"),
        (Intervention("blocks.0.attn.hook_z", "zero", head=3), ValueError, "head 3: this model has heads 0-2"),
        (Intervention("blocks.0.hook_resid_pre", "zero", pos=6), ValueError, "pos 6: the prompts have 6 positions"),
        (Intervention("blocks.0.hook_resid_pre", "zero", pos=(0, -7)), ValueError, "pos -7: the prompts have 6 pos"),
        (Intervention("blocks.0.attn.hook_pattern", "zero", feature=6), ValueError, "feature 6: the prompts have 6"),
        (Intervention("blocks.0.hook_resid_pre", "zero", batch=2), ValueError, "batch 2: the prompts have 2 in the"),
        (
            Intervention("blocks.1.hook_mlp_out", "add", torch.zeros(5)),
            ValueError,
            r"shape \(5,\) does not fit the selection",
        ),
        (
            Intervention("blocks.0.attn.hook_z", "add", torch.zeros(3, 4), pos=(0, 5), head=1),
            ValueError,
            r"shape \(3, 4\) .* selection, \(2, 2, 4\)",
        ),
        ("hook_embed", TypeError, "a cell is an Intervention or several, got 'h"),
    ],
)
def test_an_intervention_at_fault_is_named_before_anything_runs(
    cell: Any, error: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = counted(monkeypatch, Attention, "project")
    for metric in (logit(3), logit(3, pos=0), reads_everything):
        for cells, always in (([GOOD, cell], []), ([GOOD], [cell])):
            with pytest.raises(error, match=message):
                sweep(model_named("gpt2"), TOKENS, cells, metric, always=always, verbose=False)
    assert not ran


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (logit(3, pos=6), "logit reads position 6, and the logits have 6 positions"),
        (log_prob(3, pos=-7), "log-probability reads position -7"),
        (logit(20), "logit reads tokens .*20.*; the vocabulary is 0-19"),
        (logit_diff(2, -1), "logit difference reads tokens .*-1.*; the vocabulary is 0-19"),
        (rank(20), "rank reads tokens"),
        (logit([1, 2, 3]), "logit has answers for 3 prompts; there are 2"),
        (log_prob([1, 2, 3]), "log-probability has answers for 3 prompts; there are 2"),
        (accuracy([1, 2, 3]), "accuracy has answers for 3 prompts; there are 2"),
        (kl_to(torch.zeros(3, POS, 20)), "KL divergence has answers for 3 prompts; there are 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_metric_that_does_not_fit_the_prompts_is_named_before_anything_runs(
    metric: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = counted(monkeypatch, Attention, "project")
    with pytest.raises(ValueError, match=message):
        sweep(model_named("gpt2"), TOKENS, [GOOD], metric, verbose=False)
    assert not ran


def fails(logits: Tensor) -> Tensor:
    raise ZeroDivisionError("of the metric's own")


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        (lambda logits: logits[:, -1, 3], ValueError, r"returns a scalar; it returned shape \(2,\)"),
        (
            lambda logits: logits.sum() * float("nan"),
            ValueError,
            "not a number for 2 of 2 cells, first for .*resid_pre",
        ),
        (fails, ZeroDivisionError, "of the metric's own"),
    ],
)
@pytest.mark.parametrize("incremental", [True, False])
def test_a_metric_that_fails_is_named_and_leaves_nothing_behind(
    metric: Any, error: Any, message: str, incremental: bool
) -> None:
    model = model_named("gpt2")
    cells = [GOOD, Intervention("blocks.1.attn.hook_pattern", "zero", head=1)]
    clean = model(TOKENS)
    always = [Intervention("hook_embed", "scale", 2.0)]
    with pytest.raises(error, match=message):
        sweep(model, TOKENS, cells, metric, always=always, incremental=incremental, verbose=False)
    assert torch.is_grad_enabled()
    assert not any(point.live for point in model.hook_points())
    assert model.context_level == 0
    assert torch.equal(model(TOKENS), clean)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cells": GOOD}, TypeError, "cells and always are lists"),
        ({"always": GOOD}, TypeError, "cells and always are lists"),
        ({"metric": 3}, TypeError, "metric is one of hooked_lm.metrics or a function"),
        ({"memory_budget": 0}, ValueError, "memory_budget is a number of bytes"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_arguments_of_the_wrong_kind_are_refused(arguments: dict[str, Any], error: Any, message: str) -> None:
    given = {"cells": [GOOD], "metric": logit(3), **arguments}
    with pytest.raises(error, match=message):
        sweep(model_named("deep"), TOKENS, verbose=False, **given)


def test_the_cell_whose_score_is_not_a_number_is_named() -> None:
    nan = Intervention("blocks.1.attn.hook_z", "replace", float("nan"), pos=2, head=1)
    with pytest.raises(ValueError, match=r"not a number for 1 of 2 cells, first for .*hook_z.*pos=2"):
        sweep(model_named("gpt2"), TOKENS, [GOOD, nan], reads_everything, verbose=False)


def test_prompts_apart_need_a_metric_that_scores_each() -> None:
    with pytest.raises(ValueError, match="per_prompt needs a metric of"):
        sweep(model_named("gpt2"), TOKENS, [GOOD], reads_everything, per_prompt=True, verbose=False)


def test_the_features_of_a_shared_expert_are_its_own() -> None:
    fields = {**ARCHITECTURES["dense layer, then mixture with a shared gated expert"], "d_shared_expert": 60}
    model = tiny_model(**fields)
    assert model.cfg.d_mlp == 48
    last = Intervention("blocks.1.mlp.shared.hook_post", "add", 3.0, feature=59)
    assert sweep(model, TOKENS, [last], logit(3), verbose=False) != logit(3)(model(TOKENS))
    with pytest.raises(ValueError, match="feature 60: this model has features 0-59"):
        sweep(model, TOKENS, [dataclasses.replace(last, feature=60)], logit(3), verbose=False)


def test_a_sweep_changes_neither_prompts_nor_values() -> None:
    tokens, cells = TOKENS.clone(), as_data([*grid(), *grid(site="attn.hook_q")])
    before = [torch.as_tensor(cell[0].value).clone() for cell in cells]
    sweep(model_named("deep"), tokens, cells, logit(3), verbose=False)
    assert torch.equal(tokens, TOKENS)
    for cell, value in zip(cells, before, strict=True):
        assert torch.equal(torch.as_tensor(cell[0].value), value)
