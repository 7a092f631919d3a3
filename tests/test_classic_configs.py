"""Configs and state dicts that version 3.9 of the classic library saved: they load, and give its logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_lm import HookedTransformer, HookedTransformerConfig
from tests.classic_reference.weights import tokens_of, weights_of

SAVED: dict[str, Any] = json.loads((Path(__file__).parent / "classic_reference" / "configs.json").read_text())


def model_of(saved: dict[str, Any]) -> HookedTransformer:
    """A model built from the saved dictionary, with weights in the classic library's names, its buffers among them."""
    model = HookedTransformer(saved["cfg"])
    weights = weights_of(saved["shapes"], saved["cfg"]["gated_mlp"])
    buffers = {name: torch.zeros(shape) for name, shape in saved["buffers"].items()}
    model.load_state_dict({**weights, **buffers})
    return model


def test_there_are_many_kinds() -> None:
    assert len(SAVED) >= 30
    logits = [torch.tensor(saved["logits"]) for saved in SAVED.values() if len(saved["logits"][0][0]) == 11]
    same = [(one - other).abs().max() < 1e-6 for i, one in enumerate(logits) for other in logits[:i]]
    assert sum(map(bool, same)) == 3  # flags change no number, and gelu_fast is gelu_new


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_model_gives_the_same_logits(name: str) -> None:
    model = model_of(SAVED[name])
    # There rotary angles of a double-precision model are in double precision, and routers always in single precision.
    rounded = model.cfg.positional_embedding_type == "rotary" or model.cfg.num_experts is not None
    expected = torch.tensor(SAVED[name]["logits"], dtype=torch.float64)
    torch.testing.assert_close(model(tokens_of(1, 6, 11)), expected, rtol=0, atol=1e-6 if rounded else 1e-9)


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_config_is_read_whole_and_back(name: str) -> None:
    saved = SAVED[name]["cfg"]
    cfg = HookedTransformerConfig.from_dict(saved)
    assert cfg == HookedTransformerConfig.unwrap(saved)
    assert HookedTransformerConfig.unwrap(cfg) is cfg
    assert HookedTransformerConfig.from_dict(cfg.to_dict()) == cfg
    assert cfg.is_layer_norm_activation() == (saved["act_fn"] == "solu_ln")
    ours, theirs = cfg.to_dict(), {**saved, "dtype": saved["dtype"].removeprefix("torch.")}
    differing = {field for field in ours.keys() & theirs.keys() if ours[field] != theirs[field]}
    assert differing <= {"n_params", "attn_scale"}
    assert ours["attn_scale"] == (theirs["attn_scale"] if cfg.use_attn_scale else 1.0)


@pytest.mark.parametrize("field", ["use_dynamic_ntk_rope", "use_logn_attn", "yarn_global_attn_only", "load_in_4bit"])
def test_a_field_that_would_change_the_numbers_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=True is not supported; only False is"):
        HookedTransformerConfig.from_dict({**SAVED["rotary"]["cfg"], field: True})
