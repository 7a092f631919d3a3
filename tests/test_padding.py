"""Padding: a padded prompt has the logits it has alone, wherever the padding stands and however it is found."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer
from tests.architectures_helpers import LATENT
from tests.helpers import CORPUS, VOCAB, randomise_, tiny_config, tiny_model, tiny_tokens

EXACT = {"atol": 1e-10, "rtol": 0.0}
TEXTS = [CORPUS[0], "Mary", CORPUS[2], "of Rome."]
LENGTHS = (7, 3, 1, 6)
SIDES = ("left", "right")

VARIANTS: dict[str, dict[str, Any]] = {
    "standard": {},
    "rotary": {"positional_embedding_type": "rotary", "d_head": 4},
    "rotary, adjacent pairs": {"positional_embedding_type": "rotary", "d_head": 4, "rotary_adjacent_pairs": True},
    "alibi": {"positional_embedding_type": "alibi"},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "none": {"positional_embedding_type": "none"},
    "local": {"window_size": 3, "attn_types": ["local", "global"], "use_local_attn": True},
    "local everywhere": {"window_size": 2, "positional_embedding_type": "none"},
    "local alibi": {"window_size": 3, "positional_embedding_type": "alibi"},
    "local rotary": {
        "window_size": 3,
        "attn_types": ["global", "local"],
        "use_local_attn": True,
        "positional_embedding_type": "rotary",
        "rotary_base_local": 100.0,
        "d_head": 4,
    },
    "soft-cap": {"attn_scores_soft_cap": 1.5, "output_logits_soft_cap": 4.0},
    "soft-cap alibi": {"attn_scores_soft_cap": 1.5, "positional_embedding_type": "alibi"},
    "bidirectional": {"attention_dir": "bidirectional"},
    "bidirectional alibi": {"attention_dir": "bidirectional", "positional_embedding_type": "alibi"},
    "bidirectional local": {"attention_dir": "bidirectional", "window_size": 2},
    "grouped": {"n_heads": 6, "n_key_value_heads": 2, "d_head": 4},
    "grouped rotary": {"n_heads": 4, "n_key_value_heads": 1, "d_head": 4, "positional_embedding_type": "rotary"},
    "grouped alibi": {"n_heads": 4, "n_key_value_heads": 2, "d_head": 4, "positional_embedding_type": "alibi"},
    "latent attention": LATENT,
    "experts": {"num_experts": 3, "experts_per_token": 2},
    "attention only": {"attn_only": True},
}


def padded(side: str, lengths: tuple[int, ...] = LENGTHS, pos: int = 7) -> tuple[Tensor, Tensor]:
    """Return random tokens [batch pos], padding no different from the rest, and the mask that tells it apart."""
    tokens, mask = tiny_tokens(len(lengths), pos), torch.zeros(len(lengths), pos, dtype=torch.long)
    for row, length in enumerate(lengths):
        where = slice(pos - length, None) if side == "left" else slice(length)
        mask[row, where] = 1
    return tokens, mask


def text_model(tokenizer: Any, **changes: Any) -> HookedTransformer:
    """A tiny model that reads text."""
    fields = {"d_vocab": VOCAB + 1, "n_ctx": 64, **changes}
    return randomise_(HookedTransformer(tiny_config(**fields), tokenizer))  # type: ignore[return-value]


def with_pad_token(tokenizer: Any) -> Any:
    """Return a copy of a tokenizer with a padding token of its own."""
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"pad_token": "<pad>"})
    assert other.pad_token_id not in (other.bos_token_id, other.eos_token_id)
    return other


def assert_each_as_alone(model: HookedTransformer, logits: Tensor, tokens: Tensor, mask: Tensor) -> None:
    """Every prompt's logits at its real positions are those of the prompt by itself."""
    for row in range(len(tokens)):
        real = mask[row].bool()
        torch.testing.assert_close(logits[row, real], model(tokens[row, real])[0], **EXACT)


def ignore(x: Tensor, hook: object) -> None:
    """No-op hook: attached only so that attention has to form its pattern."""


every_variant = pytest.mark.parametrize("variant", VARIANTS)


@every_variant
def test_a_padded_prompt_has_the_logits_it_has_alone(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    for side in SIDES:
        tokens, mask = padded(side)
        assert_each_as_alone(model, model(tokens, attention_mask=mask), tokens, mask)
        eager = model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=[("blocks.*.attn.hook_pattern", ignore)])
        assert_each_as_alone(model, eager, tokens, mask)


@every_variant
def test_without_the_mask_left_padding_would_change_the_logits(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    tokens, mask = padded("left")
    # The first real position of the prompt of 3: even a window of two has padding in it.
    difference = (model(tokens) - model(tokens, attention_mask=mask))[1, -3]
    assert difference.abs().max() > 1e-4


@every_variant
def test_what_stands_at_padding_does_not_matter(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    for side in SIDES:
        tokens, mask = padded(side)
        others = torch.where(mask.bool(), tokens, (tokens + 5) % 20)
        real = mask.bool()
        logits, other_logits = model(tokens, attention_mask=mask), model(others, attention_mask=mask)
        torch.testing.assert_close(logits[real], other_logits[real], **EXACT)


@every_variant
def test_nothing_in_a_padded_cache_is_nan(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    for side in SIDES:
        tokens, mask = padded(side)
        logits, cache = model.run_with_cache(tokens, attention_mask=mask)
        assert [name for name, tensor in cache.items() if tensor.isnan().any()] == []
        assert logits.isfinite().all()
        # Of the masked scores alone an infinity is right.
        infinite = {name for name, tensor in cache.items() if not tensor.isfinite().all()}
        assert all(name.endswith("hook_attn_scores") for name in infinite)
        model.zero_grad()
        model(tokens, attention_mask=mask, return_type="loss").backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@every_variant
def test_padding_gets_no_attention(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    for side in SIDES:
        tokens, mask = padded(side)
        _, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter="blocks.*.attn.hook_pattern")
        for pattern in cache.values():
            torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]), **EXACT)
            for row in range(len(tokens)):
                real = mask[row].bool()
                assert pattern[row][:, real][:, :, ~real].abs().sum() == 0


@every_variant
def test_padding_gets_no_gradient_from_real_positions(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    for side in SIDES:
        tokens, mask = padded(side)
        residual = model(tokens, attention_mask=mask, stop_at_layer=0).detach().requires_grad_()
        loss = model(residual, start_at_layer=0, tokens=tokens, attention_mask=mask, return_type="loss")
        loss.backward()
        assert residual.grad[~mask.bool()].abs().sum() == 0
        assert residual.grad[0, 0].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
@pytest.mark.parametrize("return_type", ["logits", "loss"])
def test_a_mask_may_be_of_any_type_that_holds_zeros_and_ones(dtype: torch.dtype, return_type: Any) -> None:
    model = tiny_model()
    tokens, mask = padded("left")
    expected = model(tokens, attention_mask=mask, return_type=return_type)
    result = model(tokens, attention_mask=mask.to(dtype), return_type=return_type)
    torch.testing.assert_close(result, expected, **EXACT)


def test_a_mask_of_ones_changes_nothing() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    torch.testing.assert_close(model(tokens, attention_mask=torch.ones_like(tokens)), model(tokens), **EXACT)


# Masks that nobody gave


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("own_pad", [True, False])
@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_strings_of_unequal_length_have_the_logits_they_have_alone(
    tokenizer: Any, side: Any, own_pad: bool, prepend_bos: bool, attention: str
) -> None:
    model = text_model(with_pad_token(tokenizer) if own_pad else tokenizer, attention_dir=attention)
    logits = model(TEXTS, padding_side=side, prepend_bos=prepend_bos)
    for row, text in zip(logits, TEXTS, strict=True):
        alone = model(text, prepend_bos=prepend_bos)[0]
        here = row[-len(alone) :] if side == "left" else row[: len(alone)]
        torch.testing.assert_close(here, alone, **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_side_of_the_model_is_used(tokenizer: Any, side: str) -> None:
    model = text_model(tokenizer, default_padding_side=side)
    torch.testing.assert_close(model(TEXTS), model(TEXTS, padding_side=side), **EXACT)
    tokens = model.to_tokens(TEXTS)
    assert (tokens[1, 0] == tokens[1, 1]) == (side == "left")


def test_text_that_looks_like_padding_is_text(tokenizer: Any) -> None:
    model = text_model(tokenizer)
    text = "<|endoftext|><|endoftext|><|endoftext|>Paris<|endoftext|>"
    tokens = model.to_tokens(text)
    assert (tokens[0, :3] == tokenizer.bos_token_id).all()
    for side in ("left", "right"):
        alone = model(tokens, attention_mask=torch.ones_like(tokens))
        torch.testing.assert_close(model(text, padding_side=side), alone, **EXACT)


@pytest.mark.parametrize("own_pad", [True, False])
@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("as_default", [True, False])
def test_left_padded_tokens_bring_their_mask(
    tokenizer: Any, own_pad: bool, prepend_bos: bool, as_default: bool
) -> None:
    defaults = {"default_padding_side": "left", "default_prepend_bos": prepend_bos} if as_default else {}
    options: dict[str, Any] = {} if as_default else {"padding_side": "left", "prepend_bos": prepend_bos}
    model = text_model(with_pad_token(tokenizer) if own_pad else tokenizer, **defaults)
    tokens = model.to_tokens(TEXTS, **options)
    assert (tokens[1, 0] == model.tokenizer.pad_token_id).all()
    logits = model(tokens, **options)
    for row, text in zip(logits, TEXTS, strict=True):
        alone = model(text, prepend_bos=prepend_bos)[0]
        torch.testing.assert_close(row[-len(alone) :], alone, **EXACT)


@pytest.mark.parametrize("own_pad", [True, False])
def test_a_prompt_of_bos_alone_survives_left_padding(tokenizer: Any, own_pad: bool) -> None:
    model = text_model(with_pad_token(tokenizer) if own_pad else tokenizer)
    tokens = model.to_tokens(["", "Paris is"], padding_side="left")
    logits = model(tokens, padding_side="left")
    torch.testing.assert_close(logits[0, -1], model(torch.tensor([[tokenizer.bos_token_id]]))[0, 0], **EXACT)


def test_right_padded_tokens_of_a_causal_model_need_no_mask(tokenizer: Any) -> None:
    model = text_model(tokenizer)
    logits = model(model.to_tokens(TEXTS))
    for row, text in zip(logits, TEXTS, strict=True):
        alone = model(text)[0]
        torch.testing.assert_close(row[: len(alone)], alone, **EXACT)


def test_an_explicit_mask_wins_over_the_one_tokens_imply(tokenizer: Any) -> None:
    model = text_model(tokenizer, default_padding_side="left")
    tokens = model.to_tokens(TEXTS)
    given = model(tokens, attention_mask=torch.ones_like(tokens))
    unpadded = text_model(tokenizer, default_padding_side="right")
    torch.testing.assert_close(given, unpadded(tokens), **EXACT)
    assert (given - model(tokens))[1, -1].abs().max() > 1e-4


def test_tokens_of_a_model_without_tokenizer_are_never_taken_for_padding() -> None:
    model = tiny_model(default_padding_side="left")
    tokens = torch.zeros(1, 6, dtype=torch.long)
    torch.testing.assert_close(model(tokens), tiny_model()(tokens), **EXACT)


def test_the_mask_tokens_imply_reaches_a_run_that_starts_half_way(tokenizer: Any) -> None:
    model = text_model(tokenizer, default_padding_side="left")
    tokens = model.to_tokens(TEXTS)
    logits, cache = model.run_with_cache(tokens)
    again = model(cache["resid_pre", 1], start_at_layer=1, tokens=tokens)
    torch.testing.assert_close(again, logits, **EXACT)


# The loss


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", ["standard", "rotary", "alibi", "bidirectional", "soft-cap"])
def test_the_loss_of_a_padded_batch_is_the_mean_over_real_tokens(side: str, variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    tokens, mask = padded(side)
    total, count = torch.zeros(()).double(), 0
    for row in range(len(tokens)):
        prompt = tokens[row, mask[row].bool()][None]
        if prompt.shape[1] > 1:
            losses = model(prompt, return_type="loss", loss_per_token=True)
            total, count = total + losses.sum(), count + losses.numel()
    loss = model(tokens, attention_mask=mask, return_type="loss")
    torch.testing.assert_close(loss, total / count, **EXACT)
    per_token = model(tokens, attention_mask=mask, return_type="loss", loss_per_token=True)
    counts = (mask[:, :-1] & mask[:, 1:]).bool()
    assert int(counts.sum()) == count
    assert (per_token[~counts] == 0).all()
    assert (per_token[counts] > 0).all()
    torch.testing.assert_close(per_token.sum() / count, loss, **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("own_pad", [True, False])
def test_the_loss_of_strings_is_the_mean_over_their_tokens(tokenizer: Any, side: Any, own_pad: bool) -> None:
    model = text_model(with_pad_token(tokenizer) if own_pad else tokenizer)
    losses = [model(text, return_type="loss", loss_per_token=True) for text in TEXTS]
    expected = sum(loss.sum() for loss in losses) / sum(loss.numel() for loss in losses)
    torch.testing.assert_close(model(TEXTS, padding_side=side, return_type="loss"), expected, **EXACT)


def test_a_batch_with_no_next_token_at_all_has_no_loss() -> None:
    tokens, mask = padded("right", (1, 1))
    with pytest.raises(ValueError, match="loss"):
        tiny_model()(tokens, attention_mask=mask, return_type="loss")


# Holes


@every_variant
def test_a_prompt_with_masked_tokens_inside_is_the_prompt_without_them(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    tokens = tiny_tokens(3)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1], [0, 1, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1]])
    assert_each_as_alone(model, model(tokens, attention_mask=mask), tokens, mask)
    eager = model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=[("blocks.*.attn.hook_pattern", ignore)])
    assert_each_as_alone(model, eager, tokens, mask)


def test_a_prediction_across_a_hole_does_not_count() -> None:
    model, tokens = tiny_model(), tiny_tokens(1)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0]])
    per_token = model(tokens, attention_mask=mask, return_type="loss", loss_per_token=True)
    assert (per_token[0] != 0).tolist() == [True, False, False, True, True, False]
    loss = model(tokens, attention_mask=mask, return_type="loss")
    torch.testing.assert_close(loss, per_token.sum() / 3, **EXACT)


# With a key-value cache


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "bidirectional" not in name])
def test_a_padded_prompt_goes_on_from_its_cache_as_it_would_alone(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    tokens, mask = padded("left")
    cache = model.new_kv_cache(len(tokens))
    parts = [model(tokens[:, :5], attention_mask=mask[:, :5] | torch.tensor([0, 0, 0, 0, 1]), past_kv_cache=cache)]
    parts += [model(tokens[:, pos : pos + 1], past_kv_cache=cache) for pos in (5, 6)]
    mask = torch.cat((mask[:, :5] | torch.tensor([0, 0, 0, 0, 1]), torch.ones(len(tokens), 2, dtype=torch.long)), 1)
    assert_each_as_alone(model, torch.cat(parts, 1), tokens, mask)


@pytest.mark.parametrize("own_pad", [False, True])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("variant", ["standard", "rotary", "local alibi"])
def test_padding_in_tokens_is_recognised_with_a_key_value_cache(
    tokenizer: Any, variant: str, side: Any, own_pad: bool
) -> None:
    own = with_pad_token(tokenizer) if own_pad else tokenizer
    model = text_model(own, **VARIANTS[variant], default_padding_side=side)
    tokens, more = model.to_tokens(TEXTS), tiny_tokens(4, 3, vocab=200) + 50
    cache = model.new_kv_cache(4)
    parts = [model(tokens, past_kv_cache=cache), *(model(more[:, at : at + 1], past_kv_cache=cache) for at in range(3))]
    for row, text in enumerate(TEXTS):
        alone = model.to_tokens(text)
        expected = model(torch.cat((alone, more[row : row + 1]), 1), attention_mask=torch.ones(1, alone.shape[1] + 3))
        place = slice(-alone.shape[1], None) if side == "left" else slice(alone.shape[1])
        torch.testing.assert_close(parts[0][row, place], expected[0, :-3], **EXACT)
        torch.testing.assert_close(torch.cat(parts[1:], 1)[row], expected[0, -3:], **EXACT)
    assert cache.previous_attention_mask.sum().item() == sum(model.to_tokens(text).shape[1] + 3 for text in TEXTS)


@pytest.mark.parametrize("side", SIDES)
def test_padding_of_its_own_token_is_recognised_in_what_goes_on(tokenizer: Any, side: Any) -> None:
    tokenizer = with_pad_token(tokenizer)
    model = text_model(tokenizer, default_padding_side=side)
    first, more = tiny_tokens(2, 4), tiny_tokens(2, 3, seed=1)
    more[1, slice(2) if side == "left" else slice(1, None)] = tokenizer.pad_token_id
    cache = model.new_kv_cache(2)
    model(first, past_kv_cache=cache)
    logits = model(more, past_kv_cache=cache)
    alone = model(torch.cat((first[1:], more[1:, 2:] if side == "left" else more[1:, :1]), 1))
    torch.testing.assert_close(logits[1, 2 if side == "left" else 0], alone[0, -1], **EXACT)
    # One token is text, as the model may have written it.
    model(torch.full((2, 1), tokenizer.pad_token_id), past_kv_cache=cache)
    assert cache.previous_attention_mask[:, -1].tolist() == [1, 1]


def test_the_end_of_texts_is_not_padding_because_padding_has_the_same_token(tokenizer: Any) -> None:
    model = text_model(tokenizer)
    end = tokenizer.eos_token_id
    tokens = torch.tensor([[3, 4, 5, 6, end], [7, end, end, end, end], [8, 9, end, end, end]])
    cache = model.new_kv_cache(3)
    model(tokens, past_kv_cache=cache)
    assert cache.previous_attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    model(torch.full((3, 2), end), past_kv_cache=cache)
    assert cache.previous_attention_mask[:, 5:].tolist() == [[1, 1]] * 3
