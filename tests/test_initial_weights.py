"""The draw of a new model's weights."""

from __future__ import annotations

import math

import pytest
import torch

from hooked_lm import HookedTransformer
from hooked_lm.config import INIT_MODES
from tests.helpers import tiny_config, tiny_tokens

# The draw of a new model's weights


def test_the_seed_leaves_torchs_global_generator_alone() -> None:
    before = torch.get_rng_state()
    HookedTransformer(tiny_config(seed=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("init_mode", INIT_MODES)
def test_the_same_seed_gives_the_same_model_and_another_seed_another(init_mode: str) -> None:
    one, same, other = (HookedTransformer(tiny_config(seed=seed, init_mode=init_mode)) for seed in (1, 1, 2))
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
        if ".W_" in name:
            assert not torch.equal(value, other.state_dict()[name])
    tokens = tiny_tokens()
    assert torch.equal(one(tokens), same(tokens))


def test_without_a_seed_the_global_generator_decides() -> None:
    models = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        models.append(HookedTransformer(tiny_config(seed=None)))
    assert torch.equal(models[0].W_E, models[1].W_E)
    assert not torch.equal(models[0].W_E, models[2].W_E)


def fans(name: str, value: torch.Tensor) -> tuple[int, int]:
    """Inputs and outputs a weight connects: the heads of a weight side by side."""
    if value.ndim == 3:
        return value.shape[1], value.shape[0] * value.shape[2]
    return value.shape[0], value.shape[1]


@pytest.mark.parametrize("init_mode", INIT_MODES)
@pytest.mark.parametrize("spread", [-1.0, 0.3])
def test_weights_have_the_spread_and_shape_of_their_init_mode(init_mode: str, spread: float) -> None:
    cfg = tiny_config(
        d_model=64, n_heads=4, d_vocab=200, n_ctx=50, n_layers=1, init_mode=init_mode, initializer_range=spread
    )
    gain = spread if spread > 0 else 0.1 if init_mode == "gpt2" else 1.0
    for name, value in HookedTransformer(cfg).named_parameters():
        kind = name.rpartition(".")[2]
        if not kind.startswith("W_"):
            assert torch.equal(value, torch.full_like(value, 1.0 if kind == "w" else 0.0)), name
            continue
        fan_in, fan_out = fans(name, value)
        expected = {
            "gpt2": gain,
            "xavier": gain * math.sqrt(2 / (fan_in + fan_out)),
            "kaiming": gain * math.sqrt(2 / fan_in),
        }
        std = expected[init_mode.split("_")[0]]
        assert abs(value.mean().item()) < 0.1 * std, name
        assert value.std().item() == pytest.approx(std, rel=0.05), name
        largest = value.abs().max().item() / std
        if init_mode.endswith("uniform"):
            assert 1.65 < largest <= math.sqrt(3), name
        else:
            assert largest > 2.5, name


def test_init_weights_false_draws_nothing() -> None:
    before = torch.get_rng_state()
    HookedTransformer(tiny_config(seed=None, init_weights=False))
    assert torch.equal(torch.get_rng_state(), before)
