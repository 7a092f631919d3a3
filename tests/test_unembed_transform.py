"""A layer before the unembedding: what needs logits to be linear in the stream refuses it; hooks within it act."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hooked_lm import HookedTransformer, Intervention, circuits
from hooked_lm.components.stock import not_stock
from hooked_lm.sweep.exactness import walking_obstacle
from tests.helpers import tiny_model, tiny_tokens

# logits_to_keep, the positions it keeps of seven, and one of them.
KEPT = ((1, [6], 6), (slice(1, 6, 2), [1, 3, 5], 3), (torch.tensor([4, 0, -1]), [4, 0, 6], 4))


@pytest.fixture
def model() -> HookedTransformer:
    return tiny_model(unembed_act_fn="silu", first_norm=False)


def attributed(model: HookedTransformer) -> object:
    return circuits.logit_attribution(model.run_with_cache(tiny_tokens())[1], 3)


def logit_attrs(model: HookedTransformer) -> object:
    _, cache = model.run_with_cache(tiny_tokens())
    return cache.logit_attrs(cache.accumulated_resid(), 3)


@pytest.mark.parametrize(
    "compute",
    [
        attributed,
        logit_attrs,
        lambda model: model.tokens_to_residual_directions(3),
        lambda model: circuits.full_ov_circuit(model, 0, 0),
        lambda model: circuits.circuit_vectors(model, 0, 0, "OV", n_vectors=2),
        lambda model: circuits.SVDInterpreter(model).get_singular_vectors("w_out", layer_index=0),
        lambda model: circuits.copying_scores(model, verbose=False),
    ],
)
def test_what_takes_logits_to_be_linear_in_the_stream_is_refused(
    model: HookedTransformer, compute: Callable[[HookedTransformer], object]
) -> None:
    with pytest.raises(ValueError, match=r"the activation function 'silu' stands before W_U \(unembed\.transform\)"):
        compute(model)


def test_circuits_that_do_not_end_in_logits_are_there(model: HookedTransformer) -> None:
    assert circuits.full_qk_circuit(model, 0, 0).shape == (20, 20)
    assert circuits.matching_scores(model, verbose=False).scores.shape == (2, 3)
    assert circuits.head_composition(model, "V").scores.shape == (2, 3, 2, 3)


def test_composition_is_centred_as_the_heads_that_read_others_are(model: HookedTransformer) -> None:
    centred, not_centred = circuits.head_composition(model, "Q"), tiny_model(normalization_type="RMS")
    assert centred.expected == pytest.approx((1 / 11) ** 0.5)
    assert circuits.head_composition(not_centred, "Q").expected == pytest.approx((1 / 12) ** 0.5)


def test_it_is_a_stock_component_unless_its_function_is_another(model: HookedTransformer) -> None:
    assert not_stock(model) is None
    assert walking_obstacle(model, ()) is None
    transform = model.unembed.transform
    assert transform is not None
    transform.act_fn = lambda x: x  # type: ignore[assignment]
    assert not_stock(model) == "unembed.transform has an act_fn that is not registered"


@torch.no_grad()
@pytest.mark.parametrize(("keep", "kept", "pos"), KEPT, ids=str)
@pytest.mark.parametrize("site", ["hook_pre", "hook_post", "ln.hook_scale", "ln.hook_normalized"])
def test_an_edit_within_it_acts_at_positions_of_the_text(
    model: HookedTransformer, site: str, keep: Any, kept: list[int], pos: int
) -> None:
    tokens = tiny_tokens(2, 7)
    # A factor on hook_post would be divided out by the norm.
    operation = ("zero", None) if site == "hook_post" else ("scale", 3.0)
    edit = Intervention(f"unembed.transform.{site}", *operation, pos=pos)
    whole, clean = model.run(tokens, interventions=[edit]), model(tokens)
    came = model.run(tokens, interventions=[edit], logits_to_keep=keep)
    torch.testing.assert_close(came, whole[:, kept], rtol=0, atol=1e-12)
    changed = (came - clean[:, kept]).abs().amax((0, 2)) > 1e-3
    assert changed.tolist() == [one == pos for one in kept]


@torch.no_grad()
def test_a_run_without_output_does_not_unembed_unless_a_hook_looks(
    model: HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    with model.hooks(fwd_hooks=[("unembed.transform.hook_pre", lambda x, hook: seen.append(hook.name))]):
        model(tiny_tokens(), return_type=None)
    assert seen == ["unembed.transform.hook_pre"]

    def forbidden(*given: object) -> None:
        raise AssertionError("it was unembedded")

    monkeypatch.setattr(model.unembed, "forward", forbidden)
    assert model(tiny_tokens(), return_type=None) is None
