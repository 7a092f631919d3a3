"""The MLPs: plain, gated, and with a layer norm after the activation (SoLU)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm.components.activations import make_activation
from hooked_lm.components.linear import linear
from hooked_lm.components.norm import make_norm
from hooked_lm.components.ranks import Ranks
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.config.classic import ConfigDict
from hooked_lm.hooks import HookHolder, HookPoint

__all__ = ["MLP", "GatedMLP"]


class MLP(HookHolder):
    """`act(x W_in + b_in) W_out + b_out`, with W_in [d_model d_mlp] and W_out [d_mlp d_model].

    With `solu_ln` the activation is normalised before `W_out`; `hook_mid` is before that norm, `hook_post` after.
    """

    # The processes that share out the neurons; None in a model that has them all.
    ranks: Ranks | None = None

    def __init__(self, cfg: HookedTransformerConfig | ConfigDict) -> None:
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        self.d_mlp = d_mlp = _width(cfg)
        self.W_in = nn.Parameter(torch.zeros(cfg.d_model, d_mlp))
        self.b_in = nn.Parameter(torch.zeros(d_mlp))
        self.W_out = nn.Parameter(torch.zeros(d_mlp, cfg.d_model))
        self.b_out = nn.Parameter(torch.zeros(cfg.d_model))
        self.act_fn = make_activation(cfg)
        self.hook_pre = HookPoint("batch pos d_mlp")
        if cfg.is_layer_norm_activation():
            self.hook_mid = HookPoint("batch pos d_mlp")
            kind = "LNPre" if cfg.normalization_type in ("LNPre", "RMSPre") else "LN"
            self.ln: nn.Module | None = make_norm(cfg, d_mlp, axes="batch pos d_mlp", kind=kind)
        else:
            self.ln = None
        self.hook_post = HookPoint("batch pos d_mlp")

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "out_batch pos d_model"]:
        x = x if self.ranks is None else self.ranks.entering(x)
        post = self.act_fn(self.hook_pre(linear(x, self.W_in.T, self.b_in)))
        if self.ln is not None:
            post = self.ln(self.hook_mid(post))
        return _written(self, self.hook_post(post))


class GatedMLP(HookHolder):
    """`(act(x W_gate + b_gate) * (x W_in + b_in)) W_out + b_out` (Shazeer 2020, "GLU Variants").

    `hook_pre` is the gate before its activation, `hook_pre_linear` the other factor, `hook_post` their product.

    Args:
        cfg: the architecture.
        d_mlp: hidden width, by default the config's.
    """

    ranks: Ranks | None = None

    def __init__(self, cfg: HookedTransformerConfig | ConfigDict, d_mlp: int | None = None) -> None:
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        self.d_mlp = d_mlp = d_mlp or _width(cfg)
        self.W_in = nn.Parameter(torch.zeros(cfg.d_model, d_mlp))
        self.b_in = nn.Parameter(torch.zeros(d_mlp))
        self.W_gate = nn.Parameter(torch.zeros(cfg.d_model, d_mlp))
        self.b_gate = nn.Parameter(torch.zeros(d_mlp))
        self.W_out = nn.Parameter(torch.zeros(d_mlp, cfg.d_model))
        self.b_out = nn.Parameter(torch.zeros(cfg.d_model))
        self.act_fn = make_activation(cfg)
        self.hook_pre = HookPoint("batch pos d_mlp")
        self.hook_pre_linear = HookPoint("batch pos d_mlp")
        self.hook_post = HookPoint("batch pos d_mlp")

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "out_batch pos d_model"]:
        x = x if self.ranks is None else self.ranks.entering(x)
        gate = self.act_fn(self.hook_pre(linear(x, self.W_gate.T, self.b_gate)))
        factor = self.hook_pre_linear(linear(x, self.W_in.T, self.b_in))
        return _written(self, self.hook_post(gate * factor))


def _written(mlp: MLP | GatedMLP, post: Float[Tensor, "batch pos d_mlp"]) -> Float[Tensor, "out_batch pos d_model"]:
    """What the neurons write, those of all ranks."""
    if mlp.ranks is None:
        return linear(post, mlp.W_out.T, mlp.b_out)
    return mlp.ranks.summed(linear(post, mlp.W_out.T)) + mlp.b_out


def _width(cfg: HookedTransformerConfig) -> int:
    if cfg.d_mlp is None:
        raise ValueError("this config is attn_only: it has no MLP")
    return cfg.d_mlp
