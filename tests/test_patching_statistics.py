"""Patching many pairs of prompts: per-pair scores, both directions, the scale from corrupted to clean, intervals."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hooked_lm import HookedTransformer, UnknownHookError, metrics
from hooked_lm.circuits.induction import repeated_random_tokens
from hooked_lm.patching import bootstrap_interval, normalize_scores, patch_pairs, share_of_same_sign
from tests.helpers import VOCAB, tiny_config, tiny_model, tiny_tokens

N_PAIRS = 4
CLEAN, CORRUPTED = tiny_tokens(N_PAIRS, 5, seed=1), tiny_tokens(N_PAIRS, 5, seed=2)
RIGHT, WRONG = [3, 4, 5, 6], [7, 8, 9, 10]
METRIC = metrics.logit_diff(RIGHT, WRONG)
RUNS = {"denoising": (CORRUPTED, CLEAN), "noising": (CLEAN, CORRUPTED)}
QUIET: dict[str, Any] = {"verbose": False}


def difference(logits: Tensor, pair: int) -> Tensor:
    """The metric of one pair, written out; logits [1 pos vocab]."""
    return logits[0, -1, RIGHT[pair]] - logits[0, -1, WRONG[pair]]


def raw_scores(model: HookedTransformer, direction: str) -> Tensor:
    """Patching resid_mid, [layer pos pair], by one hooked run for every cell and pair."""
    base, source = RUNS[direction]
    grid = torch.zeros(2, 5, N_PAIRS, dtype=torch.float64)
    for pair in range(N_PAIRS):
        _, cache = model.run_with_cache(source[pair : pair + 1])
        for layer in range(2):
            for pos in range(5):

                def patch(x: Tensor, hook: Any, layer: int = layer, pos: int = pos, cache: Any = cache) -> Tensor:
                    x[:, pos] = cache["resid_mid", layer][:, pos]
                    return x

                hooks = [(f"blocks.{layer}.hook_resid_mid", patch)]
                grid[layer, pos, pair] = difference(
                    model.run_with_hooks(base[pair : pair + 1], fwd_hooks=hooks), pair
                ).item()
    return grid


def own_scores(model: HookedTransformer, tokens: Tensor) -> Tensor:
    scores = [difference(model(tokens[pair : pair + 1]), pair) for pair in range(N_PAIRS)]
    return torch.stack(scores).detach()


# Many pairs


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_every_pair_scores_as_it_does_alone(direction: Any) -> None:
    model = tiny_model()
    result = patch_pairs(model, CLEAN, CORRUPTED, METRIC, "resid_mid", direction=direction, normalize=None, **QUIET)
    expected = raw_scores(model, direction)
    torch.testing.assert_close(result.per_pair, expected)
    torch.testing.assert_close(result.mean, expected.mean(-1))
    torch.testing.assert_close(result.clean, own_scores(model, CLEAN))
    torch.testing.assert_close(result.corrupted, own_scores(model, CORRUPTED))
    torch.testing.assert_close(result.base, own_scores(model, RUNS[direction][0]))
    assert result.axes == ("layer", "pos")


def test_the_two_directions_are_different_questions() -> None:
    model = tiny_model()
    both = [patch_pairs(model, CLEAN, CORRUPTED, METRIC, direction=one, **QUIET) for one in ("denoising", "noising")]
    # What brings back a share of the answer need not be what takes that share away.
    assert not torch.allclose(both[0].mean, 1 - both[1].mean, atol=0.01)
    # But patching the whole last stream does both.
    last = [
        patch_pairs(model, CLEAN, CORRUPTED, METRIC, "resid_post", direction=one, **QUIET).mean[-1, -1]
        for one in ("denoising", "noising")
    ]
    torch.testing.assert_close(torch.stack(last), torch.tensor([1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("unit", ["mean", "pair"])
def test_normalised_scores_are_0_for_the_corrupted_run_and_1_for_the_clean_one(direction: Any, unit: Any) -> None:
    model = tiny_model()
    result = patch_pairs(model, CLEAN, CORRUPTED, METRIC, "resid_mid", direction=direction, normalize=unit, **QUIET)
    raw, clean, corrupted = raw_scores(model, direction), own_scores(model, CLEAN), own_scores(model, CORRUPTED)
    distance = (clean - corrupted).mean() if unit == "mean" else clean - corrupted
    torch.testing.assert_close(result.per_pair, (raw - corrupted) / distance)
    assert float(result.base.mean()) == pytest.approx(0.0 if direction == "denoising" else 1.0)
    if unit == "mean":
        # The usual number: means first, then the ratio.
        usual = (raw.mean(-1) - corrupted.mean()) / (clean.mean() - corrupted.mean())
        torch.testing.assert_close(result.mean, usual)


def test_the_share_of_pairs_with_the_sign_of_the_mean_is_counted_against_the_run_that_is_patched() -> None:
    model = tiny_model()
    for direction in ("denoising", "noising"):
        result = patch_pairs(model, CLEAN, CORRUPTED, METRIC, "resid_mid", direction=direction, **QUIET)
        changes = raw_scores(model, direction) - own_scores(model, RUNS[direction][0])
        for layer in range(2):
            for pos in range(5):
                mean = changes[layer, pos].mean()
                agreeing = [float(one) * float(mean) > 0 and abs(float(one)) > 1e-10 for one in changes[layer, pos]]
                assert float(result.same_sign[layer, pos]) == pytest.approx(sum(agreeing) / N_PAIRS)
        assert 0 < float(result.same_sign.max()) <= 1


def test_a_patch_that_changes_nothing_but_rounding_has_no_sign() -> None:
    model = tiny_model(dtype=torch.float32)
    corrupted = CLEAN.clone()
    corrupted[:, 3] = (corrupted[:, 3] + 1) % 20  # before position 3 both runs are the same
    result = patch_pairs(model, CLEAN, corrupted, METRIC, "resid_pre", **QUIET)
    assert result.same_sign[:, :3].max() == 0
    assert result.same_sign[0, 3] > 0


@pytest.mark.parametrize(
    ("patch", "axes"),
    [
        ("attn_head_v_by_pos", ("layer", "pos", "head")),
        ("attn_head_pattern_by_pos", ("layer", "pos", "head")),
        ("attn_head_pattern_dest_src_pos", ("layer", "head", "dest_pos", "src_pos")),
    ],
)
def test_any_grid_can_be_taken_and_its_mean_is_that_of_the_classic_function(patch: str, axes: tuple[str, ...]) -> None:
    from hooked_lm import patching

    model = tiny_model()
    result = patch_pairs(model, CLEAN, CORRUPTED, METRIC, patch, normalize=None, **QUIET)
    _, cache = model.run_with_cache(CLEAN)
    classic = getattr(patching, f"get_act_patch_{patch}")(model, CORRUPTED, cache, METRIC, **QUIET)
    torch.testing.assert_close(result.mean, classic)
    assert result.axes == axes
    assert all(part.shape == classic.shape for part in (result.low, result.high, result.same_sign))
    assert (result.low <= result.mean).all()
    assert (result.mean <= result.high).all()


def test_the_interval_is_that_of_the_scores_and_its_seed_decides_the_draws() -> None:
    model = tiny_model()

    def interval(**how: Any) -> tuple[Tensor, Tensor]:
        result = patch_pairs(model, CLEAN, CORRUPTED, METRIC, **how, **QUIET)
        return result.low, result.high

    scores = patch_pairs(model, CLEAN, CORRUPTED, METRIC, **QUIET).per_pair
    how = {"confidence": 0.8, "n_resamples": 50, "seed": 3}
    torch.testing.assert_close(interval(**how), bootstrap_interval(scores, 0.8, 50, 3))
    torch.testing.assert_close(interval(**how), interval(**how))
    assert not torch.equal(interval(**how)[0], interval(**{**how, "seed": 4})[0])


def test_padded_pairs_use_their_mask() -> None:
    model = tiny_model()
    mask = torch.tensor([[0, 1, 1, 1, 1]] * 2 + [[1, 1, 1, 1, 1]] * 2)
    result = patch_pairs(model, CLEAN, CORRUPTED, METRIC, normalize=None, attention_mask=mask, **QUIET)
    alone = patch_pairs(
        model, CLEAN[:2, 1:], CORRUPTED[:2, 1:], metrics.logit_diff(RIGHT[:2], WRONG[:2]), normalize=None, **QUIET
    )
    torch.testing.assert_close(result.per_pair[:, 1:, :2], alone.per_pair)


def test_the_result_cannot_be_changed_and_says_what_it_is() -> None:
    result = patch_pairs(tiny_model(), CLEAN, CORRUPTED, METRIC, **QUIET)
    assert repr(result) == "PairScores('resid_pre', denoising, layer 2, pos 5, 4 pairs)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.confidence = 0.5  # type: ignore[misc]


# Bad input


@pytest.mark.parametrize(
    ("clean", "corrupted", "how", "said"),
    [
        (CLEAN[:, :4], CORRUPTED, {}, "clean prompts have 4 positions and corrupted ones 5"),
        (CLEAN[:3], CORRUPTED, {}, "there are 3 clean prompts and 4 corrupted ones: give as many, or one for all"),
        (CLEAN[:1], CORRUPTED[:1], {"metric": metrics.logit(3)}, "one pair of prompts has no interval"),
        (CLEAN, CLEAN, {}, "score the same on average"),
        (CLEAN, torch.cat((CLEAN[:1], CORRUPTED[1:])), {"normalize": "pair"}, "score the same for pair 0"),
        (CLEAN, CORRUPTED, {"patch": "resid"}, "unknown patch 'resid': it is one of resid_pre, "),
        (CLEAN, CORRUPTED, {"direction": "both"}, "direction is 'denoising' or 'noising', got 'both'"),
        (CLEAN, CORRUPTED, {"normalize": "max"}, "normalize is 'mean', 'pair' or None, got 'max'"),
        (CLEAN, CORRUPTED, {"confidence": 95}, "confidence is between 0 and 1, got 95"),
        (CLEAN, CORRUPTED, {"n_resamples": 0}, "n_resamples is 1 or more, got 0"),
        (CLEAN, CORRUPTED, {"metric": lambda logits: logits.mean()}, r"a metric of hooked_lm\.metrics"),
        (CLEAN, CORRUPTED, {"metric": metrics.logit([1, 2])}, "answers for 2 prompts; there are 4"),
    ],
)
def test_pairs_and_settings_that_do_not_fit_raise(clean: Tensor, corrupted: Tensor, how: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        patch_pairs(tiny_model(), clean, corrupted, **{"metric": METRIC, **how}, **QUIET)


def test_a_pair_of_unequal_length_raises_though_both_batches_are_padded_to_the_same_length(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = HookedTransformer(tiny_config(d_vocab=VOCAB), tokenizer=tokenizer)
    long, short = "When John and Mary", "John"
    with pytest.raises(ValueError, match="the clean prompt 1 is padded differently from the corrupted one"):
        patch_pairs(model, [long, short, long], [long, long, short], metrics.logit(3), **QUIET)


def test_pairs_that_cannot_be_compared_are_fine_without_a_scale() -> None:
    result = patch_pairs(tiny_model(), CLEAN, CLEAN, METRIC, normalize=None, **QUIET)
    assert result.same_sign.max() == 0


def test_a_site_that_the_model_lacks_raises() -> None:
    with pytest.raises(UnknownHookError, match=r"blocks\.0\.hook_mlp_out"):
        patch_pairs(tiny_model(attn_only=True), CLEAN, CORRUPTED, METRIC, "mlp_out", **QUIET)


# The statistics themselves


def test_two_values_have_the_interval_of_their_three_means() -> None:
    # Drawn twice from 0 and 1: the mean is 0, 1/2 or 1, with probability 1/4, 1/2 and 1/4.
    low, high = bootstrap_interval(torch.tensor([0.0, 1.0]), confidence=0.95)
    assert (float(low), float(high)) == (0.0, 1.0)
    low, high = bootstrap_interval(torch.tensor([0.0, 1.0]), confidence=0.3)
    assert (float(low), float(high)) == (0.5, 0.5)


def test_equal_values_have_no_width_and_a_constant_shifts_the_interval() -> None:
    low, high = bootstrap_interval(torch.full((3, 5), 2.0))
    torch.testing.assert_close(low, torch.full((3,), 2.0))
    torch.testing.assert_close(high, torch.full((3,), 2.0))
    values = torch.randn(4, 2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ends, shifted = bootstrap_interval(values), bootstrap_interval(values + 7)
    torch.testing.assert_close(shifted[0], ends[0] + 7)
    torch.testing.assert_close(shifted[1], ends[1] + 7)
    assert ends[0].shape == (4, 2)


def test_the_interval_of_many_values_is_as_wide_as_the_central_limit_says() -> None:
    values = torch.randn(20, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    low, high = bootstrap_interval(values, 0.95, 2000)
    half = 1.96 * values.std(-1, correction=0) / math.sqrt(400)
    torch.testing.assert_close((high - low) / 2, half, rtol=0.1, atol=0)
    torch.testing.assert_close((high + low) / 2, values.mean(-1), rtol=0, atol=0.01)


def test_cells_are_resampled_alike_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole = bootstrap_interval(values, n_resamples=100)
    monkeypatch.setattr("hooked_lm.patching.statistics._CHUNK", 200)  # two cells at a time
    torch.testing.assert_close(bootstrap_interval(values, n_resamples=100), whole)
    torch.testing.assert_close(bootstrap_interval(values[4], n_resamples=100), (whole[0][4], whole[1][4]))


def test_the_interval_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    bootstrap_interval(torch.randn(3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(before, torch.get_rng_state())


def test_one_value_has_no_interval() -> None:
    with pytest.raises(ValueError, match=r"two values or more along the last axis; shape \(3, 1\)"):
        bootstrap_interval(torch.zeros(3, 1))


def test_the_share_of_the_same_sign_counts_no_zeros() -> None:
    changes = torch.tensor([[1.0, 2.0, -0.5, 0.0], [-1.0, -1.0, -1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert share_of_same_sign(changes).tolist() == [0.5, 0.75, 0.0]


def test_each_pair_has_its_own_scale_or_all_have_the_mean() -> None:
    clean, corrupted = torch.tensor([3.0, 5.0]), torch.tensor([1.0, -1.0])
    scores = torch.tensor([2.0, 2.0])
    assert normalize_scores(scores, clean, corrupted, "pair").tolist() == [0.5, 0.5]
    assert normalize_scores(scores, clean, corrupted, "mean").tolist() == [0.25, 0.75]


# A circuit that is known


def test_both_directions_single_out_the_two_heads_for_every_pair() -> None:
    model = HookedTransformer.from_pretrained("demo-induction-2l")
    length, n_pairs = 12, 16
    repeated = repeated_random_tokens(n_pairs, length, 96, torch.Generator().manual_seed(1), start_token=0)
    clean, metric = repeated[:, :-1], metrics.log_prob(repeated[:, -1])
    corrupted = clean.clone()
    unused = [next(token for token in range(1, 96) if token not in row) for row in clean.tolist()]
    corrupted[:, length - 1] = torch.tensor(unused)
    circuit = torch.zeros(2, 4)
    circuit[0, 0] = circuit[1, 1] = 1.0
    for direction in ("denoising", "noising"):
        result = patch_pairs(model, clean, corrupted, metric, "attn_head_out_all_pos", direction=direction, **QUIET)
        expected = circuit if direction == "denoising" else 1 - circuit
        torch.testing.assert_close(result.mean, expected, atol=0.05, rtol=0)
        assert result.same_sign[0, 0] == result.same_sign[1, 1] == 1.0
        # How far the interval stays from the run that was patched.
        away = result.low if direction == "denoising" else 1 - result.high
        assert away[0, 0] > 0.5
        assert away[1, 1] > 0.5
