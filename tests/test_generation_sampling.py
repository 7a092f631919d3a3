"""Sampling, against its definition: temperature, top-k, top-p and the frequency penalty."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
from transformers import RepetitionPenaltyLogitsProcessor

from hooked_lm.utils import sample_logits
from tests.generation_helpers import GREEDY
from tests.helpers import tiny_model, tiny_tokens

# Sampling, against its definition

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 1.5, -3.0, 0.9], dtype=torch.float64)
DRAWS = 40_000


def frequencies(**options: Any) -> Tensor:
    torch.manual_seed(0)
    drawn = sample_logits(LOGITS.repeat(DRAWS, 1), **options)
    assert drawn.shape == (DRAWS,)
    return torch.bincount(drawn, minlength=len(LOGITS)) / DRAWS


def assert_distribution(found: Tensor, expected: Tensor) -> None:
    """Nothing falls where nothing may; elsewhere five standard errors are allowed."""
    assert (found[expected == 0] == 0).all()
    error = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((found - expected).abs() <= 5 * error + 1e-12).all(), (found, expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    assert_distribution(frequencies(temperature=temperature), (LOGITS / temperature).softmax(-1))


@pytest.mark.parametrize("top_k", [1, 3, 8, 100])
def test_top_k_keeps_the_k_likeliest(top_k: int) -> None:
    expected = torch.zeros(8, dtype=torch.float64)
    kept = LOGITS.argsort(descending=True)[:top_k]
    expected[kept] = LOGITS[kept].softmax(-1)
    assert_distribution(frequencies(top_k=top_k), expected)


@pytest.mark.parametrize("top_p", [0.01, 0.4, 0.65, 0.9, 1.0])
def test_top_p_keeps_the_fewest_that_reach_the_probability(top_p: float) -> None:
    probabilities = LOGITS.softmax(-1)
    kept: list[int] = []
    for token in LOGITS.argsort(descending=True).tolist():
        kept.append(token)
        if probabilities[kept].sum() >= top_p - 1e-12:
            break
    expected = torch.zeros(8, dtype=torch.float64)
    expected[kept] = LOGITS[kept].softmax(-1)
    assert 1 <= len(kept) <= 8
    assert_distribution(frequencies(top_p=top_p), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_tokens_that_single_precision_keeps(dtype: torch.dtype) -> None:
    # Many unlikely tokens: added up in half precision, their probabilities would be lost.
    logits = torch.randn(1, 30_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    drawn = []
    for given in (logits, logits.float()):
        torch.manual_seed(0)
        drawn.append(sample_logits(given.repeat(200, 1), top_p=0.9))
    assert torch.equal(*drawn)


def test_temperature_comes_before_top_p() -> None:
    hot = (LOGITS / 4).softmax(-1)
    assert (hot.sort(descending=True).values.cumsum(-1) < 0.5).sum() + 1 == 4
    assert (frequencies(top_p=0.5, temperature=4.0) > 0).sum() == 4
    assert (frequencies(top_p=0.5) > 0).sum() == 2


def test_top_k_comes_before_top_p() -> None:
    # Of the best three the first has 0.51 of the probability, of all eight less than half.
    assert LOGITS.softmax(-1).max() < 0.5
    expected = torch.zeros(8, dtype=torch.float64)
    expected[0] = 1.0
    assert_distribution(frequencies(top_k=3, top_p=0.5), expected)


def test_each_row_is_cut_and_drawn_by_its_own_logits() -> None:
    torch.manual_seed(0)
    rows = torch.stack((LOGITS, -LOGITS)).repeat(500, 1)
    drawn = sample_logits(rows, top_k=2).reshape(500, 2)
    assert set(drawn[:, 0].tolist()) == {0, 5}
    assert set(drawn[:, 1].tolist()) == {6, 4}


def test_temperature_zero_is_greedy() -> None:
    assert sample_logits(LOGITS.repeat(50, 1), temperature=0.0).tolist() == [0] * 50
    model, tokens = tiny_model(), tiny_tokens()
    cold = model.generate(tokens, 6, temperature=0.0, stop_at_eos=False, verbose=False)
    assert torch.equal(cold, model.generate(tokens, 6, stop_at_eos=False, **GREEDY))


def test_the_frequency_penalty_is_subtracted_for_each_occurrence() -> None:
    tokens = torch.tensor([[0, 0, 0, 5, 7]])
    expected = LOGITS - 0.7 * torch.tensor([3.0, 0, 0, 0, 0, 1, 0, 1], dtype=torch.float64)
    found = frequencies(freq_penalty=0.7, tokens=tokens.repeat(DRAWS, 1))
    assert_distribution(found, expected.softmax(-1))


def test_the_frequency_penalty_is_not_divided_by_the_temperature() -> None:
    tokens = torch.tensor([[0, 0, 0, 5, 7]])
    expected = LOGITS / 2 - 0.7 * torch.tensor([3.0, 0, 0, 0, 0, 1, 0, 1], dtype=torch.float64)
    found = frequencies(freq_penalty=0.7, temperature=2.0, tokens=tokens.repeat(DRAWS, 1))
    assert_distribution(found, expected.softmax(-1))


def test_the_repetition_penalty_is_that_of_transformers_before_temperature_and_frequency() -> None:
    tokens, temperature = torch.tensor([[0, 0, 0, 5, 7]]), 1.5
    logits = RepetitionPenaltyLogitsProcessor(1.8)(tokens, LOGITS[None].clone())[0]
    assert not torch.equal(logits, LOGITS)
    expected = logits / temperature - 0.3 * torch.tensor([3.0, 0, 0, 0, 0, 1, 0, 1], dtype=torch.float64)
    options = {"repetition_penalty": 1.8, "temperature": temperature, "freq_penalty": 0.3}
    assert_distribution(frequencies(**options, tokens=tokens.repeat(DRAWS, 1)), expected.softmax(-1))


def test_a_repetition_penalty_acts_in_greedy_generation_and_not_on_padding() -> None:
    model, tokens = tiny_model(), tiny_tokens(1, 4)
    said = tokens
    for _ in range(4):
        logits = RepetitionPenaltyLogitsProcessor(30.0)(said, model(said)[:, -1].detach())
        said = torch.cat((said, logits.argmax(-1, keepdim=True)), 1)
    options = {"repetition_penalty": 30.0, "stop_at_eos": False, **GREEDY}
    assert torch.equal(model.generate(tokens, 4, **options), said)
    assert not torch.equal(model.generate(tokens, 4, stop_at_eos=False, **GREEDY), said)
    padded = torch.cat((torch.full((1, 2), int(said[0, 4])), tokens), 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert torch.equal(model.generate(padded, 4, attention_mask=mask, **options)[:, 2:], said)


def test_a_seed_draws_what_a_categorical_distribution_draws() -> None:
    torch.manual_seed(3)
    drawn = sample_logits(LOGITS.repeat(20, 1), temperature=0.7)
    torch.manual_seed(3)
    assert torch.equal(drawn, Categorical(logits=LOGITS.repeat(20, 1) / 0.7).sample())


def test_the_frequency_penalty_needs_the_text_so_far() -> None:
    with pytest.raises(ValueError, match="freq_penalty counts the tokens so far"):
        sample_logits(LOGITS[None], freq_penalty=1.0)


def test_sampling_leaves_the_logits_it_was_given() -> None:
    logits = LOGITS.repeat(2, 1)
    sample_logits(logits, top_k=2, top_p=0.5, temperature=0.5, freq_penalty=1.0, tokens=torch.zeros(2, 3).long())
    assert torch.equal(logits, LOGITS.repeat(2, 1))


def test_generation_samples_from_the_distribution_of_the_model() -> None:
    model, prompt = tiny_model(), tiny_tokens(1)
    torch.manual_seed(0)
    tokens = prompt.repeat(4000, 1)
    for options, logits in (
        ({}, model(prompt)[0, -1]),
        ({"temperature": 0.5}, model(prompt)[0, -1] / 0.5),
    ):
        out = model.generate(tokens, 1, stop_at_eos=False, verbose=False, **options)
        found = torch.bincount(out[:, -1], minlength=20) / 4000
        expected = logits.softmax(-1).detach()
        assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / 4000).sqrt()).all()
    likeliest = set(model(prompt)[0, -1].topk(3).indices.tolist())
    out = model.generate(tokens, 1, top_k=3, stop_at_eos=False, verbose=False)
    assert set(out[:, -1].tolist()) == likeliest


def test_the_same_seed_gives_the_same_text() -> None:
    model, tokens, runs = tiny_model(), tiny_tokens(), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(model.generate(tokens, 8, stop_at_eos=False, verbose=False))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_frequency_penalty_counts_prompt_and_new_tokens(use_cache: bool, dtype: torch.dtype) -> None:
    model, tokens = tiny_model(n_ctx=24), tiny_tokens(2)
    expected = tokens
    for _ in range(10):
        counts = torch.stack([torch.bincount(row, minlength=20) for row in expected])
        best = (model(expected)[:, -1] - 1.5 * counts).argmax(-1)
        expected = torch.cat((expected, best[:, None]), 1)
    options = {"stop_at_eos": False, "use_past_kv_cache": use_cache, **GREEDY}
    out = model.generate(tokens.to(dtype), 10, freq_penalty=1.5, **options)
    assert torch.equal(out, expected)
    assert not torch.equal(out, model.generate(tokens, 10, **options))
