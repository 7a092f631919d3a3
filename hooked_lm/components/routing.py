"""How a mixture's router weights experts, and which of them it chooses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooked_lm.config import HookedTransformerConfig

__all__ = ["among_best_groups", "expert_weights", "rescaled", "sparsemixer_weights"]


def expert_weights(
    scores: Float[Tensor, "batch pos expert"], cfg: HookedTransformerConfig
) -> Float[Tensor, "batch pos expert"]:
    """Return the weight of every expert, in float32 at least: in low precision, different ones would round to equal.

    Args:
        scores: the router's, of every expert.
        cfg: says whether weights are a softmax, sigmoids or SparseMixer's.
    """
    if cfg.sparsemixer_jitter is not None:
        return sparsemixer_weights(scores, cfg.sparsemixer_jitter)
    precision = torch.promote_types(scores.dtype, torch.float32)
    return scores.to(precision).sigmoid() if cfg.router_scores == "sigmoid" else F.softmax(scores, -1, dtype=precision)


def sparsemixer_weights(scores: Float[Tensor, "batch pos expert"], jitter: float) -> Float[Tensor, "batch pos expert"]:
    """Return the weights of SparseMixer: two are not zero, those of the two highest scores.

    Each is the softmax over the experts whose scores are close to it (Liu et al. 2024, "GRIN").

    Args:
        scores: the router's, of every expert.
        jitter: how close.
    """
    weights, rest = torch.zeros_like(scores), scores
    for _ in range(2):
        best, winner = rest.max(dim=-1, keepdim=True)
        with torch.no_grad():
            far = (best - scores) / scores.abs().clamp(min=best) > 2 * jitter
        share = F.softmax(rest.masked_fill(far, float("-inf")), dim=-1).gather(-1, winner)
        weights = weights.scatter(-1, winner, share)
        rest = rest.scatter(-1, winner, float("-inf"))
    return weights


def among_best_groups(
    weights: Float[Tensor, "batch pos expert"], cfg: HookedTransformerConfig
) -> Float[Tensor, "batch pos expert"]:
    """Return the weights by which experts are chosen: minus infinity in groups that a token does not choose from.

    Args:
        weights: of every expert; neighbours stand in one group.
        cfg: says how many groups there are, and how many of them a token chooses by what.
    """
    if cfg.expert_groups is None or cfg.expert_groups_per_token is None:
        return weights
    grouped = weights.unflatten(-1, (cfg.expert_groups, -1))
    best = grouped.topk(2, dim=-1).values.sum(-1) if cfg.expert_group_score == "top2" else grouped.amax(-1)
    chosen = best.topk(cfg.expert_groups_per_token, dim=-1).indices
    left_out = torch.ones_like(best, dtype=torch.bool).scatter(-1, chosen, False)
    among: Tensor = grouped.masked_fill(left_out[..., None], float("-inf"))
    return among.flatten(-2)


def rescaled(
    weights: Float[Tensor, "batch pos chosen"], cfg: HookedTransformerConfig
) -> Float[Tensor, "batch pos chosen"]:
    """Return the chosen experts' weights as their outputs are multiplied by them.

    Args:
        weights: as the router gave them.
        cfg: says whether they are made to sum to one, and by what they are multiplied.
    """
    if cfg.norm_topk_prob and cfg.sparsemixer_jitter is None:
        # If hooks have made all weights of a token zero, the output is zero rather than 0 / 0. Weights that hooks have
        # made negative are rescaled as others are.
        total = weights.sum(-1, keepdim=True)
        if cfg.norm_topk_min > 0:
            total = total.clamp(min=cfg.norm_topk_min)
        weights = weights / total.masked_fill(total == 0, 1.0)
    return weights if cfg.routed_scale == 1.0 else weights * cfg.routed_scale
