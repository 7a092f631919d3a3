"""The engine that turns HuggingFace tensors into ours and back, rule by rule, with every key accounted for.

A family's table holds entries. Each says which source tensors it reads and which of our tensors it makes, as data: the
same entry converts real tensors, checks shapes on tensors without values, and runs backwards for an export.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from einops import EinopsError, rearrange
from torch import Tensor

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.errors import CheckpointError

__all__ = [
    "Computed",
    "Constant",
    "Drop",
    "Entry",
    "Piece",
    "Product",
    "Rule",
    "RuleTable",
    "Split",
    "Tensors",
    "axis_sizes",
    "is_per_layer",
    "stacked_axis",
    "stacked_names",
]

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Entry(ABC):
    """One row of a rule table.

    Attributes:
        layers: the blocks that the row is about, if its names hold `{layer}`; None for all blocks.
    """

    layers: tuple[int, ...] | None = None

    @property
    @abstractmethod
    def source_names(self) -> tuple[str, ...]:
        """The source tensors it accounts for."""

    @property
    @abstractmethod
    def target_names(self) -> tuple[str, ...]:
        """Our tensors it makes."""

    @abstractmethod
    def at(self, layer: int) -> Self:
        """Return the entry for one block."""

    @abstractmethod
    def apply(self, tensors: Tensors, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
        """Return our tensors, as views of the sources wherever views will do.

        Args:
            tensors: the sources, by their names.
            cfg: the config that gives the sizes of the axes.

        Raises:
            CheckpointError: a source does not have the shape that the config implies.
        """

    @abstractmethod
    def invert(self, weights: Tensors, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
        """Return the source tensors that `apply` would make our `weights` from.

        Args:
            weights: our tensors, by their names.
            cfg: the config that gives the sizes of the axes.

        Raises:
            CheckpointError: there are none: the family has no tensor for a value that these weights hold.
        """


@dataclass(frozen=True)
class Rule(Entry):
    """One source tensor, or several stacked ones, and the tensors they become.

    Attributes:
        source: its name. `{layer}` stands for every block, `{pair}` and `{half}` for the number of its pair, and 0 or 1
            in it, where a layer of the checkpoint is two blocks; `{expert}`, `{head}` or `{kv_head}` for one tensor
            each, stacked along that axis, which then comes first in `axes`.
        axes: an einops pattern over the names of `names.AXES`, whose sizes are checked against the config; `group` is
            the query heads of a key-value head. With several targets the result's first axis is `part`.
        targets: our names for the result.
        again: another rule accounts for the source; this rule reads it a second time.
        scale, add: the values become `values * scale + add`.
        skip: the number of rows at the start that are left out.
        turn: the entries of the result's last axis are moved on by so many, and the last so many come first.
        sizes: the sizes of axes that only this family has.
    """

    source: str
    axes: str
    targets: str | tuple[str, ...]
    again: bool = False
    scale: float = 1.0
    add: float = 0.0
    skip: int = 0
    turn: int = 0
    sizes: tuple[tuple[str, int], ...] = ()

    @property
    def source_names(self) -> tuple[str, ...]:
        return () if self.again else (self.source,)

    @property
    def target_names(self) -> tuple[str, ...]:
        return (self.targets,) if isinstance(self.targets, str) else self.targets

    def at(self, layer: int) -> Self:
        targets = tuple(_in_layer(target, layer) for target in self.target_names)
        return replace(self, source=_in_layer(self.source, layer), targets=targets)

    def apply(self, tensors: Tensors, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
        source = tensors[self.source]
        result = _rearranged(self.source, source[self.skip :], self.axes, self._sizes(cfg))
        if self.scale != 1.0 or self.add:
            # In float64, so that the values are rounded once: when they are copied into a model.
            result = result.double() * self.scale + self.add
        if self.turn:
            result = result.roll(self.turn, -1)
        names = self.target_names
        return dict(zip(names, result if len(names) > 1 else [result], strict=True))

    def invert(self, weights: Tensors, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
        names = self.target_names
        result = torch.stack([weights[name] for name in names]) if len(names) > 1 else weights[names[0]]
        if self.scale != 1.0 or self.add:
            result = ((result.double() - self.add) / self.scale).to(result.dtype)
        if self.turn:
            result = result.roll(-self.turn, -1)
        result = rearrange(result, _reversed(self.axes), **_used(self.axes, self._sizes(cfg)))
        if self.skip:
            result = torch.cat((result.new_zeros(self.skip, *result.shape[1:]), result))
        return {self.source: result}

    def _sizes(self, cfg: HookedTransformerConfig) -> dict[str, int]:
        return {**axis_sizes(cfg), "part": len(self.target_names), **dict(self.sizes)}


@dataclass(frozen=True)
class Piece:
    """A part of a fused tensor.

    Attributes:
        target: our name for the part.
        size: the number of entries along the split axis: the name of an axis, or "1".
        axes: an einops pattern for the part; None for no rearrangement.
    """

    target: str
    size: str
    axes: str | None = None


@dataclass(frozen=True)
class Split(Entry):
    """One source tensor that holds parts of different sizes, such as queries and fewer keys and values.

    Attributes:
        source: its name.
        axes: an einops pattern. The first axis of its result is `part`, along which the pieces follow one another.
        pieces: the parts, in order.
    """

    source: str
    axes: str
    pieces: tuple[Piece, ...]

    @property
    def source_names(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def target_names(self) -> tuple[str, ...]:
        return tuple(piece.target for piece in self.pieces)

    def at(self, layer: int) -> Self:
        pieces = tuple(replace(piece, target=_in_layer(piece.target, layer)) for piece in self.pieces)
        return replace(self, source=_in_layer(self.source, layer), pieces=pieces)

    def apply(self, tensors: Tensors, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
        lengths, sizes = self._lengths(cfg), axis_sizes(cfg)
        whole = _rearranged(self.source, tensors[self.source], self.axes, {**sizes, "part": sum(lengths)})
        made = {}
        for piece, part in zip(self.pieces, torch.split(whole, lengths), strict=True):
            made[piece.target] = part if piece.axes is None else _rearranged(self.source, part, piece.axes, sizes)
        return made

    def invert(self, weights: Tensors, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
        sizes = axis_sizes(cfg)
        parts = [
            weights[piece.target]
            if piece.axes is None
            else rearrange(weights[piece.target], _reversed(piece.axes), **_used(piece.axes, sizes))
            for piece in self.pieces
        ]
        sizes["part"] = sum(self._lengths(cfg))
        return {self.source: rearrange(torch.cat(parts), _reversed(self.axes), **_used(self.axes, sizes))}

    def _lengths(self, cfg: HookedTransformerConfig) -> list[int]:
        sizes = axis_sizes(cfg)
        return [int(piece.size) if piece.size.isdigit() else sizes[piece.size] for piece in self.pieces]


@dataclass(frozen=True)
class Product(Entry):
    """Two source matrices that become one matrix, their product `left @ right`.

    Attributes:
        left, right: their names; a `.T` at the end means the transpose.
        target: our name for the product.
        again: those of the two that another entry accounts for.
    """

    left: str
    right: str
    target: str
    again: tuple[str, ...] = ()

    @property
    def source_names(self) -> tuple[str, ...]:
        names = (self.left.removesuffix(".T"), self.right.removesuffix(".T"))
        return tuple(name for name in names if name not in self.again)

    @property
    def target_names(self) -> tuple[str, ...]:
        return (self.target,)

    def at(self, layer: int) -> Self:
        left, right, target = (_in_layer(name, layer) for name in (self.left, self.right, self.target))
        return replace(self, left=left, right=right, target=target)

    def apply(self, tensors: Tensors, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
        left, right = (
            tensors[name.removesuffix(".T")].T if name.endswith(".T") else tensors[name]
            for name in (self.left, self.right)
        )
        if left.shape[-1] != right.shape[0]:
            raise CheckpointError(
                f"{self.left} has shape {tuple(left.shape)} and {self.right} {tuple(right.shape)}: they do not multiply"
            )
        # In float64, so that the values are rounded once: when they are copied into a model.
        return {self.target: left.double() @ right.double()}

    def invert(self, weights: Tensors, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
        raise CheckpointError(
            f"{self.target} was made as the product of {self.left} and {self.right}, which cannot be told apart again"
        )


@dataclass(frozen=True)
class Drop(Entry):
    """A source tensor that is left out on purpose.

    Attributes:
        source: its name; `{layer}` stands for every block. With `*` at its end, every tensor whose name begins so.
        reason: why it is not needed.
        value: the value that every entry has to have, which an export writes again, as a scalar; None for any values.
        axes: of a tensor that nothing reads and that transformers wants to be there: an export writes zeros; None for
            one that may be left out.
    """

    source: str
    reason: str
    value: float | None = None
    axes: str | None = None

    @property
    def source_names(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def target_names(self) -> tuple[str, ...]:
        return ()

    def at(self, layer: int) -> Self:
        return replace(self, source=_in_layer(self.source, layer))

    def apply(self, tensors: Tensors, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
        if self.value is not None and self.source in tensors:
            tensor = tensors[self.source]
            if not tensor.is_meta and not bool(torch.isclose(tensor.double(), torch.tensor(self.value).double()).all()):
                raise CheckpointError(f"{self.source} holds {tensor.tolist()}; only {self.value} is supported")
        return {}

    def invert(self, weights: Tensors, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
        if self.axes is not None:
            sizes = axis_sizes(cfg)
            return {self.source: torch.zeros([sizes[axis] for axis in self.axes.split()], dtype=cfg.dtype)}
        return {} if self.value is None else {self.source: torch.tensor(self.value, dtype=cfg.dtype)}


@dataclass(frozen=True)
class Constant(Entry):
    """A tensor of ours that the family's checkpoints lack: all its entries have one value.

    Attributes:
        target: our name; `{layer}` stands for every block.
        axes: the names of its axes.
        value: of its entries.
    """

    target: str
    axes: str
    value: float = 0.0

    @property
    def source_names(self) -> tuple[str, ...]:
        return ()

    @property
    def target_names(self) -> tuple[str, ...]:
        return (self.target,)

    def at(self, layer: int) -> Self:
        return replace(self, target=_in_layer(self.target, layer))

    def apply(self, tensors: Tensors, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
        sizes = axis_sizes(cfg)
        one = torch.tensor(self.value, dtype=cfg.dtype)
        # An expanded view of one number: it takes no memory until it is copied into a model.
        return {self.target: one.expand([sizes[axis] for axis in self.axes.split()])}

    def invert(self, weights: Tensors, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
        if not bool((weights[self.target] == self.value).all()):
            raise CheckpointError(f"{self.target} is not {self.value} everywhere, and this family has no place for it")
        return {}


@dataclass(frozen=True)
class Computed(Entry):
    """A tensor of ours that follows from the config alone.

    Attributes:
        target: our name.
        compute: a function that makes the tensor, in float32.
    """

    target: str
    compute: Callable[[HookedTransformerConfig], Tensor]

    @property
    def source_names(self) -> tuple[str, ...]:
        return ()

    @property
    def target_names(self) -> tuple[str, ...]:
        return (self.target,)

    def at(self, layer: int) -> Self:
        return replace(self, target=_in_layer(self.target, layer))

    def apply(self, tensors: Tensors, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
        return {self.target: self.compute(cfg)}

    def invert(self, weights: Tensors, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
        given = weights[self.target]
        if not torch.equal(given, self.compute(cfg).to(given)):
            raise CheckpointError(f"{self.target} has been changed, and this family computes it from its config")
        return {}


RuleTable = Sequence[Entry]


def axis_sizes(cfg: HookedTransformerConfig) -> dict[str, int]:
    """Return how long each axis of the glossary is in a model."""
    sizes = {
        "head": cfg.n_heads,
        "kv_head": cfg.n_kv_heads,
        "group": cfg.n_heads // cfg.n_kv_heads,
        "rotary": cfg.rotary_dim,
        "d_content": None if cfg.rotary_dim is None else cfg.d_head - cfg.rotary_dim,
        "d_model": cfg.d_model,
        "d_dense": None if cfg.unembed_act_fn is None else cfg.d_model,
        "d_mlp": cfg.d_mlp,
        "vocab": cfg.d_vocab,
        "vocab_out": cfg.d_vocab_out,
        "n_ctx": cfg.n_ctx,
        "expert": None if cfg.num_experts is None else cfg.weighted_experts,
        "choice": cfg.num_experts,
        "d_expert": cfg.d_mlp if cfg.d_expert is None else cfg.d_expert,
        "d_shared_expert": cfg.d_shared_expert,
        **cfg.attention_widths(),
        "1": 1,
    }
    return {axis: size for axis, size in sizes.items() if size is not None}


def _rearranged(name: str, tensor: Tensor, axes: str, sizes: Mapping[str, int]) -> Tensor:
    used = _used(axes, sizes)
    try:
        return rearrange(tensor, axes, **used)
    except EinopsError as error:
        raise CheckpointError(
            f"{name} has shape {tuple(tensor.shape)}, which is not {axes.split('->')[0].strip()!r} "
            f"with {used}: the weights do not belong to this config"
        ) from error


def _used(axes: str, sizes: Mapping[str, int]) -> dict[str, int]:
    named = re.findall(r"[a-z]\w*", axes)
    return {axis: size for axis, size in sizes.items() if axis in named}


def _reversed(axes: str) -> str:
    left, right = axes.split("->")
    return f"{right.strip()} -> {left.strip()}"


def is_per_layer(entry: Entry) -> bool:
    """Return whether an entry is about every block: its names hold `{layer}`, or `{pair}`."""
    return any("{layer}" in name or "{pair}" in name for name in (*entry.source_names, *entry.target_names))


def _in_layer(name: str, layer: int) -> str:
    name = name.replace("{layer}", str(layer))
    return name.replace("{pair}", str(layer // 2)).replace("{half}", str(layer % 2))


_STACKED = re.compile(r"\{(expert|head|kv_head)\}")


def stacked_axis(source: str) -> str | None:
    """Return the axis along which the tensors of a rule's `source` are stacked; None for one tensor."""
    found = _STACKED.search(source)
    return None if found is None else found[1]


def stacked_names(source: str, cfg: HookedTransformerConfig) -> list[str]:
    """Return the source names that a rule's `source` stands for: one, or one per expert or head.

    Args:
        source: a source name, with or without a place for an index.
        cfg: the config that gives the number of experts and heads.
    """
    axis = stacked_axis(source)
    if axis is None:
        return [source]
    return [source.replace(f"{{{axis}}}", str(index)) for index in range(axis_sizes(cfg)[axis])]
