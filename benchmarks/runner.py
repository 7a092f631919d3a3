"""The run: contestants asked in turn, their values compared before their times count."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.grids import ANSWER, TOLERANCE, WRONG, Loop, ask_loop, one_round
from benchmarks.measurements import (
    FOUR,
    MINIMAL,
    NNSIGHT,
    OURS,
    THREE,
    TRANSFORMERS,
    Fresh,
    Measurement,
    Patching,
    Peak,
    Task,
)
from benchmarks.models import write_model
from benchmarks.peers.process import OWN, Asked, start_peer

Tick = Callable[[], None]

# What a notebook's first cell imports. Some of it is put off until a model is loaded, which `Fresh` measures too.
IMPORTS = {
    OURS: "from hooked_lm import HookedTransformer",
    TRANSFORMERS: "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained",
    THREE: "from transformer_lens import HookedTransformer",
    FOUR: "from transformer_lens.model_bridge import TransformerBridge",
    NNSIGHT: "from nnsight import TransformersModel",
}


@dataclass(frozen=True)
class Where:
    """Where everybody computes.

    Attributes:
        device: as torch names it.
        dtype: `"float32"`, or a half precision, in which no two libraries round alike: differences are noted then, and
            not judged.
    """

    device: str = "cpu"
    dtype: str = "float32"


CPU = Where()


@dataclass
class Result:
    """One measurement.

    Attributes:
        name, group: of the measurement.
        unit: `"s"` or `"bytes"`.
        values: by name, what was measured of somebody, round by round.
        difference: by name, the largest difference of somebody's values from ours.
        wrong: names whose values are not ours, and how; their times do not count.
        failed: names that gave an error instead, and which.
        absent: names that have no such thing.
    """

    name: str
    group: str
    unit: str = "s"
    values: dict[str, list[float]] = field(default_factory=dict)
    difference: dict[str, float] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)


class Run:
    """The contestants and the models of one run.

    Args:
        contestants: whoever takes part, ours first.
        folder: where models are, one folder each, and where values are put.
        threads: of everybody.
        interpreters: of the contestants, by name.
        where: the device and the precision of everybody.
    """

    def __init__(
        self,
        contestants: Sequence[Asked],
        folder: Path,
        threads: int,
        interpreters: Mapping[str, str],
        where: Where = CPU,
    ) -> None:
        self.contestants, self.folder, self.threads = list(contestants), folder, threads
        self.interpreters, self.where = interpreters, where
        self.loaded: dict[str, tuple[str, str]] = {}
        begin = {"threads": threads, **({} if where == CPU else asdict(where))}
        self.versions = {one.name: one.ask("begin", **begin) for one in contestants}

    def measure(self, measurement: Measurement, tick: Tick) -> list[Result]:
        """Make a measurement. `tick` is called after each round."""
        match measurement:
            case Task():
                return self.time_task(measurement, tick)
            case Fresh():
                return [self.time_fresh(measurement, tick)]
            case Peak():
                return [self.measure_peak(measurement, tick)]
            case Patching():
                return [self.time_patching(measurement, tick)]

    # Tasks

    def time_task(self, task: Task, tick: Tick) -> list[Result]:
        """Ask everybody in turn to do something, after it has been seen that they do the same."""
        result = Result(task.name, task.group)
        entries, reference, held = {}, {}, {}
        for label, contestant, what in self._entries(task):
            try:
                self._load(contestant, task.model, task.way)
                into = self.folder / "values.safetensors"
                arguments = self._arguments(task.arguments, what)
                reply = contestant.ask("prepare", slot=label, task=what, into=str(into), arguments=arguments)
            except RuntimeError as error:
                result.failed[label] = last_line(error)
                if label == OURS:
                    return [result]  # there is nothing to compare with
                continue
            if reply is None:
                result.absent.append(label)
                continue
            if label == OURS:
                reference = {name: value.clone() for name, value in load_file(into).items()}
            elif self._differs(
                result, label, reference, load_file(into), self._tolerance(task.tolerance), contestant.name != OURS
            ):
                continue
            into.unlink()
            entries[label], held[label] = contestant, reply["held"]
        result.values = in_turn(
            {label: partial(one.ask, "run", slot=label, number=task.number) for label, one in entries.items()},
            task.rounds,
            tick,
            result.failed,
        )
        for contestant in {one.name: one for label, one in entries.items() if label in result.values}.values():
            contestant.ask("forget")
        if not task.held:
            return [result]
        sizes = {label: [float(size)] for label, size in held.items() if size is not None}
        return [result, Result(f"{task.name}: bytes held", task.group, "bytes", sizes)]

    def _entries(self, task: Task) -> Iterator[tuple[str, Asked, str]]:
        """Yield under what name who is asked for what."""
        ours = next((one for one in self.contestants if one.name == OURS), None)
        if ours is None:
            raise ValueError("there is nothing to compare with: a run needs our own contestant")
        yield OURS, ours, task.task
        for label, what in task.beside.items():
            yield label, ours, what
        for contestant in self.contestants:
            if contestant.name != OURS and contestant.name in task.who:
                yield contestant.name, contestant, task.task

    def _arguments(self, arguments: Mapping[str, Any], what: str) -> dict[str, Any]:
        if what in ("forward", "eager_forward"):
            return {"tokens": arguments["tokens"]}
        if "folder" in arguments:
            return {**arguments, "folder": str(self.folder / arguments["folder"])}
        return dict(arguments)

    def _tolerance(self, asked: float) -> float:
        return asked if self.where.dtype == "float32" else math.inf

    def _load(self, contestant: Asked, model: str | None, way: str = "unprocessed") -> None:
        if model is not None and self.loaded.get(contestant.name) != (model, way):
            self.loaded.pop(contestant.name, None)
            contestant.ask("load", folder=str(self.folder / model), way=way)
            self.loaded[contestant.name] = model, way

    def _differs(
        self,
        result: Result,
        label: str,
        ours: Mapping[str, Tensor],
        theirs: Mapping[str, Tensor],
        tolerance: float,
        whole: bool,
    ) -> bool:
        """Note the difference of somebody's values from ours, and return whether it is too large.

        With `whole` he has to have all that we have; otherwise it is something else of ours, which has some of it.
        """
        if whole and (missing := ours.keys() - theirs.keys()):
            result.wrong[label] = f"values are missing: {', '.join(sorted(missing))}"
            return True
        return _judged(result, label, largest_difference(ours, theirs), tolerance)

    # The rest

    def time_fresh(self, measurement: Fresh, tick: Tick) -> Result:
        """Time fresh interpreters: importing what loads a model, or all that comes before one is there."""
        start = partial(self._start_seconds, model=measurement.model, way=measurement.way)
        seconds = {"import": self._import_seconds, "start": start}[measurement.what]
        result = Result(measurement.name, measurement.group)
        turns = {one.name: partial(seconds, one.name) for one in self.contestants if one.name in IMPORTS}
        result.values = in_turn(turns, measurement.rounds, tick, result.failed)
        return result

    def _import_seconds(self, name: str) -> float:
        return import_seconds(self.interpreters[name], IMPORTS[name])

    def _start_seconds(self, name: str, model: str, way: str) -> float:
        start = time.perf_counter()
        with start_peer(name, self.interpreters[name]) as fresh:
            fresh.ask("load", folder=str(self.folder / model), way=way)
            return time.perf_counter() - start

    def measure_peak(self, measurement: Peak, tick: Tick) -> Result:
        """Let a fresh process of everybody load a model."""
        result = Result(measurement.name, measurement.group, "bytes")
        for contestant in self.contestants:
            if contestant.name == MINIMAL:
                continue
            with start_peer(contestant.name, self.interpreters[contestant.name]) as fresh:
                folders = {"folder": str(self.folder / "small"), "tiny": str(self.folder / "tiny")}
                try:
                    fresh.ask("begin", threads=self.threads)
                    found = fresh.ask("peak", way=measurement.way, **folders)
                except RuntimeError as error:
                    result.failed[contestant.name] = last_line(error)
                    continue
            if found is None:
                result.absent.append(contestant.name)
                continue
            result.values[contestant.name] = [float(found["peak"])]
            if contestant.name == OURS:
                result.values["the model's own bytes"] = [float(found["own"])]
        tick()
        return result

    def time_patching(self, measurement: Patching, tick: Tick) -> Result:
        """Let our sweep do a grid, and loops some of its cells; see `benchmarks.grids`."""
        result, grid, prompts = Result(measurement.name, measurement.group), measurement.grid, measurement.prompts
        loops: dict[str, Loop] = {}
        for contestant in self.contestants:
            if contestant.name == MINIMAL:
                continue
            label = "ours, plain loop" if contestant.name == OURS else contestant.name
            try:
                self._load(contestant, measurement.model)
                contestant.ask("set_prompts", clean=prompts.clean.tolist(), corrupted=prompts.corrupted.tolist())
                ask_loop(contestant, grid, grid.cells[:1])  # nobody starts cold
            except RuntimeError as error:
                result.failed[label] = last_line(error)
                continue
            loops[label] = partial(ask_loop, contestant, grid)
        ours = next(one for one in self.contestants if one.name == OURS)

        def sweep() -> tuple[float, Tensor]:
            function = {"function": True} if measurement.function else {}
            reply = ours.ask("sweep", patch=grid.patch, answer=ANSWER, wrong=WRONG, **function)
            return reply["seconds"], torch.tensor(reply["values"])

        n_compared = min(measurement.cells * measurement.rounds, len(grid.cells))
        chosen = torch.linspace(0, len(grid.cells) - 1, n_compared).long().tolist()
        rounds = []
        for index in range(measurement.rounds):
            rounds.append(one_round(grid, chosen[index :: measurement.rounds], sweep, loops))
            for label, error in rounds[-1].failed.items():
                result.failed[label] = last_line(error)
                del loops[label]
            tick()
        result.values = {OURS: [one.seconds for one in rounds]}
        for label in loops:
            differences = torch.cat([one.others[label][1] for one in rounds])
            if not _judged(result, label, _largest(differences), self._tolerance(TOLERANCE)):
                result.values[label] = [one.others[label][0] for one in rounds]
        return result


def in_turn(
    contestants: Mapping[str, Callable[[], float]], rounds: int, tick: Tick, failed: dict[str, str], warmup: int = 1
) -> dict[str, list[float]]:
    """Ask everybody once a round for his seconds, backwards every other round, and return them.

    Whoever fails is not asked again, and is noted in `failed` with his last words.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(-warmup, rounds):
        for name in list(seconds)[:: -1 if index % 2 else 1]:
            try:
                taken = contestants[name]()
            except RuntimeError as error:
                failed[name] = last_line(error)
                del seconds[name]
                continue
            if index >= 0:
                seconds[name].append(taken)
        if index >= 0:
            tick()
    return seconds


def _judged(result: Result, label: str, difference: float, tolerance: float) -> bool:
    """Note how far somebody's values are from ours, and return whether that is too far."""
    if difference <= tolerance:
        result.difference[label] = difference
        return False
    result.wrong[label] = f"values differ by {difference:.2g}, more than {tolerance:g}"
    return True


def largest_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the largest difference of values that both have; infinite where they are no values of the same thing."""
    shared = ours.keys() & theirs.keys()
    return max((_difference(ours[name], theirs[name]) for name in shared), default=math.inf)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape or ours.is_floating_point() != theirs.is_floating_point():
        return math.inf
    if not ours.is_floating_point():  # tokens: the same ones, or others
        return 0.0 if torch.equal(ours, theirs) else math.inf
    return _largest(ours - theirs)


def _largest(differences: Tensor) -> float:
    """The largest difference; infinite where one is not a number, which would be lost among the others."""
    largest = differences.abs().max().item()
    return math.inf if math.isnan(largest) else largest


def import_seconds(python: str, statement: str) -> float:
    """Return the seconds that a statement takes in a fresh interpreter that has imported torch.

    Raises:
        RuntimeError: it fails there; with its own words.
    """
    code = f"import time, torch; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    done = subprocess.run([python, "-W", "ignore", "-c", code], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{python} could not run {statement!r}:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def last_line(error: Exception) -> str:
    """Return the last line of an error's message, which is what went wrong over there."""
    return str(error).strip().splitlines()[-1]


# A whole run


def run_all(
    measurements: Sequence[Measurement],
    models: Mapping[str, Callable[[], Any]],
    interpreters: Mapping[str, str],
    threads: int,
    tick: Tick,
    done: Callable[[Result], None],
    where: Where = CPU,
) -> tuple[list[Result], dict[str, dict[str, str]]]:
    """Make measurements, and return their results and everybody's versions.

    Args:
        measurements: in their order.
        models: by name, functions that make them.
        interpreters: of the peers that take part, by name.
        threads: of everybody.
        tick: called after each round.
        done: called with each result.
        where: the device and the precision of everybody.
    """
    everybody = dict.fromkeys(OWN, sys.executable) | dict(interpreters)
    results = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # Started first: they import what they need while the models are made.
        contestants = [stack.enter_context(start_peer(name, python)) for name, python in everybody.items()]
        for name, make in models.items():
            write_model(folder / name, make())
        run = Run(contestants, folder, threads, everybody, where)
        for measurement in measurements:
            for result in run.measure(measurement, tick):
                results.append(result)
                done(result)
        return results, run.versions


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return results as JSON can hold them."""
    return [asdict(result) for result in results]
