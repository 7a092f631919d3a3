"""What the tables of architectures cannot say of latent attention: its hook points by name, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hooked_lm import HookedTransformer, Intervention, circuits
from hooked_lm.components import LatentAttention
from hooked_lm.components.stock import not_stock
from hooked_lm.names import get_act_name
from hooked_lm.sweep.exactness import walking_obstacle
from tests.architectures_helpers import LATENT
from tests.helpers import tiny_model, tiny_tokens

KV = "blocks.0.attn.hook_latent_kv"


@pytest.fixture
def model() -> HookedTransformer:
    return tiny_model(**LATENT, normalization_type="RMS")


def test_the_sites_of_latents_have_short_names(model: HookedTransformer) -> None:
    names = {
        ("latent_kv", 0): KV,
        ("latent_q", 1): "blocks.1.attn.hook_latent_q",
        ("scale", 0, "attn.latent_kv_norm"): "blocks.0.attn.latent_kv_norm.hook_scale",
        ("normalized", 1, "attn.latent_q_norm"): "blocks.1.attn.latent_q_norm.hook_normalized",
    }
    _, cache = model.run_with_cache(tiny_tokens())
    for key, name in names.items():
        assert get_act_name(*key) == name
        assert cache[key] is cache[name]


@torch.no_grad()
def test_keys_and_values_are_what_the_latent_says(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(tiny_tokens())
    attn, latent = model.blocks[0].attn, cache["latent_kv", 0]
    assert isinstance(attn, LatentAttention)
    content = torch.einsum("bpc,hcd->bphd", latent, attn.W_UK)
    torch.testing.assert_close(cache["k", 0][..., 4:], content)
    torch.testing.assert_close(cache["v", 0], torch.einsum("bpc,hcd->bphd", latent, attn.W_UV))
    first, *others = cache["k", 0][..., :4].unbind(2)
    assert all(torch.equal(first, other) for other in others)


@torch.no_grad()
def test_a_zero_latent_leaves_nothing_in_the_values_and_only_rotating_keys(model: HookedTransformer) -> None:
    tokens = tiny_tokens()
    _, clean = model.run_with_cache(tokens)
    with model.intervening([Intervention(KV, "zero")]):
        _, cache = model.run_with_cache(tokens)
    assert not cache["v", 0].any()
    assert not cache["k", 0][..., 4:].any()
    assert torch.equal(cache["k", 0][..., :4], clean["k", 0][..., :4])


@torch.no_grad()
def test_a_dimension_of_the_latent_can_be_chosen(model: HookedTransformer) -> None:
    with model.intervening([Intervention(KV, "zero", pos=2, feature=3)]):
        _, cache = model.run_with_cache(tiny_tokens(), names_filter=KV)
    assert (cache[KV] == 0).nonzero()[:, 1:].unique(dim=0).tolist() == [[2, 3]]
    with pytest.raises(ValueError, match="feature"):
        model.run(tiny_tokens(), interventions=[Intervention(KV, "zero", feature=5)])


def test_values_and_z_have_their_own_width(model: HookedTransformer) -> None:
    for site in ("v", "z"):
        name = get_act_name(site, 0)
        model.run(tiny_tokens(), interventions=[Intervention(name, "zero", feature=2)])
        with pytest.raises(ValueError, match=r"feature 3: .* 0-2"):
            model.run(tiny_tokens(), interventions=[Intervention(name, "zero", feature=3)])
    model.run(tiny_tokens(), interventions=[Intervention(get_act_name("k", 0), "zero", feature=5)])


def test_latent_attention_is_a_stock_component_that_sweeps_walk(model: HookedTransformer) -> None:
    assert not_stock(model) is None
    assert walking_obstacle(model, ()) is None


def test_the_key_value_cache_holds_keys_and_values_of_each_head(model: HookedTransformer) -> None:
    cache = model.new_kv_cache(2)
    model(tiny_tokens(2, 5), past_kv_cache=cache)
    assert cache[0].past_keys.shape == (2, 5, 3, 6)
    assert cache[0].past_values.shape == (2, 5, 3, 3)


@pytest.mark.parametrize("name", ["W_Q", "W_K", "W_V", "b_V", "QK", "OV"])
def test_stacks_of_matrices_that_there_are_not_say_what_there_is(model: HookedTransformer, name: str) -> None:
    with pytest.raises(AttributeError, match=rf"no {name}: a norm stands between .* W_DKV, W_KR, W_UK, W_UV"):
        getattr(model, name)
    assert model.W_O.shape == (2, 3, 3, 12)


@pytest.mark.parametrize(
    "compute",
    [
        lambda model: circuits.full_qk_circuit(model, 0, 0),
        lambda model: circuits.full_ov_circuit(model, 0, 0),
        lambda model: circuits.circuit_vectors(model, 0, 0, "OV", n_vectors=2),
        lambda model: circuits.circuit_vectors(model, 0, 0, "QK", n_vectors=2),
        lambda model: circuits.SVDInterpreter(model).get_singular_vectors("OV", layer_index=0, head_index=0),
    ],
)
def test_a_circuit_of_matrices_is_refused(
    model: HookedTransformer, compute: Callable[[HookedTransformer], object]
) -> None:
    with pytest.raises(ValueError, match=r"reads? the stream by way of latents"):
        compute(model)


def test_inputs_of_each_head_without_the_shared_one_run_unless_hooks_look_at_the_latent(
    model: HookedTransformer,
) -> None:
    attn = model.blocks[0].attn
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    per_head = x[:, :, None].expand(-1, -1, 3, -1)
    torch.testing.assert_close(attn(per_head, per_head, per_head), attn(x, x, x))
    with (
        model.hooks(fwd_hooks=[(KV, lambda latent, hook: None)]),
        pytest.raises(ValueError, match=r"hook_latent_kv .* so they have 4 copies; got 3"),
    ):
        attn(per_head, per_head, per_head)
