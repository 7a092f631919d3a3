"""The folder of a bench: a folder for each record, named by its content, and an index that is read at once.

    bench.json             the version of the format
    records/<id>/          record.json, source.py, tensors.safetensors, figures/
    index.jsonl            a line for each record, in the order in which they were written: their version numbers

A record's folder is written under another name and then renamed, so it is there whole or not at all. The index only
repeats what the records hold. A record that is missing in it, since its writer was killed in between, is added by
whoever reads the folder next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from hooked_lm._support.files import append_line, explained, unfinished_folder, write_whole
from hooked_lm._support.plain_data import PlainData
from hooked_lm._support.reading import read_json_object, read_text
from hooked_lm._support.versions import check_version

__all__ = ["FORMAT", "RecordEntry", "RecordStore"]

FORMAT = 1
# Letters of the SHA-256 that name a record: 64 bits.
_LETTERS = 16


@dataclass(frozen=True)
class RecordEntry:
    """A line of the index: what a table of records shows.

    Attributes:
        id: the name of the record's folder: the beginning of the SHA-256 of its `record.json`.
        name: of the experiment.
        version: counts the records of one name from 1, in the order in which they were written.
        started: when, in UTC, as ISO 8601 has it.
        seconds: how long it took.
        source: the SHA-256 of the function's source.
        outcome: `"complete"`, or the class of the error that ended it.
        arguments: of the function, shortened.
        results: the first numbers among the results.
    """

    id: str
    name: str
    version: int
    started: str
    seconds: float
    source: str
    outcome: str
    arguments: Mapping[str, str]
    results: Mapping[str, float]


class RecordStore:
    """The records in a folder. Several processes may write to it at once.

    Args:
        folder: of the bench; it is made when the first record is written.

    Raises:
        ValueError: the folder holds something else, or records of a newer format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self._head = self.folder / "bench.json"
        self._records, self._index = self.folder / "records", self.folder / "index.jsonl"
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder} is a file, and a bench is a folder")
        if self._head.exists():
            check_version(str(self._head), read_json_object(self._head).get("bench"), FORMAT)
        elif self.folder.exists() and not self._records.is_dir() and _has_files(self.folder):
            raise ValueError(f"{folder} holds files, and is no bench: give a folder of its own")

    def write(
        self, record: PlainData, source: str, tensors: Mapping[str, Tensor], files: Mapping[str, Path | bytes]
    ) -> str:
        """Write a record and return its id.

        Args:
            record: plain data, without `files`, which is added: the SHA-256 of each file.
            source: the text of the function.
            tensors: by name.
            files: path within the record -> a file, which is moved there, or its content.

        Raises:
            ValueError: the folder cannot be written to.
        """
        with unfinished_folder(self._records) as place, explained(place):
            if not self._head.exists():
                write_whole(self._head, json.dumps({"bench": FORMAT}) + "\n")
            (place / "source.py").write_text(source, encoding="utf-8")
            if tensors:
                save_file(dict(tensors), place / "tensors.safetensors")
            for path, content in files.items():
                (place / path).parent.mkdir(exist_ok=True)
                if isinstance(content, Path):
                    content.replace(place / path)
                else:
                    (place / path).write_bytes(content)
            hashes = {str(path.relative_to(place).as_posix()): _file_hash(path) for path in _files(place)}
            text = json.dumps({**record, "files": hashes}, indent=1, sort_keys=True) + "\n"
            (place / "record.json").write_text(text, encoding="utf-8")
            id = hashlib.sha256(text.encode()).hexdigest()[:_LETTERS]
            try:
                place.rename(self._records / id)
            except OSError:
                # The same content gives the same folder.
                if not (self._records / id / "record.json").exists():
                    raise
        append_line(self._index, json.dumps(_line(id, record)))
        return id

    def entries(self) -> list[RecordEntry]:
        """Return the records that are there, in the order in which they were written.

        Raises:
            ValueError: a record cannot be read.
        """
        lines = self._lines()
        there = (
            {one.name for one in self._records.iterdir() if one.name[:1] != "."} if self._records.is_dir() else set()
        )
        missing = sorted(there - lines.keys(), key=lambda id: (self.read(id)["started"], id))
        for id in missing:
            lines[id] = _line(id, self.read(id))
            append_line(self._index, json.dumps(lines[id]))
        found, numbers = list[RecordEntry](), dict[str, int]()
        for id, line in lines.items():
            numbers[line["name"]] = number = numbers.get(line["name"], 0) + 1
            if id in there:
                found.append(RecordEntry(version=number, **line))
        return found

    def _lines(self) -> dict[str, PlainData]:
        """The lines of the index by id. The first of an id counts; a line that was cut off is left out."""
        found: dict[str, PlainData] = {}
        for line in read_text(self._index).splitlines() if self._index.exists() else ():
            try:
                read = json.loads(line)
                found.setdefault(read["id"], read)
            except (ValueError, TypeError, KeyError):
                continue
        return found

    def read(self, id: str) -> PlainData:
        """Return a record's plain data, checked against its name.

        Args:
            id: of the record.

        Raises:
            ValueError: there is no such record, or it was changed.
        """
        path = self._records / id / "record.json"
        text = read_text(path)
        if hashlib.sha256(text.encode()).hexdigest()[:_LETTERS] != id:
            raise ValueError(f"{path} is not what was recorded: its SHA-256 is no longer the folder's name")
        record: PlainData = json.loads(text)
        check_version(str(path), record["format"], FORMAT)
        return record

    def file(self, id: str, path: str, sha256: str) -> Path:
        """Return the path of a record's file, checked against the record.

        Args:
            id: of the record.
            path: within it.
            sha256: as the record has it.

        Raises:
            ValueError: it is not there, or was changed.
        """
        found = self._records / id / path
        if not found.is_file():
            raise ValueError(f"{found} is missing from its record")
        if _file_hash(found) != sha256:
            raise ValueError(f"{found} is not what was recorded: its SHA-256 differs")
        return found


def _has_files(folder: Path) -> bool:
    return any(one.name[:1] != "." for one in folder.iterdir())


def _files(place: Path) -> Iterator[Path]:
    return (path for path in sorted(place.rglob("*")) if path.is_file())


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(id: str, record: PlainData) -> PlainData:
    return {
        "id": id,
        "name": record["name"],
        "started": record["started"],
        "seconds": record["seconds"],
        "source": record["function"]["sha256"],
        "outcome": "complete" if record["error"] is None else record["error"]["class"],
        **record["summary"],
    }
