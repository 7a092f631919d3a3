"""profile: where the time and the memory of a run go, and what hooks cost."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from tqdm.auto import tqdm

from hooked_lm._support.integers import at_least_one
from hooked_lm.hooked_model import HookedModel
from hooked_lm.hooks import HookSpec
from hooked_lm.interventions import Intervention
from hooked_lm.names import NamesFilter
from hooked_lm.profiling.ranges import HOOK, PART, in_range, ranges_around
from hooked_lm.profiling.result import CallProfile, HookCost, Operation, PartCost, Profile
from hooked_lm.tokenization import Prompts

__all__ = ["profile", "profile_call"]

Returned = TypeVar("Returned")
_PLAIN, _REST = "plain", "between the parts"


def profile(
    model: HookedModel,
    input: Prompts,
    *,
    fwd_hooks: Sequence[HookSpec] = (),
    interventions: Sequence[Intervention] = (),
    names_filter: NamesFilter | None = None,
    n_repeats: int = 7,
    verbose: bool = True,
    **options: Any,  # of the model's forward pass, each of its own type
) -> Profile:
    """Return where a forward pass spends its time and memory, and what hooks, interventions and a cache cost.

    Totals are medians of runs without the profiler, with and without each hook in turns, so that a drift of the machine
    meets all alike. Parts and operations are those of the run with all `fwd_hooks`. The profiler, which slows a run
    down, only says how the time is shared out: to the innermost part of the model that an operation was called in. The
    model is left as it was. Gradients are off.

    Args:
        model: a `HookedTransformer`.
        input: prompts or tokens.
        fwd_hooks: as for `run_with_hooks`; each is measured alone.
        interventions: as for `model.run`; they are measured together.
        names_filter: as for `run_with_cache`; the cost of such a cache is measured.
        n_repeats: runs of each kind, after one that does not count.
        verbose: show a progress bar.
        options: of the forward pass.

    Raises:
        UnknownHookError: no such hook.
        ValueError: `n_repeats` is below 1, or as the forward pass.
    """
    at_least_one(n_repeats, "n_repeats")
    named = [
        (names, in_range(function, f"{number}: {_name_of((names, function))}"))
        for number, (names, function) in enumerate(fwd_hooks)
    ]

    def observed() -> object:
        return model.run_with_hooks(input, fwd_hooks=named, **options) if named else model(input, **options)

    runs: dict[str, Callable[[], object]] = {_PLAIN: lambda: model(input, **options)}
    for number, spec in enumerate(fwd_hooks):
        runs[f"hook {number}: {_name_of(spec)}"] = lambda spec=spec: model.run_with_hooks(  # type: ignore[misc]
            input, fwd_hooks=[spec], **options
        )
    if len(named) > 1:
        runs["all hooks"] = observed
    if interventions:
        runs[f"{len(interventions)} intervention{'s' if len(interventions) > 1 else ''}"] = lambda: model.run(
            input, interventions=interventions, **options
        )
    if names_filter is not None:
        runs["cache"] = lambda: model.run_with_cache(input, names_filter=names_filter, **options)
    seconds = _in_turns(runs, n_repeats, verbose)
    whole = seconds["all hooks" if len(named) > 1 else list(seconds)[len(named)]]
    with ranges_around(model):
        _events(observed)  # the first run under the profiler has work of its own
        events, under_profiler = _events(observed)
    return Profile(
        seconds=statistics.median(whole),
        plain_seconds=statistics.median(seconds[_PLAIN]),
        spread=(min(whole), max(whole)),
        n_repeats=n_repeats,
        profiler_factor=under_profiler / statistics.median(whole),
        parts=tuple(_parts(events)),
        operations=tuple(_operations(events)),
        hooks=tuple(_costs(seconds)),
        peak_bytes=_peak(events),
    )


def profile_call(function: Callable[[], Returned]) -> tuple[Returned, CallProfile]:
    """Return what a function returns, and which operations its time went to.

    Args:
        function: without arguments.
    """
    found: list[Returned] = []
    events, seconds = _events(lambda: found.append(function()), gradients=torch.is_grad_enabled())
    return found[0], CallProfile(seconds, tuple(_operations(events)), _peak(events))


def _name_of(spec: HookSpec) -> str:
    names, function = spec
    site = names if isinstance(names, str) else getattr(names, "__qualname__", None) or f"{len(list(names))} sites"  # type: ignore[arg-type]
    return f"{getattr(function, '__qualname__', type(function).__name__)} at {site}"


@torch.no_grad()
def _in_turns(runs: dict[str, Callable[[], object]], n_repeats: int, verbose: bool) -> dict[str, list[float]]:
    """The seconds of each run, all in turns; the first turn does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in tqdm(range(n_repeats + 1), disable=not verbose, desc="profile", leave=False):
        for name, run in runs.items():
            _wait()
            begun = time.perf_counter()
            run()
            _wait()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _costs(seconds: dict[str, list[float]]) -> Iterable[HookCost]:
    """What each kind of run took more than the plain run of the same turn."""
    for name, found in seconds.items():
        if name == _PLAIN:
            continue
        more = [one - plain for one, plain in zip(found, seconds[_PLAIN], strict=True)]
        yield HookCost(name, statistics.median(more), (min(more), max(more)), statistics.median(seconds[_PLAIN]))


# Events of torch's profiler


class _Event(Protocol):
    """What is read of an event of torch's profiler, which has no types of its own."""

    name: str
    self_cpu_time_total: float
    self_cpu_memory_usage: int
    input_shapes: list[list[int]] | None
    cpu_parent: _Event | None

    @property
    def time_range(self) -> _Range: ...


class _Range(Protocol):
    start: float


def _events(run: Callable[[], object], gradients: bool = False) -> tuple[list[_Event], float]:
    """The events of a run, and the seconds that it took under the profiler."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with (
        torch.set_grad_enabled(gradients),
        torch_profile(activities=activities, record_shapes=True, profile_memory=True, acc_events=True) as record,
    ):
        begun = time.perf_counter()
        run()
        _wait()
        seconds = time.perf_counter() - begun
    return cast("list[_Event]", list(record.events())), seconds


def _time_of(event: _Event) -> float:
    """The seconds of an operation itself, on the accelerator where it ran there."""
    on_device: float = getattr(event, "self_device_time_total", 0)
    return max(event.self_cpu_time_total, on_device) * 1e-6


def _place_of(event: _Event) -> str:
    """The innermost part or hook that an operation was called in."""
    at: _Event | None = event
    while at is not None:
        if at.name.startswith((PART, HOOK)):
            return at.name
        at = at.cpu_parent
    return PART + _REST


def _parts(events: Iterable[_Event]) -> list[PartCost]:
    times: dict[str, float] = defaultdict(float)
    allocated: dict[str, int] = defaultdict(int)
    for event in events:
        if event.name == "[memory]":
            continue
        place = _place_of(event)
        times[place] += _time_of(event)
        allocated[place] += max(0, event.self_cpu_memory_usage) + max(0, getattr(event, "self_device_memory_usage", 0))
    total = sum(times.values())
    found = []
    for place, spent in times.items():
        is_hook = place.startswith(HOOK)
        name = place.removeprefix(HOOK if is_hook else PART)
        layer = int(name.split(".")[1]) if name.startswith("blocks.") and not is_hook else None
        part = (
            "hook " + name if is_hook else name.split(".", 2)[-1] if layer is not None and name.count(".") > 1 else name
        )
        if layer is not None and name.count(".") == 1:
            part = "block"
        found.append(PartCost(part, layer, spent / total, allocated[place]))
    return found


def _operations(events: Iterable[_Event]) -> list[Operation]:
    times: dict[tuple[str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str], int] = defaultdict(int)
    for event in events:
        if event.name == "[memory]" or event.name.startswith((PART, HOOK)):
            continue
        shapes = ", ".join(str(shape) for shape in event.input_shapes or () if shape)
        times[event.name, shapes] += _time_of(event)
        calls[event.name, shapes] += 1
    total = sum(times.values()) or 1.0
    ordered = sorted(times, key=lambda key: -times[key])
    return [Operation(name, shapes, calls[name, shapes], times[name, shapes] / total) for name, shapes in ordered]


def _peak(events: Iterable[_Event]) -> int:
    """The most that was allocated beyond what there was at the beginning, between operations."""
    held = most = 0
    for event in sorted(events, key=lambda event: event.time_range.start):
        held += event.self_cpu_memory_usage + getattr(event, "self_device_memory_usage", 0)
        most = max(most, held)
    return most
