"""The stored outcomes, and what the scenarios give here, for the tests."""

from __future__ import annotations

import functools
import json
import re
import warnings

import pytest
import torch

from tests.classic import store
from tests.classic.known import LOOSE, as_named_here, compared
from tests.classic.library import Library
from tests.classic.scenario import scenarios

HERE = Library("hooked_lm")


@functools.cache
def stored(topic: str) -> dict[str, store.Flat]:
    """Return what the scenarios of a topic gave in the classic library, by name."""
    return store.read(topic)[0]


@functools.cache
def classic_shapes(config: str) -> dict[str, list[int]]:
    """Return the shapes of a config's parameters there."""
    found = stored("models")[f"models/parameters[{config}]"]
    return {path.removeprefix("shapes/"): json.loads(str(value)) for path, value in found.items()}


def here(name: str) -> store.Flat:
    """Return what a scenario gives in this library."""
    one = scenarios(name.split("/")[0])[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # What is cut or left out is said here, and not there.
        warnings.simplefilter("ignore", UserWarning)
        return store.flat(one.run(HERE, classic_shapes(one.config) if one.config else None))


def there(name: str) -> store.Flat:
    """Return what a scenario gave in the classic library, with this library's names of parameters."""
    return as_named_here(stored(name.split("/")[0])[name])


def assert_same(name: str) -> None:
    """Fail, with every difference, if a scenario gives other outcomes here than there, known differences apart."""
    tolerance = LOOSE.get(re.sub(r"\[.*", "", name), store.TOLERANCE)
    different = store.differences(compared(name, there(name)), compared(name, here(name)), tolerance)
    if different:
        shown = "\n".join(map(str, different[:12]))
        more = f"\n  and {len(different) - 12} more" if len(different) > 12 else ""
        pytest.fail(
            f"{name} differs from the classic library at {len(different)} places:\n{shown}{more}", pytrace=False
        )
