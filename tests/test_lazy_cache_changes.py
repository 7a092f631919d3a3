"""What could make a lazy cache wrong: writes, hooks, threads and changes since the run."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
import torch
from torch import Tensor

from hooked_lm import ActivationCache, HookedTransformer, HookPoint
from hooked_lm.activation_cache.lazy import LazyActivations
from hooked_lm.interventions import Intervention
from hooked_lm.names import get_act_name
from tests.helpers import tiny_model, tiny_tokenizer
from tests.lazy_cache_helpers import TOKENS, assert_same, both


@pytest.fixture
def model() -> HookedTransformer:
    return tiny_model()


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


# One write that torch does not count, and an activation that the written tensor goes into.
WRITES: dict[str, tuple[Callable[[HookedTransformer, ActivationCache], object], str]] = {
    "an unembedding scaled": (lambda m, c: m.unembed.W_U.data.mul_(3.0), "unembed.hook_out"),
    "a bias of the unembedding": (lambda m, c: m.unembed.b_U.data.add_(1.0), "unembed.hook_out"),
    "a final gain": (lambda m, c: m.ln_final.w.data.mul_(3.0), "ln_final.hook_normalized"),
    "one entry, by its last bit": (lambda m, c: _flip_last_bit(m.blocks[1].attn.W_K), "blocks.1.attn.hook_k"),
    "two heads that change places": (
        lambda m, c: m.blocks[1].attn.W_Q.data.copy_(m.blocks[1].attn.W_Q.data[[1, 0, 2]]),
        "blocks.1.attn.hook_q",
    ),
    "an embedding": (lambda m, c: m.embed.W_E.data.mul_(3.0), "hook_embed"),
    "positions": (lambda m, c: m.pos_embed.W_pos.data.zero_(), "hook_pos_embed"),
    "an optimizer of one's own": (
        lambda m, c: [p.data.add_(torch.ones_like(p), alpha=-1e-3) for p in m.parameters()],
        "blocks.0.attn.hook_v",
    ),
    "a residual": (lambda m, c: c["resid_pre", 1].data.mul_(1 + 2**-7), "blocks.1.attn.hook_v"),
    "what a hook made": (lambda m, c: _edit_of(c, "blocks.1.mlp.hook_post").data.mul_(2.0), "blocks.1.hook_mlp_out"),
    "an activation function": (lambda m, c: setattr(m.blocks[0].mlp, "act_fn", torch.relu), "blocks.0.mlp.hook_post"),
}


def _flip_last_bit(weight: Tensor) -> None:
    weight.data.view(torch.uint8)[0, 0, 0] ^= 1


def _edit_of(cache: ActivationCache, name: str) -> Tensor:
    kept = cast(LazyActivations, cache.cache_dict).run.held(name)
    assert kept is not None
    return kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_torch_does_not_count_is_noticed_by_what_reads_it(write: str, dtype: torch.dtype) -> None:
    model, (change, name) = tiny_model(dtype=dtype), WRITES[write]
    with model.hooks(fwd_hooks=[("blocks.1.mlp.hook_post", lambda x, hook: x * 0.5)]):
        _, lazy = model.run_with_cache(TOKENS, lazy=True)
    before = lazy[name].clone()
    assert torch.equal(lazy[name], before)
    change(model, lazy)
    with pytest.raises(RuntimeError, match="does not compute what it did"):
        lazy[name]


def test_a_write_to_a_tied_embedding_is_noticed_by_the_logits() -> None:
    model = tiny_model(tie_word_embeddings=True).eval()
    _, lazy = model.run_with_cache(TOKENS, lazy=True)
    unread = next(token for token in range(model.cfg.d_vocab) if token not in TOKENS.unique().tolist())
    model.embed.W_E.data[unread, 0] += 1.0
    with pytest.raises(RuntimeError, match="does not compute what it did"):
        lazy["unembed.hook_out"]


def test_of_the_embedding_the_rows_of_the_prompt_are_what_is_guarded(model: HookedTransformer) -> None:
    edited = TOKENS.clone()
    edited[0, 1] = (edited[0, 1] + 1) % model.cfg.d_vocab
    looked_up = edited.unique().tolist()
    unread = next(token for token in range(model.cfg.d_vocab) if token not in looked_up)
    with model.hooks(fwd_hooks=[("hook_tokens", lambda tokens, hook: edited)]):
        _, lazy = model.run_with_cache(TOKENS, lazy=True)
    expected = model.embed.W_E[edited].detach().clone()
    model.embed.W_E.data[unread] += 1.0
    torch.testing.assert_close(lazy["hook_embed"], expected, rtol=0, atol=0)
    with model.hooks(fwd_hooks=[("hook_tokens", lambda tokens, hook: edited)]):
        _, lazy = model.run_with_cache(TOKENS, lazy=True)
    model.embed.W_E.data[edited[0, 1]] += 1.0
    with pytest.raises(RuntimeError, match="does not compute what it did"):
        lazy["hook_embed"]


def test_a_numpy_view_that_writes_to_a_weight_is_noticed(model: HookedTransformer) -> None:
    _, lazy = model.run_with_cache(TOKENS, lazy=True)
    model.unembed.W_U.detach().numpy()[3, 2] *= 1 + 1e-15
    with pytest.raises(RuntimeError, match="does not compute what it did"):
        lazy["unembed.hook_out"]
    lazy["ln_final.hook_scale"]  # is not made by it


def test_a_copy_notices_writes_to_its_own_model_only(model: HookedTransformer) -> None:
    full, lazy = both(model, TOKENS)
    copied = copy.deepcopy(lazy)
    model.unembed.W_U.data.mul_(3.0)
    torch.testing.assert_close(copied["unembed.hook_out"], full["unembed.hook_out"].detach())
    cast(HookedTransformer, copied.model).unembed.W_U.data.mul_(3.0)
    with pytest.raises(RuntimeError, match="does not compute what it did"):
        copied["unembed.hook_out"]


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
