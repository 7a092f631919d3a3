"""The engine that turns HuggingFace tensors into ours, rule by rule, with every key accounted for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from einops import EinopsError, rearrange
from torch import Tensor

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.errors import CheckpointError


@dataclass(frozen=True)
class Rule:
    """One source tensor and the tensors it becomes.

    Attributes:
        source: its name; `{layer}` stands for every block.
        axes: an einops pattern over the names of `names.AXES`, whose sizes are checked against the config. With
            several targets the result's first axis is `part`.
        targets: our names for the result.
        tied: the source has its own rule already; this one reads it once more (tied embeddings).
    """

    source: str
    axes: str
    targets: tuple[str, ...]
    tied: bool = False

    def at(self, layer: int) -> Rule:
        """Return the rule for one block."""
        targets = tuple(target.format(layer=layer) for target in self.targets)
        return replace(self, source=self.source.format(layer=layer), targets=targets)

    def apply(self, tensor: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Return the targets as views of the source, wherever views will do.

        Raises:
            CheckpointError: the tensor does not have the shape that the config implies.
        """
        known = {**sizes, "part": len(self.targets)}
        used = {axis: size for axis, size in known.items() if axis in re.findall(r"\w+", self.axes)}
        try:
            result = rearrange(tensor, self.axes, **used)
        except EinopsError as error:
            raise CheckpointError(
                f"{self.source} has shape {tuple(tensor.shape)}, which is not {self.axes.split('->')[0].strip()!r} "
                f"with {used}: the weights do not belong to this config"
            ) from error
        return dict(zip(self.targets, result if len(self.targets) > 1 else [result], strict=True))


@dataclass(frozen=True)
class Drop:
    """A source tensor that is left out on purpose.

    Attributes:
        source: its name; `{layer}` stands for every block.
        reason: why it is not needed.
    """

    source: str
    reason: str


@dataclass(frozen=True)
class Zeros:
    """A tensor of ours that a family does not have and that is zero there.

    Attributes:
        target: our name; `{layer}` stands for every block.
        axes: the names of its axes.
    """

    target: str
    axes: str


RuleTable = Sequence[Rule | Drop | Zeros]


def axis_sizes(cfg: HookedTransformerConfig) -> dict[str, int]:
    """Return how long each axis of the glossary is in a model."""
    sizes = {
        "head": cfg.n_heads,
        "kv_head": cfg.n_kv_heads,
        "d_head": cfg.d_head,
        "d_model": cfg.d_model,
        "d_mlp": cfg.d_mlp,
        "vocab": cfg.d_vocab,
        "vocab_out": cfg.d_vocab_out,
        "n_ctx": cfg.n_ctx,
        "expert": cfg.num_experts,
    }
    return {axis: size for axis, size in sizes.items() if size is not None}


def convert(
    table: RuleTable,
    tensors: Mapping[str, Tensor],
    cfg: HookedTransformerConfig,
    prefix: str = "",
    keep_layers: int | None = None,
) -> dict[str, Tensor]:
    """Apply a family's rules to a checkpoint.

    Args:
        table: the rules.
        tensors: source name -> tensor, read when asked for.
        cfg: of the whole checkpoint.
        prefix: may stand before every source name, and may be absent.
        keep_layers: convert only so many blocks; the others' tensors are left unread.

    Returns:
        Our names -> tensors, mostly views of the sources.

    Raises:
        CheckpointError: a tensor is missing, is surplus, or has the wrong shape; all offenders are named.
    """
    present = _without_prefix(tensors, prefix)
    kept = cfg.n_layers if keep_layers is None else keep_layers
    rules, zeros, known = _expand(table, cfg.n_layers)
    _check_table(rules, zeros)
    missing = [rule.source for rule in rules if rule.source not in present]
    surplus = sorted(set(present) - known)
    if missing or surplus:
        raise CheckpointError(_account(missing, surplus))
    sizes = axis_sizes(cfg)
    weights: dict[str, Tensor] = {}
    for rule in rules:
        if not _beyond(rule.targets[0], kept):
            weights |= rule.apply(tensors[present[rule.source]], sizes)
    like = next(iter(weights.values()))
    for zero in zeros:
        if not _beyond(zero.target, kept):
            shape = [sizes[axis] for axis in zero.axes.split()]
            weights[zero.target] = torch.zeros(shape, dtype=like.dtype, device=like.device)
    return weights


def _expand(table: RuleTable, n_layers: int) -> tuple[list[Rule], list[Zeros], set[str]]:
    """The rules and zeros of every block, and every source name that is accounted for."""
    rules: list[Rule] = []
    zeros: list[Zeros] = []
    known: set[str] = set()
    for entry in table:
        if isinstance(entry, Drop):
            known.update(_per_layer(entry.source, n_layers))
        elif isinstance(entry, Zeros):
            zeros += [replace(entry, target=target) for target in _per_layer(entry.target, n_layers)]
        else:
            rules += [entry.at(layer) for layer in range(n_layers)] if "{layer}" in entry.source else [entry]
    known.update(rule.source for rule in rules)
    return rules, zeros, known


def _without_prefix(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Each source name without its prefix -> as it stands."""
    present: dict[str, str] = {}
    for name in names:
        bare = name.removeprefix(prefix)
        if bare in present:
            raise CheckpointError(f"the checkpoint has both {present[bare]!r} and {name!r}: which one is meant?")
        present[bare] = name
    return present


def _check_table(rules: Sequence[Rule], zeros: Sequence[Zeros]) -> None:
    """Each source is used once (or once more as `tied`), each target made once."""
    sources = Counter(rule.source for rule in rules if not rule.tied)
    targets = Counter([*chain.from_iterable(rule.targets for rule in rules), *(zero.target for zero in zeros)])
    for what, counter in (("uses", sources), ("makes", targets)):
        twice = [name for name, count in counter.items() if count > 1]
        if twice:
            raise CheckpointError(f"the rule table {what} these tensors more than once: {_shortened(twice)}")


def _per_layer(name: str, n_layers: int) -> Iterator[str]:
    if "{layer}" not in name:
        yield name
        return
    for layer in range(n_layers):
        yield name.format(layer=layer)


def _beyond(target: str, kept: int) -> bool:
    match = re.match(r"blocks\.(\d+)\.", target)
    return match is not None and int(match[1]) >= kept


def _account(missing: list[str], surplus: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"lacks {len(missing)} tensors that the config implies: {_shortened(missing)}")
    if surplus:
        parts.append(f"has {len(surplus)} tensors that no rule accounts for: {_shortened(surplus)}")
    return "the checkpoint " + ", and ".join(parts)


def _shortened(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
