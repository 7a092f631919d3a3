"""Attribution patching of queries and keys by way of the attention that they would cause.

A gradient through a saturated softmax is near zero. So here attention is computed anew from the clean queries or keys,
and only the effect of its output z is taken to first order (Kramar et al. 2024, "AtP*: An efficient and scalable method
for localizing LLM behaviour to components").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from hooked_lm.components import Attention, SequenceLayout
from hooked_lm.components.stock import not_stock
from hooked_lm.hooked_model import HookedModel
from hooked_lm.hooks import HookPoint
from hooked_lm.names import get_act_name
from hooked_lm.patching.patches import Patch

__all__ = ["DifferentiatedRun", "HeadAttention", "attention_effects", "attention_sites", "check_attention"]


@dataclass(frozen=True, eq=False)
class DifferentiatedRun:
    """The corrupted run: its score, and at each site its activation and the score's gradient.

    Attributes:
        score: the metric.
        values: full hook name -> activation.
        grads: full hook name -> gradient of the metric by that activation.
    """

    score: float
    values: dict[str, Tensor]
    grads: dict[str, Tensor]


def check_attention(model: HookedModel) -> None:
    """Check that attention may be computed from queries and keys by the stages of `Attention`.

    Args:
        model: the model.

    Raises:
        ValueError: some layer's attention is not as this package wrote it, and may do something else.
    """
    for layer in range(model.cfg.n_layers):
        reason = not_stock(model.blocks[layer].attn, name=f"blocks.{layer}.attn")
        if reason is not None:
            raise ValueError(
                f"qk_fix computes attention anew from queries and keys, as the stock Attention does, but {reason}"
                ": leave qk_fix out, or patch queries and keys exactly"
            )


def attention_sites(model: HookedModel) -> list[str]:
    """Return the hook names of the activations from which attention is computed anew, and of its z.

    Args:
        model: the model.
    """
    names = (*"qkvz", "gate") if model.cfg.attention_gate else "qkvz"
    return [get_act_name(name, layer) for name in names for layer in range(model.cfg.n_layers)]


@torch.no_grad()
def attention_effects(
    model: HookedModel, patch: Patch, clean: Mapping[str, Tensor], run: DifferentiatedRun, layout: SequenceLayout
) -> Float[Tensor, "layer ..."]:
    """Return the gradient by z times the change of z that a patched query or key causes.

    Args:
        model: the model, whose attention is stock.
        patch: a grid of queries or keys.
        clean: full hook name -> clean activation [batch ...].
        run: the corrupted run.
        layout: of the corrupted prompts.
    """
    layers = []
    for layer in range(model.cfg.n_layers):
        attention = HeadAttention(model.blocks[layer].attn, run, layer, layout)
        patched = clean[patch.site(layer)].to(attention.q)
        if patch.activation == "q":
            layers.append(attention.effect_of_queries(patched, by_pos="pos" in patch.axes))
        elif "pos" in patch.axes:
            layers.append(attention.effect_of_each_key(patched))
        else:
            layers.append(attention.effect_of_all_keys(patched))
    return torch.stack([effect.to(layout.device) for effect in layers])


class HeadAttention:
    """One layer's attention in the corrupted run, with queries or keys exchanged.

    Args:
        attn: the layer's attention.
        run: the corrupted run, with the activations that `attention_sites` names.
        layer: the layer.
        layout: of the corrupted prompts.
    """

    def __init__(self, attn: Attention, run: DifferentiatedRun, layer: int, layout: SequenceLayout) -> None:
        self.attn = attn
        self.q, self.k, self.v, self.z = (run.values[get_act_name(name, layer)] for name in "qkvz")
        self.layout = layout.on(self.q.device)
        self.gate = run.values[get_act_name("gate", layer)] if attn.has_gate else None
        self.z_grad = run.grads[get_act_name("z", layer)]
        self.group = self.q.shape[2] // self.k.shape[2]

    def effect_of_queries(self, q: Tensor, by_pos: bool) -> Tensor:
        """Return the effects of the clean queries, [pos head] or [head]. A query changes its own position only.

        Args:
            q: clean queries [batch pos head d_head].
            by_pos: one effect for each position.
        """
        axes = "batch pos head d_head"
        change = self.gathered(q, self.k)[0] - self.z
        return einsum(self.z_grad, change, f"{axes}, {axes} -> {'pos head' if by_pos else 'head'}")

    def effect_of_all_keys(self, k: Tensor) -> Float[Tensor, " kv_head"]:
        """Return the effects of the clean keys, each head's at all positions.

        Args:
            k: clean keys [batch pos kv_head d_head].
        """
        change = self.gathered(self.q, k)[0] - self.z
        effect = einsum(self.z_grad, change, "batch pos head d_head, batch pos head d_head -> head")
        return effect.reshape(-1, self.group).sum(-1)

    def effect_of_each_key(self, k: Tensor) -> Float[Tensor, "pos kv_head"]:
        """Return the effects of the clean keys, one by one, from two sets of scores.

        A new score `s'` at one key turns its share of the attention from `sigmoid(s - r)` into `sigmoid(s' - r)`, where
        `r` is the log-sum-exp of the other keys' scores. The other keys lose the same share, each in proportion to its
        own. So the effect is the gained share, times the worth of attention to this key less the mean worth of
        attention to the others, where worth is the gradient by z times the value at the key.

        Args:
            k: clean keys [batch pos kv_head d_head].
        """
        v = self.v.repeat_interleave(self.group, 2)
        mixed_grad = self.attn.gated(self.z_grad, self.gate)
        worth = einsum(mixed_grad, v, "batch query head d_head, batch key head d_head -> batch head query key")
        scores, changed = (self.gathered(self.q, keys)[1].double() for keys in (self.k, k))
        columns, worths = scores, worth.double()
        if self.attn.sinks is not None:  # they take attention and give nothing
            sinks = self.attn.sinks.double()[:, None, None].expand(*scores.shape[:-1], 1)
            columns, worths = torch.cat((scores, sinks), -1), torch.nn.functional.pad(worths, (0, 1))
        rest, mean_worth = (one[..., : scores.shape[-1]] for one in _of_the_others(columns, worths))
        gain = (changed - rest).sigmoid() - (scores - rest).sigmoid()
        effect = torch.where(scores > float("-inf"), gain * (worth - mean_worth), 0.0)
        by_head = effect.sum((0, 2)).T  # [pos head]
        return by_head.reshape(by_head.shape[0], -1, self.group).sum(-1)

    def gathered(self, q: Tensor, k: Tensor) -> tuple[Tensor, Float[Tensor, "batch head query key"]]:
        """Return z and the scores for queries and keys as their hook points show them.

        Args:
            q: [batch pos head d_head].
            k: [batch pos kv_head d_head].
        """
        seen: list[Tensor] = []

        def record(scores: Tensor, hook: HookPoint) -> None:
            seen.append(scores)

        handle = self.attn.hook_attn_scores.add_hook(record, reads_only=True)
        try:
            mixed = self.attn.eager_attention(*self.attn.with_positions(q, k, self.layout), self.v, self.layout)
        finally:
            handle.remove()
        return self.attn.gated(mixed, self.gate), seen[0]


def _of_the_others(
    scores: Float[Tensor, "batch head query key"], worth: Float[Tensor, "batch head query key"]
) -> tuple[Float[Tensor, "batch head query key"], Float[Tensor, "batch head query key"]]:
    """Return, for each key, log-sum-exp of the other keys' scores, and their mean worth by attention.

    Each is a sum over the keys before plus a sum over the keys after. The sum over all keys less the key's own term
    would be rounding error in saturated attention.
    """
    highest = scores.amax(-1, keepdim=True)
    weights = (scores - highest).exp()
    mass, total = _sum_of_the_others(weights), _sum_of_the_others(weights * worth)
    return mass.log() + highest, torch.where(mass > 0, total / mass, 0.0)


def _sum_of_the_others(x: Tensor) -> Tensor:
    nothing = torch.zeros_like(x[..., :1])
    before = torch.cat((nothing, x[..., :-1]), -1).cumsum(-1)
    after = torch.cat((x[..., 1:], nothing), -1).flip(-1).cumsum(-1).flip(-1)
    return before + after
