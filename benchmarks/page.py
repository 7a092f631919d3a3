"""The page of the documentation: `page.md` with its markers filled in from the results, and `notes.md` beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.measurements import FOUR, MINIMAL, NNSIGHT, OURS, THREE, TRANSFORMERS
from benchmarks.peers.process import PEERS
from benchmarks.report import Ratio, beside_table, ratio_table, ratios, results_in, target_table, trouble

HERE = Path(__file__).parent
TEMPLATE, NOTES = HERE / "page.md", HERE / "notes.md"
PAGE = HERE.parent / "docs" / "benchmarks.md"
MARKER = re.compile(r"^<!-- measured: (?P<name>[a-z]+) -->$", flags=re.MULTILINE)


def write(report: Mapping[str, Any]) -> None:
    """Write the page."""
    PAGE.write_text(rendered(report, TEMPLATE.read_text(), NOTES.read_text()))


def rendered(report: Mapping[str, Any], template: str, notes: str) -> str:
    """Return the page of a report.

    Args:
        report: as it is in the JSON.
        template: text with markers.
        notes: hand-written text under headings that are names of measurements.
    """
    parts = {
        "machine": machine(report),
        "ratios": ratio_tables(report),
        "targets": target_table(_ratios(report), columns(report)),
        "notes": explanations(report, read_notes(notes)),
        "leftout": left_out(report),
    }
    return MARKER.sub(lambda match: parts[match["name"]], template)


def machine(report: Mapping[str, Any]) -> str:
    """Say where the run was made, and with what."""
    host, versions = report["machine"], report["versions"]
    own = versions.get(OURS, {})
    lines = [
        f"Measured on {host['cpu']}, {host['cores']} cores, threads used: {host['threads']}, Python {host['python']}, "
        f"torch {host['torch']}, transformers {host['transformers']}, hooked_lm {own.get('hooked-lm', '?')}, float32."
    ]
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


def columns(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the contestants of a report, and what to call them."""
    versions = report["versions"]
    titles = {TRANSFORMERS: "`transformers`", MINIMAL: "minimal"}
    for name, kind in ((THREE, "`HookedTransformer`"), (FOUR, "Bridge")):
        found = versions.get(name, {}).get("transformer_lens", name.rpartition("-")[2])
        titles[name] = f"{kind} {'.'.join(found.split('.')[:2])}"
    return titles | {NNSIGHT: "`nnsight`"}


def ratio_tables(report: Mapping[str, Any]) -> str:
    """Return the tables of ratios, under a heading for each group of measurements."""
    named, text = columns(report), []
    for group, results in groupby(results_in(report), key=lambda result: result.group):
        rows = list(results)
        tables = [one for one in (ratio_table(rows, named), beside_table(rows, named)) if one]
        text.append("\n\n".join([f"### {group}", *tables]))
    return "\n\n".join(text)


def explanations(report: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    """Return what is to be said about single measurements, those with a missed target first."""
    found = _ratios(report)
    missed = list(dict.fromkeys(one.name for one in found if one.met is False))
    others = [name for name in notes if name not in missed and any(one.name == name for one in found)]
    text = [f"### Missed: {name}\n\n{notes.get(name, 'Not explained yet.')}" for name in missed]
    text += [f"### On {name}\n\n{notes[name]}" for name in others]
    return "\n\n".join(text) or "There is nothing to explain."


def left_out(report: Mapping[str, Any]) -> str:
    """Say who was left out of what, though he has it."""
    lines = [f"- {text}" for result in results_in(report) for text in trouble(result)]
    return "\n".join(["Left out of the comparison:", "", *lines]) if lines else "No library was left out for that."


def read_notes(text: str) -> dict[str, str]:
    """Return the notes by the measurements that they are about."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    return {name.strip(): note.strip() for name, note in zip(parts[::2], parts[1::2], strict=True)}


def _ratios(report: Mapping[str, Any]) -> list[Ratio]:
    return [one for result in results_in(report) for one in ratios(result)]
