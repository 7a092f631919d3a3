"""Interventions as data do what hook functions of the same meaning do, in a pass and in every step of a generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import Intervention, UnknownHookError
from tests.helpers import tiny_model, tiny_tokens

Z = "blocks.0.attn.hook_z"
RESID = "blocks.1.hook_resid_pre"


def edited_by_hand(x: Tensor, operation: str, value: Any, index: Any) -> Tensor:
    x = x.clone()
    if operation == "replace":
        x[index] = value
    elif operation == "add":
        x[index] += value
    elif operation == "scale":
        x[index] *= value
    else:
        x[index] = 0.0
    return x


SELECTIONS = [
    ({}, (slice(None),)),
    ({"pos": 3}, (slice(None), 3)),
    ({"pos": -1}, (slice(None), -1)),
    ({"pos": (1, 4)}, (slice(None), [1, 4])),
    ({"head": 2}, (slice(None), slice(None), 2)),
    ({"head": 1, "pos": 5}, (slice(None), 5, 1)),
    ({"feature": 0}, (..., 0)),
    ({"batch": 1, "head": 0, "feature": (0, 2)}, (1, slice(None), 0, slice(0, 3, 2))),
    ({"pos": (5, 0, 3), "feature": (1, 0)}, (slice(None), [[5], [0], [3]], slice(None), [[1, 0]])),
]


@pytest.mark.parametrize(("selection", "index"), SELECTIONS)
@pytest.mark.parametrize("operation", ["replace", "add", "scale", "zero"])
def test_an_intervention_equals_the_same_edit_made_by_a_hook(operation: Any, selection: Any, index: Any) -> None:
    model, tokens = tiny_model(), tiny_tokens()
    value = None if operation == "zero" else 1.7
    by_hand = model.run_with_hooks(tokens, fwd_hooks=[(Z, lambda x, hook: edited_by_hand(x, operation, value, index))])
    assert not torch.allclose(by_hand, model(tokens))
    as_data = model.run(tokens, interventions=[Intervention(Z, operation, value, **selection)])
    torch.testing.assert_close(as_data, by_hand, rtol=0, atol=1e-12)


def test_a_tensor_value_has_the_shape_of_what_is_selected_without_the_single_axes() -> None:
    model, tokens = tiny_model(), tiny_tokens(batch=2)
    value = torch.randn(2, 4, dtype=torch.float64)
    as_data = model.run(tokens, interventions=[Intervention(Z, "replace", value, pos=2, head=1)])

    def replace(x: Tensor, hook: Any) -> None:
        x[:, 2, 1] = value

    torch.testing.assert_close(as_data, model.run_with_hooks(tokens, fwd_hooks=[(Z, replace)]))


def test_interventions_are_made_in_the_order_given() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    double, one_more = Intervention(RESID, "scale", 2.0), Intervention(RESID, "add", 1.0)
    resid = model(tokens, stop_at_layer=1)
    expected = model(2 * resid + torch.arange(12.0), start_at_layer=1)
    ramp = Intervention(RESID, "add", torch.arange(12.0, dtype=torch.float64))
    torch.testing.assert_close(model.run(tokens, interventions=[double, ramp]), expected)
    assert not torch.allclose(
        model.run(tokens, interventions=[ramp, double]), model.run(tokens, interventions=[double, one_more])
    )


def test_the_context_acts_on_every_pass_and_leaves_no_hook_behind() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    clean = model(tokens)
    with model.intervening([Intervention(Z, "zero", head=0)]):
        first, second = model(tokens), model(tokens)
    assert torch.equal(first, second)
    assert not torch.allclose(first, clean)
    assert torch.equal(model(tokens), clean)
    assert not any(point.has_hooks() for point in model.hook_points())


@pytest.mark.parametrize("pos", [2, 6, 9, -1, (0, 7)])
def test_a_generation_under_an_intervention_is_the_same_with_and_without_the_key_value_cache(pos: Any) -> None:
    model, tokens = tiny_model(n_ctx=20), tiny_tokens(batch=2, pos=6)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "verbose": False}
    push = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 6
    # Without the cache the newest position of one step is an older one of the next, so -1 has its own reference below.
    edit = Intervention("blocks.0.hook_resid_pre", "add", push, pos=pos)
    cached = model.generate(tokens, interventions=[edit], **options)
    if pos != -1:
        assert torch.equal(cached, model.generate(tokens, interventions=[edit], use_past_kv_cache=False, **options))
    else:
        everywhere = Intervention("blocks.0.hook_resid_pre", "add", push, pos=tuple(range(5, 11)))
        assert torch.equal(
            cached, model.generate(tokens, interventions=[everywhere], use_past_kv_cache=False, **options)
        )
    assert not torch.equal(cached, model.generate(tokens, **options))


def test_positions_are_query_positions_for_patterns() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    site = "blocks.0.attn.hook_pattern"

    def zero_row(pattern: Tensor, hook: Any) -> None:
        pattern[:, 1, 4] = 0.0

    by_hand = model.run_with_hooks(tokens, fwd_hooks=[(site, zero_row)])
    as_data = model.run(tokens, interventions=[Intervention(site, "zero", head=1, pos=4)])
    torch.testing.assert_close(as_data, by_hand)


@pytest.mark.parametrize(
    ("intervention", "error", "message"),
    [
        (Intervention("blocks.7.attn.hook_z", "zero"), UnknownHookError, "layers run 0-1"),
        (Intervention(Z, "zero", head=3), ValueError, "head 3: this model has heads 0-2"),
        (Intervention(Z, "zero", head=-4), ValueError, "heads 0-2"),
        (Intervention(Z, "zero", feature=4), ValueError, "features 0-3"),
        (Intervention(Z, "zero", pos=16), ValueError, "pos 16: this model has positions 0-15"),
        (Intervention(RESID, "zero", head=0), ValueError, "no head to select"),
        (Intervention(Z, "zero", head=(0, -3)), ValueError, "selects an entry twice"),
        (Intervention("hook_tokens", "replace", 3.7), ValueError, "holds whole numbers"),
        (Intervention(Z, "zero", batch=2), ValueError, "no batch 2"),
        (Intervention(Z, "replace", torch.zeros(5)), ValueError, "does not fit"),
        (Intervention(Z, "zero", pos=12), RuntimeError, "never acted"),
    ],
)
def test_what_cannot_be_done_is_named_and_the_model_is_as_before(intervention: Any, error: Any, message: str) -> None:
    model, tokens = tiny_model(), tiny_tokens()
    clean = model(tokens)
    with pytest.raises(error, match=message):
        model.run(tokens, interventions=[intervention])
    assert torch.equal(model(tokens), clean)
    assert not any(point.has_hooks() for point in model.hook_points())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"operation": "double"}, "none of"),
        ({"operation": "zero", "value": 1.0}, "takes no value"),
        ({"operation": "add"}, "needs a value"),
        ({"operation": "zero", "pos": ()}, "not an int or several"),
        ({"operation": "zero", "pos": 1.5}, "not an int or several"),
        ({"operation": "zero", "head": True}, "not an int or several"),
        ({"operation": "zero", "pos": (1, 1)}, "selects an entry twice"),
        ({"operation": "zero", "site": ("z", 0)}, r"get_act_name\('z', 0\)"),
        ({"operation": "add", "value": "1"}, "a real tensor or a number, not str"),
        ({"operation": "add", "value": [1.0]}, "a real tensor or a number, not list"),
        ({"operation": "add", "value": True}, "a real tensor or a number, not bool"),
        ({"operation": "add", "value": torch.ones(1, dtype=torch.complex64)}, "a real tensor or a number"),
    ],
)
def test_an_intervention_that_makes_no_sense_cannot_be_made(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Intervention(**{"site": Z, **fields})


def test_positions_that_are_one_and_the_same_in_the_prompts_are_refused_where_they_are_known() -> None:
    edit, model = Intervention(Z, "zero", pos=(6, -1)), tiny_model()
    axes = {name: point.axes for name, point in model.hook_dict.items()}
    edit.check_fit(model.cfg, axes, 2, 8)
    with pytest.raises(ValueError, match="selects an entry twice"):
        edit.check_fit(model.cfg, axes, 2, 7)


def test_a_single_intervention_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(TypeError, match="interventions is a list"):
        tiny_model().as_hooks(Intervention(Z, "zero"))  # type: ignore[arg-type]


def test_something_else_than_an_intervention_is_refused() -> None:
    with pytest.raises(TypeError, match="is an Intervention"):
        tiny_model().run(tiny_tokens(), interventions=["blocks.0.attn.hook_z"])


def test_a_value_with_a_row_for_each_position_is_read_position_by_position_in_a_generation() -> None:
    model, tokens = tiny_model(n_ctx=20), tiny_tokens(batch=2, pos=3)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False, "verbose": False}
    rows = 8 * torch.randn(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    edit = Intervention("blocks.0.hook_resid_pre", "add", rows, pos=(0, 4))
    cached = model.generate(tokens, interventions=[edit], **options)
    assert torch.equal(cached, model.generate(tokens, interventions=[edit], use_past_kv_cache=False, **options))
    swapped = Intervention("blocks.0.hook_resid_pre", "add", rows.flip(0), pos=(0, 4))
    assert not torch.equal(cached, model.generate(tokens, interventions=[swapped], **options))


def test_a_position_that_was_not_part_of_the_run_is_named_though_others_were() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    with pytest.raises(RuntimeError, match=r"never acted at positions \[12\]"):
        model.run(tokens, interventions=[Intervention(Z, "zero", pos=(0, 12))])
