"""MoE, a mixture of experts: each token goes through the few MLPs that its router chooses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm._support.torch_internals import values_readable
from hooked_lm.components.activations import make_activation
from hooked_lm.components.linear import linear
from hooked_lm.components.mlp import GatedMLP
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooks import HookHolder, HookPoint

__all__ = ["MoE"]


class MoE(HookHolder):
    """`sum over the chosen experts of weight * expert(x)` (Shazeer et al. 2017), and a shared expert if there is one.

    `hook_expert_weights` [batch pos expert] is the router's weight of every expert, a softmax in float32 at least; an
    edit there also changes which experts are chosen. `hook_expert_indices` [batch pos chosen] are the chosen experts.

    Parameters:
        W_router [d_model expert], b_router [expert]; W_in, W_gate [expert d_model d_mlp], W_out [expert d_mlp d_model]
        and the biases b_in, b_gate [expert d_mlp], b_out [expert d_model]; the gate's only where `gated_mlp`.
        The shared expert is an MLP, `shared`; its gate is W_shared_gate [d_model 1], b_shared_gate [1].
    """

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__()
        if cfg.num_experts is None or cfg.experts_per_token is None:
            raise ValueError("a mixture of experts needs num_experts and experts_per_token")
        experts, self.chosen, d_mlp = cfg.num_experts, cfg.experts_per_token, cfg.expert_width
        self.rescale, self.jitter = cfg.norm_topk_prob and cfg.sparsemixer_jitter is None, cfg.sparsemixer_jitter
        self.gated, self.limit = cfg.gated_mlp, cfg.gated_limit
        self.W_router = nn.Parameter(torch.empty(cfg.d_model, experts))
        self.b_router = nn.Parameter(torch.zeros(experts))
        self.W_in = nn.Parameter(torch.empty(experts, cfg.d_model, d_mlp))
        self.b_in = nn.Parameter(torch.zeros(experts, d_mlp))
        if self.gated:
            self.W_gate = nn.Parameter(torch.empty(experts, cfg.d_model, d_mlp))
            self.b_gate = nn.Parameter(torch.zeros(experts, d_mlp))
        self.W_out = nn.Parameter(torch.empty(experts, d_mlp, cfg.d_model))
        self.b_out = nn.Parameter(torch.zeros(experts, cfg.d_model))
        self.act_fn = make_activation(cfg)
        self.shared = None if cfg.d_shared_expert is None else GatedMLP(cfg, cfg.d_shared_expert)
        if cfg.shared_expert_gate:
            self.W_shared_gate = nn.Parameter(torch.empty(cfg.d_model, 1))
            self.b_shared_gate = nn.Parameter(torch.zeros(1))
        self.gates_shared = cfg.shared_expert_gate
        self.hook_expert_weights = HookPoint("batch pos expert")
        self.hook_expert_indices = HookPoint("batch pos chosen", differentiable=False)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "out_batch pos d_model"]:
        probabilities = self.hook_expert_weights(self.route(linear(x, self.W_router.T, self.b_router)))
        indices = self.hook_expert_indices(probabilities.topk(self.chosen, dim=-1).indices)
        weights = probabilities.gather(-1, indices)
        if self.rescale:
            # If hooks have made all weights of a token zero, the output is zero rather than 0 / 0. Weights that hooks
            # have made negative are rescaled as others are.
            total = weights.sum(-1, keepdim=True)
            weights = weights / total.masked_fill(total == 0, 1.0)
        weights = weights.to(x.dtype)
        out = torch.zeros_like(x) if self.shared is None else self.shared_output(x)
        if not (torch.compiler.is_compiling() or values_readable(indices)):
            return out + self.of_every_expert(x, indices, weights)
        for expert in indices.unique().tolist():
            batch, pos, slot = torch.where(indices == expert)
            contribution = self.expert(expert, x[batch, pos]) * weights[batch, pos, slot, None]
            out.index_put_((batch, pos), contribution, accumulate=True)
        return out

    def of_every_expert(
        self, x: Float[Tensor, "batch pos d_model"], indices: Tensor, weights: Float[Tensor, "batch pos chosen"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the experts' weighted sum by running each on every token, for tokens whose choice cannot be read.

        Under `torch.vmap` the tokens of one expert are not the same in every run of the batch.

        Args:
            x: the tokens' input.
            indices: [batch pos chosen], the chosen experts.
            weights: the weight of each.
        """
        out = torch.zeros_like(x)
        for expert in range(self.W_in.shape[0]):
            chosen = indices == expert
            contribution = self.expert(expert, x) * weights.where(chosen, 0.0).sum(-1, keepdim=True)
            # `where`: an expert that no token chose may overflow, and 0 * inf is nan.
            out = out + contribution.where(chosen.any(-1, keepdim=True), 0.0)
        return out

    def route(self, scores: Float[Tensor, "batch pos expert"]) -> Float[Tensor, "out_batch pos expert"]:
        """Return the weight of every expert; the experts with the largest weights are chosen.

        With SparseMixer two weights are not zero, those of the two highest scores: each is the softmax over the experts
        whose scores are close to it (Liu et al. 2024, "GRIN").
        """
        if self.jitter is None:
            # In float32 as in the reference: in low precision, different weights would round to equal ones.
            return F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        weights, rest = torch.zeros_like(scores), scores
        for _ in range(2):
            best, winner = rest.max(dim=-1, keepdim=True)
            with torch.no_grad():
                far = (best - scores) / scores.abs().clamp(min=best) > 2 * self.jitter
            share = F.softmax(rest.masked_fill(far, float("-inf")), dim=-1).gather(-1, winner)
            weights = weights.scatter(-1, winner, share)
            rest = rest.scatter(-1, winner, float("-inf"))
        return weights

    def shared_output(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "out_batch pos d_model"]:
        """Return the shared expert's output, weighted by its gate if it has one."""
        assert self.shared is not None
        out: Tensor = self.shared(x)
        if not self.gates_shared:
            return out
        return out * torch.sigmoid(linear(x, self.W_shared_gate.T, self.b_shared_gate))

    def expert(self, expert: int, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token d_model"]:
        """Return one expert's output for the tokens that chose it."""
        hidden = linear(x, self.W_in[expert].T, self.b_in[expert])
        if self.gated:
            gate = linear(x, self.W_gate[expert].T, self.b_gate[expert])
            if self.limit is not None:
                gate, hidden = gate.clamp(max=self.limit), hidden.clamp(-self.limit, self.limit) + 1
            hidden = self.act_fn(gate) * hidden
        else:
            hidden = self.act_fn(hidden)
        return linear(hidden, self.W_out[expert].T, self.b_out[expert])
