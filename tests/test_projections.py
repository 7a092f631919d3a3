"""Queries, keys and values are one product where their weights are one matrix in memory, and the same as three."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM

from hooked_lm import HookedTransformer
from hooked_lm.components import attention
from hooked_lm.components.projections import as_one_matrix
from tests.helpers import randomise_, tiny_model, tiny_tokens


@pytest.fixture(scope="session")
def phi3_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with a tiny Phi-3, whose fused matrix has its rows one below the other, and grouped keys and values."""
    folder = tmp_path_factory.mktemp("phi3")
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    config = Phi3Config(
        vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=64, pad_token_id=0, **sizes
    )
    randomise_(Phi3ForCausalLM(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["gpt2_folder", "phi3_folder"])
def model(request: pytest.FixtureRequest) -> HookedTransformer:
    """A model whose checkpoint has queries, keys and values in one matrix: side by side, or one below the other."""
    folder = request.getfixturevalue(request.param)
    return HookedTransformer.from_pretrained_no_processing(folder, dtype=torch.float32)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The products by which queries, keys and values are made: for one of them or for all, and how wide."""
    made: list[tuple[str, int]] = []

    def seen(kind: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            made.append((kind, bias.numel()))
            return function(x, weight, bias)

        return call

    monkeypatch.setattr(attention, "project", seen("one", attention.project))
    monkeypatch.setattr(attention, "project_to_all", seen("all", attention.project_to_all))
    return made


def weights_of(model: HookedTransformer, layer: int = 0) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    attn = model.blocks[layer].attn
    return attn.W_Q, attn.W_K, attn.W_V


def side_by_side(*projections: Tensor) -> Tensor:
    return torch.cat([W.mT.flatten(0, 1) for W in projections])


# The matrix


@torch.no_grad()
def test_weights_of_a_loaded_model_are_one_matrix(model: HookedTransformer) -> None:
    for layer in range(model.cfg.n_layers):
        matrix = as_one_matrix(*weights_of(model, layer))
        assert matrix is not None
        assert torch.equal(matrix, side_by_side(*weights_of(model, layer)))


@torch.no_grad()
def test_the_matrix_is_the_weights_themselves(model: HookedTransformer) -> None:
    W_Q, W_K, W_V = weights_of(model)
    W_K[1] += 1.0
    W_V.data[0] = 2.0
    matrix = as_one_matrix(W_Q, W_K, W_V)
    assert matrix is not None
    assert torch.equal(matrix, side_by_side(W_Q, W_K, W_V))


@torch.no_grad()
def test_a_weight_that_has_gone_elsewhere_is_not_in_it(model: HookedTransformer) -> None:
    W_Q, W_K, W_V = weights_of(model)
    assert as_one_matrix(W_Q, W_V, W_K) is None  # another order
    assert as_one_matrix(W_Q, W_K, nn.Parameter(W_V.clone())) is None
    assert as_one_matrix(W_Q, W_K, W_V.detach()) is None  # stands in for a parameter
    W_K.data = W_K.data.clone()
    assert as_one_matrix(W_Q, W_K, W_V) is None


@torch.no_grad()
@pytest.mark.parametrize("elsewhere", [copy.deepcopy, lambda model: model.to(torch.float64), lambda _: tiny_model()])
def test_models_without_such_memory_have_no_such_matrix(model: HookedTransformer, elsewhere: Any) -> None:
    assert as_one_matrix(*weights_of(elsewhere(model))) is None


def test_weights_that_learn_are_apart(model: HookedTransformer) -> None:
    assert as_one_matrix(*weights_of(model)) is None
    model.requires_grad_(False)
    assert as_one_matrix(*weights_of(model)) is not None
    weights_of(model)[2].requires_grad_()
    assert as_one_matrix(*weights_of(model)) is None


@torch.no_grad()
def test_neighbours_by_chance_are_not_one_matrix() -> None:
    # One memory, which two tensors believe to end between them.
    memory = torch.zeros(2 * 3 * 4)
    bytes_apart = [memory[:12], memory[12:]]
    parts = [torch.frombuffer(one.numpy(), dtype=torch.float32).view(1, 4, 3).mT for one in bytes_apart]
    W_Q, W_K = (nn.Parameter(part.mT.mT) for part in parts)
    assert W_K.data_ptr() == W_Q.data_ptr() + 12 * 4
    assert as_one_matrix(W_Q, W_K) is None


def test_a_fused_optimizer_does_what_a_plain_one_does_to_a_copied_model(gpt2_folder: Path) -> None:
    # As docs/checkpoints.md says: torch's kernel runs over memory, and a view's gaps are other weights.
    model = copy.deepcopy(HookedTransformer.from_pretrained_no_processing(gpt2_folder, dtype=torch.float32))
    plain = copy.deepcopy(model)
    for one, fused in ((model, True), (plain, False)):
        one(tiny_tokens(), return_type="loss").backward()
        torch.optim.AdamW(one.parameters(), lr=0.01, fused=fused).step()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


# The product


@torch.no_grad()
def test_one_product_gives_what_three_give(model: HookedTransformer, products: list[tuple[str, int]]) -> None:
    together = model(tiny_tokens())
    heads, kv_heads = model.cfg.n_heads * model.cfg.d_head, model.cfg.n_kv_heads * model.cfg.d_head
    assert products == [("all", heads + 2 * kv_heads)] * model.cfg.n_layers
    products.clear()
    apart = copy.deepcopy(model)(tiny_tokens())
    assert products == [("one", heads), ("one", kv_heads), ("one", kv_heads)] * model.cfg.n_layers
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_edit_of_a_weight_counts(model: HookedTransformer, products: list[tuple[str, int]]) -> None:
    before = model(tiny_tokens())
    weights_of(model)[1].data[0] *= 3
    after = model(tiny_tokens())
    assert {kind for kind, _ in products} == {"all"}
    assert (before - after).abs().max() > 1e-3
    torch.testing.assert_close(after, copy.deepcopy(model)(tiny_tokens()), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["hook_q", "hook_k", "hook_v"])
@pytest.mark.parametrize("shape", [(2, 7), (1, 1)])
def test_a_listener_is_shown_a_tensor_of_its_own(
    model: HookedTransformer, products: list[tuple[str, int]], name: str, shape: tuple[int, int]
) -> None:
    _, cache = model.run_with_cache(tiny_tokens(*shape), names_filter=f"blocks.0.attn.{name}")
    shown = cache[f"blocks.0.attn.{name}"]
    assert shown.is_contiguous()
    assert shown.untyped_storage().nbytes() == shown.numel() * shown.element_size()
    assert [kind for kind, _ in products] == ["all"] * model.cfg.n_layers


@torch.no_grad()
def test_inputs_of_their_own_have_products_of_their_own(
    model: HookedTransformer, products: list[tuple[str, int]]
) -> None:
    def changed(q_input: Tensor, hook: Any) -> Tensor:
        return q_input + 1.0

    model.run_with_hooks(tiny_tokens(), fwd_hooks=[("blocks.0.hook_q_input", changed)])
    assert [kind for kind, _ in products] == ["one"] * 3 + ["all"] * (model.cfg.n_layers - 1)


def test_gradients_of_a_frozen_model_are_those_of_one_that_learns(model: HookedTransformer) -> None:
    def gradient() -> Tensor:
        entering: list[Tensor] = []

        def keep(stream: Tensor, hook: Any) -> Tensor:
            entering.append(stream.detach().requires_grad_())
            return entering[0]

        logits = model.run_with_hooks(tiny_tokens(), fwd_hooks=[("blocks.0.hook_resid_pre", keep)])
        (found,) = torch.autograd.grad(logits[0, -1, 3], entering)
        return found

    apart = gradient()
    model.requires_grad_(False)
    torch.testing.assert_close(gradient(), apart, rtol=0, atol=1e-5)


def test_weights_that_stand_in_for_parameters_are_used(model: HookedTransformer) -> None:
    tokens, name = tiny_tokens(), "blocks.0.attn.W_K"
    model.requires_grad_(False)
    other = torch.zeros_like(weights_of(model)[1])
    given = torch.func.functional_call(model, {name: other}, (tokens,))
    weights_of(model)[1].zero_()
    torch.testing.assert_close(given, model(tokens), rtol=0, atol=1e-5)
