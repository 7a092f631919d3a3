"""Stacks of a cache under the norms that read them, and what they add to the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hooked_lm import FactoredMatrix, HookedTransformer
from tests.activation_cache_helpers import BATCH, EXACT, POS, TOKENS, every_model, norm_without_bias, run
from tests.helpers import VOCAB, tiny_model, tiny_tokens

# Norms


@pytest.mark.parametrize("name", ["LN", "LNPre", "RMS", "RMSPre"])
def test_a_stack_is_scaled_as_the_norm_that_reads_it_scales(name: str) -> None:
    model, _, cache = run(name)
    for layer, mlp_input, scale, norm in (
        (None, False, cache["scale"], model.ln_final),
        (-1, False, cache["scale"], model.ln_final),
        (1, False, cache["scale", 1, "ln1"], model.blocks[1].ln1),
        (1, True, cache["scale", 1, "ln2"], model.blocks[1].ln2),
        (0, False, cache["scale", 0, "ln1"], model.blocks[0].ln1),
    ):
        stack = cache.decompose_resid(layer, mlp_input=mlp_input)
        scaled = cache.apply_ln_to_stack(stack, layer, mlp_input)
        expected = torch.stack([norm_without_bias(piece, scale, norm) for piece in stack])
        torch.testing.assert_close(scaled, expected, **EXACT)
        whole = norm(stack.sum(0)) - (0 if norm.b is None else norm.b)
        torch.testing.assert_close(scaled.sum(0), whole, **EXACT)
        again = cache.apply_ln_to_stack(stack, layer, mlp_input, recompute_ln=True)
        torch.testing.assert_close(again, torch.stack([norm(piece) for piece in stack]), **EXACT)
        torch.testing.assert_close(cache.decompose_resid(layer, mlp_input=mlp_input, apply_ln=True), expected, **EXACT)


def test_a_folded_norm_and_an_unfolded_one_give_the_same_attributions() -> None:
    model, _, cache = run()
    before = cache.logit_attrs(cache.decompose_resid(), 3)
    model.fold_layer_norm()
    assert model.cfg.normalization_type == "LNPre"
    _, folded = model.run_with_cache(TOKENS)
    # Attention's and the MLPs' outputs are untouched by folding; the gain now sits in the unembedding.
    torch.testing.assert_close(folded.logit_attrs(folded.decompose_resid(), 3), before, **EXACT)


@pytest.mark.parametrize("pos_slice", [None, -1, (1, 3)])
@pytest.mark.parametrize("batch_slice", [None, 1, [1]])
def test_a_sliced_stack_meets_the_scale_of_its_own_prompts_and_positions(pos_slice: Any, batch_slice: Any) -> None:
    _, _, cache = run()
    stack = cache.decompose_resid()
    scaled = cache.apply_ln_to_stack(stack)
    pos = slice(*pos_slice) if isinstance(pos_slice, tuple) else slice(None) if pos_slice is None else pos_slice
    batch = slice(None) if batch_slice is None else batch_slice
    got = cache.apply_ln_to_stack(stack[:, :, pos], pos_slice=pos_slice, batch_slice=batch_slice)
    torch.testing.assert_close(got, scaled[:, :, pos][:, batch], **EXACT)
    if not isinstance(batch_slice, int):
        return
    alone = stack[:, :, pos][:, batch]  # the prompt's own stack, which has no batch axis
    got = cache.apply_ln_to_stack(alone, pos_slice=pos_slice, batch_slice=batch_slice, has_batch_dim=False)
    torch.testing.assert_close(got, scaled[:, :, pos][:, batch], **EXACT)


def test_a_stack_without_batch_axis_meets_the_scale_of_a_batch_of_one() -> None:
    model, _, _ = run()
    _, cache = model.run_with_cache(TOKENS[:1])
    stack = cache.decompose_resid()
    expected = cache.apply_ln_to_stack(stack)
    torch.testing.assert_close(cache.apply_ln_to_stack(stack[:, 0], has_batch_dim=False), expected[:, 0], **EXACT)
    cache.remove_batch_dim()
    torch.testing.assert_close(cache.apply_ln_to_stack(stack[:, 0], has_batch_dim=False), expected[:, 0], **EXACT)


# Logits


def attributable(model: HookedTransformer, logits: Tensor) -> Tensor:
    """The logits without what belongs to no component: the biases of the final norm and the unembedding."""
    bias = model.b_U if getattr(model.ln_final, "b", None) is None else model.b_U + model.ln_final.b @ model.W_U
    return logits - bias


@every_model
def test_attributions_sum_to_the_logit_minus_the_biases(name: str) -> None:
    model, logits, cache = run(name)
    expected = attributable(model, logits)
    for stack in (
        cache.decompose_resid(),
        cache.stack_head_results(incl_remainder=True),
        cache.get_full_resid_decomposition(expand_neurons=False),
    ):
        attributions = cache.logit_attrs(stack, 5)
        assert attributions.shape == (len(stack), BATCH, POS)
        torch.testing.assert_close(attributions.sum(0), expected[..., 5], **EXACT)


@pytest.mark.parametrize("pos_slice", [None, -1, (2, 5)])
def test_tokens_may_be_one_or_one_per_prompt_or_one_per_position(pos_slice: Any) -> None:
    model, logits, cache = run()
    pos = slice(*pos_slice) if isinstance(pos_slice, tuple) else slice(None) if pos_slice is None else pos_slice
    expected = attributable(model, logits)[:, pos]
    stack = cache.decompose_resid(pos_slice=pos_slice)
    per_prompt, wrong = torch.tensor([4, 9]), torch.tensor([1, 0])
    rows = torch.arange(BATCH)

    def total(tokens: Any, incorrect: Any = None) -> Tensor:
        return cache.logit_attrs(stack, tokens, incorrect, pos_slice=pos_slice).sum(0)

    torch.testing.assert_close(total(7), expected[..., 7], **EXACT)
    torch.testing.assert_close(total(torch.tensor(7)), expected[..., 7], **EXACT)
    torch.testing.assert_close(total(7, 2), expected[..., 7] - expected[..., 2], **EXACT)
    torch.testing.assert_close(total(per_prompt), expected[rows, ..., per_prompt], **EXACT)
    difference = expected[rows, ..., per_prompt] - expected[rows, ..., wrong]
    torch.testing.assert_close(total(per_prompt, wrong), difference, **EXACT)
    torch.testing.assert_close(total([4, 9], [1, 0]), difference, **EXACT)
    if pos_slice is None:
        per_position = tiny_tokens(seed=3)
        chosen = expected.gather(-1, per_position[..., None])[..., 0]
        torch.testing.assert_close(total(per_position), chosen, **EXACT)


def test_as_many_positions_as_prompts_do_not_confuse_tokens_per_prompt() -> None:
    model = tiny_model()
    logits, cache = model.run_with_cache(TOKENS[:, :BATCH])
    tokens = torch.tensor([4, 9])
    total = cache.logit_attrs(cache.decompose_resid(), tokens).sum(0)
    expected = attributable(model, logits)
    torch.testing.assert_close(total, torch.stack([expected[0, :, 4], expected[1, :, 9]]), **EXACT)


@pytest.mark.parametrize("batch_slice", [1, [1], (0, 1)])
@pytest.mark.parametrize("pos_slice", [None, -1])
def test_attributions_of_some_prompts_use_their_scale_and_tokens(batch_slice: Any, pos_slice: Any) -> None:
    _, _, cache = run()
    tokens, wrong = torch.tensor([4, 9]), torch.tensor([1, 0])
    stack = cache.decompose_resid(pos_slice=pos_slice)
    whole = cache.logit_attrs(stack, tokens, wrong, pos_slice=pos_slice)
    batch = slice(*batch_slice) if isinstance(batch_slice, tuple) else batch_slice
    some = cache.logit_attrs(stack, tokens, wrong, pos_slice=pos_slice, batch_slice=batch_slice)
    torch.testing.assert_close(some, whole[:, batch], **EXACT)
    if isinstance(batch_slice, int):
        alone = cache.logit_attrs(stack[:, batch], tokens, wrong, pos_slice, batch_slice, has_batch_dim=False)
        torch.testing.assert_close(alone, whole[:, batch], **EXACT)


@pytest.mark.parametrize("pos_slice", [None, -1])
def test_attributions_need_no_batch_axis(pos_slice: Any) -> None:
    model, _, _ = run()
    logits, cache = model.run_with_cache(TOKENS[:1], remove_batch_dim=True)
    stack = cache.decompose_resid(pos_slice=pos_slice)
    expected = attributable(model, logits)[0]
    expected = expected if pos_slice is None else expected[pos_slice]
    total = cache.logit_attrs(stack, 5, 2, pos_slice=pos_slice, has_batch_dim=False).sum(0)
    torch.testing.assert_close(total, expected[..., 5] - expected[..., 2], **EXACT)
    if pos_slice is None:
        total = cache.logit_attrs(stack, TOKENS[0], has_batch_dim=False).sum(0)
        torch.testing.assert_close(total, expected.gather(-1, TOKENS[0][:, None])[:, 0], **EXACT)


def test_tokens_may_be_strings(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(d_vocab=VOCAB)
    model.set_tokenizer(tokenizer)
    logits, cache = model.run_with_cache("John and Mary")
    right, wrong = model.to_single_token("a"), model.to_single_token("b")
    total = cache.logit_attrs(cache.decompose_resid(), "a", "b").sum(0)
    expected = attributable(model, logits)
    torch.testing.assert_close(total, expected[..., right] - expected[..., wrong], **EXACT)
    with pytest.raises(ValueError, match="Mary and"):
        cache.logit_attrs(cache.decompose_resid(), "Mary and")


def test_tokens_that_do_not_pair_up_or_do_not_exist_raise() -> None:
    _, _, cache = run()
    stack = cache.decompose_resid()
    with pytest.raises(ValueError, match=r"tokens have shape \(2,\), incorrect_tokens \(\)"):
        cache.logit_attrs(stack, torch.tensor([1, 2]), 3)
    with pytest.raises(ValueError, match=r"tokens 20 are not all in 0-19"):
        cache.logit_attrs(stack, 20)


def test_the_stack_of_a_cut_off_run_is_what_was_recorded() -> None:
    model, _, _ = run()
    _, cache = model.run_with_cache(TOKENS, stop_at_layer=1)
    torch.testing.assert_close(cache.decompose_resid(1, incl_embeds=True).sum(0), cache["resid_post", 0], **EXACT)
    with pytest.raises(KeyError, match=r"'blocks.1.hook_attn_out' exists in the model but is not in this cache"):
        cache.decompose_resid(2)


def test_a_factored_direction_projects_like_its_product() -> None:
    model, _, cache = run()
    ov: FactoredMatrix = model.OV[1, 2]
    stream = cache["normalized", 1, "ln1"] * model.blocks[1].ln1.w + model.blocks[1].ln1.b
    moved = (stream @ ov.A + model.b_V[1, 2]) @ ov.B
    written = torch.einsum("bqk,bkd->bqd", cache["pattern", 1][:, 2], moved)
    torch.testing.assert_close(cache.stack_head_results(2)[5], written, **EXACT)


def test_heads_and_neurons_are_not_taken_apart_where_a_norm_comes_after_them() -> None:
    model = tiny_model(use_normalization_before_and_after=True)
    _, cache = model.run_with_cache(tiny_tokens())
    for take_apart in (
        cache.stack_head_results,
        lambda: cache.stack_neuron_results(-1),
        cache.get_full_resid_decomposition,
    ):
        with pytest.raises(ValueError, match=r"normalises the sum|normalised before|normalises biases"):
            take_apart()
    total = cache.decompose_resid().sum(0)
    torch.testing.assert_close(total, cache["resid_post", -1], rtol=0, atol=1e-10)


def test_positions_that_were_not_recorded_are_missed_rather_than_left_out() -> None:
    model = tiny_model()
    _, cache = model.run_with_cache(tiny_tokens(), names_filter=["hook_embed", "*attn_out", "*mlp_out"])
    with pytest.raises(KeyError, match="hook_pos_embed"):
        cache.decompose_resid()


def test_the_end_of_the_model_has_no_mlp_input_and_layer_0_nothing_before_it() -> None:
    _, cache = tiny_model().run_with_cache(tiny_tokens())
    with pytest.raises(ValueError, match="mlp_input needs a layer"):
        cache.accumulated_resid(mlp_input=True)
    with pytest.raises(ValueError, match="nothing to stack"):
        cache.stack_activation("q", 0)


# Stacks that do not fit the run


@pytest.mark.parametrize("norms", ["LN", "RMS", None])
def test_a_batch_slice_cuts_the_stack_and_the_tokens(norms: Any) -> None:
    model = tiny_model(normalization_type=norms)
    tokens = tiny_tokens(4, 5)
    _, cache = model.run_with_cache(tokens)
    stack, answers = cache.decompose_resid(), torch.tensor([4, 9, 1, 7])
    whole = cache.logit_attrs(stack, answers)
    for batch in ([2, 0], (1, 3), [3]):
        index = slice(*batch) if isinstance(batch, tuple) else batch
        came = cache.logit_attrs(stack, answers, batch_slice=batch)
        torch.testing.assert_close(came, whole[:, index], **EXACT)
        # Tokens of the prompts that are kept do too.
        if batch != [3]:
            torch.testing.assert_close(cache.logit_attrs(stack, answers[index], batch_slice=batch), came, **EXACT)
        torch.testing.assert_close(
            cache.apply_ln_to_stack(stack, batch_slice=batch), cache.apply_ln_to_stack(stack)[:, index], **EXACT
        )
        recomputed = cache.apply_ln_to_stack(stack, recompute_ln=True)
        torch.testing.assert_close(
            cache.apply_ln_to_stack(stack, batch_slice=batch, recompute_ln=True), recomputed[:, index], **EXACT
        )


def test_a_stream_without_component_axis_is_a_stack_too() -> None:
    _, _, cache = run()
    last = cache["resid_post", -1]
    whole = cache.apply_ln_to_stack(last[None])[0]
    torch.testing.assert_close(cache.apply_ln_to_stack(last), whole, **EXACT)
    torch.testing.assert_close(cache.apply_ln_to_stack(last[:, -1], pos_slice=-1), whole[:, -1], **EXACT)
    torch.testing.assert_close(cache.apply_ln_to_stack(last, batch_slice=1), whole[1], **EXACT)


@pytest.mark.parametrize("norms", ["LN", None])
@pytest.mark.parametrize(
    ("cut", "how"),
    [
        (lambda stack: stack[:, [1, 2]], {"batch_slice": [1, 2]}),  # cut already, and cut again
        (lambda stack: stack[:, 1:2], {"batch_slice": [1]}),
        (lambda stack: stack[:, 1:2], {}),  # one prompt's stack would broadcast over all
        (lambda stack: stack[:, 1], {"batch_slice": 1}),  # no batch axis, and not said so
        (lambda stack: stack[:, 1], {"has_batch_dim": False}),  # of which prompt?
        (lambda stack: stack, {"has_batch_dim": False, "batch_slice": 1}),
        (lambda stack: stack, {"pos_slice": [2]}),  # one scale would broadcast over all positions
        (lambda stack: stack, {"pos_slice": -1}),
        (lambda stack: stack[:, :, 2:3], {}),
        (lambda stack: stack[:, :, -1], {}),
        (lambda stack: stack[:, :3, -1], {"pos_slice": -1}),
    ],
)
def test_a_stack_of_other_prompts_or_positions_raises(norms: Any, cut: Any, how: dict[str, Any]) -> None:
    model = tiny_model(normalization_type=norms)
    _, cache = model.run_with_cache(tiny_tokens(4, 6))
    stack = cut(cache.decompose_resid())
    for call in (cache.apply_ln_to_stack, lambda stack, **how: cache.logit_attrs(stack, 3, **how)):
        with pytest.raises(ValueError, match=r"the stack has shape .*(batch_slice cuts)|a stack of one prompt"):
            call(stack, **how)


def test_a_batch_slice_of_a_cache_without_batch_axis_raises() -> None:
    model, _, _ = run()
    _, cache = model.run_with_cache(TOKENS[:1], remove_batch_dim=True)
    for batch in (0, [0], (0, 1)):
        with pytest.raises(ValueError, match="has no batch axis to slice, leave batch_slice out"):
            cache.logit_attrs(cache.decompose_resid(), 3, batch_slice=batch)


@pytest.mark.parametrize(
    ("tokens", "how"),
    [
        (torch.tensor([1, 2, 3]), {}),  # three tokens for four prompts
        (torch.tensor([1, 2, 3]), {"batch_slice": [0, 2]}),
        (torch.tensor([1, 2, 3, 4, 5]), {}),  # as many as positions
        (torch.ones(4, 5).long(), {"pos_slice": -1}),
        (torch.ones(1, 4, 6).long(), {}),
        (torch.ones(2, 6).long(), {"batch_slice": 1}),
    ],
)
def test_tokens_of_other_prompts_or_positions_raise(tokens: Tensor, how: dict[str, Any]) -> None:
    _, cache = tiny_model().run_with_cache(tiny_tokens(4, 6))
    stack = cache.decompose_resid(pos_slice=how.get("pos_slice"))
    with pytest.raises(ValueError, match="give one token, one for each prompt, or one for each position"):
        cache.logit_attrs(stack, tokens, **how)


@pytest.mark.parametrize("pos_slice", [None, -1, (1, 3)])
@pytest.mark.parametrize("batch_slice", [None, 1, [1], (0, 2)])
@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_tensor_of_one_token_serves_every_prompt_and_position(
    pos_slice: Any, batch_slice: Any, shape: tuple[int, ...]
) -> None:
    _, _, cache = run()
    stack, how = cache.decompose_resid(pos_slice=pos_slice), {"pos_slice": pos_slice, "batch_slice": batch_slice}
    expected = cache.logit_attrs(stack, 3, 4, **how)
    came = cache.logit_attrs(stack, torch.full(shape, 3), torch.full(shape, 4), **how)
    torch.testing.assert_close(came, expected, **EXACT)
