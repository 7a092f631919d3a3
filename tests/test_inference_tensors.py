"""Tensors made under `torch.inference_mode()`, used in runs that record gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import ActivationCache, HookedTransformer, Intervention
from tests.autograd_helpers import MASK, TOKENS, model_of

SITES = (
    "hook_embed",
    "blocks.1.hook_resid_pre",
    "blocks.1.ln1.hook_scale",
    "blocks.1.ln1.hook_normalized",
    "blocks.1.attn.hook_rot_q",
    "blocks.1.attn.hook_rot_k",
    "blocks.1.attn.hook_v",
    "blocks.1.attn.hook_attn_scores",
    "blocks.1.attn.hook_pattern",
    "blocks.1.attn.hook_z",
    "blocks.1.attn.hook_result",
    "blocks.1.hook_q_input",
    "blocks.1.mlp.hook_pre",
    "blocks.1.mlp.hook_post",
    "ln_final.hook_normalized",
    "unembed.hook_in",
)


def inference_cache(model: HookedTransformer, **options: Any) -> ActivationCache:
    with torch.inference_mode():
        return model.run_with_cache(TOKENS.flip(1), **options)[1]


def gradients(model: HookedTransformer, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros(()) if one is None else one for one in found]


@pytest.mark.parametrize(
    ("way", "site"),
    [
        (way, site)
        for way in ("cache", "dictionary", "product", "intervention")
        for site in SITES
        # minus infinity times minus infinity
        if (way, site) != ("product", "blocks.1.attn.hook_attn_scores")
    ],
)
def test_cached_activations_are_patched_into_a_run_with_gradients(site: str, way: str) -> None:
    model = model_of("rotary, grouped queries, gated")
    recorded = inference_cache(model, names_filter=site)
    raw = recorded.cache_dict[site]
    assert raw.is_inference()
    plain = torch.empty(raw.shape, dtype=raw.dtype).copy_(raw)

    def loss(value: Any) -> Tensor:
        if way == "intervention":
            return model.run(TOKENS, interventions=[Intervention(site, "replace", value())], return_type="loss")

        def patch(x: Tensor, hook: object) -> Tensor:
            return x * value() if way == "product" else value()

        return model.run_with_hooks(TOKENS, fwd_hooks=[(site, patch)], return_type="loss")

    found = gradients(model, loss((lambda: recorded[site]) if way in ("cache", "product") else (lambda: raw)))
    expected = gradients(model, loss(lambda: plain))
    assert any(bool(one.any()) for one in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_residual_tokens_and_a_mask_of_inference_mode_start_a_run() -> None:
    model = model_of("layer-norm")
    with torch.inference_mode():
        tokens, mask = TOKENS.clone(), MASK.clone()
        residual = model(tokens, stop_at_layer=1)
    assert tokens.is_inference()
    model(residual, start_at_layer=1, tokens=tokens, attention_mask=mask, return_type="loss").backward()
    model(tokens, attention_mask=mask, return_type="loss").backward()
    W_in = model.blocks[1].mlp.W_in
    assert W_in.grad is not None
    alone = model_of("layer-norm")
    given = model(TOKENS, stop_at_layer=1).detach()
    alone(given, start_at_layer=1, tokens=TOKENS, attention_mask=MASK, return_type="loss").backward()
    alone(TOKENS, attention_mask=MASK, return_type="loss").backward()
    torch.testing.assert_close(W_in.grad, alone.blocks[1].mlp.W_in.grad)


def test_the_methods_of_the_cache_run_with_gradients_on() -> None:
    model = model_of("layer-norm")
    cache, plain = inference_cache(model), model.run_with_cache(TOKENS.flip(1))[1]
    for read in (
        lambda one: one.stack_neuron_results(2),
        lambda one: one.stack_head_results(),
        lambda one: one.logit_attrs(one.decompose_resid(), TOKENS[:, -1]),
        lambda one: model.logits_of(one["resid_post", -1]),
    ):
        found = read(cache)
        torch.testing.assert_close(found, read(plain))
        found.sum().backward()


def test_an_entry_stays_one_tensor() -> None:
    model = model_of("layer-norm")
    cache = inference_cache(model)
    first = cache["resid_post", 0]
    assert not first.is_inference()
    assert cache["resid_post", 0] is first
    assert cache["resid_pre", 1].data_ptr() == first.data_ptr()
    assert cache["resid_mid", 0].data_ptr() != first.data_ptr()


@pytest.mark.parametrize("read", ["items", "values", "get"])
def test_every_way_of_reading_gives_tensors_that_autograd_can_save(read: str) -> None:
    model = model_of("layer-norm")
    cache = inference_cache(model)
    ways: dict[str, Any] = {
        "items": lambda: dict(cache.items()),
        "values": lambda: dict(zip(cache, cache.values(), strict=True)),
        "get": lambda: {name: cache.get(name) for name in cache},
    }
    found = ways[read]()
    assert not any(tensor.is_inference() for tensor in found.values())
    for name, tensor in found.items():
        assert tensor is cache[name]
    (found["blocks.0.hook_resid_post"] * torch.ones(16, dtype=torch.float64, requires_grad=True)).sum().backward()


def test_no_copy_is_made_where_no_gradient_is_recorded() -> None:
    cache = inference_cache(model_of("layer-norm"))
    with torch.no_grad():
        assert cache["resid_post", 0].is_inference()
    with torch.inference_mode():
        assert cache["resid_post", 0].is_inference()
