"""Versions: records in a list, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

from hooked_lm._support.integers import at_least_one
from hooked_lm.experiments.bench.store import RecordEntry
from hooked_lm.experiments.bench.words import seconds_in_words

if TYPE_CHECKING:
    from hooked_lm.plotting import Figure

__all__ = ["Versions"]

# A line of `Versions.rows`.
Row = dict[str, str | int | float]
# Lines that `str` shows of a long list.
_SHOWN = 60


@dataclass(frozen=True)
class Versions(Sequence[RecordEntry]):
    """Records in the order in which they were written.

    Attributes:
        entries: what the index says of each.
    """

    entries: Sequence[RecordEntry]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[RecordEntry]:
        return iter(self.entries)

    @overload
    def __getitem__(self, index: int) -> RecordEntry: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[RecordEntry]: ...

    def __getitem__(self, index: int | slice) -> RecordEntry | Sequence[RecordEntry]:
        return self.entries[index]

    def top(self, k: int = 5, by: str | None = None) -> list[RecordEntry]:
        """Return the `k` records with the highest value of a number of their results.

        Args:
            k: how many.
            by: the number's path in the result; by default the first of the newest record.

        Raises:
            ValueError: `k` is below 1, or no record has the number among those that the index repeats.
        """
        at_least_one(k, "k")
        paths = list(dict.fromkeys(path for entry in reversed(self.entries) for path in entry.results))
        by = by if by is not None else next(iter(paths), None)
        having = [entry for entry in self.entries if by in entry.results]
        if by is None or not having:
            raise ValueError(f"no record has the number {by!r} in the index: there are {', '.join(paths) or 'none'}")
        return sorted(having, key=lambda entry: -entry.results[by])[:k]

    def rows(self) -> list[Row]:
        """Return a dictionary for each record; `pandas.DataFrame` takes them.

        Keys: `name`, `version`, `id`, `started`, `seconds`, `source`, `outcome`, `argument NAME` for each argument, and
        the first numbers of the result by their paths.
        """
        return [
            {
                "name": entry.name,
                "version": entry.version,
                "id": entry.id,
                "started": entry.started,
                "seconds": entry.seconds,
                "source": entry.source[:8],
                "outcome": entry.outcome,
                **{f"argument {name}": text for name, text in entry.arguments.items()},
                **entry.results,
            }
            for entry in self.entries
        ]

    def table(self, most: int | None = None) -> str:
        """Return the records as text, the newest last.

        Args:
            most: lines; the oldest records are left out. By default all are shown.
        """
        shown = list(self.entries if most is None else self.entries[-most:] if most else ())
        lines: list[tuple[str, ...]] = [("record", "id", "started (UTC)", "time", "source", "arguments", "result")]
        lines += [_line(entry) for entry in shown]
        widths = [max(len(line[column]) for line in lines) for column in range(6)]
        text = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[6]]).rstrip()
            for line in lines
        ]
        left = len(self.entries) - len(shown)
        return "\n".join([*text, *([f"{left} older records are not shown"] if left else [])])

    def __str__(self) -> str:
        return self.table(_SHOWN)

    def figure(self, by: str | None = None, title: str = "") -> Figure:
        """Return a number of the results over the records as a curve. Needs the extra `viz`.

        Args:
            by: the number's path in the result, as for `top`.
            title: of the figure; by default the number's path.

        Raises:
            ValueError: as `top`.
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import layer_curves

        best = self.top(1, by)[0]
        path = by if by is not None else next(path for entry in reversed(self.entries) for path in entry.results)
        having = [entry for entry in self.entries if path in entry.results]
        labels = [f"{entry.name}@{entry.version}" for entry in having]
        named = title or f"{path}; highest in {best.name}@{best.version}"
        return layer_curves({path: [entry.results[path] for entry in having]}, labels, axis=path, title=named)


def _line(entry: RecordEntry) -> tuple[str, ...]:
    arguments = ", ".join(f"{name}={text}" for name, text in entry.arguments.items())
    results = ", ".join(f"{path} {value:.4g}" for path, value in entry.results.items())
    return (
        f"{entry.name}@{entry.version}",
        entry.id[:8],
        entry.started[:19].replace("T", " "),
        seconds_in_words(entry.seconds),
        entry.source[:8],
        arguments if len(arguments) <= 60 else f"{arguments[:59]}…",
        results if entry.outcome == "complete" else entry.outcome,
    )
