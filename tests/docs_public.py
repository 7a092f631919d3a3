"""What is public, and what a docstring has to say about it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
OURS = ("hooked_lm", "weight_conversion")

# Packages and modules that say what they offer.
WITH_ALL = ("hooked_lm", *(f"hooked_lm.{name}" for name in ("experiments", "patching", "plotting", "tasks", "utils")))


def documented() -> list[str]:
    """Return what the pages of the reference document, `module` or `module.Class` or `module.function`."""
    pages = sorted((ROOT / "docs/reference").glob("*.md"))
    return [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE)]


def found(path: str) -> Any:
    """Return what a dotted path names."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def is_ours(thing: Any) -> bool:
    """Whether a class or function comes from this project."""
    described = inspect.isclass(thing) or inspect.isfunction(thing)
    return described and thing.__module__.split(".")[0] in OURS


def members(module: ModuleType) -> dict[str, Any]:
    """Return the public classes and functions of a module: those in its `__all__`, or else those it defines."""
    if hasattr(module, "__all__"):
        named = {name: getattr(module, name) for name in module.__all__}
    else:
        named = {
            name: value
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
        }
    return {name: value for name, value in named.items() if is_ours(value)}


def public() -> dict[str, Any]:
    """Return every public class and function, by its path."""
    things: dict[str, Any] = {}
    for path in (*documented(), *WITH_ALL):
        thing = found(path)
        several = members(thing).values() if inspect.ismodule(thing) else [thing]
        things |= {f"{one.__module__}.{one.__qualname__}": one for one in several}
    return dict(sorted(things.items()))


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties of a class, those it inherits from classes of ours too.

    A method that says nothing about itself does what the method says that it overrides.
    """
    for name in dir(cls):
        if name.startswith("_"):
            continue
        homes = [base for base in cls.__mro__ if name in vars(base) and base.__module__.split(".")[0] in OURS]
        versions = [_function(vars(home)[name]) for home in homes]
        if versions and versions[0] is not None:
            yield name, next((version for version in versions if version and version.__doc__), versions[0])


def _function(member: Any) -> Any:
    """Return the function behind a method or property; None behind anything else."""
    if isinstance(member, property):
        return member.fget
    member = getattr(member, "__func__", member)
    return member if inspect.isfunction(member) else None


_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def faults(path: str, thing: Any) -> list[str]:
    """Return what is wrong with the docstrings of a class or function, and of a class's methods."""
    wrong = [f"{path}: {fault}" for fault in _faults_of_one(thing)]
    if inspect.isclass(thing):
        wrong += [f"{path}.{name}: {fault}" for name, method in methods(thing) for fault in _faults_of_one(method)]
    return wrong


def _faults_of_one(thing: Any) -> Iterator[str]:
    text = inspect.cleandoc(thing.__doc__ or "")
    # A dataclass without a docstring gets its signature for one.
    if not text or (inspect.isclass(thing) and text.startswith(f"{thing.__name__}(")):
        yield "no docstring"
        return
    if not text.splitlines()[0].endswith("."):
        yield f"the first line does not end with a period: {text.splitlines()[0]!r}"
    is_function, said = inspect.isfunction(thing), arguments(text)
    if is_function and raises(thing) and "\nRaises:\n" not in text:
        yield "it raises, and has no Raises"
    if said is None and not is_function:
        return
    parameters = inspect.signature(thing).parameters
    taken = [name for name in parameters if name not in ("self", "cls")]
    if said is None:
        # The rest, `*args` and `**kwargs`, is one thing with what takes it.
        if sum(parameters[name].kind not in _REST for name in taken) > 1:
            yield f"no Args, and it takes {', '.join(taken)}"
        return
    unknown = [name for name in said if name not in taken]
    missing = [name for name in taken if name not in said]
    if unknown:
        yield f"Args has {', '.join(unknown)}, which is no parameter"
    if missing:
        yield f"Args lacks {', '.join(missing)}"


def raises(function: Any) -> bool:
    """Whether a `raise` stands in the function itself, not in one defined in it."""
    nodes: list[ast.AST] = list(ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].body)  # type: ignore[attr-defined]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Raise):
            return True
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)
    return False


def arguments(docstring: str) -> list[str] | None:
    """Return the parameters that the `Args` of a docstring speaks of; None if it has no such section."""
    section = re.search(r"^Args:\n(?P<body>(?:(?:[ ]{4}.*)?\n?)*)", docstring, flags=re.MULTILINE)
    if section is None:
        return None
    entries = re.findall(r"^ {4}(?P<names>[\w*]+(?:, [\w*]+)*):", section["body"], flags=re.MULTILINE)
    return [name.lstrip("*") for names in entries for name in names.split(", ")]
