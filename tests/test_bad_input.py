"""Bad input: each a clear error, after which the model is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer
from tests.helpers import VOCAB, randomise_, tiny_config, tiny_model, tiny_tokenizer, tiny_tokens

TOKENIZER = tiny_tokenizer()


@contextmanager
def unharmed(model: HookedTransformer) -> Iterator[None]:
    """The model gives the same logits afterwards, has no hooks left, and its weights are the same."""
    tokens = tiny_tokens(vocab=model.cfg.d_vocab)
    before, weights = model(tokens), {name: value.clone() for name, value in model.state_dict().items()}
    yield
    assert torch.equal(model(tokens), before)
    assert not any(point.has_hooks() for point in model.hook_points())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def text_model(**changes: Any) -> HookedTransformer:
    """A tiny model that reads text."""
    fields = {"d_vocab": VOCAB, **changes}
    return randomise_(HookedTransformer(tiny_config(**fields), TOKENIZER))  # type: ignore[return-value]


# Each way to run a model refuses the same things.
CALLS: dict[str, Callable[[HookedTransformer, Any], object]] = {
    "forward": lambda model, given: model(given),
    "loss": lambda model, given: model(given, return_type="loss"),
    "run_with_cache": lambda model, given: model.run_with_cache(given),
    "run_with_hooks": lambda model, given: model.run_with_hooks(
        given, fwd_hooks=[("hook_embed", lambda x, hook: x * 2)]
    ),
    "input_to_embed": lambda model, given: model.input_to_embed(given),
    "generate": lambda model, given: model.generate(given, 1, stop_at_eos=False, verbose=False),
    "generate_stream": lambda model, given: list(model.generate_stream(given, 1, stop_at_eos=False, verbose=False)),
}

BAD_TOKENS = {
    "floats": (torch.ones(1, 3), TypeError, "tokens are integers, got torch.float32"),
    "numpy floats": (np.ones((1, 3)), TypeError, "tokens are integers, got torch.float64"),
    "booleans": (torch.ones(1, 3).bool(), TypeError, "tokens are integers, got torch.bool"),
    "complex": (torch.ones(1, 3) * 1j, TypeError, "tokens are integers, got torch.complex64"),
    "a list of floats": ([1.0, 2.0], TypeError, "tokens are integers, got torch.float32"),
    "too large": (torch.tensor([[1, 20, 3]]), ValueError, "token 20 is out of range: this model's tokens are 0-19"),
    "negative": (torch.tensor([[1, -1, 3]]), ValueError, "token -1 is out of range: this model's tokens are 0-19"),
    "four axes": (torch.ones(1, 1, 1, 2).long(), ValueError, r"tokens have shape \[batch pos\]"),
    "three axes": (torch.ones(1, 2, 3).long(), ValueError, r"tokens have shape \[batch pos\]"),
    "no axis": (torch.tensor(3), (TypeError, ValueError), r"tokens"),
    "no positions": (torch.ones(2, 0).long(), (TypeError, ValueError), r"shape .*\(2, 0\)"),
    "no prompts": (torch.ones(0, 3).long(), (TypeError, ValueError), r"shape .*\(0, 3\)"),
    "nothing": (torch.ones(0).long(), (TypeError, ValueError), r"shape .*(\(0,\)|\(1, 0\))"),
    "too long": (torch.ones(1, 17).long(), ValueError, r"17 .*n_ctx.*16"),
    "an empty list": ([], (TypeError, ValueError), r"\[\]|empty"),
}


@pytest.mark.parametrize("what", BAD_TOKENS)
@pytest.mark.parametrize("call", CALLS)
def test_bad_tokens_raise(what: str, call: str) -> None:
    given, error, message = BAD_TOKENS[what]
    if call == "generate_stream" and what in ("no positions", "no prompts"):
        message = f"{message}|one prompt at a time"
    if call == "generate" and what == "floats":
        message = "a prompt of floats is embeddings"
    model = tiny_model()
    with unharmed(model), pytest.raises(error, match=message):
        CALLS[call](model, given)


@pytest.mark.parametrize("given", [None, 5, 1.5, {"input_ids": [1]}, object()])
def test_something_that_is_no_input_raises(given: Any) -> None:
    model = tiny_model()
    with unharmed(model), pytest.raises(TypeError, match="a string, a list of strings or tokens, got"):
        model(given)


@pytest.mark.parametrize("call", ["forward", "run_with_cache", "generate", "input_to_embed"])
@pytest.mark.parametrize("given", ["Mary", ["Mary", "John"]])
def test_text_without_a_tokenizer_raises(call: str, given: Any) -> None:
    model = tiny_model()
    with unharmed(model), pytest.raises(ValueError, match=r"has no tokenizer.*set_tokenizer"):
        CALLS[call](model, given)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.to_tokens("Mary"),
        lambda model: model.to_string([1]),
        lambda model: model.to_str_tokens("Mary"),
        lambda model: model.to_str_tokens(torch.tensor([1])),
        lambda model: model.to_single_token("Mary"),
        lambda model: model.to_single_str_token(1),
        lambda model: model.get_token_position("Mary", "Mary"),
        lambda model: model.tokens_to_residual_directions("Mary"),
    ],
)
def test_every_text_method_without_a_tokenizer_says_so(call: Callable[[HookedTransformer], object]) -> None:
    model = tiny_model()
    with unharmed(model), pytest.raises(ValueError, match="has no tokenizer"):
        call(model)


@pytest.mark.parametrize("given", ["", ["Mary", ""]])
@pytest.mark.parametrize("call", ["to_tokens", "forward", "generate"])
def test_an_empty_string_without_bos_raises(given: Any, call: str) -> None:
    model = text_model(default_prepend_bos=False)
    run = model.to_tokens if call == "to_tokens" else lambda text: CALLS[call](model, text)
    with unharmed(model), pytest.raises(ValueError, match="the string '' has no tokens"):
        run(given)


@pytest.mark.parametrize("given", [[], ()])
def test_no_strings_at_all_raise(given: Any) -> None:
    model = text_model()
    with unharmed(model), pytest.raises(ValueError, match="the list of strings is empty"):
        model.to_tokens(given)


@pytest.mark.parametrize("given", [["Mary", 3], ["Mary", None], ["Mary", ["John"]]])
def test_a_list_of_strings_and_something_else_raises(given: Any) -> None:
    model = text_model()
    for run in (model, model.to_tokens):
        with unharmed(model), pytest.raises(TypeError, match="expected strings to tokenize, got"):
            run(given)


def test_text_that_is_too_long_raises() -> None:
    model = text_model()
    with unharmed(model), pytest.raises(ValueError, match=r"positions are more than this model's n_ctx of 16"):
        model("Mary " * 20)


# Residual streams


def test_a_residual_without_start_at_layer_raises() -> None:
    model = tiny_model()
    with unharmed(model), pytest.raises(TypeError, match="tokens are integers"):
        model(torch.zeros(1, 3, 12, dtype=torch.float64))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(1, 3, 11, dtype=torch.float64), r"residual stream \[batch pos 12\], got .*\(1, 3, 11\)"),
        (torch.zeros(3, 12, dtype=torch.float64), r"residual stream \[batch pos 12\], got .*\(3, 12\)"),
        (torch.zeros(1, 3, 2, 12, dtype=torch.float64), r"residual stream \[batch pos 12\], got .*\(1, 3, 2, 12\)"),
        (torch.zeros(1, 3, 12), "residual stream has dtype torch.float32, the model torch.float64"),
        (torch.zeros(1, 3, 12).long(), "residual stream has dtype torch.int64"),
        (torch.ones(1, 3).long(), r"residual stream \[batch pos 12\]"),
        ("Mary", r"residual stream \[batch pos 12\], got str 'Mary'"),
        ([1, 2], r"residual stream \[batch pos 12\]"),
        (torch.zeros(1, 17, 12, dtype=torch.float64), "17 positions are more than this model's n_ctx of 16"),
        (torch.zeros(0, 3, 12, dtype=torch.float64), "empty"),
        (torch.zeros(1, 0, 12, dtype=torch.float64), "empty"),
    ],
)
def test_a_wrong_residual_raises(given: Any, message: str) -> None:
    model = tiny_model()
    with unharmed(model), pytest.raises(ValueError, match=message):
        model(given, start_at_layer=1)


@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (3, 3), (4,), (3,)])
def test_tokens_that_do_not_fit_the_residual_raise(shape: tuple[int, ...]) -> None:
    model = tiny_model()
    residual = torch.zeros(2, 3, 12, dtype=torch.float64)
    with unharmed(model), pytest.raises(ValueError, match="do not fit the residual"):
        model(residual, start_at_layer=1, tokens=torch.ones(shape).long(), return_type="loss")


def test_tokens_beside_tokens_raise() -> None:
    model = tiny_model()
    with unharmed(model), pytest.raises(ValueError, match="tokens= goes with start_at_layer"):
        model(tiny_tokens(), tokens=tiny_tokens())


# Masks


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 6), r"attention_mask has shape \[batch pos\] = \[2 7\], got .*\(2, 6\)"),
        (torch.ones(1, 7), r"attention_mask has shape \[batch pos\] = \[2 7\], got .*\(1, 7\)"),
        (torch.ones(7), r"attention_mask has shape \[batch pos\] = \[2 7\]"),
        (torch.ones(2, 7, 7), r"attention_mask has shape \[batch pos\] = \[2 7\]"),
        ([[1] * 7] * 2, r"attention_mask has shape \[batch pos\] = \[2 7\], got list"),
        (torch.full((2, 7), 2), "attention_mask holds 1 for real tokens and 0 for padding"),
        (torch.full((2, 7), -1), "attention_mask holds 1 for real tokens and 0 for padding"),
        (torch.full((2, 7), 0.5), "attention_mask holds 1 for real tokens and 0 for padding"),
        (torch.full((2, 7), float("nan")), "attention_mask holds 1 for real tokens and 0 for padding"),
        (torch.tensor([[1] * 7, [0] * 7]), "attention_mask marks a whole prompt as padding"),
    ],
)
@pytest.mark.parametrize("half_way", [False, True])
def test_a_wrong_mask_raises(mask: Any, message: str, half_way: bool) -> None:
    model, tokens = tiny_model(), tiny_tokens()
    given: Tensor = torch.zeros(2, 7, 12, dtype=torch.float64) if half_way else tokens
    with unharmed(model), pytest.raises(ValueError, match=message):
        model(given, attention_mask=mask, start_at_layer=1 if half_way else None)


def test_a_mask_beside_strings_raises() -> None:
    model = text_model()
    with unharmed(model), pytest.raises(ValueError, match="the attention mask of strings follows from their padding"):
        model("Mary", attention_mask=torch.ones(1, 2))


# Options


@pytest.mark.parametrize("return_type", ["logit", "", "BOTH", 3, True, ["logits"]])
def test_an_unknown_return_type_raises(return_type: Any) -> None:
    model = tiny_model()
    with unharmed(model), pytest.raises(ValueError, match="return_type is 'logits', 'loss', 'both' or None, not"):
        model(tiny_tokens(), return_type=return_type)


@pytest.mark.parametrize("return_type", ["loss", "both"])
def test_a_loss_of_one_position_raises(return_type: Any) -> None:
    model = tiny_model()
    with unharmed(model), pytest.raises(ValueError, match="a next-token loss needs at least two positions"):
        model(tiny_tokens(2, 1), return_type=return_type)


def test_an_option_nobody_knows_raises() -> None:
    model = tiny_model()
    with unharmed(model), pytest.raises(TypeError, match="unexpected keyword argument 'retrun_type'"):
        model(tiny_tokens(), retrun_type="loss")


# Key-value caches


def test_the_cache_of_another_batch_raises() -> None:
    model, cache = tiny_model(), tiny_model().new_kv_cache(3)
    with unharmed(model), pytest.raises(ValueError, match=r"cache is for 2 layers and batch 3; .*the input batch 2"):
        model(tiny_tokens(), past_kv_cache=cache)
    assert cache.length == 0


def test_the_cache_of_another_model_raises() -> None:
    model = tiny_model()
    with unharmed(model), pytest.raises(ValueError, match="cache is for 3 layers and batch 2; the model has 2 layers"):
        model(tiny_tokens(), past_kv_cache=tiny_model(n_layers=3).new_kv_cache(2))


def test_the_cache_of_another_precision_raises() -> None:
    model = tiny_model()
    cache = tiny_model(dtype=torch.float32).new_kv_cache(2)
    with unharmed(model), pytest.raises(ValueError, match=r"cache holds batch 2, torch\.float32.*got.*torch\.float64"):
        model(tiny_tokens(), past_kv_cache=cache)
    assert cache.length == 0


def test_a_cache_that_would_grow_beyond_the_context_raises_and_stays() -> None:
    model = tiny_model()
    cache = model.new_kv_cache(2)
    model(tiny_tokens(2, 12), past_kv_cache=cache)
    with unharmed(model), pytest.raises(ValueError, match="17 positions are more than this model's n_ctx of 16"):
        model(tiny_tokens(2, 5), past_kv_cache=cache)
    assert cache.length == 12


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention_mask": torch.ones(2, 2)}, ValueError, "attention_mask has shape"),
        ({"logits_to_keep": 99}, ValueError, "logits_to_keep is 1-4"),
        ({"logits_to_keep": "last"}, TypeError, "logits_to_keep is an int"),
        ({"return_type": "all"}, ValueError, "return_type is"),
    ],
)
def test_a_run_that_is_refused_leaves_the_cache_as_it_was(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, tokens = tiny_model(), tiny_tokens(2, 8)
    full, cache = model(tokens), model.new_kv_cache(2)
    model(tokens[:, :4], past_kv_cache=cache)
    with unharmed(model), pytest.raises(error, match=message):
        model(tokens[:, 4:], past_kv_cache=cache, **options)
    assert cache.length == 4
    rest = model(tokens[:, 4:], past_kv_cache=cache)
    torch.testing.assert_close(rest, full[:, 4:], atol=1e-10, rtol=0)


def test_a_loss_that_cannot_be_leaves_the_cache_as_it_was() -> None:
    model, tokens = tiny_model(), tiny_tokens(2, 5)
    full, cache = model(tokens), model.new_kv_cache(2)
    model(tokens[:, :4], past_kv_cache=cache)
    with pytest.raises(ValueError, match="at least two positions"):
        model(tokens[:, 4:], past_kv_cache=cache, return_type="loss")
    assert cache.length == 4
    torch.testing.assert_close(model(tokens[:, 4:], past_kv_cache=cache), full[:, 4:], atol=1e-10, rtol=0)


@pytest.mark.parametrize("site", ["blocks.1.attn.hook_z", "ln_final.hook_scale", "unembed.hook_out"])
def test_a_hook_that_raises_leaves_the_cache_as_it_was(site: str) -> None:
    model, tokens = tiny_model(), tiny_tokens(2, 8)
    full, cache = model(tokens), model.new_kv_cache(2)
    model(tokens[:, :4], past_kv_cache=cache)

    def fail(x: Tensor, hook: object) -> None:
        raise RuntimeError("the hook gave up")

    with unharmed(model), pytest.raises(RuntimeError, match="the hook gave up"):
        model.run_with_hooks(tokens[:, 4:], past_kv_cache=cache, fwd_hooks=[(site, fail)])
    assert cache.length == 4
    torch.testing.assert_close(model(tokens[:, 4:], past_kv_cache=cache), full[:, 4:], atol=1e-10, rtol=0)


def test_a_token_hook_that_makes_up_tokens_raises() -> None:
    model = tiny_model()
    with unharmed(model), pytest.raises(ValueError, match="token 99 is out of range"):
        model.run_with_hooks(tiny_tokens(), fwd_hooks=[("hook_tokens", lambda x, hook: torch.full_like(x, 99))])
