"""Profiles: every part has its share, a dear hook is found where it is, and the model is left as it was."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, HookedTransformerConfig, Intervention, UnknownHookError
from hooked_lm.hooks import HookPoint
from hooked_lm.profiling import HookCost, profile, profile_call

TOKENS = torch.randint(1, 30, (2, 12), generator=torch.Generator().manual_seed(0))


def model_of(**changes: object) -> HookedTransformer:
    sizes = {"n_layers": 3, "d_model": 16, "n_ctx": 12, "n_heads": 2, "d_head": 8, "d_vocab": 30, "act_fn": "gelu"}
    return HookedTransformer(HookedTransformerConfig(**{**sizes, **changes}))  # type: ignore[arg-type]


def sleepy(activation: Tensor, hook: HookPoint) -> None:
    time.sleep(0.02)


def test_every_layer_and_part_has_a_share_and_they_sum_to_one() -> None:
    found = profile(model_of(), TOKENS, n_repeats=2, verbose=False)
    assert sum(part.share for part in found.parts) == pytest.approx(1.0)
    named = {(part.layer, part.part) for part in found.parts}
    assert named >= {(layer, part) for layer in range(3) for part in ("ln1", "attn", "ln2", "mlp", "block")}
    assert named >= {(None, part) for part in ("embed", "pos_embed", "ln_final", "unembed")}
    assert sum(found.by_part().values()) == pytest.approx(1.0)
    assert sum(operation.share for operation in found.operations) == pytest.approx(1.0)
    assert found.spread[0] <= found.seconds <= found.spread[1]
    assert found.hooks == ()
    assert [row["seconds"] for row in found.rows()] == [part.share * found.seconds for part in found.parts]


def test_the_products_of_matrices_are_counted() -> None:
    found = profile(model_of(attn_only=True, n_layers=2), TOKENS, n_repeats=1, verbose=False)
    calls: Counter[str] = Counter()
    for operation in found.operations:
        calls[operation.name] += operation.calls
    # Queries, keys and values; the output; the unembedding.
    projections = calls["aten::addmm"] + calls["aten::mm"] + calls["aten::bmm"]
    assert projections == 2 * 4 + 1 or projections == 2 * 2 + 1


def test_a_dear_hook_is_found_and_a_cheap_one_is_not_called_dear() -> None:
    hooks = [("blocks.1.hook_resid_post", sleepy), ("blocks.0.hook_resid_post", lambda activation, hook: None)]
    found = profile(model_of(), TOKENS, fwd_hooks=hooks, n_repeats=3, verbose=False)
    assert [cost.name.partition(": ")[0] for cost in found.hooks] == ["hook 0", "hook 1", "all hooks"]
    dear, cheap, _ = found.hooks
    assert dear.name == "hook 0: sleepy at blocks.1.hook_resid_post"
    assert 0.015 < dear.seconds < 0.2
    assert cheap.seconds < dear.seconds / 2
    assert found.top(1)[0].part == "hook 0: sleepy at blocks.1.hook_resid_post".replace("hook 0", "hook 0")
    assert found.seconds > found.plain_seconds + 0.01
    assert "sleepy at blocks.1.hook_resid_post: +" in str(found)


def test_interventions_and_caches_are_measured() -> None:
    zero = Intervention("blocks.0.attn.hook_z", "zero", head=1)
    found = profile(
        model_of(), TOKENS, interventions=[zero], names_filter="blocks.*.hook_resid_post", n_repeats=1, verbose=False
    )
    assert [cost.name for cost in found.hooks] == ["1 intervention", "cache"]


def test_what_the_repeats_cannot_tell_from_nothing_is_called_so() -> None:
    assert HookCost("a", 0.001, (-0.001, 0.002), 0.01).verdict == "no cost beyond the noise (-1.00 to +2.00 ms)"
    assert HookCost("a", 0.002, (0.001, 0.003), 0.01).verdict == "+2.00 ms (+20 %)"
    assert HookCost("a", 0.002, (0.001, 0.003), 0.01).share == pytest.approx(0.2)


def test_memory_is_that_of_the_activations() -> None:
    model = model_of(d_vocab=30_000, n_layers=1)
    found = profile(model, TOKENS, n_repeats=1, verbose=False)
    logits = 2 * 12 * 30_000 * 4
    assert logits <= found.peak_bytes < 1.5 * logits
    [unembedding] = [part for part in found.parts if part.part == "unembed"]
    assert unembedding.allocated >= logits


@pytest.mark.parametrize("fails", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was(fails: type[BaseException] | None) -> None:
    model = model_of()
    before, weights = repr(model), {name: one.clone() for name, one in model.state_dict().items()}

    def failing(activation: Tensor, hook: HookPoint) -> None:
        assert fails is not None
        raise fails("stop")

    if fails is not None:
        with pytest.raises(fails, match="stop"):
            profile(model, TOKENS, fwd_hooks=[("blocks.1.hook_resid_post", failing)], n_repeats=1, verbose=False)
    else:
        profile(model, TOKENS, fwd_hooks=[("blocks.1.hook_resid_post", sleepy)], n_repeats=1, verbose=False)
    assert repr(model) == before
    assert all(torch.equal(one, weights[name]) for name, one in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(point.has_hooks() for point in model.hook_points())


def test_the_profiled_run_takes_the_same_way_as_a_plain_one() -> None:
    found = profile(model_of(), TOKENS, n_repeats=1, verbose=False)
    assert any("scaled_dot_product" in operation.name for operation in found.operations)


def test_wrong_arguments_raise() -> None:
    with pytest.raises(ValueError, match="n_repeats is at least 1, got 0"):
        profile(model_of(), TOKENS, n_repeats=0)
    with pytest.raises(UnknownHookError):
        profile(model_of(), TOKENS, fwd_hooks=[("blocks.9.hook_resid_post", sleepy)], verbose=False)
    with pytest.raises(ValueError, match="k is at least 1"):
        profile(model_of(), TOKENS, n_repeats=1, verbose=False).top(0)


def test_a_call_is_profiled_by_operations() -> None:
    x = torch.ones(64, 64)
    result, found = profile_call(lambda: (x @ x) + 1)
    assert torch.equal(result, x @ x + 1)
    assert {operation.name: operation.calls for operation in found.operations}["aten::mm"] == 1
    assert found.peak_bytes >= 64 * 64 * 4
    assert "1 x aten::mm  [64, 64], [64, 64]" in str(found)
    assert list(found.figure().data[0].x) == [operation.share for operation in found.top(15)]


def test_the_figure_has_the_milliseconds_of_each_layer() -> None:
    found = profile(model_of(), TOKENS, n_repeats=1, verbose=False)
    figure = found.figure()
    assert sum(sum(bar.x) for bar in figure.data) == pytest.approx(1000 * found.seconds)
    assert list(figure.data[0].customdata) == ["outside the blocks", "layer 0", "layer 1", "layer 2"]
    assert figure.layout.title.text.endswith(f"most in {found.top(1)[0].name}")
