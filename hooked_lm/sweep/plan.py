"""Where a cell of a sweep first changes the run: in which layer, where in the block, from which position on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from hooked_lm.config import HookedTransformerConfig
from hooked_lm.interventions import Intervention

__all__ = ["Stage", "SweepCell", "plan_cell", "reads_per_head"]


class Stage(IntEnum):
    """The points of a block at which a cell's rows can join the walk, in the order of computation."""

    START = 0  # with the stream that enters the block
    Z = 1  # with what the heads have gathered
    MID = 2  # with the stream that the MLP reads
    END = 3  # with the stream that leaves the block


@dataclass(frozen=True)
class SweepCell:
    """One cell: interventions that are made together.

    Attributes:
        index: its place in the result.
        layer, stage: where its rows join the walk; `n_layers` and START for the final norm and the unembedding.
        first: the first position that it can change.
        at_entry: the interventions that are made on the base run's activation as the rows join; all at one site.
        on_the_way: the others, made by hooks.
    """

    index: int
    layer: int
    stage: Stage
    first: int
    at_entry: tuple[Intervention, ...]
    on_the_way: tuple[Intervention, ...]


# Sites whose edit can be made on the base run's value: the rows then join after them.
_ENTRIES = {
    "hook_resid_pre": Stage.START,
    "attn.hook_z": Stage.Z,
    "hook_attn_out": Stage.MID,
    "hook_resid_mid": Stage.MID,
    "hook_mlp_out": Stage.END,
    "hook_resid_post": Stage.END,
}
# The order of those that share a stage: what comes later in the block can still be edited by the way.
_ORDER = {"hook_attn_out": 0, "hook_resid_mid": 1, "hook_mlp_out": 1, "hook_resid_post": 2}
_HEAD_INPUTS = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")
_MLP_SITE = re.compile(r"(mlp|ln2|ln2_post)\.|hook_mlp_in")
_BLOCK_SITE = re.compile(r"blocks\.(\d+)\.(.+)")


def plan_cell(
    index: int, interventions: Sequence[Intervention], cfg: HookedTransformerConfig, n_positions: int
) -> SweepCell | None:
    """Return how a cell enters the walk.

    None if it cannot: if it changes what comes before the first block, or the logits themselves, or both a norm and
    what single heads read past it, where rows of other cells would be in the way.
    """
    if any(not _is_reached(one.site) for one in interventions):
        return None
    if reads_per_head(interventions) and any(".ln1." in one.site for one in interventions):
        return None
    keys = [_entry(one.site, cfg) for one in interventions]
    layer, stage, order = min(keys)
    at_entry = tuple(
        one
        for one, key in zip(interventions, keys, strict=True)
        if key == (layer, stage, order) and _suffix(one.site) in _ENTRIES
    )
    # A site that is edited by a hook does not let anything enter past it.
    if len(at_entry) < sum(key == (layer, stage, order) for key in keys):
        at_entry = ()
    return SweepCell(
        index=index,
        layer=layer,
        stage=Stage(stage),
        first=min(_first_position(one, n_positions) for one in interventions),
        at_entry=at_entry,
        on_the_way=tuple(_at_positions(one, n_positions) for one in interventions if one not in at_entry),
    )


def _at_positions(intervention: Intervention, n_positions: int) -> Intervention:
    """The same intervention with its positions counted from the start, since rows do not hold all of them."""
    pos = intervention.pos
    if pos is None:
        return replace(intervention, pos=tuple(range(n_positions)))
    return replace(
        intervention, pos=tuple(one % n_positions for one in pos) if isinstance(pos, tuple) else pos % n_positions
    )


def reads_per_head(interventions: Sequence[Intervention]) -> bool:
    """Return whether heads are given inputs of their own."""
    return any(one.site.endswith(_HEAD_INPUTS) for one in interventions)


def _is_reached(site: str) -> bool:
    return _BLOCK_SITE.fullmatch(site) is not None or site.startswith("ln_final.")


def _suffix(site: str) -> str:
    match = _BLOCK_SITE.fullmatch(site)
    return match[2] if match else site


def _entry(site: str, cfg: HookedTransformerConfig) -> tuple[int, int, int]:
    """The layer, stage and order within the stage of a site."""
    match = _BLOCK_SITE.fullmatch(site)
    if match is None:
        return cfg.n_layers, Stage.START, 0
    layer, suffix = int(match[1]), match[2]
    stage = _ENTRIES.get(suffix, Stage.START)
    if _MLP_SITE.match(suffix) and not cfg.parallel_attn_mlp:
        return layer, Stage.MID, 2
    if suffix == "hook_attn_out" and (cfg.parallel_attn_mlp or cfg.attn_only):
        stage = Stage.END
    return layer, stage, _ORDER.get(suffix, 0) if suffix in _ENTRIES else 0


def _first_position(intervention: Intervention, n_positions: int) -> int:
    pos = intervention.pos
    if pos is None:
        return 0
    return min(one % n_positions for one in (pos if isinstance(pos, tuple) else (pos,)))
