"""Interventions on disk: a JSON file that a person can read, and a safetensors file with the tensors."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooked_lm._support.files import write_whole
from hooked_lm._support.versions import check_version
from hooked_lm.interventions.intervention import Intervention

_FORMAT, _VERSION = "hooked_lm interventions", 1
_SELECTIONS = ("pos", "head", "feature", "batch")
# JSON has no words for these numbers.
_SPECIAL = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}

# What a sweep takes: cells, each an intervention or several that are made together.
Cells = Sequence[Intervention | Sequence[Intervention]]


def save_interventions(path: str | Path, interventions: Cells) -> None:
    """Write interventions, or the cells of a sweep, to `path` and, if there are tensors, to a file beside it.

    Args:
        path: ends in `.json`; tensors go to the same name with `.safetensors`.
        interventions: each an intervention, or a list of several.

    Raises:
        ValueError: another ending.
        TypeError: something that is no intervention. Nothing has been written then.
    """
    path = _checked(path)
    text, tensors = interventions_to_json(interventions)
    beside = path.with_suffix(".safetensors")
    if tensors:
        write_whole(beside, lambda unfinished: save_file(tensors, unfinished))
    else:
        beside.unlink(missing_ok=True)
    write_whole(path, text + "\n")


def load_interventions(path: str | Path) -> list[Any]:
    """Return what `save_interventions` has written: interventions, and lists of them.

    Raises:
        ValueError: the file is not one of those, or its tensors are not those beside it.
    """
    path = _checked(path)
    beside = path.with_suffix(".safetensors")
    return interventions_from_json(path.read_text(), load_file(beside) if beside.exists() else {})


def interventions_to_json(interventions: Cells) -> tuple[str, dict[str, Tensor]]:
    """Return interventions as JSON text, and the tensors that it names.

    A tensor that several interventions share is there once.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def named(value: Tensor) -> str:
        if id(value) not in names:
            names[id(value)] = str(len(names))
            tensors[names[id(value)]] = value.detach().clone(memory_format=torch.contiguous_format)
        return names[id(value)]

    def described(one: Any) -> dict[str, Any] | list[Any]:
        if isinstance(one, (list, tuple)):
            return [described(each) for each in one]
        if not isinstance(one, Intervention):
            raise TypeError(f"an intervention is an Intervention, got {one!r}")
        value: Any = {"tensor": named(one.value)} if isinstance(one.value, Tensor) else _number(one.value)
        fields = {"site": one.site, "operation": one.operation, "value": value, **one.selections()}
        return {field: entry for field, entry in fields.items() if entry is not None}

    document = {"format": _FORMAT, "version": _VERSION, "interventions": [described(one) for one in interventions]}
    return json.dumps(document, indent=2, allow_nan=False), tensors


def interventions_from_json(text: str, tensors: Mapping[str, Tensor]) -> list[Any]:
    """Return the interventions, and lists of them, that `interventions_to_json` has described.

    Args:
        text: the description.
        tensors: the values, by the names that the description gives them.

    Raises:
        ValueError: the text is not such a description, or one of a newer version of the format; or tensors are
            missing or left over.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is not a description of interventions, which are JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise ValueError(f"this is not a description of interventions: its format is not {_FORMAT!r}")
    check_version("this description of interventions", document.get("version", 1), _VERSION)
    if not isinstance(document.get("interventions"), list):
        raise ValueError("the description has no list of interventions")
    used: set[str] = set()

    def read(one: Any) -> Any:
        return [read(each) for each in one] if isinstance(one, list) else _read(one, tensors, used)

    interventions = [read(one) for one in document["interventions"]]
    if set(tensors) - used:
        raise ValueError(f"tensors that no intervention uses: {sorted(set(tensors) - used)}. Are they another file's?")
    return interventions


def _read(described: Any, tensors: Mapping[str, Tensor], used: set[str]) -> Intervention:
    known = [field.name for field in dataclasses.fields(Intervention)]
    if not isinstance(described, dict) or not {"site", "operation"} <= set(described) <= set(known):
        raise ValueError(f"an intervention has site, operation and some of {', '.join(known[2:])}; got {described!r}")
    fields = dict(described)
    value = fields.get("value")
    if isinstance(value, dict):
        name = str(value.get("tensor"))
        if set(value) != {"tensor"} or name not in tensors:
            raise ValueError(f"there is no tensor {name!r} for {described!r}; there are {sorted(tensors)}")
        used.add(name)
        fields["value"] = tensors[name]
    elif isinstance(value, str):
        if value not in _SPECIAL:
            raise ValueError(f"{value!r} is no number, at {described['site']!r}")
        fields["value"] = _SPECIAL[value]
    for selection in _SELECTIONS:
        if isinstance(fields.get(selection), list):
            fields[selection] = tuple(fields[selection])
    return Intervention(**fields)


def _number(value: float | None) -> float | str | None:
    return str(float(value)) if value is not None and not math.isfinite(value) else value


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"interventions are written to a .json file, got {path.name!r}")
    return path
