"""An offloaded cache is the full cache of the same run, on disk: streamed there, mapped back, whole or not at all."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooked_lm import ActivationCache, HookedTransformer, HookPoint
from hooked_lm._support.files import write_whole
from hooked_lm.activation_cache.file import Offloading
from tests.helpers import tiny_model, tiny_tokens
from tests.hook_sites_helpers import ARCHITECTURES

TOKENS = tiny_tokens()


def assert_same(found: Any, full: Any) -> None:
    assert list(found) == list(full)
    for name, expected in full.items():
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("architecture", ["gpt2", "sinks, mixture with a limit", "shortformer"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_is_the_full_cache(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(**ARCHITECTURES[architecture], dtype=dtype)
    tokens = TOKENS[:1, :5]  # odd numbers of small numbers, and integers after them
    expected, full = model.run_with_cache(tokens)
    logits, disk = model.run_with_cache(tokens, offload=tmp_path / "cache.safetensors")
    assert torch.equal(logits, expected)
    assert_same(disk, full)
    assert not any(value.requires_grad for value in disk.values())
    assert_same(ActivationCache.load(tmp_path / "cache.safetensors", model), full)
    torch.testing.assert_close(disk.decompose_resid(), full.decompose_resid())


@pytest.mark.parametrize(
    "options",
    [
        {"names_filter": "blocks.*.attn.hook_pattern"},
        {"pos_slice": -1, "device": "cpu"},
        {"return_type": "loss", "incl_bwd": True},
        {"return_cache_object": False},
    ],
    ids=lambda options: " ".join(options),
)
def test_options_are_those_of_the_full_cache(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model()
    _, full = model.run_with_cache(TOKENS, **options)
    _, disk = model.run_with_cache(TOKENS, offload=str(tmp_path / "cache.safetensors"), **options)
    assert_same(disk, full)
    assert type(disk) is type(full)


def test_without_the_batch_axis(tmp_path: Path) -> None:
    model = tiny_model()
    _, full = model.run_with_cache(TOKENS[:1], remove_batch_dim=True)
    _, disk = model.run_with_cache(TOKENS[:1], remove_batch_dim=True, offload=tmp_path / "cache.safetensors")
    assert_same(disk, full)
    assert not disk.has_batch_dim
    assert not ActivationCache.load(tmp_path / "cache.safetensors", model).has_batch_dim


def test_the_file_is_plain_safetensors_and_has_each_tensor_once(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "cache.safetensors"
    _, full = model.run_with_cache(TOKENS)
    _, disk = model.run_with_cache(TOKENS, offload=path)
    stored = load_file(path)
    assert "blocks.1.hook_resid_pre" not in stored  # the same tensor as blocks.0.hook_resid_post
    assert torch.equal(stored["blocks.0.hook_resid_post"], full["resid_pre", 1])
    assert disk["resid_pre", 1].data_ptr() == disk["resid_post", 0].data_ptr()
    different = {value.untyped_storage().data_ptr(): value.nbytes for value in full.values()}
    assert sum(value.nbytes for value in stored.values()) <= sum(different.values()) + 8 * len(full)


def test_nothing_is_held_while_it_runs_and_the_tensors_are_maps_of_the_file(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "cache.safetensors"
    held = []

    def look(x: Tensor, hook: HookPoint) -> None:
        held.extend(part for part in tmp_path.iterdir() if part.stat().st_size > 0)

    with model.hooks(fwd_hooks=[("ln_final.hook_scale", look)]):
        _, disk = model.run_with_cache(TOKENS, offload=path)
    assert held  # the file grows before the run has ended
    assert held[0] != path
    assert [part.name for part in tmp_path.iterdir()] == [path.name]
    before = disk["z", 1].clone()
    model.run_with_cache(TOKENS + 0, offload=path)  # another file under the same name
    model.run_with_cache((TOKENS + 1) % 20, offload=path)
    assert torch.equal(disk["z", 1], before)


def test_a_run_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "cache.safetensors"
    model.run_with_cache(TOKENS, offload=path)
    content = path.read_bytes()

    def fail(x: Tensor, hook: HookPoint) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", fail)]):
        model.run_with_cache(TOKENS, offload=path)
    assert path.read_bytes() == content
    assert [part.name for part in tmp_path.iterdir()] == [path.name]
    assert not any(point.live for point in model.hook_points())


def test_a_place_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache\.safetensors cannot be written"):
        tiny_model().run_with_cache(TOKENS, offload=tmp_path / "file" / "cache.safetensors")


def test_a_name_is_written_once(tmp_path: Path) -> None:
    with Offloading(tmp_path / "x.safetensors", ["a"]) as file:
        file["a"] = torch.ones(2)
        with pytest.raises(ValueError, match=r"'a' has been written to .* already"):
            file["a"] = torch.zeros(2)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], torch.ones(2))


def test_a_large_file_of_many_names_has_room_for_its_table(tmp_path: Path) -> None:
    names = [f"blocks.{layer}.a_rather_long_name.hook_something" for layer in range(500)]
    tensors = {name: torch.full((1, 1, 1, 1, 1), float(place), dtype=torch.float16) for place, name in enumerate(names)}
    with Offloading(tmp_path / "x.safetensors", names) as file:
        for name, tensor in tensors.items():
            file[name] = tensor
            file[f"{name}_grad"] = torch.ones(3, dtype=torch.int64)
    found = ActivationCache.load(tmp_path / "x.safetensors", tiny_model()).cache_dict
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(found[f"{names[7]}_grad"], torch.ones(3, dtype=torch.int64))
    # Numbers begin at a multiple of their size, whatever stands before them.
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in found.values())


def test_a_saved_cache_is_the_same_kind_of_file(tmp_path: Path) -> None:
    model: HookedTransformer = tiny_model()
    _, full = model.run_with_cache(TOKENS)
    full.save(tmp_path / "saved.safetensors")
    model.run_with_cache(TOKENS, offload=tmp_path / "streamed.safetensors")
    saved, streamed = (load_file(tmp_path / f"{name}.safetensors") for name in ("saved", "streamed"))
    assert saved.keys() == streamed.keys()


def test_an_error_of_a_hook_is_its_own(tmp_path: Path) -> None:
    model = tiny_model()

    def fail(x: Tensor, hook: HookPoint) -> None:
        (tmp_path / "nowhere").read_text()

    with pytest.raises(FileNotFoundError), model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", fail)]):
        model.run_with_cache(TOKENS, offload=tmp_path / "cache.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Beyond the limit a write fails as on a full disk, once the signal for it is ignored.
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for room in (100, 20_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
            with pytest.raises(ValueError, match=r"cache\.safetensors cannot be written: File too large"):
                tiny_model().run_with_cache(TOKENS, offload=tmp_path / "cache.safetensors")
            assert not list(tmp_path.iterdir())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_names_of_many_bytes_have_room(tmp_path: Path) -> None:
    names = [f"{'日' * 250}{place}" for place in range(30)]
    with Offloading(tmp_path / "x.safetensors", names) as file:
        for place, name in enumerate(names):
            file[name] = torch.full((2,), float(place))
    assert torch.equal(load_file(tmp_path / "x.safetensors")[names[7]], torch.full((2,), 7.0))


def test_more_names_than_were_said_are_an_error_and_not_a_broken_file(tmp_path: Path) -> None:
    def write() -> None:
        with Offloading(tmp_path / "x.safetensors", ["a"]) as file:
            for place in range(200):
                file[f"name {place}"] = torch.zeros(1)

    with pytest.raises(ValueError, match=r"has room for .* bytes of names"):
        write()
    assert not list(tmp_path.iterdir())


def test_what_the_format_does_not_have_is_an_error(tmp_path: Path) -> None:
    with (
        Offloading(tmp_path / "x.safetensors", ["a"]) as file,
        pytest.raises(ValueError, match=r"'a' has dtype torch\.complex64"),
    ):
        file["a"] = torch.zeros(2, dtype=torch.complex64)
    with pytest.raises(ValueError, match="no plain file"):
        tiny_model().run_with_cache(TOKENS, offload="/dev/null")


def with_metadata(path: Path, **changed: str | None) -> Path:
    """The file again under another name, its metadata changed; None removes an entry."""
    with safe_open(path, framework="pt") as file:
        about = file.metadata() | changed
    other = path.with_name("changed.safetensors")
    save_file(load_file(path), other, {name: value for name, value in about.items() if value is not None})
    return other


@pytest.mark.parametrize("offload", [True, False], ids=["offloaded", "saved"])
def test_a_cache_without_format_and_version_is_read_as_version_1(offload: bool, tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "cache.safetensors"
    _, cache = model.run_with_cache(TOKENS, **({"offload": path} if offload else {}))
    if not offload:
        cache.save(path)
    with safe_open(path, framework="pt") as file:
        assert (file.metadata()["format"], file.metadata()["version"]) == ("hooked_lm activations", "1")
    assert_same(ActivationCache.load(with_metadata(path, format=None, version=None), model), cache)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": "2"}, r"has version 2 of its format; this hooked_lm reads version 1: update hooked_lm"),
        ({"version": "two"}, "'two' is no version number"),
        ({"version": "0"}, "0 is no version number"),
        ({"format": "pt"}, "is not a saved ActivationCache"),
        ({"format": None, "order": None}, "is not a saved ActivationCache"),
        ({"aliases": None}, "metadata is incomplete"),
        ({"order": '["hook_nothing"]'}, r"lacks tensors of its cache: \['hook_nothing'\]"),
    ],
    ids=str,
)
def test_a_cache_of_a_newer_version_or_of_another_format_is_refused(
    changed: dict[str, str | None], message: str, tmp_path: Path
) -> None:
    model = tiny_model()
    model.run_with_cache(TOKENS, names_filter="*hook_z", offload=tmp_path / "cache.safetensors")
    with pytest.raises(ValueError, match=message):
        ActivationCache.load(with_metadata(tmp_path / "cache.safetensors", **changed), model)


def test_a_tensor_written_to_between_two_names_is_two(tmp_path: Path) -> None:
    tensor = torch.zeros(3)
    with Offloading(tmp_path / "x.safetensors", ["a", "b", "c"]) as file:
        file["a"] = tensor
        file["b"] = tensor
        file["c"] = tensor.add_(1)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == {"a", "c"}
    assert torch.equal(found["c"], torch.ones(3))


def test_a_path_is_that_of_when_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: os.chdir(tmp_path / "elsewhere"))]):
        _, disk = model.run_with_cache(TOKENS, offload="cache.safetensors")
    assert (tmp_path / "cache.safetensors").is_file()
    assert disk["z", 0].shape == (2, 7, 3, 4)


def test_filters_that_can_be_read_once_and_hooks_that_would_stay(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "cache.safetensors"
    _, disk = model.run_with_cache(TOKENS, offload=path, names_filter=(name for name in ["hook_embed"]))
    assert list(disk) == ["hook_embed"]
    with pytest.raises(ValueError, match="no reset_hooks_end=False"):
        model.run_with_cache(TOKENS, offload=path, reset_hooks_end=False)
    assert not any(point.live for point in model.hook_points())


# Several writers


@torch.no_grad()
def test_jobs_in_threads_at_one_path_get_their_own_activations_or_raise(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "cache.safetensors"

    def job(number: int) -> bool:
        tokens = tiny_tokens(2, 6, seed=number)
        try:
            logits, cache = model.run_with_cache(tokens, offload=path)
        except ValueError as error:
            assert "is being written already" in str(error)  # noqa: PT017
            return False
        assert torch.equal(cache["unembed.hook_out"], logits)
        assert torch.equal(cache["embed"], model.embed(tokens))
        return True

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(job, range(60)))
    assert any(done)
    assert [one.name for one in tmp_path.iterdir()] == ["cache.safetensors"]


@torch.no_grad()
def test_a_cache_stays_what_it_is_when_another_is_written_in_its_place(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "cache.safetensors"
    logits, cache = model.run_with_cache(tiny_tokens(seed=1), offload=path)
    other, _ = model.run_with_cache(tiny_tokens(seed=2), offload=path)
    assert torch.equal(cache["unembed.hook_out"], logits)
    assert torch.equal(ActivationCache.load(path, model)["unembed.hook_out"], other)


def test_a_second_writer_raises_and_the_first_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    with Offloading(path, ["a"]) as file:
        with pytest.raises(ValueError, match="is being written already"), Offloading(path, ["a"]):
            pass
        file["a"] = torch.ones(3)
    assert path.exists()


@pytest.mark.skipif(os.name != "posix", reason="processes are looked up on POSIX only")
def test_what_a_killed_writer_left_is_removed_by_the_next_in_the_folder(tmp_path: Path) -> None:
    code = f"""
import sys, time
from hooked_lm._support.files import write_whole
from hooked_lm.activation_cache.file import Offloading
with Offloading({str(tmp_path / "cache.safetensors")!r}, ["a"]):
    print("ready", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        with (
            pytest.raises(ValueError, match="is being written already"),
            Offloading(tmp_path / "cache.safetensors", ["a"]),
        ):
            pass
        writer.kill()
    assert [one.suffix for one in tmp_path.iterdir()] == [".unfinished"]
    write_whole(tmp_path / "another.txt", "text")
    assert [one.name for one in tmp_path.iterdir()] == ["another.txt"]
