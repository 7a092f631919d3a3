"""Grouped queries with `ungroup_grouped_query_attention`: the numbers of a model whose heads are not grouped at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, HookPoint, Intervention, metrics, patching
from hooked_lm.sweep import sweep
from tests.helpers import tiny_config, tiny_model, tiny_tokens

KINDS: dict[str, dict[str, Any]] = {
    "learned positions": {},
    "rotary": {"positional_embedding_type": "rotary"},
    "alibi": {"positional_embedding_type": "alibi"},
    "norm": {"positional_embedding_type": "rotary", "use_qk_norm": True},
    "layer norm per head": {"use_qk_norm": True, "qk_norm_type": "LN", "qk_norm_per_head_gains": True},
    "norm across heads": {"use_qk_norm": True, "qk_norm_across_heads": True},
    "norm after rotary": {"positional_embedding_type": "rotary", "use_qk_norm": True, "qk_norm_after_rotary": True,
                          "qk_norm_per_head_gains": True},
    "capped": {"attn_scores_soft_cap": 3.0, "clip_qkv": 0.5},
}  # fmt: skip
GROUPED: dict[str, Any] = {"d_model": 16, "n_heads": 4, "n_key_value_heads": 2}
# Sites with an entry for each query head, where a model has them.
UNGROUPED = ("hook_k", "hook_v", "hook_rot_k", "hook_k_input", "hook_v_input")


def grouped(**changes: Any) -> HookedTransformer:
    model = tiny_model(**{**GROUPED, **changes})
    model.set_ungroup_grouped_query_attention(True)
    return model


def twin_of(model: HookedTransformer) -> HookedTransformer:
    """A model whose queries are not grouped: each head has a copy of its key-value head's weights."""
    twin = HookedTransformer(model.cfg.replace(n_key_value_heads=None, ungroup_grouped_query_attention=False))
    weights = {}
    for name, value in model.state_dict().items():
        by_head = name.rpartition(".")[2] in ("W_K", "W_V", "b_K", "b_V") or ("k_norm" in name and value.ndim == 2)
        weights[name] = value.repeat_interleave(2, 0) if by_head else value
    twin.load_state_dict(weights)
    return twin


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_every_activation_and_gradient_is_that_of_the_model_without_groups(kind: str) -> None:
    model = grouped(**KINDS[kind])
    twin = twin_of(model)
    names = [name for name in model.hook_dict if name != "hook_tokens"]
    found, expected = (one.run_with_cache(tiny_tokens(), names_filter=names) for one in (model, twin))
    close(found[0], expected[0])
    assert set(found[1]) == set(expected[1])
    for name in expected[1]:
        close(found[1][name], expected[1][name])
    for site in UNGROUPED:
        if f"blocks.1.attn.{site}" in model.hook_dict:
            assert found[1][f"blocks.1.attn.{site}"].shape[2] == 4
    gradients: list[dict[str, Tensor]] = [{}, {}]
    for one, seen in zip((model, twin), gradients, strict=True):

        def keep(gradient: Tensor, hook: HookPoint, seen: dict[str, Tensor] = seen) -> None:
            seen[str(hook.name)] = gradient.clone()

        with one.hooks(bwd_hooks=[("*hook_[kv]", keep)]):
            one(tiny_tokens(), return_type="loss").backward()
    assert len(gradients[0]) == 4
    for name, gradient in gradients[0].items():
        close(gradient, gradients[1][name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", UNGROUPED)
def test_an_edit_at_one_query_head_acts_on_that_head(kind: str, site: str) -> None:
    model = grouped(**KINDS[kind])
    twin = twin_of(model)
    name = f"blocks.0.{'' if site.endswith('input') else 'attn.'}{site}"
    if name not in model.hook_dict:
        return

    def edit(x: Tensor, hook: HookPoint) -> Tensor:
        changed = x.clone()
        changed[:, 2:, 1] = -2 * x[:, 2:, 1]
        return changed

    found, expected = (one.run_with_hooks(tiny_tokens(), fwd_hooks=[(name, edit)]) for one in (model, twin))
    close(found, expected)
    assert (found - model(tiny_tokens())).abs().max() > 1e-3
    model.set_ungroup_grouped_query_attention(False)
    with_groups = model.run_with_hooks(tiny_tokens(), fwd_hooks=[(name, edit)])
    assert (found - with_groups).abs().max() > 1e-3  # the other head of the group reads the edited entry too


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_at_attn_in_reaches_the_keys_of_its_head_alone(kind: str) -> None:
    model = grouped(**KINDS[kind])
    twin = twin_of(model)

    def edit(x: Tensor, hook: HookPoint) -> Tensor:
        return torch.cat((x[:, :, :3], 3 * x[:, :, 3:].flip(1)), 2)

    hooks = [("blocks.1.hook_attn_in", edit)]
    found, expected = (one.run_with_hooks(tiny_tokens(), fwd_hooks=hooks) for one in (model, twin))
    close(found, expected)


@pytest.mark.parametrize("kind", ["learned positions", "rotary", "norm after rotary"])
def test_sweeps_grids_and_paths_are_those_of_the_model_without_groups(kind: str) -> None:
    model = grouped(**KINDS[kind])
    twin = twin_of(model)
    clean, corrupted = tiny_tokens(2, 6, seed=1), tiny_tokens(2, 6, seed=2)
    metric = metrics.logit_diff(3, 5)
    scores = []
    for one in (model, twin):
        _, cache = one.run_with_cache(clean)
        cells = [Intervention.from_cache(("k", 0), cache, head=head, pos=pos) for head in range(4) for pos in (1, 3)]
        cells += [Intervention.from_cache(("v", 1), cache, head=head) for head in range(4)]
        grids = ["attn_head_k_by_pos", "attn_head_v_all_pos"]
        estimates = [
            patching.attribution_patch(one, corrupted, clean, metric, grids, qk_fix=fix) for fix in (True, False)
        ]
        scores.append(
            [
                sweep(one, corrupted, cells, metric, verbose=False),
                patching.get_act_patch_attn_head_k_by_pos(one, corrupted, cache, metric, verbose=False),
                patching.get_act_patch_attn_head_all_pos_every(one, corrupted, cache, metric, verbose=False),
                patching.get_act_patch_direct_path(one, corrupted, cache, None, metric, 0, 1, "k", verbose=False),
                *(estimate[grid] for estimate in estimates for grid in grids),
            ]
        )
    for found, expected in zip(*scores, strict=True):
        assert expected.std() > 1e-6
        close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_value_cache_holds_an_entry_for_each_query_head(kind: str) -> None:
    model = grouped(**KINDS[kind])
    tokens = tiny_tokens()
    cache = model.new_kv_cache(2)
    steps = [model(tokens[:, :4], past_kv_cache=cache), model(tokens[:, 4:], past_kv_cache=cache)]
    assert cache[0].past_keys.shape == (2, 7, 4, 4)
    close(torch.cat(steps, 1), model(tokens))
    # Set and unset while the cache is in use.
    cache, parts = model.new_kv_cache(2), []
    for ungrouped, part in zip((False, True, False), (tokens[:, :3], tokens[:, 3:5], tokens[:, 5:]), strict=True):
        model.set_ungroup_grouped_query_attention(ungrouped)
        parts.append(model(part, past_kv_cache=cache))
    close(torch.cat(parts, 1), model(tokens))


def test_ungrouped_generation_under_an_edit_is_that_of_the_model_without_groups() -> None:
    model = grouped(**KINDS["rotary"])
    twin = twin_of(model)
    edit = Intervention("blocks.0.attn.hook_k", "scale", -3.0, head=1)
    texts = [
        one.generate(
            tiny_tokens(),
            5,
            do_sample=False,
            stop_at_eos=False,
            interventions=[edit],
            use_past_kv_cache=cached,
            verbose=False,
        )
        for one in (model, twin)
        for cached in (True, False)
    ]
    assert all(torch.equal(texts[0], text) for text in texts)


def test_stacked_weights_pair_each_query_head_with_its_own() -> None:
    model = tiny_model(**GROUPED)
    for name, shape in {"W_K": (2, 4, 16, 4), "W_V": (2, 4, 16, 4), "b_K": (2, 4, 4), "b_V": (2, 4, 4)}.items():
        stacked = getattr(model, name)
        assert stacked.shape == shape
        assert getattr(model.blocks[1].attn, name).shape[0] == 2
        assert torch.equal(stacked[1, 3], getattr(model.blocks[1].attn, name)[1])
    _, cache = model.run_with_cache(tiny_tokens(), names_filter=["*hook_result", "*hook_pattern", "*ln1*"])
    normalized = model.blocks[1].ln1(cache["normalized", 1, "ln1"] * cache["scale", 1, "ln1"])
    for head in range(4):
        moved = cache["pattern", 1][:, head] @ (normalized @ model.W_V[1, head] + model.b_V[1, head])
        close(moved @ model.W_O[1, head], cache["result", 1][:, :, head])
        close(model.QK[1, head].AB, model.W_Q[1, head] @ model.W_K[1, head].T)
        close(model.OV[1, head].AB, model.W_V[1, head] @ model.W_O[1, head])
        close(model.blocks[1].attn.QK[head].AB, model.QK[1, head].AB)
        close(model.blocks[1].attn.OV[head].AB, model.OV[1, head].AB)


def test_the_switch_is_a_field_of_the_config() -> None:
    model = HookedTransformer(tiny_config(**GROUPED, ungroup_grouped_query_attention=True))
    assert model.run_with_cache(tiny_tokens())[1]["k", 0].shape[2] == 4
    model.cfg.ungroup_grouped_query_attention = False
    assert model.run_with_cache(tiny_tokens())[1]["k", 0].shape[2] == 2
