"""Caches as people use them: detached by default, trained on, patched, plotted, copied; or with their graph."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from hooked_lm import ActivationCache
from tests.helpers import tiny_model, tiny_tokens

MODEL = tiny_model()
TOKENS = tiny_tokens()
SITE = "blocks.0.hook_resid_post"


def test_cached_activations_are_detached_and_have_the_runs_values() -> None:
    kept: dict[str, torch.Tensor] = {}

    def keep(x: torch.Tensor, hook: object) -> None:
        kept["x"] = x

    keep.reads_only = True  # type: ignore[attr-defined]
    with MODEL.hooks(fwd_hooks=[(SITE, keep)]):
        logits, cache = MODEL.run_with_cache(TOKENS, names_filter="*")
    assert logits.requires_grad
    assert kept["x"].requires_grad
    assert not any(tensor.requires_grad for tensor in cache.values())
    assert torch.equal(cache[SITE], kept["x"])
    # No copy: the entry is the run's own memory.
    assert cache[SITE].data_ptr() == kept["x"].data_ptr()


@pytest.mark.parametrize("writes_first", [False, True])
def test_a_hook_that_writes_later_does_not_reach_a_detached_entry(writes_first: bool) -> None:
    held: list[torch.Tensor] = []

    def write(x: torch.Tensor, hook: object) -> None:
        x.mul_(2)
        held.append(x)

    store: dict[str, torch.Tensor] = {}
    with MODEL.hooks(fwd_hooks=[(SITE, write)] if writes_first else []):
        _, fwd, _ = MODEL.get_caching_hooks(SITE, cache=store)
        with MODEL.hooks(fwd_hooks=[*fwd, *([] if writes_first else [(SITE, write)])]):
            MODEL(TOKENS)
    before = store[SITE].clone()
    with torch.no_grad():
        held[0].zero_()
    assert torch.equal(store[SITE], before)


def test_a_cache_with_its_graph_differentiates_to_the_weights_and_by_the_activation() -> None:
    logits, cache = MODEL.run_with_cache(TOKENS, names_filter=SITE, keep_graph=True)
    (by_site,) = torch.autograd.grad(logits.sum(), cache[SITE], retain_graph=True)
    (by_weights,) = torch.autograd.grad(cache[SITE], MODEL.embed.W_E, by_site, retain_graph=True)
    (whole,) = torch.autograd.grad(logits.sum(), MODEL.embed.W_E)
    torch.testing.assert_close(by_weights, whole, rtol=0, atol=1e-10)
    for other in ({"lazy": True}, {"offload": "cache.safetensors"}):
        with pytest.raises(ValueError, match="keep_graph"):
            MODEL.run_with_cache(TOKENS, keep_graph=True, **other)  # type: ignore[call-overload]


def test_gradients_are_recorded_beside_detached_activations() -> None:
    loss, cache = MODEL.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    clean, graph = MODEL.run_with_cache(TOKENS, return_type="loss", keep_graph=True)
    (wanted,) = torch.autograd.grad(clean, graph[SITE])
    assert not cache[SITE].requires_grad
    torch.testing.assert_close(cache[f"{SITE}_grad"], wanted, rtol=0, atol=1e-12)
    assert loss.item() == pytest.approx(clean.item(), abs=1e-12)
    MODEL.zero_grad()


def test_numpy_pandas_and_deepcopy_take_a_default_cache() -> None:
    _, cache = MODEL.run_with_cache(TOKENS)
    array = cache[SITE].numpy()
    assert isinstance(array, np.ndarray)
    frame = pd.DataFrame(cache["resid_post", 1][0].numpy())
    assert frame.shape == (7, 12)
    again = copy.deepcopy(cache)
    assert isinstance(again, ActivationCache)
    assert all(torch.equal(again[name], tensor) for name, tensor in cache.items())
    assert again[SITE].data_ptr() != cache[SITE].data_ptr()


def test_a_probe_on_cached_activations_trains_epoch_after_epoch_and_leaves_the_model_alone() -> None:
    _, cache = MODEL.run_with_cache(TOKENS)
    features, labels = cache[SITE].reshape(-1, 12), (TOKENS.reshape(-1) % 2).double()
    torch.manual_seed(0)
    probe = nn.Linear(12, 1).double()
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        loss = nn.functional.binary_cross_entropy_with_logits(probe(features)[:, 0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(weight.grad is None for weight in MODEL.parameters())


def test_an_autoencoder_and_a_tuned_lens_train_on_caches_without_no_grad() -> None:
    torch.manual_seed(0)
    autoencoder = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 12)).double()
    lens = nn.Linear(12, 12).double()
    optimizer = torch.optim.Adam([*autoencoder.parameters(), *lens.parameters()], lr=0.02)
    losses = []
    for _ in range(30):
        logits, cache = MODEL.run_with_cache(TOKENS)
        stream = cache[SITE]
        reconstruction = (autoencoder(stream) - stream).square().mean()
        lensed = MODEL.unembed(MODEL.ln_final(stream + lens(stream)))
        divergence = nn.functional.kl_div(
            lensed.log_softmax(-1), logits.detach().log_softmax(-1), log_target=True, reduction="batchmean"
        )
        optimizer.zero_grad()
        (reconstruction + divergence).backward()
        optimizer.step()
        losses.append((reconstruction + divergence).item())
    assert losses[-1] < losses[0] / 2
    MODEL.zero_grad()


def test_a_patched_value_leaks_no_gradient_into_the_run_that_it_came_from() -> None:
    model, other = tiny_model(), tiny_tokens(seed=3)
    _, clean = model.run_with_cache(TOKENS)

    def patch(x: torch.Tensor, hook: object) -> torch.Tensor:
        return clean[SITE]

    model.run_with_hooks(other, return_type="loss", fwd_hooks=[(SITE, patch)]).backward()
    # Everything before the patch is cut off; what comes after has gradients.
    assert model.embed.W_E.grad is None
    assert model.blocks[0].attn.W_Q.grad is None
    assert model.blocks[1].attn.W_Q.grad is not None
    assert float(model.blocks[1].attn.W_Q.grad.abs().sum()) > 0


def test_an_interchange_loss_trains_the_run_and_not_the_source() -> None:
    """Interchange intervention training (Geiger et al. 2022): the source's activation is a constant."""
    model = tiny_model()
    base, source = tiny_tokens(seed=4), tiny_tokens(seed=5)
    _, cache = model.run_with_cache(source, names_filter=SITE)

    def loss_of(value: torch.Tensor) -> torch.Tensor:
        def swap(x: torch.Tensor, hook: object) -> torch.Tensor:
            x[:, :, :6] = value[:, :, :6]
            return x

        logits = model.run_with_hooks(base, fwd_hooks=[(SITE, swap)])
        return logits.log_softmax(-1)[:, -1, 0].sum()

    loss_of(cache[SITE]).backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    loss_of(cache[SITE].clone().requires_grad_(False)).backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=0, atol=1e-12)
    _, with_graph = model.run_with_cache(source, names_filter=SITE, keep_graph=True)
    model.zero_grad()
    loss_of(with_graph[SITE]).backward()
    gradient = model.embed.W_E.grad
    assert gradient is not None
    assert not torch.allclose(found["embed.W_E"], gradient)


def test_a_cache_of_inference_mode_is_patched_into_a_plain_run() -> None:
    with torch.inference_mode():
        _, cache = MODEL.run_with_cache(TOKENS)
    loss = MODEL.run_with_hooks(TOKENS, return_type="loss", fwd_hooks=[(SITE, lambda x, hook: cache[SITE])])
    loss.backward()
    clean = MODEL(TOKENS, return_type="loss")
    assert loss.item() == pytest.approx(clean.item(), abs=1e-12)
    MODEL.zero_grad()


def test_forward_mode_and_torch_func_see_a_cached_activation_that_keeps_its_graph() -> None:
    weights = {name: weight.detach() for name, weight in MODEL.named_parameters()}

    class OfSite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = MODEL

        def forward(self, tokens: torch.Tensor, keep: bool) -> torch.Tensor:
            _, cache = self.model.run_with_cache(tokens, names_filter=SITE, keep_graph=keep)
            return cache[SITE].sum()

    module = OfSite()
    prefixed = {f"model.{name}": weight for name, weight in weights.items()}

    def score(given: dict[str, torch.Tensor], keep: bool) -> torch.Tensor:
        made: torch.Tensor = torch.func.functional_call(module, given, (TOKENS, keep), tie_weights=False)
        return made

    found = torch.func.grad(lambda given: score(given, True))(prefixed)["model.embed.W_E"]
    _, cache = MODEL.run_with_cache(TOKENS, names_filter=SITE, keep_graph=True)
    (wanted,) = torch.autograd.grad(cache[SITE].sum(), MODEL.embed.W_E)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    none = torch.func.grad(lambda given: score(given, False))(prefixed)["model.embed.W_E"]
    assert none.eq(0).all()
