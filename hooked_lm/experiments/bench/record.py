"""Record: what is kept of one run of an experiment, read from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import Tensor

from hooked_lm._support.plain_data import PlainData
from hooked_lm._support.reading import SafetensorFile, read_text
from hooked_lm.experiments.bench.environment import RandomState
from hooked_lm.experiments.bench.fingerprint import ModelFingerprint
from hooked_lm.experiments.bench.store import RecordEntry, RecordStore
from hooked_lm.experiments.bench.values import unpack
from hooked_lm.experiments.bench.words import brief, flattened, seconds_in_words

__all__ = ["Record", "brief_error", "models_in"]


class Record:
    """One run of an experiment.

    Args:
        store: of the bench.
        entry: the record's line in the index.

    Attributes:
        id: the name of its folder.
        name: of the experiment.
        version: counts the records of the name from 1.
        data: everything but tensors and figures, as plain data.

    Raises:
        ValueError: the record was changed, or is not there any more.
    """

    def __init__(self, store: RecordStore, entry: RecordEntry) -> None:
        self.id, self.name, self.version = entry.id, entry.name, entry.version
        self.data: PlainData = store.read(entry.id)
        self._store = store

    def __repr__(self) -> str:
        return f"Record({self.name}@{self.version}, {self.id})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def folder(self) -> Path:
        """Where the record's files are."""
        return self._store.folder / "records" / self.id

    @property
    def source(self) -> str:
        """The source of the function when it ran, and of what it calls of its own package; the function first."""
        return read_text(self._file("source.py"))

    @property
    def started(self) -> str:
        """When it began, in UTC, as ISO 8601 has it."""
        return cast(str, self.data["started"])

    @property
    def seconds(self) -> float:
        """How long it took."""
        return cast(float, self.data["seconds"])

    @property
    def peak_memory(self) -> int | None:
        """The most memory that the process had meanwhile, in bytes; None where the system does not tell."""
        return cast("int | None", self.data["memory"]["process"])

    @property
    def environment(self) -> PlainData:
        """Versions, system, processor, threads and the commit."""
        return cast(PlainData, self.data["environment"])

    @property
    def error(self) -> PlainData | None:
        """Class, message and traceback of the error that ended it; None of a run that came to its end."""
        return cast("PlainData | None", self.data["error"])

    @property
    def arguments(self) -> dict[str, object]:
        """The arguments as they were before the run; a model as its fingerprint, other objects as `NotKept`."""
        return cast("dict[str, object]", self._unpacked({"dict": self.data["arguments"]}))

    @property
    def result(self) -> object:
        """What the function returned.

        Tensors, arrays, numbers and containers are as they were; a dataclass is a dictionary of its fields, a figure
        the path of its page.

        Raises:
            ValueError: the run ended with an error, or a file of the record was changed.
        """
        if self.error is not None:
            raise ValueError(f"{self.name}@{self.version} has no result: it ended with {brief_error(self.error)}")
        return self._unpacked(self.data["results"]["result"])

    @property
    def numbers(self) -> dict[str, float]:
        """The single numbers of the result, by their path in it."""
        return {
            path or "result": float(value)
            for path, value in flattened(self.data["results"].get("result")).items()
            if isinstance(value, (int, float))
        }

    @property
    def figures(self) -> dict[str, Path]:
        """The pages of the figures by name; where there is a picture, it stands beside its page."""
        return {Path(path).stem: self._file(path) for path in self.data["files"] if path.endswith(".html")}

    @property
    def models(self) -> dict[str, ModelFingerprint]:
        """The fingerprints of models among the arguments, by the argument's name."""
        return models_in(self.data["arguments"])

    @property
    def parts(self) -> list[str]:
        """The ids of records that were made within this run."""
        return cast("list[str]", self.data["parts"])

    @property
    def tools(self) -> list[PlainData]:
        """The calls of tools: `tool`, `function`, `seconds`."""
        return cast("list[PlainData]", self.data["tools"])

    @property
    def random_state(self) -> RandomState | None:
        """The state of the random generators when it began; None if it drew from none of them."""
        if not self.data["random"]["drawn"]:
            return None
        file = SafetensorFile(self.tensor_file())
        return RandomState.of({name: file.tensor(name) for name in file.names if name.startswith("random.")})

    def _file(self, path: str) -> Path:
        if path not in self.data["files"]:
            raise ValueError(f"{self!r} has no file {path!r}: there are {', '.join(self.data['files'])}")
        return self._store.file(self.id, path, self.data["files"][path])

    def tensor_file(self) -> Path:
        """Return the safetensors file of arguments and results.

        Raises:
            ValueError: the record has no tensors.
        """
        return self._file("tensors.safetensors")

    def trace_file(self) -> Path:
        """Return the file of the trace that was recorded, which `tracing.load` reads.

        Raises:
            ValueError: the record is of a function.
        """
        return self._file("trace.safetensors")

    def _unpacked(self, tree: object) -> object:
        file: SafetensorFile | None = None

        def tensor(name: str) -> Tensor:
            nonlocal file
            file = file or SafetensorFile(self.tensor_file())
            return file.tensor(name).clone()

        return unpack(tree, tensor, lambda name: self._file(f"figures/{name}.html"))

    def table(self) -> str:
        """Return the record as text."""
        data = self.data
        lines = [f"{self.name}@{self.version}  {self.id}  {self.started}  {seconds_in_words(self.seconds)}"]
        lines += [f"  {name} = {brief(value)}" for name, value in data["arguments"].items()]
        if self.error is not None:
            lines.append(f"  ended with {brief_error(self.error)}")
        numbers = list(self.numbers.items())
        lines += [f"  {path}: {value:.6g}" for path, value in numbers[:20]]
        if len(numbers) > 20:
            lines.append(f"  and {len(numbers) - 20} more numbers")
        tensors = [
            (path or "result", value)
            for path, value in flattened(data["results"].get("result")).items()
            if isinstance(value, dict) and value.keys() & {"tensor", "array"}
        ]
        lines += [f"  {path}: {brief(value)}" for path, value in tensors[:20]]
        lines += [f"  figure {name}" for name in self.figures]
        lines += [f"  only the text is kept of {path}" for path in data["not_kept"]]
        lines += [f"  note: {note}" for note in data["notes"]]
        if self.peak_memory is not None:
            lines.append(f"  at most {self.peak_memory / 2**20:,.0f} MiB in the process")
        if data["random"]["drawn"]:
            lines.append(f"  drew from the generators of {', '.join(data['random']['drawn'])}")
        for tool in dict.fromkeys(call["tool"] for call in self.tools):
            names = sorted({call["function"] for call in self.tools if call["tool"] == tool})
            lines.append(f"  used {tool}: {', '.join(names)}")
        if data["text"]:
            lines += ["", data["text"]]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def models_in(arguments: PlainData) -> dict[str, ModelFingerprint]:
    """Return the fingerprints of models among packed values, by their path."""
    return {
        path: ModelFingerprint.from_dict(value["model"])
        for path, value in flattened({"dict": arguments}).items()
        if isinstance(value, dict) and "model" in value
    }


def brief_error(error: PlainData) -> str:
    """Return an error in a line."""
    return f"{error['class']}: {error['message'][:200]}"
