"""Observing never changes a run of the other architectures either; see test_observing.py."""

from __future__ import annotations

import pytest

from tests.observing_helpers import (
    ARCHITECTURES,
    edits_that_caching_disturbs,
    edits_that_observers_disturb,
)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "GPT-2"])
def test_observing_any_site_changes_nothing_of_an_edit_at_any_other(architecture: str) -> None:
    assert not edits_that_observers_disturb(architecture)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "GPT-2"])
def test_caching_everything_with_gradients_changes_nothing_of_an_edit(architecture: str) -> None:
    assert not edits_that_caching_disturbs(architecture)
