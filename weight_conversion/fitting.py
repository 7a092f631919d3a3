"""Weights without a place in a family's checkpoints, after training: folded into others, or left out and named."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.rules import Constant, Entry, Rule

__all__ = ["fitted"]

Weights = dict[str, Tensor]

# The matrices [... d_model out] that read the first norm of a block and the second, in families that share the two.
_READERS = (
    ("attn.W_Q", "attn.W_K", "attn.W_V"),
    ("mlp.W_in", "mlp.W_gate", "mlp.W_router", "mlp.W_shared_gate", "mlp.shared.W_in", "mlp.shared.W_gate"),
)


def fitted(entries: Sequence[Entry], cfg: HookedTransformerConfig, weights: Mapping[str, Tensor]) -> Weights:
    """Return weights that compute the same and fit a family's checkpoints, as far as there are such weights.

    A value bias goes into attention's output bias, a key bias that shifts all scores of a query alike is left out, and
    two norms that are one tensor there become one, the difference folded into the weights that read them.

    Args:
        entries: the family's rules, of every block.
        cfg: the model's config.
        weights: the model's tensors, by their names; they are left as they are.

    Warns:
        UserWarning: other weights without a place are no longer what they are in these checkpoints: they are set to
            that, which changes what the model computes.
    """
    fitting: Weights = dict(weights)
    constants = {entry.target: entry for entry in entries if isinstance(entry, Constant)}
    dropped: list[str] = []
    for one, other in _shared(entries):
        if not torch.equal(fitting[one], fitting[other]):
            dropped += _join_norms(one.rpartition(".")[0], other.rpartition(".")[0], constants, fitting)
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


def _join_norms(ln1: str, ln2: str, constants: Mapping[str, Constant], weights: Weights) -> list[str]:
    """Give a block's two norms one gain and one bias, and what reads them the weights that make up for it.

    Returns the biases that nothing can make up for, as they are named to the user.
    """
    block, norms = ln1.rpartition(".")[0], (ln1, ln2)
    gains = [weights[f"{ln}.w"].double() for ln in norms]
    # Where the first is zero, no weights of the MLP make up for that; zeros in attention's do for the second.
    gain = torch.where(gains[0] == 0, gains[1], gains[0])
    # A bias that the family's checkpoints lack is left out like any other such weight.
    biases = [
        weights[f"{ln}.b"].double() if f"{ln}.b" in weights and f"{ln}.b" not in constants else torch.zeros_like(gain)
        for ln in norms
    ]
    lost = []
    for ln, own, own_bias, readers in zip(norms, gains, biases, _READERS, strict=True):
        ratio = torch.where(gain == 0, 1.0, own / torch.where(gain == 0, 1.0, gain))
        shift = own_bias - biases[0] * ratio
        reached = [
            _reads_norm_of(f"{block}.{reader}", ratio, shift, constants, weights)
            for reader in readers
            if f"{block}.{reader}" in weights
        ]
        if not all(reached):
            lost.append(f"{ln}.b (by up to {float(shift.abs().max()):.2g} from what {ln1} and {ln2} share)")
    for ln in norms:
        weights[f"{ln}.w"] = gain.to(weights[f"{ln}.w"].dtype)
        if f"{ln}.b" in weights and f"{ln}.b" not in constants:
            weights[f"{ln}.b"] = weights[f"{ln1}.b"]
    return lost


def _reads_norm_of(
    name: str, ratio: Tensor, shift: Tensor, constants: Mapping[str, Constant], weights: Weights
) -> bool:
    """Scale the input of a matrix [... d_model out], and shift it by way of its bias; return whether that can be."""
    W = weights[name].double()
    weights[name] = (ratio[:, None] * W).to(weights[name].dtype)
    added = shift @ W
    bias = re.sub(r"\.W_(\w+)$", r".b_\1", name)
    if bias in constants:
        return not bool((added != 0).any())
    weights[bias] = (weights[bias].double() + added).to(weights[bias].dtype)
    return True


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
