"""Path and attribution patching of models with components of one's own: right, or refused; never wrong in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooked_lm import HookedTransformer, metrics, patching
from hooked_lm.hooks import HookPoint
from hooked_lm.names import get_act_name
from hooked_lm.patching import Node, path
from tests.changed_components_helpers import CASES, WAYS, changed_model
from tests.helpers import tiny_model, tiny_tokens

CLEAN, CORRUPTED = tiny_tokens(pos=5, seed=1), tiny_tokens(pos=5, seed=2)
METRIC = metrics.logit_diff(3, 4)
QUIET: dict[str, Any] = {"verbose": False}
ROUTES = ("direct", "mlps", "all")


# The naive way: hooks and nothing else


def everything(model: HookedTransformer, tokens: Tensor) -> dict[str, Tensor]:
    """What every hook point shows in a run, and what modules in a hook point's place return."""
    found: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        found[hook.name] = x.detach().clone()

    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: found.update({name: out.detach().clone()}))
        for name, module in points_of_others(model).items()
    ]
    names = [
        name
        for name in model.hook_dict
        if name not in points_of_others(model) and name.endswith(("_z", "_out", "_embed", "_pre", "_mid", "_post"))
    ]
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(name, keep) for name in names])
    for handle in handles:
        handle.remove()
    return found


def points_of_others(model: HookedTransformer) -> dict[str, nn.Module]:
    return {
        f"blocks.{layer}.{name}": module
        for layer, block in enumerate(model.blocks)
        for name, module in block.named_children()
        if name.startswith("hook_") and not isinstance(module, HookPoint)
    }


def write(value: Tensor, node: Node | None = None) -> Callable[..., Tensor]:
    """A hook that writes a whole activation, or a node's part of it."""

    def hook(x: Tensor, hook: Any) -> Tensor:
        if node is None or (node.pos is None and node.head is None):
            return value.clone()
        x = x.clone()
        where: list[Any] = [slice(None), slice(None) if node.pos is None else node.pos]
        if node.head is not None:
            where.append(node.head)
        x[tuple(where)] = value[tuple(where)]
        return x

    return hook


def naive(model: HookedTransformer, senders: list[Node], receivers: list[Node], routes: str) -> float:
    clean, corrupted = everything(model, CLEAN), everything(model, CORRUPTED)
    others, n_layers = points_of_others(model), model.cfg.n_layers
    held = []
    for layer in range(n_layers):
        if routes != "all":
            sends_z = any((node.name, node.layer) == ("z", layer) for node in senders)
            held.append(get_act_name("z" if sends_z else "attn_out", layer))
        if routes == "direct" and not model.cfg.attn_only:
            held.append(get_act_name("mlp_out", layer))
    first = [(site, write(corrupted[site])) for site in held if site not in others]
    first += [(node.site(n_layers), write(clean[node.site(n_layers)], node)) for node in senders]
    heard: dict[str, Tensor] = {}

    def observe(x: Tensor, hook: Any) -> None:
        heard[hook.name] = x.clone()

    handles = [
        others[site].register_forward_hook(lambda module, args, output, value=corrupted[site]: value)
        for site in held
        if site in others
    ]
    with torch.no_grad():
        model.run_with_hooks(
            CORRUPTED, fwd_hooks=[*first, *((site, observe) for site in {node.site(n_layers) for node in receivers})]
        )
        for handle in handles:
            handle.remove()
        second = [(node.site(n_layers), write(heard[node.site(n_layers)], node)) for node in receivers]
        return float(METRIC(model.run_with_hooks(CORRUPTED, fwd_hooks=second)))


SENDERS = [
    [Node("z", 0, 1)],
    [Node("z", 1, 2, pos=3)],
    [Node("mlp_out", 0)],
    [Node("embed", pos=2), Node("z", 1, 0)],
    [Node("attn_out", 0, pos=4), Node("resid_pre", 1)],
]
RECEIVERS = [
    [Node("logits")],
    [Node("k", 2, 1), Node("v", 2, 0), Node("mlp_in", 2)],
    [Node("q", 2), Node("resid_mid", 2, pos=4)],
]


def assert_naive(model: HookedTransformer, routes: str, senders: Any = SENDERS) -> None:
    for receivers in RECEIVERS:
        scores = patching.path_patch(model, CORRUPTED, CLEAN, METRIC, senders, receivers, routes=routes, **QUIET)
        expected = torch.tensor([naive(model, sent, receivers, routes) for sent in senders], dtype=scores.dtype)
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-9)
        assert scores.std() > 1e-6


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize(("component", "way"), CASES)
def test_path_patching_is_what_hooked_runs_give_whatever_the_components(component: str, way: str, routes: str) -> None:
    assert_naive(changed_model(component, way), routes)


@pytest.mark.parametrize("routes", ROUTES)
def test_the_naive_way_agrees_on_a_stock_model_too(routes: str) -> None:
    assert_naive(tiny_model(n_layers=3), routes)


@pytest.mark.parametrize("component", ["block", "attention"])
@pytest.mark.parametrize("way", ["subclass", "method", "torch hook"])
def test_the_stages_of_stock_blocks_would_give_something_else(
    component: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = changed_model(component, way)
    how: dict[str, Any] = {"routes": "mlps", **QUIET}
    right = patching.path_patch(model, CORRUPTED, CLEAN, METRIC, SENDERS, "logits", **how)
    monkeypatch.setattr(path, "stages_obstacle", lambda *_: None)
    wrong = patching.path_patch(model, CORRUPTED, CLEAN, METRIC, SENDERS, "logits", **how)
    assert (right - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("changes", [{"parallel_attn_mlp": True}, {"attn_only": True}, {"norm_placement": "residual"}])
def test_other_architectures_are_run_the_plain_way_as_well(changes: dict[str, Any], routes: str) -> None:
    model = changed_model("attention", "subclass", **changes)
    receivers = [Node("logits")] if "attn_only" in changes else [Node("k", 2, 1), Node("mlp_in", 2)]
    senders = [sent for sent in SENDERS if not model.cfg.attn_only or sent[0].name != "mlp_out"]
    scores = patching.path_patch(model, CORRUPTED, CLEAN, METRIC, senders, receivers, routes=routes, **QUIET)
    expected = torch.tensor([naive(model, sent, receivers, routes) for sent in senders], dtype=scores.dtype)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-9)


# Modules in the place of hook points


class Sparse(nn.Module):
    """What an autoencoder in a hook point's place may do."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() * 1.2


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("name", ["hook_attn_out", "hook_mlp_out", "hook_resid_mid"])
def test_modules_in_the_place_of_hook_points_are_part_of_the_model(name: str, routes: str, known: bool) -> None:
    model = tiny_model(n_layers=3)
    setattr(model.blocks[1], name, Sparse())
    if known:
        model.setup()
    senders = [sent for sent in SENDERS if all((one.name, one.layer) != (name[5:], 1) for one in sent)]
    assert_naive(model, routes, senders)


def test_a_sender_or_receiver_at_a_replaced_hook_point_raises() -> None:
    model = tiny_model()
    model.blocks[1].hook_mlp_out = Sparse()
    with pytest.raises(RuntimeError, match=r"hook at 'blocks\.1\.hook_mlp_out' never ran"):
        patching.path_patch(model, CORRUPTED, CLEAN, METRIC, [("mlp_out", 1)], "logits", **QUIET)


# The rest of the family


def test_grids_classic_functions_budgets_and_prompts_go_the_plain_way_too() -> None:
    model = changed_model("attention", "subclass")
    heads = patching.path_patch_heads(model, CORRUPTED, CLEAN, METRIC, ("k", 2, 1), **QUIET)
    mlps = patching.path_patch_mlps(model, CORRUPTED, CLEAN, METRIC, "logits", routes="mlps", **QUIET)
    for layer in range(3):
        expected = naive(model, [Node("mlp_out", layer)], [Node("logits")], "mlps")
        assert float(mlps[layer]) == pytest.approx(expected, abs=1e-9)
        for head in range(3 if layer < 2 else 0):
            expected = naive(model, [Node("z", layer, head)], [Node("k", 2, 1)], "direct")
            assert float(heads[layer, head]) == pytest.approx(expected, abs=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(heads[2], METRIC(model(CORRUPTED)).expand(3))
    apart = patching.path_patch_heads(
        model, CORRUPTED, CLEAN, METRIC, ("k", 2, 1), per_prompt=True, memory_budget=1, **QUIET
    )
    torch.testing.assert_close(apart.mean(-1), heads)
    everything_recorded = model.run_with_cache(CORRUPTED)[1]
    for given in (None, everything_recorded):
        direct = patching.get_act_patch_direct_path_all_sources(
            model, CORRUPTED, CLEAN, given, METRIC, "k", verbose=False
        )
        torch.testing.assert_close(direct[:, :, 2, 1], heads)


def test_the_progress_bar_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    patching.path_patch_heads(changed_model("attention", "subclass"), CORRUPTED, CLEAN, METRIC, "logits")
    assert "one run per sender (blocks.1.attn is a Hot, which overrides forward)" in capsys.readouterr().err
    patching.path_patch_heads(tiny_model(), CORRUPTED, CLEAN, METRIC, "logits")
    assert "one run per sender" not in capsys.readouterr().err


def test_hooks_of_ones_own_are_refused_as_before_and_the_model_is_left_as_it_was() -> None:
    model = changed_model("MLP", "torch hook")
    patching.path_patch(model, CORRUPTED, CLEAN, METRIC, SENDERS, "logits", **QUIET)
    assert not any(point.live for point in model.hook_points())
    assert sum(len(module._forward_hooks) for module in model.modules()) == 1
    with (
        model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda x, hook: x)]),
        pytest.raises(ValueError, match=r"remove the hook at 'blocks\.1\.attn\.hook_z' first"),
    ):
        patching.path_patch(model, CORRUPTED, CLEAN, METRIC, SENDERS, "logits", **QUIET)


# Attribution patching


@pytest.mark.parametrize("way", WAYS)
def test_qk_fix_is_refused_where_attention_is_not_stock_and_the_rest_is_right(way: str) -> None:
    model, grid = changed_model("attention", way), "attn_head_q_by_pos"
    runs = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(
        ValueError, match=r"qk_fix computes attention anew .* but blocks\.1\.attn (is|has) .*: leave qk"
    ):
        patching.attribution_patch(model, CORRUPTED, CLEAN, METRIC, [grid], qk_fix=True, **QUIET)
    assert not runs
    patching.attribution_patch(model, CORRUPTED, CLEAN, METRIC, ["resid_pre"], qk_fix=True, **QUIET)  # no q, no k
    estimate = patching.attribution_patch(model, CORRUPTED, CLEAN, METRIC, [grid], **QUIET)[grid]
    clean, corrupted = (model.run_with_cache(tokens)[1]["q", 1].detach() for tokens in (CLEAN, CORRUPTED))
    slopes = []
    for step in (1e-5, -1e-5):
        change = torch.zeros_like(clean)
        change[:, 2, 1] = step * (clean - corrupted)[:, 2, 1]
        hook = ("blocks.1.attn.hook_q", lambda x, hook, change=change: x + change)
        with torch.no_grad():
            slopes.append(float(METRIC(model.run_with_hooks(CORRUPTED, fwd_hooks=[hook]))))
    assert float(estimate[1, 2, 1]) == pytest.approx((slopes[0] - slopes[1]) / 2e-5, abs=1e-7)


def test_qk_fix_goes_on_where_something_else_is_not_stock() -> None:
    model = changed_model("MLP", "subclass")
    fixed = patching.attribution_patch(model, CORRUPTED, CLEAN, METRIC, ["attn_head_k_by_pos"], qk_fix=True, **QUIET)
    assert fixed["attn_head_k_by_pos"].isfinite().all()
