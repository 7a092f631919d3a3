"""The divergence from a reference: its formula, its direction, and what the reference is compared with."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hooked_lm.metrics import kl_to
from tests.metrics_helpers import BATCH, EXACT, POS, cases, kl_by_hand, numbers, quick, some_logits

# KL divergence


@quick
@given(drawn=cases(), seed=st.integers(0, 1000))
def test_the_divergence_is_its_formula_and_zero_to_itself(drawn: tuple[Tensor, list[int], int], seed: int) -> None:
    logits, _, pos = drawn
    reference = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)).double()
    pairs = zip(reference[:, pos].tolist(), logits[:, pos].tolist(), strict=True)
    found = kl_to(reference, pos).per_prompt(logits)
    torch.testing.assert_close(found, numbers([kl_by_hand(wanted, row) for wanted, row in pairs]), **EXACT)
    assert float(found.min()) > -1e-14
    assert kl_to(logits, pos).per_prompt(logits).tolist() == [0.0] * len(logits)


def test_the_divergence_between_any_two_that_differ_is_positive() -> None:
    rows = some_logits(batch=40).flatten(0, 1)[:, None]
    for other in range(1, len(rows)):
        assert float(kl_to(rows.roll(other, 0)).per_prompt(rows).min()) > 1e-3


def test_the_divergence_weighs_by_the_reference_and_not_by_the_run() -> None:
    quarter, half = (numbers(list(map(math.log, odds))).reshape(1, 1, 2) for odds in ((0.25, 0.75), (0.5, 0.5)))
    # sum over tokens of p_reference log(p_reference / p_run)
    from_quarter = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    from_half = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert float(kl_to(quarter)(half)) == pytest.approx(from_quarter, abs=1e-15)
    assert float(kl_to(half)(quarter)) == pytest.approx(from_half, abs=1e-15)


def test_one_reference_serves_any_number_of_prompts() -> None:
    logits, reference = some_logits(), some_logits(1, batch=1)
    expected = [kl_by_hand(reference[0, 2].tolist(), row) for row in logits[:, 2].tolist()]
    torch.testing.assert_close(kl_to(reference, pos=2).per_prompt(logits), numbers(expected), **EXACT)


def test_a_reference_may_be_longer_than_the_run_and_is_compared_position_with_position() -> None:
    reference = some_logits(1, pos=POS + 3)
    shorter = reference[:, :POS]
    assert kl_to(reference, pos=1).per_prompt(shorter).tolist() == [0.0] * BATCH
    # Each counts from its own end.
    expected = [kl_by_hand(*rows) for rows in zip(reference[:, -1].tolist(), shorter[:, -1].tolist(), strict=True)]
    torch.testing.assert_close(kl_to(reference).per_prompt(shorter), numbers(expected), **EXACT)


def test_later_changes_of_the_reference_do_not_reach_the_metric() -> None:
    logits, reference = some_logits(), some_logits(1)
    metric = kl_to(reference)
    before = metric(logits)
    reference.zero_()
    assert torch.equal(metric(logits), before)


def test_what_the_reference_rules_out_adds_nothing_to_the_divergence() -> None:
    """0 log 0 is 0: a token that the reference masks with minus infinity costs nothing, whatever the run says."""
    reference = numbers([0.0, 0.0, -math.inf]).reshape(1, 1, 3)
    run = numbers([0.0, 0.0, math.log(2)]).reshape(1, 1, 3)
    assert float(kl_to(reference)(reference)) == 0.0
    assert float(kl_to(reference)(run)) == pytest.approx(math.log(2), abs=1e-15)  # halves against quarters
