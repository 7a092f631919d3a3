"""Small trained models are loaded, masked and processed as courses do it, with the numbers of version 3.9."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_lm import HookedTransformer, HookedTransformerConfig
from tests.classic_reference.toy import FIELDS, TOKENS, masked_results, processed_results, saved_state
from tests.classic_reference.weights import fingerprint

STORED: dict[str, Any] = json.loads((Path(__file__).parent / "classic_reference" / "toy.json").read_text())
TAKES_STATE_DICTS = "state_dict" in inspect.signature(HookedTransformer.fold_layer_norm).parameters


def toy_model(**changes: Any) -> HookedTransformer:
    return HookedTransformer(HookedTransformerConfig(**{**FIELDS, **changes}))


def check(found: dict[str, torch.Tensor], stored: dict[str, Any]) -> None:
    assert set(found) == set(stored)
    for name, expected in stored.items():
        given = fingerprint(found[name])
        assert given["shape"] == expected["shape"], name
        assert given["along"] == pytest.approx(expected["along"], abs=1e-8), name


def test_permanent_hooks_mask_padding_in_a_bidirectional_model() -> None:
    model = toy_model()
    with torch.no_grad():
        found = masked_results(model)
    torch.testing.assert_close(found["again"], found["logits"], rtol=0, atol=1e-12)
    torch.testing.assert_close(found["without"], found["unmasked"], rtol=0, atol=1e-12)
    assert (found["logits"] - found["unmasked"]).abs().max() > 1e-2
    assert (found["ablated"] - found["logits"]).abs().max() > 1e-2
    check(found, STORED["masked"])


@pytest.mark.skipif(not TAKES_STATE_DICTS, reason="the processing methods do not take state dicts yet")
def test_a_state_dict_is_processed_before_it_is_loaded() -> None:
    model, plain = toy_model(), toy_model()
    plain.load_state_dict(saved_state(plain))
    with torch.no_grad():
        found = processed_results(model)
        torch.testing.assert_close(found["logits"], plain(TOKENS).log_softmax(-1), rtol=0, atol=1e-10)
    check(found, STORED["processed"])


def test_an_old_state_dict_is_processed_as_it_is_loaded() -> None:
    model, plain = toy_model(), toy_model()
    plain.load_state_dict(saved_state(plain))
    model.load_and_process_state_dict(saved_state(model), fold_ln=True, center_unembed=True)
    difference = model(TOKENS).log_softmax(-1) - plain(TOKENS).log_softmax(-1)
    assert difference.abs().max() < 1e-10
