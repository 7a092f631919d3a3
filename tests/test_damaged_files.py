"""Whatever file is read, a damaged one is a ValueError that names it, and a cache on disk is that of its model."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hooked_lm import ActivationCache, HookedTransformer, Intervention, load_interventions, save_interventions
from hooked_lm._support.reading import parse_json, read_json_object
from hooked_lm.activation_cache.reading import MappedActivations
from hooked_lm.training import CHECKPOINT, METRICS, TrainingConfig, train
from tests.helpers import tiny_model, tiny_tokens

TOKENS = tiny_tokens()

# JSON


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 101 + "]" * 101, "more than 100 levels"),
        ("9" * 5000, "an integer of 5000 digits"),
        ("-" + "9" * 101, "an integer of 102 digits"),
        ("NaN", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("1e999", "too large for a float"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ('{"a": 1, "a": true}', "the key 'a' twice"),
        ('[{"b": {"a": [1], "a": [2]}}]', "the key 'a' twice"),
    ],
)
def test_a_text_that_is_no_json_is_a_value_error(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=f"the file is not JSON.*{match}|{match}"):
        parse_json(text, "the file", finite=True)


def test_json_is_read_as_it_is() -> None:
    value = {"a": [1, 2.5, "x", None, True], "b": {"c": -(10**30)}}
    assert parse_json(json.dumps(value), "it") == value
    assert parse_json('{"a": 1, "a": 1}', "it") == {"a": 1}
    assert parse_json("[" * 100 + "]" * 100, "it") is not None
    assert parse_json("[NaN, 1e999]", "it") == pytest.approx([float("nan"), float("inf")], nan_ok=True)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: None, lambda path: path.write_bytes(b"\xff")])
def test_a_json_file_that_cannot_be_read_is_a_value_error(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a\.json"):
        read_json_object(tmp_path / "a.json")


# Interventions


@pytest.fixture
def edits(tmp_path: Path) -> Path:
    save_interventions(tmp_path / "edits.json", [Intervention("hook_embed", "add", torch.ones(12))])
    return tmp_path / "edits.json"


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"a": ' + "1" * 5000 + "}", "3", '{"format": 1, "format": 2}'])
def test_interventions_in_a_damaged_file_raise(text: str, edits: Path) -> None:
    edits.write_text(text)
    with pytest.raises(ValueError, match="description of interventions"):
        load_interventions(edits)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "1e999"])
def test_an_intervention_by_a_number_that_json_does_not_have_raises(word: str, tmp_path: Path) -> None:
    save_interventions(tmp_path / "edits.json", [Intervention("hook_embed", "scale", 2.5)])
    path = tmp_path / "edits.json"
    path.write_text(path.read_text().replace("2.5", word))
    with pytest.raises(ValueError, match=r"no number of JSON|too large"):
        load_interventions(path)


def test_interventions_with_damaged_or_absent_tensors_raise(edits: Path) -> None:
    tensors = edits.with_suffix(".safetensors")
    content = tensors.read_bytes()
    for kept in (0, 20, len(content) - 4):
        tensors.write_bytes(content[:kept])
        with pytest.raises(ValueError, match=r"edits\.safetensors is damaged"):
            load_interventions(edits)
    tensors.unlink()
    tensors.mkdir()
    with pytest.raises(ValueError, match=r"edits\.safetensors is not a safetensors file"):
        load_interventions(edits)
    with pytest.raises(ValueError, match=r"absent\.json cannot be read"):
        load_interventions(edits.with_name("absent.json"))


# Training


def test_a_damaged_training_checkpoint_raises_and_damaged_metrics_are_left_out(tmp_path: Path) -> None:
    config = TrainingConfig(steps=2, batch=2, log_every=1, warmup=0)
    first = train(tiny_model(), tiny_tokens(4, 6), config, tmp_path)
    (tmp_path / METRICS).write_text("3\n" + "[" * 100_000 + "\n" + (tmp_path / METRICS).read_text() + '{"step": 2, ')
    assert train(tiny_model(), tiny_tokens(4, 6), config, tmp_path) == first
    content = (tmp_path / CHECKPOINT).read_bytes()
    for bad in (b"", content[: len(content) // 2], pickle.dumps({"config": 3})):
        (tmp_path / CHECKPOINT).write_bytes(bad)
        with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged or no training checkpoint"):
            train(tiny_model(), tiny_tokens(4, 6), config, tmp_path)
    torch.save({"step": 1}, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is no training checkpoint"):
        train(tiny_model(), tiny_tokens(4, 6), config, tmp_path)


# Caches


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tiny_model().run_with_cache(TOKENS, offload=tmp_path / "cache.safetensors")
    return tmp_path / "cache.safetensors"


def rewritten(path: Path, **changed: str | None) -> None:
    """Write a cache with other metadata; None removes an entry."""
    with safe_open(path, framework="pt") as file:
        about = file.metadata() | changed
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors, path, {name: value for name, value in about.items() if value is not None})


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_cache_that_was_cut_off_raises(kept: int, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cache\.safetensors is damaged or not a safetensors file"):
        ActivationCache.load(path, tiny_model())


def test_a_cache_that_is_absent_or_a_folder_raises(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=str(place)):
            ActivationCache.load(place, tiny_model())


@pytest.mark.parametrize(
    "changed",
    [
        {"order": "[" * 100_000},
        {"order": "{}"},
        {"order": "[1]"},
        {"order": '["hook_embed", "hook_embed"]'},
        {"aliases": "["},
        {"aliases": "[]"},
        {"aliases": '{"a": 1}'},
        {"has_batch_dim": "yes"},
        {"version": "9" * 5000},
        {"model": "3"},
        {"model": "{"},
    ],
    ids=lambda changed: str(changed)[:30],
)
def test_a_cache_with_bad_metadata_raises(changed: dict[str, str | None], path: Path) -> None:
    rewritten(path, **changed)
    with pytest.raises(ValueError, match=r"cache\.safetensors"):
        ActivationCache.load(path, tiny_model())


def test_a_cache_of_dtypes_that_caches_do_not_have_raises(path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(path, framework="pt") as file:
        save_file({**tensors, "hook_embed": tensors["hook_embed"].to(torch.float8_e5m2)}, path, file.metadata())
    with pytest.raises(ValueError, match=r"dtypes that caches do not have: \{'hook_embed': 'F8_E5M2'\}"):
        ActivationCache.load(path, tiny_model())


OTHERS: list[tuple[dict[str, Any], str, str]] = [
    ({"n_layers": 1}, "n_layers is 2 in the file and 1 in the model", "of a layer that the model lacks: it has 1"),
    ({"d_model": 24}, "d_model is 12 in the file and 24 in the model", "d_model=24"),
    ({"n_heads": 2}, "n_heads is 3 in the file and 2 in the model", "head=2"),
    ({"d_head": 8}, "d_head is 4 in the file and 8 in the model", "d_head=8"),
    ({"d_mlp": 20}, "d_mlp is 48 in the file and 20 in the model", "d_mlp=20"),
    ({"d_vocab": 30}, "d_vocab_out is 20 in the file and 30 in the model", "vocab=30"),
]


@pytest.mark.parametrize("old", [False, True], ids=["with sizes", "without"])
@pytest.mark.parametrize(("changes", "by_size", "by_shape"), OTHERS, ids=lambda value: str(value)[:20])
def test_a_cache_of_a_model_of_other_sizes_raises(
    changes: dict[str, Any], by_size: str, by_shape: str, old: bool, path: Path
) -> None:
    if old:
        rewritten(path, model=None)
    with pytest.raises(ValueError, match="is the cache of another model: .*" + (by_shape if old else by_size)):
        ActivationCache.load(path, tiny_model(**changes))


def test_two_caches_of_more_layers_than_were_recorded_are_told_apart_by_size_alone(tmp_path: Path) -> None:
    tiny_model(n_layers=3).run_with_cache(TOKENS, names_filter="hook_embed", offload=tmp_path / "c")
    with pytest.raises(ValueError, match="n_layers is 3 in the file and 2 in the model"):
        ActivationCache.load(tmp_path / "c", tiny_model())


@pytest.mark.parametrize("offload", [True, False], ids=["offloaded", "saved"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attn_only": True, "act_fn": None},
        {"n_key_value_heads": 1},
        {"num_experts": 3, "experts_per_token": 2, "gated_mlp": True},
        {"positional_embedding_type": "shortformer"},
        {"d_vocab_out": 7},
        {"n_key_value_heads": 1, "ungroup_grouped_query_attention": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("old", [False, True], ids=["with sizes", "without"])
def test_a_cache_of_the_same_model_loads(changes: dict[str, Any], offload: bool, old: bool, tmp_path: Path) -> None:
    model: HookedTransformer = tiny_model(**changes)
    for number, options in enumerate(({}, {"remove_batch_dim": True}, {"pos_slice": -1}, {"names_filter": "*"})):
        place = tmp_path / str(number)
        _, full = model.run_with_cache(TOKENS[:1], **options)
        if offload:
            model.run_with_cache(TOKENS[:1], offload=place, **options)
        else:
            full.save(place)
        if old:
            rewritten(place, model=None)
        found = ActivationCache.load(place, model)
        assert list(found) == list(full)
        assert all(torch.equal(found[name], full[name]) for name in full)


# A cache whose file changes


def test_reading_a_cache_whose_file_was_cut_off_or_written_to_raises(path: Path) -> None:
    content = path.read_bytes()
    spoils: tuple[Callable[[], object], ...] = (
        lambda: os.utime(path, ns=(0, 0)),
        lambda: path.write_bytes(content + b" "),
        lambda: os.truncate(path, 100),  # last: unnoticed, it would end the process
    )
    reads: tuple[Callable[[ActivationCache], object], ...] = (
        lambda cache: cache["resid_pre", 1],
        lambda cache: list(cache.values()),
        lambda cache: cache.decompose_resid(),
        lambda cache: cache.to("cpu"),
    )
    for spoil in spoils:
        whole = ActivationCache.load(path, tiny_model())
        part = ActivationCache.load(path, tiny_model()).apply_slice_to_batch_dim(slice(0, 1))
        assert whole["resid_pre", 1].isfinite().all()
        spoil()
        for cache in (whole, part):
            for read in reads:
                with pytest.raises(ValueError, match="was changed while in use"):
                    read(cache)
        path.write_bytes(content)


def test_a_cache_goes_on_when_its_file_is_renamed_replaced_or_removed(tmp_path: Path) -> None:
    model, place = tiny_model(), tmp_path / "cache.safetensors"
    _, full = model.run_with_cache(TOKENS)
    _, cache = model.run_with_cache(TOKENS, offload=place)
    assert isinstance(cache.cache_dict, MappedActivations)
    place.rename(tmp_path / "other")
    assert torch.equal(cache["z", 1], full["z", 1])
    model.run_with_cache((TOKENS + 1) % 20, offload=tmp_path / "other")
    assert torch.equal(cache["z", 1], full["z", 1])
    (tmp_path / "other").unlink()
    assert torch.equal(cache["z", 1], full["z", 1])


def test_a_copy_of_a_mapped_cache_is_in_memory(path: Path) -> None:
    cache = ActivationCache.load(path, tiny_model())
    expected = cache["z", 1].clone()
    copies = [copy.deepcopy(cache.cache_dict), pickle.loads(pickle.dumps(cache.cache_dict))]
    cache.cache_dict["own"] = torch.ones(1)
    del cache.cache_dict["hook_embed"]
    assert "own" in cache
    assert "hook_embed" not in cache
    os.truncate(path, 100)
    for one in copies:
        assert torch.equal(one["blocks.1.attn.hook_z"], expected)
