"""plan_cell: the layer, stage and position at which a cell of a sweep first changes the run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from hooked_lm.config import HookedTransformerConfig
from hooked_lm.interventions import Intervention

__all__ = ["Stage", "SweepCell", "plan_cell", "reads_per_head"]


class Stage(IntEnum):
    """The points of a block at which a cell's rows can join the incremental forward, in the order of computation."""

    START = 0  # with the residual at the block's input
    Z = 1  # with the heads' z
    MID = 2  # with the residual at the MLP's input
    END = 3  # with the residual after the block


@dataclass(frozen=True)
class SweepCell:
    """One cell of a sweep: interventions that are made together.

    Attributes:
        index: its place in the result.
        layer, stage: where its rows join; `n_layers` and START for the final norm and the unembedding.
        first: the first position that it can change.
        at_entry: interventions made on the base run's activation when the rows join; all at one site.
        on_the_way: all other interventions, made by hooks.
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
# The order of sites that share a stage: a site later in the block can still be edited by a hook.
_ORDER = {"hook_attn_out": 0, "hook_resid_mid": 1, "hook_mlp_out": 1, "hook_resid_post": 2}
_HEAD_INPUTS = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")
_MLP_SITE = re.compile(r"(mlp|ln2|ln2_post)\.|hook_mlp_in")
_BLOCK_SITE = re.compile(r"blocks\.(\d+)\.(.+)")


def plan_cell(
    index: int, interventions: Sequence[Intervention], cfg: HookedTransformerConfig, n_positions: int
) -> SweepCell | None:
    """Return where a cell joins the incremental forward; None if it has to be run by itself.

    Cells are run by themselves if they edit activations before the first block, the logits, or both a norm and the
    per-head inputs behind it: the norm's hooks would act on rows of other cells too.

    Args:
        index: the cell's place in the result.
        interventions: of the cell.
        cfg: the model's config.
        n_positions: the length of the prompts.
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
    # If one edit of the first site needs a hook, the rows join before that site, and hooks make all its edits.
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
    """Return the intervention with positions counted from the start, since rows may lack the first positions."""
    pos = intervention.pos
    if pos is None:
        return replace(intervention, pos=tuple(range(n_positions)))
    return replace(
        intervention, pos=tuple(one % n_positions for one in pos) if isinstance(pos, tuple) else pos % n_positions
    )


def reads_per_head(interventions: Sequence[Intervention]) -> bool:
    """Return whether interventions edit per-head inputs.

    Args:
        interventions: of a cell.
    """
    return any(one.site.endswith(_HEAD_INPUTS) for one in interventions)


def _is_reached(site: str) -> bool:
    return _BLOCK_SITE.fullmatch(site) is not None or site.startswith("ln_final.")


def _suffix(site: str) -> str:
    match = _BLOCK_SITE.fullmatch(site)
    return match[2] if match else site


def _entry(site: str, cfg: HookedTransformerConfig) -> tuple[int, int, int]:
    """Return the layer, stage and order within the stage of a site."""
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
