"""Scripts written for the classic library give its numbers: edge attribution, frozen attribution, course notebooks."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hooked_lm import compat

REFERENCE = json.loads((Path(__file__).parent / "downstream/reference.json").read_text())

# The classic library computes rotary frequencies in float64; `transformers` and this library round them to float32.
ROTARY = {"traced_attribution", "patching_by_hand"}


@pytest.fixture(scope="module")
def recipes() -> Iterator[ModuleType]:
    """The recipes, which import `transformer_lens`, with this library in its place."""
    compat.install()
    yield importlib.import_module("tests.downstream.recipes")
    compat.uninstall()
    for name in [name for name in sys.modules if name.startswith("tests.downstream.")]:
        del sys.modules[name]


@pytest.mark.parametrize("recipe", REFERENCE)
def test_a_script_gives_the_classic_librarys_numbers(recipes: ModuleType, recipe: str) -> None:
    found = recipes.RECIPES[recipe]()
    assert set(found) == set(REFERENCE[recipe])
    for name, value in found.items():
        expected = torch.tensor(REFERENCE[recipe][name], dtype=torch.float64)
        assert value.shape == expected.shape, name
        error = (value.double() - expected).abs().max().item()
        assert error < (1e-6 if recipe in ROTARY else 1e-9), f"{name} is off by {error}"


def test_every_recipe_has_its_reference(recipes: ModuleType) -> None:
    assert set(recipes.RECIPES) == set(REFERENCE)


def test_attributions_through_frozen_parts_sum_to_the_logit_difference(recipes: ModuleType) -> None:
    found = recipes.RECIPES["traced_attribution"]()
    assert abs(float(found["sum"] - found["target"])) < 1e-12
    # What makes the sum exact is there: the soft cap bends the logits, and the MLPs take part.
    assert not torch.allclose(found["capped"][3] - found["capped"][7], found["target"], atol=1e-3)
    assert found["mlp"].abs().max() > 1e-3
