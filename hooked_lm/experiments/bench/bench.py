"""Bench: a folder in which experiments are recorded, listed, compared and run again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import ParamSpec, TypeVar, cast, overload

from hooked_lm._support.integers import integer, is_integer
from hooked_lm.experiments.bench.diff import RecordDiff, diff_records
from hooked_lm.experiments.bench.listing import Versions
from hooked_lm.experiments.bench.record import Record
from hooked_lm.experiments.bench.recording import Recording, TraceContent, current_scope
from hooked_lm.experiments.bench.rerun import KnownObjects, Rerun, arguments_again
from hooked_lm.experiments.bench.store import RecordEntry, RecordStore
from hooked_lm.experiments.bench.tools import Tool, Tools, with_tools
from hooked_lm.hypotheses import EffectTest, controlled_test, effect_test
from hooked_lm.profiling import profile_call
from hooked_lm.remote import RemoteModel
from hooked_lm.tracing import Trace, load
from hooked_lm.tracing.methods import Tracing
from hooked_lm.utils import ArrayLike

__all__ = ["Bench"]

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


class Bench:
    """A folder of experiments: each run is recorded with its code, arguments, model, seeds, environment and results.

        bench = Bench("experiments")

        @bench.record
        def attention_to_bos(model, prompts):
            ...

        attention_to_bos(model, prompts)
        print(bench.versions("attention_to_bos"))

    Several processes may record in one folder at once. A record is written whole or not at all.

    Args:
        folder: of the bench; it is made with the first record.
        png: write figures as pictures beside their pages, where kaleido and a browser are installed.

    Attributes:
        folder: of the bench.
        tools: by name: the ready ones and those added. `print(bench.tools)` says what each is for.

    Raises:
        ValueError: the folder holds something else, or records of a newer format.
    """

    def __init__(self, folder: str | Path, *, png: bool = True) -> None:
        self._store = RecordStore(folder)
        self.folder = self._store.folder
        self.tools = Tools()
        self._png = png
        self._functions: dict[str, tuple[Callable[..., object], Recording]] = {}
        self._known = KnownObjects()

    def __repr__(self) -> str:
        return f"Bench({str(self.folder)!r}, {len(self)} records of {len(self.names)} experiments)"

    # Recording

    @overload
    def record(self, function: Callable[Parameters, Returned], /) -> Callable[Parameters, Returned]: ...

    @overload
    def record(
        self, function: None = None, /, *, name: str | None = None, seed: int | None = None, figures: bool = False
    ) -> Callable[[Callable[Parameters, Returned]], Callable[Parameters, Returned]]: ...

    def record(
        self,
        function: Callable[..., object] | None = None,
        /,
        *,
        name: str | None = None,
        seed: int | None = None,
        figures: bool = False,
    ) -> Callable[..., object]:
        """Return a function each of whose calls is recorded: `@bench.record`, or `bench.record(function)(arguments)`.

        It returns what the function returns. An error is recorded and raised. A recorded function that is called
        within another is a record of its own, and its id stands among the other's `parts`.

        Args:
            function: the experiment.
            name: of the experiment; by default the function's.
            seed: of the global random generators for each call; afterwards they are as before. Without one they are
                left alone, and their state is kept if the run draws from them.
            figures: draw a result that has a `figure` method, and keep the figure.

        Raises:
            TypeError: the function is a generator or a coroutine, whose work is done after the call.
            ValueError: the name is empty or has a `@`.
        """
        if function is None:
            return functools.partial(self._recorded, name=name, seed=seed, figures=figures)
        return self._recorded(function, name, seed, figures)

    def _recorded(
        self, function: Callable[..., object], name: str | None, seed: int | None, figures: bool
    ) -> Callable[..., object]:
        bare = inspect.unwrap(function)
        if any(check(bare) for check in (inspect.isgeneratorfunction, inspect.iscoroutinefunction)):
            raise TypeError(f"{bare.__qualname__} does its work after the call: a recorded function returns a result")
        named = name or getattr(bare, "__name__", None)
        if not named or "@" in named or named != named.strip():
            raise ValueError(f"the name of an experiment is a text without @, got {named!r}: give name=...")
        recording = Recording(self._store, named, seed, figures, self._png, objects=self._known)
        self._functions[named] = (function, recording)

        @functools.wraps(function)
        def call(*args: object, **kwargs: object) -> object:
            return self._run(function, recording, args, kwargs)[0]

        return call

    def _run(
        self,
        function: Callable[..., Returned],
        recording: Recording,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> tuple[Returned, str]:
        tools = {id(tool): {"tool": tool.name} for tool in self.tools.loaded}
        return replace(recording, known=tools).run(function, args, kwargs)

    def run(
        self, function: Callable[Parameters, Returned], /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Returned:
        """Run a function once, record the run, and return its result: `record` as a plain call.

        Args:
            function: the experiment.
            args, kwargs: its arguments.

        Raises:
            TypeError, ValueError: as `record`.
        """
        return cast(Callable[Parameters, Returned], self._recorded(function, None, None, False))(*args, **kwargs)

    @contextmanager
    def trace(
        self, model: Tracing | RemoteModel, *, name: str | None = None, **options: bool
    ) -> Generator[Trace, None, None]:
        """Record a trace under its hash: `with bench.trace(model) as t:`, as with `model.trace()`.

        The record holds the trace itself, so that `rerun` needs only the model.

        Args:
            model: a `HookedTransformer`, or a model on a server.
            name: of the experiment; by default `trace-` and the beginning of the trace's hash.
            options: as for `model.trace`.

        Raises:
            TraceError: as the trace; or it has a metric that is a function of this process, which no file can hold.
        """
        trace = model.trace(run=False, **options)
        yield trace
        self._run_trace(trace, model, name)

    def _run_trace(self, trace: Trace, model: object, name: str | None) -> tuple[object, str]:
        content = TraceContent.of(trace, model)
        recording = Recording(self._store, name or f"trace-{trace.hash[:12]}", png=self._png, objects=self._known)
        return recording.run(trace.run, trace=content)

    def use_tools(self, *names: str) -> Callable[[Callable[..., Returned]], Callable[..., Returned]]:
        """Return a decorator that gives a function tools as arguments of their names, and notes their calls.

            @bench.record
            @bench.use_tools("heads", "patching")
            def experiment(model, heads, patching):
                scores = heads.induction_scores(model)

        Args:
            names: of the tools; `bench.tools` has them all.

        Raises:
            ValueError: there is no such tool, or the function has no parameter of its name.
        """
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("use_tools takes the names of tools: @bench.use_tools('heads', 'patching')")
        tools = {name: self.tools[name] for name in names}
        return lambda function: cast(Callable[..., Returned], with_tools(function, tools))

    def add_tool(self, name: str, tool: object, about: str = "") -> Tool:
        """Add a tool of one's own, and return it.

        Args:
            name: of the tool and of the argument by which functions get it.
            tool: a function, a module, or an object with methods.
            about: what it is for; by default the first line of its docstring.

        Raises:
            ValueError: the name is a ready tool's or no name of Python's, or nothing in the tool can be called.
        """
        made = Tool.of(name, tool, about)
        self.tools.add(made)
        return made

    # Tests

    @overload
    def test(
        self,
        effect: Callable[..., ArrayLike] | ArrayLike,
        baseline: ArrayLike | None = None,
        /,
        *,
        name: str | None = None,
        **settings: object,
    ) -> EffectTest: ...

    @overload
    def test(
        self, effect: None = None, baseline: None = None, /, *, name: str | None = None, **settings: object
    ) -> Callable[[Callable[..., ArrayLike]], Callable[[], EffectTest]]: ...

    def test(
        self,
        effect: Callable[..., ArrayLike] | ArrayLike | None = None,
        baseline: ArrayLike | None = None,
        /,
        *,
        name: str | None = None,
        **settings: object,
    ) -> EffectTest | Callable[..., object]:
        """Return the test of an effect, and record it: whether it is more than chance, and more than a control's.

        With a function, the effect is measured on controls too, which is what a test should do:
        `bench.test(effect_of_ablating, heads=[(1, 2)], model=model)`, or as a decorator of the function
        `@bench.test(heads=[(1, 2)], model=model)`, whose calls then run the test. With numbers, `bench.test(treated,
        baseline)`, there is no control, and the verdict says so.

        Args:
            effect: a function of heads, or of labels, to the difference in each pair; or the measured numbers.
            baseline: of numbers, those without the treatment.
            name: of the experiment; by default the function's, or `"test"`.
            settings: of `controlled_test` for a function (`heads`, `model`, `labels`, `n_controls`), and of
                `effect_test` for both (`alternative`, `correction`, `alpha`, `seed`).

        Raises:
            ValueError: as `hypotheses.controlled_test` and `hypotheses.effect_test`.
        """
        if effect is None:
            return lambda function: self._test_of(function, name, settings)
        if callable(effect):
            return cast(EffectTest, self._test_of(effect, name, settings)())
        settings = {"baseline": baseline, **settings}
        return self._recorded(effect_test, name or "test", None, False)(effect, **settings)  # type: ignore[return-value]

    def _test_of(
        self, effect: Callable[..., ArrayLike], name: str | None, settings: dict[str, object]
    ) -> Callable[..., object]:
        """A function that tests an effect; its record has the effect's source and the test's settings."""

        @functools.wraps(effect)
        def tested(**given: object) -> EffectTest:
            return controlled_test(effect, **given)  # type: ignore[arg-type]

        anything = inspect.Parameter("settings", inspect.Parameter.VAR_KEYWORD)
        tested.__signature__ = inspect.Signature([anything])  # type: ignore[attr-defined]
        return functools.partial(self._recorded(tested, name, None, False), **settings)

    def profile(self, function: Callable[Parameters, Returned], /) -> Callable[Parameters, Returned]:
        """Return a function whose calls are profiled: `@bench.record` over `@bench.profile`.

        The table of the operations that took most is kept with the record of the run around the call; without one, the
        call is recorded itself. The profiler slows a call down. `profiling.profile` says more of a model's forward
        pass: time and memory by layer and part, and what hooks cost.

        Args:
            function: the experiment.
        """

        @functools.wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
            scope = current_scope.get()
            if scope is None:
                return cast(Returned, self._recorded(call, None, None, False)(*args, **kwargs))
            result, found = profile_call(lambda: function(*args, **kwargs))
            scope.texts.append(found.table())
            scope.figures["profile"] = found
            return result

        return call

    # Reading

    def __len__(self) -> int:
        return len(self._store.entries())

    @property
    def names(self) -> list[str]:
        """The names of the experiments, in the order of their first records."""
        return list(dict.fromkeys(entry.name for entry in self._store.entries()))

    def versions(self, name: str) -> Versions:
        """Return the records of an experiment, the oldest first.

        Args:
            name: of the experiment.

        Raises:
            ValueError: there is none of that name.
        """
        return Versions(self._named(name))

    def table(self) -> str:
        """Return all records as a table: name and version, when, how long, arguments, first numbers of the result."""
        return str(self.all())

    def all(self) -> Versions:
        """Return all records, in the order in which they were written."""
        return Versions(self._store.entries())

    def __str__(self) -> str:
        return self.table()

    def _named(self, name: str) -> list[RecordEntry]:
        entries = self._store.entries()
        found = [entry for entry in entries if entry.name == name]
        if not found:
            names = list(dict.fromkeys(entry.name for entry in entries))
            raise ValueError(
                f"no experiment {name!r} is recorded in {self.folder}: there are {', '.join(names) or 'none'}"
            )
        return found

    def get(self, name: str, version: int | str = -1) -> Record:
        """Return a record.

        Args:
            name: of the experiment; or `"name@2"`; or the first letters of a record's id, at least four.
            version: its number, from 1; -1 for the newest; or the first letters of its id.

        Raises:
            ValueError: there is no such record, or several whose ids begin so.
        """
        base, at, number = name.rpartition("@")
        if at:
            name, version = base, int(number) if number.isdecimal() else number
        try:
            entries = self._named(name)
        except ValueError:
            ids = [entry for entry in self._store.entries() if len(name) >= 4 and entry.id.startswith(name)]
            if len(ids) != 1 or at:
                raise
            return Record(self._store, ids[0])
        return Record(self._store, _version_of(entries, name, version))

    def diff(self, a: Record | str, b: Record | str) -> RecordDiff:
        """Return what differs between two records: source, arguments, environment, results.

        Args:
            a, b: records, or names as for `get`: `"name@1"`, `"name@2"`.

        Raises:
            ValueError: there is no such record, or its files were changed.
        """
        return diff_records(*(one if isinstance(one, Record) else self.get(one) for one in (a, b)))

    def rerun(self, record: Record | str, function: Callable[..., object] | None = None, /, **given: object) -> Rerun:
        """Run a recorded experiment again, with its arguments and its random state; the result says what differs.

        Args:
            record: the record, or its name as for `get`.
            function: the experiment; by default the one of its name that this process records.
            given: arguments by name that a record cannot give back, such as a model that this process has not seen, or
                that are to be others.

        Raises:
            ValueError: the function or an argument is not to be had.
        """
        old = record if isinstance(record, Record) else self.get(record)
        given_arguments = arguments_again(old, given, self._known)
        if old.data["kind"] == "trace":
            model = cast(Tracing, given_arguments["model"])
            result, id = self._run_trace(load(old.trace_file(), model), model, old.name)
            return Rerun(result, diff_records(old, self.get(id)))
        found = (function, None) if function is not None else self._functions.get(old.name)
        if found is None:
            raise ValueError(
                f"no function {old.name!r} is recorded by this process: define it with @bench.record, or give it: "
                f"bench.rerun({f'{old.name}@{old.version}'!r}, function). Its source is record.source"
            )
        bare, recording = found[0], found[1] or Recording(self._store, old.name, png=self._png, objects=self._known)
        recording = replace(recording, seed=old.data["random"]["seed"], state=old.random_state)
        args, kwargs = _as_call(bare, given_arguments)
        result, id = self._run(bare, recording, args, kwargs)
        return Rerun(result, diff_records(old, self.get(id)))


def _version_of(entries: Sequence[RecordEntry], name: str, version: int | str) -> RecordEntry:
    if isinstance(version, str):
        found = [entry for entry in entries if version and entry.id.startswith(version)]
        if len(found) != 1:
            count = "no record" if not found else f"{len(found)} records"
            raise ValueError(f"{count} of {name!r} has an id that begins with {version!r}")
        return found[0]
    if is_integer(version) and integer(version, "version") < 0 and -len(entries) <= version:
        return entries[version]
    for entry in entries:
        if is_integer(version) and entry.version == version:
            return entry
    raise ValueError(f"{name!r} has no version {version!r}: there are {entries[0].version} to {entries[-1].version}")


def _as_call(
    function: Callable[..., object], arguments: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Arguments by name as those of a call. Before `*args`, all are given by their place."""
    parameters = inspect.signature(function).parameters
    kinds = {parameter.kind for name, parameter in parameters.items() if name in arguments}
    by_place: list[object] = [inspect.Parameter.POSITIONAL_ONLY]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        by_place.append(inspect.Parameter.POSITIONAL_OR_KEYWORD)
    args: list[object] = []
    kwargs = dict(arguments)
    for name, parameter in parameters.items():
        if name in kwargs and parameter.kind in by_place:
            args.append(kwargs.pop(name))
        elif name in kwargs and parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            args += cast("tuple[object, ...]", kwargs.pop(name))
    return tuple(args), kwargs
