"""run_with_cache: what is recorded, that it never changes, and that nothing else is kept alive."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hooked_lm import ActivationCache, HookedRootModule, HookedTransformer, HookPoint, UnknownHookError
from tests.helpers import tiny_model, tiny_tokens

TOKENS = tiny_tokens()
# The sites that a cache without a filter has only where a flag of the config asks for them.
FLAGS = {
    "hook_result": "use_attn_result",
    "hook_attn_in": "use_attn_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_tokens": "use_hook_tokens",
}
ON_DEMAND = ("hook_result", "hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")


@pytest.fixture
def model() -> HookedTransformer:
    return tiny_model()


def copies(cache: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in cache.items()}


def assert_unchanged(cache: Any, before: dict[str, Tensor]) -> None:
    assert list(cache) == list(before)
    changed = [name for name, tensor in cache.items() if not torch.equal(tensor, before[name])]
    assert changed == []


def zero(x: Tensor, hook: HookPoint) -> None:
    x.zero_()


# What is recorded


def test_everything_that_needs_no_flag_is_recorded_by_default(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(TOKENS)
    assert isinstance(cache, ActivationCache)
    assert set(cache) == {name for name in model.hook_dict if not name.endswith(tuple(FLAGS))}
    assert len(cache) == len(model.hook_dict) - 2 * (len(FLAGS) - 1) - 1


@pytest.mark.parametrize("site", ["result", "attn_in", "q_input", "k_input", "v_input", "mlp_in"])
def test_a_site_that_was_not_asked_for_says_how_to_ask(model: HookedTransformer, site: str) -> None:
    _, cache = model.run_with_cache(TOKENS)
    flag = FLAGS[f"hook_{site}"]
    message = (
        rf"hook_{site}' exists in the model but .* only where .*: name it in names_filter, or set model.cfg.{flag} ="
    )
    with pytest.raises(KeyError, match=message):
        cache[site, 1]
    assert (site, 1) not in cache
    _, cache = model.run_with_cache(TOKENS, names_filter=f"*.hook_{site}")
    assert cache[site, 1].ndim == (3 if site == "mlp_in" else 4)


@pytest.mark.parametrize("flag", dict.fromkeys(FLAGS.values()))
@pytest.mark.parametrize("way", ["memory", "lazy", "offload", "cache_all", "get_caching_hooks"])
def test_a_flag_decides_what_a_cache_without_a_filter_records(
    model: HookedTransformer, flag: str, way: str, tmp_path: Path
) -> None:
    plain, named = set(model.run_with_cache(TOKENS)[1]), model.run_with_cache(TOKENS, names_filter="*")[1]
    setter = getattr(model, f"set_{flag}", None)  # there is none for the tokens
    if setter is None:
        model.cfg.use_hook_tokens = True
    else:
        setter(True)
    assert getattr(model.cfg, flag) is True
    options: dict[str, dict[str, Any]] = {
        "memory": {},
        "lazy": {"lazy": True},
        "offload": {"offload": tmp_path / "file"},
    }
    found: Any
    if way == "cache_all":
        found = model.cache_all(None)
        model(TOKENS)
    elif way == "get_caching_hooks":
        found, hooks, _ = model.get_caching_hooks()
        model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    else:
        found = dict(model.run_with_cache(TOKENS, **options[way])[1])
    asked = tuple(site for site, one in FLAGS.items() if one == flag)
    assert set(found) == plain | {name for name in model.hook_dict if name.endswith(asked)}
    for name in found:
        torch.testing.assert_close(found[name], named[name], rtol=0, atol=1e-12, msg=name)


def test_a_name_asks_for_a_site_whatever_the_flags_say(model: HookedTransformer) -> None:
    for value in (True, False):
        for flag in FLAGS.values():
            setattr(model.cfg, flag, value)
        assert list(model.run_with_cache(TOKENS, names_filter="hook_embed")[1]) == ["hook_embed"]
        assert set(model.run_with_cache(TOKENS, names_filter="*")[1]) == set(model.hook_dict)


def test_the_chosen_experts_are_recorded_only_by_name() -> None:
    model = tiny_model(num_experts=3, experts_per_token=2, gated_mlp=True, act_fn="silu")
    _, cache = model.run_with_cache(TOKENS)
    assert ("expert_weights", 0) in cache
    with pytest.raises(KeyError, match=r"hook_expert_indices' exists .*: name it in names_filter$"):
        cache["expert_indices", 0]
    _, cache = model.run_with_cache(TOKENS, names_filter="*expert_indices")
    assert cache["expert_indices", 0].dtype == torch.long


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        ("blocks.1.attn.hook_q", ["blocks.1.attn.hook_q"]),
        ("blocks.*.attn.hook_pattern", ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"]),
        (["hook_embed", "*.hook_z"], ["hook_embed", "blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]),
        (("hook_embed",), ["hook_embed"]),
        ({"hook_embed"}, ["hook_embed"]),
        (lambda name: "resid_mid" in name, ["blocks.0.hook_resid_mid", "blocks.1.hook_resid_mid"]),
    ],
)
def test_a_names_filter_of_any_kind_records_what_it_picks(
    model: HookedTransformer, names: Any, kept: list[str]
) -> None:
    logits, everything = model.run_with_cache(TOKENS)
    some_logits, cache = model.run_with_cache(TOKENS, names_filter=names)
    assert list(cache) == kept
    for name in kept:
        torch.testing.assert_close(cache[name], everything[name], rtol=0, atol=1e-12)
    torch.testing.assert_close(some_logits, logits, rtol=0, atol=1e-12)


def test_the_output_is_whatever_the_model_returns(model: HookedTransformer) -> None:
    loss, _ = model.run_with_cache(TOKENS, return_type="loss")
    torch.testing.assert_close(loss, model(TOKENS, return_type="loss"), rtol=0, atol=1e-12)
    nothing, cache = model.run_with_cache(TOKENS, return_type=None)
    assert nothing is None
    assert "unembed.hook_out" in cache
    residual, cache = model.run_with_cache(TOKENS, stop_at_layer=1)
    assert torch.equal(residual, cache["resid_post", 0])
    assert ("resid_pre", 1) not in cache


def test_the_batch_axis_can_be_dropped_when_it_is_one(model: HookedTransformer) -> None:
    _, full = model.run_with_cache(TOKENS[:1])
    _, cache = model.run_with_cache(TOKENS[:1], remove_batch_dim=True)
    assert not cache.has_batch_dim
    assert full.has_batch_dim
    assert all(torch.equal(cache[name], full[name][0]) for name in full)
    with pytest.raises(ValueError, match="remove_batch_dim needs a batch of 1; 'hook_embed' has shape"):
        model.run_with_cache(TOKENS, remove_batch_dim=True)
    assert not any(point.live for point in model.hook_points())


def test_a_plain_dictionary_is_returned_if_asked_for(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(TOKENS, return_cache_object=False)
    assert type(cache) is dict
    assert set(cache) == set(model.run_with_cache(TOKENS)[1])


def test_a_cache_can_be_kept_on_another_device(model: HookedTransformer) -> None:
    logits, cache = model.run_with_cache(TOKENS, device="meta")
    assert {tensor.device.type for tensor in cache.values()} == {"meta"}
    assert logits.device.type == "cpu"


@pytest.mark.parametrize(
    ("pos_slice", "index"),
    [(-1, [-1]), (2, [2]), ((1, 4), slice(1, 4)), ([0, 3], [0, 3]), (slice(None, None, 2), slice(None, None, 2))],
)
def test_a_position_slice_keeps_those_positions_of_everything(
    model: HookedTransformer, pos_slice: Any, index: Any
) -> None:
    names = [name for name in model.hook_dict if not name.endswith("result")]
    _, full = model.run_with_cache(TOKENS, names_filter=names)
    _, cache = model.run_with_cache(TOKENS, names_filter=names, pos_slice=pos_slice)
    for name, tensor in full.items():
        # Scores and pattern [batch head query key]: the queries are sliced.
        is_pattern = name.endswith(("hook_attn_scores", "hook_pattern"))
        expected = tensor[:, :, index] if is_pattern else tensor[:, index]
        assert torch.equal(cache[name], expected), name
        assert cache[name].untyped_storage().nbytes() < tensor.untyped_storage().nbytes() or isinstance(index, slice)


def test_positions_and_the_batch_axis_can_go_together(model: HookedTransformer) -> None:
    _, full = model.run_with_cache(TOKENS[:1])
    _, cache = model.run_with_cache(TOKENS[:1], pos_slice=-1, remove_batch_dim=True)
    assert torch.equal(cache["pattern", 0], full["pattern", 0][0, :, -1:])
    assert torch.equal(cache["q", 1], full["q", 1][0, -1:])


def test_gradients_are_recorded_beside_the_activations(model: HookedTransformer) -> None:
    # Per-head inputs are normalised on their own, so beside them the shared norm has no gradient: they come alone.
    for names_filter in (None, "*_input", "*attn_in", "*result", "*mlp_in"):
        check_gradients(model, names_filter)


def check_gradients(model: HookedTransformer, names_filter: str | None) -> None:
    loss, cache = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True, names_filter=names_filter)
    clean, activations = model.run_with_cache(TOKENS, return_type="loss", names_filter=names_filter, keep_graph=True)
    torch.testing.assert_close(loss, clean, rtol=0, atol=1e-12)
    expected = torch.autograd.grad(clean, list(activations.values()))
    assert set(cache) == {*activations, *(f"{name}_grad" for name in activations)}
    assert not any(tensor.requires_grad for tensor in cache.values())
    for name, gradient in zip(activations, expected, strict=True):
        torch.testing.assert_close(cache[f"{name}_grad"], gradient, rtol=0, atol=1e-12, msg=name)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected)


def test_gradients_obey_the_slices_too(model: HookedTransformer) -> None:
    _, full = model.run_with_cache(TOKENS[:1], return_type="loss", incl_bwd=True, names_filter="*pattern")
    _, cache = model.run_with_cache(
        TOKENS[:1], return_type="loss", incl_bwd=True, names_filter="*pattern", pos_slice=2, remove_batch_dim=True
    )
    name = "blocks.0.attn.hook_pattern_grad"
    torch.testing.assert_close(cache[name], full[name][0, :, 2:3], rtol=0, atol=1e-12)


def test_a_backward_pass_needs_a_scalar(model: HookedTransformer) -> None:
    with pytest.raises(ValueError, match=r"must return a scalar .* it returned shape \(2, 7, 20\)"):
        model.run_with_cache(TOKENS, incl_bwd=True)
    with torch.no_grad(), pytest.raises(ValueError, match="must return a scalar"):
        model.run_with_cache(TOKENS, incl_bwd=True, return_type="loss")
    assert not any(point.live for point in model.hook_points())


def test_caching_hooks_stay_if_asked_to(model: HookedTransformer) -> None:
    model.run_with_cache(TOKENS, names_filter="hook_embed", reset_hooks_end=False)
    assert [point.name for point in model.hook_points() if point.live] == ["hook_embed"]
    model.reset_hooks()
    assert not any(point.live for point in model.hook_points())


def test_a_cache_left_recording_never_changes_the_one_returned(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(TOKENS, reset_hooks_end=False)
    before = copies(cache)
    model(tiny_tokens(seed=5))
    assert_unchanged(cache, before)


@pytest.mark.parametrize("how", ["add_caching_hooks", "cache_some", "cache_all", "get_caching_hooks"])
def test_the_classic_ways_of_caching_fill_a_dictionary(model: HookedTransformer, how: str) -> None:
    names = "blocks.*.attn.hook_z"
    _, expected = model.run_with_cache(TOKENS, names_filter=None if how == "cache_all" else names)
    mine: dict[str, Tensor] = {}
    if how == "get_caching_hooks":
        store, fwd, bwd = model.get_caching_hooks(names, cache=mine)
        assert bwd == []
        model.run_with_hooks(TOKENS, fwd_hooks=fwd)
    else:
        if how == "add_caching_hooks":
            store = model.add_caching_hooks(names, cache=mine)
        else:
            store = model.cache_some(mine, names) if how == "cache_some" else model.cache_all(mine)
        model(TOKENS)
    assert store is mine
    assert set(mine) == set(expected)
    assert all(torch.equal(mine[name], expected[name]) for name in expected)
    model.reset_hooks()
    assert not any(point.live for point in model.hook_points())


def test_any_root_module_can_be_cached() -> None:
    class Squared(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.hook_square = HookPoint()
            self.setup()

        def forward(self, x: Tensor) -> Tensor:
            return self.hook_square(x**2).sum()

    x = torch.arange(3.0, requires_grad=True)
    out, cache = Squared().run_with_cache(x, incl_bwd=True)
    assert torch.equal(cache["hook_square"], torch.tensor([0.0, 1.0, 4.0]))
    assert torch.equal(cache["hook_square_grad"], torch.ones(3))
    assert (float(out.detach()), type(cache)) == (5.0, dict)


# What a lookup says


def test_an_unknown_key_of_a_cache_says_what_comes_near(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(TOKENS, names_filter="*resid*")
    for key, message in [
        ("blocks.0.hook_resid_per", "no hook 'blocks.0.hook_resid_per'; did you mean 'blocks.0.hook_resid_pre'"),
        ("blocks.5.hook_resid_pre", "no hook 'blocks.5.hook_resid_pre': layers run 0-1"),
        (("resid_pre", 5), "no hook 'blocks.5.hook_resid_pre': layers run 0-1"),
        (("resid_pre", -3), "layers run 0-1"),
        (("rot_q", 0), "no hook 'blocks.0.attn.hook_rot_q'"),
        (("q", 0), "'blocks.0.attn.hook_q' exists in the model but is not in this cache: it is not recorded"),
        (("qq", 0), "names no activation: unknown activation 'qq'"),
        ("resid_pre", "names no activation: 'resid_pre' lives in a block"),
        ("blocks.0.attn.hook_q_grad", "not in this cache"),
        (3, "names no activation"),
    ]:
        with pytest.raises(UnknownHookError, match=message):
            cache[key]
        assert key not in cache


# A cache never changes


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"positional_embedding_type": "none", "normalization_type": None}, {"parallel_attn_mlp": True}]
)
def test_no_hook_at_any_site_changes_what_the_same_run_has_recorded(grad: bool, changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    names = [name for name in model.hook_dict if name != "hook_tokens"]
    with torch.set_grad_enabled(grad):
        for edited in names:
            shown: dict[str, Tensor] = {}
            store = model.add_caching_hooks([name for name in names if not name.endswith(ON_DEMAND)])
            # Snapshots at the moment of recording, then the edit in place, then the rest of the run.
            watch = lambda x, hook, shown=shown: shown.__setitem__(hook.name, x.detach().clone())  # noqa: E731
            for name in store.keys() | {n for n in names if not n.endswith(ON_DEMAND)}:
                model.hook_dict[name].add_hook(watch, reads_only=True)
            model.add_hook(edited, lambda x, hook: x.add_(0.5))
            model(TOKENS)
            model.reset_hooks()
            changed = [name for name, seen in shown.items() if not torch.equal(store[name].detach(), seen)]
            assert changed == [], f"an edit of {edited} in place changes the record"
            assert set(shown) >= set(store)


@pytest.mark.parametrize("grad", [False, True])
def test_later_runs_with_hooks_in_place_leave_a_cache_as_it_was(model: HookedTransformer, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        _, cache = model.run_with_cache(TOKENS, names_filter="*")
        before = copies(cache)
        for name, tensor in cache.items():
            if name == "hook_tokens":
                continue
            patch = lambda x, hook, tensor=tensor: tensor  # noqa: E731
            model.run_with_hooks(TOKENS, fwd_hooks=[(name, patch), (name, zero)])
            later = [
                site for site in model.hook_dict if site.endswith(("resid_pre", "mlp_in", "resid_post", "hook_in"))
            ]
            model.run_with_hooks(TOKENS, fwd_hooks=[(name, patch), *((site, zero) for site in later)])
            model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda x, hook, tensor=tensor: tensor[:]), (name, zero)])
        assert_unchanged(cache, before)


def test_permanent_hooks_in_place_leave_a_cache_as_it_was(model: HookedTransformer) -> None:
    with torch.no_grad():
        _, clean = model.run_with_cache(TOKENS)
        before_clean = copies(clean)
        for name in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_v"):
            model.add_perma_hook(name, lambda x, hook: x.mul_(2))
        _, cache = model.run_with_cache(TOKENS)
        assert not torch.allclose(cache["resid_pre", 1], clean["resid_pre", 1])
        torch.testing.assert_close(cache["resid_post", 0], 2 * clean["resid_post", 0], rtol=1e-12, atol=0)
        torch.testing.assert_close(cache["resid_pre", 1], 4 * clean["resid_pre", 1], rtol=1e-12, atol=0)
        before = copies(cache)
        model(TOKENS)
        model.run_with_cache(TOKENS)
        assert_unchanged(cache, before)
        assert_unchanged(clean, before_clean)


def test_a_residual_from_a_cache_can_be_run_on_without_being_written_to(model: HookedTransformer) -> None:
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
        before = copies(cache)
        for name in ("blocks.1.hook_resid_pre", "blocks.1.hook_mlp_in", "ln_final.hook_normalized"):
            model.run_with_hooks(cache["resid_pre", 1], start_at_layer=1, fwd_hooks=[(name, zero)])
        assert_unchanged(cache, before)


def test_a_cache_does_not_follow_the_weights_or_the_callers_tensors(model: HookedTransformer) -> None:
    tokens = TOKENS.clone()
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        residual = cache["resid_pre", 1].clone()
        _, later = model.run_with_cache(residual, start_at_layer=1)
        before, before_later = copies(cache), copies(later)
        tokens.zero_()
        residual.zero_()
        for parameter in model.parameters():
            parameter.add_(1)
    assert_unchanged(cache, before)
    assert_unchanged(later, before_later)


def test_a_recorded_gradient_is_not_changed_by_a_backward_hook_in_place(model: HookedTransformer) -> None:
    name = "blocks.1.hook_resid_pre"
    _, clean = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True, names_filter="*resid*")
    store, fwd, bwd = model.get_caching_hooks("*resid*", incl_bwd=True)
    with model.hooks(fwd, [*bwd, (name, zero)]):
        model(TOKENS, return_type="loss").backward()
    torch.testing.assert_close(store[f"{name}_grad"], clean[f"{name}_grad"], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        store["blocks.0.hook_resid_post_grad"], torch.zeros_like(clean[f"{name}_grad"]), rtol=0, atol=0
    )


def test_a_cache_is_not_changed_by_reading_on_with_a_key_value_cache(model: HookedTransformer) -> None:
    with torch.no_grad():
        past = model.new_kv_cache(2)
        _, cache = model.run_with_cache(TOKENS[:, :4], past_kv_cache=past)
        before = copies(cache)
        model.run_with_hooks(TOKENS[:, 4:], past_kv_cache=past, fwd_hooks=[("blocks.*.attn.hook_[kv]", zero)])
        assert_unchanged(cache, before)
        entries = [(entry.past_keys.clone(), entry.past_values.clone()) for entry in past]
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.*.attn.hook_[kv]", zero)])
        for entry, (keys, values) in zip(past, entries, strict=True):
            assert torch.equal(entry.past_keys, keys)
            assert torch.equal(entry.past_values, values)


# Memory


@pytest.mark.parametrize("grad", [False, True])
def test_entries_that_are_one_tensor_share_their_memory(model: HookedTransformer, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        _, cache = model.run_with_cache(TOKENS, names_filter=["*resid*", "*mlp_in"])
    assert cache["resid_post", 0].data_ptr() == cache["resid_pre", 1].data_ptr()
    assert cache["mlp_in", 0].data_ptr() == cache["resid_mid", 0].data_ptr()
    _, cache = model.run_with_cache(TOKENS[:1], remove_batch_dim=True)
    assert cache["resid_post", 0].data_ptr() == cache["resid_pre", 1].data_ptr()


@pytest.mark.parametrize("incl_bwd", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_dropped_cache_frees_its_memory(model: HookedTransformer, incl_bwd: bool, grad: bool) -> None:
    if incl_bwd and not grad:
        return
    with torch.set_grad_enabled(grad):
        loss, cache = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=incl_bwd, names_filter="*")
    # The tokens and the positions are the caller's and the model's.
    mine = [name for name in cache if name not in ("hook_tokens", "hook_pos_embed")]
    kept = {name: StorageWeakRef(cache[name].untyped_storage()) for name in mine}
    del loss, cache
    gc.collect()
    assert [name for name, ref in kept.items() if not ref.expired()] == []


@pytest.mark.parametrize("grad", [False, True])
def test_what_hooks_have_seen_and_returned_is_freed_after_the_run(model: HookedTransformer, grad: bool) -> None:
    refs: list[StorageWeakRef] = []

    def swap(x: Tensor, hook: HookPoint) -> Tensor:
        fresh = x.clone()
        refs.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in (x, fresh))
        return fresh

    with torch.set_grad_enabled(grad):
        names = [name for name in model.hook_dict if name != "hook_tokens"]
        output = model.run_with_hooks(TOKENS, fwd_hooks=[(names, swap)])
        del output
        if grad:
            for _ in range(3):
                loss = model.run_with_hooks(TOKENS, return_type="loss", bwd_hooks=[("blocks.*.hook_resid_*", swap)])
                loss.backward()
                del loss
    gc.collect()
    assert len(refs) > 50
    assert not [ref for ref in refs if not ref.expired()]


def test_a_position_slice_lets_go_of_the_rest(model: HookedTransformer) -> None:
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS, pos_slice=-1)
    for tensor in cache.values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_a_glob_in_a_list_needs_one_match_to_run_and_a_plain_name_has_to() -> None:
    model = tiny_model()
    _, cache = model.run_with_cache(tiny_tokens(), names_filter=["blocks.*.hook_resid_pre"], stop_at_layer=1)
    assert list(cache) == ["blocks.0.hook_resid_pre"]
    with pytest.raises(RuntimeError, match=r"blocks\.1\.hook_resid_pre"):
        model.run_with_cache(
            tiny_tokens(), names_filter=["blocks.*.hook_resid_pre", "blocks.1.hook_resid_pre"], stop_at_layer=1
        )
