"""Activation patching equals a plain loop of hooked runs, cell by cell, and finds the circuit of a trained model."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pandas
import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, UnknownHookError, metrics, patching
from hooked_lm.circuits.induction import repeated_random_tokens
from hooked_lm.patching.patches import PATCHES
from tests.helpers import tiny_model, tiny_tokens

CLEAN, CORRUPTED = tiny_tokens(pos=5, seed=1), tiny_tokens(pos=5, seed=2)
METRIC = metrics.logit_diff([3, 4], [7, 8])
QUIET: dict[str, Any] = {"verbose": False}

# How each grid's cell changes an activation, written with plain indices: grid -> (site, cell -> what is replaced).
# A cell is given as in the result: [layer pos], [layer head], [layer pos head] or [layer head dest src].
ALL = slice(None)
GRIDS: dict[str, tuple[str, Callable[[tuple[int, ...]], tuple[Any, ...]]]] = {
    **{name: (f"hook_{name}", lambda cell: (ALL, cell[1])) for name in ("resid_pre", "resid_mid", "resid_post")},
    **{name: (f"hook_{name}", lambda cell: (ALL, cell[1])) for name in ("attn_out", "mlp_out")},
    **{
        f"attn_head_{name}_by_pos": (f"attn.hook_{site}", lambda cell: (ALL, cell[1], cell[2]))
        for name, site in (("out", "z"), ("q", "q"), ("k", "k"), ("v", "v"))
    },
    **{
        f"attn_head_{name}_all_pos": (f"attn.hook_{site}", lambda cell: (ALL, ALL, cell[1]))
        for name, site in (("out", "z"), ("q", "q"), ("k", "k"), ("v", "v"))
    },
    "attn_head_pattern_all_pos": ("attn.hook_pattern", lambda cell: (ALL, cell[1])),
    "attn_head_pattern_by_pos": ("attn.hook_pattern", lambda cell: (ALL, cell[2], cell[1])),
    "attn_head_pattern_dest_src_pos": ("attn.hook_pattern", lambda cell: (ALL, *cell[1:])),
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {
        "n_heads": 4,
        "n_key_value_heads": 2,
        "d_head": 4,
        "positional_embedding_type": "rotary",
        "normalization_type": "RMS",
        "gated_mlp": True,
    },
}


def plain_loop(
    model: HookedTransformer, name: str, shape: tuple[int, ...], clean: Any, tokens: Tensor, metric: Any, **kwargs: Any
) -> Tensor:
    """The grid by one hooked run per cell."""
    site, where = GRIDS[name]
    grid = torch.zeros(shape, dtype=model.W_E.dtype)
    for cell in itertools.product(*map(range, shape)):
        full = f"blocks.{cell[0]}.{site}"

        def patch(x: Tensor, hook: Any, full: str = full, cell: tuple[int, ...] = cell) -> Tensor:
            x = x.clone()
            x[where(cell)] = clean[full][where(cell)]
            return x

        grid[cell] = metric(model.run_with_hooks(tokens, fwd_hooks=[(full, patch)], **kwargs)).item()
    return grid


def patched(model: HookedTransformer, name: str, metric: Any = METRIC, **options: Any) -> Tensor:
    _, cache = model.run_with_cache(CLEAN)
    function = getattr(patching, f"get_act_patch_{name}")
    result: Tensor = function(model, CORRUPTED, cache, metric, **QUIET, **options)
    return result


def expected_shape(model: HookedTransformer, name: str) -> tuple[int, ...]:
    cfg, n_pos = model.cfg, CORRUPTED.shape[1]
    heads = cfg.n_kv_heads if name.startswith(("attn_head_k", "attn_head_v")) else cfg.n_heads
    if name.endswith("dest_src_pos"):
        return cfg.n_layers, heads, n_pos, n_pos
    if name.endswith("all_pos"):
        return cfg.n_layers, heads
    return (cfg.n_layers, n_pos, heads) if name.startswith("attn_head") else (cfg.n_layers, n_pos)


# Every grid


@pytest.mark.parametrize("name", list(GRIDS))
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_every_grid_equals_a_loop_of_hooked_runs(architecture: str, name: str) -> None:
    model = tiny_model(**ARCHITECTURES[architecture])
    result = patched(model, name)
    assert tuple(result.shape) == expected_shape(model, name)
    _, cache = model.run_with_cache(CLEAN)
    torch.testing.assert_close(result, plain_loop(model, name, tuple(result.shape), cache, CORRUPTED, METRIC))
    assert result.std() > 1e-4  # the cells differ


def test_the_grids_have_the_names_of_the_functions() -> None:
    assert set(patching.PATCHES) == set(GRIDS)


def test_the_last_stream_patched_where_the_metric_reads_gives_the_clean_score_and_elsewhere_the_corrupted_one() -> None:
    model = tiny_model()
    grid = patched(model, "resid_post")
    torch.testing.assert_close(grid[-1, -1], METRIC(model(CLEAN)))
    torch.testing.assert_close(grid[-1, :-1], METRIC(model(CORRUPTED)).expand(4))


def test_block_every_stacks_the_stream_attention_and_mlp() -> None:
    model = tiny_model()
    every = patched(model, "block_every")
    parts = [patched(model, name) for name in ("resid_pre", "attn_out", "mlp_out")]
    torch.testing.assert_close(every, torch.stack(parts))


def test_the_metric_has_two_names() -> None:
    model = tiny_model()
    for name in ("block_every", "resid_pre"):
        function = getattr(patching, f"get_act_patch_{name}")
        grid = function(model, CORRUPTED, CLEAN, metric=METRIC, verbose=False)
        torch.testing.assert_close(grid, patched(model, name))
        with pytest.raises(TypeError, match=f"get_act_patch_{name} got metric= and patching_metric="):
            function(model, CORRUPTED, CLEAN, metric=METRIC, patching_metric=METRIC)


@pytest.mark.parametrize("positions", ["all_pos", "by_pos"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_head_every_stacks_output_query_key_value_and_pattern_and_repeats_shared_heads(
    architecture: str, positions: str
) -> None:
    model = tiny_model(**ARCHITECTURES[architecture])
    every = patched(model, f"attn_head_{positions}_every")
    group = model.cfg.n_heads // model.cfg.n_kv_heads
    for index, name in enumerate(("out", "q", "k", "v", "pattern")):
        part = patched(model, f"attn_head_{name}_{positions}")
        expected = part if part.shape == every[index].shape else part.repeat_interleave(group, -1)
        torch.testing.assert_close(every[index], expected)


def test_the_number_of_grids_in_every_is_that_of_the_patch_types() -> None:
    model = tiny_model(n_heads=3)
    assert patched(model, "block_every").shape == (3, 2, 5)
    assert patched(model, "attn_head_all_pos_every").shape == (5, 2, 3)
    assert patched(model, "attn_head_by_pos_every").shape == (5, 2, 5, 3)


def test_a_function_on_logits_serves_as_a_metric() -> None:
    model = tiny_model()

    def metric(logits: Tensor) -> Tensor:
        return (logits[0, -1, 3] - logits[0, -1, 7] + logits[1, -1, 4] - logits[1, -1, 8]) / 2

    torch.testing.assert_close(patched(model, "resid_mid", metric), patched(model, "resid_mid"))


def test_padded_prompts_are_patched_with_their_mask() -> None:
    model = tiny_model()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    _, cache = model.run_with_cache(CLEAN, attention_mask=mask)
    result = patching.get_act_patch_resid_pre(model, CORRUPTED, cache, METRIC, attention_mask=mask, **QUIET)
    expected = plain_loop(model, "resid_pre", (2, 5), cache, CORRUPTED, METRIC, attention_mask=mask)
    torch.testing.assert_close(result, expected)
    assert not torch.allclose(result, patched(model, "resid_pre"))


def test_one_clean_prompt_serves_all_corrupted_ones_with_or_without_its_batch_axis() -> None:
    model = tiny_model()
    _, cache = model.run_with_cache(CLEAN[:1])
    with_axis = patching.get_act_patch_attn_head_out_by_pos(model, CORRUPTED, cache, METRIC, **QUIET)
    _, repeated = model.run_with_cache(CLEAN[:1].expand(2, -1))
    expected = patching.get_act_patch_attn_head_out_by_pos(model, CORRUPTED, repeated, METRIC, **QUIET)
    without = patching.get_act_patch_attn_head_out_by_pos(model, CORRUPTED, cache.remove_batch_dim(), METRIC, **QUIET)
    torch.testing.assert_close(with_axis, expected)
    torch.testing.assert_close(without, expected)


def test_neither_the_cache_nor_the_model_is_changed() -> None:
    model = tiny_model()
    _, cache = model.run_with_cache(CLEAN)
    before = {name: activation.clone() for name, activation in cache.items()}
    patching.get_act_patch_block_every(model, CORRUPTED, cache, METRIC, **QUIET)
    assert all(torch.equal(cache[name], activation) for name, activation in before.items())
    assert not [point for point in model.hook_points() if point.live]


# The generic function


def generic(model: HookedTransformer, setter: Any, activation: str, **how: Any) -> Any:
    _, cache = model.run_with_cache(CLEAN)
    return patching.generic_activation_patch(model, CORRUPTED, cache, METRIC, setter, activation, **how, **QUIET)


@pytest.mark.parametrize(
    ("setter", "activation", "axes", "grid"),
    [
        ("layer_pos_patch_setter", "resid_mid", ("layer", "pos"), "resid_mid"),
        (
            "layer_pos_head_vector_patch_setter",
            "k",
            ("layer", "pos", "head_index"),
            "attn_head_k_by_pos",
        ),
        ("layer_head_vector_patch_setter", "v", ("layer", "head"), "attn_head_v_all_pos"),
        ("layer_head_pattern_patch_setter", "pattern", ("layer", "head"), "attn_head_pattern_all_pos"),
        (
            "layer_head_dest_src_pos_pattern_patch_setter",
            "pattern",
            ("layer", "head_index", "dest_pos", "src_pos"),
            "attn_head_pattern_dest_src_pos",
        ),
    ],
)
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_a_setter_gives_the_same_grid_swept_and_called_as_a_function(
    architecture: str, setter: str, activation: str, axes: tuple[str, ...], grid: str
) -> None:
    model = tiny_model(**ARCHITECTURES[architecture])
    chosen = getattr(patching, setter)
    swept = generic(model, chosen, activation, index_axis_names=axes)
    called = generic(model, lambda *arguments: chosen(*arguments), activation, index_axis_names=axes)
    torch.testing.assert_close(swept, called)
    torch.testing.assert_close(swept, patched(model, grid))


def test_the_pattern_setter_by_position_has_the_head_before_the_position() -> None:
    model = tiny_model()
    grid = generic(
        model,
        patching.layer_head_pos_pattern_patch_setter,
        "pattern",
        index_axis_names=("layer", "head_index", "dest_pos"),
    )
    torch.testing.assert_close(grid, patched(model, "attn_head_pattern_by_pos").transpose(1, 2))


def test_a_setter_of_ones_own_may_do_anything() -> None:
    model = tiny_model()
    _, cache = model.run_with_cache(CLEAN)
    seen = []

    def halfway(corrupted: Tensor, index: list[int], clean: Tensor) -> Tensor:
        layer, neuron = index
        seen.append((layer, neuron))
        assert torch.equal(clean, cache["post", layer])
        corrupted[..., neuron] = (corrupted[..., neuron] + clean[..., neuron]) / 2
        return corrupted

    rows = pandas.DataFrame({"layer": [1, 0, 1], "neuron": [5, 2, 0]})
    result = generic(model, halfway, "post", index_df=rows)
    assert seen == [(1, 5), (0, 2), (1, 0)]
    _, corrupted = model.run_with_cache(CORRUPTED)
    for place, (layer, neuron) in enumerate(seen):
        mixed = corrupted["post", layer].clone()
        mixed[..., neuron] = mixed[..., neuron].lerp(cache["post", layer][..., neuron], 0.5)
        logits = model.run_with_hooks(
            CORRUPTED, fwd_hooks=[(f"blocks.{layer}.mlp.hook_post", lambda x, hook, mixed=mixed: mixed)]
        )
        torch.testing.assert_close(result[place], METRIC(logits))


def test_a_setter_that_writes_in_place_and_returns_nothing_does_the_same() -> None:
    model = tiny_model()

    def in_place(corrupted: Tensor, index: list[int], clean: Tensor) -> None:
        corrupted[:, index[1]] = clean[:, index[1]]

    result = generic(model, in_place, "resid_pre", index_axis_names=("layer", "pos"))
    torch.testing.assert_close(result, patched(model, "resid_pre"))


def test_a_data_frame_of_indices_gives_one_value_per_row() -> None:
    model = tiny_model()
    rows = pandas.DataFrame({"layer": [1, 0, 1], "pos": [2, -1, 0]})
    result, returned = generic(model, patching.layer_pos_patch_setter, "attn_out", index_df=rows, return_index_df=True)
    grid = patched(model, "attn_out")
    torch.testing.assert_close(result, torch.stack([grid[1, 2], grid[0, -1], grid[1, 0]]))
    assert returned is rows


@pytest.mark.parametrize("name", list(PATCHES))
def test_every_single_grid_returns_the_data_frame_of_its_cells_if_asked(name: str) -> None:
    model = tiny_model()
    prompts = (model, *(tiny_tokens(1, 4, seed=seed) for seed in (0, 1)))
    function = getattr(patching, f"get_act_patch_{name}")
    grid, rows = function(*prompts, lambda logits: logits[0, -1, 3], return_index_df=True)
    torch.testing.assert_close(grid, function(*prompts, lambda logits: logits[0, -1, 3], return_index_df=False))
    assert list(rows.columns) == list(PATCHES[name].axes)
    assert [grid[tuple(cell)].item() for cell in rows.to_numpy()] == grid.flatten().tolist()


def test_the_index_data_frame_lists_the_grid_in_its_order() -> None:
    model = tiny_model()
    result, rows = generic(
        model,
        patching.layer_head_vector_patch_setter,
        "z",
        index_axis_names=("layer", "head_index"),
        return_index_df=True,
    )
    assert list(rows.columns) == ["layer", "head_index"]
    assert rows.to_numpy().tolist() == [list(cell) for cell in itertools.product(range(2), range(3))]
    assert result.shape == (2, 3)


# Bad input. Nothing has run when it is found.


@pytest.fixture
def idle_model(monkeypatch: pytest.MonkeyPatch) -> HookedTransformer:
    """A model that may not be run."""
    model = tiny_model(n_heads=3)

    def forward(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(model, "forward", forward)
    return model


def cache_of(tokens: Tensor, **how: Any) -> Any:
    return tiny_model(n_heads=3).run_with_cache(tokens, **how)[1]


@pytest.mark.parametrize("name", ["resid_pre", "attn_head_k_by_pos", "attn_head_pattern_all_pos"])
def test_clean_prompts_of_another_length_raise(idle_model: HookedTransformer, name: str) -> None:
    with pytest.raises(ValueError, match="clean prompts have 6 positions and corrupted ones 5"):
        getattr(patching, f"get_act_patch_{name}")(idle_model, CORRUPTED, cache_of(tiny_tokens(pos=6)), METRIC, **QUIET)


def test_a_cache_of_another_number_of_prompts_raises(idle_model: HookedTransformer) -> None:
    cache = cache_of(tiny_tokens(batch=3, pos=5))
    with pytest.raises(
        ValueError,
        match=r"there are 3 clean prompts and 2 corrupted ones \(.* in the clean cache\): give as many, or one",
    ):
        patching.get_act_patch_resid_pre(idle_model, CORRUPTED, cache, METRIC, **QUIET)


def test_a_site_that_the_cache_lacks_raises(idle_model: HookedTransformer) -> None:
    cache = cache_of(CLEAN, names_filter="blocks.0.hook_attn_out")
    with pytest.raises(UnknownHookError, match=r"the clean cache has no 'blocks\.1\.hook_attn_out'"):
        patching.get_act_patch_attn_out(idle_model, CORRUPTED, cache, METRIC, **QUIET)


@pytest.mark.parametrize("function", ["get_act_patch_mlp_out", "get_act_patch_resid_mid", "get_act_patch_block_every"])
def test_a_site_that_the_model_lacks_raises(function: str) -> None:
    model = tiny_model(attn_only=True)
    _, cache = model.run_with_cache(CLEAN)
    with pytest.raises(UnknownHookError, match=r"no hook 'blocks\.0\.hook_(mlp_out|resid_mid)'"):
        getattr(patching, function)(model, CORRUPTED, cache, METRIC, **QUIET)


@pytest.mark.parametrize(
    ("setter", "activation", "how", "said"),
    [
        ("layer_pos_patch_setter", "z", {"index_axis_names": ("layer", "position")}, "unknown axis 'position'"),
        ("layer_pos_patch_setter", "z", {"index_axis_names": ("pos", "layer")}, "the first axis is 'layer'"),
        ("layer_pos_patch_setter", "z", {"index_axis_names": ("layer", "head")}, r"takes an index \('layer', 'pos'\)"),
        ("layer_pos_patch_setter", "z", {"index_axis_names": "layer"}, "a tuple of names"),
        ("layer_pos_patch_setter", "z", {}, "index_axis_names or index_df"),
        ("layer_pos_patch_setter", "pattern", {"index_axis_names": ("layer", "pos")}, r"\[batch pos \.\.\.\]"),
        ("layer_head_pattern_patch_setter", "z", {"index_axis_names": ("layer", "head")}, "are .batch pos head d_head"),
        ("layer_head_vector_patch_setter", "resid_pre", {"index_axis_names": ("layer", "head")}, "batch pos head"),
        ("layer_pos_patch_setter", "rezid_pre", {"index_axis_names": ("layer", "pos")}, "did you mean 'resid_pre'"),
        ("layer_pos_patch_setter", "z", {"index_df": pandas.DataFrame({"layer": [0]})}, r"takes an index \(layer, pos"),
        (
            "layer_pos_patch_setter",
            "z",
            {"index_df": pandas.DataFrame({"layer": [0], "pos": [0.5]})},
            "made of integers",
        ),
        ("layer_pos_patch_setter", "z", {"index_df": pandas.DataFrame({"layer": ["a"], "pos": [1]})}, "first column"),
    ],
)
def test_indices_that_do_not_fit_raise(
    idle_model: HookedTransformer, setter: str, activation: str, how: dict[str, Any], said: str
) -> None:
    chosen = getattr(patching, setter)
    with pytest.raises(ValueError, match=said):
        patching.generic_activation_patch(
            idle_model, CORRUPTED, cache_of(CLEAN), METRIC, chosen, activation, **how, **QUIET
        )


@pytest.mark.parametrize(
    ("layer", "pos", "error", "said"),
    [(2, 0, UnknownHookError, "layers run 0-1"), (0, 5, IndexError, "5"), (0, -6, IndexError, "-6")],
)
def test_an_index_out_of_range_raises(
    idle_model: HookedTransformer, layer: int, pos: int, error: type[Exception], said: str
) -> None:
    rows = pandas.DataFrame({"layer": [layer], "pos": [pos]})
    with pytest.raises(error, match=said):
        patching.generic_activation_patch(
            idle_model,
            CORRUPTED,
            cache_of(CLEAN),
            METRIC,
            patching.layer_pos_patch_setter,
            "resid_pre",
            index_df=rows,
            **QUIET,
        )


def test_what_is_no_data_frame_or_no_cache_raises(idle_model: HookedTransformer) -> None:
    setter = patching.layer_pos_patch_setter
    with pytest.raises(TypeError, match=r"index_df is a pandas DataFrame .* got list"):
        patching.generic_activation_patch(idle_model, CORRUPTED, cache_of(CLEAN), METRIC, setter, "z", index_df=[[0]])
    with pytest.raises(TypeError, match="give the clean prompts, or a cache of a run on them; the input is a string"):
        patching.get_act_patch_resid_pre(idle_model, CORRUPTED, 3, METRIC)  # type: ignore[arg-type]


@pytest.mark.parametrize("setter", [patching.layer_pos_patch_setter, lambda *a: patching.layer_pos_patch_setter(*a)])
@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (lambda logits: logits[:, -1, 3], r"returns a scalar; it returned shape \(2,\)"),
        (lambda logits: logits.mean() * float("nan"), "is not a number"),
    ],
)
def test_a_metric_that_is_no_number_raises(setter: Any, metric: Any, said: str) -> None:
    model = tiny_model()
    _, cache = model.run_with_cache(CLEAN)
    with pytest.raises(ValueError, match=said):
        patching.generic_activation_patch(
            model, CORRUPTED, cache, metric, setter, "resid_pre", index_axis_names=("layer", "pos"), **QUIET
        )


def test_an_unknown_option_raises() -> None:
    with pytest.raises(TypeError, match="atention_mask"):
        patched(tiny_model(), "resid_pre", atention_mask=None)


# The module


def test_every_public_name_resolves_and_an_unknown_one_does_not() -> None:
    assert all(hasattr(patching, name) for name in patching.__all__)
    assert set(patching.__all__) <= set(dir(patching))
    with pytest.raises(AttributeError, match="get_act_patch_nothing"):
        patching.get_act_patch_nothing  # noqa: B018


def test_importing_the_module_does_not_load_pandas() -> None:
    code = "import sys, hooked_lm.patching; sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_data_frames_need_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    model, setter, axes = tiny_model(), patching.layer_pos_patch_setter, ("layer", "pos")
    assert generic(model, setter, "resid_pre", index_axis_names=axes).shape == (2, 5)
    with pytest.raises(ImportError, match="needs pandas: pip install"):
        generic(model, setter, "resid_pre", index_axis_names=axes, return_index_df=True)


# A circuit that is known


def test_patching_finds_the_two_heads_of_the_induction_circuit() -> None:
    """In corrupted prompts the last token is new. The two heads bring back what came after it the first time."""
    model = HookedTransformer.from_pretrained("demo-induction-2l")
    length, generator = 12, torch.Generator().manual_seed(0)
    repeated = repeated_random_tokens(16, length, model.cfg.d_vocab, generator, start_token=0)
    clean, answer = repeated[:, :-1], repeated[:, -1]
    corrupted = clean.clone()
    earlier = length - 1  # where the last token stood the first time
    unused = [next(token for token in range(1, 96) if token not in row) for row in clean.tolist()]
    corrupted[:, earlier] = torch.tensor(unused)
    _, cache = model.run_with_cache(clean)
    metric = metrics.log_prob(answer)
    before, after = metric(model(corrupted)), metric(model(clean))
    assert after - before > 4

    def restored(grid: Tensor) -> Tensor:
        return (grid - before) / (after - before)

    heads = restored(patching.get_act_patch_attn_head_out_all_pos(model, corrupted, cache, metric, **QUIET))
    circuit = torch.zeros(2, 4)
    circuit[0, 0] = circuit[1, 1] = 1.0
    torch.testing.assert_close(heads, circuit, atol=0.01, rtol=0)
    # L0H0 writes at the token after the earlier one, L1H1 reads there and writes at the last.
    by_pos = restored(patching.get_act_patch_attn_head_out_by_pos(model, corrupted, cache, metric, **QUIET))
    assert by_pos[0, earlier + 1, 0] > 0.99
    assert by_pos[1, -1, 1] > 0.99
    # L1H1 takes it up by its key and moves its attention there.
    every = restored(patching.get_act_patch_attn_head_by_pos_every(model, corrupted, cache, metric, **QUIET))
    assert every[2, 1, earlier + 1, 1] > 0.99
    assert every[4, 1, -1, 1] > 0.99


def test_the_data_frame_of_a_grid_counts_its_last_column_fastest() -> None:
    frame = patching.make_df_from_ranges([2, 3], ["layer", "pos"])
    assert frame.to_dict("list") == {"layer": [0, 0, 0, 1, 1, 1], "pos": [0, 1, 2, 0, 1, 2]}
    with pytest.raises(ValueError, match="2 ranges for 1 columns"):
        patching.make_df_from_ranges([2, 3], ["layer"])
