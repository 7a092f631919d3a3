"""`hooked-lm verify`: the parity certificate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import hooked_lm
from hooked_lm.cli.inputs import IgnoredFields, Revision

__all__ = ["verify"]


def verify(
    path: Annotated[str, typer.Argument(help="A folder in HuggingFace's format, an alias, or a hub id.")],
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write the report as JSON.")] = None,
    positions: Annotated[int | None, typer.Option(min=1, help="Tokens in a prompt; 64 by default.")] = None,
    revision: Revision = None,
    ignored: IgnoredFields = None,
    float64: Annotated[bool, typer.Option(help="Compare in float64 too, which takes twice the memory.")] = True,
) -> None:
    """Compare a model with that of transformers, site by site. Exit code 1 if they differ, 2 if it cannot be loaded."""
    try:
        certificate = hooked_lm.verify(
            path, positions=positions, revision=revision, float64=float64, ignore_config_fields=ignored or ()
        )
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    typer.echo(str(certificate))
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        certificate.save(json_path)
        typer.echo(f"The report is in {json_path}.")
    raise typer.Exit(0 if certificate.passed else 1)
