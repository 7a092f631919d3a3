"""Applying a family's rule table to a whole checkpoint: checked on shapes first, then block by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.errors import CheckpointError
from weight_conversion.rules import Drop, Entry, RuleTable, axis_sizes, is_per_layer, stacked_axis, stacked_names
from weight_conversion.source import TensorSource

__all__ = ["MOST_MISSING", "Conversion", "block_entries"]

# So many layers or experts may be missing and are still looked for by name.
MOST_MISSING = 1000


class Conversion:
    """A checkpoint and the rules that turn it into our tensors. Creating one checks names and shapes, reads no values.

    Args:
        table: the rules.
        tensors: the checkpoint.
        cfg: of the whole checkpoint.
        prefix: may come before any source name, and may be absent.
        keep_layers: convert only so many blocks; the others' tensors are left unread.

    Attributes:
        shapes: our names -> the shapes of the tensors that the conversion makes.

    Raises:
        CheckpointError: a tensor is missing, is surplus, or has the wrong shape; all offenders are named.
    """

    def __init__(
        self,
        table: RuleTable,
        tensors: TensorSource,
        cfg: HookedTransformerConfig,
        prefix: str = "",
        keep_layers: int | None = None,
    ) -> None:
        self._tensors, self._cfg = tensors, cfg
        self._present = _without_prefix(tensors, prefix)
        self._outer = [entry for entry in table if not is_per_layer(entry)]
        self._check_counts(table)
        self._blocks = [block_entries(table, layer) for layer in range(cfg.n_layers)]
        self._check_names()
        kept = cfg.n_layers if keep_layers is None else keep_layers
        self._chunks = [self._outer, *self._blocks[:kept]]
        self._check_dtypes()
        made = [self._convert(chunk, _WithoutValues(self)) for chunk in self._chunks]
        self.shapes = {name: tuple(tensor.shape) for chunk in made for name, tensor in chunk.items()}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield our tensors, mostly views of the checkpoint's: first those outside the blocks, then block by block."""
        for chunk in self._chunks:
            yield self._convert(chunk, _WithValues(self))
            self._tensors.check()

    @property
    def mapped(self) -> bool:
        """Whether the yielded tensors are private views of a file, so that a model can keep them uncopied."""
        return self._tensors.mapped

    def release(self) -> None:
        """Free the memory of the tensors that have been read, except those still referenced elsewhere."""
        self._tensors.release()

    def _convert(self, entries: Iterable[Entry], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for entry in entries:
            made |= entry.apply(tensors, self._cfg)
        return made

    def read(self, source: str, *, values: bool = True) -> Tensor:
        """Return the tensor that a rule's `source` names, or one per expert or head, stacked."""
        names = [self._present[name] for name in stacked_names(source, self._cfg)]
        if not values:
            shapes = {self._tensors.shape(name) for name in names}
            if len(shapes) > 1:
                raise CheckpointError(f"{source} stands for tensors of different shapes: {sorted(shapes)}")
            shape = next(iter(shapes))
            return torch.empty(shape if names == [self._present.get(source)] else (len(names), *shape), device="meta")
        if names == [self._present.get(source)]:
            return self._tensors[names[0]]
        return torch.stack([self._tensors[name] for name in names])

    def has(self, source: str) -> bool:
        """Whether the checkpoint holds the tensor that a rule's `source` names, or all of those it names."""
        return all(name in self._present for name in stacked_names(source, self._cfg))

    def _check_counts(self, table: RuleTable) -> None:
        """Check that there are not far more layers or experts than tensors, before names are made for each of them."""
        most = len(self._present) + MOST_MISSING
        if self._cfg.n_layers > most:
            raise CheckpointError(
                f"the config says n_layers={self._cfg.n_layers}, and the checkpoint has {len(self._present)} tensors"
            )
        sizes = axis_sizes(self._cfg)
        for source in chain.from_iterable(entry.source_names for entry in table):
            axis = stacked_axis(source)
            if axis is not None and sizes.get(axis, 0) > most:
                raise CheckpointError(
                    f"the config implies {sizes[axis]} tensors {source!r}, and the checkpoint has {len(self._present)}"
                )

    def _check_dtypes(self) -> None:
        """Check that every tensor that is read holds floats; tensors that are dropped by name may hold anything."""
        for entry in chain.from_iterable(self._chunks):
            if not isinstance(entry, Drop):
                for source in entry.source_names:
                    for name in stacked_names(source, self._cfg):
                        self._tensors.dtype(self._present[name])

    def _check_names(self) -> None:
        entries = [*self._outer, *chain.from_iterable(self._blocks)]
        _check_table(entries)
        known: set[str] = set()
        missing: list[str] = []
        for entry in entries:
            names = list(chain.from_iterable(stacked_names(source, self._cfg) for source in entry.source_names))
            known.update(names)
            if not isinstance(entry, Drop):
                missing += [name for name in names if name not in self._present]
        dropped = tuple(name.removesuffix("*") for name in known if name.endswith("*"))
        surplus = sorted(name for name in set(self._present) - known if not name.startswith(dropped))
        if missing or surplus:
            raise CheckpointError(_account(missing, surplus))


class _Reading(Mapping[str, Tensor]):
    """A checkpoint as a mapping from the names that rules use to tensors."""

    with_values: bool

    def __init__(self, conversion: Conversion) -> None:
        self._conversion = conversion

    def __getitem__(self, source: str) -> Tensor:
        return self._conversion.read(source, values=self.with_values)

    def __contains__(self, source: object) -> bool:
        return isinstance(source, str) and self._conversion.has(source)

    def __iter__(self) -> Iterator[str]:
        raise TypeError("a rule reads tensors by name: it cannot list them")

    def __len__(self) -> int:
        raise TypeError("a rule reads tensors by name: it cannot list them")


class _WithValues(_Reading):
    with_values = True


class _WithoutValues(_Reading):
    with_values = False


def block_entries(table: RuleTable, layer: int) -> list[Entry]:
    """Return the entries of one block, with its number in place of `{layer}`."""
    about = (entry for entry in table if is_per_layer(entry))
    return [entry.at(layer) for entry in about if entry.layers is None or layer in entry.layers]


def _without_prefix(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Each source name without its prefix -> the name in the checkpoint."""
    present: dict[str, str] = {}
    for name in names:
        bare = name.removeprefix(prefix)
        if bare in present:
            raise CheckpointError(f"the checkpoint has both {present[bare]!r} and {name!r}: two names of one tensor")
        present[bare] = name
    return present


def _check_table(entries: Sequence[Entry]) -> None:
    """Each source is used once (or once more as `again`), each target made once."""
    sources = Counter(chain.from_iterable(entry.source_names for entry in entries))
    targets = Counter(chain.from_iterable(entry.target_names for entry in entries))
    for what, counter in (("uses", sources), ("makes", targets)):
        twice = [name for name, count in counter.items() if count > 1]
        if twice:
            raise CheckpointError(f"the rule table {what} these tensors more than once: {_shortened(twice)}")


def _account(missing: list[str], surplus: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"lacks {len(missing)} tensors that the config implies: {_shortened(missing)}")
    if surplus:
        parts.append(f"has {len(surplus)} tensors that no rule accounts for: {_shortened(surplus)}")
    return "the checkpoint " + ", and ".join(parts)


def _shortened(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
