"""MoE, a mixture of experts: each token goes through the few MLPs that its router chooses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_lm._support.torch_internals import values_readable
from hooked_lm.components.activations import make_activation
from hooked_lm.components.linear import linear
from hooked_lm.components.mlp import GatedMLP
from hooked_lm.components.ranks import Ranks
from hooked_lm.components.routing import among_best_groups, expert_weights, rescaled
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.config.classic import ConfigDict
from hooked_lm.hooks import HookHolder, HookPoint

__all__ = ["MoE"]

_LOW = (torch.float16, torch.bfloat16)


class MoE(HookHolder):
    """`sum over the chosen experts of weight * expert(x)` (Shazeer et al. 2017), and a shared expert if there is one.

    `hook_expert_weights` [batch pos expert] is the router's weight of every expert, a softmax or a sigmoid, in float32
    at least; an edit there also changes which experts are chosen. `hook_expert_indices` [batch pos chosen] are the
    chosen experts: those with the largest weights, to which `b_correction` is added, if there is one, and among the
    experts of the chosen groups, if there are groups.

    Parameters:
        W_router [d_model expert], b_router [expert]; b_correction [expert] with `router_correction`, in float32 at
        least; W_in, W_gate [expert d_model d_mlp], W_out [expert d_mlp d_model]
        and the biases b_in, b_gate [expert d_mlp], b_out [expert d_model]; the gate's only where `gated_mlp`. The last
        `identity_experts` of the experts that the router scores have none of these.
        The shared expert is an MLP, `shared`; its gate is W_shared_gate [d_model 1], b_shared_gate [1].
    """

    # The processes that share out the experts' neurons; None in a model that has them all.
    ranks: Ranks | None = None

    def __init__(self, cfg: HookedTransformerConfig | ConfigDict) -> None:
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        if cfg.num_experts is None or cfg.experts_per_token is None:
            raise ValueError("a mixture of experts needs num_experts and experts_per_token")
        self.n_experts, self.chosen, d_mlp = cfg.num_experts, cfg.experts_per_token, cfg.expert_width
        self.d_mlp, experts = d_mlp, cfg.weighted_experts
        self.gated, self.limit = cfg.gated_mlp, cfg.gated_limit
        self.W_router = nn.Parameter(torch.zeros(cfg.d_model, self.n_experts))
        self.b_router = nn.Parameter(torch.zeros(self.n_experts))
        # Training sets it without gradients: it acts on the choice alone.
        correction = nn.Parameter(torch.zeros(self.n_experts), requires_grad=False)
        self.b_correction = correction if cfg.router_correction else None
        self.W_in = nn.Parameter(torch.zeros(experts, cfg.d_model, d_mlp))
        self.b_in = nn.Parameter(torch.zeros(experts, d_mlp))
        if self.gated:
            self.W_gate = nn.Parameter(torch.zeros(experts, cfg.d_model, d_mlp))
            self.b_gate = nn.Parameter(torch.zeros(experts, d_mlp))
        self.W_out = nn.Parameter(torch.zeros(experts, d_mlp, cfg.d_model))
        self.b_out = nn.Parameter(torch.zeros(experts, cfg.d_model))
        self.act_fn = make_activation(cfg)
        self.shared = None if cfg.d_shared_expert is None else GatedMLP(cfg, cfg.d_shared_expert)
        if cfg.shared_expert_gate:
            self.W_shared_gate = nn.Parameter(torch.zeros(cfg.d_model, 1))
            self.b_shared_gate = nn.Parameter(torch.zeros(1))
        self.gates_shared = cfg.shared_expert_gate
        self.hook_expert_weights = HookPoint("batch pos expert")
        self.hook_expert_indices = HookPoint("batch pos chosen", differentiable=False)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "out_batch pos d_model"]:
        weights = self.hook_expert_weights(expert_weights(self.router_scores(x), self.cfg))
        indices = self.hook_expert_indices(self.choose(weights))
        weights = rescaled(weights.gather(-1, indices), self.cfg).to(x.dtype)
        if self.ranks is not None:
            return self.over_ranks(self.ranks, x, indices, weights)
        out = torch.zeros_like(x) if self.shared is None else self.shared_output(x)
        if not (torch.compiler.is_compiling() or values_readable(indices)):
            return out + self.of_every_expert(x, indices, weights)
        for expert in indices.unique().tolist():
            batch, pos, slot = torch.where(indices == expert)
            contribution = self.expert(expert, x[batch, pos]) * weights[batch, pos, slot, None]
            out.index_put_((batch, pos), contribution, accumulate=True)
        return out

    def over_ranks(
        self, ranks: Ranks, x: Float[Tensor, "batch pos d_model"], indices: Tensor, weights: Tensor
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the experts' weighted sum, where each rank has a share of the neurons of every expert.

        That shares out the work however tokens choose, which whole experts on a rank would not.

        Args:
            ranks: the group.
            x: the tokens' input.
            indices: [batch pos chosen], the chosen experts.
            weights: the weight of each.
        """
        of_part, weights_of_part = ranks.entering(x), ranks.entering(weights)
        partial, rest = torch.zeros_like(x), torch.zeros_like(x)
        for expert in indices.unique().tolist():
            batch, pos, slot = torch.where(indices == expert)
            weight = weights[batch, pos, slot, None]
            if expert >= len(self.W_in):  # the identity
                rest.index_put_((batch, pos), x[batch, pos] * weight, accumulate=True)
                continue
            hidden = self.hidden(expert, of_part[batch, pos])
            written = linear(hidden, self.W_out[expert].T) * weights_of_part[batch, pos, slot, None]
            partial.index_put_((batch, pos), written, accumulate=True)
            rest.index_put_((batch, pos), self.b_out[expert] * weight, accumulate=True)
        shared = 0.0 if self.shared is None else self.shared_output(x)
        return ranks.summed(partial) + rest + shared

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
        for expert in range(self.n_experts):
            chosen = indices == expert
            contribution = self.expert(expert, x) * weights.where(chosen, 0.0).sum(-1, keepdim=True)
            # `where`: an expert that no token chose may overflow, and 0 * inf is nan.
            out = out + contribution.where(chosen.any(-1, keepdim=True), 0.0)
        return out

    def router_scores(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "out_batch pos expert"]:
        """Return every expert's score, whose softmax or sigmoid is its weight."""
        if self.cfg.router_in_float32 and x.dtype in _LOW:
            return linear(x.float(), self.W_router.float().T, self.b_router.float())
        return linear(x, self.W_router.T, self.b_router)

    def choose(self, weights: Float[Tensor, "batch pos expert"]) -> Int[Tensor, "batch pos chosen"]:
        """Return the experts that a token goes through, given the weight of every expert."""
        if self.b_correction is not None:
            weights = weights + self.b_correction
        return among_best_groups(weights, self.cfg).topk(self.chosen, dim=-1).indices

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        """Apply a function of torch's, such as a change of precision, which `b_correction` follows to float32 at most.

        Experts are chosen by small differences of it, which lower precision would round away.
        """
        before = None if self.b_correction is None else self.b_correction.detach().float()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.b_correction
        if before is not None and after is not None and after.dtype in _LOW:
            after.data = torch.empty_like(after, dtype=before.dtype) if before.is_meta else before.to(after.device)
        return self

    def shared_output(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "out_batch pos d_model"]:
        """Return the shared expert's output, weighted by its gate if it has one."""
        assert self.shared is not None
        out: Tensor = self.shared(x)
        if not self.gates_shared:
            return out
        return out * torch.sigmoid(linear(x, self.W_shared_gate.T, self.b_shared_gate))

    def expert(self, expert: int, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token d_model"]:
        """Return one expert's output for the tokens that chose it."""
        if expert >= len(self.W_in):
            return x
        return linear(self.hidden(expert, x), self.W_out[expert].T, self.b_out[expert])

    def hidden(self, expert: int, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token d_mlp"]:
        """Return one expert's neurons for the tokens that chose it, as `W_out` reads them."""
        hidden = linear(x, self.W_in[expert].T, self.b_in[expert])
        if self.gated:
            gate = linear(x, self.W_gate[expert].T, self.b_gate[expert])
            if self.limit is not None:
                gate, hidden = gate.clamp(max=self.limit), hidden.clamp(-self.limit, self.limit) + 1
            return self.act_fn(gate) * hidden
        return self.act_fn(hidden)
