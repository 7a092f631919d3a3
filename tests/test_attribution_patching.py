"""Attribution patching is the first-order change of the metric, and its audit says how far that is from the truth."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, UnknownHookError, metrics
from hooked_lm.circuits.induction import repeated_random_tokens
from hooked_lm.names import get_act_name
from hooked_lm.patching.attribution import (
    DEFAULT_GRIDS,
    GRIDS,
    Attribution,
    Audit,
    AuditedCell,
    attribution_patch,
    choose_cells,
    replacement,
    spearman,
)
from tests.architectures_helpers import LATENT
from tests.helpers import tiny_model, tiny_tokens

CLEAN, CORRUPTED = tiny_tokens(seed=1, pos=5), tiny_tokens(seed=2, pos=5)
METRIC = metrics.logit_diff(3, 4)

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt": {},
    "parallel": {"parallel_attn_mlp": True},
    "grouped rotary gated": {
        "n_key_value_heads": 1,
        "positional_embedding_type": "rotary",
        "gated_mlp": True,
        "act_fn": "silu",
        "normalization_type": "RMS",
        "use_qk_norm": True,
    },
    "norms on the stream": {"norm_placement": "residual", "positional_embedding_type": "alibi"},
    "norms before and after": {"norm_placement": "before_and_after", "attn_scores_soft_cap": 2.0},
    "sinks, windows": {"attention_sinks": True, "window_size": 3, "attn_types": ["local", "global"]},
    "attention only": {"attn_only": True, "positional_embedding_type": "shortformer"},
    "experts from block to block": {
        "n_layers": 2,
        "shortcut_experts": True,
        "num_experts": 3,
        "identity_experts": 1,
        "experts_per_token": 3,
    },
    "latent attention": LATENT,
    "a layer before the unembedding, no first norm": {"unembed_act_fn": "silu", "first_norm": False},
    "gated attention": {"attention_gate": True, "n_key_value_heads": 1},
    "experts": {"num_experts": 3, "experts_per_token": 3, "act_fn": "silu", "gated_mlp": True},
}


def grids_of(model: HookedTransformer) -> list[str]:
    """All grids that a model has: without MLPs or with experts it has no neurons, without `resid_mid` none of that."""
    return [name for name, grid in GRIDS.items() if all(site in model.hook_dict for site in sites_of(model, name))]


def sites_of(model: HookedTransformer, name: str) -> list[str]:
    return [get_act_name(GRIDS[name].activation, layer) for layer in range(model.cfg.n_layers)]


def attributed(model: HookedTransformer, grids: Any = None, **how: Any) -> Attribution:
    how = {"metric": METRIC, "verbose": False, **how}
    return attribution_patch(model, CORRUPTED, CLEAN, grids=grids, **how)


def loop(
    model: HookedTransformer,
    name: str,
    share: float = 1.0,
    metric: Any = METRIC,
    cells: list[Any] | None = None,
    **how: Any,
) -> Tensor:
    """The metric of every cell, or some: a hooked run each, with a share of the way from corrupted to clean put in."""
    names = sites_of(model, name)
    clean, corrupted = (
        model.run_with_cache(tokens, names_filter=names, **how)[1].cache_dict for tokens in (CLEAN, CORRUPTED)
    )
    # Where the site keeps each axis: pos and head change places in patterns.
    axes = {"pos": 2, "head": 1} if GRIDS[name].activation == "pattern" else {"pos": 1, "head": 2, "d_mlp": 2}
    kept = GRIDS[name].axes[1:]
    sizes = [clean[names[0]].shape[axes[axis]] for axis in kept]
    values = []
    for layer, *place in cells or itertools.product(range(model.cfg.n_layers), *map(range, sizes)):
        part: list[Any] = [slice(None)] * clean[names[layer]].ndim
        for axis, index in zip(kept, place, strict=True):
            part[axes[axis]] = index
        change = torch.zeros_like(clean[names[layer]])
        change[tuple(part)] = share * (clean[names[layer]] - corrupted[names[layer]])[tuple(part)]
        with torch.no_grad():
            hook = (names[layer], lambda x, hook, change=change: x + change)
            values.append(metric(model.run_with_hooks(CORRUPTED, fwd_hooks=[hook], **how)))
    return torch.stack(values) if cells else torch.stack(values).reshape(model.cfg.n_layers, *sizes)


def baseline(model: HookedTransformer, metric: Any = METRIC) -> float:
    with torch.no_grad():
        return float(metric(model(CORRUPTED)))


def assert_same(one: Any, other: Any, atol: float = 1e-10) -> None:
    torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=0, atol=atol)


# The estimate


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cells_are_the_slope_of_the_metric_on_the_way_to_the_clean_activation(name: str) -> None:
    """Central differences of plain hooked runs, a hundred-thousandth of the way to either side."""
    model = tiny_model(**ARCHITECTURES[name], d_mlp=6)
    grids = grids_of(model)
    result = attributed(model, grids)
    assert result.corrupted == pytest.approx(baseline(model), abs=1e-12)
    for grid in grids:
        cells = [cell for cell, _ in choose_cells(result[grid], 2, torch.Generator().manual_seed(0))]
        slope = (loop(model, grid, 1e-5, cells=cells) - loop(model, grid, -1e-5, cells=cells)) / 2e-5
        assert_same(torch.stack([result[grid][cell] for cell in cells]), slope, atol=1e-7)
        assert float(slope[0].abs()) > 1e-4


@pytest.mark.parametrize("grid", ["resid_post", "attn_out", "attn_head_out_by_pos", "attn_head_v_all_pos"])
def test_where_the_rest_of_the_model_is_linear_the_estimate_is_the_truth(grid: str) -> None:
    model = tiny_model(n_layers=1, attn_only=True, normalization_type=None)
    assert_same(attributed(model, grid)[grid], loop(model, grid) - baseline(model))


def test_positions_of_a_head_or_neuron_add_up() -> None:
    model = tiny_model()
    names = [name.removesuffix("_all_pos") for name in GRIDS if name.endswith("all_pos")]
    result = attributed(model, [f"{name}_{way}" for name in names for way in ("all_pos", "by_pos")])
    for name in names:
        assert result[f"{name}_all_pos"].shape == (2, 48 if name == "neuron" else 3)
        assert result[f"{name}_by_pos"].shape == (2, 5, 48 if name == "neuron" else 3)
        assert_same(result[f"{name}_by_pos"].sum(1), result[f"{name}_all_pos"])


def test_by_default_there_are_the_stream_attention_mlps_and_heads() -> None:
    result = attributed(tiny_model())
    assert tuple(result.grids) == DEFAULT_GRIDS
    assert {name: tuple(grid.shape) for name, grid in result.grids.items()} == {
        "resid_pre": (2, 5),
        "attn_out": (2, 5),
        "mlp_out": (2, 5),
        "attn_head_out_all_pos": (2, 3),
        "attn_head_out_by_pos": (2, 5, 3),
    }
    assert "mlp_out" not in attributed(tiny_model(attn_only=True)).grids
    assert result.audits == {}
    with pytest.raises(KeyError, match="no grid 'resid_mid' was estimated; there are resid_pre"):
        result["resid_mid"]


def test_any_differentiable_function_of_the_logits_is_a_metric() -> None:
    model = tiny_model()

    def metric(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1)[:, 1:, 5].square().mean()

    slope = (loop(model, "resid_pre", 1e-5, metric) - loop(model, "resid_pre", -1e-5, metric)) / 2e-5
    assert_same(attributed(model, "resid_pre", metric=metric)["resid_pre"], slope, atol=1e-7)


def test_a_cache_and_the_prompts_it_came_from_give_the_same() -> None:
    model = tiny_model()
    cache = model.run_with_cache(CLEAN)[1]
    one, other = attributed(model), attribution_patch(model, CORRUPTED, cache, METRIC, verbose=False)
    for name in one.grids:
        assert_same(one[name], other[name])


def test_padded_prompts_are_estimated_as_they_are_run() -> None:
    model = tiny_model(positional_embedding_type="rotary")
    mask = torch.ones_like(CORRUPTED)
    mask[0, :2] = 0
    how = {"attention_mask": mask}
    slope = (loop(model, "resid_pre", 1e-5, **how) - loop(model, "resid_pre", -1e-5, **how)) / 2e-5
    padded = attributed(model, "resid_pre", audit=3, **how)
    assert_same(padded["resid_pre"], slope, atol=1e-7)
    assert float((padded["resid_pre"] - attributed(model, "resid_pre")["resid_pre"]).abs().max()) > 1e-3
    exact = loop(model, "resid_pre", **how) - padded.corrupted
    for one in padded.audits["resid_pre"].cells:
        assert one.exact == pytest.approx(float(exact[one.cell]), abs=1e-10)


def test_hooks_on_the_model_act_in_every_run() -> None:
    model = tiny_model()
    without_a_head = ("blocks.0.attn.hook_z", lambda z, hook: z * torch.tensor([1.0, 0.0, 1.0])[:, None].to(z))
    with model.hooks(fwd_hooks=[without_a_head]):
        result = attributed(model, "attn_head_out_all_pos", audit=2)
        exact = loop(model, "attn_head_out_all_pos") - result.corrupted
    assert float(result["attn_head_out_all_pos"][0, 1]) == 0
    assert float(result["attn_head_out_all_pos"][0, 0]) != 0
    for one in result.audits["attn_head_out_all_pos"].cells:
        assert one.exact == pytest.approx(float(exact[one.cell]), abs=1e-10)


# Queries and keys by way of attention


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_key_value_heads": 1, "positional_embedding_type": "rotary"},
        {"positional_embedding_type": "alibi", "window_size": 3, "attn_types": ["local"]},
        {"attention_sinks": True, "attn_scores_soft_cap": 2.0},
        {"attention_gate": True, "n_key_value_heads": 1},
        {"use_qk_norm": True, "qk_norm_after_rotary": True, "positional_embedding_type": "rotary"},
    ],
)
def test_behind_attention_that_is_linear_the_fix_makes_queries_and_keys_exact(changes: dict[str, Any]) -> None:
    """One layer and no final norm: only the softmax is not linear, and only the fix follows it."""
    model = tiny_model(n_layers=1, attn_only=True, final_norm=False, attn_scale=0.3, **changes)
    for name in ("q", "k"):
        for grid in (f"attn_head_{name}_by_pos", f"attn_head_{name}_all_pos"):
            exact = loop(model, grid) - baseline(model)
            assert_same(attributed(model, grid, qk_fix=True)[grid], exact)
            assert float((attributed(model, grid)[grid] - exact).abs().max()) > 1e-4


def test_the_fix_follows_keys_out_of_saturated_attention_in_float32() -> None:
    """Scores tens apart: gradients vanish, and a share of attention less than rounding decides what is left."""
    model = tiny_model(n_layers=1, attn_only=True, final_norm=False, attn_scale=0.03)
    exact = loop(model, "attn_head_k_by_pos") - baseline(model)
    model.to(torch.float32)
    fixed = attributed(model, "attn_head_k_by_pos", qk_fix=True)["attn_head_k_by_pos"]
    plain = attributed(model, "attn_head_k_by_pos")["attn_head_k_by_pos"]
    assert_same(fixed.double(), exact, atol=1e-4 * float(exact.abs().max()))
    assert float((plain - exact).abs().max()) > 0.5 * float(exact.abs().max())


def test_the_fix_is_about_queries_and_keys_alone_and_respects_padding() -> None:
    model = tiny_model(n_layers=1, attn_only=True, final_norm=False, attn_scale=0.3)
    mask = torch.ones_like(CORRUPTED)
    mask[0, :2] = 0
    grids = ["attn_head_k_by_pos", "attn_head_v_by_pos", "resid_pre"]
    fixed, plain = (attributed(model, grids, qk_fix=fix, attention_mask=mask) for fix in (True, False))
    assert list(fixed.grids) == grids
    assert_same(fixed["attn_head_v_by_pos"], plain["attn_head_v_by_pos"])
    assert_same(fixed["resid_pre"], plain["resid_pre"])
    exact = loop(model, "attn_head_k_by_pos", attention_mask=mask) - fixed.corrupted
    assert_same(fixed["attn_head_k_by_pos"], exact)


# The audit


@pytest.mark.parametrize("grid", [name for name in GRIDS if name not in ("neuron_by_pos",)])
def test_audited_cells_are_patched_exactly(grid: str) -> None:
    model = tiny_model(d_mlp=6)
    result = attributed(model, grid, audit=3)
    audit = result.audits[grid]
    exact = loop(model, grid) - baseline(model)
    assert audit.axes == GRIDS[grid].axes
    for one in audit.cells:
        assert one.estimate == float(result[grid][one.cell])
        assert one.exact == pytest.approx(float(exact[one.cell]), abs=1e-10)
    by_size = result[grid].abs().flatten().sort(descending=True).values
    top = [abs(one.estimate) for one in audit.cells if one.chosen == "top"]
    assert top == by_size[:3].tolist()
    assert len({one.cell for one in audit.cells}) == len(audit.cells) == min(6, exact.numel())


def test_the_random_cells_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    model, grid = tiny_model(), "attn_head_out_by_pos"
    before = torch.get_rng_state()
    cells = [attributed(model, grid, audit=4, seed=seed).audits[grid].cells for seed in (0, 0, 1)]
    assert cells[0] == cells[1]
    assert cells[0][:4] == cells[2][:4]
    assert {one.cell for one in cells[0]} != {one.cell for one in cells[2]}
    assert torch.equal(before, torch.get_rng_state())


def test_an_audit_of_more_cells_than_there_are_takes_all_of_them_once() -> None:
    model = tiny_model()
    audit = attributed(model, "attn_head_out_all_pos", audit=100).audits["attn_head_out_all_pos"]
    assert sorted(one.cell for one in audit.cells) == sorted(itertools.product(range(2), range(3)))
    effects = torch.tensor([[3.0, -9.0], [1.0, 0.0]])
    chosen = choose_cells(effects, 2, torch.Generator().manual_seed(0))
    assert [cell for cell, how in chosen if how == "top"] == [(0, 1), (0, 0)]
    assert {cell for cell, how in chosen if how == "random"} == {(1, 0), (1, 1)}


def test_rank_correlation_and_sign_flips_are_those_of_the_audited_pairs() -> None:
    model = tiny_model()
    audit = attributed(model, "attn_head_out_by_pos", audit=15).audits["attn_head_out_by_pos"]
    pairs = np.array([(one.estimate, one.exact) for one in audit.cells])
    pairs[np.abs(pairs) < 1e-12] = 0
    ranks = [[(np.sum(column < x) + np.sum(column <= x) + 1) / 2 for x in column] for column in pairs.T]
    assert audit.rank_correlation == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)
    flips = {
        one.cell for one in audit.cells if np.sign(one.estimate) * np.sign(one.exact) == -1 and abs(one.exact) > 1e-12
    }
    assert {one.cell for one in audit.sign_flips} == flips
    assert 0 < len(audit.sign_flips) < len(audit.cells)


def test_spearman_is_one_for_any_rising_curve_and_shares_the_ranks_of_equals() -> None:
    x = torch.tensor([0.1, 5.0, -2.0, 0.3], dtype=torch.float64)
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(x, -(x**3)) == pytest.approx(-1)
    # Ranks 1.5 1.5 3 against 1 2 3: covariance 1.5, deviations sqrt(1.5) and sqrt(2).
    tied = spearman(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert tied == pytest.approx(1.5 / math.sqrt(3))
    assert math.isnan(spearman(x, torch.ones_like(x)))
    with pytest.raises(ValueError, match="two samples of one length"):
        spearman(x, x[:2])


def test_rounding_has_neither_sign_nor_rank() -> None:
    pairs = [(0.5, -0.4), (0.5, -1e-9), (-1e-9, 0.3), (0.2, 0.1)]
    cells = [AuditedCell((index, 0), *pair, chosen="top") for index, pair in enumerate(pairs)]
    assert [one.cell for one in Audit.of("resid_pre", cells, 1e-6).sign_flips] == [(0, 0)]
    small = [AuditedCell((index, 0), 0.0, index * 1e-9, chosen="random") for index in range(9)]
    assert Audit.of("resid_pre", [*small, cells[3]], 1e-6).rank_correlation == pytest.approx(1)
    assert Audit.of("resid_pre", [*small, cells[3]], 1e-12).rank_correlation < 0.9


def test_a_replaced_part_does_not_keep_the_whole_activation_alive() -> None:
    z = torch.randn(1, 7, 3, 4)
    for how in ({"pos": 2}, {"head": 1}, {"pos": 2, "head": (0, 2)}, {"feature": 3}):
        value = replacement(tiny_model(), "blocks.0.attn.hook_z", z, **how).value
        assert isinstance(value, Tensor)
        assert value.untyped_storage().nbytes() == value.nbytes < z.nbytes
    assert replacement(tiny_model(), "blocks.0.attn.hook_z", z).value is z


def test_the_result_prints_its_audits_and_its_strongest_cells() -> None:
    result = attributed(tiny_model(), ["attn_head_out_by_pos", "resid_pre"], audit=15)
    text = str(result)
    assert "attn_head_out_by_pos: 30 cells patched exactly, rank correlation" in text
    assert f"{len(result.audits['attn_head_out_by_pos'].sign_flips)} sign flips" in text
    assert text.count("  sign flip\n") >= 1
    cell, effect = result.strongest("resid_pre", 1)[0]
    assert effect == float(result["resid_pre"][cell])
    assert abs(effect) == float(result["resid_pre"].abs().max())
    unaudited = str(attributed(tiny_model(), "resid_pre"))
    assert f"resid_pre: largest {effect:.4g} at layer {cell[0]}, pos {cell[1]}; not audited" in unaudited


def test_on_the_induction_model_estimate_and_audit_point_to_the_two_heads() -> None:
    model = HookedTransformer.from_pretrained("demo-induction-2l")
    clean = repeated_random_tokens(8, 12, model.cfg.d_vocab, torch.Generator().manual_seed(0))
    metric = metrics.logit_diff(clean[:, 6], clean[:, 10])
    corrupted = clean.clone()
    corrupted[:, 5] = clean[:, 9]
    grid = "attn_head_out_all_pos"
    result = attribution_patch(model, corrupted[:, :18], clean[:, :18], metric, grid, audit=8, verbose=False)
    assert {cell for cell, _ in result.strongest(grid, 2)} == {(0, 0), (1, 1)}
    audit = result.audits[grid]
    exact = sorted(audit.cells, key=lambda one: -abs(one.exact))
    assert {one.cell for one in exact[:2]} == {(0, 0), (1, 1)}
    assert min(one.exact for one in exact[:2]) > 10 * max(abs(one.exact) for one in exact[2:])
    assert audit.rank_correlation > 0.5


# What is left behind


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_are_taken_in_any_mode_and_nothing_is_changed(frozen: bool, mode: Any) -> None:
    model = tiny_model()
    expected = attributed(model, audit=1)
    model(CLEAN, return_type="loss").backward()
    model.requires_grad_(not frozen)
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        # Tokens made in inference mode cannot be saved for a backward pass.
        result = attribution_patch(model, CORRUPTED.clone(), CLEAN.clone(), METRIC, audit=1, verbose=False)
        fixed = attribution_patch(
            model, CORRUPTED.clone(), CLEAN.clone(), METRIC, ["attn_head_q_by_pos"], qk_fix=True, verbose=False
        )
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    for name in expected.grids:
        assert_same(result[name], expected[name])
        assert not result[name].requires_grad
    assert not fixed["attn_head_q_by_pos"].requires_grad
    assert all(parameter.requires_grad is not frozen for parameter in model.parameters())
    after = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert grads.keys() == after.keys()
    assert all(torch.equal(grads[name], after[name]) for name in grads)
    assert not any(point.live for point in model.hook_points())


def test_in_low_precision_changes_are_added_up_in_float32() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    result = attributed(model, "resid_pre", audit=2)
    assert result["resid_pre"].dtype == torch.float32
    exact = attributed(model.to(torch.float64), "resid_pre")["resid_pre"]
    assert float((result["resid_pre"] - exact).abs().max()) < 0.1 * float(exact.abs().max())


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grids": ["resid_pre", "residual"]}, "grids are among resid_pre, .* got 'residual'"),
        ({"grids": []}, "got none"),
        ({"audit": -1}, "audit is a number of cells, 0 or more; got -1"),
        ({"metric": metrics.logit([1, 2, 3])}, "has answers for 3 prompts; there are 2"),
    ],
)
def test_arguments_that_cannot_be_are_named_before_anything_runs(changes: dict[str, Any], message: str) -> None:
    model = tiny_model()
    runs = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(ValueError, match=message):
        attributed(model, **changes)
    with pytest.raises(ValueError, match="clean prompts have 4 positions and corrupted ones 5"):
        attribution_patch(model, CORRUPTED, CLEAN[:, :4], METRIC, verbose=False)
    with pytest.raises(
        ValueError, match="there are 3 clean prompts and 2 corrupted ones: give as many, or one for all"
    ):
        attribution_patch(model, CORRUPTED, tiny_tokens(batch=3, pos=5), METRIC, verbose=False)
    with pytest.raises(UnknownHookError, match=r"no hook 'blocks\.0\.hook_resid_mid'"):
        attributed(tiny_model(attn_only=True), "resid_mid")
    with pytest.raises(ValueError, match="a model without layers has nothing to patch"):
        attributed(tiny_model(n_layers=0), "resid_pre")
    assert not runs


def test_caches_that_do_not_fit_are_named() -> None:
    model = tiny_model()
    short = model.run_with_cache(CLEAN[:, :4])[1]
    with pytest.raises(
        ValueError, match=r"clean prompts have 4 positions and corrupted ones 5 \('blocks\.0\.attn\.hook_pat"
    ):
        attribution_patch(model, CORRUPTED, short, METRIC, "attn_head_pattern_all_pos", verbose=False)
    few = model.run_with_cache(CLEAN, names_filter="blocks.0.*")[1]
    with pytest.raises(UnknownHookError, match=r"the clean cache has no 'blocks\.1\.hook_resid_pre'"):
        attribution_patch(model, CORRUPTED, few, METRIC, "resid_pre", verbose=False)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (metrics.rank(3), "the metric 'rank' has no gradient"),
        (metrics.accuracy(3), "the metric 'accuracy' has no gradient"),
        (lambda logits: logits.sum().detach(), "the metric has no gradient"),
        (lambda logits: float(logits.detach().sum()), "returns a scalar tensor; it returned float"),
        (lambda logits: logits[:, -1, 0], r"returns a scalar tensor; it returned shape \(2,\)"),
        (lambda logits: logits.sum() * float("nan"), "is not a number for the corrupted run"),
    ],
)
def test_metrics_without_a_slope_are_named(metric: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attributed(tiny_model(), metric=metric)
