"""The command `hooked-lm`. Each command has a module of its own; `inputs` and `outputs` are what they share.

PyTorch takes seconds to import: the modules import it when a command runs, so that `--help` and `version` do without.
"""

from __future__ import annotations

import io
import sys

import typer

import hooked_lm
from hooked_lm.cli import demo, heads, info, lens, patch, verify

app = typer.Typer(
    help="Look inside language models.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


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


def main() -> None:
    """Run the command line."""
    # Tokens are of any script; a terminal that lacks a letter shows its number.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    app()
