"""Run a function and write down what went in, what came out, and under what circumstances."""

from __future__ import annotations

import inspect
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from hooked_lm._support.peak_memory import PeakMemory, peak_memory
from hooked_lm._support.plain_data import PlainData
from hooked_lm.experiments.bench.environment import RandomState, environment
from hooked_lm.experiments.bench.record import models_in
from hooked_lm.experiments.bench.rerun import KnownObjects
from hooked_lm.experiments.bench.source import FunctionSource, source_of
from hooked_lm.experiments.bench.store import FORMAT, RecordStore
from hooked_lm.experiments.bench.values import Packed, pack
from hooked_lm.experiments.bench.words import brief, flattened
from hooked_lm.tracing import Trace

if TYPE_CHECKING:
    from hooked_lm.plotting import Figure, HtmlFigure

__all__ = ["Recording", "Scope", "TraceContent", "bound_arguments", "current_scope", "summary"]

Returned = TypeVar("Returned")
# Numbers of a result that the index repeats.
_IN_INDEX = 6


class HasFigure(Protocol):
    """A result that draws itself."""

    def figure(self) -> Figure: ...


@dataclass
class Scope:
    """What happens within the run that is being recorded.

    Attributes:
        tools: the calls of tools.
        parts: the ids of records made within.
        notes: what a reader of the record should know.
        texts: texts to keep beside the result, such as a profile's table.
        figures: what draws a figure to keep beside the result, by name.
    """

    tools: list[PlainData] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    figures: dict[str, HasFigure] = field(default_factory=dict)


current_scope: ContextVar[Scope | None] = ContextVar("current_scope", default=None)


@dataclass(frozen=True)
class Recording:
    """How an experiment is recorded.

    Attributes:
        store: where to.
        name: of the experiment.
        seed: for the global generators; None leaves them alone.
        figures: draw the results that have a `figure` method.
        png: write figures as pictures too, where that can be done.
        known: the id of an object -> what stands for it in the record.
        objects: remembers models and functions among the arguments.
        state: of the random generators, to begin with; afterwards they are as before. None leaves them alone.
    """

    store: RecordStore
    name: str
    seed: int | None = None
    figures: bool = False
    png: bool = True
    known: Mapping[int, object] = field(default_factory=dict)
    objects: KnownObjects = field(default_factory=KnownObjects)
    state: RandomState | None = None

    def run(
        self,
        function: Callable[..., Returned],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] = MappingProxyType({}),
        *,
        trace: TraceContent | None = None,
    ) -> tuple[Returned, str]:
        """Run a function, record the run, and return the result and the record's id.

        An error of the function is recorded as well, and raised.

        Args:
            function: the experiment.
            args, kwargs: its arguments.
            trace: what is recorded of a trace in place of arguments and source.

        Raises:
            TypeError: the arguments do not fit the function.
            ValueError: the record cannot be written.
        """
        arguments = bound_arguments(function, args, kwargs) if trace is None else {"model": trace.model}
        packed = pack(arguments, "argument.", self.known)
        self.objects.add(packed.tree, arguments)
        source = source_of(function) if trace is None else trace.source
        scope, outer = Scope(), current_scope.get()
        if source.as_loaded is False:
            scope.notes.append("the file of the function was edited after it was loaded: the source is the newer one")
        started, error, result = datetime.now(UTC), None, None
        with RandomState.begun(self.state, self.seed):
            before = RandomState()
            token = current_scope.set(scope)
            try:
                with peak_memory() as memory:
                    begun = time.perf_counter()
                    try:
                        result = function(*args, **kwargs)
                    except Exception as raised:
                        error = raised
                    seconds = time.perf_counter() - begun
            finally:
                current_scope.reset(token)
            drawn = before.drawn_since()
        self._note_changed_models(arguments, packed, scope)
        made = _Made(result, error, scope, started, seconds, memory, before, drawn)
        id = self._write(function, packed, source, made, {} if trace is None else trace.files)
        if outer is not None:
            outer.parts.append(id)
        if error is not None:
            raise error
        return result, id  # type: ignore[return-value]

    def _note_changed_models(self, arguments: Mapping[str, object], packed: Packed, scope: Scope) -> None:
        """Note where a function has left a model other than it found it."""
        models = models_in(packed.tree)
        if not models:
            return
        after = models_in(pack(arguments, "", self.known).tree)
        for path, model in models.items():
            if path in after and (differences := model.differences(after[path])):
                scope.notes.append(f"the run changed {path}: {', '.join(differences)}")

    def _write(
        self,
        function: Callable[..., object],
        packed: Packed,
        source: FunctionSource,
        made: _Made,
        more_files: Mapping[str, bytes],
    ) -> str:
        values = {} if made.error is not None else {"result": made.result}
        if self.figures and callable(getattr(made.result, "figure", None)) and not made.error:
            values["figure"] = made.result.figure()  # type: ignore[attr-defined]
        if find_spec("plotly") is not None:
            values |= {name: one.figure() for name, one in made.scope.figures.items()}
        results = pack(values, "result.", self.known)
        if results.not_kept:
            warnings.warn(
                f"of the result of {self.name!r} only the text is kept at {', '.join(results.not_kept[:5])}: a record "
                "keeps numbers, texts, tensors, arrays, figures, and lists, dictionaries and dataclasses of them",
                stacklevel=4,
            )
        files: dict[str, Path | bytes] = {**more_files}
        for name, figure in results.figures.items():
            files |= _drawn(name, figure, self.png, made.scope.notes)
        random = made.random.tensors() if made.drawn else {}
        record: PlainData = {
            "format": FORMAT,
            "kind": "trace" if "trace.safetensors" in files else "function",
            "name": self.name,
            "function": {
                "name": getattr(inspect.unwrap(function), "__qualname__", type(function).__qualname__),
                "module": getattr(inspect.unwrap(function), "__module__", ""),
                "sha256": source.hash,
                "names": source.names,
                "as_loaded": source.as_loaded,
            },
            "arguments": packed.tree,
            "results": results.tree,
            "not_kept": results.not_kept,
            "random": {"seed": self.seed, "drawn": made.drawn},
            **made.as_data(),
            "summary": summary(packed.tree, results.tree),
        }
        return self.store.write(record, source.text, {**packed.tensors, **results.tensors, **random}, files)


@dataclass(frozen=True)
class TraceContent:
    """What is recorded of a trace.

    Attributes:
        model: on which it runs.
        source: its hash, in the place of a function's.
        files: the trace itself.
    """

    model: object
    source: FunctionSource
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, trace: Trace, model: object) -> TraceContent:
        """Return what is recorded of a trace.

        Args:
            trace: that has not run yet.
            model: on which it will.

        Raises:
            TraceError: it has a metric that is a function of this process, which no file can hold.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.safetensors"
            trace.save(path)
            content = path.read_bytes()
        text = f"# The trace {trace.hash}.\n# Read it with hooked_lm.tracing.load(record.trace_file(), model).\n"
        return cls(model, FunctionSource(text, trace.hash, {}, None), {"trace.safetensors": content})


@dataclass
class _Made:
    """A run that has ended."""

    result: object
    error: Exception | None
    scope: Scope
    started: datetime
    seconds: float
    memory: PeakMemory
    random: RandomState
    drawn: list[str]

    def as_data(self) -> PlainData:
        text = "" if self.error is not None else _table_of(self.result)
        return {
            "environment": environment(),
            "started": self.started.isoformat(timespec="milliseconds"),
            "seconds": self.seconds,
            "memory": vars(self.memory),
            "error": None if self.error is None else _error(self.error),
            "tools": self.scope.tools,
            "parts": self.scope.parts,
            "notes": self.scope.notes,
            "text": "\n\n".join([*([text] if text else []), *self.scope.texts]),
        }


def bound_arguments(
    function: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> dict[str, object]:
    """Return all arguments of a call by name, defaults included.

    Args:
        function: what is called.
        args, kwargs: the arguments.

    Raises:
        TypeError: they do not fit.
    """
    called: object = function
    while isinstance(called, partial):
        outer = cast("partial[object]", called)
        called, args, kwargs = outer.func, (*outer.args, *args), {**outer.keywords, **kwargs}
    bound = inspect.signature(cast(Callable[..., object], called)).bind(*args, **kwargs)
    bound.apply_defaults()
    found: dict[str, object] = {}
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        else:
            found[name] = value
    return found


def summary(arguments: PlainData, results: PlainData) -> PlainData:
    """Return what the index repeats of a record: arguments in short, and the first numbers of the result.

    Args:
        arguments, results: packed.
    """
    leaves = flattened(results.get("result"))
    numbers = {path or "result": value for path, value in leaves.items() if _is_finite_number(value)}
    return {
        "arguments": {name: brief(value, 32) for name, value in list(arguments.items())[:8]},
        "results": dict(list(numbers.items())[:_IN_INDEX]),
    }


def _is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < float("inf")


def _table_of(result: object) -> str:
    """The text of a result that makes a table of itself."""
    made = getattr(result, "table", None)
    if not callable(made):
        return ""
    try:
        text = made()
    except TypeError:  # a table that needs arguments
        return ""
    return text if isinstance(text, str) else ""


def _error(error: Exception) -> PlainData:
    lines = traceback.format_exception(error)
    return {"class": type(error).__name__, "message": str(error), "traceback": "".join(lines)[-20_000:]}


def _drawn(name: str, figure: Figure | HtmlFigure, png: bool, notes: list[str]) -> dict[str, Path | bytes]:
    """The files of a figure: its page, and a picture of it where that can be made."""
    files: dict[str, Path | bytes] = {f"figures/{name}.html": figure.html().encode()}
    if png:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "figure.png"
            try:
                figure.save(path)
                files[f"figures/{name}.png"] = path.read_bytes()
            except (ImportError, RuntimeError) as error:
                notes.append(f"figure {name} has no picture: {str(error).splitlines()[0]}")
    return files
