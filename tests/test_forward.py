"""The forward pass: what goes in, what comes out, and what is not computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from hooked_lm import HookedTransformer, Output
from tests.forward_helpers import EXACT, poison
from tests.helpers import CORPUS, VOCAB, randomise_, tiny_config, tiny_model, tiny_tokens


def text_model(tokenizer: Any, **changes: Any) -> HookedTransformer:
    """A tiny model that reads text."""
    fields = {"d_vocab": VOCAB, "n_ctx": 64, **changes}
    return randomise_(HookedTransformer(tiny_config(**fields), tokenizer))  # type: ignore[return-value]


def count_runs(monkeypatch: pytest.MonkeyPatch, module: nn.Module) -> list[tuple[int, ...]]:
    """Return a list that grows by the shape of the first argument whenever a module runs."""
    shapes: list[tuple[int, ...]] = []
    forward = module.forward

    def counted(x: Tensor, *args: object) -> Tensor:
        shapes.append(tuple(x.shape))
        return forward(x, *args)

    monkeypatch.setattr(module, "forward", counted)
    return shapes


# What goes in


def test_a_string_gives_the_logits_of_its_tokens(tokenizer: Any) -> None:
    model = text_model(tokenizer)
    tokens = model.to_tokens(CORPUS[0])
    logits = model(CORPUS[0])
    assert logits.shape == (1, tokens.shape[1], VOCAB)
    torch.testing.assert_close(logits, model(tokens), **EXACT)


def test_a_list_of_strings_gives_each_string_its_own_logits(tokenizer: Any) -> None:
    model = text_model(tokenizer)
    logits = model(CORPUS)
    for row, text in zip(logits, CORPUS, strict=True):
        alone = model(text)[0]
        torch.testing.assert_close(row[: len(alone)], alone, **EXACT)


def test_a_tuple_of_strings_is_a_list_of_strings(tokenizer: Any) -> None:
    model = text_model(tokenizer)
    torch.testing.assert_close(model(tuple(CORPUS)), model(CORPUS), **EXACT)


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_prepend_bos_decides_about_bos_in_front_of_strings(tokenizer: Any, prepend_bos: bool) -> None:
    model = text_model(tokenizer)
    tokens = tokenizer(CORPUS[0])["input_ids"]
    expected = [tokenizer.bos_token_id, *tokens] if prepend_bos else tokens
    torch.testing.assert_close(model(CORPUS[0], prepend_bos=prepend_bos), model(torch.tensor([expected])), **EXACT)


def test_prepend_bos_leaves_tokens_alone(tokenizer: Any) -> None:
    model = text_model(tokenizer)
    tokens = tiny_tokens(vocab=VOCAB)
    torch.testing.assert_close(model(tokens, prepend_bos=True), model(tokens, prepend_bos=False), **EXACT)
    assert model(tokens, prepend_bos=True).shape[1] == tokens.shape[1]


def test_tokens_without_a_batch_axis_are_a_batch_of_one() -> None:
    model, tokens = tiny_model(), tiny_tokens(1)
    logits = model(tokens[0])
    assert logits.shape == (1, 7, 20)
    torch.testing.assert_close(logits, model(tokens), **EXACT)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64])
@pytest.mark.parametrize("return_type", ["logits", "loss"])
def test_numpy_tokens_of_every_integer_type_are_read(dtype: Any, return_type: Any) -> None:
    model, tokens = tiny_model(), tiny_tokens()
    expected = model(tokens, return_type=return_type)
    torch.testing.assert_close(model(tokens.numpy().astype(dtype), return_type=return_type), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("return_type", ["logits", "loss"])
def test_tensors_of_every_integer_type_are_read(dtype: torch.dtype, return_type: Any) -> None:
    model, tokens = tiny_model(), tiny_tokens()
    expected = model(tokens, return_type=return_type)
    torch.testing.assert_close(model(tokens.to(dtype), return_type=return_type), expected, **EXACT)


def test_lists_of_numbers_are_tokens() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    torch.testing.assert_close(model(tokens.tolist()), model(tokens), **EXACT)


def test_the_prompts_of_a_batch_do_not_see_each_other() -> None:
    model, tokens = tiny_model(), tiny_tokens(3)
    for row in range(3):
        torch.testing.assert_close(model(tokens)[row], model(tokens[row])[0], **EXACT)


def test_a_causal_model_does_not_look_ahead() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 20
    logits, changed_logits = model(tokens), model(changed)
    torch.testing.assert_close(logits[:, :4], changed_logits[:, :4], **EXACT)
    assert ((logits - changed_logits)[:, 4:].abs().amax(-1) > 1e-4).all()


def test_the_longest_sequence_has_n_ctx_positions() -> None:
    assert tiny_model(n_ctx=9)(tiny_tokens(pos=9)).shape == (2, 9, 20)


# What comes out


def test_return_types_say_what_comes_back() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    logits = model(tokens)
    assert logits.shape == (2, 7, 20)
    torch.testing.assert_close(model(tokens, return_type="logits"), logits, **EXACT)
    loss = model(tokens, return_type="loss")
    assert loss.shape == ()
    both = model(tokens, return_type="both")
    assert isinstance(both, tuple)
    torch.testing.assert_close(both[0], logits, **EXACT)
    torch.testing.assert_close(both[1], loss, **EXACT)
    assert model(tokens, return_type=None) is None


def test_the_loss_is_torch_cross_entropy_of_the_next_tokens() -> None:
    model, tokens = tiny_model(), tiny_tokens(3)
    expected = F.cross_entropy(model(tokens)[:, :-1].reshape(-1, 20), tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(model(tokens, return_type="loss"), expected, **EXACT)


def test_the_loss_is_that_of_transformers(gpt2_folder: Path) -> None:
    reference = GPT2LMHeadModel.from_pretrained(gpt2_folder).double().eval()
    model = HookedTransformer.from_pretrained_no_processing(gpt2_folder, dtype=torch.float64)
    tokens = tiny_tokens(3, 20, vocab=VOCAB)
    with torch.no_grad():
        expected = reference(tokens, labels=tokens)
    logits, loss = model(tokens, return_type="both")
    assert loss.dtype == torch.float64
    torch.testing.assert_close(logits, expected.logits, atol=1e-9, rtol=0)
    # transformers works its loss out in float32, whatever the model is in.
    torch.testing.assert_close(loss.float(), expected.loss, atol=1e-6, rtol=0)


@pytest.mark.parametrize("return_type", ["loss", "both"])
def test_loss_per_token_is_minus_the_log_probability_of_each_next_token(return_type: Any) -> None:
    model, tokens = tiny_model(), tiny_tokens()
    result = model(tokens, return_type=return_type, loss_per_token=True)
    losses = result if return_type == "loss" else result[1]
    assert losses.shape == (2, 6)
    log_probabilities = model(tokens).log_softmax(-1)
    for row in range(2):
        for pos in range(6):
            expected = -log_probabilities[row, pos, tokens[row, pos + 1]]
            torch.testing.assert_close(losses[row, pos], expected, **EXACT)
    torch.testing.assert_close(losses.mean(), model(tokens, return_type="loss"), **EXACT)


@pytest.mark.parametrize("return_type", ["logits", None])
def test_loss_per_token_without_a_loss_raises(return_type: Any) -> None:
    with pytest.raises(ValueError, match="loss_per_token needs return_type 'loss' or 'both'"):
        tiny_model()(tiny_tokens(), return_type=return_type, loss_per_token=True)


def test_without_a_return_type_nothing_is_unembedded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    poison(monkeypatch, model.unembed)
    scales = []
    model.run_with_hooks(
        tiny_tokens(), return_type=None, fwd_hooks=[("ln_final.hook_scale", lambda x, hook: scales.append(x))]
    )
    assert len(scales) == 1


@pytest.mark.parametrize("name", ["unembed.hook_in", "unembed.hook_out"])
def test_hooks_on_the_unembedding_run_without_a_return_type(name: str) -> None:
    model, seen = tiny_model(), []
    out = model.run_with_hooks(
        tiny_tokens(), return_type=None, fwd_hooks=[(name, lambda x, hook: seen.append(x.shape[-1]))]
    )
    assert out is None
    assert seen == [12 if name.endswith("in") else 20]


# Fewer logits


@pytest.mark.parametrize(
    ("keep", "positions"),
    [
        (1, [6]),
        (3, [4, 5, 6]),
        (7, list(range(7))),
        (slice(2, 5), [2, 3, 4]),
        (slice(-2, None), [5, 6]),
        (slice(None, None, 3), [0, 3, 6]),
        (torch.tensor([5, 0, 5]), [5, 0, 5]),
        (torch.tensor([-1]), [6]),
    ],
)
def test_logits_to_keep_computes_those_logits_and_no_more(
    monkeypatch: pytest.MonkeyPatch, keep: Any, positions: list[int]
) -> None:
    model, tokens = tiny_model(), tiny_tokens()
    full = model(tokens)
    shapes = count_runs(monkeypatch, model.unembed)
    logits = model(tokens, logits_to_keep=keep)
    torch.testing.assert_close(logits, full[:, positions], **EXACT)
    assert shapes == [(2, len(positions), 12)]


@pytest.mark.parametrize("keep", [0, 8, -1])
def test_keeping_more_logits_than_there_are_raises(keep: int) -> None:
    with pytest.raises(ValueError, match=f"logits_to_keep is 1-7 for this input, got {keep}"):
        tiny_model()(tiny_tokens(), logits_to_keep=keep)


@pytest.mark.parametrize("keep", ["last", 1.0, True, [1.5]])
def test_logits_to_keep_of_another_type_raises(keep: Any) -> None:
    with pytest.raises(TypeError, match="logits_to_keep is an int, a slice or a tensor"):
        tiny_model()(tiny_tokens(), logits_to_keep=keep)


@pytest.mark.parametrize("return_type", ["loss", "both"])
def test_a_loss_does_not_go_with_logits_to_keep(return_type: Any) -> None:
    with pytest.raises(ValueError, match="a loss needs the logits of every position"):
        tiny_model()(tiny_tokens(), logits_to_keep=1, return_type=return_type)


# The embeddings by themselves


@pytest.mark.parametrize("positions", ["standard", "shortformer", "rotary", "alibi", "none"])
def test_input_to_embed_returns_what_enters_block_zero(positions: str) -> None:
    model, tokens = tiny_model(positional_embedding_type=positions), tiny_tokens()
    residual, same_tokens, shortformer, mask = model.input_to_embed(tokens)
    torch.testing.assert_close(residual, model(tokens, stop_at_layer=0), **EXACT)
    assert torch.equal(same_tokens, tokens)
    assert mask is None
    if positions == "shortformer":
        torch.testing.assert_close(shortformer, model.W_pos[:7].expand(2, -1, -1), **EXACT)
    else:
        assert shortformer is None
    torch.testing.assert_close(model(residual, start_at_layer=0), model(tokens), **EXACT)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_input_to_embed_returns_the_mask_of_strings(tokenizer: Any, padding_side: Any) -> None:
    model = text_model(tokenizer)
    residual, tokens, _, mask = model.input_to_embed(CORPUS, padding_side=padding_side)
    assert torch.equal(tokens, model.to_tokens(CORPUS, padding_side=padding_side))
    lengths = [model.to_tokens(text).shape[1] for text in CORPUS]
    assert mask.sum(1).tolist() == lengths
    assert mask[lengths.index(max(lengths))].all()
    logits = model(residual, start_at_layer=0, attention_mask=mask)
    torch.testing.assert_close(logits, model(CORPUS, padding_side=padding_side), **EXACT)


# Precision, gradients, modes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("positions", ["standard", "rotary", "alibi", "shortformer"])
def test_every_activation_has_the_precision_of_the_model(dtype: torch.dtype, positions: str) -> None:
    model = tiny_model(dtype=dtype, positional_embedding_type=positions)
    logits, cache = model.run_with_cache(tiny_tokens())
    assert logits.dtype == dtype
    wrong = {
        name: tensor.dtype
        for name, tensor in cache.items()
        if tensor.dtype != dtype and name != "hook_tokens" and not name.endswith("hook_scale")
    }
    assert wrong == {}
    assert model(tiny_tokens()).dtype == dtype
    assert model(tiny_tokens(), return_type="loss").isfinite()


@pytest.mark.parametrize("positions", ["standard", "rotary", "alibi", "shortformer"])
def test_a_bfloat16_model_computes_what_the_exact_one_does(positions: str) -> None:
    rounded = tiny_model(dtype=torch.bfloat16, positional_embedding_type=positions)
    exact = tiny_model(positional_embedding_type=positions)
    exact.load_state_dict({name: value.double() for name, value in rounded.state_dict().items()})
    expected, logits = exact(tiny_tokens()), rounded(tiny_tokens()).double()
    # bfloat16 keeps 8 bits: a relative error of 0.4% per operation.
    assert (logits - expected).norm() / expected.norm() < 0.03


def test_the_model_follows_a_change_of_precision() -> None:
    model, tokens = tiny_model(dtype=torch.float32), tiny_tokens()
    in_float32 = model(tokens)
    model.double()
    in_float64 = model(tokens)
    assert in_float64.dtype == torch.float64
    torch.testing.assert_close(in_float32.double(), in_float64, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"positional_embedding_type": "rotary", "normalization_type": "LN"},
        {"positional_embedding_type": "rotary", "normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu"},
        # The score cap also lets the key bias matter, which a softmax over plain scores cannot see.
        {"attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 5.0},
        {"attn_scores_soft_cap": 2.0, "positional_embedding_type": "shortformer"},
        {"attn_scores_soft_cap": 2.0, "positional_embedding_type": "alibi", "post_embedding_ln": True},
        {"positional_embedding_type": "rotary", "use_qk_norm": True, "use_normalization_before_and_after": True},
        {"positional_embedding_type": "rotary", "n_heads": 4, "d_head": 4, "n_key_value_heads": 2},
        {"positional_embedding_type": "rotary", "parallel_attn_mlp": True},
        {"positional_embedding_type": "rotary", "attn_only": True},
        {"positional_embedding_type": "rotary", "num_experts": 2, "experts_per_token": 2},
        {"positional_embedding_type": "rotary", "act_fn": "solu_ln"},
    ],
)
def test_gradients_reach_every_parameter(changes: dict[str, Any]) -> None:
    model = tiny_model(**{"d_head": 4, **changes})
    model(tiny_tokens(), return_type="loss").backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9]
    assert still == []


def test_the_gradient_is_the_finite_difference() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    model(tokens, return_type="loss").backward()
    step = 1e-6
    for name, parameter in model.named_parameters():
        index = int(parameter.grad.abs().argmax())
        with torch.no_grad():
            where = tuple(int(i) for i in np.unravel_index(index, parameter.shape))
            parameter[where] += step
            above = model(tokens, return_type="loss")
            parameter[where] -= 2 * step
            below = model(tokens, return_type="loss")
            parameter[where] += step
        numeric = (above - below) / (2 * step)
        torch.testing.assert_close(parameter.grad[where], numeric, atol=1e-7, rtol=1e-5, msg=name)


@pytest.mark.parametrize("positions", ["standard", "rotary", "alibi", "shortformer"])
def test_inference_mode_gives_the_same_logits_and_leaves_training_possible(positions: str) -> None:
    model, tokens = tiny_model(positional_embedding_type=positions, rotary_base=777.0), tiny_tokens()
    # A first run in inference mode: nothing it keeps may stand in a later graph's way.
    with torch.inference_mode():
        logits, cache = model.run_with_cache(tokens)
        hooked = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: z * 2)])
        plain = model(tokens)
    assert len(cache) > 20
    with_grad = model(tokens)
    torch.testing.assert_close(logits.clone(), with_grad.detach(), **EXACT)
    torch.testing.assert_close(plain.clone(), with_grad.detach(), **EXACT)
    assert (hooked - logits).abs().max() > 1e-3
    model(tokens, return_type="loss").backward()
    assert model.W_E.grad.abs().max() > 0


def test_no_grad_gives_the_same_logits() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    with torch.no_grad():
        logits = model(tokens)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, model(tokens).detach(), **EXACT)


@pytest.mark.parametrize("site", ["hook_embed", "blocks.1.attn.hook_pattern", "ln_final.hook_scale"])
def test_the_model_is_usable_after_a_hook_has_raised(site: str) -> None:
    model, tokens = tiny_model(), tiny_tokens()
    before = model(tokens)

    def fail(x: Tensor, hook: object) -> None:
        x.zero_()
        raise RuntimeError("the hook gave up")

    with pytest.raises(RuntimeError, match="the hook gave up"):
        model.run_with_hooks(tokens, fwd_hooks=[(site, fail)])
    assert not any(point.has_hooks() for point in model.hook_points())
    assert torch.equal(model(tokens), before)


def test_running_a_model_changes_nothing_about_it() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = tokens.clone()
    first = model(tokens)
    model.run_with_cache(tokens)
    assert torch.equal(model(tokens), first)
    assert torch.equal(tokens, before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_model_without_blocks_is_embedding_norm_and_unembedding() -> None:
    model, tokens = tiny_model(n_layers=0), tiny_tokens()
    residual = model.W_E[tokens] + model.W_pos[:7]
    expected = F.layer_norm(residual, (12,), model.ln_final.w, model.ln_final.b, 1e-5) @ model.W_U + model.b_U
    torch.testing.assert_close(model(tokens), expected, **EXACT)
    torch.testing.assert_close(model(tokens, stop_at_layer=0), residual, **EXACT)


def test_logits_and_loss_come_by_name_too() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    both = model(tokens, return_type="both")
    assert isinstance(both, Output)
    assert torch.equal(both.logits, model(tokens))
    assert torch.equal(both.loss, model(tokens, return_type="loss"))
    logits, loss = both
    assert logits is both.logits
    assert loss is both.loss
