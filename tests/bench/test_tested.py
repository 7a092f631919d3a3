"""Hypotheses that a bench tests: the record has the source of the effect, the settings and the verdict."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hooked_lm.experiments import Bench
from hooked_lm.hypotheses import EffectTest, controlled_test, effect_test
from tests.bench.test_recording import model_of

NOISE = torch.randn(30, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "bench", png=False)


def effect(heads: list[tuple[int, int]]) -> Tensor:
    return NOISE + ((0, 1) in heads)


def test_an_effect_is_tested_against_controls_and_recorded(bench: Bench) -> None:
    model = model_of(n_layers=2, n_heads=4, d_head=2)
    found = bench.test(effect, heads=[(0, 1)], model=model)
    expected = controlled_test(effect, heads=[(0, 1)], model=model)
    assert isinstance(found, EffectTest)
    assert found.verdict == expected.verdict
    assert found.verdict.endswith("larger than that of all 20 random heads (p = 0.0476)")
    record = bench.get("effect")
    assert str(record).endswith(found.verdict)
    assert "return NOISE + ((0, 1) in heads)" in record.source
    assert record.arguments["heads"] == [(0, 1)]
    assert record.numbers["p"] == float(found.p) if "p" in record.numbers else True
    assert record.result["control"]["n_reached"] == 0  # type: ignore[index]
    assert record.result["n"] == 30  # type: ignore[index]
    assert bench.rerun("effect").same


def test_a_decorated_effect_is_tested_when_it_is_called(bench: Bench) -> None:
    @bench.test(labels=[0, 1] * 15, n_controls=5, name="labels")
    def by_label(labels: list[int]) -> Tensor:
        return (torch.tensor(labels) == torch.tensor([0, 1] * 15)).double() - 0.4

    assert by_label().verdict.startswith("an effect, of which 5 controls are too few to be sure")
    assert bench.get("labels").arguments["n_controls"] == 5


def test_numbers_are_tested_without_a_control(bench: Bench) -> None:
    found = bench.test(NOISE + 1, NOISE, name="plain", alternative="greater")
    assert found.verdict == effect_test(NOISE + 1, NOISE, alternative="greater").verdict
    assert found.verdict.endswith("compared with no control")
    record = bench.get("plain")
    assert torch.equal(record.arguments["baseline"], NOISE)  # type: ignore[arg-type]
    assert record.arguments["alternative"] == "greater"
    assert record.source.count("\ndef ") == 0
    assert bench.rerun("plain").same


def test_a_test_that_cannot_be_made_raises_and_is_on_record(bench: Bench) -> None:
    with pytest.raises(ValueError, match="a control is made of heads"):
        bench.test(effect)
    with pytest.raises(ValueError, match="two values or more"):
        bench.test([1.0])
    assert [entry.outcome for entry in bench.all()] == ["ValueError", "ValueError"]


def test_a_profile_is_kept_with_the_record(bench: Bench) -> None:
    @bench.record
    @bench.profile
    def product(n: int) -> float:
        x = torch.ones(n, n)
        return float((x @ x).sum())

    assert product(8) == 8.0**3
    record = bench.get("product")
    assert "1 x aten::mm  [8, 8], [8, 8]" in record.data["text"]
    assert list(record.figures) == ["00-profile"]
    assert record.arguments == {"n": 8}


def test_a_profiled_function_without_a_record_around_it_is_recorded(bench: Bench) -> None:
    @bench.profile
    def product(n: int) -> int:
        return int(torch.ones(n).sum())

    assert product(3) == 3
    assert "aten::sum" in bench.get("product").data["text"]
