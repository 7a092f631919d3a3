"""A lazy cache is the full cache of the same run, whatever changed that run, and holds one residual per layer."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import ActivationCache, HookedTransformer, HookPoint, UnknownHookError
from hooked_lm.components import TransformerBlock
from hooked_lm.interventions import Intervention
from hooked_lm.names import get_act_name
from tests.helpers import tiny_model, tiny_tokenizer, tiny_tokens
from tests.test_hook_sites import ARCHITECTURES

TOKENS = tiny_tokens()


@pytest.fixture
def model() -> HookedTransformer:
    return tiny_model()


def both(model: HookedTransformer, *args: Any, **kwargs: Any) -> tuple[ActivationCache, ActivationCache]:
    """The full and the lazy cache of two runs that draw the same random numbers."""
    torch.manual_seed(0)
    output, full = model.run_with_cache(*args, **kwargs)
    torch.manual_seed(0)
    again, lazy = model.run_with_cache(*args, lazy=True, **kwargs)
    if output is not None:
        torch.testing.assert_close(again, output, rtol=0, atol=1e-10)
    return full, lazy


def assert_same(lazy: ActivationCache, full: ActivationCache) -> None:
    assert set(lazy) == set(full)
    assert len(lazy) == len(full)
    for name, expected in full.items():
        assert name in lazy
        torch.testing.assert_close(lazy[name], expected.detach(), rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


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
        full, lazy = both(model, TOKENS)
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

    def fail(x: Tensor) -> Tensor:
        pytest.fail("unembedded")

    fail.keeps_stages = True  # type: ignore[attr-defined]
    monkeypatch.setattr(model.unembed, "forward", fail)
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


# What could make it wrong


def test_what_a_caller_does_to_its_own_tensors_afterwards_does_not_reach_it(model: HookedTransformer) -> None:
    tokens = TOKENS.clone()
    full, lazy = both(model, tokens)
    tokens.zero_()
    assert_same(lazy, full)


def test_hooks_of_the_moment_of_reading_are_neither_run_nor_lost(model: HookedTransformer) -> None:
    full, lazy = both(model, TOKENS)
    called = []
    model.add_perma_hook("blocks.0.attn.hook_z", lambda z, hook: called.append(hook.name))
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: x * 0)], bwd_hooks=[("*mlp_out", print)]):
        assert_same(lazy, full)
        assert called == []
        assert not model(TOKENS, stop_at_layer=1).isnan().any()
        assert called == ["blocks.0.attn.hook_z"]
        assert model.hook_dict["blocks.1.hook_mlp_out"].bwd_hooks


def test_reading_it_inside_a_run_leaves_that_run_as_it_is(model: HookedTransformer) -> None:
    _, lazy = model.run_with_cache(TOKENS, lazy=True)
    past = model.new_kv_cache(2)
    model(TOKENS[:, :3], past_kv_cache=past)

    def read(x: Tensor, hook: HookPoint) -> None:
        lazy["z", 1]

    expected = model(TOKENS)[:, 3:]
    edit = Intervention(get_act_name("resid_pre", 1), "scale", 1.0, pos=4)
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", read)]):
        found = model.run(TOKENS[:, 3:], past_kv_cache=past, interventions=[edit])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_weights_that_have_changed_since_are_noticed_and_what_was_fetched_stays(model: HookedTransformer) -> None:
    full, lazy = both(model, TOKENS)
    lazy.prefetch("blocks.1.attn.hook_pattern")
    with torch.no_grad():
        model.blocks[0].mlp.W_in[0, 0] += 1.0
    with pytest.raises(RuntimeError, match=r"its weights, or a residual .* have been changed or moved since"):
        lazy["q", 1]
    with pytest.raises(RuntimeError, match="changed or moved"):
        lazy.to("meta")
    torch.testing.assert_close(lazy["pattern", 1], full["pattern", 1].detach())
    _, lazy = model.run_with_cache(TOKENS, lazy=True)
    model.half()
    with pytest.raises(RuntimeError, match="changed or moved"):
        lazy["q", 1]


def test_a_stream_that_was_written_to_is_noticed(model: HookedTransformer) -> None:
    _, lazy = model.run_with_cache(TOKENS, lazy=True)
    lazy["resid_pre", 1].zero_()
    with pytest.raises(RuntimeError, match="clone a tensor before writing to it"):
        lazy["q", 1]


def test_weights_changed_past_torchs_count_of_writes_are_noticed_by_what_they_compute(model: HookedTransformer) -> None:
    for change in (model.blocks[1].attn.W_V, model.blocks[1].mlp.W_out, model.pos_embed.W_pos):
        _, lazy = model.run_with_cache(TOKENS, lazy=True)
        change.data.mul_(2)
        name = "hook_embed" if change is model.pos_embed.W_pos else "blocks.1.attn.hook_q"
        with pytest.raises(RuntimeError, match="does not compute what it did"):
            lazy[name]
    _, lazy = model.run_with_cache(TOKENS, lazy=True)
    lazy["resid_pre", 1].numpy()[:] = 0
    with pytest.raises(RuntimeError, match="does not compute what it did"):
        lazy["q", 1]


def test_autocast_is_that_of_the_run() -> None:
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, full = model.run_with_cache(TOKENS)
        _, lazy = model.run_with_cache(TOKENS, lazy=True)
    _, plain = model.run_with_cache(TOKENS)
    _, outside = model.run_with_cache(TOKENS, lazy=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = {name: outside[name] for name in outside}
    for name, expected in full.items():
        assert lazy[name].dtype == expected.dtype
        torch.testing.assert_close(lazy[name], expected, rtol=0, atol=0.1)
        assert found[name].dtype == plain[name].dtype
        torch.testing.assert_close(found[name], plain[name].detach(), rtol=0, atol=1e-5)


def test_index_tensors_may_change_afterwards(model: HookedTransformer) -> None:
    kept, positions, prompts = torch.tensor([1, 3]), torch.tensor([2, 4]), torch.tensor([1])
    some = both(model, TOKENS, logits_to_keep=kept)
    there = both(model, TOKENS, pos_slice=positions)
    one = [cache.apply_slice_to_batch_dim(prompts) for cache in both(model, TOKENS)]
    for index in (kept, positions, prompts):
        index.fill_(0)
    for full, lazy in (some, there, one):
        assert_same(lazy, full)


def test_a_backward_hook_that_sends_the_run_another_way_does_so_again(model: HookedTransformer) -> None:
    halve = [("blocks.0.ln1.hook_normalized", lambda x, hook: x * 0.5)]
    with model.hooks(fwd_hooks=halve, bwd_hooks=[("blocks.0.hook_v_input", lambda grad, hook: None)]):
        assert_same(*reversed(both(model, TOKENS)))
    model.add_caching_hooks("blocks.0.hook_v_input")
    with model.hooks(fwd_hooks=halve):
        assert_same(*reversed(both(model, TOKENS)))


def test_hooks_that_change_nothing_are_not_kept(model: HookedTransformer) -> None:
    _, lazy = model.run_with_cache(TOKENS, lazy=True)
    with model.hooks(fwd_hooks=[("*", lambda x, hook: None)]):
        full, looked_at = both(model, TOKENS, names_filter="blocks.*.attn.hook_[qkvz]")
    kept = set(looked_at.cache_dict.run.edits)  # type: ignore[attr-defined]
    assert kept <= {name for name in model.hook_dict if model.hook_dict[name].on_demand}
    assert_same(looked_at, full)
    with model.hooks(fwd_hooks=[("*hook_z", lambda x, hook: None)]):
        assert model.run_with_cache(TOKENS, lazy=True)[1].nbytes == lazy.nbytes


def test_hooks_that_come_during_the_run_are_an_error(model: HookedTransformer) -> None:
    def add(x: Tensor, hook: HookPoint) -> None:
        model.add_hook("blocks.1.hook_resid_pre", lambda x, hook: x * 3)

    with (
        pytest.raises(RuntimeError, match="hooks were added or removed while the model ran"),
        model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", add)]),
    ):
        model.run_with_cache(TOKENS, lazy=True)


def test_torchs_own_hooks_are_an_error(model: HookedTransformer) -> None:
    handle = model.blocks[0].mlp.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(ValueError, match="hooks of torch's, which may do anything"):
        model.run_with_cache(TOKENS, lazy=True)
    handle.remove()


def test_reads_from_several_threads_are_right_and_leave_the_model_as_it_is(model: HookedTransformer) -> None:
    with model.hooks(fwd_hooks=[("blocks.*.hook_mlp_out", lambda x, hook: x * 0)]):
        full, lazy = both(model, TOKENS)
    before = model(TOKENS)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            for name, value in zip(list(lazy) * 3, pool.map(lazy.__getitem__, list(lazy) * 3), strict=True):
                torch.testing.assert_close(value, full[name].detach(), rtol=0, atol=1e-10)
    finally:
        sys.setswitchinterval(interval)
    assert not any(point.live for point in model.hook_points())
    torch.testing.assert_close(model(TOKENS), before)


def test_copies_and_pickles_compute_with_a_model_of_their_own(model: HookedTransformer) -> None:
    full, lazy = both(model, TOKENS, pos_slice=(1, 5))
    copies = [copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy.apply_slice_to_batch_dim([0, 1])))]
    with torch.no_grad():
        model.blocks[0].attn.W_Q.zero_()
    for one in copies:
        assert_same(one, full)
    with pytest.raises(RuntimeError, match="does not compute"):
        copy.deepcopy(lazy)


def test_a_model_without_blocks_has_the_padding_of_the_run() -> None:
    model = tiny_model(n_layers=0, d_vocab=300)
    model.set_tokenizer(tiny_tokenizer())
    model.cfg.default_padding_side = "left"
    tokens = torch.full((1, 5), int(model.tokenizer.pad_token_id))
    tokens[0, 3:] = 7
    assert_same(*reversed(both(model, tokens, padding_side="right")))


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
    with pytest.raises(UnknownHookError, match="computed on demand: name it in names_filter"):
        lazy["result", 0]
    with pytest.raises(UnknownHookError, match="hook_result"):
        lazy.prefetch("blocks.0.attn.hook_result")
    _, full = model.run_with_cache(TOKENS, names_filter="hook_embed")
    assert full.prefetch("hook_embed") is full
    with pytest.raises(UnknownHookError, match="hook_pos_embed"):
        full.prefetch("hook_pos_embed")
