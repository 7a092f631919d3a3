"""The command `hooked-lm`. Each command has a module of its own; `inputs` and `outputs` are shared by all.

PyTorch takes seconds to import: the modules import it when a command runs, so that `--help` and `version` do without.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

import hooked_lm
from hooked_lm.cli import bench, demo, explore, heads, info, lens, patch, serve, verify

__all__ = ["app", "hooked_lm_command", "main", "version"]

app = typer.Typer(
    help="Look inside language models.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(hooked_lm.__version__)
        raise typer.Exit


@app.callback()
def hooked_lm_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Look inside language models."""


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(hooked_lm.__version__)


app.command()(demo.demo)
app.command()(info.info)
app.command()(lens.lens)
app.command()(heads.heads)
app.command()(patch.patch)
app.command()(verify.verify)
app.command()(serve.serve)
app.command()(explore.explore)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run the command line."""
    # Tokens may contain any script; letters that the terminal's encoding lacks are shown as their numbers.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    app()
