"""The page of supported families says what the registry, the rows and the certificates say."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from scripts.certify_families import FIGURES, TABLE, certify, family_table
from tests.family_rows import ROWS
from tests.family_rows.newer import NEWER_FAMILIES
from weight_conversion.registry import FAMILIES, family_of


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FIGURES.read_text())
    return content


def test_every_family_has_a_row_and_every_row_another_name() -> None:
    covered = {family_of(row.architecture).name for row in ROWS} | set(NEWER_FAMILIES)
    assert covered == {family.name for family in FAMILIES}
    assert len({row.id for row in ROWS}) == len(ROWS)


def test_the_figures_are_those_of_the_rows_there_are(figures: dict[str, Any]) -> None:
    assert [row["row"] for row in figures["rows"]] == [row.id for row in ROWS]
    assert all(row["passed"] for row in figures["rows"])


def test_a_certificate_made_now_has_the_sites_and_the_order_of_error_that_the_page_shows(
    figures: dict[str, Any],
) -> None:
    now, then = certify(ROWS[0]), figures["rows"][0]
    assert (now["sites"], now["passed"], now["exact_in_float64"]) == (
        then["sites"],
        then["passed"],
        then["exact_in_float64"],
    )
    assert now["worst"]["float32"]["activations"] < 10 * then["worst"]["float32"]["activations"] < 1e-5


def test_the_page_is_what_the_script_writes(figures: dict[str, Any]) -> None:
    assert TABLE.read_text() == family_table(figures)


def test_the_page_names_every_architecture(figures: dict[str, Any]) -> None:
    named = set(re.findall(r"`(\w+)`", TABLE.read_text()))
    assert {architecture for family in FAMILIES for architecture in family.architectures} <= named
