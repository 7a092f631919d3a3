"""What the tests of the server and its client start from: a folder with a small model."""

from __future__ import annotations

from pathlib import Path

import pytest

from hooked_lm import HookedTransformer
from tests.remote_helpers import saved_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def model(folder: Path) -> HookedTransformer:
    """Saved in the folder, under `model`."""
    return saved_model(folder / "model")
