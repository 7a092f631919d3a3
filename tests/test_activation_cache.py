"""ActivationCache: the residual stream taken apart, each method beside a direct computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooked_lm import ActivationCache
from tests.activation_cache_helpers import BATCH, EXACT, POS, TOKENS, every_model, norm_without_bias, run
from tests.helpers import tiny_model


def final_stream(cache: ActivationCache) -> Tensor:
    return cache["resid_post", -1]


# A mapping


def test_short_keys_find_what_their_full_names_do() -> None:
    _, _, cache = run()
    for key, full in {
        "embed": "hook_embed",
        "pos_embed": "hook_pos_embed",
        ("embed",): "hook_embed",
        ("q", 0): "blocks.0.attn.hook_q",
        ("scale", 1, "ln1"): "blocks.1.ln1.hook_scale",
        ("normalized", 1, "ln2"): "blocks.1.ln2.hook_normalized",
        "scale": "ln_final.hook_scale",
        ("resid_post", -1): "blocks.2.hook_resid_post",
        ("resid_post", -3): "blocks.0.hook_resid_post",
        ("attn", 1): "blocks.1.attn.hook_pattern",
        "k2a": "blocks.2.attn.hook_k",
        "scale2ln1": "blocks.2.ln1.hook_scale",
        ("pre", 2, "mlp"): "blocks.2.mlp.hook_pre",
        "blocks.1.hook_mlp_out": "blocks.1.hook_mlp_out",
        ("out", None, "unembed"): "unembed.hook_out",
    }.items():
        assert cache[key] is cache.cache_dict[full]
        assert key in cache


def test_a_cache_is_a_mapping_of_full_names() -> None:
    model, _, cache = run()
    assert list(cache.keys()) == list(cache) == list(cache.cache_dict)
    assert [tensor.data_ptr() for tensor in cache.values()] == [cache[name].data_ptr() for name in cache]
    assert dict(cache.items()) == cache.cache_dict
    assert len(cache) == len(cache.cache_dict)
    assert cache.model is model
    assert cache.has_batch_dim
    assert "blocks.0.hook_resid_pre" in repr(cache)
    assert "nothing" not in cache
    assert cache.get("nothing") is None


def test_moving_a_cache_moves_every_tensor_and_keeps_shared_ones_shared() -> None:
    _, _, cache = run()
    assert cache.to("cpu") is cache
    assert cache["resid_post", 0].data_ptr() == cache["resid_pre", 1].data_ptr()
    cache.to("meta")
    assert {tensor.device.type for tensor in cache.values()} == {"meta"}


def test_the_batch_axis_is_removed_when_it_is_one() -> None:
    model, _, cache = run()
    with pytest.raises(ValueError, match=r"the batch axis can go only when it is 1; .* has shape \(2, 7"):
        cache.remove_batch_dim()
    assert cache.has_batch_dim
    _, single = model.run_with_cache(TOKENS[:1])
    _, full = model.run_with_cache(TOKENS[:1])
    assert single.remove_batch_dim() is single
    assert not single.has_batch_dim
    assert all(torch.equal(single[name], full[name][0]) for name in full)
    assert torch.equal(single.remove_batch_dim()["q", 0], full["q", 0][0])


@pytest.mark.parametrize("batch_slice", [0, -1, (0, 1), [1, 0], slice(1, 2), None])
def test_a_batch_slice_keeps_those_prompts(batch_slice: Any) -> None:
    _, _, cache = run()
    sliced = cache.apply_slice_to_batch_dim(batch_slice)
    index = (
        slice(*batch_slice) if isinstance(batch_slice, tuple) else slice(None) if batch_slice is None else batch_slice
    )
    assert isinstance(sliced, ActivationCache)
    assert sliced.has_batch_dim == (not isinstance(batch_slice, int))
    assert all(torch.equal(sliced[name], cache[name][index]) for name in cache)
    if isinstance(batch_slice, int):
        with pytest.raises(ValueError, match="no batch axis to slice"):
            sliced.apply_slice_to_batch_dim(0)


def test_toggling_autodiff_sets_it_for_all_of_torch() -> None:
    _, _, cache = run()
    try:
        cache.toggle_autodiff()
        assert not torch.is_grad_enabled()
        cache.toggle_autodiff(mode=True)
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


def test_a_saved_cache_loads_as_it_was_and_holds_shared_tensors_once(tmp_path: Path) -> None:
    model, _, cache = run()
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    loaded = ActivationCache.load(path, model)
    assert list(loaded) == list(cache)
    assert loaded.has_batch_dim
    assert loaded.model is model
    for name in cache:
        assert torch.equal(loaded[name], cache[name])
        assert loaded[name].dtype == cache[name].dtype
    assert loaded["resid_post", 0].data_ptr() == loaded["resid_pre", 1].data_ptr()
    with safe_open(path, framework="pt") as file:
        stored = set(file.keys())
    # mlp_in is resid_mid, and resid_pre is the resid_post before it.
    assert len({"blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"} & stored) == 1
    assert len({"blocks.0.hook_resid_mid", "blocks.0.hook_mlp_in"} & stored) == 1
    torch.testing.assert_close(loaded.decompose_resid().sum(0), final_stream(cache), **EXACT)


def test_a_cache_without_batch_axis_or_with_sliced_tensors_survives_saving(tmp_path: Path) -> None:
    model, _, cache = run()
    single = cache.apply_slice_to_batch_dim(1)
    single.save(tmp_path / "one.safetensors")
    loaded = ActivationCache.load(tmp_path / "one.safetensors", model)
    assert not loaded.has_batch_dim
    assert all(torch.equal(loaded[name], single[name]) for name in single)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a saved ActivationCache"):
        ActivationCache.load(tmp_path / "other.safetensors", model)


# Whole streams


def test_accumulated_streams_are_the_inputs_of_every_block_and_the_end() -> None:
    _, _, cache = run()
    stack, labels = cache.accumulated_resid(return_labels=True)
    assert labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    expected = [cache["resid_pre", 0], cache["resid_pre", 1], cache["resid_pre", 2], cache["resid_post", 2]]
    assert torch.equal(stack, torch.stack(expected))
    assert torch.equal(cache.accumulated_resid(-1), stack)
    assert torch.equal(cache.accumulated_resid(2), stack[:3])


def test_accumulated_streams_may_include_those_between_attention_and_mlp() -> None:
    _, _, cache = run()
    stack, labels = cache.accumulated_resid(2, incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre"]
    assert torch.equal(stack[1], cache["resid_mid", 0])
    stack, labels = cache.accumulated_resid(1, mlp_input=True, return_labels=True)
    assert labels == ["0_pre", "1_pre", "1_mid"]
    assert torch.equal(stack[2], cache["resid_mid", 1])
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid", "final_post"]


@pytest.mark.parametrize("name", ["LN", "LNPre", "RMS", "RMSPre", "no norms"])
def test_each_accumulated_stream_is_normalised_by_its_own_statistics(name: str) -> None:
    model, logits, cache = run(name)
    with torch.no_grad():
        lens = cache.accumulated_resid(apply_ln=True)
        expected = torch.stack([model.ln_final(stream) for stream in cache.accumulated_resid()])
        torch.testing.assert_close(lens, expected, **EXACT)
        torch.testing.assert_close(lens[-1] @ model.W_U + model.b_U, logits, **EXACT)
        if name != "no norms":
            assert not torch.allclose(lens, cache.accumulated_resid())
        at_mlp = cache.accumulated_resid(1, mlp_input=True, apply_ln=True)
        torch.testing.assert_close(at_mlp[-1], model.blocks[1].ln2(cache["resid_mid", 1]), **EXACT)
        at_block = cache.accumulated_resid(1, apply_ln=True)
        torch.testing.assert_close(at_block[0], model.blocks[1].ln1(cache["resid_pre", 0]), **EXACT)


@pytest.mark.parametrize("pos_slice", [-1, 2, (1, 4), [0, 3]])
@pytest.mark.parametrize("apply_ln", [False, True])
def test_every_stack_may_be_cut_to_some_positions(pos_slice: Any, apply_ln: bool) -> None:
    model, _, cache = run()
    index = slice(*pos_slice) if isinstance(pos_slice, tuple) else pos_slice
    direction = torch.arange(12.0, dtype=torch.float64)
    with torch.no_grad():
        for method, options in (
            ("accumulated_resid", {}),
            ("decompose_resid", {}),
            ("stack_head_results", {"incl_remainder": True}),
            ("stack_neuron_results", {"layer": None, "incl_remainder": True}),
            ("stack_neuron_results", {"layer": 2, "incl_remainder": True}),
            ("get_full_resid_decomposition", {}),
            ("get_full_resid_decomposition", {"expand_neurons": False}),
        ):
            whole = getattr(cache, method)(apply_ln=apply_ln, **options)
            cut = getattr(cache, method)(apply_ln=apply_ln, pos_slice=pos_slice, **options)
            torch.testing.assert_close(cut, whole[:, :, index], **EXACT, msg=method)
            if "neuron" in method or "full" in method:
                projected = getattr(cache, method)(
                    apply_ln=apply_ln, pos_slice=pos_slice, project_output_onto=direction, **options
                )
                torch.testing.assert_close(projected, whole[:, :, index] @ direction, **EXACT, msg=method)
    assert model.cfg.n_layers == 3


@pytest.mark.parametrize("layer", [4, -2, 7])
def test_a_layer_out_of_range_raises(layer: int) -> None:
    _, _, cache = run()
    for call in (
        lambda: cache.accumulated_resid(layer),
        lambda: cache.decompose_resid(layer),
        lambda: cache.stack_head_results(layer),
        lambda: cache.stack_neuron_results(layer),
        lambda: cache.get_full_resid_decomposition(layer),
    ):
        with pytest.raises(ValueError, match=rf"layer {layer} is out of range: 0-3, or None for the end"):
            call()


# What is written


@every_model
def test_what_the_layers_write_sums_to_the_stream(name: str) -> None:
    model, _, cache = run(name)
    for layer in range(model.cfg.n_layers):
        torch.testing.assert_close(cache.decompose_resid(layer).sum(0), cache["resid_pre", layer], **EXACT)
        if ("resid_mid", layer) in cache:
            stack = cache.decompose_resid(layer, mlp_input=True)
            torch.testing.assert_close(stack.sum(0), cache["resid_mid", layer], **EXACT)
    for end in (None, -1, model.cfg.n_layers):
        torch.testing.assert_close(cache.decompose_resid(end).sum(0), final_stream(cache), **EXACT)


def test_a_decomposition_is_labelled_by_what_it_holds() -> None:
    _, _, cache = run()
    stack, labels = cache.decompose_resid(2, return_labels=True)
    assert labels == ["embed", "pos_embed", "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"]
    keys = ["embed", "pos_embed", ("attn_out", 0), ("mlp_out", 0), ("attn_out", 1), ("mlp_out", 1)]
    assert torch.equal(stack, torch.stack([cache[key] for key in keys]))
    assert cache.decompose_resid(1, mlp_input=True, return_labels=True)[1][-1] == "1_attn_out"
    for mode, kept in (("attn", ["0_attn_out", "1_attn_out"]), ("mlp", ["0_mlp_out", "1_mlp_out"])):
        part, labels = cache.decompose_resid(2, mode=mode, incl_embeds=False, return_labels=True)
        assert labels == kept
        assert torch.equal(part, torch.stack([cache[f"{mode}_out", layer] for layer in (0, 1)]))
    part, labels = cache.decompose_resid(2, mode="attn", mlp_input=True, return_labels=True)
    assert labels == ["embed", "pos_embed", "0_attn_out", "1_attn_out", "2_attn_out"]
    part, labels = cache.decompose_resid(2, mode="mlp", mlp_input=True, incl_embeds=False, return_labels=True)
    assert labels == ["0_mlp_out", "1_mlp_out"]
    assert cache.decompose_resid(0, incl_embeds=False).shape == (0, BATCH, POS, 12)


def test_positions_that_never_enter_the_stream_are_no_part_of_it() -> None:
    _, _, cache = run("shortformer")
    assert cache.decompose_resid(1, return_labels=True)[1] == ["embed", "0_attn_out", "0_mlp_out"]


@every_model
def test_what_the_heads_write_and_the_rest_sum_to_the_stream(name: str) -> None:
    model, _, cache = run(name)
    for layer in (*range(model.cfg.n_layers), None, -1):
        stack, labels = cache.stack_head_results(layer, incl_remainder=True, return_labels=True)
        stream = final_stream(cache) if layer in (None, -1) else cache["resid_pre", layer]
        torch.testing.assert_close(stack.sum(0), stream, **EXACT)
        depth = model.cfg.n_layers if layer in (None, -1) else layer
        assert labels == [*(f"L{i}H{h}" for i in range(depth) for h in range(3)), "remainder"]


def test_each_heads_result_is_what_its_hook_shows() -> None:
    model, _, cache = run()
    _, results = model.run_with_cache(TOKENS, names_filter="*.hook_result")
    stack, labels = cache.stack_head_results(return_labels=True)
    assert labels == list(model.all_head_labels)
    for i, label in enumerate(labels):
        layer, head = int(label[1]), int(label[3])
        torch.testing.assert_close(stack[i], results["result", layer][:, :, head], **EXACT)
    assert ("result", 0) not in cache
    cache.compute_head_results()
    for layer in range(3):
        torch.testing.assert_close(cache["result", layer], results["result", layer], **EXACT)
    torch.testing.assert_close(cache.stack_activation("result")[1], results["result", 1], **EXACT)
    assert cache.stack_head_results(0).shape == (0, BATCH, POS, 12)


def test_one_activation_is_stacked_over_the_blocks() -> None:
    _, _, cache = run()
    assert torch.equal(cache.stack_activation("z"), torch.stack([cache["z", layer] for layer in range(3)]))
    assert torch.equal(cache.stack_activation("mlp_out", 2), torch.stack([cache["mlp_out", 0], cache["mlp_out", 1]]))
    stacked = cache.stack_activation("scale", sublayer_type="ln2")
    assert torch.equal(stacked, torch.stack([cache["scale", layer, "ln2"] for layer in range(3)]))


# Neurons


@pytest.mark.parametrize("name", ["LN", "RMS", "parallel"])
def test_what_the_neurons_write_and_the_rest_sum_to_the_stream(name: str) -> None:
    model, _, cache = run(name)
    neurons = 48
    for layer in (1, None):
        stack, labels = cache.stack_neuron_results(layer, incl_remainder=True, return_labels=True)
        depth = model.cfg.n_layers if layer is None else layer
        assert labels == [*(f"L{i}N{n}" for i in range(depth) for n in range(neurons)), "remainder"]
        stream = final_stream(cache) if layer is None else cache["resid_pre", 1]
        torch.testing.assert_close(stack.sum(0), stream, **EXACT)
        first = stack[:neurons].sum(0) + model.blocks[0].mlp.b_out
        torch.testing.assert_close(first, cache["mlp_out", 0], **EXACT)


@pytest.mark.parametrize("neuron_slice", [3, -1, (5, 9), [0, 40]])
def test_some_neurons_are_picked_by_a_slice(neuron_slice: Any) -> None:
    model, _, cache = run()
    index = slice(*neuron_slice) if isinstance(neuron_slice, tuple) else neuron_slice
    picked = torch.atleast_1d(torch.arange(48)[index])
    everything = cache.stack_neuron_results(2)
    some, labels = cache.stack_neuron_results(2, neuron_slice=neuron_slice, return_labels=True)
    torch.testing.assert_close(some, everything[torch.cat([picked, 48 + picked])], **EXACT)
    assert labels == [f"L{layer}N{int(n)}" for layer in range(2) for n in picked]
    with_rest = cache.stack_neuron_results(2, neuron_slice=neuron_slice, incl_remainder=True)
    torch.testing.assert_close(with_rest.sum(0), cache["resid_pre", 2], **EXACT)
    results = cache.get_neuron_results(1, neuron_slice=neuron_slice, pos_slice=-1)
    expected = cache["post", 1][:, -1, picked, None] * model.blocks[1].mlp.W_out[picked]
    torch.testing.assert_close(results, expected, **EXACT)
    for onto in (model.W_U[:, 3], model.W_U[:, :4]):
        projected = cache.get_neuron_results(1, neuron_slice, -1, project_output_onto=onto)
        torch.testing.assert_close(projected, expected @ onto, **EXACT)


@pytest.mark.parametrize("name", ["LN", "RMS", "LNPre", "no norms"])
@pytest.mark.parametrize("apply_ln", [False, True])
@pytest.mark.parametrize("layer", [1, None])
def test_neurons_projected_on_directions_equal_the_projected_neurons(
    name: str, apply_ln: bool, layer: int | None
) -> None:
    _, _, cache = run(name)
    full = cache.stack_neuron_results(layer, incl_remainder=True, apply_ln=apply_ln)
    for shape in ((12,), (12, 4)):
        onto = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        projected = cache.stack_neuron_results(layer, incl_remainder=True, apply_ln=apply_ln, project_output_onto=onto)
        torch.testing.assert_close(projected, full @ onto, **EXACT)


def test_neurons_are_those_of_plain_mlps() -> None:
    for changes in ({"attn_only": True}, {"num_experts": 2, "experts_per_token": 1}):
        _, cache = tiny_model(**changes).run_with_cache(TOKENS)
        with pytest.raises(ValueError, match="this model has none, or a mixture of experts"):
            cache.stack_neuron_results(None)
        with pytest.raises(ValueError, match="neurons are those of plain MLPs"):
            cache.get_neuron_results(0)
    _, _, cache = run()
    with pytest.raises(ValueError, match="layer 3 is out of range: 0-2"):
        cache.get_neuron_results(3)


# Everything at once


@every_model
@pytest.mark.parametrize("expand_neurons", [True, False])
def test_the_full_decomposition_sums_to_the_stream(name: str, expand_neurons: bool) -> None:
    model, _, cache = run(name)
    onto = torch.randn(12, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for layer in (*range(model.cfg.n_layers), None):
        options: dict[str, Any] = {"layer": layer, "expand_neurons": expand_neurons}
        stack, labels = cache.get_full_resid_decomposition(**options, return_labels=True)
        stream = final_stream(cache) if layer is None else cache["resid_pre", layer]
        torch.testing.assert_close(stack.sum(0), stream, **EXACT)
        assert len(labels) == len(stack) == len(set(labels))
        assert labels[-1] == "bias"
        for index, label in enumerate(labels):
            if label.startswith("L0N"):
                expected = cache["post", 0][..., int(label[3:]), None] * model.blocks[0].mlp.W_out[int(label[3:])]
                torch.testing.assert_close(stack[index], expected, **EXACT)
            if label in ("embed", "pos_embed"):
                assert torch.equal(stack[index], cache[label])
        torch.testing.assert_close(
            cache.get_full_resid_decomposition(**options, project_output_onto=onto[:, 0]), stack @ onto[:, 0], **EXACT
        )
        scaled = cache.get_full_resid_decomposition(**options, apply_ln=True)
        norm = model.ln_final if layer is None else model.blocks[layer].ln1
        if name != "no norms":
            scale = cache["scale"] if layer is None else cache["scale", layer, "ln1"]
            torch.testing.assert_close(scaled.sum(0), norm_without_bias(stream, scale, norm), **EXACT)
        projected = cache.get_full_resid_decomposition(**options, apply_ln=True, project_output_onto=onto)
        torch.testing.assert_close(projected, scaled @ onto, **EXACT)


@pytest.mark.parametrize("expand_neurons", [True, False])
def test_the_full_decomposition_may_end_at_an_mlps_input(expand_neurons: bool) -> None:
    model, _, cache = run()
    options: dict[str, Any] = {"layer": 1, "mlp_input": True, "expand_neurons": expand_neurons}
    stack, labels = cache.get_full_resid_decomposition(**options, return_labels=True)
    torch.testing.assert_close(stack.sum(0), cache["resid_mid", 1], **EXACT)
    assert "L1H2" in labels
    scaled = cache.get_full_resid_decomposition(**options, apply_ln=True)
    expected = norm_without_bias(cache["resid_mid", 1], cache["scale", 1, "ln2"], model.blocks[1].ln2)
    torch.testing.assert_close(scaled.sum(0), expected, **EXACT)
