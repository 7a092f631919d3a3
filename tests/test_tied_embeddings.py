"""Tied embeddings: one tensor read two ways, until something treats the two differently."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from hooked_lm import HookedTransformer, weights
from hooked_lm.weights import STEPS
from tests.helpers import tiny_config, tiny_model, tiny_tokens

TOKENS = tiny_tokens()
PARTING = ("fold_ln", "center_writing_weights", "center_unembed")
JOINING = ("fold_value_biases", "refactor_factored_attn_matrices")


def tied_model(**changes: Any) -> HookedTransformer:
    return tiny_model(tie_word_embeddings=True, **changes)


def untied_twin(model: HookedTransformer) -> HookedTransformer:
    """The same function with two tensors of its own."""
    twin = HookedTransformer(model.cfg.replace(tie_word_embeddings=False))
    twin.load_state_dict({**model.state_dict(), "unembed.W_U": model.W_U.detach().clone()})
    return twin


def assert_tied(model: HookedTransformer) -> None:
    assert model.cfg.tie_word_embeddings
    assert model.W_U.data_ptr() == model.W_E.data_ptr()
    assert torch.equal(model.W_U, model.W_E.T)
    assert torch.equal(model.state_dict()["unembed.W_U"], model.W_E.T)
    assert "unembed.W_U" not in dict(model.named_parameters())


def logits_of(model: HookedTransformer) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)


# One tensor


def test_there_is_one_tensor_and_the_logits_are_those_of_two_equal_ones() -> None:
    model = tied_model()
    assert_tied(model)
    torch.testing.assert_close(logits_of(model), logits_of(untied_twin(model)), rtol=0, atol=1e-13)
    assert model.n_params_total == untied_twin(model).n_params_total - model.W_E.numel()


def test_a_change_to_the_embedding_is_one_to_the_unembedding() -> None:
    model = tied_model()
    before = logits_of(model)
    with torch.no_grad():
        model.W_E[7] += 5.0
    assert_tied(model)
    unread = ~(TOKENS == 7).any(1)
    assert unread.any()
    changed = (logits_of(model) - before)[unread].abs()
    assert changed[..., 7].min() > 1e-6
    assert changed[..., [i for i in range(20) if i != 7]].max() == 0


def test_the_gradient_is_the_sum_of_that_of_both_uses() -> None:
    model = tied_model()
    twin = untied_twin(model)
    for one in (model, twin):
        one(TOKENS, return_type="loss").backward()
    assert twin.W_E.grad is not None
    assert twin.W_U.grad is not None
    assert model.W_E.grad is not None
    assert twin.W_U.grad.abs().max() > 1e-4
    assert twin.W_E.grad.abs().max() > 1e-4
    torch.testing.assert_close(model.W_E.grad, twin.W_E.grad + twin.W_U.grad.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_keeps_them_one_and_lowers_the_loss(optimizer: Any) -> None:
    model = HookedTransformer(tiny_config(tie_word_embeddings=True))
    start = model.W_E.detach().clone()
    steps = optimizer(model.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        steps.zero_grad()
        loss = model(TOKENS, return_type="loss")
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert_tied(model)
    assert not torch.allclose(model.W_E, start)
    assert losses[-1] < losses[0]


def test_a_new_models_embeddings_are_tied_and_drawn_as_any_embedding() -> None:
    tied, untied = (HookedTransformer(tiny_config(tie_word_embeddings=tie)) for tie in (True, False))
    assert_tied(tied)
    assert torch.equal(tied.W_E, untied.W_E)
    assert not tied.b_U.any()


def test_a_tokenizer_may_decide_the_vocabulary(tokenizer: Any) -> None:
    model = HookedTransformer(tiny_config(tie_word_embeddings=True, d_vocab=-1), tokenizer)
    assert model.W_U.shape == (12, model.cfg.d_vocab)
    with pytest.raises(ValueError, match="tied embeddings have one vocabulary"):
        HookedTransformer(tiny_config(tie_word_embeddings=True, d_vocab=-1, d_vocab_out=20), tokenizer)


def test_scales_act_on_one_use_each() -> None:
    plain, model = tied_model(), tied_model(embedding_scale=2.0, logit_scale=3.0)
    assert torch.equal(model.embed.W_E, plain.W_E)
    assert torch.equal(model.W_U, plain.W_U)
    _, cache = model.run_with_cache(TOKENS)
    assert torch.equal(cache["embed"], 2 * plain.W_E[TOKENS])
    expected = 3 * (cache["unembed.hook_in"] @ plain.W_U + plain.b_U)
    torch.testing.assert_close(cache["unembed.hook_out"], expected, rtol=0, atol=1e-12)


# Copies, dtypes, files


def test_a_deep_copy_is_tied_to_its_own_embedding() -> None:
    model = tied_model()
    twin = copy.deepcopy(model)
    assert_tied(twin)
    with torch.no_grad():
        twin.W_E.zero_()
    assert_tied(model)
    assert not twin.W_U.any()
    assert model.W_U.any()


def test_a_pickled_model_is_tied_to_its_own_embedding() -> None:
    model, file = tied_model(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert_tied(again)
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_dtype_keeps_them_one(dtype: torch.dtype) -> None:
    model = tied_model()
    expected = model.W_E.detach().to(dtype)
    model.to(dtype)
    assert_tied(model)
    assert model.cfg.dtype is dtype
    assert torch.equal(model.W_U, expected.T)
    assert logits_of(model).dtype is dtype


def test_a_saved_model_holds_one_tensor_and_comes_back_tied(tmp_path: Path) -> None:
    model = tied_model()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "unembed.W_U" not in file.keys()  # noqa: SIM118 (a safetensors file is no mapping)
    again = HookedTransformer.from_pretrained_no_processing(tmp_path)
    assert_tied(again)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=0, atol=1e-13)


@pytest.mark.parametrize("step", PARTING)
def test_a_saved_model_comes_back_parted_where_processing_parts_it(step: str, tmp_path: Path) -> None:
    model = tied_model()
    model.save_pretrained(tmp_path / "tied")
    only: dict[str, Any] = {**dict.fromkeys(STEPS, False), step: True}
    parted = HookedTransformer.from_pretrained(tmp_path / "tied", **only)
    assert not parted.cfg.tie_word_embeddings
    torch.testing.assert_close(logits_of(parted).log_softmax(-1), logits_of(model).log_softmax(-1), rtol=0, atol=1e-10)
    parted.save_pretrained(tmp_path / "parted")
    assert json.loads((tmp_path / "parted" / "config.json").read_text())["config"]["tie_word_embeddings"] is False
    again = HookedTransformer.from_pretrained(tmp_path / "parted", **only)
    assert again.processed == (step,)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in parted.state_dict().items())
    torch.testing.assert_close(logits_of(again), logits_of(parted), rtol=0, atol=1e-13)


# State dicts


def test_a_state_dict_with_the_equal_unembedding_loads() -> None:
    model = tied_model()
    other = HookedTransformer(tiny_config(tie_word_embeddings=True, seed=5))
    other.load_state_dict({**model.state_dict(), "unembed.W_U": model.W_U.clone()})
    assert_tied(other)
    assert torch.equal(logits_of(other), logits_of(model))


def test_a_state_dict_with_another_unembedding_unties() -> None:
    other = tiny_model(seed=1)
    for state, strict in ((other.state_dict(), True), ({"unembed.W_U": other.W_U.detach()}, False)):
        model = tied_model()
        W_E = model.W_E.detach().clone()
        model.load_state_dict(state, strict=strict)
        assert not model.cfg.tie_word_embeddings
        assert torch.equal(model.W_U, other.W_U)
        assert torch.equal(model.W_E, other.W_E if strict else W_E)


def test_a_state_dict_without_the_embedding_says_that_it_is_missing() -> None:
    model = tied_model()
    state = {name: value for name, value in model.state_dict().items() if name != "embed.W_E"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"embed\.W_E"'):
        model.load_state_dict({**state, "unembed.W_U": model.W_U})
    model.load_state_dict({"unembed.W_U": model.W_U.clone()}, strict=False)
    assert_tied(model)


def test_an_untied_model_needs_an_unembedding_of_its_own() -> None:
    state = {name: value for name, value in tied_model().state_dict().items() if name != "unembed.W_U"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"unembed\.W_U"'):
        tiny_model().load_state_dict(state)
    model = tiny_model()
    model.load_state_dict(tied_model().state_dict())
    assert torch.equal(logits_of(model), logits_of(tied_model()))


# Asking for the parameter


def test_an_unembedding_that_is_asked_for_is_a_parameter_of_its_own_and_the_logits_stay() -> None:
    model = tied_model()
    before, twin = logits_of(model), copy.deepcopy(model)
    assert model.W_U.data_ptr() == model.W_E.data_ptr()
    W_U = model.unembed.W_U
    assert isinstance(W_U, torch.nn.Parameter)
    assert not model.cfg.tie_word_embeddings
    assert torch.equal(logits_of(model), before)
    with torch.no_grad():
        W_U[:, 5] = 0.0
    assert not torch.equal(model.W_E[5], torch.zeros(12))
    torch.testing.assert_close(logits_of(model)[..., 5], model.b_U[5].expand(2, 7), rtol=0, atol=0)
    assert_tied(twin)


def test_an_unembedding_can_be_assigned() -> None:
    model = tied_model()
    W_E, other = model.W_E.detach().clone(), torch.randn(12, 20, dtype=torch.float64)
    model.unembed.W_U = torch.nn.Parameter(other)
    assert torch.equal(model.W_U, other)
    assert torch.equal(model.W_E, W_E)
    with pytest.raises(TypeError, match="W_U is a parameter: assign"):
        tied_model().unembed.W_U = other


def test_an_optimizer_of_the_unembedding_moves_it_alone() -> None:
    model = tied_model()
    W_E = model.W_E.detach().clone()
    steps = torch.optim.SGD([model.unembed.W_U], lr=0.1)
    model(TOKENS, return_type="loss").backward()
    steps.step()
    assert torch.equal(model.W_E, W_E)
    assert not torch.equal(model.W_U, W_E.T)


def test_reading_the_model_leaves_the_embeddings_tied() -> None:
    model = tied_model()
    _, cache = model.run_with_cache(TOKENS)
    cache.logit_attrs(cache.decompose_resid(return_labels=False), TOKENS[:, -1])
    model.tokens_to_residual_directions(3)
    model.generate(TOKENS, 2, stop_at_eos=False, verbose=False)
    model.state_dict()
    assert_tied(model)


# Parting


@pytest.mark.parametrize("step", STEPS)
def test_a_step_parts_them_only_if_it_treats_them_differently(step: str) -> None:
    model = tied_model()
    before = logits_of(model)
    model._apply_step(step)
    if step in JOINING:
        assert_tied(model)
    else:
        assert not model.cfg.tie_word_embeddings
        assert "unembed.W_U" in dict(model.named_parameters())
        assert not torch.equal(model.W_U, model.W_E.T)
    torch.testing.assert_close(logits_of(model).log_softmax(-1), before.log_softmax(-1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("step", PARTING)
def test_the_pure_function_gives_the_untied_models_weights(step: str) -> None:
    model = tied_model()
    twin = untied_twin(model)
    cfg, state = weights.process(model.cfg, model.state_dict(), [step])
    expected_cfg, expected = weights.process(twin.cfg, twin.state_dict(), [step])
    assert cfg == expected_cfg
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert_tied(model)
    assert torch.equal(model.W_E, twin.W_E)


def test_untying_the_weights_of_some_blocks_adds_nothing_to_them() -> None:
    model = tied_model()
    part = {name: value for name, value in model.state_dict().items() if name.startswith("blocks.1.")}
    cfg, state = weights.untie(model.cfg, part)
    assert not cfg.tie_word_embeddings
    assert state.keys() == part.keys()


def test_all_processing_preserves_log_probabilities_and_leaves_a_model_that_trains() -> None:
    model = tied_model()
    before = logits_of(model).log_softmax(-1)
    model.process_weights_()
    torch.testing.assert_close(logits_of(model).log_softmax(-1), before, rtol=0, atol=1e-10)
    model(TOKENS, return_type="loss").backward()
    assert all(parameter.is_leaf and parameter.grad is not None for parameter in model.parameters())
    assert model.W_U.is_contiguous()


def test_a_parted_unembedding_is_frozen_where_the_embedding_was() -> None:
    model = tied_model()
    model.requires_grad_(False)
    model.center_unembed()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_after_parting_a_change_to_one_leaves_the_other() -> None:
    model = tied_model()
    model.center_unembed()
    kept = model.W_U.detach().clone()
    with torch.no_grad():
        model.W_E.add_(1.0)
    assert torch.equal(model.W_U, kept)
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin), logits_of(model))
