"""What every contestant does when it is asked: load, prepare a task, run it a number of times, say how long that took.

All of this is the same code for everybody: the clock, the collection of garbage, the threads, the modes of PyTorch.
"""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.peers.serving import serve

Tokens = list[list[int]]
# The edits that every contestant makes: the stream scaled, one head's z set to zero.
SCALE, HEAD = 1.5, 3
# Prompt of the check that a loaded model is the right one.
CHECKED_TOKENS = 16


@dataclass(frozen=True)
class Task:
    """Something that is timed.

    Attributes:
        run: does it once.
        values: what came out of it by name, to be compared with what came out elsewhere.
        held: bytes that what came out takes, where that is of interest.
        gradients: whether PyTorch has to record what is computed.
    """

    run: Callable[[], Any]
    values: Callable[[Any], dict[str, Tensor]]
    held: Callable[[Any], int] | None = None
    gradients: bool = False

    @contextmanager
    def mode(self) -> Iterator[None]:
        """Set PyTorch to what the task needs."""
        with torch.enable_grad() if self.gradients else torch.inference_mode():
            yield


class Contestant(ABC):
    """A library's way of doing what is measured.

    Attributes:
        libraries: distributions whose versions are reported, besides torch and transformers.
        ways: in which it can load a model.
        model: the one that was loaded.
    """

    libraries: tuple[str, ...] = ()
    ways: tuple[str, ...] = ("unprocessed",)

    def __init__(self) -> None:
        self.model: Any = None

    @abstractmethod
    def load_model(self, folder: Path, way: str) -> nn.Module:
        """Return the model in a folder."""

    @abstractmethod
    def logits(self, model: Any, tokens: Tensor) -> Tensor:
        """Return a model's logits [batch pos vocab]."""

    def tasks(self) -> Mapping[str, Callable[..., Task]]:
        """Return what this contestant can do besides loading and a forward pass: by name, functions that set it up."""
        return {}

    def handlers(self) -> Mapping[str, Callable[..., Any]]:
        """Return the requests that this contestant answers besides those that all do."""
        return {}

    def forward(self, tokens: Tokens) -> Task:
        """A forward pass."""
        prompt = torch.tensor(tokens)
        return Task(lambda: self.logits(self.model, prompt), lambda logits: {"logits": logits})

    def forward_log_probs(self, tokens: Tokens) -> Task:
        """A forward pass of which the log probabilities are compared: processing may shift the logits."""
        return Task(self.forward(tokens).run, lambda logits: {"log probabilities": logits.log_softmax(-1)})

    def load(self, folder: str, way: str, read: bool) -> Task | None:
        """Loading a model, and reading every weight once where that is asked for; None if there is no such way."""
        if way not in self.ways:
            return None

        def run() -> nn.Module:
            model = self.load_model(Path(folder), way)
            if read:
                read_weights(model)
            return model

        return Task(run, lambda model: {"log probabilities": self.logits(model, _checked_prompt()).log_softmax(-1)})


def serve_contestant(contestant: Contestant) -> None:
    """Answer requests to a contestant until there are no more."""
    served = Served(contestant)
    own = {name: getattr(served, name) for name in ("begin", "load", "prepare", "run", "forget", "peak")}
    serve(own | dict(contestant.handlers()))


class Served:
    """The requests that every contestant answers.

    Args:
        contestant: who does the work.
    """

    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant
        self.prepared: dict[str, Task] = {}
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def begin(self, threads: int, device: str = "cpu", dtype: str = "float32") -> dict[str, str]:
        """Use so many threads from now on, a device and a precision, and return the versions of what computes here."""
        torch.set_num_threads(threads)
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        if self.device.type != "cpu":
            torch.set_default_device(self.device)  # prompts are made there
        libraries = ("torch", "transformers", *self.contestant.libraries)
        return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in libraries}

    def load(self, folder: str, way: str = "unprocessed") -> None:
        """Load the model in a folder; in the contestant's own way if it does not have the one asked for."""
        self.prepared.clear()
        self.contestant.model = None  # two of them need not fit
        with torch.device("cpu"):
            known = way if way in self.contestant.ways else self.contestant.ways[0]
            model = self.contestant.load_model(Path(folder), known)
        model.requires_grad_(False)
        if self.dtype != torch.float32:
            model = model.to(self.dtype)
        if self.device.type != "cpu":
            model = model.to(self.device)
        self.contestant.model = model

    def prepare(self, slot: str, task: str, into: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """Set up a task and do it once. Its values go to a file; None if this contestant has no such task."""
        known: dict[str, Callable[..., Task | None]] = {
            "forward": self.contestant.forward,
            "forward_log_probs": self.contestant.forward_log_probs,
            "load": self.contestant.load,
            **self.contestant.tasks(),
        }
        prepared = known[task](**arguments) if task in known else None
        if prepared is None:
            return None
        with prepared.mode():
            result = prepared.run()
            values = {name: _comparable(value) for name, value in prepared.values(result).items()}
        save_file(values, into)
        self.prepared[slot] = prepared
        return {"held": None if prepared.held is None else prepared.held(result)}

    def run(self, slot: str, number: int) -> float:
        """Return the seconds that one of several runs of a task takes."""
        task = self.prepared[slot]
        with task.mode():
            if number > 1:
                task.run()  # short ones suffer most from whoever was here before
            with undisturbed():
                finish(self.device)
                start = time.perf_counter()
                for _ in range(number):
                    result = task.run()
                finish(self.device)
                seconds = time.perf_counter() - start
            del result
        return seconds / number

    def forget(self) -> None:
        """Let go of what was prepared."""
        self.prepared.clear()

    def peak(self, folder: str, tiny: str, way: str) -> dict[str, int] | None:
        """Return the rise of the peak resident set while a model is loaded and read, and the model's own bytes.

        To be asked of a process that has done nothing else. None where it cannot be measured, or not in this way.
        """
        peaks = Path("/proc/self/clear_refs")
        if way not in self.contestant.ways or not peaks.exists():
            return None
        self.contestant.load_model(Path(tiny), way)  # whatever is imported and set up only once
        gc.collect()
        before = resident("VmRSS")
        peaks.write_text("5")  # resets the peak
        model = self.contestant.load_model(Path(folder), way)
        read_weights(model)
        return {"peak": resident("VmHWM") - before, "own": bytes_of([*model.parameters(), *model.buffers()])}


def finish(device: torch.device) -> None:
    """Wait until a device has done what it has been asked for. The CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _comparable(value: Tensor) -> Tensor:
    """Return a value on the CPU, in float32 if it is in half precision."""
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() and value.element_size() < 4 else value).contiguous().clone()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Collect garbage now, and not while something is timed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def read_weights(model: nn.Module) -> None:
    """Read every weight once: those of a mapped file are in memory only then."""
    for parameter in model.parameters():
        parameter.detach().sum()


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that tensors take, shared memory counted once."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def resident(which: str) -> int:
    """Return this process's resident set in bytes: `VmRSS` now, `VmHWM` at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def _checked_prompt() -> Tensor:
    return torch.arange(CHECKED_TOKENS)[None]
