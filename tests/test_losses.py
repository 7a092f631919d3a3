"""The next-token loss and accuracy, beside the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hooked_lm.losses import lm_accuracy, lm_cross_entropy_loss
from tests.helpers import tiny_model, tiny_tokens

EXACT = {"atol": 1e-12, "rtol": 0.0}


def some_logits(batch: int = 2, pos: int = 7, vocab: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.randn(batch, pos, vocab, generator=generator, dtype=torch.float64)


def losses_by_hand(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return [batch pos-1]: the log of the sum of exponentials, minus the logit of the token that came."""
    batch, pos = tokens.shape
    losses = torch.zeros(batch, pos - 1, dtype=torch.float64)
    for row in range(batch):
        for at in range(pos - 1):
            scores = logits[row, at]
            losses[row, at] = scores.exp().sum().log() - scores[tokens[row, at + 1]]
    return losses


def test_the_loss_is_the_mean_over_all_predictions() -> None:
    logits, tokens = some_logits(), tiny_tokens()
    expected = losses_by_hand(logits, tokens)
    torch.testing.assert_close(lm_cross_entropy_loss(logits, tokens, per_token=True), expected, **EXACT)
    torch.testing.assert_close(lm_cross_entropy_loss(logits, tokens), expected.mean(), **EXACT)
    torch_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(lm_cross_entropy_loss(logits, tokens), torch_loss, **EXACT)


def test_even_odds_cost_the_log_of_the_vocabulary() -> None:
    loss = lm_cross_entropy_loss(torch.zeros(2, 7, 20), tiny_tokens())
    assert loss == pytest.approx(math.log(20))


def test_a_certain_prediction_costs_nothing() -> None:
    tokens = tiny_tokens()
    logits = torch.zeros(2, 7, 20, dtype=torch.float64)
    logits[:, :-1].scatter_(2, tokens[:, 1:, None], 1000.0)
    assert lm_cross_entropy_loss(logits, tokens) == 0


def test_the_last_logits_and_the_first_token_do_not_matter() -> None:
    logits, tokens = some_logits(), tiny_tokens()
    expected = lm_cross_entropy_loss(logits, tokens)
    logits[:, -1] += torch.arange(20)
    tokens[:, 0] = 3
    torch.testing.assert_close(lm_cross_entropy_loss(logits, tokens), expected, **EXACT)


def test_a_prediction_counts_where_it_and_its_token_are_real() -> None:
    logits, tokens = some_logits(3), tiny_tokens(3)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 1, 1, 1]])
    losses = losses_by_hand(logits, tokens)
    counted = [(row, at) for row in range(3) for at in range(6) if mask[row, at] and mask[row, at + 1]]
    assert len(counted) == 4 + 2 + 4
    expected = torch.stack([losses[index] for index in counted]).mean()
    torch.testing.assert_close(lm_cross_entropy_loss(logits, tokens, mask), expected, **EXACT)
    per_token = lm_cross_entropy_loss(logits, tokens, mask, per_token=True)
    for row in range(3):
        for at in range(6):
            expected_here = losses[row, at] if (row, at) in counted else torch.zeros(()).double()
            torch.testing.assert_close(per_token[row, at], expected_here, **EXACT)


def test_a_mask_of_ones_changes_nothing() -> None:
    logits, tokens = some_logits(), tiny_tokens()
    for per_token in (True, False):
        masked = lm_cross_entropy_loss(logits, tokens, torch.ones_like(tokens), per_token)
        torch.testing.assert_close(masked, lm_cross_entropy_loss(logits, tokens, None, per_token), **EXACT)


def test_what_is_not_finite_at_padding_stays_there() -> None:
    logits, tokens = some_logits(), tiny_tokens()
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7])
    expected = lm_cross_entropy_loss(logits, tokens, mask)
    logits[0, 0, int(tokens[0, 1])] = float("-inf")
    torch.testing.assert_close(lm_cross_entropy_loss(logits, tokens, mask), expected, **EXACT)


def test_the_gradient_of_the_loss_is_probability_minus_truth() -> None:
    logits, tokens = some_logits(1).requires_grad_(), tiny_tokens(1)
    lm_cross_entropy_loss(logits, tokens).backward()
    expected = logits.detach().softmax(-1)
    expected[0, range(6), tokens[0, 1:]] -= 1
    expected[0, -1] = 0
    torch.testing.assert_close(logits.grad, expected / 6, **EXACT)


def test_loss_fn_of_the_model_is_the_same_loss() -> None:
    model, logits, tokens = tiny_model(), some_logits(), tiny_tokens()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    for per_token in (True, False):
        assert torch.equal(
            model.loss_fn(logits, tokens, per_token=per_token),
            lm_cross_entropy_loss(logits, tokens, per_token=per_token),
        )
        assert torch.equal(
            model.loss_fn(logits, tokens, mask, per_token), lm_cross_entropy_loss(logits, tokens, mask, per_token)
        )


def test_a_loss_needs_two_positions() -> None:
    with pytest.raises(ValueError, match="needs at least two positions"):
        tiny_model().loss_fn(some_logits(1, 1), tiny_tokens(1, 1))


def test_accuracy_is_the_share_of_next_tokens_that_were_likeliest() -> None:
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    logits = torch.zeros(2, 4, 20)
    said = [[2, 9, 4, 0], [6, 7, 9, 5]]
    for row in range(2):
        for at in range(4):
            logits[row, at, said[row][at]] = 1.0
    right = [[True, False, True], [True, True, False]]
    assert lm_accuracy(logits, tokens, per_token=True).tolist() == right
    assert lm_accuracy(logits, tokens) == pytest.approx(4 / 6)


def test_accuracy_ignores_the_last_logits_and_the_first_token() -> None:
    logits, tokens = some_logits(), tiny_tokens()
    tokens[:, 1:] = logits[:, :-1].argmax(-1)
    logits[:, -1] = 0.0
    assert lm_accuracy(logits, tokens) == 1.0
    assert lm_accuracy(-logits, tokens) == 0.0
