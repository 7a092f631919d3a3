"""Activation stores: what a cache holds, whole after any interruption, every row once in a batch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, UnknownHookError
from hooked_lm._support.locks import folder_lock
from hooked_lm.datasets import ActivationStore, store_activations
from tests.helpers import tiny_model

SITES = ["blocks.0.attn.hook_z", "blocks.1.hook_resid_post"]
LENGTHS = [5, 3, 1, 6, 2, 4, 6, 3, 2, 5, 1, 4]


def texts_of(seed: int = 0, n: int = len(LENGTHS)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 9, (LENGTHS[i % len(LENGTHS)],), generator=generator).tolist() for i in range(n)]


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return tiny_model(n_layers=3, dtype=torch.float64)


def stored(model: HookedTransformer, folder: Path, texts: object = None, **settings: object) -> ActivationStore:
    settings = {"batch_size": 2, "shard_size": 800, "verbose": False, **settings}
    return store_activations(
        model, texts_of() if texts is None else texts, settings.pop("sites", SITES), folder, **settings
    )  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


# What is stored


@torch.no_grad()
def test_rows_are_those_of_a_cache_of_each_text_alone(model: HookedTransformer, tmp_path: Path) -> None:
    store = stored(model, tmp_path)
    texts = texts_of()
    caches = [model.run_with_cache(torch.tensor([text]))[1] for text in texts]
    for site in SITES:
        expected = torch.cat([cache[site][0] for cache in caches])
        assert store[site].shape == expected.shape
        assert torch.allclose(store[site][:], expected, atol=1e-12)
    assert store.texts.tolist() == [number for number, text in enumerate(texts) for _ in text]
    assert store.positions.tolist() == [pos for text in texts for pos in range(len(text))]
    assert store.tokens.tolist() == [token for text in texts for token in text]
    assert (len(store), store.n_texts, store.sites) == (sum(LENGTHS), len(LENGTHS), tuple(SITES))
    assert len(store.manifest["shards"]) > 3


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep_bos", [False, True])
def test_padding_is_left_out_and_bos_unless_it_is_asked_for(tmp_path: Path, side: str, keep_bos: bool) -> None:
    model = HookedTransformer.from_pretrained("demo-tasks-4l")
    model.tokenizer.padding_side = side  # type: ignore[union-attr]
    texts = ["When Mary and John went to the store", "When Mary", "", "Q: What is the capital of France?\nA:"]
    store = store_activations(
        model, iter(texts), "blocks.1.hook_mlp_out", tmp_path, keep_bos=keep_bos, batch_size=4, verbose=False
    )
    first = 0 if keep_bos else 1
    expected = [model.run_with_cache(text)[1]["mlp_out", 1][0, first:] for text in texts if text]
    assert torch.allclose(store["blocks.1.hook_mlp_out"][:], torch.cat(expected), atol=1e-5)
    assert store.texts.unique().tolist() == [0, 1, 3]
    assert int(store.positions.min()) == first
    last = store_activations(
        model, texts, "blocks.1.hook_mlp_out", tmp_path / "last", last_only=True, batch_size=4, verbose=False
    )
    assert torch.allclose(last["blocks.1.hook_mlp_out"][:], torch.stack([one[-1] for one in expected]), atol=1e-5)
    assert last.texts.tolist() == [0, 1, 3]


def test_no_layer_after_the_last_site_is_run(model: HookedTransformer, tmp_path: Path) -> None:
    ran: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))  # type: ignore[misc]
        for layer, block in enumerate(model.blocks)
    ]
    try:
        stored(model, tmp_path / "one", sites="blocks.1.attn.hook_q")
        assert set(ran) == {0, 1}
        ran.clear()
        stored(model, tmp_path / "none", sites="hook_embed")
        assert not ran
        stored(model, tmp_path / "all", sites="ln_final.hook_normalized")
        assert set(ran) == {0, 1, 2}
    finally:
        for handle in handles:
            handle.remove()


def test_globs_and_predicates_name_sites(model: HookedTransformer, tmp_path: Path) -> None:
    store = stored(model, tmp_path, sites="blocks.*.hook_resid_mid")
    assert store.sites == tuple(f"blocks.{layer}.hook_resid_mid" for layer in range(3))


def test_a_dtype_is_kept_and_what_does_not_fit_in_it_raises(model: HookedTransformer, tmp_path: Path) -> None:
    store = stored(model, tmp_path / "half", dtype=torch.bfloat16)
    assert store[SITES[1]].dtype == torch.bfloat16
    whole = stored(model, tmp_path / "whole")
    assert torch.equal(store[SITES[1]][:], whole[SITES[1]][:].to(torch.bfloat16))
    infinite = pytest.raises(ValueError, match=r"reach 1e\+06, which is infinite in torch.float16")
    with model.hooks(fwd_hooks=[(SITES[1], lambda value, hook: value + 1e6)]), infinite:
        stored(model, tmp_path / "over", dtype=torch.float16)


# Interruptions


class Cut(Exception):
    pass


def cut_after(texts: list[list[int]], n: int) -> Iterator[list[int]]:
    yield from texts[:n]
    raise Cut


@pytest.mark.parametrize("n", range(13))
def test_a_store_that_was_interrupted_is_finished_to_the_byte(model: HookedTransformer, tmp_path: Path, n: int) -> None:
    stored(model, tmp_path / "whole")
    with pytest.raises(Cut):
        stored(model, tmp_path / "cut", cut_after(texts_of(), n))
    with pytest.raises(ValueError, match="is not complete: call store_activations with the same arguments"):
        ActivationStore.open(tmp_path / "cut")
    runs = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: runs.append(len(value)))]):
        stored(model, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    # Shards that were there are not computed again.
    if n >= 8:
        assert sum(runs) < len(LENGTHS)


WRITER = """
import sys, torch
from pathlib import Path
from tests.helpers import tiny_model
from tests.test_activation_stores import stored, texts_of
model = tiny_model(n_layers=3, dtype=torch.float64)
def slowly():
    for text in texts_of(n=4000):
        yield text
print("ready", flush=True)
stored(model, Path(sys.argv[1]), slowly())
"""


def test_a_writer_that_is_killed_leaves_what_can_be_gone_on_with(model: HookedTransformer, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "killed")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    while len(list((tmp_path / "killed").glob("shard-*"))) < 6:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    texts = texts_of(n=4000)[:60]
    # The store is of more texts than these: say so rather than mix the two.
    with pytest.raises(ValueError, match="of more texts than the 4 of this call"):
        stored(model, tmp_path / "killed", texts[:4])
    n_shards = len(list((tmp_path / "killed").glob("shard-*.safetensors")))
    finished = stored(model, tmp_path / "killed", texts_of(n=n_shards * 10))
    whole = stored(model, tmp_path / "whole", texts_of(n=n_shards * 10))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert len(finished) == len(whole)
    finished.verify()


def test_a_finished_store_is_left_as_it_is(model: HookedTransformer, tmp_path: Path) -> None:
    stored(model, tmp_path)
    before = contents(tmp_path)
    runs = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: runs.append(1))]):
        stored(model, tmp_path)
    assert not runs
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sites": SITES[:1]}, r"holds a store with sites \["),
        ({"batch_size": 3}, r"batch_size 2 \(now 3\)"),
        ({"dtype": torch.float32}, r"dtype None \(now 'float32'\)"),
        ({"texts": texts_of(1)}, "was made of other texts than texts 0 to 1 of this call"),
        ({"texts": texts_of()[:1]}, "of more texts than the 1 of this call|was made of other texts"),
    ],
)
def test_other_settings_or_texts_than_those_of_the_store_raise(
    model: HookedTransformer, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    stored(model, tmp_path)
    with pytest.raises(ValueError, match=message):
        stored(model, tmp_path, **change)  # type: ignore[arg-type]


def test_another_model_raises(model: HookedTransformer, tmp_path: Path) -> None:
    stored(model, tmp_path)
    other = tiny_model(n_layers=3, dtype=torch.float64)
    other.blocks[2].mlp.W_in.data[0, 0] += 1e-9
    with pytest.raises(ValueError, match="holds a store with weights_sha256"):
        stored(other, tmp_path)


def test_two_writers_at_once_are_kept_apart(model: HookedTransformer, tmp_path: Path) -> None:
    tmp_path.mkdir(exist_ok=True)
    refused = pytest.raises(ValueError, match=r"storing activations in .*: another process does that already")
    with folder_lock(tmp_path, "storing activations in"), refused:
        stored(model, tmp_path)
    stored(model, tmp_path)


# Reading


def test_rows_are_read_by_number_slice_list_and_mask(
    model: HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stored(model, tmp_path)
    view, whole = store[SITES[0]], store[SITES[0]][:]
    assert torch.equal(view[7], whole[7])
    assert torch.equal(view[-1], whole[-1])
    assert torch.equal(view[5:31:3], whole[5:31:3])
    assert torch.equal(view[[40, 0, 17, 0]], whole[[40, 0, 17, 0]])
    assert torch.equal(view[store.tokens == 3], whole[store.tokens == 3])
    assert torch.equal(view[store.rows_of([3, 0])], whole[(store.texts == 3) | (store.texts == 0)])
    assert len(view) == len(whole)
    for wrong in ([len(whole)], [-len(whole) - 1]):
        with pytest.raises(IndexError, match="the store has 42"):
            _ = view[wrong]
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests
    with pytest.raises(IndexError, match="rows are whole numbers"):
        _ = view[torch.zeros(3)]
    with pytest.raises(IndexError, match="a mask of shape"):
        _ = view[torch.tensor([True])]
    with pytest.raises(KeyError, match=r"'hook_embed' is not stored: there are blocks\.0"):
        _ = store["hook_embed"]
    assert repr(view).startswith("StoredActivations('blocks.0.attn.hook_z', (42, ")


def test_only_so_many_shards_are_open_at_a_time(
    model: HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hooked_lm.datasets.store._OPEN", 2)
    store = stored(model, tmp_path)
    assert len(store.manifest["shards"]) > 3
    assert torch.equal(torch.cat(list(store.batches("token", 5, shuffle=False))), store.tokens)
    assert len(store._open) == 2


@pytest.mark.parametrize("batch_size", [1, 5, 42, 100])
@pytest.mark.parametrize("buffer", [None, "buffered"])
def test_every_row_comes_once_in_shuffled_batches(
    model: HookedTransformer, tmp_path: Path, batch_size: int, buffer: str | None
) -> None:
    store = stored(model, tmp_path)
    size = None if buffer is None else batch_size + 3
    both = list(store.batches([SITES[1], "text", "position"], batch_size, seed=3, buffer=size))
    assert [len(one["text"]) for one in both[:-1]] == [batch_size] * (len(both) - 1)
    rows = [
        int(((store.texts == text) & (store.positions == pos)).nonzero())
        for one in both
        for text, pos in zip(one["text"].tolist(), one["position"].tolist(), strict=True)
    ]
    assert sorted(rows) == list(range(42))
    assert rows != sorted(rows)
    assert torch.equal(torch.cat([one[SITES[1]] for one in both]), store[SITES[1]][rows])
    again = list(store.batches(SITES[1], batch_size, seed=3, buffer=size))
    assert all(torch.equal(a, b[SITES[1]]) for a, b in zip(again, both, strict=True))
    rest = list(store.batches(SITES[1], batch_size, seed=3, buffer=size, start_at=2))
    assert all(torch.equal(a, b) for a, b in zip(rest, again[2:], strict=True))


def test_each_order_is_as_likely_as_any_other(model: HookedTransformer, tmp_path: Path) -> None:
    store = stored(model, tmp_path)
    firsts = torch.stack([next(store.batches("token", 42, seed=seed)) for seed in range(60)])
    assert len({tuple(one) for one in firsts.tolist()}) > 55
    places = torch.zeros(42)
    for seed in range(400):
        order = next(iter(store._order(True, seed, None, None)))
        places[int(order[0])] += 1
    assert (
        float(((places - 400 / 42) ** 2 / (400 / 42)).sum()) < 74
    )  # chi-squared with 41 degrees: 1 in 1000 exceeds it


def test_batches_in_order_of_some_rows_and_without_the_last(model: HookedTransformer, tmp_path: Path) -> None:
    store = stored(model, tmp_path)
    assert torch.equal(torch.cat(list(store.batches("token", 5, shuffle=False))), store.tokens)
    rows = store.rows_of([1, 3])
    assert torch.equal(torch.cat(list(store.batches("token", 4, shuffle=False, rows=rows))), store.tokens[rows])
    assert [len(one) for one in store.batches("token", 5, drop_last=True)] == [5] * 8
    with pytest.raises(ValueError, match="batch_size is 1 or more"):
        store.batches("token", 0)
    with pytest.raises(ValueError, match="buffer shuffles all rows"):
        store.batches("token", 5, buffer=3)


def test_mean_and_deviation_are_those_of_all_rows(
    model: HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hooked_lm.datasets.store._CHUNK", 5)
    with model.hooks(fwd_hooks=[(SITES[1], lambda value, hook: value + 1e6)]):
        store = stored(model, tmp_path)
    whole: Tensor = store[SITES[1]][:]
    assert torch.allclose(store.mean(SITES[1]), whole.mean(0), rtol=1e-12)
    assert torch.allclose(store.std(SITES[1]), whole.std(0), rtol=1e-6)


# Damage


def test_a_damaged_or_missing_shard_is_named(model: HookedTransformer, tmp_path: Path) -> None:
    store = stored(model, tmp_path)
    store.verify()
    path = tmp_path / store.manifest["shards"][2]["file"]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{path.name} is not what was stored"):
        ActivationStore.open(tmp_path).verify()
    path.write_bytes(content[:200])
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        _ = ActivationStore.open(tmp_path)[SITES[0]][:]
    path.unlink()
    for read in (lambda: ActivationStore.open(tmp_path).verify(), lambda: ActivationStore.open(tmp_path)[SITES[0]][:]):
        with pytest.raises(ValueError, match=f"{path.name} is missing from the store"):
            read()


def test_a_newer_format_and_a_folder_of_something_else_are_refused(model: HookedTransformer, tmp_path: Path) -> None:
    stored(model, tmp_path / "new")
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_text())
    (tmp_path / "new" / "manifest.json").write_text(json.dumps({**manifest, "activation_store": 2}))
    with pytest.raises(ValueError, match="has version 2 of its format"):
        ActivationStore.open(tmp_path / "new")
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read: No such file"):
        ActivationStore.open(tmp_path / "nowhere")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "shard-00000.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds shards without a manifest\.json"):
        stored(model, tmp_path / "odd")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"sites": "blocks.0.attn.hook_pattern"},
            ValueError,
            "has axes batch head query key: a store has a row for each",
        ),
        ({"sites": "blocks.7.hook_z"}, UnknownHookError, "blocks.7.hook_z"),
        ({"batch_size": 0}, ValueError, "batch_size is 1 or more, got 0"),
        ({"shard_size": 0}, ValueError, "shard_size is 1 or more"),
        ({"texts": "one text"}, TypeError, "a corpus is an iterable of texts"),
        ({"texts": [[], []]}, ValueError, "there is nothing to store: the 2 texts have no tokens"),
    ],
)
def test_what_cannot_be_stored_raises(
    model: HookedTransformer, tmp_path: Path, settings: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        stored(model, tmp_path, **settings)  # type: ignore[arg-type]


def test_the_table_says_what_is_there(model: HookedTransformer, tmp_path: Path) -> None:
    store = stored(model, tmp_path)
    lines = str(store).splitlines()
    assert lines[0].startswith("42 tokens of 12 texts in ")
    assert lines[2].startswith("  blocks.1.hook_resid_post  [")
    assert repr(store).endswith("42 rows of 2 sites)")
    assert store.text_of(6) == (1, 1)
