"""What the tables of architectures cannot say of gated attention: its hook point by name, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hooked_lm import HookedTransformer, Intervention, circuits
from hooked_lm.components.stock import not_stock
from hooked_lm.names import get_act_name
from hooked_lm.sweep.exactness import walking_obstacle
from tests.helpers import tiny_model, tiny_tokens

GATE = "blocks.0.attn.hook_gate"


@pytest.fixture
def model() -> HookedTransformer:
    return tiny_model(attention_gate=True, normalization_type="RMS")


def test_the_gate_has_a_short_name_and_is_there_only_with_the_config_field(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(tiny_tokens())
    assert get_act_name("gate", 0) == GATE
    assert cache["gate", 0] is cache[GATE]
    assert GATE not in tiny_model().hook_dict


@torch.no_grad()
def test_z_is_the_mixture_of_values_times_the_gate(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(tiny_tokens())
    gate = cache["gate", 1]
    assert bool(((gate > 0) & (gate < 1)).all())
    mixed = torch.einsum("bhqk,bkhd->bqhd", cache["pattern", 1], cache["v", 1])
    torch.testing.assert_close(cache["z", 1], mixed * gate)
    attn = model.blocks[1].attn
    written = torch.einsum("bphd,hdm->bpm", cache["z", 1], attn.W_O) + attn.b_O
    torch.testing.assert_close(cache["attn_out", 1], written)


@torch.no_grad()
def test_a_closed_gate_silences_one_entry_of_one_head(model: HookedTransformer) -> None:
    with model.intervening([Intervention(GATE, "zero", pos=2, head=1, feature=3)]):
        _, cache = model.run_with_cache(tiny_tokens(), names_filter="*.hook_z")
    zero = cache["z", 0] == 0
    assert zero.nonzero()[:, 1:].unique(dim=0).tolist() == [[2, 1, 3]]


@torch.no_grad()
def test_an_edit_of_what_a_heads_queries_read_changes_its_gate_too(model: HookedTransformer) -> None:
    _, clean = model.run_with_cache(tiny_tokens())
    with model.intervening([Intervention("blocks.0.hook_q_input", "zero", head=1)]):
        _, cache = model.run_with_cache(tiny_tokens())
    changed = ((cache["gate", 0] - clean["gate", 0]).abs() > 1e-9).any(3).flatten(0, 1).any(0)
    assert changed.tolist() == [False, True, False]


def test_gated_attention_is_a_stock_component_that_sweeps_walk(model: HookedTransformer) -> None:
    assert not_stock(model) is None
    assert walking_obstacle(model, ()) is None


def test_the_product_of_value_and_output_matrices_is_refused(model: HookedTransformer) -> None:
    with pytest.raises(AttributeError, match=r"no OV: a gate, .*hook_gate, multiplies what heads read before W_O"):
        _ = model.OV
    assert model.W_V.shape == (2, 3, 12, 4)
    assert model.QK.shape == (2, 3, 12, 12)


@pytest.mark.parametrize(
    "compute",
    [
        lambda model: circuits.full_ov_circuit(model, 0, 0),
        lambda model: circuits.circuit_vectors(model, 0, 0, "OV", n_vectors=2),
        lambda model: circuits.SVDInterpreter(model).get_singular_vectors("OV", layer_index=0, head_index=0),
        lambda model: circuits.head_composition(model, "Q"),
    ],
)
def test_a_circuit_of_values_is_refused(
    model: HookedTransformer, compute: Callable[[HookedTransformer], object]
) -> None:
    with pytest.raises(ValueError, match=r"multiplies what its heads read by a gate"):
        compute(model)
    assert circuits.full_qk_circuit(model, 0, 0).shape == (20, 20)
