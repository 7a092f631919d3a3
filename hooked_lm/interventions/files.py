"""Interventions on disk: a JSON file that a person can read, and a safetensors file with the tensors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hooked_lm._support.files import write_whole
from hooked_lm._support.plain_data import PlainData
from hooked_lm._support.reading import SafetensorFile, parse_json, read_text
from hooked_lm._support.tensor_bytes import bytes_of
from hooked_lm._support.versions import check_version
from hooked_lm.interventions.intervention import Intervention

__all__ = ["Cells", "interventions_from_json", "interventions_to_json", "load_interventions", "save_interventions"]

_FORMAT, _VERSION = "hooked_lm interventions", 1
_SELECTIONS = ("pos", "head", "feature", "batch")
# JSON has no words for these numbers.
_SPECIAL = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}

# The cells of a sweep: each an intervention, or several that are made together.
Cells = Sequence[Intervention | Sequence[Intervention]]


def save_interventions(path: str | Path, interventions: Cells) -> None:
    """Write interventions, or the cells of a sweep, to `path` and, if there are tensors, to a file beside it.

    Args:
        path: ends in `.json`; the tensors are written to the same name with `.safetensors`.
        interventions: each an intervention, or a list of several.

    Raises:
        ValueError: the path does not end in `.json`.
        TypeError: an entry is no intervention. Nothing has been written then.
    """
    path = _checked(path)
    text, tensors = interventions_to_json(interventions)
    beside = path.with_suffix(".safetensors")
    if tensors:
        write_whole(beside, lambda unfinished: save_file(tensors, unfinished))
    else:
        beside.unlink(missing_ok=True)
    write_whole(path, text + "\n")


def load_interventions(path: str | Path) -> list[Intervention | list[Intervention]]:
    """Return the interventions, and lists of interventions, of a file that `save_interventions` wrote.

    Args:
        path: the `.json` file.

    Raises:
        ValueError: the file holds no interventions, or their tensors are not those of the file beside it.
    """
    path = _checked(path)
    text, beside = read_text(path), path.with_suffix(".safetensors")
    if not beside.exists():
        return interventions_from_json(text, {})
    file = SafetensorFile(beside)
    # Copies: an intervention's value is not to change with a file.
    return interventions_from_json(text, {name: file.tensor(name).clone() for name in file.names})


def interventions_to_json(interventions: Cells) -> tuple[str, dict[str, Tensor]]:
    """Return interventions as JSON text, and the tensors that the text refers to by name.

    A tensor that several interventions share is stored once.

    Args:
        interventions: each an intervention, or a list of several.

    Raises:
        TypeError: an entry is no intervention.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def named(value: Tensor) -> str:
        if id(value) not in names:
            names[id(value)] = str(len(names))
            tensors[names[id(value)]] = value.detach().clone(memory_format=torch.contiguous_format)
        return names[id(value)]

    def described(one: object) -> PlainData:
        if not isinstance(one, Intervention):
            raise TypeError(f"an intervention is an Intervention, got {one!r}")
        value = {"tensor": named(one.value)} if isinstance(one.value, Tensor) else _number(one.value)
        fields = {"site": one.site, "operation": one.operation, "value": value, **one.selections()}
        return {field: entry for field, entry in fields.items() if entry is not None}

    entries = [
        [described(each) for each in one] if isinstance(one, (list, tuple)) else described(one) for one in interventions
    ]
    document = {"format": _FORMAT, "version": _VERSION, "tensors": _digest(tensors), "interventions": entries}
    return json.dumps(document, indent=2, allow_nan=False), tensors


def interventions_from_json(text: str, tensors: Mapping[str, Tensor]) -> list[Intervention | list[Intervention]]:
    """Return the interventions, and lists of interventions, of a text that `interventions_to_json` made.

    Args:
        text: the JSON text.
        tensors: name in the text -> tensor.

    Raises:
        ValueError: the text is of another format or a newer version, or tensors are missing or unused.
    """
    try:
        document = parse_json(text, "the text", finite=True)
    except ValueError as error:
        raise ValueError(f"this is not a description of interventions, which are JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise ValueError(f"this is not a description of interventions: its format is not {_FORMAT!r}")
    check_version("this description of interventions", document.get("version", 1), _VERSION)
    if not isinstance(document.get("interventions"), list):
        raise ValueError("the description has no list of interventions")
    used: set[str] = set()

    interventions = [
        [_read(each, tensors, used) for each in one] if isinstance(one, list) else _read(one, tensors, used)
        for one in document["interventions"]
    ]
    if set(tensors) - used:
        raise ValueError(f"tensors that no intervention uses: {sorted(set(tensors) - used)}. Are they another file's?")
    digest = _digest(tensors)
    if document.get("tensors", digest) != digest:
        raise ValueError(
            "the tensors are not those that were saved with this description: a save was cut off between its two "
            "files, or one of them comes from another save. Save the interventions again"
        )
    return interventions


def _digest(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the SHA-256 of some tensors with their names, dtypes and shapes; None of no tensors."""
    if not tensors:
        return None
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(bytes_of(tensor).numpy().data)
    return digest.hexdigest()


def _read(described: object, tensors: Mapping[str, Tensor], used: set[str]) -> Intervention:
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
