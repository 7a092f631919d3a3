"""The breakages that the suite is tried with can still be made, and the script says when one cannot."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from scripts import break_on_purpose
from scripts.break_on_purpose import ROOT
from scripts.breakages import BREAKAGES, AnchorError, Breakage

HALF = Breakage("half", "a.py", r"(\w+) / 2", r"\1 / 3", ("test_a.py",))


def test_every_breakage_finds_its_code_and_leaves_a_module_that_parses() -> None:
    lost = []
    for breakage in BREAKAGES:
        try:
            ast.parse(breakage.applied((ROOT / breakage.file).read_text()))
        except AnchorError as error:
            lost.append(str(error))
    assert lost == []


def test_every_breakage_has_a_name_of_its_own_and_tests_that_are_there() -> None:
    assert len({breakage.name for breakage in BREAKAGES}) == len(BREAKAGES) >= 20
    files = {name for breakage in BREAKAGES for name in breakage.tests if name.endswith(".py")}
    assert [name for name in files if not (ROOT / "tests" / name).exists()] == []


def test_a_breakage_changes_the_one_place_it_is_about() -> None:
    assert HALF.applied("a = x / 2\nb = x / 4\n") == "a = x / 3\nb = x / 4\n"


@pytest.mark.parametrize(("source", "places"), [("a = x / 4", "no places"), ("a = x / 2 + y / 2", "2 places")])
def test_code_that_has_moved_is_an_error_that_names_breakage_and_file(source: str, places: str) -> None:
    with pytest.raises(AnchorError, match=rf"half: a\.py has {places} like .* an anchor that is found once"):
        HALF.applied(source)


def test_a_breakage_that_breaks_nothing_is_an_error() -> None:
    with pytest.raises(AnchorError, match="changes nothing"):
        replace(HALF, broken=r"\1 / 2").applied("a = x / 2")


def test_a_breakage_that_no_test_notices_fails_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {BREAKAGES[0].name: ["test_a.py::test_one"], BREAKAGES[1].name: []}
    monkeypatch.setattr(break_on_purpose, "noticed_by", lambda breakage, everything: found[breakage.name])
    run = CliRunner().invoke(break_on_purpose.app, ["--no-control", *found])
    assert run.exit_code == 1
    assert f"{BREAKAGES[0].name}: noticed by\n  test_a.py::test_one" in run.output
    assert f"{BREAKAGES[1].name}: NOT NOTICED" in run.output
    assert "1 of 2 were noticed" in run.output
    assert CliRunner().invoke(break_on_purpose.app, ["--no-control", BREAKAGES[0].name]).exit_code == 0


def test_a_name_that_no_breakage_has_is_refused() -> None:
    run = CliRunner().invoke(break_on_purpose.app, ["no-such-thing"])
    assert run.exit_code == 2
    assert "no breakage is named no-such-thing" in run.output
