"""A mixture of experts: each token goes through the few MLPs its router picks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm.components.activations import ACTIVATION_FUNCTIONS
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooks import HookPoint


class MoE(nn.Module):
    """`sum over the chosen experts of weight * expert(x)` (Shazeer et al. 2017).

    `hook_expert_weights` [batch pos expert] is the router's softmax over all experts; an edit there also changes who is
    chosen. `hook_expert_indices` [batch pos chosen] is who is chosen.

    Parameters:
        W_router [d_model expert], b_router [expert]; W_in, W_gate [expert d_model d_mlp], W_out [expert d_mlp d_model]
        and the biases
        b_in, b_gate [expert d_mlp], b_out [expert d_model]. `W_gate` and `b_gate` only where `gated_mlp`.
    """

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__()
        if cfg.num_experts is None or cfg.experts_per_token is None or cfg.d_mlp is None:
            raise ValueError("a mixture needs num_experts and experts_per_token, and a config with MLPs")
        experts, self.chosen = cfg.num_experts, cfg.experts_per_token
        self.rescale = cfg.norm_topk_prob
        self.gated = cfg.gated_mlp
        self.W_router = nn.Parameter(torch.empty(cfg.d_model, experts))
        self.b_router = nn.Parameter(torch.zeros(experts))
        self.W_in = nn.Parameter(torch.empty(experts, cfg.d_model, cfg.d_mlp))
        self.b_in = nn.Parameter(torch.zeros(experts, cfg.d_mlp))
        if self.gated:
            self.W_gate = nn.Parameter(torch.empty(experts, cfg.d_model, cfg.d_mlp))
            self.b_gate = nn.Parameter(torch.zeros(experts, cfg.d_mlp))
        self.W_out = nn.Parameter(torch.empty(experts, cfg.d_mlp, cfg.d_model))
        self.b_out = nn.Parameter(torch.zeros(experts, cfg.d_model))
        self.act_fn = ACTIVATION_FUNCTIONS[str(cfg.act_fn)]
        self.hook_expert_weights = HookPoint("batch pos expert")
        self.hook_expert_indices = HookPoint("batch pos chosen", differentiable=False)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        probabilities = self.hook_expert_weights(F.softmax(F.linear(x, self.W_router.T, self.b_router), dim=-1))
        indices = self.hook_expert_indices(probabilities.topk(self.chosen, dim=-1).indices)
        weights = probabilities.gather(-1, indices)
        if self.rescale:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in indices.unique().tolist():
            batch, pos, slot = torch.where(indices == expert)
            contribution = self.expert(expert, x[batch, pos]) * weights[batch, pos, slot, None]
            out.index_put_((batch, pos), contribution, accumulate=True)
        return out

    def expert(self, expert: int, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """Return one expert's output on the tokens sent to it."""
        hidden = F.linear(x, self.W_in[expert].T, self.b_in[expert])
        if self.gated:
            hidden = self.act_fn(F.linear(x, self.W_gate[expert].T, self.b_gate[expert])) * hidden
        else:
            hidden = self.act_fn(hidden)
        return F.linear(hidden, self.W_out[expert].T, self.b_out[expert])
