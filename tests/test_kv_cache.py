"""The key-value cache: reading a sequence in pieces gives what reading it at once gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, HookedTransformerKeyValueCache, HookPoint
from hooked_lm.kv_cache import HookedTransformerKeyValueCacheEntry
from tests.helpers import tiny_model, tiny_tokens

EXACT: dict[str, float] = {"rtol": 0, "atol": 1e-10}
POSITIONS: dict[str, dict[str, Any]] = {
    "standard": {},
    "rotary": {"positional_embedding_type": "rotary", "rotary_dim": 2},
    "rotary, grouped": {
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": True,
        "n_heads": 4,
        "n_key_value_heads": 2,
        "d_head": 4,
        "use_qk_norm": True,
    },
    "alibi": {"positional_embedding_type": "alibi"},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "none": {"positional_embedding_type": "none"},
    "local": {"attn_types": ["local", "global"], "window_size": 3},
    "local alibi": {"positional_embedding_type": "alibi", "window_size": 3},
    "soft cap": {"attn_scores_soft_cap": 0.5},
}
every_position_type = pytest.mark.parametrize("name", POSITIONS)
TOKENS = tiny_tokens(2, 12)


def model_of(name: str = "rotary, grouped", **changes: Any) -> HookedTransformer:
    return tiny_model(**{**POSITIONS[name], **changes})


def read_in_pieces(
    model: HookedTransformer, tokens: Tensor, pieces: list[int], mask: Tensor | None = None
) -> tuple[Tensor, HookedTransformerKeyValueCache]:
    """The logits of all positions, and the cache, from reading so many tokens at a time."""
    cache = model.new_kv_cache(tokens.shape[0])
    masks = [None] * len(pieces) if mask is None else mask.split(pieces, 1)
    logits = [
        model(piece, past_kv_cache=cache, attention_mask=part)
        for piece, part in zip(tokens.split(pieces, 1), masks, strict=True)
    ]
    return torch.cat(logits, 1), cache


def state_of(cache: HookedTransformerKeyValueCache) -> list[Tensor]:
    entries = [tensor.detach().clone() for entry in cache for tensor in (entry.past_keys, entry.past_values)]
    return [*entries, cache.previous_attention_mask.clone()]


def assert_same_state(cache: HookedTransformerKeyValueCache, before: list[Tensor]) -> None:
    now = state_of(cache)
    assert [tensor.shape for tensor in now] == [tensor.shape for tensor in before]
    assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


# Cached equals uncached


@every_position_type
@pytest.mark.parametrize("pieces", [[5, 7], [1] * 12, [3, 1, 6, 2]], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_reading_in_pieces_gives_the_logits_of_reading_at_once(name: str, pieces: list[int], grad: bool) -> None:
    model = model_of(name)
    with torch.set_grad_enabled(grad):
        logits, cache = read_in_pieces(model, TOKENS, pieces)
        torch.testing.assert_close(logits, model(TOKENS), **EXACT)
    assert cache.length == 12


@every_position_type
@pytest.mark.parametrize("side", ["left", "right"])
def test_reading_in_pieces_gives_the_logits_of_reading_at_once_with_padding_too(name: str, side: str) -> None:
    model = model_of(name)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, slice(0, 3) if side == "left" else slice(5, 8)] = 0
    tokens, more = TOKENS[:, :8], TOKENS[:, 8:11]
    whole_mask = torch.cat((mask, torch.ones_like(more)), 1)
    with torch.no_grad():
        expected = model(torch.cat((tokens, more), 1), attention_mask=whole_mask)
        real = whole_mask.bool()
        for pieces in ([8, 3], [8, 1, 2], [4, 4, 3]):
            logits, cache = read_in_pieces(model, torch.cat((tokens, more), 1), pieces, whole_mask)
            torch.testing.assert_close(logits[real], expected[real], **EXACT)
            assert torch.equal(cache.previous_attention_mask, whole_mask)
        # Without a mask for what comes after, it all counts as real.
        cache = model.new_kv_cache(2)
        model(tokens, past_kv_cache=cache, attention_mask=mask)
        torch.testing.assert_close(model(more, past_kv_cache=cache), expected[:, 8:], **EXACT)


@every_position_type
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_prompt_goes_on_as_it_would_alone(name: str, side: str) -> None:
    model = model_of(name)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, slice(0, 3) if side == "left" else slice(5, 8)] = 0
    tokens, more = TOKENS[:, :8], TOKENS[:, 8:11]
    with torch.no_grad():
        cache = model.new_kv_cache(2)
        model(tokens, past_kv_cache=cache, attention_mask=mask)
        logits = model(more, past_kv_cache=cache)
        for row in range(2):
            alone = model(torch.cat((tokens[row][mask[row].bool()], more[row]))[None])
            torch.testing.assert_close(logits[row], alone[0, -3:], **EXACT)


@every_position_type
def test_every_activation_of_the_new_positions_is_as_in_the_whole_run(name: str) -> None:
    model = model_of(name)
    with torch.no_grad():
        _, whole = model.run_with_cache(TOKENS, names_filter="*")
        cache = model.new_kv_cache(2)
        model(TOKENS[:, :8], past_kv_cache=cache)
        _, part = model.run_with_cache(TOKENS[:, 8:], past_kv_cache=cache, names_filter="*")
    for site, tensor in part.items():
        is_pattern = site.endswith(("hook_attn_scores", "hook_pattern"))
        expected = whole[site][:, :, 8:] if is_pattern else whole[site][:, 8:]
        torch.testing.assert_close(tensor, expected, **EXACT, msg=site)
        if is_pattern:
            assert tensor.shape[-2:] == (4, 12)


def test_a_residual_can_be_read_on_from_a_layer() -> None:
    model = model_of("rotary")
    with torch.no_grad():
        _, whole = model.run_with_cache(TOKENS)
        cache = model.new_kv_cache(2)
        model(TOKENS[:, :8], past_kv_cache=cache)
        logits = model(whole["resid_pre", 0][:, 8:], start_at_layer=0, past_kv_cache=cache)
        torch.testing.assert_close(logits, whole["unembed.hook_out"][:, 8:], **EXACT)


def test_gradients_flow_through_what_was_cached() -> None:
    model = model_of("rotary")
    expected = torch.autograd.grad(model(TOKENS)[:, -1].square().sum(), model.W_E)[0]
    logits, _ = read_in_pieces(model, TOKENS, [5, 6, 1])
    got = torch.autograd.grad(logits[:, -1].square().sum(), model.W_E)[0]
    torch.testing.assert_close(got, expected, **EXACT)


def test_a_cache_begun_with_gradients_goes_on_without_them_and_the_other_way_round() -> None:
    model = model_of("rotary")
    expected = model(TOKENS)
    for first, second in ((True, False), (False, True)):
        cache = model.new_kv_cache(2)
        with torch.set_grad_enabled(first):
            model(TOKENS[:, :5], past_kv_cache=cache)
        with torch.set_grad_enabled(second):
            torch.testing.assert_close(model(TOKENS[:, 5:9], past_kv_cache=cache), expected[:, 5:9], **EXACT)
        with torch.set_grad_enabled(first):
            torch.testing.assert_close(model(TOKENS[:, 9:], past_kv_cache=cache), expected[:, 9:], **EXACT)


def test_a_generation_makes_room_for_all_its_positions_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def grow(entry: HookedTransformerKeyValueCacheEntry, capacity: int) -> None:
        raise AssertionError(f"had to grow to {capacity}")

    monkeypatch.setattr(HookedTransformerKeyValueCacheEntry, "_grow", grow)
    model = model_of()
    model.generate(TOKENS, max_new_tokens=5, stop_at_eos=False, verbose=False)
    cache = model.new_kv_cache(2, capacity=TOKENS.shape[1])
    assert cache.length == 0
    assert cache[0].past_keys.shape[1] == 0
    with torch.no_grad():
        model(TOKENS, past_kv_cache=cache)
        with pytest.raises(AssertionError, match="had to grow to"):
            model(TOKENS[:, :1], past_kv_cache=cache)


def test_the_buffers_grow_past_their_first_size() -> None:
    model = model_of("rotary", n_ctx=200)
    tokens = tiny_tokens(1, 150)
    with torch.no_grad():
        logits, cache = read_in_pieces(model, tokens, [60, 3, 1, 1, 65, 20])
        torch.testing.assert_close(logits, model(tokens), **EXACT)
    assert cache.length == 150


# What is stored


@every_position_type
@pytest.mark.parametrize("grad", [False, True])
def test_entries_hold_the_keys_and_values_that_attention_uses(name: str, grad: bool) -> None:
    model = model_of(name)
    cfg = model.cfg
    with torch.set_grad_enabled(grad):
        _, activations = model.run_with_cache(TOKENS)
        _, cache = read_in_pieces(model, TOKENS, [5, 7])
    assert isinstance(cache, HookedTransformerKeyValueCache)
    assert len(cache) == len(cache.entries) == cfg.n_layers
    for layer in range(cfg.n_layers):
        entry = cache[layer]
        assert entry is cache.entries[layer]
        assert entry.past_keys.shape == entry.past_values.shape == (2, 12, cfg.n_kv_heads, cfg.d_head)
        keys = "rot_k" if cfg.positional_embedding_type == "rotary" else "k"
        torch.testing.assert_close(entry.past_keys, activations[keys, layer], **EXACT)
        torch.testing.assert_close(entry.past_values, activations["v", layer], **EXACT)


def test_an_empty_cache_fits_its_config() -> None:
    model = model_of()
    cache = HookedTransformerKeyValueCache.init_cache(model.cfg, "cpu", batch_size=3)
    assert (cache.length, cache.batch_size, len(cache), cache.frozen) == (0, 3, 2, False)
    for entry in cache:
        assert entry.past_keys.shape == (3, 0, 2, 4)
        assert entry.past_keys.dtype == torch.float64
    assert cache.previous_attention_mask.shape == (3, 0)
    assert HookedTransformerKeyValueCache.init_cache(model.cfg, None).batch_size == 1


def test_the_mask_of_past_and_new_positions_is_kept_together() -> None:
    cache = model_of().new_kv_cache(2)
    first = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert torch.equal(cache.append_attention_mask(first), first)
    second = torch.tensor([[1], [0]])
    both = torch.cat((first, second), 1)
    assert torch.equal(cache.append_attention_mask(second), both)
    assert torch.equal(cache.previous_attention_mask, both)
    cache.freeze()
    assert cache.append_attention_mask(second).shape == (2, 5)
    assert torch.equal(cache.previous_attention_mask, both)


@pytest.mark.parametrize("grad", [False, True])
def test_a_frozen_cache_is_used_and_not_extended(grad: bool) -> None:
    model = model_of()
    with torch.set_grad_enabled(grad):
        expected = model(TOKENS)
        cache = model.new_kv_cache(2)
        model(TOKENS[:, :6], past_kv_cache=cache)
        before = state_of(cache)
        cache.freeze()
        assert cache.frozen
        for _ in range(2):
            torch.testing.assert_close(model(TOKENS[:, 6:9], past_kv_cache=cache), expected[:, 6:9], **EXACT)
            assert_same_state(cache, before)
        model(tiny_tokens(2, 4, seed=8), past_kv_cache=cache)
        assert_same_state(cache, before)
        cache.unfreeze()
        assert not cache.frozen
        torch.testing.assert_close(model(TOKENS[:, 6:], past_kv_cache=cache), expected[:, 6:], **EXACT)
    assert cache.length == 12
    assert cache[1].past_keys.shape[1] == 12


@pytest.mark.parametrize("grad", [False, True])
def test_a_run_that_raises_leaves_the_cache_as_it_was(grad: bool) -> None:
    model = model_of()

    def fail(x: Tensor, hook: HookPoint) -> None:
        raise KeyboardInterrupt("stopped half-way")

    with torch.set_grad_enabled(grad):
        cache = model.new_kv_cache(2)
        for done in (0, 6):
            before = state_of(cache)
            for site in ("blocks.0.attn.hook_k", "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"):
                with pytest.raises(KeyboardInterrupt, match="stopped half-way"):
                    model.run_with_hooks(TOKENS[:, done : done + 3], past_kv_cache=cache, fwd_hooks=[(site, fail)])
                assert_same_state(cache, before)
            with pytest.raises(ValueError, match="positions are more than"):
                model(tiny_tokens(2, 17), past_kv_cache=cache)
            with pytest.raises(ValueError, match="token 20 is out of range"):
                model(torch.full((2, 1), 20), past_kv_cache=cache)
            assert_same_state(cache, before)
            if not done:
                model(TOKENS[:, :6], past_kv_cache=cache)
        torch.testing.assert_close(model(TOKENS[:, 6:], past_kv_cache=cache), model(TOKENS)[:, 6:], **EXACT)


@pytest.mark.parametrize("site", ["ln_final.hook_normalized", "unembed.hook_in", "unembed.hook_out"])
def test_a_run_that_raises_after_the_last_block_leaves_the_cache_as_it_was(site: str) -> None:
    model = model_of()
    cache = model.new_kv_cache(2)
    with torch.no_grad():
        model(TOKENS[:, :6], past_kv_cache=cache)
        before = state_of(cache)
        with pytest.raises(ValueError, match=f"the hook at '{site}' returned shape"):
            model.run_with_hooks(TOKENS[:, 6:], past_kv_cache=cache, fwd_hooks=[(site, lambda x, hook: x[..., :1])])
        assert_same_state(cache, before)
        with pytest.raises(ValueError, match="logits_to_keep is 1-6"):
            model(TOKENS[:, 6:], past_kv_cache=cache, logits_to_keep=7)
        assert_same_state(cache, before)


def test_a_cache_that_does_not_fit_the_input_raises() -> None:
    model = model_of()
    with pytest.raises(ValueError, match=r"the key-value cache is for 2 layers and batch 3; .* the input batch 2"):
        model(TOKENS, past_kv_cache=model.new_kv_cache(3))
    other = tiny_model(n_layers=1)
    with pytest.raises(ValueError, match="the key-value cache is for 1 layers and batch 2; the model has 2 layers"):
        model(TOKENS, past_kv_cache=other.new_kv_cache(2))
    entry = model.new_kv_cache(2)[0]
    for keys in (torch.zeros(3, 1, 2, 4).double(), torch.zeros(2, 1, 2, 4)):
        with pytest.raises(ValueError, match=r"the key-value cache holds batch 2, torch.float64 on cpu; got batch"):
            entry.append(keys, keys)


def test_rewinding_forgets_the_last_positions() -> None:
    model = model_of()
    with torch.no_grad():
        expected = model(TOKENS)
        cache = model.new_kv_cache(2)
        model(TOKENS[:, :6], past_kv_cache=cache)
        model(tiny_tokens(2, 4, seed=8), past_kv_cache=cache)
        cache.rewind(6)
        assert cache.length == 6
        torch.testing.assert_close(model(TOKENS[:, 6:], past_kv_cache=cache), expected[:, 6:], **EXACT)


@pytest.mark.parametrize("options", [{"stop_at_layer": 1}, {"stop_at_layer": 0}])
def test_a_run_that_would_leave_layers_without_keys_is_refused(options: dict[str, int]) -> None:
    model = model_of("rotary")
    cache = model.new_kv_cache(2)
    with pytest.raises(ValueError, match="needs every layer"):
        model(TOKENS[:, :4], past_kv_cache=cache, **options)
    assert cache.length == 0


def test_a_bidirectional_model_refuses_a_cache() -> None:
    model = model_of("rotary", attention_dir="bidirectional")
    with pytest.raises(ValueError, match="earlier positions attend to later ones"):
        model(TOKENS[:, :4], past_kv_cache=model.new_kv_cache(2))


def test_a_block_goes_on_after_what_it_has_read_without_being_told_where() -> None:
    model = model_of("rotary")
    residual = model(TOKENS, stop_at_layer=0)
    whole = model.blocks[0](residual)
    entry = model.new_kv_cache(2)[0]
    pieces = [model.blocks[0](residual[:, part], past=entry) for part in (slice(5), slice(5, None))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)


# What the buffers hold, and who may write to them


@pytest.mark.parametrize("learned", ["W_V", "b_V", "W_K"])
def test_a_prompt_read_in_pieces_has_the_gradients_of_one_read_at_once(learned: str) -> None:
    model = model_of("standard").requires_grad_(False)
    parameter = getattr(model.blocks[-1].attn, learned).requires_grad_()
    (expected,) = torch.autograd.grad(model(TOKENS).square().sum(), parameter)
    logits, _ = read_in_pieces(model, TOKENS, [5, 4, 3])
    (found,) = torch.autograd.grad(logits.square().sum(), parameter)
    torch.testing.assert_close(found, expected, **EXACT)


def test_what_a_graph_holds_is_not_written_to() -> None:
    model = model_of()
    cache = model.new_kv_cache(2)
    logits = model(TOKENS[:, :6], past_kv_cache=cache)
    with torch.no_grad():
        cache.rewind(3)
        going_on = model(TOKENS[:, 3:6], past_kv_cache=cache)
    torch.testing.assert_close(going_on, logits[:, 3:], **EXACT)
    logits.sum().backward()  # raises if the keys of the first run are not there any more
    assert model.blocks[0].attn.W_K.grad is not None


@pytest.mark.parametrize("gradients", [True, False])
def test_a_cache_made_under_inference_mode_goes_on_outside(gradients: bool) -> None:
    model = model_of()
    with torch.inference_mode():
        cache = model.new_kv_cache(2, capacity=12)
        model(TOKENS[:, :6], past_kv_cache=cache)
    with torch.set_grad_enabled(gradients):
        logits = model(TOKENS[:, 6:], past_kv_cache=cache)
    torch.testing.assert_close(logits.detach(), model(TOKENS)[:, 6:].detach(), **EXACT)


@torch.no_grad()
def test_a_buffer_that_is_full_doubles() -> None:
    model = model_of(n_ctx=200)
    cache = model.new_kv_cache(1, capacity=100)
    made = set()
    for token in tiny_tokens(1, 200).unbind(1):
        model(token[:, None], past_kv_cache=cache)
        made.add(cache[0].past_keys.untyped_storage().nbytes() // cache[0].past_keys[:, :1].nbytes)
    assert made == {100, 200}


def test_a_cache_is_not_rewound_below_nothing() -> None:
    cache = model_of().new_kv_cache(2)
    with pytest.raises(ValueError, match="not negative; got -2"):
        cache.rewind(-2)
