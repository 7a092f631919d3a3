"""Tools of a bench: functions under one name, which an experiment gets as an argument and whose calls are recorded."""

from __future__ import annotations

import functools
import importlib
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType

from hooked_lm.experiments.bench.recording import current_scope

__all__ = ["READY", "Tool", "Tools", "ready_tool", "with_tools"]

# The ready tools: what each is for, and the modules whose public functions it has.
READY: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "ablation": ("what a model does without a head, an MLP or a neuron", ("hooked_lm.patching.ablation",)),
    "attribution": (
        "which parts add to a logit, and gradients in place of patching",
        ("hooked_lm.circuits.direct_logit", "hooked_lm.patching.attribution"),
    ),
    "comparison": ("two models side by side", ("hooked_lm.comparison",)),
    "composition": ("which heads read what others write", ("hooked_lm.circuits.composition",)),
    "datasets": ("activations of many prompts on disk", ("hooked_lm.datasets",)),
    "examples": ("the tokens on which a unit is most active", ("hooked_lm.examples",)),
    "fourier": ("models that do modular arithmetic", ("hooked_lm.fourier",)),
    "heads": (
        "what heads attend to: induction, previous token and the like",
        ("hooked_lm.circuits.heads", "hooked_lm.circuits.induction"),
    ),
    "hypotheses": ("is an effect there, and how large is it", ("hooked_lm.hypotheses",)),
    "lens": ("tokens read from the residual stream", ("hooked_lm.circuits.logit_lens",)),
    "patching": ("which activations carry an answer", ("hooked_lm.patching",)),
    "patchscopes": ("hidden states read by the model itself", ("hooked_lm.patchscopes",)),
    "plots": ("figures", ("hooked_lm.plotting",)),
    "probing": ("what can be read from an activation", ("hooked_lm.probing",)),
    "profiling": ("where time and memory go", ("hooked_lm.profiling",)),
    "routes": (
        "the routes by which information reaches a prediction; heads that read or write a direction",
        ("hooked_lm.circuits.routes", "hooked_lm.circuits.directions"),
    ),
    "sparsity": ("how often units are active, and dead units", ("hooked_lm.sparsity",)),
    "steering": ("directions that change what a model says", ("hooked_lm.circuits.steering",)),
    "surgery": ("models with other layers or merged heads", ("hooked_lm.surgery", "hooked_lm.weights.surgery")),
    "svd": ("singular vectors of weights in tokens", ("hooked_lm.circuits.svd",)),
    "tasks": ("prompts with known answers", ("hooked_lm.tasks",)),
}


@dataclass(frozen=True, eq=False)
class Tool:
    """Functions under one name: `tool.function(...)`. Calls within a recorded run are noted in its record.

    Attributes:
        name: of the tool.
        about: what it is for.
        parts: its functions, classes and values, by name.
    """

    name: str
    about: str
    parts: Mapping[str, object]

    def __getattr__(self, name: str) -> object:
        if name.startswith("_") or name not in self.parts:
            raise AttributeError(f"the tool {self.name!r} has no {name!r}: it has {', '.join(self.parts)}")
        return _noted(self.name, name, self.parts[name])

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Call the tool's only function.

        Raises:
            TypeError: it has several.
        """
        if len(self.parts) != 1:
            raise TypeError(f"the tool {self.name!r} has several functions: {', '.join(self.parts)}")
        [(name, part)] = self.parts.items()
        return _noted(self.name, name, part)(*args, **kwargs)  # type: ignore[operator]

    def __dir__(self) -> list[str]:
        return [*self.parts, "about", "name", "parts"]

    def __repr__(self) -> str:
        return f"Tool({self.name!r}: {self.about}; {', '.join(self.parts)})"

    @classmethod
    def of(cls, name: str, given: object, about: str = "") -> Tool:
        """Return a tool made of a function, a module, or an object with methods.

        Args:
            name: of the tool.
            given: a function; a module, of which the public names count; or any object.
            about: what it is for; by default the first line of its docstring.

        Raises:
            ValueError: there is nothing in it that can be called.
        """
        if isinstance(given, Tool):
            return cls(name, about or given.about, given.parts)
        line = about or (inspect.getdoc(given) or "").partition("\n")[0]
        if isinstance(given, ModuleType):
            names = getattr(given, "__all__", None) or [one for one in vars(given) if one[:1] != "_"]
            parts = {one: getattr(given, one) for one in names}
        elif callable(given):
            return cls(name, line, {getattr(given, "__name__", name): given})
        else:
            parts = {one: getattr(given, one) for one in dir(given) if one[:1] != "_"}
        parts = {one: part for one, part in parts.items() if not isinstance(part, ModuleType)}
        if not any(callable(part) for part in parts.values()):
            raise ValueError(f"a tool is a function, a module or an object with methods; got {given!r}")
        return cls(name, line, parts)


def ready_tool(name: str) -> Tool:
    """Return a tool that comes with the package.

    Args:
        name: one of `READY`.

    Raises:
        ImportError: it needs an extra that is not installed.
    """
    about, modules = READY[name]
    parts: dict[str, object] = {}
    for module in map(importlib.import_module, modules):
        parts |= Tool.of(name, module).parts
    return Tool(name, about, parts)


def _noted(tool: str, name: str, part: object) -> object:
    """A function whose calls are noted in the record of the run around it; a class or a value as it is."""
    if not callable(part) or isinstance(part, type):
        return part

    @functools.wraps(part)
    def call(*args: object, **kwargs: object) -> object:
        begun = time.perf_counter()
        try:
            return part(*args, **kwargs)
        finally:
            scope = current_scope.get()
            if scope is not None:
                scope.tools.append({"tool": tool, "function": name, "seconds": time.perf_counter() - begun})

    return call


class Tools(Mapping[str, Tool]):
    """The tools of a bench by name: the ready ones, and those that were added."""

    def __init__(self) -> None:
        self._own: dict[str, Tool] = {}
        self._ready: dict[str, Tool] = {}

    def add(self, tool: Tool) -> None:
        """Add a tool.

        Args:
            tool: of a name that is free.

        Raises:
            ValueError: there is another tool of the name, or it is no name of Python's.
        """
        if not tool.name.isidentifier():
            raise ValueError(f"a tool's name is that of an argument, and {tool.name!r} is none")
        if tool.name in READY:
            raise ValueError(f"{tool.name!r} is a ready tool: give yours another name")
        self._own[tool.name] = tool

    def __getitem__(self, name: str) -> Tool:
        if name in self._own:
            return self._own[name]
        if name not in READY:
            raise ValueError(f"there is no tool {name!r}: there are {', '.join(self)}")
        if name not in self._ready:
            self._ready[name] = ready_tool(name)
        return self._ready[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*READY, *self._own])

    def __len__(self) -> int:
        return len(READY) + len(self._own)

    @property
    def loaded(self) -> list[Tool]:
        """The tools that have been asked for or added."""
        return [*self._ready.values(), *self._own.values()]

    def table(self) -> str:
        """Return the tools' names and what each is for."""
        width = max(map(len, self))
        return "\n".join(f"{name:<{width}}  {READY[name][0] if name in READY else self[name].about}" for name in self)

    def __str__(self) -> str:
        return self.table()


def with_tools(function: Callable[..., object], tools: Mapping[str, Tool]) -> Callable[..., object]:
    """Return a function that gets tools as arguments.

    Args:
        function: with a parameter of each tool's name.
        tools: by name.

    Raises:
        ValueError: it has no such parameter.
    """
    signature = inspect.signature(function)
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in signature.parameters.values())
    missing = [name for name in tools if name not in signature.parameters and not takes_any]
    if missing:
        raise ValueError(
            f"{getattr(function, '__qualname__', function)} gets the tool {missing[0]!r} as an argument, and has no "
            f"parameter of that name: write def {getattr(function, '__name__', 'function')}(..., {missing[0]})"
        )

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        return function(*args, **{**tools, **kwargs})

    kept = [one for name, one in signature.parameters.items() if name not in tools]
    call.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return call
