"""What a scenario is: code as notebooks have it, which returns by name what the two libraries are compared by."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.classic.library import Library

Outcome = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """One function of `scenarios/`, with one config.

    Attributes:
        name: `topic/function[config]`, or `topic/function` where there is no model.
        config: a config of `rules.CONFIGS`, or None.
        function: takes the library, and the model if there is a config; returns tensors, numbers, texts, lists and
            dicts of them by name.
        fields: fields of the config that are set otherwise.
    """

    name: str
    config: str | None
    function: Callable[..., Outcome]
    fields: dict[str, Any]

    def run(self, library: Library, shapes: dict[str, list[int]] | None = None) -> Outcome:
        """Return what the scenario gives in a library; `shapes` are the parameters' in the classic one."""
        if self.config is None:
            return self.function(library)
        return self.function(library, library.model(self.config, shapes, **self.fields))


_FOUND: dict[str, Scenario] = {}


def scenario(*configs: str, **fields: Any) -> Callable[[Callable[..., Outcome]], Callable[..., Outcome]]:
    """Register a function as a scenario with each of some configs, or without a model."""

    def register(function: Callable[..., Outcome]) -> Callable[..., Outcome]:
        base = f"{function.__module__.rsplit('.', 1)[-1]}/{function.__name__}"
        for config in configs or (None,):
            name = f"{base}[{config}]" if config else base
            assert name not in _FOUND, f"two scenarios are called {name}"
            _FOUND[name] = Scenario(name, config, function, fields)
        return function

    return register


def topics() -> list[str]:
    """Return the modules of `scenarios/`, by name."""
    return sorted(
        found.name for found in pkgutil.iter_modules(importlib.import_module("tests.classic.scenarios").__path__)
    )


def scenarios(topic: str) -> dict[str, Scenario]:
    """Return the scenarios of one topic, by name."""
    importlib.import_module(f"tests.classic.scenarios.{topic}")
    return {name: found for name, found in _FOUND.items() if name.startswith(f"{topic}/")}
