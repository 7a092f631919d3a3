"""`model.spread(devices)`: each number is that of the model on one device, to the bit, and no move is forgotten."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, Intervention, metrics, patching
from hooked_lm.circuits import (
    circuit_vectors,
    copying_scores,
    full_ov_circuit,
    full_qk_circuit,
    head_composition,
    head_effects,
    k_composition_qk_circuit,
    logit_attribution,
    matching_scores,
    mean_head_outputs,
    repeated_token_scores,
    token_embeddings,
)
from hooked_lm.circuits.logit_lens import logit_lens
from hooked_lm.components.spread import layers_by_device
from hooked_lm.names import UnknownHookError
from hooked_lm.patching import Node
from hooked_lm.sweep import sweep
from tests.family_rows import ROWS, Row
from tests.helpers import tiny_model, tiny_tokens
from tests.logical_devices import logical_devices
from tests.sweep_helpers import DEEP

pytestmark = pytest.mark.usefixtures("no_type_checks")
FIRST_ROWS = list({row.architecture: row for row in reversed(ROWS)}.values())
MODELS: dict[str, dict[str, Any]] = {
    **DEEP,
    "deep mixture": {"n_layers": 3, "num_experts": 3, "experts_per_token": 2, "gated_mlp": True},
    "deep shortformer": {"n_layers": 3, "positional_embedding_type": "shortformer"},
    "deep tied": {"n_layers": 3, "tie_word_embeddings": True},
}
TOKENS, OTHERS = tiny_tokens(2, 7), tiny_tokens(2, 7, seed=1)
MASK = torch.ones(2, 7).long()
MASK[0, :2] = 0
DIFF = metrics.logit_diff([3, 4], [5, 6])
SITES = (
    *("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post", "hook_mlp_in"),
    *("attn.hook_z", "attn.hook_q", "attn.hook_pattern", "ln1.hook_scale", "mlp.hook_post", "hook_q_input"),
)


def spread(model: HookedTransformer) -> HookedTransformer:
    """A copy on two logical devices, the first block on one and the others on the other."""
    other = copy.deepcopy(model)
    with logical_devices():
        per_pair = 2 if model.cfg.shortcut_experts else 1
        return other.spread({"cpu:0": per_pair, "cpu:1": model.cfg.n_layers - per_pair})


def cells(model: HookedTransformer) -> list[list[Intervention]]:
    names = [f"blocks.{layer}.{site}" for layer in range(model.cfg.n_layers) for site in SITES]
    last = Intervention("blocks.2.hook_resid_post", "scale", 0.9, pos=-1)
    alone = [
        Intervention(name, "scale", 1.3, pos=pos) for name in names if name in model.hook_dict for pos in (0, 3, -1)
    ]
    return [[one, *more] for one in alone for more in ((), (last,))]


def first_entry(logits: Tensor) -> Tensor:
    return logits[:, -1, 3].mean() - logits[0, -2, 4]


def trace(model: HookedTransformer) -> dict[str, Tensor]:
    with model.trace() as t:
        a, b = t.prompts(TOKENS, attention_mask=MASK), t.prompts([[1, 2, 3], [4, 5, 6, 7, 8]])
        b["resid_pre", 2].at(pos=-1).replace(a["resid_pre", 1].at(pos=-1))
        b["z", 1].at(head=0, pos=0).scale(2.0)
        score = b.metric(metrics.log_prob(3))
        score.save("score")
        t.logits_of(a["resid_post", 0].at(pos=-1)).save("lens")
        t.gradient(score.sum(), of=[b["resid_pre", 0].at(pos=-1), b["z", 2].at(pos=-1)])[1].save("gradient")
        t.stack([a["resid_post", layer].at(pos=-1) for layer in range(3)]).save("stack")
        steps = t.generate([[1, 2, 3], [4, 5]], max_new_tokens=3)
        steps["resid_post", 1].at(pos=-1).add(torch.ones(model.cfg.d_model))
        steps["resid_post", 2].at(pos=-1).save("states")
    return dict(t.results)


def gradients(model: HookedTransformer) -> dict[str, Tensor]:
    model(TOKENS, return_type="loss").backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return found


def backward_cache(model: HookedTransformer) -> dict[str, Tensor]:
    kept, forward, backward = model.get_caching_hooks(incl_bwd=True)
    with model.hooks(forward, backward):
        model(TOKENS, return_type="loss").backward()
    model.zero_grad()
    return dict(kept)


def continued(model: HookedTransformer) -> Tensor:
    past = model.new_kv_cache(2, capacity=2)
    model(TOKENS[:, :4], past_kv_cache=past)
    logits: Tensor = model(TOKENS[:, 4:], past_kv_cache=past)
    return logits


def generated(model: HookedTransformer, **options: Any) -> object:
    return model.generate(TOKENS, max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False, **options)


def path(routes: str) -> Callable[[HookedTransformer], object]:
    receivers = [Node("q", 2, head=0), Node("resid_post", 2)]
    senders = [Node("z", 0, head=0), Node("embed"), Node("attn_out", 1)]

    def run(model: HookedTransformer) -> object:
        there = [one for one in receivers if routes == "direct" or one.name == "q"]
        return [
            patching.path_patch(model, TOKENS, OTHERS, DIFF, senders, one, routes=routes, verbose=False)
            for one in there
        ]

    return run


QUIET: dict[str, Any] = {"verbose": False}
WORK: dict[str, Callable[[HookedTransformer], object]] = {
    "logits": lambda m: m(TOKENS, attention_mask=MASK),
    "loss": lambda m: m(TOKENS, return_type="loss"),
    "gradients": gradients,
    "backward cache": backward_cache,
    "part of the layers": lambda m: m(m(TOKENS, stop_at_layer=1), start_at_layer=1),
    "logits of a stream": lambda m: m.logits_of(m(TOKENS, stop_at_layer=2)),
    "cache": lambda m: m.run_with_cache(TOKENS, attention_mask=MASK)[1].cache_dict,
    "graph": lambda m: m.run_with_cache(TOKENS, keep_graph=True)[1]["resid_post", 1],
    "lazy cache": lambda m: dict(m.run_with_cache(TOKENS, attention_mask=MASK, lazy=True)[1]),
    "key-value cache": continued,
    "generation": generated,
    "generation without a cache": lambda m: generated(m, use_past_kv_cache=False),
    "interventions": lambda m: [m.run(TOKENS, interventions=cell) for cell in cells(m)[::7]],
    "trace": trace,
    "sweep": lambda m: sweep(m, TOKENS, cells(m), DIFF, **QUIET),
    "sweep of a function": lambda m: sweep(m, TOKENS, cells(m)[::3], first_entry, **QUIET),
    "padded sweep": lambda m: sweep(m, TOKENS, cells(m)[::3], DIFF, attention_mask=MASK, per_prompt=True, **QUIET),
    "pairs": lambda m: patching.patch_pairs(m, TOKENS, OTHERS, DIFF, **QUIET),
    "classic grids": lambda m: patching.get_act_patch_block_every(m, OTHERS, m.run_with_cache(TOKENS)[1], first_entry),
    "ablation": lambda m: [patching.ablate(m, TOKENS, DIFF, unit, **QUIET) for unit in ("heads", "positions")],
    "attribution": lambda m: patching.attribution_patch(m, TOKENS, OTHERS, DIFF, audit=3, **QUIET),
    "queries and keys": lambda m: patching.attribution_patch(
        m, TOKENS, OTHERS, DIFF, grids=["attn_head_q_by_pos", "attn_head_k_by_pos"], qk_fix=True
    ),
    "causal tracing": lambda m: patching.causal_trace(m, TOKENS, [1, 2], DIFF, **QUIET),
    **{f"paths, {routes}": path(routes) for routes in ("direct", "mlps", "all")},
    "streams": lambda m: m.run_with_cache(TOKENS)[1].accumulated_resid(apply_ln=True),
    "a layer's own norm": lambda m: (kept := m.run_with_cache(TOKENS)[1]).apply_ln_to_stack(
        kept.accumulated_resid(layer=2), layer=2, recompute_ln=True
    ),
    "parts": lambda m: m.run_with_cache(TOKENS)[1].decompose_resid(layer=2, apply_ln=True),
    "heads": lambda m: m.run_with_cache(TOKENS)[1].stack_head_results(apply_ln=True, incl_remainder=True),
    "neurons": lambda m: m.run_with_cache(TOKENS)[1].stack_neuron_results(3, apply_ln=True, incl_remainder=True),
    "everything": lambda m: m.run_with_cache(TOKENS)[1].get_full_resid_decomposition(expand_neurons=True),
    "stacked weights": lambda m: [m.W_Q, m.W_O, m.b_O, m.accumulated_bias(3), m.all_composition_scores("K")],
    "composition": lambda m: head_composition(m, "K", **QUIET),
    "logit attribution": lambda m: [
        logit_attribution(m.run_with_cache(TOKENS)[1], 3, 5, split=split)  # type: ignore[arg-type]
        for split in ("component", "head", "source")
    ],
    "full circuits": lambda m: [
        full_qk_circuit(m, 1, 0, normalize=True).AB,
        full_ov_circuit(m, 1, 0, effective_embedding=True).AB,
        k_composition_qk_circuit(m, (0, 0), (2, 1)).AB,
        token_embeddings(m, effective=True, **QUIET),
    ],
    "scores of circuits": lambda m: [copying_scores(m, **QUIET), matching_scores(m, **QUIET)],
    "singular vectors": lambda m: circuit_vectors(m, 1, 0, n_vectors=2),
    "lens": lambda m: logit_lens(m, TOKENS, targets=[3, 4], **QUIET),
    "head scores": lambda m: repeated_token_scores(m, **QUIET),
    "effects of heads": lambda m: [head_effects(m, TOKENS, OTHERS, DIFF, **QUIET), mean_head_outputs(m, TOKENS)],
}
# What a model has no use for raises before it runs, on one device as on two.
ABSENT = (ValueError, AttributeError, UnknownHookError)


def plain(found: object) -> object:
    """A result as lists of tensors and numbers."""
    if is_dataclass(found) and not isinstance(found, type):
        return [plain(getattr(found, one.name)) for one in fields(found) if one.name != "model"]
    if isinstance(found, dict):
        return [[name, plain(one)] for name, one in found.items()]
    return [plain(one) for one in found] if isinstance(found, (list, tuple)) else found


def assert_same(found: object, expected: object) -> None:
    if isinstance(expected, list):
        assert isinstance(found, list)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, Tensor):
        assert isinstance(found, Tensor)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)
    elif isinstance(expected, (str, int, float, type(None))):
        assert found == expected
    else:
        assert type(found) is type(expected)


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("name", MODELS)
def test_every_number_is_that_of_one_device(name: str, work: str) -> None:
    model = tiny_model(**MODELS[name])
    other = spread(model)
    try:
        expected = WORK[work](model)
    except ABSENT as error:
        with logical_devices(), pytest.raises(type(error), match=re.escape(str(error)[:60])):
            WORK[work](other)
        return
    with logical_devices():
        found = WORK[work](other)
    assert_same(plain(found), plain(expected))


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in FIRST_ROWS])
def test_every_family_gives_the_same_numbers(row: Row, tmp_path: Any) -> None:
    row.save(row.build(), tmp_path)
    model = HookedTransformer.from_pretrained_no_processing(tmp_path, tokenizer=False)
    other, tokens = spread(model), row.tokens(2)
    n_new = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "verbose": False}
    logits, cache = model.run_with_cache(tokens)
    text = model.generate(tokens[:, :4], **n_new)
    with logical_devices():
        found, kept = other.run_with_cache(tokens)
        again = other.generate(tokens[:, :4], **n_new)
    assert torch.equal(found, logits)
    assert torch.equal(again, text)  # type: ignore[arg-type]
    assert kept.keys() == cache.keys()
    assert all(torch.equal(kept[site], cache[site]) for site in cache)


def test_a_forgotten_move_is_an_error() -> None:
    model = spread(tiny_model(n_layers=3))
    with logical_devices(), pytest.raises(RuntimeError, match="expected all tensors on one device"):
        model.blocks[1](model(TOKENS, stop_at_layer=1))


def test_hooks_act_where_their_block_is_and_everything_comes_out_at_home() -> None:
    model, seen = spread(tiny_model(n_layers=3)), {}
    with logical_devices():
        model.run_with_hooks(
            TOKENS, fwd_hooks=[(lambda name: True, lambda x, hook: seen.update({hook.name: x.device}))]
        )
        assert model.spread_over is not None
        for name, device in seen.items():
            assert device == model.spread_over.of_site(name), name
        assert seen["blocks.0.attn.hook_q"] == seen["unembed.hook_out"] == torch.device("cpu:0")
        assert seen["blocks.2.mlp.hook_post"] == torch.device("cpu:1")
        logits, cache = model.run_with_cache(TOKENS)
        assert {one.device for one in (logits, *cache.values())} == {torch.device("cpu:0")}
        kept = model.run_with_cache(TOKENS, device="cpu:1")[1]
        assert {one.device for one in kept.values()} == {torch.device("cpu:1")}
        past = model.new_kv_cache()
        assert [entry.past_keys.device.index for entry in past] == [0, 1, 1]
        assert model.cfg.device == "cpu:0"


def test_blocks_without_memory_are_computed_in_shape_only() -> None:
    model, on_one = tiny_model(n_layers=4), {}
    model.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: True, lambda x, hook: on_one.update({hook.name: x.shape}))])
    model.spread(["cpu", "meta"], home="cpu")
    assert model.spread_over is not None
    assert [one.type for one in model.spread_over.blocks] == ["cpu", "cpu", "meta", "meta"]
    seen: dict[str, Tensor] = {}
    with pytest.raises(NotImplementedError, match="meta"):  # nothing comes back from there
        model.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: True, lambda x, hook: seen.update({hook.name: x}))])
    shapes = {name: shape for name, shape in on_one.items() if not name.startswith(("ln_final", "unembed"))}
    assert {name: x.shape for name, x in seen.items()} == shapes
    assert {name[:8] for name, x in seen.items() if x.is_meta} == {"blocks.2", "blocks.3"}
    assert not any(x.is_meta for name, x in seen.items() if not name.startswith(("blocks.2", "blocks.3")))


def test_moving_the_model_undoes_it_and_another_precision_does_not() -> None:
    model = spread(tiny_model(n_layers=3))
    with logical_devices():
        assert model.to(torch.float32).spread_over is not None
        assert pickle.loads(pickle.dumps(model.spread_over)) == model.spread_over
        assert copy.deepcopy(model).spread_over == model.spread_over
        assert model.to("cpu:1").spread_over is None
        assert model(TOKENS).device == torch.device("cpu:1")
        assert model.spread(["cpu:0"]).spread_over is None
    assert tiny_model().spread_over is None


def test_saved_weights_do_not_know_of_devices(tmp_path: Any) -> None:
    model = tiny_model(n_layers=3)
    with logical_devices():
        spread(model).save_pretrained(tmp_path)
    again = HookedTransformer.from_pretrained_no_processing(tmp_path, tokenizer=False)
    assert again.spread_over is None
    assert torch.equal(again(TOKENS), model(TOKENS))


def test_the_fullest_device_holds_as_little_as_possible() -> None:
    devices = [torch.device(f"cpu:{index}") for index in range(3)]

    def counts(sizes: list[int], at_home: int, together: list[bool] | None = None) -> list[int]:
        placed = layers_by_device(sizes, at_home, devices, together or [False] * len(sizes))
        assert placed == sorted(placed, key=lambda device: device.index)
        return [placed.count(device) for device in devices]

    assert counts([10] * 9, 0) == [3, 3, 3]
    assert counts([10] * 8, 30) == [1, 4, 3]  # the first holds the embeddings too
    assert counts([10] * 6, 100) == [0, 6, 0] or counts([10] * 6, 100) == [0, 3, 3]
    assert counts([1, 1, 1, 30, 1], 0) == [3, 2, 0] or counts([1, 1, 1, 30, 1], 0) == [3, 1, 1]
    assert counts([10] * 6, 0, [False, True] * 3) == [2, 2, 2]


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([], "one device or more"),
        (["cpu", "cpu"], "each of them once"),
        ({"cpu": 1, "meta": 1}, r"3 blocks; the numbers of blocks given are \[1, 1\]"),
        ({"cpu": 4, "meta": -1}, "3 blocks"),
    ],
)
def test_devices_that_do_not_fit(devices: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(n_layers=3).spread(devices)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_two_gpus() -> None:
    model = tiny_model(n_layers=4, dtype=torch.float64)
    expected = model(TOKENS)
    other = copy.deepcopy(model).spread(["cuda:0", "cuda:1"])
    torch.testing.assert_close(other(TOKENS).cpu(), expected, rtol=1e-10, atol=1e-10)
    scores = sweep(other, TOKENS, cells(other), DIFF, **QUIET).cpu()
    torch.testing.assert_close(scores, sweep(model, TOKENS, cells(model), DIFF, **QUIET), rtol=1e-9, atol=1e-9)
