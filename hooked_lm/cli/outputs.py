"""Outputs of commands: text for the terminal, numbers as JSON, a page of figures. Files are written as a whole."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from hooked_lm._support.files import write_whole
from hooked_lm._support.plain_data import PlainData

__all__ = [
    "VIZ_REMEDY",
    "HtmlPath",
    "JsonPath",
    "check_outputs",
    "clipped",
    "columns_of",
    "footer",
    "give_out",
    "has_plotly",
    "shows_progress",
    "terminal_width",
    "text_table",
]

VIZ_REMEDY = "pip install 'hooked-lm[viz]'"

JsonPath = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Where to write the numbers as JSON; - shows them instead of the text."
    ),
]
HtmlPath = Annotated[Path | None, typer.Option("--html", metavar="PAGE", help="Where to write a page of figures.")]


# Files


def has_plotly() -> bool:
    """Return whether figures can be drawn."""
    return find_spec("plotly") is not None


def check_outputs(json_path: Path | None, html: Path | None = None) -> None:
    """Check, before any work is done, that the files can be written.

    Raises:
        ValueError: a page without plotly, or a path that cannot be written to.
    """
    if html is not None and not has_plotly():
        raise ValueError(f"--html needs plotly, which is not installed: {VIZ_REMEDY}")
    named = {"--json": json_path, "--html": html}
    for option, path in named.items():
        if path is None or str(path) == "-":
            if option == "--html" and path is not None:
                raise ValueError("--html takes the name of a file; only --json writes to standard output")
            continue
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            why = "it is a folder" if path.is_dir() else f"{folder} is no folder that can be written to"
            raise ValueError(f"{option} {path}: {why}")
    if json_path is not None and html is not None and json_path.absolute() == html.absolute():
        raise ValueError(f"--json and --html are both {html}: give each a name of its own")


def give_out(
    report: str, data: PlainData, json_path: Path | None, html: Path | None = None, page: Callable[[], str] = str
) -> None:
    """Print a report, and write the numbers and the page to the given paths.

    Args:
        report: for the terminal.
        data: the numbers; with `--json -` they are printed instead of the report.
        json_path, html: paths of the files; None writes no file.
        page: makes the page.
    """
    numbers = json.dumps(_finite(data), indent=2, allow_nan=False)
    drawn = None if html is None else page()
    to_stdout = json_path is not None and str(json_path) == "-"
    typer.echo(numbers if to_stdout else report)
    if json_path is not None and not to_stdout:
        write_whole(json_path, numbers + "\n")
        typer.echo(f"The numbers are in {json_path}.")
    if html is not None and drawn is not None:
        write_whole(html, drawn)
        typer.echo(f"The figures are in {html}: open it in a browser.", err=to_stdout)


def _finite(value: object) -> object:
    """Plain data with None, JSON's null, in place of NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value


def footer(about: str, command: str) -> str:
    """Return the last line of a page."""
    return f"{about}. Made by `hooked-lm {command}`. This page is one file and makes no network requests."


# The terminal


def shows_progress() -> bool:
    """Return whether progress bars are shown: where standard error is a terminal."""
    return sys.stderr.isatty()


def terminal_width() -> int:
    """Return how many columns there are; 100 where the output is no terminal."""
    return shutil.get_terminal_size((100, 24)).columns


def clipped(text: str, columns: int) -> str:
    """Return a text of at most so many columns, with an ellipsis where it is cut."""
    if columns_of(text) <= columns:
        return text
    kept = ""
    for letter in text:
        if columns_of(kept + letter) > columns - 1:
            break
        kept += letter
    return kept + "…"


def columns_of(text: str) -> int:
    """Return how many columns a text takes: two for a wide letter, none for a combining mark."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: bool = False) -> str:
    """Return a table that fits the terminal: columns for which there is no room come below, in a table of their own.

    Args:
        header: of the columns. The first column labels the rows, and is repeated in each part.
        rows: each with as many entries.
        left: align the columns to the left; the first one always is.
    """
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(columns_of(line[column]) for line in lines) for column in range(len(header))]
    parts: list[list[int]] = [[0]]
    for column in range(1, len(header)):
        taken = sum(widths[one] + 2 for one in parts[-1])
        if len(parts[-1]) > 1 and taken + widths[column] > terminal_width():
            parts.append([0])
        parts[-1].append(column)
    return "\n\n".join("\n".join(_line(line, part, widths, left) for line in lines) for part in parts)


def _line(line: Sequence[str], columns: Sequence[int], widths: Sequence[int], left: bool) -> str:
    entries = []
    for column in columns:
        space = " " * (widths[column] - columns_of(line[column]))
        entries.append(line[column] + space if left or column == 0 else space + line[column])
    return "  ".join(entries).rstrip()
