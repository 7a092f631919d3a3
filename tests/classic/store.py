"""Outcomes of scenarios as files, and their comparison.

A topic is one `.npz` file: all its numbers in a row, in float32, and an index that says where each outcome's lie.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "reference"
# Of the largest value, or of 1. In float32 the two libraries sum in other orders, and gradients differ by up to 5e-6.
TOLERANCE = 2e-5

Leaf = Tensor | str | float | int | bool | None
Flat = dict[str, Leaf]


def flat(outcome: Any, path: str = "") -> Flat:
    """Return every tensor, text and number of an outcome by its path; arrays as tensors."""
    if isinstance(outcome, np.ndarray):
        outcome = torch.from_numpy(np.ascontiguousarray(outcome))
    if isinstance(outcome, Tensor):
        return {path: outcome.detach().cpu()}
    if isinstance(outcome, np.generic):
        return {path: outcome.item()}
    if isinstance(outcome, dict):
        parts = list(outcome.items())
    elif isinstance(outcome, (list, tuple)):
        if all(isinstance(one, (str, int, float, bool, type(None))) for one in outcome):
            return {path: json.dumps(list(outcome))}
        parts = [(str(index), one) for index, one in enumerate(outcome)]
    else:
        return {path: outcome}
    found: Flat = {}
    for key, value in parts:
        found.update(flat(value, f"{path}/{key}" if path else str(key)))
    return found


def write(topic: str, outcomes: dict[str, Flat], made_with: str, folder: Path = FOLDER) -> None:
    """Store the outcomes of a topic's scenarios; equal tensors are stored once."""
    numbers: list[np.ndarray] = []
    places: dict[bytes, int] = {}
    end = 0

    def entry(value: Leaf) -> Any:
        nonlocal end
        if not isinstance(value, Tensor):
            return value
        data = value.to(torch.float32).contiguous().numpy().ravel()
        if data.tobytes() not in places:
            places[data.tobytes()] = end
            numbers.append(data)
            end += data.size
        return [str(value.dtype).removeprefix("torch."), list(value.shape), places[data.tobytes()]]

    index = {name: {path: entry(value) for path, value in outcome.items()} for name, outcome in outcomes.items()}
    text = json.dumps({"made with": made_with, "outcomes": index}, separators=(",", ":")).encode()
    folder.mkdir(exist_ok=True)
    values = np.concatenate(numbers) if numbers else np.zeros(0, np.float32)
    np.savez_compressed(folder / f"{topic}.npz", numbers=values, index=np.frombuffer(text, np.uint8))


def read(topic: str, folder: Path = FOLDER) -> tuple[dict[str, Flat], str]:
    """Return the stored outcomes of a topic, and the version of the library that they were made with."""
    with np.load(folder / f"{topic}.npz") as file:
        numbers, index = torch.from_numpy(file["numbers"]), json.loads(file["index"].tobytes())

    def value(entry: Any) -> Leaf:
        if not isinstance(entry, list):
            return entry
        dtype, shape, start = entry
        return numbers[start : start + math.prod(shape)].reshape(shape).to(getattr(torch, dtype))

    outcomes = {
        name: {path: value(entry) for path, entry in outcome.items()} for name, outcome in index["outcomes"].items()
    }
    return outcomes, index["made with"]


@dataclass(frozen=True)
class Difference:
    """One value that is not as it was there."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"  {self.path}: {self.text}"


def differences(expected: Flat, found: Flat, tolerance: float = TOLERANCE) -> list[Difference]:
    """Return where two outcomes differ: missing, more, of another shape or kind, or too far away."""
    out = [Difference(path, "is missing here") for path in expected if path not in found]
    out += [Difference(path, "is not there") for path in found if path not in expected]
    for path in expected.keys() & found.keys():
        text = _difference(expected[path], found[path], tolerance)
        out += [Difference(path, text)] if text else []
    return out


def _difference(there: Leaf, here: Leaf, tolerance: float) -> str:
    if isinstance(there, Tensor) and isinstance(here, Tensor):
        if there.shape != here.shape:
            return f"shape {list(here.shape)}, there {list(there.shape)}"
        if there.is_floating_point() != here.is_floating_point() or (there.dtype == torch.bool) != (
            here.dtype == torch.bool
        ):
            return f"{here.dtype}, there {there.dtype}"
        return _distance(there.double(), here.double(), tolerance)
    if isinstance(there, Tensor) or isinstance(here, Tensor):
        return f"{type(here).__name__}, there {type(there).__name__}"
    if isinstance(there, float) and isinstance(here, (int, float)):
        return _distance(torch.tensor(there).double(), torch.tensor(here).double(), tolerance)
    return "" if there == here else f"{here!r}, there {there!r}"


def _distance(there: Tensor, here: Tensor, tolerance: float) -> str:
    finite = there.isfinite()
    if not torch.equal(finite, here.isfinite()) or not torch.equal(there[~finite], here[~finite]):
        return "infinite or undefined at other places"
    if not finite.any():
        return ""
    size = max(1.0, float(there[finite].abs().max()))
    away = float((there[finite] - here[finite]).abs().max())
    return f"{away:.2g} away, of values up to {size:.2g}" if away > tolerance * size else ""
