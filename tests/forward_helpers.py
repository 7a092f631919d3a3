"""What the tests of forward passes share."""

from __future__ import annotations

import pytest
from torch import nn

EXACT = {"atol": 1e-10, "rtol": 0.0}


def poison(monkeypatch: pytest.MonkeyPatch, *modules: nn.Module) -> None:
    """Make a module fail when it runs."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("this was to be left out")

    for module in modules:
        monkeypatch.setattr(module, "forward", refuse)
