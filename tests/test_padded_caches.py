"""A cache knows which positions of its run are padding, and what is read from it counts real positions only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import ActivationCache, HookedTransformer, HookPoint, Intervention, patching
from hooked_lm.circuits import logit_attribution
from hooked_lm.circuits.induction import (
    induction_scores,
    next_token_scores,
    previous_token_scores,
    repeated_random_tokens,
)
from hooked_lm.head_detector import detect_head
from hooked_lm.losses import lm_accuracy, lm_cross_entropy_loss
from tests.helpers import VOCAB, randomise_, tiny_config, tiny_model, tiny_tokenizer

EXACT = {"atol": 1e-10, "rtol": 0.0}
PROMPTS = [[3, 9, 4, 9, 11], [7, 2, 5], [8, 1, 6, 13]]
LONGEST = 5
SIDES = ("left", "right")


def padded(side: str) -> tuple[Tensor, Tensor]:
    """The prompts padded to one length, and their mask."""
    tokens, mask = torch.zeros(len(PROMPTS), LONGEST).long(), torch.zeros(len(PROMPTS), LONGEST).long()
    for row, prompt in enumerate(PROMPTS):
        where = slice(LONGEST - len(prompt), None) if side == "left" else slice(None, len(prompt))
        tokens[row, where], mask[row, where] = torch.tensor(prompt), 1
    return tokens, mask


def run(side: str, **options: Any) -> tuple[HookedTransformer, Tensor, Tensor, ActivationCache]:
    """A model, and logits, mask and cache of its run on the padded prompts."""
    model, (tokens, mask) = tiny_model(), padded(side)
    logits, cache = model.run_with_cache(tokens, attention_mask=mask, **options)
    return model, logits, mask, cache


def alone(model: HookedTransformer) -> list[tuple[Tensor, ActivationCache]]:
    """Logits and cache of each prompt, run by itself."""
    return [model.run_with_cache(torch.tensor([prompt])) for prompt in PROMPTS]


# The mask


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("how", ["full", "lazy", "offload", "saved", "moved", "batch axis gone"])
def test_a_cache_keeps_the_mask_of_its_run(side: str, how: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lazy": {"lazy": True}, "offload": {"offload": tmp_path / "a"}}.get(how, {})
    model, _, mask, cache = run(side, **options)
    if how == "saved":
        cache.save(tmp_path / "b")
        cache = ActivationCache.load(tmp_path / "b", model)
    if how == "moved":
        cache = cache.to("cpu")
    if how == "batch axis gone":
        cache, mask = cache.apply_slice_to_batch_dim(1), mask[1:2]
    assert cache.attention_mask is not None
    assert torch.equal(cache.attention_mask.long(), mask)
    assert "attention mask" not in cache


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("pos_slice", "index"), [(-1, [-1]), ((1, 4), slice(1, 4)), ([0, 3], [0, 3])])
def test_the_mask_is_that_of_the_positions_that_are_kept(pos_slice: Any, index: Any, lazy: bool) -> None:
    _, _, mask, cache = run("right", pos_slice=pos_slice, lazy=lazy)
    assert cache.attention_mask is not None
    assert torch.equal(cache.attention_mask, mask[:, index])


def test_nothing_padded_is_no_mask() -> None:
    model, _, _, cache = run("left")
    assert cache.apply_slice_to_batch_dim([0]).attention_mask is None
    assert cache.apply_slice_to_batch_dim(0).attention_mask is None
    tokens = torch.tensor([PROMPTS[0]])
    assert model.run_with_cache(tokens, attention_mask=torch.ones_like(tokens))[1].attention_mask is None


@pytest.mark.parametrize("side", SIDES)
def test_strings_and_inferred_padding_have_a_mask_too(side: Any) -> None:
    model = randomise_(HookedTransformer(tiny_config(d_vocab=VOCAB), tiny_tokenizer()))
    texts = ["Mary", "A B A"]
    _, mask = model.tokens_and_mask(texts, padding_side=side)
    assert mask is not None
    _, cache = model.run_with_cache(texts, padding_side=side)
    assert cache.attention_mask is not None
    assert torch.equal(cache.attention_mask, mask)
    _, cache = model.run_with_cache(model.to_tokens(texts, padding_side="left"), padding_side="left")
    assert cache.attention_mask is not None


def test_a_run_within_a_run_does_not_lend_it_its_mask() -> None:
    model, (tokens, mask) = tiny_model(), padded("left")

    def another(x: Tensor, hook: HookPoint) -> None:
        if model.cfg.n_ctx:
            with model.only_hooks(()):
                model(tokens, attention_mask=mask)

    with model.hooks([("hook_embed", another)]):
        assert model.run_with_cache(tokens)[1].attention_mask is None


def test_with_a_key_value_cache_the_mask_is_that_of_the_new_positions() -> None:
    model, (tokens, mask) = tiny_model(), padded("left")
    past = model.new_kv_cache(len(PROMPTS))
    model(tokens[:, :1], attention_mask=mask[:, :1] | 1, past_kv_cache=past)
    _, cache = model.run_with_cache(tokens[:, 1:], attention_mask=mask[:, 1:], past_kv_cache=past)
    assert cache.attention_mask is not None
    assert torch.equal(cache.attention_mask, mask[:, 1:])


# Attributions


@pytest.mark.parametrize("pos_slice", [-1, [-1], (4, None)])
@pytest.mark.parametrize("has_batch", [True, False])
def test_a_last_position_that_is_padding_raises(pos_slice: Any, has_batch: bool) -> None:
    _, _, _, cache = run("right")
    cache = cache if has_batch else cache.apply_slice_to_batch_dim(1)
    reads = [
        cache.accumulated_resid,
        cache.decompose_resid,
        cache.stack_head_results,
        cache.get_full_resid_decomposition,
        lambda pos_slice: cache.stack_neuron_results(None, pos_slice),
        lambda pos_slice: cache.get_neuron_results(0, None, pos_slice),
    ]
    for read in reads:
        with pytest.raises(ValueError, match=r"is padding in prompt \d of this run: .*padding_side='left'"):
            read(pos_slice=pos_slice)
    stack = cache.decompose_resid()[..., -1, :]
    for attribute in (cache.apply_ln_to_stack, lambda stack, **how: cache.logit_attrs(stack, 3, **how)):
        with pytest.raises(ValueError, match="is padding in prompt"):
            attribute(stack, pos_slice=pos_slice)


def test_attributions_of_padded_prompts_are_those_of_each_alone() -> None:
    model, _, _, cache = run("left")
    attrs = cache.logit_attrs(cache.decompose_resid(pos_slice=-1), 3, 5, pos_slice=-1)
    for row, (_, own) in enumerate(alone(model)):
        expected = own.logit_attrs(own.decompose_resid(pos_slice=-1), 3, 5, pos_slice=-1)
        torch.testing.assert_close(attrs[:, row], expected[:, 0], **EXACT)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("split", ["component", "head", "neuron"])
def test_logit_attribution_reads_the_last_token_of_each_prompt(side: str, split: Any) -> None:
    model, _, _, cache = run(side)
    pos: Any = -1
    if side == "right":
        with pytest.raises(ValueError, match=r"padding in prompt 1 .* at pos=torch.tensor\(\[4, 2, 3\]\)"):
            logit_attribution(cache, 3, 5, split=split)
        pos = torch.tensor([4, 2, 3])
    came = logit_attribution(cache, 3, 5, pos=pos, split=split)
    for row, (logits, own) in enumerate(alone(model)):
        expected = logit_attribution(own, 3, 5, split=split)
        torch.testing.assert_close(came.values[:, row], expected.values[:, 0], **EXACT)
        torch.testing.assert_close(came.logit[row], logits[0, -1, 3] - logits[0, -1, 5], **EXACT)


# Scores of heads and of predictions


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("lazy", [False, True])
def test_previous_token_scores_are_means_over_real_tokens(side: str, lazy: bool) -> None:
    model, _, _, cache = run(side, lazy=lazy)
    apart = [
        (previous_token_scores(own), len(prompt) - 1) for (_, own), prompt in zip(alone(model), PROMPTS, strict=True)
    ]
    expected = sum(scores * n for scores, n in apart) / sum(n for _, n in apart)
    torch.testing.assert_close(previous_token_scores(cache), expected, **EXACT)
    for row, (scores, _) in enumerate(apart):
        for one in (row, [row]):
            torch.testing.assert_close(previous_token_scores(cache.apply_slice_to_batch_dim(one)), scores, **EXACT)


def test_scores_that_cannot_be_raise() -> None:
    model, _, _, cache = run("right")
    with pytest.raises(ValueError, match=r"this run has padding.*attention_scores"):
        induction_scores(cache, 2)
    with pytest.raises(ValueError, match=r"3 queries and 5 keys.*without pos_slice"):
        previous_token_scores(run("left", pos_slice=[2, 3, 4])[3])
    with pytest.raises(ValueError, match="1 queries and 1 keys"):
        previous_token_scores(model.run_with_cache(torch.tensor([[1]]))[1])
    tokens = repeated_random_tokens(2, 3, 20, torch.Generator().manual_seed(0))
    whole = induction_scores(model.run_with_cache(tokens)[1], 3)
    rows = [model.run_with_cache(row[None], remove_batch_dim=True)[1] for row in tokens]
    torch.testing.assert_close(torch.stack([induction_scores(one, 3) for one in rows]).mean(0), whole, **EXACT)


def test_the_head_detector_refuses_a_cache_with_padding() -> None:
    model = randomise_(HookedTransformer(tiny_config(d_vocab=VOCAB), tiny_tokenizer()))
    tokens = model.to_tokens("Mary")
    mask = torch.ones_like(tokens)
    mask[:, 0] = 0
    _, cache = model.run_with_cache(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match="the cache is of a run with padding"):
        detect_head(model, "Mary", "previous_token_head", cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("side", SIDES)
def test_losses_and_accuracies_count_real_predictions(side: str) -> None:
    model, logits, mask, _ = run(side)
    tokens = padded(side)[0]
    apart = [(own, torch.tensor([prompt])) for (own, _), prompt in zip(alone(model), PROMPTS, strict=True)]
    n = torch.tensor([len(prompt) - 1 for prompt in PROMPTS], dtype=torch.float64)
    losses = torch.stack([lm_cross_entropy_loss(*one) for one in apart])
    right = torch.stack([lm_accuracy(*one, per_token=True).sum() for one in apart])
    torch.testing.assert_close(lm_cross_entropy_loss(logits, tokens, mask), (losses * n).sum() / n.sum(), **EXACT)
    assert float(lm_accuracy(logits, tokens, attention_mask=mask)) == pytest.approx(float(right.sum() / n.sum()))
    assert int(lm_accuracy(logits, tokens, True, mask).sum()) == int(right.sum())
    scores = next_token_scores(logits, tokens, mask)
    assert scores.mean_log_prob() == pytest.approx(-float((losses * n).sum() / n.sum()))
    assert scores.accuracy() == pytest.approx(float(right.sum() / n.sum()))
    with pytest.raises(ValueError, match="no common halves"):
        scores.second_half()


def test_an_accuracy_that_padding_would_raise_counts_real_tokens() -> None:
    """Where every prediction of padding is right and every other one wrong, the accuracy is 0."""
    tokens, mask = padded("right")
    logits = torch.nn.functional.one_hot(torch.where(mask == 1, 19, 0), 20).double()
    assert float(lm_accuracy(logits, tokens, attention_mask=mask)) == 0
    assert float(lm_accuracy(logits, tokens)) > 0
    assert next_token_scores(logits, tokens, mask).accuracy() == 0
    # With every prediction of the first prompt right, 4 of the 4 + 2 + 3 there are.
    logits[0, :-1] = torch.nn.functional.one_hot(tokens[0, 1:], 20).double()
    assert float(lm_accuracy(logits, tokens, attention_mask=mask)) == pytest.approx(4 / 9)
    assert next_token_scores(logits, tokens, mask).accuracy() == pytest.approx(4 / 9)


# Values for interventions and patching


@pytest.mark.parametrize("side", SIDES)
def test_a_mean_over_a_cache_leaves_padding_out(side: str) -> None:
    model, _, mask, cache = run(side)
    real = torch.cat([own["z", 1][0] for _, own in alone(model)])  # [pos head d_head] of all prompts together
    value = Intervention.mean(("z", 1), cache).value
    assert isinstance(value, Tensor)
    torch.testing.assert_close(value[0, 0], real.mean(0), **EXACT)
    chosen = torch.zeros_like(mask)
    chosen[0, :2] = 1
    chosen[1] = 1
    value = Intervention.mean(("z", 1), cache, attention_mask=chosen).value
    own = [one["z", 1][0] for _, one in alone(model)]
    assert isinstance(value, Tensor)
    torch.testing.assert_close(value[0, 0], torch.cat((own[0][:2], own[1])).mean(0), **EXACT)


@pytest.mark.parametrize("side", SIDES)
def test_what_goes_position_by_position_refuses_shifted_prompts(side: str) -> None:
    _, _, _, cache = run(side)
    for make in (
        lambda: Intervention.mean(("z", 1), cache, per_position=True),
        lambda: Intervention.resample(("z", 1), cache),
    ):
        with pytest.raises(ValueError, match=r"padded to 5 positions from \[5, 3, 4\]: take prompts of one length"):
            make()


def test_a_clean_cache_has_to_be_padded_as_the_prompts_are() -> None:
    model, _, mask, cache = run("left")
    tokens, _ = padded("left")
    metric = lambda logits: logits[:, -1, 3].mean()  # noqa: E731
    patched = patching.get_act_patch_resid_pre(model, tokens, cache, metric, attention_mask=mask, verbose=False)
    expected = float(metric(model(tokens, attention_mask=mask)).detach())  # its own activations change nothing
    torch.testing.assert_close(patched, torch.full_like(patched, expected), **EXACT)
    for given in (cache, run("right")[3]):
        with pytest.raises(ValueError, match=r"clean prompt \d is padded differently"):
            patching.get_act_patch_resid_pre(
                model, tokens, given, metric, attention_mask=mask if given is not cache else None, verbose=False
            )
