"""A lazy cache is the full cache of the same run, whatever changed that run, and holds one residual per layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import ActivationCache, HookedTransformer, HookPoint, UnknownHookError
from hooked_lm.components import TransformerBlock, Unembed
from hooked_lm.interventions import Intervention
from hooked_lm.names import get_act_name
from tests.helpers import tiny_model, tiny_tokenizer
from tests.hook_sites_helpers import ARCHITECTURES
from tests.lazy_cache_helpers import TOKENS, assert_same, both


@pytest.fixture
def model() -> HookedTransformer:
    return tiny_model()


# Names and values


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_the_names_and_values_of_its_full_cache(architecture: str) -> None:
    full, lazy = both(tiny_model(**ARCHITECTURES[architecture]), TOKENS)
    assert_same(lazy, full)
    assert set(dict(lazy.items())) == set(full)
    for name, value in lazy.items():
        torch.testing.assert_close(value, full[name].detach(), rtol=0, atol=1e-10)
    assert len(list(lazy.values())) == len(full)


EDITED = ("gpt2", "grouped gated rms rotary", "shortformer", "sinks, mixture with a limit", "norms before and after")


@pytest.mark.parametrize("architecture", EDITED)
def test_whatever_a_hook_does_at_any_site_is_in_the_lazy_cache_and_is_not_done_again(architecture: str) -> None:
    model = tiny_model(**ARCHITECTURES[architecture])
    for site in [name for name, point in model.hook_dict.items() if point.differentiable]:
        calls = []

        def disturb(x: Tensor, hook: HookPoint, calls: list[str] = calls) -> Tensor:
            calls.append(hook.name)
            return x + 0.1 * torch.randn(x.shape, dtype=x.dtype)  # another time it would be something else

        with model.hooks(fwd_hooks=[(site, disturb)]):
            full, lazy = both(model, TOKENS)
            made = len(calls)
            found = dict(lazy.items())
        assert len(calls) == made
        assert set(found) == set(full)
        for name, expected in full.items():
            torch.testing.assert_close(found[name], expected.detach(), rtol=0, atol=1e-10)


def test_an_edit_in_place_of_the_stream_that_enters_a_block_is_not_what_left_the_last(
    model: HookedTransformer,
) -> None:
    def zero(x: Tensor, hook: HookPoint) -> None:
        x.zero_()

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", zero)]):
        full, lazy = both(model, TOKENS)
    assert not lazy["resid_pre", 1].any()
    assert lazy["resid_post", 0].any()
    assert_same(lazy, full)


def test_interventions_are_in_it(model: HookedTransformer) -> None:
    silenced = Intervention(get_act_name("pattern", 0), "zero", head=1)
    edits = [silenced, Intervention(get_act_name("mlp_out", 1), "scale", 3.0, pos=2)]
    with model.intervening(edits):
        full, lazy = both(model, TOKENS)
    assert_same(lazy, full)
    assert not lazy["pattern", 0][:, 1].any()


def test_tokens_changed_by_a_hook_are_those_of_the_run(model: HookedTransformer) -> None:
    with model.hooks(fwd_hooks=[("hook_tokens", lambda tokens, hook: (tokens + 1) % 20)]):
        full, lazy = both(model, TOKENS, names_filter="*")
    assert_same(lazy, full)
    assert torch.equal(lazy["hook_tokens"], (TOKENS + 1) % 20)


@pytest.mark.parametrize(
    "options",
    [
        {"names_filter": "blocks.*.attn.hook_pattern"},
        {"names_filter": ["blocks.1.attn.hook_result", "hook_embed"]},
        {"names_filter": lambda name: name.endswith(("hook_q_input", "hook_attn_in"))},
        {"pos_slice": -1},
        {"pos_slice": (1, 4)},
        {"stop_at_layer": 1},
        {"stop_at_layer": 0},
        {"stop_at_layer": 1, "names_filter": "*resid_post"},
        {"return_type": "loss"},
        {"return_type": None},
        {"logits_to_keep": 2},
        {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])},
        {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])},
        {"device": "cpu"},
    ],
    ids=lambda options: " ".join(options),
)
def test_options_are_those_of_the_full_cache(model: HookedTransformer, options: dict[str, Any]) -> None:
    full, lazy = both(model, TOKENS, **options)
    assert_same(lazy, full)


@pytest.mark.parametrize("architecture", ["gpt2", "shortformer"])
@pytest.mark.parametrize("options", [{"start_at_layer": 1}, {"start_at_layer": 1, "stop_at_layer": 1}])
def test_a_run_that_begins_with_a_residual(architecture: str, options: dict[str, Any]) -> None:
    model = tiny_model(**ARCHITECTURES[architecture])
    residual = model(TOKENS, stop_at_layer=1).detach()
    options = {**options, "tokens": TOKENS, "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7])}
    if "stop_at_layer" in options:
        with pytest.raises(RuntimeError, match="the model did not compute that activation"):
            model.run_with_cache(residual, lazy=True, names_filter="hook_embed", **options)
        if architecture == "gpt2":  # nothing at all is computed
            return
    full, lazy = both(model, residual, **options)
    assert_same(lazy, full)
    residual.zero_()
    assert_same(lazy, full)


def test_strings_of_several_lengths_are_padded_as_in_the_run() -> None:
    model = tiny_model(d_vocab=300)
    model.set_tokenizer(tiny_tokenizer())
    for side in ("left", "right"):
        assert_same(*reversed(both(model, ["the cat", "a"], padding_side=side)))


def test_without_the_batch_axis(model: HookedTransformer) -> None:
    full, lazy = both(model, TOKENS[:1], remove_batch_dim=True)
    assert not lazy.has_batch_dim
    assert_same(lazy, full)
    _, later = model.run_with_cache(TOKENS[:1], lazy=True)
    assert_same(later.remove_batch_dim(), full)
    _, two = model.run_with_cache(TOKENS, lazy=True)
    with pytest.raises(ValueError, match="batch axis can go only when it is 1"):
        two.remove_batch_dim()
    # What cannot be is said in the run, as by a full cache.
    with pytest.raises(ValueError, match="remove_batch_dim needs a batch of 1"):
        model.run_with_cache(TOKENS, lazy=True, remove_batch_dim=True)
    with pytest.raises(IndexError):
        model.run_with_cache(TOKENS, lazy=True, pos_slice=50)


# Methods


def test_the_methods_are_those_of_the_full_cache(model: HookedTransformer, tmp_path: Path) -> None:
    full, lazy = both(model, TOKENS)
    for method, options in (
        ("accumulated_resid", {"incl_mid": True, "apply_ln": True}),
        ("decompose_resid", {"apply_ln": True, "pos_slice": -1}),
        ("stack_head_results", {"incl_remainder": True}),
        ("get_full_resid_decomposition", {"expand_neurons": True}),
        ("stack_activation", {"activation_name": "z"}),
    ):
        expected = getattr(full, method)(**options)
        torch.testing.assert_close(getattr(lazy, method)(**options), expected, rtol=0, atol=1e-10)
    stack = full.decompose_resid(pos_slice=-1)
    torch.testing.assert_close(
        lazy.logit_attrs(stack, TOKENS[:, 0], pos_slice=-1), full.logit_attrs(stack, TOKENS[:, 0], pos_slice=-1)
    )
    for cache in (full, lazy):
        cache.compute_head_results()
    assert_same(lazy, full)
    assert_same(lazy.apply_slice_to_batch_dim(1), full.apply_slice_to_batch_dim(1))
    lazy.save(tmp_path / "cache.safetensors")
    assert_same(ActivationCache.load(tmp_path / "cache.safetensors", model), full)
    assert_same(lazy.to("cpu"), full)


def test_a_lazy_cache_moves_what_it_keeps(model: HookedTransformer) -> None:
    _, lazy = model.run_with_cache(TOKENS, lazy=True)
    lazy.prefetch("blocks.0.attn.hook_z")
    moved = lazy.to("meta")
    assert all(x.is_meta for x in moved.cache_dict.kept())  # type: ignore[attr-defined]
    assert moved["z", 0].is_meta
    assert moved["resid_pre", 1].is_meta


def test_a_lazy_cache_moves_with_its_model(model: HookedTransformer) -> None:
    _, lazy = model.run_with_cache(TOKENS, lazy=True)
    assert lazy.to("meta", move_model=True)["q", 1].is_meta
    assert model.W_E.is_meta


def test_names_and_values_are_in_one_order(model: HookedTransformer) -> None:
    full, lazy = both(model, TOKENS)
    for cache in (full, lazy):
        cache.compute_head_results()
    for name, value in zip(lazy.keys(), lazy.values(), strict=True):
        torch.testing.assert_close(value, full[name].detach(), rtol=0, atol=1e-10)
    assert [name for name, _ in lazy.items()] == list(lazy)


# What it costs


def test_it_holds_one_residual_per_layer(model: HookedTransformer) -> None:
    _, lazy = model.run_with_cache(TOKENS, lazy=True)
    _, full = model.run_with_cache(TOKENS)
    residual = full["resid_pre", 0]
    assert lazy.nbytes == (model.cfg.n_layers + 1) * residual.nbytes
    assert full.nbytes > 10 * lazy.nbytes
    before = lazy.nbytes
    for name in lazy:
        lazy[name]
    assert lazy.nbytes == before


def test_a_read_runs_one_block_and_a_whole_pass_each_block_once(
    model: HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lazy = model.run_with_cache(TOKENS, lazy=True)
    ran = []
    forward = TransformerBlock.forward

    def counting(block: TransformerBlock, *args: Any) -> Tensor:
        ran.append(block)
        return forward(block, *args)

    counting.keeps_stages = True  # type: ignore[attr-defined]
    monkeypatch.setattr(TransformerBlock, "forward", counting)
    lazy["pattern", 1]
    assert ran == [model.blocks[1]]
    ran.clear()
    for layer in range(2):
        lazy["resid_pre", layer], lazy["resid_post", layer]
    lazy["hook_embed"], lazy["ln_final.hook_scale"]
    assert ran == []
    dict(lazy.items())
    assert ran == list(model.blocks)
    ran.clear()
    lazy.prefetch(["blocks.0.attn.hook_q", "blocks.0.attn.hook_k", ("z", 1)])
    assert ran == list(model.blocks)
    ran.clear()
    held = lazy["q", 0]
    assert held is lazy["blocks.0.attn.hook_q"]
    lazy["k", 0], lazy["z", -1]
    assert ran == []


def test_the_stream_taken_apart_runs_each_block_once(model: HookedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    _, lazy = model.run_with_cache(TOKENS, lazy=True)
    ran = []
    forward = TransformerBlock.forward

    def counting(block: TransformerBlock, *args: Any) -> Tensor:
        ran.append(block)
        return forward(block, *args)

    counting.keeps_stages = True  # type: ignore[attr-defined]
    monkeypatch.setattr(TransformerBlock, "forward", counting)
    lazy.decompose_resid()
    assert ran == list(model.blocks)
    ran.clear()
    lazy.accumulated_resid(incl_mid=True)
    assert ran == list(model.blocks)


def test_reading_the_final_norm_unembeds_nothing(model: HookedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    full, lazy = both(model, TOKENS)

    def fail(self: Unembed, x: Tensor) -> Tensor:
        pytest.fail("unembedded")

    fail.keeps_stages = True  # type: ignore[attr-defined]
    monkeypatch.setattr(Unembed, "forward", fail)
    torch.testing.assert_close(lazy["ln_final.hook_scale"], full["ln_final.hook_scale"].detach())


def test_short_keys_are_prefetched_and_may_be_differentiated_later(model: HookedTransformer) -> None:
    with torch.inference_mode():
        _, lazy = model.run_with_cache(TOKENS, lazy=True)
        lazy.prefetch(("q", 1)).prefetch("q0").prefetch(["embed", "blocks.*.attn.hook_v"])
    assert {"blocks.0.attn.hook_q", "blocks.1.attn.hook_q", "hook_embed", "blocks.1.attn.hook_v"} <= set(
        lazy.cache_dict.own  # type: ignore[attr-defined]
    )
    (lazy["q", 1] * torch.ones((), dtype=torch.float64, requires_grad=True)).sum().backward()


def test_it_keeps_no_graph(model: HookedTransformer) -> None:
    logits, lazy = model.run_with_cache(TOKENS, lazy=True)
    assert logits.requires_grad
    assert not any(value.requires_grad for value in lazy.values())
    assert not any(kept.requires_grad for kept in lazy.cache_dict.kept())  # type: ignore[attr-defined]


# Misuse


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"incl_bwd": True}, "has no gradients"),
        ({"reset_hooks_end": False}, "no reset_hooks_end=False"),
        ({"return_cache_object": False}, "return_cache_object=False"),
        ({"offload": "cache.safetensors"}, "does not go with offload"),
    ],
)
def test_options_that_exclude_it_are_errors(model: HookedTransformer, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model.run_with_cache(TOKENS, lazy=True, **options)
    assert not any(point.live for point in model.hook_points())


def test_a_key_value_cache_does_not_go_with_it(model: HookedTransformer) -> None:
    with pytest.raises(ValueError, match="grows after the run"):
        model.run_with_cache(TOKENS, lazy=True, past_kv_cache=model.new_kv_cache(2))


def test_names_are_checked_as_in_a_full_cache(model: HookedTransformer) -> None:
    with pytest.raises(UnknownHookError, match="hook_patern"):
        model.run_with_cache(TOKENS, lazy=True, names_filter="blocks.0.attn.hook_patern")
    with pytest.raises(RuntimeError, match=r"'blocks.1.hook_resid_pre' never ran"):
        model.run_with_cache(TOKENS, lazy=True, names_filter="blocks.1.hook_resid_pre", stop_at_layer=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'stop_at'"):
        model.run_with_cache(TOKENS, lazy=True, stop_at=1)
    _, lazy = model.run_with_cache(TOKENS, lazy=True)
    with pytest.raises(UnknownHookError, match="only where it is asked for: name it in names_filter"):
        lazy["result", 0]
    with pytest.raises(UnknownHookError, match="hook_result"):
        lazy.prefetch("blocks.0.attn.hook_result")
    _, full = model.run_with_cache(TOKENS, names_filter="hook_embed")
    assert full.prefetch("hook_embed") is full
    with pytest.raises(UnknownHookError, match="hook_pos_embed"):
        full.prefetch("hook_pos_embed")
