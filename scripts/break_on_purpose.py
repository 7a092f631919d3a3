"""Break the library on purpose, one small fault at a time, and see whether the tests notice.

`python -m scripts.break_on_purpose` makes each fault of `scripts.breakages` in a copy of the working tree and runs the
tests that should fail there. It lists those that do, and exits with 1 where none does: then a test is missing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from scripts.breakages import BREAKAGES, LIBRARY, Breakage

ROOT = Path(__file__).parents[1]
TESTS_FAILED, ALL_PASSED = 1, 0

app = typer.Typer(add_completion=False)


def copy_of_the_tree(folder: Path) -> Path:
    """Copy what git tracks or would add into a folder, and return the folder."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def failing(folder: Path, tests: tuple[str, ...]) -> list[str]:
    """Return the first few tests that fail in a copy of the tree; none if all pass.

    Raises:
        RuntimeError: they could not be run.
    """
    files = [f"tests/{name}" if name.endswith(".py") else name for name in tests]
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=3", "-p", "no:cacheprovider", "--tb=no", *files]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode == ALL_PASSED:
        return []
    failed = re.findall(r"^FAILED (?:tests/)?(.+?)(?: - .*)?$", done.stdout, flags=re.MULTILINE)
    if done.returncode != TESTS_FAILED or not failed:
        raise RuntimeError(f"the tests do not run: {' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return failed


def check_copy(folder: Path) -> None:
    """Check that the tests of a copy are tests of the copy.

    Raises:
        RuntimeError: they would import the library from elsewhere.
    """
    code = f"import {LIBRARY}; print({LIBRARY}.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    if not Path(found.stdout.strip()).is_relative_to(folder):
        raise RuntimeError(f"the tests in {folder} would import {found.stdout.strip()}")


def noticed_by(breakage: Breakage, everything: bool) -> list[str]:
    """Return the first few tests that fail when something is broken, those that should first."""
    with tempfile.TemporaryDirectory(prefix="broken-") as temporary:
        folder = copy_of_the_tree(Path(temporary).resolve())
        check_copy(folder)
        path = folder / breakage.file
        path.write_text(breakage.applied(path.read_text()))
        return failing(folder, breakage.tests) or (failing(folder, ()) if everything else [])


def tried(breakage: Breakage, everything: bool) -> tuple[list[str], str]:
    """Return which tests notice a breakage, and what to say if none does."""
    try:
        return noticed_by(breakage, everything), "NOT NOTICED"
    except RuntimeError as error:
        return [], f"NOT TRIED: {error}"


@app.command()
def main(
    names: Annotated[list[str] | None, typer.Argument(help="Breakages to try; all of them by default.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Name the breakages and stop.")] = False,
    control: Annotated[bool, typer.Option(help="First see that the same tests pass when nothing is broken.")] = True,
    everything: Annotated[bool, typer.Option(help="Run all tests where those that should notice do not.")] = False,
    at_once: Annotated[int, typer.Option(min=1, help="How many are tried at the same time.")] = 2,
) -> None:
    """Break the library, one fault at a time, and list which tests notice."""
    by_name = {breakage.name: breakage for breakage in BREAKAGES}
    unknown = sorted(set(names or ()) - set(by_name))
    if unknown:
        raise typer.BadParameter(f"no breakage is named {', '.join(unknown)}; --list names them")
    chosen = [by_name[name] for name in names] if names else list(BREAKAGES)
    for breakage in chosen:
        breakage.applied((ROOT / breakage.file).read_text())
        if show:
            print(f"{breakage.name}  ({breakage.file})")
    if show:
        return
    with ThreadPoolExecutor(at_once) as pool:
        if control:
            with tempfile.TemporaryDirectory(prefix="whole-") as temporary:
                whole = copy_of_the_tree(Path(temporary).resolve())
                check_copy(whole)
                groups = sorted({breakage.tests for breakage in chosen})
                failed = [test for tests in pool.map(lambda group: failing(whole, group), groups) for test in tests]
            if failed:
                print("these fail when nothing is broken:", *failed, sep="\n  ")
                raise typer.Exit(1)
        missed = 0
        for breakage, (found, trouble) in zip(
            chosen, pool.map(lambda one: tried(one, everything), chosen), strict=True
        ):
            missed += not found
            print(f"{breakage.name}: {'noticed by' if found else trouble}", *found, sep="\n  ", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} were noticed")
    if missed:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
