"""Modules under the classic library's paths, whose names are looked up here when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib.machinery import ModuleSpec
from types import ModuleType

from hooked_lm.compat.table import COMMON, MISSING, MISSING_MODULES, MODULES, RENAMED

__all__ = ["ClassicModule", "UnknownNames", "find", "register_modules"]


_ABSENT = object()


class ClassicModule(ModuleType):
    """A module of the classic library: its names are those of this library's modules.

    Args:
        package: the package it is in, `transformer_lens` or `hooked_lm.compat`.
        path: its path below the package; "" for the package itself.
    """

    def __init__(self, package: str, path: str) -> None:
        name = f"{package}.{path}" if path else package
        super().__init__(name, f"The classic library's {path or 'package'}: names of {MODULES[path]} and others.")
        self._package, self._path = package, path
        self.__spec__ = ModuleSpec(name, None, is_package=True)
        # With a search path, `from module import name` asks the finders for a name that the module does not have.
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> object:
        if name == "__all__":
            return self._public_names()
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = find(self._package, self._path, name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._public_names()})

    def _public_names(self) -> list[str]:
        public: list[str] = importlib.import_module(MODULES[self._path]).__all__
        return [name for name in public if hasattr(self, name)]


def find(package: str, path: str, name: str) -> object:
    """Return what a name of a classic module stands for.

    A class goes before a module of the same name, as in `from transformer_lens import HookedTransformer`.

    Args:
        package: `transformer_lens` or `hooked_lm.compat`.
        path: the module's path below it.
        name: the name.

    Raises:
        AttributeError: there is no such thing here; the message says what to use.
    """
    here = RENAMED.get(name, name)
    if not _hint(name):
        for home in (MODULES[path], *COMMON):
            # Modules are found by their classic paths only.
            value = getattr(importlib.import_module(home), here, _ABSENT)
            if value is not _ABSENT and not isinstance(value, ModuleType):
                return value
        below = f"{path}.{name}" if path else name
        for known in (below, name):
            if known in MODULES:
                return sys.modules[f"{package}.{known}"]
    raise AttributeError(_replacement(package, path, name))


def _hint(name: str) -> str | None:
    """Return what replaces a name that this library does not have; None for other names."""
    return next((hint for pattern, hint in MISSING.items() if fnmatchcase(name, pattern)), None)


def _replacement(package: str, path: str, name: str) -> str:
    """Return a message on a name or module that this library does not have."""
    below = f"{path}.{name}" if path else name
    parts = below.split(".")
    folders = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
    hint = _hint(name) or next((MISSING_MODULES[folder] for folder in folders if folder in MISSING_MODULES), None)
    what = f"hooked_lm has no {package}.{below}"
    return f"{what}: {hint}" if hint else f"{what}; docs/migrating.md says what replaces classic names"


class UnknownNames:
    """A finder for `sys.meta_path` that says what replaces a module or name which this library does not have.

    The last of the finders, so that it is asked only for what no other finds. The import system also asks it in
    `from transformer_lens.utils import name`, for names that the module lacks.

    Args:
        package: `transformer_lens` or `hooked_lm.compat`.
    """

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Raise for a module below the package; others are left to other finders.

        Args:
            fullname: of the module.
            path, target: not used.

        Raises:
            ModuleNotFoundError: it is below the package.
        """
        if fullname.startswith(f"{self.package}."):
            below, _, name = fullname.removeprefix(f"{self.package}.").rpartition(".")
            raise ModuleNotFoundError(_replacement(self.package, below, name))


def register_modules(package: str) -> None:
    """Put the classic modules into `sys.modules`, under a package.

    Args:
        package: `transformer_lens`, or `hooked_lm.compat`, which is a module already.
    """
    for path in MODULES:
        module = ClassicModule(package, path)
        sys.modules.setdefault(module.__name__, module)
