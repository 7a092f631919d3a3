"""What differs between two records: code, arguments, models, environment, results."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hooked_lm._support.integers import at_least_one
from hooked_lm._support.plain_data import PlainData
from hooked_lm._support.reading import SafetensorFile
from hooked_lm.experiments.bench.fingerprint import ModelFingerprint
from hooked_lm.experiments.bench.record import Record, brief_error
from hooked_lm.experiments.bench.words import brief, flattened

if TYPE_CHECKING:
    from hooked_lm.plotting import Figure

__all__ = ["Difference", "RecordDiff", "diff_records"]

# A line of `RecordDiff.rows`.
Row = dict[str, str | float | None]


@dataclass(frozen=True)
class Difference:
    """One thing that differs.

    Attributes:
        path: of the value.
        words: what it is in the one record and in the other.
        size: the largest difference of numbers; None where there is no such thing.
    """

    path: str
    words: str
    size: float | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.words}"


@dataclass(frozen=True, eq=False)
class RecordDiff:
    """What differs between two records.

    Attributes:
        a, b: the records.
        source: a unified diff of the sources, in lines; empty where they are the same.
        names: plain values around the functions.
        arguments: with the models among them.
        environment: versions, system, threads.
        results: numbers, tensors, texts and figures.
    """

    a: Record
    b: Record
    source: tuple[str, ...]
    names: tuple[Difference, ...]
    arguments: tuple[Difference, ...]
    environment: tuple[Difference, ...]
    results: tuple[Difference, ...]

    @property
    def same_results(self) -> bool:
        """Whether the results are equal to the bit."""
        return not self.results

    @property
    def same_inputs(self) -> bool:
        """Whether source, values around it and arguments are the same."""
        return not (self.source or self.names or self.arguments)

    @property
    def largest(self) -> float | None:
        """The largest difference of numbers in the results; None where no numbers differ."""
        return max((one.size for one in self.results if one.size is not None), default=None)

    @property
    def summary(self) -> str:
        """What differs, in a sentence."""
        named = {
            "source": self.source,
            "values around the function": self.names,
            "arguments": self.arguments,
            "environment": self.environment,
        }
        other = [name for name, found in named.items() if found]
        before = f"other {' and '.join(other)}" if other else "the same source, arguments and environment"
        if self.same_results:
            return f"{before}; equal results"
        count = f"{len(self.results)} result{'s' if len(self.results) > 1 else ''} differ"
        size = "" if self.largest is None else f", by at most {self.largest:.3g}"
        return f"{before}; {count if len(self.results) > 1 else count + 's'}{size}"

    def top(self, k: int = 5) -> list[Difference]:
        """Return the `k` results that differ most; those without a size come first.

        Args:
            k: how many.

        Raises:
            ValueError: `k` is below 1.
        """
        at_least_one(k, "k")
        return sorted(self.results, key=lambda one: float("-inf") if one.size is None else -one.size)[:k]

    def rows(self) -> list[Row]:
        """Return a dictionary for each difference besides those of the source; `pandas.DataFrame` takes them.

        Keys: `of` (names, arguments, environment or results), `path`, `words`, `size`.
        """
        return [
            {"of": of, "path": one.path, "words": one.words, "size": one.size}
            for of in ("names", "arguments", "environment", "results")
            for one in getattr(self, of)
        ]

    def table(self) -> str:
        """Return what differs as text."""
        lines = [f"{self.a.name}@{self.a.version} and {self.b.name}@{self.b.version}: {self.summary}"]
        if self.source:
            lines += ["source", *(f"  {line}" for line in self.source)]
        for title in ("names", "arguments", "environment", "results"):
            found = getattr(self, title)
            if found:
                lines += [title, *(f"  {one}" for one in found)]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def figure(self, title: str = "") -> Figure:
        """Return the numbers of both results, side by side, for those that differ. Needs the extra `viz`.

        Args:
            title: of the figure; by default the summary.

        Raises:
            ValueError: no single number differs.
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import layer_curves

        one, other = self.a.numbers, self.b.numbers
        paths = [path for path in one if path in other and one[path] != other[path]][:40]
        if not paths:
            raise ValueError("there is nothing to draw: no single number differs between the two results")
        curves = {str(record): [record.numbers[path] for path in paths] for record in (self.a, self.b)}
        named = {f"{record.name}@{record.version}": curves[str(record)] for record in (self.a, self.b)}
        return layer_curves(named, paths, axis="result", title=title or self.summary)


def diff_records(a: Record, b: Record) -> RecordDiff:
    """Return what differs between two records.

    Args:
        a, b: the records, of one bench or of two.

    Raises:
        ValueError: a record's files were changed.
    """
    names = [
        {"dict": {name: {"text": one} for name, one in record.data["function"]["names"].items()}} for record in (a, b)
    ]
    environments = [{"dict": {key: _tree(one) for key, one in record.environment.items()}} for record in (a, b)]
    return RecordDiff(
        a=a,
        b=b,
        source=tuple(_source_diff(a, b)),
        names=tuple(_differences(names[0], names[1], {}, {})),
        arguments=tuple(
            _differences({"dict": a.data["arguments"]}, {"dict": b.data["arguments"]}, _tensors(a), _tensors(b))
        ),
        environment=tuple(_differences(environments[0], environments[1], {}, {})),
        results=tuple(_result_differences(a, b)),
    )


def _tree(plain: object) -> object:
    """Plain data as packed values."""
    if isinstance(plain, dict):
        return {"dict": {key: _tree(one) for key, one in plain.items()}}
    return {"list": [_tree(one) for one in plain]} if isinstance(plain, list) else plain


def _source_diff(a: Record, b: Record) -> list[str]:
    if a.data["files"]["source.py"] == b.data["files"]["source.py"]:
        return []
    named = [f"{record.name}@{record.version}" for record in (a, b)]
    lines = difflib.unified_diff(
        a.source.splitlines(), b.source.splitlines(), fromfile=named[0], tofile=named[1], lineterm="", n=2
    )
    return list(lines)


def _result_differences(a: Record, b: Record) -> list[Difference]:
    if a.error is not None or b.error is not None:
        ended = [brief_error(one.error) if one.error is not None else "complete" for one in (a, b)]
        return [] if ended[0] == ended[1] else [Difference("result", f"{ended[0]} -> {ended[1]}")]
    first, second = ({"dict": record.data["results"]} for record in (a, b))
    found = _differences(first, second, _tensors(a), _tensors(b))
    return [Difference(one.path.removeprefix("result."), one.words, one.size) for one in found] + _figures(a, b)


def _figures(a: Record, b: Record) -> list[Difference]:
    pages = [{path: sha for path, sha in one.data["files"].items() if path.endswith(".html")} for one in (a, b)]
    common = sorted(pages[0].keys() & pages[1].keys())
    return [Difference(path, "drawn otherwise") for path in common if pages[0][path] != pages[1][path]]


def _tensors(record: Record) -> Mapping[str, Tensor]:
    """The record's tensors, each read when it is used."""
    if "tensors.safetensors" not in record.data["files"]:
        return {}
    file = SafetensorFile(record.tensor_file())
    return _Tensors(file)


class _Tensors(dict[str, Tensor]):
    def __init__(self, file: SafetensorFile) -> None:
        super().__init__()
        self.file = file

    def __missing__(self, name: str) -> Tensor:
        return self.file.tensor(name)


def _differences(
    one: object, other: object, first: Mapping[str, Tensor], second: Mapping[str, Tensor]
) -> list[Difference]:
    before, after = flattened(one), flattened(other)
    found = []
    for path in dict.fromkeys([*before, *after]):
        if path not in after:
            found.append(Difference(path, f"{brief(before[path])} -> not there"))
        elif path not in before:
            found.append(Difference(path, f"not there -> {brief(after[path])}"))
        elif not _equal(before[path], after[path]):
            found.append(_difference(path, before[path], after[path], first, second))
    return found


def _equal(one: object, other: object) -> bool:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() & {"tensor", "array"}:
        return one.get("sha256") == other.get("sha256") and one.keys() == other.keys()
    # repr, because nan != nan, 1 == True and 0.0 == -0.0.
    return repr(one) == repr(other)


def _difference(
    path: str, one: object, other: object, first: Mapping[str, Tensor], second: Mapping[str, Tensor]
) -> Difference:
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (one, other))
    if numbers:
        size = abs(float(other) - float(one))  # type: ignore[arg-type]
        return Difference(path, f"{one:.6g} -> {other:.6g}", size)
    if isinstance(one, dict) and isinstance(other, dict):
        if "model" in one and "model" in other:
            models = [ModelFingerprint.from_dict(value["model"]) for value in (one, other)]
            return Difference(path, ", ".join(models[0].differences(models[1])) or "another name")
        if one.keys() & {"tensor", "array"} and other.keys() & {"tensor", "array"} and one["shape"] == other["shape"]:
            return _tensor_difference(path, one, other, first, second)
    return Difference(path, f"{brief(one)} -> {brief(other)}")


def _tensor_difference(
    path: str, one: PlainData, other: PlainData, first: Mapping[str, Tensor], second: Mapping[str, Tensor]
) -> Difference:
    a, b = (
        tensors[value["tensor"] if "tensor" in value else value["array"]]
        for value, tensors in ((one, first), (other, second))
    )
    if a.dtype == torch.bool or b.dtype == torch.bool:
        return Difference(path, f"{int((a != b).sum())} of {a.numel()} entries differ")
    gaps = (b.double() - a.double()).abs()
    apart = (a != b) & ~(a.isnan() & b.isnan()) if a.is_floating_point() and b.is_floating_point() else a != b
    size = float(gaps[apart].max()) if bool(apart.any()) else 0.0
    dtypes = "" if one["dtype"] == other["dtype"] else f"{one['dtype']} -> {other['dtype']}, "
    return Difference(path, f"{dtypes}{int(apart.sum())} of {a.numel()} entries differ, by at most {size:.3g}", size)
