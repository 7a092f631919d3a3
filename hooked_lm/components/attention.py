"""Attention: one class for all heads, query groups, positions and masks."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm._support.torch_internals import transforms_active
from hooked_lm.components.activations import soft_cap
from hooked_lm.components.by_hand import refuse_position_bias, sequence_by_hand, window_of
from hooked_lm.components.classic_attention import ClassicAttention
from hooked_lm.components.fused import fused_attention
from hooked_lm.components.linear import linear
from hooked_lm.components.norm import make_qk_norm
from hooked_lm.components.positions import AlibiSpec, QueryScaleSpec, RotarySpec, rotate
from hooked_lm.components.projections import input_projection, per_query_head, project
from hooked_lm.components.ranks import Ranks, SplitAxis
from hooked_lm.components.sequence import SequenceLayout
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.config.classic import ConfigDict
from hooked_lm.hooks import HookPoint, carries_run, is_live
from hooked_lm.kv_cache import HookedTransformerKeyValueCacheEntry

__all__ = ["Attention"]


class Attention(ClassicAttention):
    """Multi-head attention with named activations (Elhage et al. 2021, "A Mathematical Framework").

    Fused unless `hook_attn_scores` or `hook_pattern` has a hook, or under `torch.func` and forward-mode
    differentiation, for which the fused kernels have no rules. `hook_result` is computed only if it has a hook.

    With `attention_gate` z is the pattern's mixture of the values times `hook_gate`, `sigmoid(x W_G + b_G)`, where `x`
    is what the queries read: an edit at `hook_q_input` changes a head's gate too.

    With grouped queries `cfg.ungroup_grouped_query_attention` gives keys and values one entry for each query head from
    the projection on: at hook points, in the norm of keys and in the key-value cache. The numbers are the same.

    Args:
        cfg: the architecture, as a config or a dictionary of its fields.
        attn_type: `"global"` or `"local"`, of which a local query sees `window_size` positions; by default the config's
            for this layer.
        layer_id: the layer, 0 by default.

    Parameters (zeros until they are drawn or loaded):
        W_Q [head d_model d_head], W_K, W_V [kv_head d_model d_head], W_O [head d_head d_model],
        b_Q [head d_head], b_K, b_V [kv_head d_head], b_O [d_model]; sinks [head] with `attention_sinks`;
        W_G [head d_model d_head], b_G [head d_head] with `attention_gate`.
    """

    # The processes that share out the heads; None in a model that has them all.
    ranks: Ranks | None = None
    # Whether the norm of queries and keys is over all heads together.
    norms_all_heads = False

    def __init__(
        self,
        cfg: HookedTransformerConfig | ConfigDict,
        attn_type: Literal["global", "local"] | None = None,
        layer_id: int | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        self.layer_id = layer_id = 0 if layer_id is None else layer_id
        heads, kv_heads = self.n_heads, self.n_kv_heads = cfg.n_heads, cfg.n_kv_heads
        self.repeat_kv_heads = heads // kv_heads
        self.make_projections(cfg)

        self.window = window_of(cfg, attn_type, layer_id)
        self.scale = cfg.score_scale(layer_id)
        self.clip = cfg.clip_qkv
        self.alibi = _alibi(cfg)
        self.rotary = _rotary(cfg, layer_id, local=self.window is not None)
        self.query_scale = _query_scale(cfg)
        self.sinks = nn.Parameter(torch.zeros(heads)) if cfg.attention_sinks else None
        self.q_norm = make_qk_norm(cfg, heads, axes="batch pos head d_head")
        self.k_norm = make_qk_norm(cfg, kv_heads, axes="batch pos kv_head d_head")
        self.norm_after_rotary, self.norms_all_heads = cfg.qk_norm_after_rotary, cfg.qk_norm_across_heads

        self.hook_q = HookPoint("batch pos head d_head")
        self.hook_k = HookPoint("batch pos kv_head d_head")
        self.hook_v = HookPoint("batch pos kv_head d_head")
        if self.rotary is not None:
            self.hook_rot_q = HookPoint("batch pos head d_head")
            self.hook_rot_k = HookPoint("batch pos kv_head d_head")
        self.hook_attn_scores = HookPoint("batch head query key")
        self.hook_pattern = HookPoint("batch head query key")
        self.has_gate = cfg.attention_gate
        if self.has_gate:
            self.hook_gate = HookPoint("batch pos head d_head")
        self.hook_z = HookPoint("batch pos head d_head")
        self.hook_result = HookPoint("batch pos head d_model", on_demand=True, flag="use_attn_result")

    def make_projections(self, cfg: HookedTransformerConfig) -> None:
        """Make the weights and biases of queries, keys, values and output."""
        self.W_Q = input_projection(cfg.n_heads, cfg.d_model, cfg.d_head)
        self.W_K = input_projection(cfg.n_kv_heads, cfg.d_model, cfg.d_head)
        self.W_V = input_projection(cfg.n_kv_heads, cfg.d_model, cfg.d_head)
        self.W_O = nn.Parameter(torch.zeros(cfg.n_heads, cfg.d_head, cfg.d_model))
        self.b_Q = nn.Parameter(torch.zeros(cfg.n_heads, cfg.d_head))
        self.b_K = nn.Parameter(torch.zeros(cfg.n_kv_heads, cfg.d_head))
        self.b_V = nn.Parameter(torch.zeros(cfg.n_kv_heads, cfg.d_head))
        self.b_O = nn.Parameter(torch.zeros(cfg.d_model))
        if cfg.attention_gate:
            self.W_G = input_projection(cfg.n_heads, cfg.d_model, cfg.d_head)
            self.b_G = nn.Parameter(torch.zeros(cfg.n_heads, cfg.d_head))

    @property
    def causal(self) -> bool:
        """Whether queries attend to no later keys: `cfg.attention_dir`, which may be assigned."""
        return self.cfg.attention_dir == "causal"

    @property
    def score_cap(self) -> float:
        """The scores' soft-cap, off if not positive: `cfg.attn_scores_soft_cap`, which may be assigned."""
        return self.cfg.attn_scores_soft_cap

    def forward(
        self,
        query_input: Float[Tensor, "batch pos *head d_model"],
        key_input: Float[Tensor, "batch pos *kv_head d_model"],
        value_input: Float[Tensor, "batch pos *value_head d_model"],
        layout: SequenceLayout | None = None,
        past: HookedTransformerKeyValueCacheEntry | None = None,
        *,
        past_kv_cache_entry: HookedTransformerKeyValueCacheEntry | None = None,
        attention_mask: Tensor | None = None,
        additive_attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
    ) -> Float[Tensor, "out_batch pos d_model"]:
        """Return the output of the heads together, [batch pos d_model].

        The model gives `layout` and `past`. The other arguments are for calls by hand.

        Args:
            query_input, key_input, value_input: normalised inputs, shared by the heads or, with a head axis, one each.
            layout: lengths, padding and positions; by default a sequence without padding that continues `past`.
            past: this layer's key-value cache, which is extended by the new positions.
            past_kv_cache_entry: another name of `past`.
            attention_mask: [batch key], 0 at padding, over the positions of the cache and the new ones.
            additive_attention_mask: numbers to add to the masked scores, [batch head query key] or of a shape that
                broadcasts to it.
            position_bias: only None: no model here has the relative position biases of T5.

        Raises:
            TypeError, ValueError: as `components.by_hand.sequence_by_hand`.
        """
        if not isinstance(layout, SequenceLayout):
            refuse_position_bias(position_bias)
            layout, past = sequence_by_hand(
                query_input, layout, past, past_kv_cache_entry, attention_mask, additive_attention_mask
            )
        q, k, v = self.queries_keys_values(query_input, key_input, value_input, layout)
        if past is not None:
            k, v = past.append(k, v)
        return self.write(self.hook_z(self.gated(self.attend(q, k, v, layout), self.gate(query_input))))

    def queries_keys_values(
        self,
        query_input: Float[Tensor, "batch pos *head d_model"],
        key_input: Float[Tensor, "batch pos *kv_head d_model"],
        value_input: Float[Tensor, "batch pos *value_head d_model"],
        layout: SequenceLayout,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [batch pos head d_head], keys and values [batch pos kv_head d_head] of the new positions."""
        q, k, v = self.project(query_input, "Q"), self.project(key_input, "K"), self.project(value_input, "V")
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        return *self.with_positions(q, k, layout), v

    def attend(
        self,
        q: Float[Tensor, "batch query head d_head"],
        k: Float[Tensor, "batch key kv_head d_head"],
        v: Float[Tensor, "batch key kv_head d_value"],
        layout: SequenceLayout,
    ) -> Float[Tensor, "out_batch query head d_value"]:
        """Return z before a gate; by the fused kernel, unless hooks, a soft-cap, sinks or `torch.func` need scores."""
        hooked = is_live(self.hook_attn_scores) or is_live(self.hook_pattern)
        eager = hooked or self.score_cap > 0 or self.sinks is not None or transforms_active()
        eager = eager or layout.additive_mask is not None
        return (self.eager_attention if eager else self.fused_attention)(q, k, v, layout)

    def gate(
        self, query_input: Float[Tensor, "batch pos *head d_model"]
    ) -> Float[Tensor, "out_batch pos head d_head"] | None:
        """Return the factor on each entry of z, between 0 and 1; None in a model without gates."""
        if not self.has_gate:
            return None
        return self.hook_gate(torch.sigmoid(project(query_input, self.W_G, self.b_G)))

    @staticmethod
    def gated(
        mixed: Float[Tensor, "batch pos head d_value"], gate: Float[Tensor, "gate_batch pos head d_head"] | None
    ) -> Float[Tensor, "out_batch pos head d_value"]:
        """Return z, given the mixture of values that `attend` returns and what `gate` returns."""
        return mixed if gate is None else mixed * gate

    def project(
        self, x: Float[Tensor, "batch pos *head d_model"], which: Literal["Q", "K", "V"]
    ) -> Float[Tensor, "out_batch pos head d_head"]:
        """Return queries, keys or values before rotation: normalised and clipped, if the config has that."""
        W, b = getattr(self, f"W_{which}"), getattr(self, f"b_{which}")
        if which == "Q" or self.repeat_kv_heads == 1 or not self.cfg.ungroup_grouped_query_attention:
            projected = project(x, W, b)
        else:
            projected = self.ungrouped(x, W, b)
        if which != "V" and not self.norm_after_rotary:
            projected = self.normalized(projected, self.q_norm if which == "Q" else self.k_norm)
        return projected if self.clip is None else projected.clamp(-self.clip, self.clip)

    def normalized(
        self, x: Float[Tensor, "batch pos head d_head"], norm: nn.Module
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Return queries or keys after their norm, which may be over the heads of all ranks together."""
        if self.ranks is None or not self.norms_all_heads:
            return norm(x)  # type: ignore[no-any-return]
        axis = SplitAxis(2, 1 if norm is self.q_norm else self.ranks.kv_copies)
        return self.ranks.part(norm(self.ranks.whole(x, axis)), axis)

    def ungrouped(
        self,
        x: Float[Tensor, "batch pos *head d_model"],
        W: Float[Tensor, "kv_head d_model d_head"],
        b: Float[Tensor, "kv_head d_head"],
    ) -> Float[Tensor, "out_batch pos head d_head"]:
        """Return keys or values with an entry for each query head, read from the input that they share or its own."""
        if x.ndim == 3 or x.shape[2] == W.shape[0]:
            return per_query_head(project(x, W, b), self.n_heads, dim=2)
        return project(x, per_query_head(W, self.n_heads), per_query_head(b, self.n_heads))

    def with_positions(
        self,
        q: Float[Tensor, "batch pos head d_head"],
        k: Float[Tensor, "batch pos kv_head d_head"],
        layout: SequenceLayout,
    ) -> tuple[Float[Tensor, "batch pos head d_head"], Float[Tensor, "batch pos kv_head d_head"]]:
        """Return queries and keys as the scores use them: rotated and scaled by position, if the config has that."""
        if self.rotary is not None:
            cos, sin = layout.rotary(self.rotary, q.dtype)
            q, k = rotate(q, self.rotary, cos, sin), rotate(k, self.rotary, cos, sin)
        if self.norm_after_rotary:
            q, k = self.normalized(q, self.q_norm), self.normalized(k, self.k_norm)
        if self.query_scale is not None:
            q = q * layout.query_scales(self.query_scale, q.dtype)
        return (q, k) if self.rotary is None else (self.hook_rot_q(q), self.hook_rot_k(k))

    def fused_attention(
        self,
        q: Float[Tensor, "batch query head d_head"],
        k: Float[Tensor, "batch key kv_head d_head"],
        v: Float[Tensor, "batch key kv_head d_value"],
        layout: SequenceLayout,
    ) -> Float[Tensor, "out_batch query head d_value"]:
        """Return z without forming scores or pattern."""
        plain = self.causal and self.alibi is None and layout.is_plainly_causal(self.window)
        mask = None
        if self.alibi is not None:
            mask = layout.bias(self.causal, self.window, self.alibi, q.dtype)
        elif not plain:
            mask = layout.mask(self.causal, self.window)
        return fused_attention(q, k, v, mask, plain, self.scale)

    def eager_attention(
        self,
        q: Float[Tensor, "batch query head d_head"],
        k: Float[Tensor, "batch key kv_head d_head"],
        v: Float[Tensor, "batch key kv_head d_value"],
        layout: SequenceLayout,
    ) -> Float[Tensor, "out_batch query head d_value"]:
        """Return z by way of scores and pattern, each passed through its hook point."""
        scores = self.scores(q, k)
        if self.alibi is not None:
            scores = scores + layout.alibi(self.alibi, q.dtype)
        allowed = layout.mask(self.causal, self.window)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        if layout.additive_mask is not None:
            scores = scores + layout.additive_mask
        pattern = self.hook_pattern(self.softmax(self.hook_attn_scores(scores)))
        return self.mixed(pattern, v)

    def scores(
        self, q: Float[Tensor, "batch query head d_head"], k: Float[Tensor, "batch key kv_head d_head"]
    ) -> Float[Tensor, "batch head query key"]:
        """Return the scores, scaled and capped, without mask."""
        k = per_query_head(k, q.shape[2], dim=2)
        # Scaling the queries touches fewer numbers than scaling the scores.
        scores = einsum(q * self.scale, k, "batch query head d_head, batch key head d_head -> batch head query key")
        return soft_cap(scores, self.score_cap)

    def mixed(
        self, pattern: Float[Tensor, "batch head query key"], v: Float[Tensor, "batch key kv_head d_value"]
    ) -> Float[Tensor, "batch query head d_value"]:
        """Return z: the values, mixed by the pattern."""
        v = per_query_head(v, pattern.shape[1], dim=2)
        return einsum(pattern, v, "batch head query key, batch key head d_value -> batch query head d_value")

    def softmax(self, scores: Float[Tensor, "batch head query key"]) -> Float[Tensor, "out_batch head query key"]:
        """Return the pattern; with sinks, a row sums to less than 1 (Xiao et al. 2023, "Attention Sinks")."""
        if self.sinks is None:
            return F.softmax(scores, dim=-1)
        sinks = self.sinks[:, None, None].expand(scores.shape[0], -1, scores.shape[2], 1)
        return F.softmax(torch.cat((scores, sinks), -1), dim=-1)[..., :-1]

    def write(self, z: Float[Tensor, "batch pos head d_value"]) -> Float[Tensor, "out_batch pos d_model"]:
        """Return the sum of the heads' outputs and `b_O`; from `hook_result` if its hooks may change the run."""
        if is_live(self.hook_result):
            carries = carries_run(self.hook_result, torch.is_grad_enabled())
            result = self.hook_result(
                einsum(z, self.W_O, "batch pos head d_value, head d_value d_model -> batch pos head d_model")
            )
            if carries:
                return self._over_ranks(result.sum(-2))
        if self.ranks is None:
            return linear(z.flatten(-2), self.W_O.flatten(0, 1).T, self.b_O)
        return self._over_ranks(linear(z.flatten(-2), self.W_O.flatten(0, 1).T))

    def _over_ranks(self, written: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the heads of all ranks write, and `b_O`."""
        return (written if self.ranks is None else self.ranks.summed(written)) + self.b_O


def _rotary(cfg: HookedTransformerConfig, layer_id: int, *, local: bool) -> RotarySpec | None:
    return RotarySpec.of(cfg, layer_id, local=local) if cfg.rotates(layer_id) else None


def _alibi(cfg: HookedTransformerConfig) -> AlibiSpec | None:
    if cfg.positional_embedding_type != "alibi":
        return None
    return AlibiSpec(cfg.n_heads, cfg.alibi_scale, cfg.alibi_in_bfloat16)


def _query_scale(cfg: HookedTransformerConfig) -> QueryScaleSpec | None:
    return None if cfg.query_scale_beta == 0 else QueryScaleSpec(cfg.query_scale_beta, cfg.query_scale_ctx_len)
