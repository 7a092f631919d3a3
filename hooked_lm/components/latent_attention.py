"""Latent attention: keys and values, and often queries, are read from a compressed stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm.components.attention import Attention
from hooked_lm.components.head_inputs import HeadSource, ReadOfCopies
from hooked_lm.components.linear import linear
from hooked_lm.components.norm import Norm, is_plain_norm
from hooked_lm.components.projections import input_projection, project
from hooked_lm.components.sequence import SequenceLayout
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.config.classic import ConfigDict
from hooked_lm.hooks import HookPoint, any_live

__all__ = ["LatentAttention", "make_attention"]


class LatentAttention(Attention):
    """Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1).

    `c = norm(x W_DKV + b_DKV)` is the latent of keys and values, `hook_latent_kv`. A head's values are `c W_UV`; its
    keys are `x W_KR + b_KR`, which rotate and are the same for all heads, followed by `c W_UK`. Its queries are
    `x W_Q + b_Q`, or with a latent of their own, `hook_latent_q`, `norm(x W_DQ + b_DQ) W_UQ`.

    From queries, keys and values on it is `Attention`, each head with keys and values of its own, also in the key-value
    cache. Inputs that hooks have separated by head are followed by one copy more, of the shared stream, whose latents
    the hook points show; a head whose copy is unedited reads these, and one whose copy is edited reads the latent of
    that copy, on which the editing hooks act too.

    Parameters:
        W_DKV [d_model d_latent_kv], b_DKV [d_latent_kv], latent_kv_norm.w [d_latent_kv]; W_KR [d_model rotary_dim],
        b_KR [rotary_dim]; W_UK [head d_latent_kv d_head - rotary_dim], W_UV [head d_latent_kv d_value]; W_Q [head
        d_model d_head], b_Q [head d_head], or W_DQ [d_model d_latent_q], b_DQ [d_latent_q], latent_q_norm.w
        [d_latent_q], W_UQ [head d_latent_q d_head]; W_O [head d_value d_model], b_O [d_model].
    """

    def __init__(
        self,
        cfg: HookedTransformerConfig | ConfigDict,
        attn_type: Literal["global", "local"] | None = None,
        layer_id: int | None = None,
    ) -> None:
        super().__init__(cfg, attn_type, layer_id)
        cfg = self.cfg
        self.hook_latent_kv = HookPoint("batch pos d_latent_kv")
        if cfg.d_latent_q is not None:
            self.hook_latent_q = HookPoint("batch pos d_latent_q")

    def make_projections(self, cfg: HookedTransformerConfig) -> None:
        """Make the weights, biases and norms between the stream and queries, keys and values, and the output's."""
        if cfg.d_latent_kv is None or cfg.rotary_dim is None:
            raise ValueError("latent attention needs d_latent_kv and rotary positions")
        self.n_rotary = cfg.rotary_dim
        self.W_DKV = nn.Parameter(torch.zeros(cfg.d_model, cfg.d_latent_kv))
        self.b_DKV = nn.Parameter(torch.zeros(cfg.d_latent_kv))
        self.latent_kv_norm = _latent_norm(cfg, cfg.d_latent_kv, "batch pos d_latent_kv")
        self.W_KR = nn.Parameter(torch.zeros(cfg.d_model, cfg.rotary_dim))
        self.b_KR = nn.Parameter(torch.zeros(cfg.rotary_dim))
        self.W_UK = input_projection(cfg.n_heads, cfg.d_latent_kv, cfg.d_head - cfg.rotary_dim)
        self.W_UV = input_projection(cfg.n_heads, cfg.d_latent_kv, cfg.value_width)
        self.has_query_latent = cfg.d_latent_q is not None
        if cfg.d_latent_q is None:
            self.W_Q = input_projection(cfg.n_heads, cfg.d_model, cfg.d_head)
            self.b_Q = nn.Parameter(torch.zeros(cfg.n_heads, cfg.d_head))
        else:
            self.W_DQ = nn.Parameter(torch.zeros(cfg.d_model, cfg.d_latent_q))
            self.b_DQ = nn.Parameter(torch.zeros(cfg.d_latent_q))
            self.latent_q_norm = _latent_norm(cfg, cfg.d_latent_q, "batch pos d_latent_q")
            self.W_UQ = input_projection(cfg.n_heads, cfg.d_latent_q, cfg.d_head)
        self.W_O = nn.Parameter(torch.zeros(cfg.n_heads, cfg.value_width, cfg.d_model))
        self.b_O = nn.Parameter(torch.zeros(cfg.d_model))

    def queries_keys_values(
        self,
        query_input: Float[Tensor, "batch pos *head d_model"],
        key_input: Float[Tensor, "batch pos *kv_head d_model"],
        value_input: Float[Tensor, "batch pos *value_head d_model"],
        layout: SequenceLayout,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys [batch pos head d_head] and values [batch pos head d_value] of the new positions."""
        q = self.queries(query_input)
        latent_k, latent_v = self.key_value_latents(key_input, value_input)
        k = self.keys(self._own_copies(key_input), latent_k)
        v = project(latent_v, self.W_UV, None)
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        return *self.with_positions(q, k, layout), v

    def project(
        self, x: Float[Tensor, "batch pos *head d_model"], which: Literal["Q", "K", "V"]
    ) -> Float[Tensor, "out_batch pos head d_head"]:
        """Return queries, keys or values before rotation."""
        if which == "Q":
            return self.queries(x)
        latent = self.key_value_latents(x, x)[0]
        return self.keys(self._own_copies(x), latent) if which == "K" else project(latent, self.W_UV, None)

    def queries(self, x: Float[Tensor, "batch pos *head d_model"]) -> Float[Tensor, "out_batch pos head d_head"]:
        """Return queries before rotation."""
        if not self.has_query_latent:
            return project(self._entering(self._own_copies(x)), self.W_Q, self.b_Q)
        (latent,) = self._latents([x], self.compress_q, self.latent_q_norm, self.hook_latent_q)
        return project(self._entering(latent), self.W_UQ, None)

    def keys(
        self, x: Float[Tensor, "batch pos *head d_model"], latent: Float[Tensor, "batch pos *latent_head d_latent_kv"]
    ) -> Float[Tensor, "out_batch pos head d_head"]:
        """Return keys before rotation: first the dimensions that will rotate, read from `x`, then the latent's."""
        rotating = self._entering(linear(x, self.W_KR.T, self.b_KR))
        rotating = rotating if rotating.ndim == 4 else rotating[:, :, None].expand(-1, -1, self.n_heads, -1)
        return torch.cat((rotating, project(latent, self.W_UK, None)), -1)

    def key_value_latents(
        self,
        key_input: Float[Tensor, "batch pos *head d_model"],
        value_input: Float[Tensor, "batch pos *value_head d_model"],
    ) -> tuple[Tensor, Tensor]:
        """Return the latents that keys and values are read from: one tensor, where their inputs are one."""
        found = self._latents([key_input, value_input], self.compress_kv, self.latent_kv_norm, self.hook_latent_kv)
        latent = self._entering(found[0])
        return latent, latent if found[1] is found[0] else self._entering(found[1])

    def _entering(self, x: Tensor) -> Tensor:
        """What every rank has, where the heads of this one begin to use it."""
        return x if self.ranks is None else self.ranks.entering(x)

    def compress_kv(self, x: Float[Tensor, "batch pos *head d_model"]) -> Float[Tensor, "out_batch pos *head latent"]:
        """Return the latent of keys and values."""
        return self.hook_latent_kv(self.latent_kv_norm(linear(x, self.W_DKV.T, self.b_DKV)))

    def compress_q(self, x: Float[Tensor, "batch pos *head d_model"]) -> Float[Tensor, "out_batch pos *head latent"]:
        """Return the latent of queries."""
        return self.hook_latent_q(self.latent_q_norm(linear(x, self.W_DQ.T, self.b_DQ)))

    def _latents(
        self, inputs: Sequence[Tensor], compress: Callable[[Tensor], Tensor], norm: nn.Module, point: HookPoint
    ) -> list[Tensor]:
        """Return the latent of each input: with a head axis where the input has one, the shared copy left out."""
        if all(x.ndim == 3 for x in inputs):
            first = compress(inputs[0])
            return [first if x is inputs[0] else compress(x) for x in inputs]
        points = [part for part in (*norm.modules(), point) if isinstance(part, HookPoint)]
        if any(x.ndim == 4 and x.shape[2] == self.n_heads for x in inputs):
            if any_live(points):
                raise ValueError(
                    f"{point.name} and the norm before it show the latent of the stream that heads share: inputs with "
                    f"a head axis are followed by a copy of it, so they have {self.n_heads + 1} copies; got "
                    f"{self.n_heads}"
                )
            return [compress(x) for x in inputs]
        shared = next((x for x in inputs if x.ndim == 3), inputs[0][:, :, -1])
        read = ReadOfCopies(compress, points, shared, plain=is_plain_norm(norm))
        return [read(_source(x, shared)) if x.ndim == 4 or x is shared else compress(x) for x in inputs]

    def _own_copies(self, x: Float[Tensor, "batch pos *copy d_model"]) -> Float[Tensor, "batch pos *head d_model"]:
        """Return the heads' copies without the shared one, or the input that they share."""
        return x[:, :, : self.n_heads] if x.ndim == 4 else x


def _source(x: Tensor, shared: Tensor) -> HeadSource:
    if x.ndim == 3:
        return HeadSource(x)
    copies = x[:, :, :-1]
    return HeadSource(copies, ((shared[:, :, None].expand_as(copies), copies),))


def _latent_norm(cfg: HookedTransformerConfig, width: int, axes: str) -> Norm:
    """Return the RMS norm of a latent."""
    return Norm(width, cfg.latent_eps, centred=False, affine=True, axes=axes)


def make_attention(cfg: HookedTransformerConfig, layer_id: int) -> Attention:
    """Return a layer's attention, of the kind that the config says."""
    return (Attention if cfg.d_latent_kv is None else LatentAttention)(cfg, layer_id=layer_id)
