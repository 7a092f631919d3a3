"""Weights without a place in a family's checkpoints, after training: folded into others, or left out and named."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.errors import CheckpointError
from weight_conversion.rules import Constant, Entry, Rule

__all__ = ["fitted"]

Weights = dict[str, Tensor]


def fitted(entries: Sequence[Entry], cfg: HookedTransformerConfig, weights: Mapping[str, Tensor]) -> Weights:
    """Return weights that compute the same and fit a family's checkpoints, as far as there are such weights.

    A value bias goes into attention's output bias, a key bias that shifts all scores of a query alike is left out, and
    two norms that are one tensor there become one, the difference folded into the MLP's weights.

    Args:
        entries: the family's rules, of every block.
        cfg: the model's config.
        weights: the model's tensors, by their names; they are left as they are.

    Raises:
        CheckpointError: two norms that are one tensor there differ, and the difference cannot be folded.

    Warns:
        UserWarning: other weights without a place are no longer what they are in these checkpoints: they are set to
            that, which changes what the model computes.
    """
    fitting: Weights = dict(weights)
    constants = {entry.target: entry for entry in entries if isinstance(entry, Constant)}
    for one, other in _shared(entries):
        if not torch.equal(fitting[one], fitting[other]):
            _join_norms(one.rpartition(".")[0], other.rpartition(".")[0], constants, fitting)
    dropped = []
    for name, entry in constants.items():
        if bool((fitting[name] == entry.value).all()):
            continue
        if not _folded(name, cfg, constants, fitting):
            moved = float((fitting[name] - entry.value).abs().max())
            dropped.append(f"{name} (by up to {moved:.2g} from {entry.value:g})")
        fitting[name] = torch.full_like(fitting[name], entry.value)
    if dropped:
        warnings.warn(
            f"this family's checkpoints have no place for {_listed(dropped)}, which training has moved: they are left "
            "out, so the written model computes something else. To train what can be written, freeze them "
            "(requires_grad_(False))",
            stacklevel=4,
        )
    return fitting


def _shared(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """Return pairs of gains, or biases, of a block's two norms that are one tensor of the checkpoint."""
    by_source: dict[str, str] = {}
    pairs = []
    for entry in entries:
        if isinstance(entry, Rule) and entry.target_names[0].partition(".ln")[2][:2] in ("1.", "2."):
            (target,) = entry.target_names
            first = by_source.setdefault(entry.source, target)
            if first != target:
                pairs.append((first, target))
    return pairs


def _join_norms(ln1: str, ln2: str, constants: dict[str, Constant], weights: Weights) -> None:
    """Give a block's second norm the gain and bias of the first, and the MLP weights that make up for it."""
    block = ln1.rpartition(".")[0]
    gain, other_gain = weights[f"{ln1}.w"].double(), weights[f"{ln2}.w"].double()
    if bool((gain == 0).any()) or any(name.startswith(f"{block}.mlp.W_router") for name in weights):
        raise CheckpointError(
            f"{ln1} and {ln2} are one norm in this family's checkpoints, and they now differ in a way that cannot be "
            "folded into the MLP"
        )
    ratio = other_gain / gain
    bias, other_bias = (weights.get(f"{ln}.b", torch.zeros_like(gain)).double() for ln in (ln1, ln2))
    shift = other_bias - bias * ratio
    for reader in ("W_in", "W_gate"):
        name, b = f"{block}.mlp.{reader}", f"{block}.mlp.{reader.replace('W', 'b')}"
        if name not in weights:
            continue
        W = weights[name].double()
        added = shift @ W
        if b in constants and bool((added != 0).any()):
            raise CheckpointError(
                f"{ln1}.b and {ln2}.b are one tensor in this family's checkpoints, and they now differ, for which "
                f"{b} would have to make up: it has no place there either"
            )
        weights[b] = (weights[b].double() + added).to(weights[b].dtype)
        weights[name] = (ratio[:, None] * W).to(weights[name].dtype)
    for part in ("w", "b"):
        if f"{ln2}.{part}" in weights:
            weights[f"{ln2}.{part}"] = weights[f"{ln1}.{part}"]


def _folded(name: str, cfg: HookedTransformerConfig, constants: dict[str, Constant], weights: Weights) -> bool:
    """Fold a weight into others, or see that it has no effect; return whether that is so."""
    prefix, _, last = name.rpartition(".")
    # A pattern's rows sum to one, so that every query gets the whole bias; not with sinks, nor if values are clipped or
    # multiplied by a gate.
    whole = cfg.clip_qkv is None and not cfg.attention_sinks and not cfg.attention_gate
    if last == "b_V" and whole and f"{prefix}.b_O" in weights and f"{prefix}.b_O" not in constants:
        weights[f"{prefix}.b_O"] = weights[f"{prefix}.b_O"] + _written(weights[name], weights[f"{prefix}.W_O"])
        return True
    # A query's scores with all keys change by the same number.
    shifts_alike = cfg.positional_embedding_type != "rotary" and not cfg.use_qk_norm and cfg.clip_qkv is None
    return last == "b_K" and shifts_alike and cfg.attn_scores_soft_cap <= 0 and not cfg.attention_sinks


def _written(b_V: Tensor, W_O: Tensor) -> Tensor:
    """Return what value biases [kv_head d_head] add to the stream, by way of `W_O` [head d_head d_model]."""
    of_heads = b_V.repeat_interleave(len(W_O) // len(b_V), 0)
    return torch.einsum("hd,hdm->m", of_heads.double(), W_O.double()).to(W_O.dtype)


def _listed(parts: list[str]) -> str:
    shown = 6
    return ", ".join(parts[:shown]) + (f" and {len(parts) - shown} more" if len(parts) > shown else "")
