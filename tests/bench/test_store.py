"""The folder of a bench: several writers, writers that are killed, files that are changed, many records."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hooked_lm.experiments import Bench
from hooked_lm.experiments.bench.store import RecordStore

WRITER = """
import sys
from hooked_lm.experiments import Bench
bench = Bench(sys.argv[1], png=False)
run = bench.record(name=sys.argv[2])(lambda i: [i, "x" * 100_000])
print("ready", flush=True)
sys.stdin.readline()
for i in range(int(sys.argv[3])):
    run(i)
"""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "bench", png=False)


def filled(bench: Bench, n: int, name: str = "number") -> None:
    run = bench.record(name=name)(lambda i: {"value": i * 0.5, "tensor": torch.tensor([i])})
    for i in range(n):
        run(i)


def writer(folder: Path, name: str, n: int) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), name, str(n)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def begin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def test_two_processes_at_once_and_a_third_that_is_killed_lose_nothing_that_was_complete(bench: Bench) -> None:
    writers = [writer(bench.folder, name, n) for name, n in (("one", 60), ("two", 60), ("killed", 100_000))]
    for process in writers:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in writers:
        begin(process)
    records = bench.folder / "records"
    while not records.is_dir() or sum(1 for _ in records.iterdir()) < 60:
        time.sleep(0.005)
    writers[2].send_signal(signal.SIGKILL)
    assert [process.wait(60) for process in writers] == [0, 0, -signal.SIGKILL]
    for process in writers:
        process.communicate()
    # What the killed process left unfinished is removed by the next writer.
    bench.run(lambda: 1)
    assert not [one for one in records.iterdir() if one.name.startswith(".")]
    for name in ("one", "two"):
        found = [bench.get(name, version) for version in range(1, 61)]
        assert [record.result for record in found] == [[i, "x" * 100_000] for i in range(60)]
    for entry in bench.versions("killed"):
        assert bench.get("killed", entry.version).result == [entry.version - 1, "x" * 100_000]
    assert len(bench) == sum(1 for _ in records.iterdir())


def test_versions_are_numbers_that_stay(bench: Bench) -> None:
    filled(bench, 3)
    second = bench.get("number", 2)
    for path in sorted(second.folder.rglob("*"), reverse=True):
        path.unlink()
    second.folder.rmdir()
    assert [entry.version for entry in bench.versions("number")] == [1, 3]
    assert bench.get("number", 3).arguments == {"i": 2}
    assert bench.get("number", -1) == bench.get("number@3")
    with pytest.raises(ValueError, match="'number' has no version 2: there are 1 to 3"):
        bench.get("number", 2)


@pytest.mark.parametrize("left", ["nothing", "a line cut off", "lines of others"])
def test_a_record_that_the_index_lacks_is_found(bench: Bench, left: str) -> None:
    filled(bench, 3)
    before = bench.all().entries
    index = bench.folder / "index.jsonl"
    lines = index.read_text().splitlines(keepends=True)
    if left == "nothing":
        index.unlink()
    else:
        index.write_text(
            lines[0] + lines[1][:40] if left == "a line cut off" else "[1]\n{}\nnull\n" + "".join(lines[:2])
        )
    assert bench.all().entries == before
    filled(bench, 1)
    assert [entry.version for entry in bench.all()] == [1, 2, 3, 4]
    assert Bench(bench.folder).all().entries == bench.all().entries


def test_the_same_content_is_one_record(bench: Bench) -> None:
    filled(bench, 1)
    record = bench.get("number")
    store = RecordStore(bench.folder)
    data = {key: value for key, value in record.data.items() if key != "files"}
    tensors = {"result.0": torch.tensor([0])}
    assert store.write(data, record.source, tensors, {}) == record.id
    assert len(bench) == 1


def test_listing_reads_the_index_and_no_record(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(bench, 5)

    def refused(self: RecordStore, id: str) -> None:
        raise AssertionError(f"read {id}")

    monkeypatch.setattr(RecordStore, "read", refused)
    assert [row["value"] for row in bench.versions("number").rows()] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert "number@5" in bench.table()


def test_a_changed_record_is_refused(bench: Bench) -> None:
    filled(bench, 1)
    path = bench.get("number").folder / "record.json"
    path.write_text(path.read_text().replace('"i": 0', '"i": 1'))
    with pytest.raises(ValueError, match="is not what was recorded: its SHA-256 is no longer the folder's name"):
        bench.get("number")


@pytest.mark.parametrize("name", ["tensors.safetensors", "source.py"])
def test_a_changed_or_missing_file_of_a_record_is_refused(bench: Bench, name: str) -> None:
    filled(bench, 1)
    record = bench.get("number")
    path = record.folder / name
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ValueError, match=re.escape(f"{name} is not what was recorded: its SHA-256 differs")):
        _ = (record.result, record.source)
    path.unlink()
    with pytest.raises(ValueError, match=f"{re.escape(name)} is missing from its record"):
        _ = (record.result, record.source)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds files, and is no bench"):
        Bench(tmp_path)
    with pytest.raises(ValueError, match="is a file, and a bench is a folder"):
        Bench(tmp_path / "thesis.tex")


def test_a_newer_format_is_refused(bench: Bench) -> None:
    filled(bench, 1)
    (bench.folder / "bench.json").write_text('{"bench": 2}')
    with pytest.raises(ValueError, match="has version 2 of its format; this hooked_lm reads version 1"):
        Bench(bench.folder)


def test_a_folder_that_cannot_be_written_to_raises_after_the_run(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    bench = Bench(tmp_path / "bench", png=False)
    (tmp_path / "bench" / "records").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        bench.run(lambda: 1)


def test_a_record_is_got_by_number_name_or_id(bench: Bench) -> None:
    filled(bench, 2)
    first = bench.get("number", 1)
    for got in ("number@1", first.id, first.id[:6]):
        assert bench.get(got) == first
    assert bench.get("number", first.id[:6]) == first
    assert bench.get("number").version == 2
    with pytest.raises(ValueError, match=r"no experiment 'numbers' is recorded in .*: there are number"):
        bench.get("numbers")
    with pytest.raises(ValueError, match="no record of 'number' has an id that begins with 'zz'"):
        bench.get("number", "zz")
    for wrong in (0, 3, -3, True):
        with pytest.raises(ValueError, match="has no version"):
            bench.get("number", wrong)


def test_versions_make_a_table_rows_the_best_and_a_curve(bench: Bench) -> None:
    filled(bench, 3)
    found = bench.versions("number")
    lines = str(found).splitlines()
    assert lines[0].split() == ["record", "id", "started", "(UTC)", "time", "source", "arguments", "result"]
    assert lines[2].startswith("number@2  ")
    assert lines[2].endswith("i=1        value 0.5")
    assert [entry.version for entry in found.top(2)] == [3, 2]
    assert found.table(1).splitlines()[-1] == "2 older records are not shown"
    assert list(found.figure().data[0].y) == [0.0, 0.5, 1.0]
    assert found.figure().layout.title.text == "value; highest in number@3"
    with pytest.raises(ValueError, match="no record has the number 'loss' in the index: there are value"):
        found.top(by="loss")
    with pytest.raises(ValueError, match="k is at least 1"):
        found.top(0)
    assert bench.names == ["number"]
    assert repr(bench).endswith("3 records of 1 experiments)")
