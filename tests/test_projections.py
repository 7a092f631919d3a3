"""Queries, keys and values of checkpoints that keep all three in one matrix, whose views the weights then are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM

from hooked_lm import HookedTransformer
from tests.helpers import randomise_, tiny_tokens


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


def weights_of(model: HookedTransformer, layer: int = 0) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    attn = model.blocks[layer].attn
    return attn.W_Q, attn.W_K, attn.W_V


def test_a_fused_optimizer_does_what_a_plain_one_does_to_a_copied_model(gpt2_folder: Path) -> None:
    # As docs/checkpoints.md says: torch's kernel runs over memory, and a view's gaps are other weights.
    model = copy.deepcopy(HookedTransformer.from_pretrained_no_processing(gpt2_folder, dtype=torch.float32))
    plain = copy.deepcopy(model)
    for one, fused in ((model, True), (plain, False)):
        one(tiny_tokens(), return_type="loss").backward()
        torch.optim.AdamW(one.parameters(), lr=0.01, fused=fused).step()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


@torch.no_grad()
def test_views_of_one_matrix_compute_what_copies_do(model: HookedTransformer) -> None:
    torch.testing.assert_close(model(tiny_tokens()), copy.deepcopy(model)(tiny_tokens()), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("data", [False, True])
def test_an_edit_of_a_weight_counts_and_reaches_no_other(model: HookedTransformer, data: bool) -> None:
    before, others = model(tiny_tokens()), [weights_of(model)[place].clone() for place in (0, 2)]
    W_K = weights_of(model)[1]
    if data:
        W_K.data = 3 * W_K.data
    else:
        W_K[0] *= 3
    after = model(tiny_tokens())
    assert (before - after).abs().max() > 1e-3
    torch.testing.assert_close(after, copy.deepcopy(model)(tiny_tokens()), rtol=0, atol=1e-5)
    for kept, now in zip(others, (weights_of(model)[0], weights_of(model)[2]), strict=True):
        assert torch.equal(kept, now)


def test_weights_that_stand_in_for_parameters_are_used(model: HookedTransformer) -> None:
    tokens, name = tiny_tokens(), "blocks.0.attn.W_K"
    model.requires_grad_(False)
    other = torch.zeros_like(weights_of(model)[1])
    given = torch.func.functional_call(model, {name: other}, (tokens,))
    weights_of(model)[1].zero_()
    torch.testing.assert_close(given, model(tokens), rtol=0, atol=1e-5)
