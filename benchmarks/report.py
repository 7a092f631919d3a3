"""From results to ratios, and from ratios to lines of text and tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measurements import MINIMAL, OURS, TARGETS
from benchmarks.runner import Result


@dataclass(frozen=True)
class Ratio:
    """Ours over another's, round by round.

    Attributes:
        name: of the measurement.
        other: whose it is compared with.
        median, low, high: of the rounds.
        target: what is asked for at most, if anything.
    """

    name: str
    other: str
    median: float
    low: float
    high: float
    target: float | None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        return None if self.target is None else self.median <= self.target


def ratio(name: str, other: str, mine: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Return the ratio of two measurements that were made in turn."""
    ratios = [one / another for one, another in zip(mine, theirs, strict=True)]
    return Ratio(name, other, statistics.median(ratios), min(ratios), max(ratios), TARGETS.get((name, other)))


def ratios(result: Result) -> list[Ratio]:
    """Return our ratios to everybody else's in a measurement. Whoever computed something else is not among them."""
    mine = result.values.get(OURS)
    if not mine:
        return []
    return [ratio(result.name, other, mine, theirs) for other, theirs in result.values.items() if other != OURS]


def results_in(report: Mapping[str, Any]) -> list[Result]:
    """Return the results in a report read from JSON."""
    return [Result(**fields) for fields in report["results"]]


def line(result: Result) -> str:
    """Return a measurement in one line."""
    parts = [f"{other} {quantity(values, result.unit)}" for other, values in result.values.items()]
    parts += [f"ours / {one.other} {figure(one.median)}" + _verdict(one) for one in ratios(result)]
    return f"{result.name}: " + "; ".join([*parts, *trouble(result)])


def _verdict(one: Ratio) -> str:
    return "" if one.met is None else f" (target {one.target:.3g}: {'met' if one.met else 'MISSED'})"


def trouble(result: Result) -> Iterator[str]:
    """Yield who was left out of a measurement, and why; those that just have no such thing are no trouble."""
    for name, why in (result.wrong | result.failed).items():
        yield f"{result.name}, {name}: {why}"


def quantity(values: Sequence[float], unit: str) -> str:
    """Return the median of some seconds or bytes, to be read."""
    median = statistics.median(values)
    if unit == "bytes":
        return f"{median / 1e6:,.1f} MB"
    return f"{median:.2f} s" if median >= 1 else f"{1e3 * median:.3g} ms"


# Tables


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def ratio_table(results: Sequence[Result], columns: Mapping[str, str]) -> str:
    """Return a table of measurements and contestants: what ours takes, and its ratio to everybody else's.

    Args:
        results: the rows.
        columns: contestants, and what to call them.
    """
    shown = {name: title for name, title in columns.items() if any(name in one.values for one in results)}
    rows = []
    for result in results:
        if OURS not in result.values or not any(name in result.values for name in shown):
            continue
        found = {one.other: one for one in ratios(result)}
        cells = [cell(found[name]) if name in found else _no_ratio(result, name) for name in shown]
        rows.append([result.name, quantity(result.values[OURS], result.unit), *cells])
    return table(["", "ours", *shown.values()], rows) if rows else ""


def beside_table(results: Sequence[Result], columns: Mapping[str, str]) -> str:
    """Return a table of what is compared with other things than contestants."""
    rows = [
        [
            result.name,
            quantity(result.values[OURS], result.unit),
            one.other,
            quantity(result.values[one.other], result.unit),
            cell(one),
        ]
        for result in results
        for one in ratios(result)
        if one.other not in columns
    ]
    return table(["", "ours", "beside", "takes", "ratio"], rows) if rows else ""


def cell(one: Ratio) -> str:
    """Return a ratio with its range."""
    text = figure(one.median)
    return text if one.low == one.high else f"{text} ({figure(one.low)}-{figure(one.high)})"


def figure(number: float) -> str:
    """Return a ratio with two figures at least, and no more than it is worth."""
    return f"{number:.2f}" if number >= 0.1 else f"{number:.3f}" if number >= 0.01 else f"{number:.1e}"


def _no_ratio(result: Result, name: str) -> str:
    if name in result.wrong:
        return "differs"
    if name in result.failed:
        return "fails"
    return "" if name == MINIMAL else "not measured"


def target_table(found: Sequence[tuple[str, Sequence[Ratio]]], columns: Mapping[str, str]) -> str:
    """Return a table of targets, and the ratios measured; those above their target are bold.

    Args:
        found: for each report its title and its ratios.
        columns: contestants, and what to call them.
    """
    measured = [{(one.name, one.other): one for one in ratios} for _, ratios in found]
    rows = [
        [
            name,
            columns.get(other, other),
            f"{target:.3g}",
            *(_measured(ratios.get((name, other))) for ratios in measured),
        ]
        for (name, other), target in TARGETS.items()
        if any((name, other) in ratios for ratios in measured)
    ]
    return table(["", "beside", "at most", *(title for title, _ in found)], rows)


def _measured(one: Ratio | None) -> str:
    if one is None:
        return ""
    return figure(one.median) if one.met else f"**{figure(one.median)}**"
