"""A value of the wrong kind raises with what came, what was expected and what to do; NumPy's integers are integers.

Run by test_bad_values.py in a process of its own, without the checks of annotations, which would raise first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, Intervention, metrics, patching, utils
from hooked_lm.circuits import logit_attribution
from hooked_lm.circuits.function_vectors import mean_state
from hooked_lm.circuits.heads import attention_scores
from hooked_lm.circuits.logit_lens import logit_lens
from hooked_lm.head_detector import detect_head
from hooked_lm.losses import lm_accuracy, lm_cross_entropy_loss
from hooked_lm.sweep import sweep
from hooked_lm.utils import Slice
from tests.helpers import VOCAB, randomise_, tiny_config, tiny_model, tiny_tokenizer, tiny_tokens

TOKENS = tiny_tokens(3, 5)
METRIC = metrics.logit(3)
QUIET: dict[str, Any] = {"verbose": False}
ONCE: dict[str, Any] = {"max_new_tokens": 1, "stop_at_eos": False, "do_sample": False, "verbose": False}


def text_model() -> HookedTransformer:
    return randomise_(HookedTransformer(tiny_config(d_vocab=VOCAB), tiny_tokenizer()))  # type: ignore[return-value]


# Whole numbers of NumPy

WITH_INTEGERS: dict[str, Callable[[HookedTransformer, Callable[[int], Any]], Any]] = {
    "a short key": lambda model, n: model.run_with_cache(TOKENS)[1]["q", n(-1)],
    "stop_at_layer": lambda model, n: model(TOKENS, stop_at_layer=n(1)),
    "a negative stop_at_layer": lambda model, n: model(TOKENS, stop_at_layer=n(-1)),
    "start_at_layer": lambda model, n: model(model(TOKENS, stop_at_layer=1), start_at_layer=n(1)),
    "logits_to_keep": lambda model, n: model(TOKENS, logits_to_keep=n(2)),
    "pos_slice": lambda model, n: model.run_with_cache(TOKENS, pos_slice=n(2))[1]["resid_post", 1],
    "a range of positions": lambda model, n: model.run_with_cache(TOKENS, pos_slice=(n(1), n(3)))[1]["resid_post", 1],
    "a layer of the cache": lambda model, n: model.run_with_cache(TOKENS)[1].decompose_resid(n(1), pos_slice=n(-1)),
    "accumulated_bias": lambda model, n: model.accumulated_bias(n(1)),
    "logit_attribution": lambda model, n: (
        logit_attribution(model.run_with_cache(TOKENS)[1], n(3), pos=n(-2), split="head", layers=[n(1)]).values
    ),
    "logit_lens": lambda model, n: (
        logit_lens(model, TOKENS, targets=n(3), layers=[n(1)], positions=n(2), top_k=n(2), **QUIET).top_log_probs
    ),
    "mean_state": lambda model, n: mean_state(model, TOKENS, n(1), n(-2), batch_size=n(2), **QUIET),
    "ablate": lambda model, n: (
        patching.ablate(model, TOKENS, metrics.logit(n(3), pos=n(-1)), layers=[n(1)], by_pos=[n(2)], **QUIET).scores
    ),
    "draws": lambda model, n: (
        patching.ablate(model, TOKENS, METRIC, method="resample", n_draws=n(2), seed=n(1), **QUIET).scores
    ),
    "an intervention": lambda model, n: model.run(
        TOKENS, interventions=[Intervention("blocks.0.attn.hook_z", "scale", 2.0, pos=n(-1), head=(n(0), n(2)))]
    ),
    "generate": lambda model, n: model.generate(
        TOKENS, n(2), eos_token_id=n(19), do_sample=False, top_k=n(2), verbose=False
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", [np.int64, np.int32, torch.tensor], ids=["int64", "int32", "tensor"])
@pytest.mark.parametrize("where", WITH_INTEGERS)
def test_other_libraries_integers_are_integers(where: str, kind: Any) -> None:
    model = tiny_model()
    came, expected = (WITH_INTEGERS[where](model, one) for one in (kind, int))
    torch.testing.assert_close(came, expected, rtol=0, atol=0)


@pytest.mark.parametrize("given", [1.0, True, "1", None, np.float64(1.0), torch.tensor(1.0), torch.tensor([1, 1])])
@pytest.mark.parametrize("where", ["stop_at_layer", "a layer of the cache", "accumulated_bias", "generate"])
def test_what_is_no_integer_is_no_layer(where: str, given: Any) -> None:
    if given is None and where != "accumulated_bias":
        pytest.skip("None is the default there, or no number of tokens")
    model = tiny_model()
    with pytest.raises(TypeError, match=r"is an integer, got \w+ "):
        WITH_INTEGERS[where](model, lambda number: given)


def test_numbers_of_heads_and_tokens() -> None:
    model = text_model()
    whole = detect_head(model, "Mary Mary", "previous_token_head", heads=[(0, 1)])
    assert torch.equal(
        detect_head(model, "Mary Mary", "previous_token_head", heads=[(np.int64(0), np.int32(1))]), whole
    )
    for wrong in ((0.5, 1), (0, 1.0), (True, 1)):
        with pytest.raises(TypeError, match="is an integer, got"):
            detect_head(model, "Mary Mary", "previous_token_head", heads=[wrong])  # type: ignore[list-item]
    assert model.to_single_str_token(np.int64(5)) == model.to_single_str_token(5)  # type: ignore[arg-type]


# Masks

WITH_MASK: dict[str, Callable[[HookedTransformer, Any], Any]] = {
    "forward": lambda model, mask: model(TOKENS, attention_mask=mask),
    "loss": lambda model, mask: model(TOKENS, attention_mask=mask, return_type="loss"),
    "half way": lambda model, mask: model(
        model(TOKENS, stop_at_layer=1, attention_mask=mask), start_at_layer=1, attention_mask=mask
    ),
    "run_with_cache": lambda model, mask: model.run_with_cache(TOKENS, attention_mask=mask)[1]["resid_post", 1],
    "lazy": lambda model, mask: model.run_with_cache(TOKENS, attention_mask=mask, lazy=True)[1]["resid_post", 1],
    "generate": lambda model, mask: model.generate(TOKENS, attention_mask=mask, **ONCE),
    "logit_lens": lambda model, mask: logit_lens(model, TOKENS, attention_mask=mask, **QUIET).entropy.nan_to_num(-1),
    "attention_scores": lambda model, mask: (
        attention_scores(model, TOKENS, "previous_token", attention_mask=mask, **QUIET).scores
    ),
    "sweep": lambda model, mask: sweep(model, TOKENS, [()], METRIC, attention_mask=mask, **QUIET),
    "ablate": lambda model, mask: (
        patching.ablate(model, TOKENS, METRIC, method="mean", attention_mask=mask, **QUIET).scores
    ),
    "a grid": lambda model, mask: patching.get_act_patch_resid_pre(
        model, TOKENS, TOKENS.flip(0), METRIC, attention_mask=mask, **QUIET
    ),
    "mean_state": lambda model, mask: mean_state(model, TOKENS, attention_mask=mask, **QUIET),
}
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])


@torch.no_grad()
@pytest.mark.parametrize("kind", [np.int64, np.bool_, np.float32])
@pytest.mark.parametrize("where", WITH_MASK)
def test_a_mask_may_be_an_array(where: str, kind: Any) -> None:
    model = tiny_model()
    came, expected = WITH_MASK[where](model, MASK.numpy().astype(kind)), WITH_MASK[where](model, MASK)
    torch.testing.assert_close(came, expected, rtol=0, atol=0)


WRONG_MASKS = {
    "a list": (MASK.tolist(), r"attention_mask has shape \[batch pos\] = \[3 5\], got list .*give a tensor"),
    "a number": (1, r"attention_mask has shape \[batch pos\] = \[3 5\], got int 1"),
    "of another shape": (MASK[:, 1:], r"got a tensor with shape \(3, 4\)"),
    "an array of another shape": (MASK[:, 1:].numpy(), r"got a tensor with shape \(3, 4\)"),
    "an array of strings": (MASK.numpy().astype(str), "got a NumPy array with shape"),
    "of other numbers": (MASK * 2, "holds 1 for real tokens and 0 for padding, and nothing else"),
    "of no prompt": (MASK * torch.tensor([[1], [0], [1]]), "marks a whole prompt as padding"),
}


@pytest.mark.parametrize("what", WRONG_MASKS)
@pytest.mark.parametrize("where", WITH_MASK)
def test_a_mask_that_is_none_raises(where: str, what: str) -> None:
    mask, message = WRONG_MASKS[what]
    with pytest.raises(ValueError, match=message):
        WITH_MASK[where](tiny_model(), mask)


# Nothing at all

WITH_TOKENS: dict[str, Callable[[HookedTransformer, Any], Any]] = {
    "forward": lambda model, given: model(given),
    "run_with_cache": lambda model, given: model.run_with_cache(given),
    "lazy": lambda model, given: model.run_with_cache(given, lazy=True),
    "run": lambda model, given: model.run(given, interventions=[]),
    "generate": lambda model, given: model.generate(given, **ONCE),
    "logit_lens": lambda model, given: logit_lens(model, given, **QUIET),
    "attention_scores": lambda model, given: attention_scores(model, given, "previous_token", **QUIET),
    "sweep": lambda model, given: sweep(model, given, [()], METRIC, **QUIET),
    "ablate": lambda model, given: patching.ablate(model, given, METRIC, **QUIET),
    "a reference": lambda model, given: patching.ablate(model, TOKENS, METRIC, method="mean", reference=given, **QUIET),
    "a grid": lambda model, given: patching.get_act_patch_resid_pre(model, given, TOKENS, METRIC, **QUIET),
    "clean prompts": lambda model, given: patching.get_act_patch_resid_pre(model, TOKENS, given, METRIC, **QUIET),
    "pairs": lambda model, given: patching.patch_pairs(model, given, given, METRIC, **QUIET),
    "mean_state": lambda model, given: mean_state(model, given, **QUIET),
}


@pytest.mark.parametrize(
    "given", [torch.zeros(0, 5).long(), torch.zeros(3, 0).long(), np.zeros((0, 5), dtype=int), [], [[]], ()]
)
@pytest.mark.parametrize("where", WITH_TOKENS)
def test_no_prompts_and_no_tokens_raise(where: str, given: Any) -> None:
    for model in (tiny_model(), text_model()):
        with pytest.raises((ValueError, TypeError), match=r"empty|is 0|tokens are integers"):
            WITH_TOKENS[where](model, given)


@pytest.mark.parametrize("given", [[], (), np.array([]), torch.tensor([]), torch.tensor([]).long()])
def test_an_empty_index_raises(given: Any) -> None:
    model = tiny_model()
    _, cache = model.run_with_cache(TOKENS)
    calls: list[Callable[[], Any]] = [
        lambda: Slice(given),
        lambda: model.run_with_cache(TOKENS, pos_slice=given),
        lambda: cache.decompose_resid(pos_slice=given),
        lambda: cache.apply_slice_to_batch_dim(given),
        lambda: cache.get_neuron_results(0, neuron_slice=given),
        lambda: logit_lens(model, TOKENS, positions=given, **QUIET),
    ]
    for call in calls:
        if isinstance(given, tuple):
            with pytest.raises(TypeError, match="a tuple slice is"):
                call()
        else:
            with pytest.raises(ValueError, match=r"an empty index, .* picks nothing: give one entry at least"):
                call()


@pytest.mark.parametrize("pos_slice", [(3, 3), (7, 9), slice(5, None)])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_range_without_positions_raises(pos_slice: Any, lazy: bool) -> None:
    with pytest.raises(ValueError, match="picks none of the 5 positions"):
        tiny_model().run_with_cache(TOKENS, pos_slice=pos_slice, lazy=lazy)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((1, 3.0), TypeError, "of integers or None"),
        ((True, 3), TypeError, "of integers or None"),
        (slice(1.0, 2), TypeError, "the part of a slice is an integer, got float"),
        ((3, 1, -1), ValueError, "the step of a slice is at least 1.* give a list"),
        (slice(None, None, 0), ValueError, "the step of a slice is at least 1"),
    ],
)
def test_a_slice_of_something_else_raises(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Slice(given)


@pytest.mark.parametrize("given", [5, -6, [1, 5], [-6], torch.tensor([0, 9])])
def test_an_entry_out_of_range_names_the_range(given: Any) -> None:
    with pytest.raises(IndexError, match=r"is out of bounds for dimension 1 with size 5: its entries are 0-4, or -5"):
        Slice(given).apply(TOKENS, 1)


@pytest.mark.parametrize("keep", [[1, 3], np.array([1, 3]), torch.tensor([1, 3]), [True, False, True, False, False]])
def test_positions_to_keep_may_be_a_list_or_an_array(keep: Any) -> None:
    model = tiny_model()
    assert torch.equal(model(TOKENS, logits_to_keep=keep), model(TOKENS, logits_to_keep=torch.as_tensor(keep)))


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        (torch.tensor([]), TypeError, "a tensor of positions"),
        (torch.tensor([1.0]), TypeError, "a tensor of positions"),
        (torch.tensor([[1]]), TypeError, "one axis"),
        (1.0, TypeError, "logits_to_keep is an int"),
        (True, TypeError, "logits_to_keep is an int"),
        (torch.tensor([]).long(), ValueError, "keeps positions 0-4 of this input, one at least"),
        (torch.tensor([1, 5]), ValueError, r"keeps positions 0-4 .* got \[1, 5\]"),
        (torch.tensor([-6]), ValueError, "keeps positions 0-4"),
        (slice(3, 3), ValueError, "keeps none of the 5 positions"),
    ],
)
def test_positions_to_keep_that_are_none_raise(keep: Any, error: type[Exception], message: str) -> None:
    model = tiny_model()
    for lazy in (False, True):
        with pytest.raises(error, match=message):
            model.run_with_cache(TOKENS, logits_to_keep=keep, lazy=lazy)
    with pytest.raises(error, match=message):
        model(TOKENS, logits_to_keep=keep)


# Losses


@pytest.mark.parametrize("d_vocab_out", [7, 27])
def test_a_loss_of_other_classes_than_tokens_raises(d_vocab_out: int) -> None:
    model = tiny_model(d_vocab_out=d_vocab_out)
    for return_type in ("loss", "both"):
        with pytest.raises(
            ValueError, match=rf"d_vocab_out={d_vocab_out} classes for d_vocab=20 tokens: take its logits"
        ):
            model(TOKENS, return_type=return_type)
    assert model(TOKENS).shape[-1] == d_vocab_out


@pytest.mark.parametrize("score", [lm_cross_entropy_loss, lm_accuracy, utils.lm_cross_entropy_loss])
def test_logits_and_tokens_that_do_not_fit_raise(score: Any) -> None:
    logits = tiny_model()(TOKENS)
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((logits[:, -1:], TOKENS), {}, "take the logits of every position"),
        ((logits, TOKENS[:2]), {}, r"got \(3, 5, 20\) and \(2, 5\)"),
        ((logits[:, :1], TOKENS[:, :1]), {}, "at least two positions"),
        ((logits, TOKENS + 20), {}, r"token \d+ has no logit: these logits are of tokens 0-19"),
        ((logits, TOKENS - 20), {}, r"token -\d+ has no logit"),
        ((logits, TOKENS), {"attention_mask": MASK[:2]}, r"attention_mask is a tensor .* got \(2, 5\)"),
        ((logits, TOKENS), {"attention_mask": MASK * 0}, "leaves no real token with a real one after it"),
        ((logits, TOKENS), {"attention_mask": torch.eye(5).long()[:3]}, "leaves no real token"),
    ]
    for args, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            score(*args, **options)


# Sampling


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": float("nan")}, ValueError, "temperature is a finite number, got nan"),
        ({"temperature": float("inf")}, ValueError, "temperature is a finite number"),
        ({"temperature": -1.0}, ValueError, "temperature is not negative"),
        ({"temperature": "1"}, TypeError, "temperature is a number, got str"),
        ({"temperature": None}, TypeError, "temperature is a number"),
        ({"temperature": True}, TypeError, "temperature is a number"),
        ({"top_k": 0}, ValueError, "top_k is at least 1"),
        ({"top_k": 2.5}, TypeError, "top_k is an integer, got float"),
        ({"top_k": True}, TypeError, "top_k is an integer, got bool"),
        ({"top_p": 0}, ValueError, "top_p is above 0"),
        ({"top_p": 1.5}, ValueError, "top_p is above 0"),
        ({"top_p": float("nan")}, ValueError, "top_p is a finite number"),
        ({"top_p": "a"}, TypeError, "top_p is a number"),
        ({"freq_penalty": float("nan")}, ValueError, "freq_penalty is a finite number"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens is not negative"),
        ({"max_new_tokens": 1.0}, TypeError, "max_new_tokens is an integer"),
        ({"max_new_tokens": None}, TypeError, "max_new_tokens is an integer"),
        ({"stop_at_eos": True, "eos_token_id": 20}, ValueError, "one or several of the tokens 0-19.*stop_at_eos=False"),
        ({"stop_at_eos": True, "eos_token_id": -1}, ValueError, "one or several of the tokens 0-19"),
        ({"stop_at_eos": True, "eos_token_id": []}, ValueError, "one or several of the tokens 0-19"),
        ({"stop_at_eos": True, "eos_token_id": [3, 1.0]}, TypeError, "eos_token_id is an integer"),
        ({"stop_at_eos": True, "eos_token_id": 1.0}, TypeError, "eos_token_id is an integer"),
    ],
)
def test_a_wrong_option_of_generation_raises(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = tiny_model()
    with pytest.raises(error, match=message):
        model.generate(TOKENS, **{**ONCE, **options})
    with pytest.raises(error, match=message):
        list(model.generate_stream(TOKENS[:1], **{**ONCE, **options}))


@pytest.mark.parametrize("do_sample", [True, False])
def test_logits_without_a_likeliest_token_raise(do_sample: bool) -> None:
    model = tiny_model()

    def spoil(x: Tensor, hook: object) -> None:
        x[1] = float("nan")

    with model.hooks([("unembed.hook_out", spoil)]), pytest.raises(ValueError, match="logits of prompt 1 are NaN"):
        model.generate(TOKENS, **{**ONCE, "do_sample": do_sample})
    with pytest.raises(ValueError, match=r"logits are \[batch vocab\].* got \(20,\)"):
        utils.sample_logits(torch.zeros(20))
