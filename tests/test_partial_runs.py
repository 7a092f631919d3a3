"""Runs that start, or stop, part of the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.forward_helpers import EXACT, poison
from tests.helpers import tiny_model, tiny_tokens

# Starting and stopping part of the way


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("negative", [False, True])
def test_starting_at_a_layer_gives_the_full_run_and_skips_the_layers_before(
    monkeypatch: pytest.MonkeyPatch, layer: int, negative: bool
) -> None:
    model, tokens = tiny_model(n_layers=3), tiny_tokens()
    full, cache = model.run_with_cache(tokens)
    poison(monkeypatch, model.embed, model.pos_embed, *model.blocks[:layer])
    start = layer - 3 if negative else layer
    logits = model(cache["resid_pre", layer], start_at_layer=start)
    torch.testing.assert_close(logits, full, **EXACT)


@pytest.mark.parametrize("layer", range(3))
def test_hooks_of_skipped_layers_do_not_run(layer: int) -> None:
    model, tokens = tiny_model(n_layers=3), tiny_tokens()
    _, cache = model.run_with_cache(tokens)
    ran: list[int] = []
    with model.hooks(fwd_hooks=[("blocks.*.hook_resid_pre", lambda x, hook: ran.append(hook.layer()))]):
        model(cache["resid_pre", layer], start_at_layer=layer)
    assert ran == list(range(layer, 3))


@pytest.mark.parametrize("stop", [0, 1, 2, 3, -1, -2, -3])
def test_stopping_at_a_layer_returns_the_residual_before_it_and_skips_the_rest(
    monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    model, tokens = tiny_model(n_layers=3), tiny_tokens()
    _, cache = model.run_with_cache(tokens)
    layer = stop % 3 if stop < 0 else stop
    expected = cache["resid_post", 2] if layer == 3 else cache["resid_pre", layer]
    poison(monkeypatch, *model.blocks[layer:], model.ln_final, model.unembed)
    torch.testing.assert_close(model(tokens, stop_at_layer=stop), expected, **EXACT)


def test_stopping_at_layer_zero_gives_the_embeddings() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    expected = model.W_E[tokens] + model.W_pos[:7]
    torch.testing.assert_close(model(tokens, stop_at_layer=0), expected, **EXACT)


def test_stopping_works_without_a_return_type_too() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    torch.testing.assert_close(
        model(tokens, stop_at_layer=1, return_type=None), model(tokens, stop_at_layer=1), **EXACT
    )


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 2), (1, 2), (1, 3), (2, 2), (-2, -1), (-3, 3), (1, -1)])
def test_starting_and_stopping_go_together(monkeypatch: pytest.MonkeyPatch, start: int, stop: int) -> None:
    model, tokens = tiny_model(n_layers=3), tiny_tokens()
    _, cache = model.run_with_cache(tokens)
    stream = [cache["resid_pre", 0], cache["resid_post", 0], cache["resid_post", 1], cache["resid_post", 2]]
    first, last = start % 3, stop % 3 if stop < 0 else stop
    poison(monkeypatch, *model.blocks[:first], *model.blocks[last:])
    result = model(stream[first], start_at_layer=start, stop_at_layer=stop)
    torch.testing.assert_close(result, stream[last], **EXACT)


@pytest.mark.parametrize("start", [2, 3, -3, 100])
def test_starting_outside_the_model_raises(start: int) -> None:
    with pytest.raises(ValueError, match=f"start_at_layer {start} is out of range"):
        tiny_model()(torch.zeros(1, 3, 12, dtype=torch.float64), start_at_layer=start)


@pytest.mark.parametrize("stop", [3, -3, 100])
def test_stopping_outside_the_model_raises(stop: int) -> None:
    with pytest.raises(ValueError, match=f"stop_at_layer {stop} is out of range"):
        tiny_model()(tiny_tokens(), stop_at_layer=stop)


def test_stopping_before_the_start_raises() -> None:
    with pytest.raises(ValueError, match="stop_at_layer 0 comes before start_at_layer 1"):
        tiny_model()(torch.zeros(1, 3, 12, dtype=torch.float64), start_at_layer=1, stop_at_layer=0)


@pytest.mark.parametrize("return_type", ["loss", "both"])
def test_there_is_no_loss_when_stopping_early(return_type: Any) -> None:
    with pytest.raises(ValueError, match="stop_at_layer returns the residual stream"):
        tiny_model()(tiny_tokens(), stop_at_layer=1, return_type=return_type)


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_beside_a_residual_give_its_loss(batch: int) -> None:
    model, tokens = tiny_model(), tiny_tokens(batch)
    loss, cache = model.run_with_cache(tokens, return_type="loss")
    again = model(cache["resid_pre", 1], start_at_layer=1, tokens=tokens, return_type="loss")
    torch.testing.assert_close(again, loss, **EXACT)


def test_the_loss_of_a_residual_needs_its_tokens() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="needs tokens="):
        model(torch.zeros(1, 3, 12, dtype=torch.float64), start_at_layer=1, return_type="loss")


def test_the_mask_reaches_a_run_that_starts_half_way() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    full, cache = model.run_with_cache(tokens, attention_mask=mask)
    half = model(cache["resid_pre", 1], start_at_layer=1, attention_mask=mask)
    torch.testing.assert_close(half, full, **EXACT)
    assert (model(cache["resid_pre", 1], start_at_layer=1) - full)[0, 2:].abs().max() > 1e-3


def test_a_run_that_starts_half_way_leaves_the_residual_it_was_given() -> None:
    model = tiny_model()
    _, cache = model.run_with_cache(tiny_tokens())
    residual = cache["resid_pre", 1].detach().clone()
    before = residual.clone()

    def zero(x: Tensor, hook: object) -> None:
        x.zero_()

    with torch.no_grad():
        model.run_with_hooks(residual, start_at_layer=1, fwd_hooks=[("blocks.1.hook_resid_pre", zero)])
    assert torch.equal(residual, before)


def test_shortformer_positions_reach_a_run_that_starts_half_way() -> None:
    model, tokens = tiny_model(positional_embedding_type="shortformer"), tiny_tokens()
    full, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(model(cache["resid_pre", 1], start_at_layer=1), full, **EXACT)
