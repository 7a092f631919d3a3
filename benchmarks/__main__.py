"""`python -m benchmarks`: everything that is measured, in one run, beside other libraries."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from tqdm import tqdm

from benchmarks import page
from benchmarks.machine import device_name, machine
from benchmarks.measurements import FULL, QUICK, Measurement, plan
from benchmarks.peers.process import PEERS, interpreter_of
from benchmarks.report import line, trouble
from benchmarks.runner import Result, Where, as_json, run_all
from hooked_lm.components.kernels import processor_vendor

# Files of results are named after the processor's vendor.
VENDORS = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}
USUAL_THREADS = 2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=PYTHON: another library and the interpreter of its environment. "
            f"NAME is one of {', '.join(PEERS)}. Whoever is not named is skipped."
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A measurement's name, or a pattern such as 'forward*'; may be repeated.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One round of everything, on toy sizes: does it run?")] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="At most this many rounds of each measurement.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of every contestant.")] = USUAL_THREADS,
    device: Annotated[
        str,
        typer.Option(
            help="Where everybody computes: 'cpu', or an accelerator, on which it is all done in two precisions."
        ),
    ] = "cpu",
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="The precision: by default float32, on an accelerator bfloat16 too; may be repeated."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Where results go. A whole run by default goes to benchmarks/results, by vendor."),
    ] = None,
    write_page: Annotated[
        bool, typer.Option("--page", help="Write docs/benchmarks.md from all results there are.")
    ] = False,
    render: Annotated[
        bool,
        typer.Option(
            "--render",
            help="Measure nothing: write docs/benchmarks.md and the README's table from the results there are.",
        ),
    ] = False,
    names: Annotated[bool, typer.Option("--list", help="Measure nothing: list the measurements.")] = False,
) -> None:
    """Measure this library beside others: every contestant in a process of its own, in turn, on the same weights."""
    scale = QUICK if quick else FULL
    measurements = [_limited(one, rounds) for one in _chosen(plan(scale, device), only)]
    if names:
        for one in measurements:
            typer.echo(one.name)
        return
    if render:
        try:
            page.write()
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--render") from error
        return
    precisions = dtype or (["float32"] if device == "cpu" else ["float32", "bfloat16"])
    partial = quick or only is not None or rounds is not None or device != "cpu" or precisions != ["float32"]
    if write_page and partial:
        raise typer.BadParameter(
            "the page shows whole runs on a CPU: leave out --only, --quick, --rounds, --device and --dtype",
            param_hint="--page",
        )
    try:
        interpreters = dict(map(interpreter_of, peer or []))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--peer") from error
    for name in (one for one in PEERS if one not in interpreters):
        typer.echo(f"{name}: skipped, for want of --peer {name}=PYTHON")
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    results: list[Result] = []
    total = len(precisions) * sum(one.rounds for one in measurements)
    with tqdm(total=total, unit="round", disable=None) as bar:

        def done(result: Result) -> None:
            with bar.external_write_mode():
                typer.echo(line(result))

        for precision in precisions:
            named = [_in_precision(one, precision) for one in measurements]
            where = Where(device, precision)
            found, versions = run_all(named, scale.models(), interpreters, threads, bar.update, done, where)
            results += found
    report = {
        "date": f"{datetime.now(UTC):%Y-%m}",
        "rounds": rounds,
        "quick": quick,
        "machine": {**machine(threads), "device": device_name(device)},
        "versions": versions,
        "results": as_json(results),
    }
    target = json_file or (None if partial else _usual_file(threads))
    if target is not None:
        target.write_text(json.dumps(report, indent=2) + "\n")
    if write_page:
        page.write()
    troubles = [text for result in results for text in trouble(result)]
    if troubles:
        typer.echo("\n".join(["left out of the comparison:", *troubles]), err=True)
        raise typer.Exit(1)


def _usual_file(threads: int) -> Path:
    name = VENDORS.get(processor_vendor(), "other")
    return page.RESULTS / f"{name if threads == USUAL_THREADS else f'{name}-{threads}-threads'}.json"


def _chosen(measurements: list[Measurement], patterns: list[str] | None) -> list[Measurement]:
    """Return the measurements that one of the patterns fits; all if there are none."""
    if patterns is None:
        return measurements
    for pattern in patterns:
        if not any(fnmatchcase(one.name, pattern) for one in measurements):
            known = "; ".join(one.name for one in measurements)
            raise typer.BadParameter(f"no measurement {pattern!r}: there are {known}", param_hint="--only")
    return [one for one in measurements if any(fnmatchcase(one.name, pattern) for pattern in patterns)]


def _in_precision(measurement: Measurement, precision: str) -> Measurement:
    return measurement if precision == "float32" else replace(measurement, name=f"{measurement.name}, {precision}")


def _limited(measurement: Measurement, rounds: int | None) -> Measurement:
    return measurement if rounds is None else replace(measurement, rounds=min(rounds, measurement.rounds))


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
