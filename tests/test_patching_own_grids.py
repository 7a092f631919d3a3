"""A grid of one's own: registered by name, it is patched, estimated and audited like those that are there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import UnknownHookError, metrics, patching
from hooked_lm.patching import GRIDS, PATCHES
from tests.helpers import tiny_model, tiny_tokens

CLEAN, CORRUPTED = tiny_tokens(pos=4, seed=1), tiny_tokens(pos=4, seed=2)
METRIC = metrics.logit_diff([3, 4], [7, 8])
QUIET: dict[str, Any] = {"verbose": False}


@pytest.fixture(autouse=True)
def own_grids_are_forgotten() -> Iterator[None]:
    kept = dict(PATCHES), dict(GRIDS)
    yield
    for known, before in zip((PATCHES, GRIDS), kept, strict=True):
        known.clear()
        known.update(before)


@pytest.mark.parametrize(
    ("activation", "axes", "shape", "changes"),
    [
        ("post", ("layer", "pos", "d_mlp"), (2, 4, 6), {"d_mlp": 6}),
        ("blocks.{layer}.mlp.hook_post", ("layer", "d_mlp", "pos"), (2, 6, 4), {"d_mlp": 6}),
        ("rot_k", ("layer", "head"), (2, 1), {"n_key_value_heads": 1, "positional_embedding_type": "rotary"}),
        ("expert_weights", ("layer", "expert"), (2, 3), {"num_experts": 3, "experts_per_token": 3, "act_fn": "silu"}),
        ("blocks.{layer}.ln2.hook_normalized", ("layer",), (2,), {}),
        ("attn_scores", ("layer", "dest_pos"), (2, 4), {}),
    ],
)
def test_a_grid_of_ones_own_is_patched_and_estimated_like_any_other(
    activation: str, axes: tuple[str, ...], shape: tuple[int, ...], changes: dict[str, Any]
) -> None:
    model = tiny_model(**changes)
    patch = patching.register_patch_site("mine", activation, axes)
    assert PATCHES["mine"] == GRIDS["mine"] == patch
    grid = patching.get_act_patch("mine", model, CORRUPTED, CLEAN, METRIC, **QUIET)
    assert tuple(grid.shape) == shape
    with torch.no_grad():
        clean = model.run_with_cache(CLEAN, names_filter=[patch.site(layer) for layer in range(2)])[1].cache_dict
        where = {"pos": 1, "head": 2, "d_mlp": 2, "expert": 2, "dest_pos": 2}
        for cell in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist():
            site = patch.site(cell[0])

            def write(x: Tensor, hook: Any, cell: list[int] = cell, site: str = site) -> Tensor:
                part: list[Any] = [slice(None)] * x.ndim
                for axis, index in zip(axes[1:], cell[1:], strict=True):
                    part[where[axis]] = index
                x = x.clone()
                x[tuple(part)] = clean[site][tuple(part)]
                return x

            expected = METRIC(model.run_with_hooks(CORRUPTED, fwd_hooks=[(site, write)]))
            torch.testing.assert_close(grid[tuple(cell)], expected)
    pairs = patching.patch_pairs(model, CLEAN, CORRUPTED, METRIC, "mine", normalize=None, **QUIET)
    torch.testing.assert_close(pairs.mean, grid)
    estimate = patching.attribution_patch(model, CORRUPTED, CLEAN, METRIC, ["mine"], audit=2, **QUIET)
    assert estimate["mine"].shape == grid.shape
    for one in estimate.audits["mine"].cells:
        assert one.exact == pytest.approx(float(grid[one.cell]) - estimate.corrupted, abs=1e-9)


def test_the_estimate_of_a_grid_of_ones_own_is_that_of_the_same_grid_under_another_name() -> None:
    model = tiny_model(d_mlp=6)
    patching.register_patch_site("neurons", "post", ("layer", "d_mlp", "pos"))
    result = patching.attribution_patch(model, CORRUPTED, CLEAN, METRIC, ["neurons", "neuron_by_pos"], **QUIET)
    torch.testing.assert_close(result["neurons"].transpose(1, 2), result["neuron_by_pos"])


@pytest.mark.parametrize(
    ("name", "activation", "axes", "said"),
    [
        ("resid_pre", "resid_pre", ("layer", "pos"), "'resid_pre' cannot be added: names in use are resid_pre, "),
        ("neuron_by_pos", "post", ("layer", "pos"), "cannot be added"),
        ("", "post", ("layer", "pos"), "cannot be added"),
        ("mine", "", ("layer", "pos"), "activation is the short name of one"),
        ("mine", "post", ("pos", "layer"), "'layer' first and only there"),
        ("mine", "post", "layer", "'layer' first and only there"),
        ("mine", "post", (), "'layer' first and only there"),
        ("mine", "post", ("layer", "pos", "dest_pos"), "go along one axis of the activation"),
    ],
)
def test_grids_that_cannot_be_are_refused(name: str, activation: str, axes: Any, said: str) -> None:
    before = dict(PATCHES), dict(GRIDS)
    with pytest.raises(ValueError, match=said):
        patching.register_patch_site(name, activation, axes)
    assert (dict(PATCHES), dict(GRIDS)) == before


def test_a_name_is_taken_once() -> None:
    patching.register_patch_site("mine", "post", ("layer", "pos"))
    with pytest.raises(ValueError, match="'mine' cannot be added"):
        patching.register_patch_site("mine", "post", ("layer", "pos"))


def test_sites_and_axes_that_a_model_lacks_are_named() -> None:
    patching.register_patch_site("mine", "z", ("layer", "d_mlp"))
    with pytest.raises(
        ValueError, match=r"at 'blocks\.0\.attn\.hook_z' are \[batch pos head d_head\]: a grid along 'd_"
    ):
        patching.get_act_patch("mine", tiny_model(), CORRUPTED, CLEAN, METRIC, **QUIET)
    patching.register_patch_site("heads", "blocks.{layer}.hook_acts", ("layer", "head"))
    with pytest.raises(UnknownHookError, match=r"no hook 'blocks\.0\.hook_acts'"):
        patching.get_act_patch("heads", tiny_model(), CORRUPTED, CLEAN, METRIC, **QUIET)
    with pytest.raises(ValueError, match="unknown grid 'yours': it is one of resid_pre, "):
        patching.get_act_patch("yours", tiny_model(), CORRUPTED, CLEAN, METRIC, **QUIET)


def test_an_unknown_option_of_a_grid_raises_before_anything_runs() -> None:
    model = tiny_model()
    model.add_hook("hook_embed", lambda x, hook: pytest.fail("a run"))
    with pytest.raises(TypeError, match="no option 'verbos': there are attention_mask, per_prompt, memory_budget"):
        patching.get_act_patch_resid_pre(model, tiny_tokens(), tiny_tokens(seed=1), metrics.logit(3), verbos=False)  # type: ignore[call-arg]
