"""`hooked-lm bench`: list, show and compare the records of a bench."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hooked_lm.cli.inputs import one_line_errors
from hooked_lm.cli.outputs import JsonPath, check_outputs, give_out

if TYPE_CHECKING:
    from hooked_lm.experiments import Bench

__all__ = ["app"]

app = typer.Typer(help="List, show and compare recorded experiments.", no_args_is_help=True, add_completion=False)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of the bench.")]
RECORD = "A record: NAME for the newest, NAME@2 for the second, or the first letters of its id."


@app.command("list")
def list_records(
    folder: Folder,
    name: Annotated[str | None, typer.Option(help="Only the records of this experiment.")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="Only so many, the newest.")] = None,
    json_path: JsonPath = None,
) -> None:
    """List the records: when, how long, arguments, the first numbers of the result."""
    with one_line_errors():
        check_outputs(json_path)
        bench = _opened(folder)
        found = bench.all() if name is None else bench.versions(name)
        rows = found.rows() if last is None else found.rows()[-last:]
        give_out(found.table(last) if rows else f"{folder} has no records.", {"records": rows}, json_path)


@app.command()
def show(
    folder: Folder,
    record: Annotated[str, typer.Argument(metavar="RECORD", help=RECORD)],
    source: Annotated[bool, typer.Option("--source", help="The source of the function too.")] = False,
    json_path: JsonPath = None,
) -> None:
    """Show a record: arguments, results, figures, circumstances."""
    with one_line_errors():
        check_outputs(json_path)
        found = _opened(folder).get(record)
        text = f"{found}\n  in {found.folder}"
        give_out(f"{text}\n\n{found.source}" if source else text, found.data, json_path)


@app.command()
def diff(
    folder: Folder,
    a: Annotated[str, typer.Argument(metavar="RECORD", help=RECORD)],
    b: Annotated[str, typer.Argument(metavar="RECORD", help=RECORD)],
    json_path: JsonPath = None,
) -> None:
    """Show what differs between two records: source, arguments, environment, results."""
    with one_line_errors():
        check_outputs(json_path)
        found = _opened(folder).diff(a, b)
        data = {"summary": found.summary, "source": list(found.source), "differences": found.rows()}
        give_out(str(found), data, json_path)


def _opened(folder: Path) -> Bench:
    from hooked_lm.experiments import Bench

    if not (folder / "bench.json").exists():
        raise ValueError(f"{folder} is no bench: Bench(folder) makes one with its first record")
    return Bench(folder)
