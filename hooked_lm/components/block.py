"""TransformerBlock: attention and MLP, each with its input from the residual stream and its output added to it."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from hooked_lm.components.attention import Attention
from hooked_lm.components.by_hand import call_own, positions_by_hand, sequence_by_hand
from hooked_lm.components.head_inputs import HeadInputs, per_head_inputs
from hooked_lm.components.latent_attention import LatentAttention, make_attention
from hooked_lm.components.mlp import MLP, GatedMLP
from hooked_lm.components.moe import MoE
from hooked_lm.components.norm import NoNorm, make_block_norm
from hooked_lm.components.sequence import SequenceLayout
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.config.classic import ConfigDict
from hooked_lm.hooks import HookHolder, HookPoint, Pass, any_live, in_pass, is_live
from hooked_lm.kv_cache import HookedTransformerKeyValueCacheEntry

__all__ = ["TransformerBlock"]


_STOCK_ATTENTION = (Attention, LatentAttention)


class TransformerBlock(HookHolder):
    """`resid_mid = resid_pre + attn(ln1(resid_pre))`, `resid_post = resid_mid + mlp(ln2(resid_mid))`.

    Parallel blocks give `resid_pre` to the MLP too and have no `resid_mid`; attention-only blocks have no MLP. With
    norms on the stream (post-norm), `resid_mid = ln1(resid_pre + attn(resid_pre))`, and likewise `resid_post`.

    The stages of `forward` are methods, which sweeps and path patching call one by one. A subclass that overrides a
    method but keeps the stages sets `keeps_stages = True`; see `components.stock`.

    Args:
        cfg: the architecture, as a config or a dictionary of its fields.
        block_index: the layer.
    """

    def __init__(self, cfg: HookedTransformerConfig | ConfigDict, block_index: int) -> None:
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        self.attn_only, self.parallel = cfg.attn_only, cfg.parallel_attn_mlp
        self.n_heads = cfg.n_heads
        self.reads_latents = cfg.d_latent_kv is not None
        self.hook_resid_pre = HookPoint("batch pos d_model")
        self.hook_attn_in = HookPoint("batch pos head d_model", on_demand=True, flag="use_attn_in")
        self.hook_q_input = HookPoint("batch pos head d_model", on_demand=True, flag="use_split_qkv_input")
        self.hook_k_input = HookPoint("batch pos kv_head d_model", on_demand=True, flag="use_split_qkv_input")
        self.hook_v_input = HookPoint("batch pos kv_head d_model", on_demand=True, flag="use_split_qkv_input")
        self.norms_stream = cfg.norm_placement == "residual"
        self.ln1 = make_block_norm(cfg) if block_index > 0 or cfg.first_norm else NoNorm()
        self.attn = make_attention(cfg, block_index)
        self.ln1_post = make_block_norm(cfg, writing=True)
        self.hook_attn_out = HookPoint("batch pos d_model")
        if not cfg.attn_only:
            if not cfg.parallel_attn_mlp:
                self.hook_resid_mid = HookPoint("batch pos d_model")
            self.hook_mlp_in = HookPoint("batch pos d_model", flag="use_hook_mlp_in")
            self.ln2 = make_block_norm(cfg, folds=not cfg.writes_normalized(block_index))
            self.mlp = MoE(cfg) if cfg.has_experts(block_index) else GatedMLP(cfg) if cfg.gated_mlp else MLP(cfg)
            self.ln2_post = make_block_norm(cfg, writing=True)
            self.hook_mlp_out = HookPoint("batch pos d_model")
        self.hook_resid_post = HookPoint("batch pos d_model")

    def forward(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        layout: SequenceLayout | None = None,
        past: HookedTransformerKeyValueCacheEntry | None = None,
        shortformer_pos: Float[Tensor, "batch pos d_model"] | None = None,
        *,
        shortformer_pos_embed: Float[Tensor, "batch pos d_model"] | None = None,
        past_kv_cache_entry: HookedTransformerKeyValueCacheEntry | None = None,
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "out_batch pos d_model"]:
        """Return the residual stream after the block.

        The model gives `layout`, `past` and `shortformer_pos`. The other arguments are for calls by hand.

        Args:
            resid_pre: the residual stream before it.
            layout: lengths, padding and positions; by default a sequence without padding that continues `past`.
            past: this layer's key-value cache, which is extended by the new positions.
            shortformer_pos: positions that are added to the inputs of queries and keys.
            shortformer_pos_embed, past_kv_cache_entry: other names of `shortformer_pos` and `past`.
            attention_mask: [batch key], 0 at padding, over the positions of the cache and the new ones.

        Raises:
            TypeError, ValueError: as `components.by_hand.sequence_by_hand`, and `positions_by_hand`.
        """
        if not isinstance(layout, SequenceLayout):
            layout, past = sequence_by_hand(resid_pre, layout, past, past_kv_cache_entry, attention_mask)
            added = positions_by_hand(resid_pre, shortformer_pos_embed if shortformer_pos is None else shortformer_pos)
            with in_pass(Pass(layout.n_past, mask=layout.real_queries), whole=False):
                return self.forward(resid_pre, layout, past, added)
        resid_pre = self.hook_resid_pre(resid_pre)
        q_in, k_in, v_in = self.attention_inputs(resid_pre, shortformer_pos)
        if type(self.attn) in _STOCK_ATTENTION:
            written = self.attn(q_in, k_in, v_in, layout, past)
        else:
            written = call_own(self.attn, (q_in, k_in, v_in), layout, past, None)
        return self.after_attention(resid_pre, self.attention_output(written))

    # The stages

    def attention_inputs(
        self, resid_pre: Float[Tensor, "batch pos d_model"], shortformer_pos: Tensor | None = None
    ) -> HeadInputs:
        """Return the normalised inputs of queries, keys and values: one tensor, unless hooks separate the heads.

        Args:
            resid_pre: the residual stream at the block's input.
            shortformer_pos: [batch pos d_model], added to the inputs of queries and keys.
        """
        points = (self.hook_attn_in, self.hook_q_input, self.hook_k_input, self.hook_v_input)
        if any_live(points):
            ln1 = None if self.norms_stream else self.ln1
            heads = (self.n_heads, self.cfg.n_hooked_kv_heads)
            ranks = self.attn.ranks
            copied = ranks is not None and ranks.kv_copies > 1 and not self.cfg.ungroup_grouped_query_attention
            q, k, v = per_head_inputs(
                ln1, points, resid_pre, *heads, with_shared=self.reads_latents, ranks=ranks if copied else None
            )
        else:
            q = k = v = resid_pre if self.norms_stream else self.ln1(resid_pre)
        if shortformer_pos is not None:
            q = q + (shortformer_pos if q.ndim == 3 else shortformer_pos[:, :, None])
            k = k + (shortformer_pos if k.ndim == 3 else shortformer_pos[:, :, None])
        ranks = self.attn.ranks
        # Latents belong to every rank, and heads begin behind them.
        return (q, k, v) if ranks is None or self.reads_latents else ranks.entering_together(q, k, v)

    def attention_output(self, written: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "out_batch pos d_model"]:
        """Return attention's contribution to the stream, given the output of its heads together."""
        return self.hook_attn_out(self.ln1_post(written))

    def after_attention(
        self, resid_pre: Float[Tensor, "batch pos d_model"], attn_out: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "out_batch pos d_model"]:
        """Return the residual after the block, given the residual before it and attention's contribution."""
        if self.parallel and not self.attn_only:
            return self.hook_resid_post(resid_pre + attn_out + self.mlp_output(resid_pre))
        resid_mid = self.joined(resid_pre, attn_out, self.ln1)
        if self.attn_only:
            return self.hook_resid_post(resid_mid)
        return self.after_mid(self.hook_resid_mid(resid_mid))

    def after_mid(self, resid_mid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "out_batch pos d_model"]:
        """Return the residual after the block, given the residual at the MLP's input."""
        return self.hook_resid_post(self.joined(resid_mid, self.mlp_output(resid_mid), self.ln2))

    def joined(
        self, stream: Tensor, written: Tensor, norm: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "out_batch pos d_model"]:
        """Return the stream plus a contribution, normalised if the norms are on the stream."""
        return norm(stream + written) if self.norms_stream else stream + written

    def mlp_output(self, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "out_batch pos d_model"]:
        """Return the MLP's contribution to the stream."""
        return self.hook_mlp_out(self.ln2_post(self.mlp(self.mlp_input(stream))))

    def mlp_input(self, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "out_batch pos d_model"]:
        """Return the normalised input of the MLP; an edit at `hook_mlp_in` changes it but not the stream."""
        mlp_in = stream
        if is_live(self.hook_mlp_in):
            # A separate view, so that the gradient at the hook point is that through the MLP alone.
            mlp_in = self.hook_mlp_in(stream.view_as(stream))
        normalized: Tensor = mlp_in if self.norms_stream else self.ln2(mlp_in)
        return normalized
