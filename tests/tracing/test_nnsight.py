"""What nnsight 0.8 documents, said in a trace: the same numbers on one checkpoint, and where the two differ on purpose.

The outcomes there are stored. Where HOOKED_LM_NNSIGHT_PYTHON names an interpreter that has nnsight, they are made anew.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hooked_lm import HookedTransformer
from hooked_lm.metrics import log_prob
from tests.helpers import tiny_gpt2

PYTHON = os.environ.get("HOOKED_LM_NNSIGHT_PYTHON")
SCRIPT, STORED = (Path(__file__).with_name(f"nnsight_cases.{kind}") for kind in ("py", "safetensors"))
SHOWN, ASKED = [[3, 4, 5, 6, 7], [5, 6, 7, 8, 9], [9, 3, 8, 4, 6]], [[3, 9], [5, 4], [9, 7]]
SHORT, LONG = [[4, 8, 3]], [[7, 5, 3, 9, 8, 6]]


@pytest.fixture(scope="module")
def there() -> dict[str, Tensor]:
    return load_file(STORED)


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return HookedTransformer.from_pretrained_no_processing(hf_model=tiny_gpt2(), tokenizer=False)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * max(1.0, float(theirs.abs().max())))


def test_the_mean_state_of_some_prompts_steers_others(model: HookedTransformer, there: dict[str, Tensor]) -> None:
    with model.trace() as t:
        state = t.prompts(SHOWN)["resid_post", 1].at(pos=-1).mean("batch")
        plain, steered = t.prompts(ASKED), t.prompts(ASKED)
        steered["resid_post", 1].at(pos=-1).add(state)
        for name, run in (("plain", plain), ("steered", steered)):
            run.logits.at(pos=-1).log_softmax("vocab").save(name)
        state.save("state")
    for name in ("state", "plain", "steered"):
        assert_same(t[name], there[f"talk.{name}"])
    assert not torch.allclose(t["plain"], t["steered"], atol=1e-2)


def test_reads_stand_before_and_behind_edits(model: HookedTransformer, there: dict[str, Tensor]) -> None:
    with model.trace() as t:
        run = t.prompts(SHOWN)
        site = run["resid_post", 0]
        site.save("before")
        site.at(pos=2).zero()
        run["resid_post", 0].save("after")
        run["resid_post", 0].at(pos=0).scale(2.0)
        run["z", 1].save("z")
        run["mlp_out", 1].zero()
        run.logits.save("logits")
    for name in ("before", "after", "logits"):
        assert_same(t[name], there[f"edits.{name}"])
    assert_same(t["z"].flatten(-2), there["edits.z"])
    # There, what was saved without a copy is what the edit behind it made of it.
    assert_same(t["after"][:, 1:], there["edits.kept"][:, 1:])
    assert_same(2 * t["after"][:, 0], there["edits.kept"][:, 0])


def test_positions_are_those_of_each_prompt(model: HookedTransformer, there: dict[str, Tensor]) -> None:
    with model.trace() as t:
        short, long = t.prompts(SHORT), t.prompts(LONG)
        short["resid_post", 1].at(pos=-1).save("short")
        short["resid_post", 1].at(pos=0).save("first")
        long["resid_post", 1].at(pos=-1).save("long")
    assert_same(t["long"], there["lengths.long"])
    assert_same(t["short"], there["lengths.short"])
    with model.trace() as alone:
        alone.prompts(SHORT)["resid_post", 1].at(pos=0).save("first")
    assert_same(t["first"], alone["first"])
    # There, position 0 of the shorter prompt is padding.
    assert not torch.allclose(t["first"], there["lengths.first"], atol=1e-2)


def test_gradients_of_several_prompts_in_any_order(model: HookedTransformer, there: dict[str, Tensor]) -> None:
    with model.trace() as t:
        run = t.prompts(SHOWN)
        score = run.metric(log_prob(5)).sum()
        early, late = t.gradient(score, of=[run["resid_post", 0], run["resid_post", 1]])
        early.save("early")
        late.save("late")
    for name in ("early", "late"):
        assert_same(t[name], there[f"gradients.{name}"])


def test_a_generation_is_read_and_edited_at_its_steps(model: HookedTransformer, there: dict[str, Tensor]) -> None:
    with model.trace() as t:
        run = t.generate(SHOWN, max_new_tokens=3)
        run["resid_post", 0].at(pos=-1, step=slice(1, None)).add(0.5)
        run["resid_post", 1].at(pos=-1).save("states")
        run.generated.save("tokens")
    assert t["tokens"].tolist() == there["steps.tokens"].tolist()
    assert_same(t["states"], there["steps.states"])


@pytest.mark.skipif(PYTHON is None, reason="HOOKED_LM_NNSIGHT_PYTHON is not set")
def test_nnsight_gives_what_is_stored(there: dict[str, Tensor], gpt2_folder: Path, tmp_path: Path) -> None:
    outcomes = tmp_path / "outcomes.safetensors"
    command = [str(PYTHON), str(SCRIPT), str(gpt2_folder), str(outcomes)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(outcomes)
    assert found.keys() == there.keys()
    for name, tensor in there.items():
        assert_same(found[name], tensor)
