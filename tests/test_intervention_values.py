"""Interventions whose value is taken from a cache, as plain hooks, and written to files and read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_lm import (
    ActivationCache,
    HookedTransformer,
    Intervention,
    UnknownHookError,
    load_interventions,
    save_interventions,
)
from hooked_lm.interventions import draw_prompts
from hooked_lm.interventions.files import interventions_from_json, interventions_to_json
from hooked_lm.metrics import logit
from hooked_lm.slicing import Slice
from hooked_lm.sweep import sweep
from tests.helpers import tiny_model, tiny_tokens

MODEL = tiny_model()
CLEAN, CORRUPTED = tiny_tokens(3, 7, seed=1), tiny_tokens(3, 7, seed=2)
Z, PATTERN = "blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern"


def cached(tokens: Tensor = CLEAN, model: HookedTransformer = MODEL, **options: Any) -> ActivationCache:
    with torch.no_grad():
        cache: ActivationCache = model.run_with_cache(tokens, **options)[1]
    return cache


def run_by_hand(site: str, edit: Callable[[Tensor], None], tokens: Tensor = CORRUPTED) -> Tensor:
    def hook(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        edit(x)
        return x

    with torch.no_grad():
        logits: Tensor = MODEL.run_with_hooks(tokens, fwd_hooks=[(site, hook)])
    return logits


def setting(index: Any, value: Tensor) -> Callable[[Tensor], None]:
    def edit(x: Tensor) -> None:
        x[index] = value

    return edit


def assert_acts_as(intervention: Intervention, by_hand: Tensor, tokens: Tensor = CORRUPTED) -> None:
    with torch.no_grad():
        assert not torch.allclose(by_hand, MODEL(tokens))
        torch.testing.assert_close(MODEL.run(tokens, interventions=[intervention]), by_hand, rtol=0, atol=1e-12)


# From a cache

EVERY = slice(None)
SELECTIONS = [
    ({}, (EVERY,)),
    ({"pos": 3}, (EVERY, 3)),
    ({"pos": -1, "head": 2}, (EVERY, -1, 2)),
    ({"pos": (1, -2), "feature": 3}, (EVERY, [1, 5], EVERY, 3)),
    ({"head": (0, 2)}, (EVERY, EVERY, [0, 2])),
    ({"batch": 1}, (1,)),
    ({"batch": (0, 2), "head": 1}, ([0, 2], EVERY, 1)),
]


@pytest.mark.parametrize(("selection", "index"), SELECTIONS)
def test_a_value_from_a_cache_is_what_the_cache_has_at_the_selection(selection: Any, index: Any) -> None:
    cache = cached()
    by_hand = run_by_hand(Z, setting(index, cache[Z][index]))
    assert_acts_as(Intervention.from_cache(Z, cache, **selection), by_hand)
    assert_acts_as(Intervention.from_cache(("z", -1), cache, **selection), by_hand)


def test_a_head_of_a_pattern_comes_from_a_cache_too() -> None:
    cache = cached()
    by_hand = run_by_hand(PATTERN, setting((EVERY, 1, 4), cache[PATTERN][:, 1, 4]))
    assert_acts_as(Intervention.from_cache(PATTERN, cache, head=1, pos=4), by_hand)


def test_one_cached_prompt_serves_all() -> None:
    cache = cached(CLEAN[:1])
    by_hand = run_by_hand(Z, setting((EVERY, EVERY, 0), cache[Z][:, :, 0]))
    assert_acts_as(Intervention.from_cache(Z, cache, head=0), by_hand)


def test_all_of_the_residual_stream_from_the_clean_run_gives_the_clean_logits() -> None:
    cache = cached()
    with torch.no_grad():
        patched = MODEL.run(CORRUPTED, interventions=[Intervention.from_cache(("resid_post", 0), cache)])
        torch.testing.assert_close(patched, MODEL(CLEAN), rtol=0, atol=1e-12)


# Means


@pytest.mark.parametrize("head", [None, 1, (0, 2)])
def test_a_mean_is_over_prompts_and_positions(head: Any) -> None:
    index = (EVERY, EVERY, EVERY if head is None else list(head) if isinstance(head, tuple) else head)
    mean = cached()[Z].mean((0, 1))[index[2]]
    assert_acts_as(Intervention.mean(Z, cached(), head=head), run_by_hand(Z, setting(index, mean)))


@pytest.mark.parametrize("pos", [None, 2, (2, 5)])
def test_a_mean_per_position_keeps_the_positions_apart(pos: Any) -> None:
    where = EVERY if pos is None else list(pos) if isinstance(pos, tuple) else pos
    by_hand = run_by_hand(Z, setting((EVERY, where, 1), cached()[Z].mean(0)[where, 1]))
    assert_acts_as(Intervention.mean(Z, cached(), per_position=True, pos=pos, head=1), by_hand)


def test_a_mean_is_taken_where_the_mask_is_1() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])
    mean = cached()[Z][mask.bool()].mean(0)
    assert not torch.allclose(mean, cached()[Z].mean((0, 1)))
    by_hand = run_by_hand(Z, setting((EVERY, 4), mean))
    assert_acts_as(Intervention.mean(Z, cached(), attention_mask=mask, pos=4), by_hand)


def test_a_mean_pattern_is_over_prompts_and_queries() -> None:
    mean = cached()[PATTERN].mean((0, 2))
    by_hand = run_by_hand(PATTERN, setting((EVERY, 2), mean[2]))
    assert_acts_as(Intervention.mean(PATTERN, cached(), head=2), by_hand)


def test_a_mean_of_half_precision_is_summed_in_single() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    cache = cached(tiny_tokens(64, 7), model)
    value = Intervention.mean(Z, cache).value
    assert isinstance(value, Tensor)
    assert value.dtype == torch.bfloat16
    torch.testing.assert_close(value[0, 0], cache[Z].double().mean((0, 1)).bfloat16(), rtol=0, atol=0)


# Other prompts


def test_resampling_gives_each_prompt_the_activation_of_another() -> None:
    cache = cached()
    value = Intervention.resample(Z, cache, head=1, seed=3).value
    assert isinstance(value, Tensor)
    rows = [[i for i in range(3) if torch.equal(value[prompt], cache[Z][i, :, 1])] for prompt in range(3)]
    assert all(len(found) == 1 and found[0] != prompt for prompt, found in enumerate(rows))
    drawn = [found[0] for found in rows]
    by_hand = run_by_hand(Z, setting((EVERY, EVERY, 1), cache[Z][drawn][:, :, 1]), CLEAN)
    assert_acts_as(Intervention.resample(Z, cache, head=1, seed=3), by_hand, CLEAN)


def test_prompts_of_another_run_are_drawn_freely_and_by_the_seed() -> None:
    cache = cached()
    values = [Intervention.resample(Z, cache, n_prompts=5, seed=seed).value for seed in (0, 0, 1)]
    assert all(isinstance(value, Tensor) and value.shape == (5, *cache[Z].shape[1:]) for value in values)
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_each_prompt_is_drawn_as_often_as_any_other_and_never_for_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_prompts(4, None, generator) for _ in range(3000)])
    counts = torch.stack([(drawn == other).sum(0) for other in range(4)], 1)  # [prompt other]
    assert counts.diagonal().max() == 0
    others = counts[~torch.eye(4, dtype=torch.bool)]
    assert others.min() > 850
    assert others.max() < 1150


# As plain hooks


def test_interventions_are_plain_hooks_for_those_who_want_them() -> None:
    edits = [Intervention(Z, "scale", 2.0, head=0), Intervention("blocks.0.hook_resid_pre", "zero", pos=1)]
    hooks = MODEL.as_hooks(edits)
    assert [name for name, _ in hooks] == [Z, "blocks.0.hook_resid_pre"]
    with torch.no_grad():
        expected = MODEL.run(CLEAN, interventions=edits)
        torch.testing.assert_close(MODEL.run_with_hooks(CLEAN, fwd_hooks=hooks), expected, rtol=0, atol=0)
    with pytest.raises(UnknownHookError, match="hook_zz"):
        MODEL.as_hooks([Intervention("blocks.0.attn.hook_zz", "zero")])


# Bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Intervention.from_cache("blocks.9.attn.hook_z", cached()), KeyError, "hook_z"),
        (lambda: Intervention.from_cache(Z, cached(), pos=7), ValueError, r"shape \(3, 7, 3, 4\): there is no pos 7"),
        (lambda: Intervention.from_cache(Z, cached(), batch=(0, 3)), ValueError, r"there is no batch \(0, 3\)"),
        (lambda: Intervention.from_cache(Z, cached(), head=()), ValueError, "is not an int or several"),
        (lambda: Intervention.from_cache(("resid_pre", 0), cached(), head=0), ValueError, "there is no head to select"),
        (
            lambda: Intervention.from_cache(Z, cached(CLEAN[:1], remove_batch_dim=True)),
            ValueError,
            "the cache has no batch axis",
        ),
        (lambda: Intervention.mean(Z, cached(), head=3), ValueError, "there is no head 3"),
        (
            lambda: Intervention.mean(Z, cached(), attention_mask=torch.ones(3, 6)),
            ValueError,
            r"attention_mask has shape \(3, 6\); .* \(3, 7\)",
        ),
        (
            lambda: Intervention.mean(Z, cached(), per_position=True, attention_mask=torch.ones(3, 7)),
            ValueError,
            "padding shifts positions",
        ),
        (
            lambda: Intervention.mean(Z, cached(), attention_mask=torch.zeros(3, 7)),
            ValueError,
            "attention_mask is 0 everywhere",
        ),
        (lambda: Intervention.mean("hook_tokens", cached(names_filter="*")), ValueError, "holds whole numbers"),
        (lambda: Intervention.resample(Z, cached(), n_prompts=0), ValueError, "n_prompts is how many"),
        (lambda: Intervention.resample(Z, cached(), batch=0), ValueError, "no batch to select"),
        (lambda: Intervention.resample(Z, cached(CLEAN[:1])), ValueError, "a single prompt has no other"),
    ],
)
def test_what_a_cache_cannot_give_is_named(make: Callable[[], Intervention], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_value_for_other_prompts_than_those_that_are_swept_is_named_before_anything_runs() -> None:
    cell = Intervention.from_cache(Z, cached(tiny_tokens(3, 5)))
    with pytest.raises(ValueError, match=r"shape \(3, 5, 3, 4\) does not fit the selection, \(3, 7, 3, 4\)"):
        sweep(MODEL, CORRUPTED, [cell], logit(0), verbose=False)


# Files


def same(left: Any, right: Any) -> bool:
    if isinstance(left, (list, tuple)):
        return isinstance(right, list) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left.value, Tensor):
        values = torch.equal(left.value, right.value) and left.value.dtype == right.value.dtype
    else:
        values = left.value == right.value
    return values and (left.site, left.operation, left.selections()) == (
        right.site,
        right.operation,
        right.selections(),
    )


CELLS = [
    Intervention(Z, "zero", head=2, pos=(0, -1)),
    [Intervention(Z, "scale", 0.1, feature=1), Intervention(PATTERN, "replace", float("-inf"), batch=0)],
    Intervention(Z, "add", torch.randn(4, generator=torch.Generator().manual_seed(0)), head=0),
    Intervention(Z, "replace", torch.ones(4, dtype=torch.bfloat16)[::2], feature=(0, 1)),
]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "edits.json"
    save_interventions(path, CELLS)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["edits.json", "edits.safetensors"]
    assert same(CELLS, load_interventions(path))
    save_interventions(path, CELLS[:2])  # no tensors: none are left behind
    assert [file.name for file in tmp_path.iterdir()] == ["edits.json"]
    assert same(CELLS[:2], load_interventions(path))


def test_a_sweep_of_what_was_read_gives_the_same(tmp_path: Path) -> None:
    cache = cached()
    cells = [Intervention.from_cache(("z", 1), cache, head=head) for head in range(3)]
    save_interventions(tmp_path / "cells.json", cells)
    read = load_interventions(tmp_path / "cells.json")
    scores = [sweep(MODEL, CORRUPTED, each, logit(3), verbose=False) for each in (cells, read)]
    assert torch.equal(*scores)
    assert len(set(scores[0].tolist())) == 3


def test_a_tensor_that_interventions_share_is_written_once() -> None:
    shared = torch.randn(4)
    text, tensors = interventions_to_json([Intervention(Z, "add", shared, head=head) for head in range(3)])
    assert len(tensors) == 1
    first, *others = interventions_from_json(text, tensors)
    assert all(other.value is first.value for other in others)


GOOD, TENSORS = interventions_to_json(CELLS)


def changed(change: Callable[[Any], object]) -> str:
    document = json.loads(GOOD)
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "tensors", "message"),
    [
        ("not json", TENSORS, "which are JSON"),
        (changed(lambda doc: doc.pop("interventions")), TENSORS, "has no list of interventions"),
        (
            changed(lambda doc: doc["interventions"][1][0].update(value=[1])),
            TENSORS,
            "a real tensor or a number, not list",
        ),
        ("[]", TENSORS, "its format is not"),
        (changed(lambda doc: doc.update(format="other")), TENSORS, "its format is not"),
        (changed(lambda doc: doc.update(version=2)), TENSORS, "version 2 .* reads version 1: update hooked_lm"),
        (changed(lambda doc: doc.update(version="1")), TENSORS, "'1' is no version number"),
        (changed(lambda doc: doc.update(version=0)), TENSORS, "0 is no version number"),
        (changed(lambda doc: doc["interventions"][0].update(position=1)), TENSORS, "position"),
        (changed(lambda doc: doc["interventions"][0].pop("site")), TENSORS, "an intervention has site, operation"),
        (changed(lambda doc: doc["interventions"][1][0].update(value="0.1")), TENSORS, "'0.1' is no number"),
        (changed(lambda doc: doc["interventions"][0].update(operation="double")), TENSORS, "'double' is none of"),
        (GOOD, {"0": TENSORS["0"]}, "there is no tensor '1'"),
        (GOOD, {**TENSORS, "2": TENSORS["0"]}, "no intervention uses"),
    ],
)
def test_a_description_that_is_not_one_is_refused(text: str, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interventions_from_json(text, tensors)


def test_a_description_without_a_version_is_read_as_version_1() -> None:
    assert json.loads(GOOD)["version"] == 1
    assert same(CELLS, interventions_from_json(changed(lambda doc: doc.pop("version")), TENSORS))


def test_nothing_is_written_of_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="got 'zero'"):
        save_interventions(tmp_path / "edits.json", [*CELLS, "zero"])  # type: ignore[list-item]
    for name in ("edits.safetensors", "edits"):
        with pytest.raises(ValueError, match=r"written to a \.json file"):
            save_interventions(tmp_path / name, CELLS)
    assert not list(tmp_path.iterdir())


def test_a_save_that_was_cut_off_between_its_two_files_is_refused(tmp_path: Path) -> None:
    zeros = [Intervention("blocks.0.attn.hook_z", "replace", torch.zeros(3))]
    fives = [Intervention("blocks.0.attn.hook_z", "replace", torch.full((3,), 5.0))]
    path, tensors = tmp_path / "edits.json", tmp_path / "edits.safetensors"
    save_interventions(path, zeros)
    described = path.read_text()
    save_interventions(path, fives)
    path.write_text(described)  # as if the second save had ended after the tensors
    with pytest.raises(ValueError, match="a save was cut off between its two files"):
        load_interventions(path)
    save_interventions(path, fives)
    tensors.unlink()
    with pytest.raises(ValueError, match="there is no tensor '0'"):
        load_interventions(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_the_digest_is_of_any_dtype_and_shape(dtype: torch.dtype, tmp_path: Path) -> None:
    for value in (torch.ones((), dtype=dtype), torch.ones(2, 3, dtype=dtype).T):
        save_interventions(tmp_path / "edits.json", [Intervention("blocks.0.attn.hook_z", "replace", value)])
        (loaded,) = load_interventions(tmp_path / "edits.json")
        assert isinstance(loaded, Intervention)
        assert torch.equal(loaded.value, value)  # type: ignore[arg-type]


def test_a_file_without_a_digest_is_read_as_before(tmp_path: Path) -> None:
    path = tmp_path / "edits.json"
    save_interventions(path, [Intervention("blocks.0.attn.hook_z", "replace", torch.ones(3))])
    document = json.loads(path.read_text())
    del document["tensors"]
    path.write_text(json.dumps(document))
    assert isinstance(load_interventions(path)[0], Intervention)


@pytest.mark.parametrize(
    "several", [[1, 3], range(1, 4, 2), np.array([1, 3]), torch.tensor([1, 3])], ids=lambda x: type(x).__name__
)
def test_several_entries_may_come_in_any_sequence(several: Any) -> None:
    edit = Intervention("blocks.0.attn.hook_z", "zero", pos=several)
    assert edit.pos == (1, 3)
    assert all(type(one) is int for one in edit.pos)
    assert Slice(several).indices(7).tolist() == [1, 3]


@pytest.mark.parametrize("wrong", [[], [1.0], [True], np.array([0.5]), torch.zeros(2, 2, dtype=torch.long), "1"])
def test_entries_that_are_no_integers_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="is not an int or several ints"):
        Intervention("blocks.0.attn.hook_z", "zero", pos=wrong)
