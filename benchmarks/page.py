"""The page of the documentation: `page.md` with its markers filled in from the results, and `notes.md` beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.measurements import FOUR, MAIN, MINIMAL, NNSIGHT, OURS, THREE, TRANSFORMERS
from benchmarks.peers.process import PEERS
from benchmarks.report import (
    Ratio,
    beside_table,
    figure,
    ratio_table,
    ratios,
    results_in,
    table,
    target_table,
    trouble,
)
from hooked_lm._support.reading import read_json_object

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS, TEMPLATE, NOTES = HERE / "results", HERE / "page.md", HERE / "notes.md"
PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
MARKER = re.compile(r"^<!-- measured: (?P<name>[a-z]+) -->$", flags=re.MULTILINE)
# What stands between these lines of the README is written from the results.
SUMMARY = re.compile(r"(?<=<!-- measured: summary -->\n).*?(?=<!-- end of summary -->)", flags=re.DOTALL)

Report = Mapping[str, Any]


def write() -> None:
    """Write the page, and the README's table, from the reports that are kept."""
    reports = read_reports()
    PAGE.write_text(rendered(reports, TEMPLATE.read_text(), NOTES.read_text()))
    README.write_text(with_summary(README.read_text(), reports))


def read_reports() -> list[Report]:
    """Return the reports of `benchmarks/results`, one for each processor and number of threads.

    Raises:
        ValueError: a file is no report.
    """
    return [read_json_object(path) for path in sorted(RESULTS.glob("*.json"))]


def rendered(reports: Sequence[Report], template: str, notes: str) -> str:
    """Return the page of some reports.

    Args:
        reports: as they are in the JSON.
        template: text with markers.
        notes: hand-written text under headings that are names of measurements.
    """
    parts = {
        "ratios": "\n\n".join(section(report) for report in reports),
        "targets": target_table([(title(report), _ratios(report)) for report in reports], titles(reports)),
        "notes": explanations(reports, read_notes(notes)),
        "leftout": left_out(reports),
    }
    return MARKER.sub(lambda match: parts[match["name"]], template)


def with_summary(readme: str, reports: Sequence[Report]) -> str:
    """Return the README with the table of the worst ratios of all reports in its place."""
    return SUMMARY.sub(lambda match: f"\n{summary(reports)}\n\n", readme)


def summary(reports: Sequence[Report]) -> str:
    """Return a table of the main measurements: of each ratio the worst, over all processors and numbers of threads."""
    named = titles(reports)
    worst: dict[tuple[str, str], float] = {}
    for one in (one for report in reports for one in _ratios(report)):
        worst[one.name, one.other] = max(worst.get((one.name, one.other), 0.0), one.median)
    shown = [other for other in named if any((name, other) in worst for name in MAIN)]
    rows = [
        [words, *(figure(worst[name, other]) if (name, other) in worst else "" for other in shown)]
        for name, words in MAIN.items()
    ]
    return table(["", *(named[other] for other in shown)], rows)


def title(report: Report) -> str:
    """Return the processor of a report and its number of threads, in words."""
    host = report["machine"]
    threads = "one thread" if host["threads"] == 1 else f"{host['threads']} threads"
    return f"{re.sub(r'[(](R|TM)[)]', '', host['cpu'])}, {threads}"


def section(report: Report) -> str:
    """Return the part of the page that is about one report."""
    return f"### {title(report)}\n\n{machine(report)}\n\n{ratio_tables(report)}"


def machine(report: Report) -> str:
    """Say where the run was made, and with what."""
    host, versions = report["machine"], report["versions"]
    own = versions.get(OURS, {})
    where = f"{host['cores']} cores, threads used: {host['threads']}"
    libraries = f"torch {host['torch']}, transformers {host['transformers']}, hooked_lm {own.get('hooked-lm', '?')}"
    lines = [f"Measured in {report['date']}: {where}, Python {host['python']}, {libraries}, float32."]
    if "kernels" in host:
        lines.append(
            "Matrix products of hooked_lm: " + "; ".join(f"{name}: {said}" for name, said in _kernels(host)) + "."
        )
    for name, library in ((THREE, "transformer_lens"), (FOUR, "transformer_lens"), (NNSIGHT, "nnsight")):
        if name in versions:
            found = versions[name]
            lines.append(
                f"`{library}` {found[library]} with torch {found['torch']}, transformers {found['transformers']}."
            )
    skipped = [name for name in PEERS if name not in versions]
    if skipped:
        lines.append(f"Not measured, since no environment was named for them: {', '.join(skipped)}.")
    text = "\n".join(lines)
    if report["rounds"] is None and not report["quick"]:
        return text
    warning = "**These figures are of a trial run with few rounds. They show the form of the page, and nothing else.**"
    return f"{warning}\n\n{text}"


def _kernels(host: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the classes of products, and what computes them."""
    said = host["kernels"]
    return [(name, said[name]) for name in said if name not in ("processor", "threads", "HOOKED_LM_KERNELS")]


def titles(reports: Sequence[Report]) -> dict[str, str]:
    """Return the contestants of all reports, and what to call them."""
    return {name: words for report in reports for name, words in columns(report).items()}


def columns(report: Report) -> dict[str, str]:
    """Return the contestants of a report, and what to call them."""
    versions = report["versions"]
    titles = {TRANSFORMERS: "`transformers`", MINIMAL: "minimal"}
    for name, kind in ((THREE, "`HookedTransformer`"), (FOUR, "Bridge")):
        found = versions.get(name, {}).get("transformer_lens", name.rpartition("-")[2])
        titles[name] = f"{kind} {'.'.join(found.split('.')[:2])}"
    return titles | {NNSIGHT: "`nnsight`"}


def ratio_tables(report: Report) -> str:
    """Return the tables of ratios, under a heading for each group of measurements."""
    named, text = columns(report), []
    for group, results in groupby(results_in(report), key=lambda result: result.group):
        rows = list(results)
        tables = [one for one in (ratio_table(rows, named), beside_table(rows, named)) if one]
        text.append("\n\n".join([f"#### {group}", *tables]))
    return "\n\n".join(text)


def explanations(reports: Sequence[Report], notes: Mapping[str, str]) -> str:
    """Return what is to be said about single measurements, those with a missed target first."""
    found = [one for report in reports for one in _ratios(report)]
    missed = list(dict.fromkeys(one.name for one in found if one.met is False))
    others = [name for name in notes if name not in missed and any(one.name == name for one in found)]
    text = [f"### Missed: {name}\n\n{notes.get(name, 'Not explained yet.')}" for name in missed]
    text += [f"### On {name}\n\n{notes[name]}" for name in others]
    return "\n\n".join(text) or "There is nothing to explain."


def left_out(reports: Sequence[Report]) -> str:
    """Say who was left out of what, though he has it."""
    lines = [
        f"- {title(report)}: {text}" for report in reports for result in results_in(report) for text in trouble(result)
    ]
    return "\n".join(["Left out of the comparison:", "", *lines]) if lines else "No library was left out for that."


def read_notes(text: str) -> dict[str, str]:
    """Return the notes by the measurements that they are about."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    return {name.strip(): note.strip() for name, note in zip(parts[::2], parts[1::2], strict=True)}


def _ratios(report: Report) -> list[Ratio]:
    return [one for result in results_in(report) for one in ratios(result)]
