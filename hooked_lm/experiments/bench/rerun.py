"""Run a recorded experiment again, from its recorded arguments and random state, and say what differs."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hooked_lm._support.plain_data import PlainData
from hooked_lm.experiments.bench.diff import RecordDiff
from hooked_lm.experiments.bench.fingerprint import fingerprint_of
from hooked_lm.experiments.bench.record import Record

__all__ = ["KnownObjects", "Rerun", "arguments_again"]


@dataclass(frozen=True, eq=False)
class Rerun:
    """An experiment that was run again.

    Attributes:
        result: what it returned this time.
        diff: between the old record and the new one.
    """

    result: object
    diff: RecordDiff

    @property
    def record(self) -> Record:
        """The new record."""
        return self.diff.b

    @property
    def same(self) -> bool:
        """Whether the results are equal to the bit."""
        return self.diff.same_results

    def table(self) -> str:
        """Return what differs from the old record as text."""
        return self.diff.table()

    def __str__(self) -> str:
        return self.table()


class KnownObjects:
    """Models and functions that this process has seen among arguments, which a record cannot give back."""

    def __init__(self) -> None:
        self._models: weakref.WeakValueDictionary[str, object] = weakref.WeakValueDictionary()
        self._others: dict[str, object] = {}

    def add(self, packed: Mapping[str, object], arguments: Mapping[str, object]) -> None:
        """Remember the models and functions among arguments.

        Args:
            packed: the arguments as the record has them.
            arguments: the arguments.
        """
        for name, tree in packed.items():
            if isinstance(tree, dict) and "model" in tree:
                self._models[tree["model"]["weights"] + tree["model"]["config"]] = arguments[name]
            elif isinstance(tree, dict) and "function" in tree:
                self._others[tree["function"] + tree["sha256"]] = arguments[name]

    def find(self, tree: PlainData) -> object | None:
        """Return the model or function that a packed value stands for, as it is now; None if it is not known."""
        if "model" in tree:
            found = self._models.get(tree["model"]["weights"] + tree["model"]["config"])
            now = None if found is None else fingerprint_of(found)
            return found if now is not None and now.as_dict() == tree["model"] else None
        return self._others.get(tree["function"] + tree["sha256"]) if "function" in tree else None


def arguments_again(record: Record, given: Mapping[str, object], known: KnownObjects) -> dict[str, object]:
    """Return the arguments of a record, to be used again.

    Args:
        record: whose arguments they are.
        given: arguments by name that take the place of the recorded ones.
        known: models and functions of this process.

    Raises:
        ValueError: an argument is not given that a record cannot give back, or one is given that there is not.
    """
    strange = sorted(given.keys() - record.data["arguments"].keys())
    if strange:
        raise ValueError(f"{record!r} has no argument {strange[0]!r}: {', '.join(record.data['arguments']) or 'none'}")
    recorded, found, missing = record.arguments, dict[str, object](), list[str]()
    for name, tree in record.data["arguments"].items():
        if name in given:
            found[name] = given[name]
        elif isinstance(tree, dict) and tree.keys() & {"model", "function"}:
            found[name] = known.find(tree)
            if found[name] is None:
                missing.append(f"{name} ({recorded[name]})")
        elif _class_of(tree) is not None:
            found[name] = _class_of(tree)(**recorded[name])  # type: ignore[misc, arg-type]
        elif _holds_more_than_data(tree):
            missing.append(name)
        else:
            found[name] = recorded[name]
    if missing:
        raise ValueError(
            f"a record cannot give back {', '.join(missing)}: give {'them' if len(missing) > 1 else 'it'}, as in "
            f"bench.rerun({f'{record.name}@{record.version}'!r}, {missing[0].partition(' ')[0]}=...)"
        )
    return found


def _class_of(tree: object) -> Callable[..., object] | None:
    """The class of a packed dataclass of this package, such as an `Intervention`, which can be made again."""
    if not isinstance(tree, dict) or not str(tree.get("class", "")).startswith("hooked_lm.") or "fields" not in tree:
        return None
    module, _, name = tree["class"].rpartition(".")
    found: Callable[..., object] | None = getattr(importlib.import_module(module), name, None)
    return found


def _holds_more_than_data(tree: object) -> bool:
    if isinstance(tree, list):
        return any(map(_holds_more_than_data, tree))
    if not isinstance(tree, dict):
        return False
    if tree.keys() & {"model", "function", "text", "figure", "fields"}:
        return True
    return any(_holds_more_than_data(one) for key, one in tree.items() if key in ("list", "tuple", "set", "pairs")) or (
        "dict" in tree and any(map(_holds_more_than_data, tree["dict"].values()))
    )
