"""Mixed precision: under autocast a hook may return floats of any dtype, and generation keeps a key-value cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, HookPoint, Intervention
from hooked_lm.patching import get_act_patch_resid_pre
from tests.helpers import tiny_model, tiny_tokens
from tests.hook_sites_helpers import ARCHITECTURES

LOW = (torch.bfloat16, torch.float16)
# Between them they have every kind of site.
SAMPLE = [
    *("gpt2", "grouped gated rms rotary", "shortformer", "alibi", "qk norm", "norms before and after", "solu_ln"),
    *("mixture", "soft caps"),
]
Hook = Callable[[Tensor, HookPoint], Tensor]


def model_of(name: str, dtype: torch.dtype = torch.float32) -> HookedTransformer:
    layers = {} if "attn_types" in ARCHITECTURES[name] else {"n_layers": 1}
    return tiny_model(**{"dtype": torch.float32, **ARCHITECTURES[name], **layers}).to(dtype)


def returning(dtype: torch.dtype, cast_back: bool = False) -> Hook:
    """A hook that doubles an activation and returns it in a dtype; or rounded to it, in the activation's own."""

    def double(value: Tensor, hook: HookPoint) -> Tensor:
        doubled = (2 * value).to(dtype)
        return doubled.to(value.dtype) if cast_back else doubled

    return double


def float_sites(model: HookedTransformer) -> list[str]:
    return [name for name, point in model.hook_dict.items() if point.differentiable]


@pytest.mark.parametrize("autocast", LOW, ids=str)
@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch, of a norm's gain
def test_a_hook_that_returns_another_float_goes_on_in_the_dtype_of_its_site(name: str, autocast: torch.dtype) -> None:
    model, tokens = model_of(name), tiny_tokens()
    for site in float_sites(model):
        with torch.autocast("cpu", autocast), torch.no_grad():
            for dtype in (
                torch.float64,
                torch.float32,
                torch.float16 if autocast == torch.bfloat16 else torch.bfloat16,
            ):
                cast_back, other = (
                    model.run_with_hooks(tokens, fwd_hooks=[(site, returning(dtype, back))]) for back in (True, False)
                )
                assert torch.equal(other, cast_back), (site, dtype)
                assert other.dtype == cast_back.dtype, (site, dtype)


@pytest.mark.parametrize("name", ["gpt2", "grouped gated rms rotary", "alibi", "mixture"])
def test_a_hook_in_low_precision_weights_may_return_single(name: str) -> None:
    model, tokens = model_of(name, torch.bfloat16), tiny_tokens()
    for site in float_sites(model):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            own, single = (
                model.run_with_hooks(tokens, fwd_hooks=[(site, returning(torch.float32, back))])
                for back in (True, False)
            )
        assert torch.equal(single, own), site


@pytest.mark.parametrize("autocast", LOW, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "grouped gated rms rotary", "qk norm", "mixture"])
def test_generation_with_the_cache_goes_on_in_the_precision_of_each_site(name: str, autocast: torch.dtype) -> None:
    model, tokens = model_of(name), tiny_tokens(pos=4)
    options = {"max_new_tokens": 2, "do_sample": False, "stop_at_eos": False, "verbose": False}
    for site in float_sites(model):
        with torch.autocast("cpu", autocast), model.hooks([(site, returning(torch.float64, cast_back=True))]):
            own = model.generate(tokens, **options)
        with torch.autocast("cpu", autocast), model.hooks([(site, returning(torch.float64))]):
            assert torch.equal(model.generate(tokens, **options), own), site


@pytest.mark.parametrize("autocast", LOW, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "grouped gated rms rotary"])
def test_cached_logits_are_near_the_uncached_under_autocast(name: str, autocast: torch.dtype) -> None:
    model, tokens = model_of(name), tiny_tokens()
    with torch.autocast("cpu", autocast), torch.no_grad():
        whole, cache = model(tokens), model.new_kv_cache(2)
        first = model(tokens[:, :4], past_kv_cache=cache)
        rest = model(tokens[:, 4:], past_kv_cache=cache)
    assert cache[0].past_values.dtype == autocast
    assert torch.allclose(torch.cat((first, rest), 1), whole, rtol=0, atol=0.05 * float(whole.abs().max()))


def test_a_cache_filled_in_single_goes_on_under_autocast_and_keeps_its_dtype() -> None:
    model, tokens = model_of("gpt2"), tiny_tokens()
    cache = model.new_kv_cache(2)
    with torch.no_grad():
        whole = model(tokens)[:, 4:]
        model(tokens[:, :4], past_kv_cache=cache)
        with torch.autocast("cpu", torch.bfloat16):
            rest = model(tokens[:, 4:], past_kv_cache=cache)
    assert cache[0].past_keys.dtype == torch.float32
    assert torch.allclose(rest.float(), whole, rtol=0, atol=0.1 * float(whole.abs().max()))


@pytest.mark.parametrize("name", ["gpt2", "grouped gated rms rotary", "mixture"])
def test_gradient_hooks_of_a_run_under_autocast_may_return_single_afterwards(name: str) -> None:
    model, tokens = model_of(name), tiny_tokens()

    def gradient_at_the_embedding(site: str, cast_back: bool) -> Tensor:
        model.zero_grad()
        with (
            model.hooks(bwd_hooks=[(site, returning(torch.float64, cast_back))]),
            torch.autocast("cpu", torch.bfloat16),
        ):
            loss = model(tokens, return_type="loss")
        loss.backward()
        gradient = model.embed.W_E.grad
        assert gradient is not None
        return gradient.clone()

    for site in float_sites(model):
        own = gradient_at_the_embedding(site, True)
        assert torch.equal(gradient_at_the_embedding(site, False), own), site


def test_outside_of_autocast_another_dtype_still_raises() -> None:
    model, tokens = model_of("gpt2"), tiny_tokens()
    with pytest.raises(ValueError, match=r"returned dtype torch\.float64, but the activation has dtype"):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_pre", returning(torch.float64))])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"returned dtype torch\.int64"):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: value.long())])


def test_a_residual_of_any_float_enters_under_autocast() -> None:
    model, tokens = model_of("gpt2"), tiny_tokens()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        residual = model(tokens, stop_at_layer=0)
        assert torch.equal(model(residual.double(), start_at_layer=0), model(residual, start_at_layer=0))


@pytest.mark.parametrize("autocast", LOW, ids=str)
def test_interventions_and_patches_from_a_run_in_single_act_under_autocast(autocast: torch.dtype) -> None:
    model, tokens, corrupted = model_of("gpt2"), tiny_tokens(), tiny_tokens(seed=1)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    for site in ("blocks.0.attn.hook_z", "blocks.0.mlp.hook_post", "blocks.0.attn.hook_v", "blocks.0.hook_mlp_out"):
        replaced = Intervention(site, "replace", value=cache[site])
        with torch.autocast("cpu", autocast), torch.no_grad():
            by_hook = model.run_with_hooks(corrupted, fwd_hooks=[(site, lambda value, hook: cache[hook.name])])
            assert torch.equal(model.run(corrupted, interventions=[replaced]), by_hook), site
    with torch.autocast("cpu", autocast):
        grid = get_act_patch_resid_pre(model, corrupted, cache, lambda logits: logits[0, -1, 3], verbose=False)
    exact = get_act_patch_resid_pre(model, corrupted, cache, lambda logits: logits[0, -1, 3], verbose=False)
    assert torch.allclose(grid.float(), exact, rtol=0, atol=0.1 * float(exact.abs().max()))
