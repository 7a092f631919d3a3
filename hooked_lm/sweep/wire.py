"""Parts of a sweep as bytes, for workers that have the model: some cells, and what they start from."""

from __future__ import annotations

from dataclasses import dataclass

from safetensors.torch import load, save
from torch import Tensor

from hooked_lm._support.framing import framed, unframed
from hooked_lm._support.plain_data import PlainData
from hooked_lm._support.versions import check_version
from hooked_lm.interventions import Intervention
from hooked_lm.interventions.files import interventions_from_json, interventions_to_json
from hooked_lm.metrics import Metric, get_metric

__all__ = [
    "SWEEP_FORMAT",
    "SWEEP_VERSION",
    "SweepPart",
    "part_from_bytes",
    "part_to_bytes",
    "scores_from_bytes",
    "scores_to_bytes",
]

SWEEP_FORMAT, SWEEP_VERSION = "hooked_lm sweep", 1


@dataclass(frozen=True, eq=False)
class SweepPart:
    """Cells that are scored together.

    Attributes:
        tokens, mask: of the prompts, [batch pos].
        metric: one of `hooked_lm.metrics`.
        always: interventions made in every run.
        cells: the interventions of each.
        names: the activations of the base run that the walk starts from; None for a whole run of each cell.
        firsts: with `names`, the first position that each cell changes.
    """

    tokens: Tensor
    mask: Tensor
    metric: Metric
    always: tuple[Intervention, ...]
    cells: tuple[tuple[Intervention, ...], ...]
    names: tuple[str, ...] | None = None
    firsts: tuple[int, ...] = ()


def part_to_bytes(part: SweepPart) -> bytes:
    """Return a part of a sweep as bytes.

    Args:
        part: the part.

    Raises:
        ValueError: its metric is a function of this process.
    """
    metric = part.metric
    if metric.maker is None:
        raise ValueError(
            f"the metric {metric.name!r} is a function of this process, and workers have only its name: use one of "
            "hooked_lm.metrics, or register its maker there and give maker= and arguments="
        )
    tensors = {"tokens": part.tokens.cpu().contiguous(), "mask": part.mask.cpu().contiguous()}
    arguments: PlainData = {}
    for name, value in metric.arguments.items():
        if isinstance(value, Tensor):
            tensors[f"metric.{name}"] = value.detach().cpu().contiguous()
            arguments[name] = {"tensor": f"metric.{name}"}
        else:
            arguments[name] = value
    document: PlainData = {
        "format": SWEEP_FORMAT,
        "version": SWEEP_VERSION,
        "metric": metric.maker,
        "arguments": arguments,
        "walk": None if part.names is None else {"names": list(part.names), "firsts": list(part.firsts)},
    }
    for key, listed in (("always", [part.always]), ("cells", part.cells)):
        text, values = interventions_to_json(listed)
        document[key] = text
        tensors |= {f"{key}.{name}": value.cpu() for name, value in values.items()}
    return framed(document, tensors)


def part_from_bytes(content: bytes) -> SweepPart:
    """Return a part of a sweep from its bytes; whether it fits a model is checked where it runs.

    Args:
        content: as `part_to_bytes` makes them.

    Raises:
        ValueError: anything else.
    """
    document, tensors = unframed(content, "part of a sweep")
    if not isinstance(document, dict) or document.get("format") != SWEEP_FORMAT:
        raise ValueError(f"this is not a {SWEEP_FORMAT}")
    check_version("the part of a sweep", document.get("version"), SWEEP_VERSION)
    expected = {"format", "version", "cells", "always", "metric", "arguments", "walk"}
    if set(document) != expected or not {"tokens", "mask"} <= set(tensors):
        raise ValueError(f"a part of a sweep has the keys {', '.join(sorted(expected))}, tokens and a mask")
    (always,), cells = _cells("always", document, tensors), _cells("cells", document, tensors)
    names, firsts = _walk(document["walk"], len(cells))
    tokens, mask = tensors["tokens"], tensors["mask"]
    if tokens.ndim != 2 or tokens.shape != mask.shape or tokens.is_floating_point() or mask.is_floating_point():
        raise ValueError("tokens and mask of a sweep are integers [batch pos]")
    return SweepPart(tokens, mask, _metric(document, tensors), always, cells, names, firsts)


def _cells(key: str, document: PlainData, tensors: dict[str, Tensor]) -> tuple[tuple[Intervention, ...], ...]:
    own = {name.partition(".")[2]: one for name, one in tensors.items() if name.startswith(f"{key}.")}
    if not isinstance(document[key], str):
        raise ValueError(f"{key} of a sweep are a description of interventions")
    listed = interventions_from_json(document[key], own)
    return tuple((one,) if isinstance(one, Intervention) else tuple(one) for one in listed)


def _walk(given: object, n_cells: int) -> tuple[tuple[str, ...] | None, tuple[int, ...]]:
    if given is None:
        return None, ()
    names, firsts = (given.get("names"), given.get("firsts")) if isinstance(given, dict) else (None, None)
    if not isinstance(names, list) or not isinstance(firsts, list) or len(firsts) != n_cells:
        raise ValueError("a walk has the names of its activations and a first position for each cell")
    if not all(isinstance(one, str) for one in names) or not all(type(one) is int and one >= 0 for one in firsts):
        raise ValueError("a walk has the names of its activations and a first position for each cell")
    return tuple(names), tuple(firsts)


def _metric(document: PlainData, tensors: dict[str, Tensor]) -> Metric:
    name, arguments = document["metric"], document["arguments"]
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("the metric of a sweep has the name of its maker and its arguments")
    given = {
        key: tensors.get(str(value.get("tensor"))) if isinstance(value, dict) else value
        for key, value in arguments.items()
    }
    try:
        return get_metric(name)(**given)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"the metric {name!r} does not take these arguments: {error}") from error


def scores_to_bytes(scores: Tensor) -> bytes:
    """Return scores [cell batch] as bytes."""
    return save({"scores": scores.cpu().contiguous()})


def scores_from_bytes(content: bytes) -> Tensor:
    """Return scores [cell batch] from their bytes."""
    return load(content)["scores"]
