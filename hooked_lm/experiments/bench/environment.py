"""What an experiment ran on, and the state of the random generators when it began."""

from __future__ import annotations

import platform
import random
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from hooked_lm._support.plain_data import PlainData

__all__ = ["RandomState", "environment"]

_NumpyState = tuple[str, np.ndarray, int, int, float]
_PACKAGES = ("hooked-lm", "torch", "transformers", "numpy", "safetensors", "einops", "jaxtyping", "plotly")


def environment() -> PlainData:
    """Return versions, system, processor, accelerators, threads and the commit of the folder one is in."""
    return {
        **_fixed(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul": torch.get_float32_matmul_precision(),
        "commit": _commit(),
    }


@cache
def _fixed() -> PlainData:
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "system": platform.platform(),
        "processor": _processor(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """The commit that is checked out in the folder one is in; None outside of a repository."""
    here = Path.cwd()
    folder = next((one / ".git" for one in (here, *here.parents) if (one / ".git").is_dir()), None)
    if folder is None:
        return None
    try:
        head = (folder / "HEAD").read_text().strip()
        name = head.removeprefix("ref: ")
        if name == head:
            return head
        if (folder / name).exists():
            return (folder / name).read_text().strip()
        packed = (folder / "packed-refs").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(" ")[0] for line in packed if line.endswith(f" {name}")), None)


class RandomState:
    """The states of the global generators of torch, numpy and Python."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
        # What old code draws from; the tuple is the generator's name, its words, a place, and a normal number in store.
        self._numpy = cast(_NumpyState, np.random.get_state())  # noqa: NPY002
        self._python = random.getstate()

    def restore(self) -> None:
        """Put the generators into these states."""
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)  # noqa: NPY002
        random.setstate(self._python)

    def tensors(self) -> dict[str, Tensor]:
        """Return the states as tensors, for a file."""
        _, keys, place, has_gauss, gauss = self._numpy
        version, words, next_gauss = self._python
        return {
            "random.torch": self._torch.clone(),
            **{f"random.cuda{i}": state.clone() for i, state in enumerate(self._cuda)},
            "random.numpy": torch.from_numpy(keys.astype(np.int64)),
            "random.numpy_rest": torch.tensor([place, has_gauss, gauss], dtype=torch.float64),
            "random.python": torch.tensor([version, *words], dtype=torch.int64),
            "random.python_rest": torch.tensor([] if next_gauss is None else [next_gauss], dtype=torch.float64),
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> RandomState:
        """Return the state that was kept.

        Args:
            tensors: as `tensors` returned them.
        """
        state = cls()
        state._torch = tensors["random.torch"]
        state._cuda = [tensors[name] for name in sorted(tensors) if name.startswith("random.cuda")]
        place, has_gauss, gauss = tensors["random.numpy_rest"].tolist()
        keys = tensors["random.numpy"].numpy().astype(np.uint32)
        state._numpy = ("MT19937", keys, int(place), int(has_gauss), gauss)
        version, *words = tensors["random.python"].tolist()
        rest = tensors["random.python_rest"].tolist()
        state._python = (version, tuple(words), rest[0] if rest else None)
        return state

    def drawn_since(self) -> list[str]:
        """Return which generators are in another state now."""
        now = RandomState()
        changed = {
            "torch": not torch.equal(self._torch, now._torch),
            "cuda": len(self._cuda) != len(now._cuda)
            or any(not torch.equal(a, b) for a, b in zip(self._cuda, now._cuda, strict=True)),
            "numpy": not np.array_equal(self._numpy[1], now._numpy[1]) or self._numpy[2:] != now._numpy[2:],
            "python": self._python != now._python,
        }
        return [name for name, is_so in changed.items() if is_so]

    @staticmethod
    @contextmanager
    def begun(state: RandomState | None, seed: int | None) -> Generator[None, None, None]:
        """Begin a `with` block with the generators in a given state, or seeded, and put them back after it.

        Args:
            state: to begin with.
            seed: where there is no state. With neither, the generators are left alone.
        """
        if state is None and seed is None:
            yield
            return
        before = RandomState()
        if state is not None:
            state.restore()
        elif seed is not None:
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            random.seed(seed)
        try:
            yield
        finally:
            before.restore()
