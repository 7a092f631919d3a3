"""One transformer block: attention and MLP, each reading from and writing to the residual stream."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm.components.attention import Attention
from hooked_lm.components.mlp import MLP, GatedMLP
from hooked_lm.components.moe import MoE
from hooked_lm.components.norm import Norm, make_block_norm
from hooked_lm.components.sequence import SequenceLayout
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooks import HookPoint, protect
from hooked_lm.kv_cache import HookedTransformerKeyValueCacheEntry

HeadInputs = tuple[Tensor, Tensor, Tensor]


class TransformerBlock(nn.Module):
    """`resid_mid = resid_pre + attn(ln1(resid_pre))`, `resid_post = resid_mid + mlp(ln2(resid_mid))`.

    Parallel blocks feed `resid_pre` to the MLP too and have no `resid_mid`; attention-only blocks have no MLP. With
    norms on the stream (post-norm), `resid_mid = ln1(resid_pre + attn(resid_pre))`, and likewise `resid_post`.
    """

    def __init__(self, cfg: HookedTransformerConfig, layer_id: int) -> None:
        super().__init__()
        self.attn_only, self.parallel = cfg.attn_only, cfg.parallel_attn_mlp
        self.n_heads, self.n_kv_heads = cfg.n_heads, cfg.n_kv_heads
        self.hook_resid_pre = HookPoint("batch pos d_model")
        self.hook_attn_in = HookPoint("batch pos head d_model", on_demand=True)
        self.hook_q_input = HookPoint("batch pos head d_model", on_demand=True)
        self.hook_k_input = HookPoint("batch pos kv_head d_model", on_demand=True)
        self.hook_v_input = HookPoint("batch pos kv_head d_model", on_demand=True)
        self.norms_stream = cfg.norm_placement == "residual"
        self.ln1 = make_block_norm(cfg)
        self.attn = Attention(cfg, layer_id)
        self.ln1_post = make_block_norm(cfg, writing=True)
        self.hook_attn_out = HookPoint("batch pos d_model")
        if not cfg.attn_only:
            if not cfg.parallel_attn_mlp:
                self.hook_resid_mid = HookPoint("batch pos d_model")
            self.hook_mlp_in = HookPoint("batch pos d_model")
            self.ln2 = make_block_norm(cfg)
            self.mlp = MoE(cfg) if cfg.has_experts(layer_id) else GatedMLP(cfg) if cfg.gated_mlp else MLP(cfg)
            self.ln2_post = make_block_norm(cfg, writing=True)
            self.hook_mlp_out = HookPoint("batch pos d_model")
        self.hook_resid_post = HookPoint("batch pos d_model")

    def forward(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        layout: SequenceLayout | None = None,
        past: HookedTransformerKeyValueCacheEntry | None = None,
        shortformer_pos: Float[Tensor, "batch pos d_model"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        resid_pre = self.hook_resid_pre(resid_pre)
        attn_out = self.attn(*self.attention_inputs(resid_pre, shortformer_pos), layout, past)
        return self.after_attention(resid_pre, self.hook_attn_out(self.ln1_post(attn_out)))

    def after_attention(
        self, resid_pre: Float[Tensor, "batch pos d_model"], attn_out: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the stream after the block, given what entered it and what attention adds."""
        if self.parallel and not self.attn_only:
            return self.hook_resid_post(resid_pre + attn_out + self.mlp_output(resid_pre))
        resid_mid = self.joined(resid_pre, attn_out, self.ln1)
        if self.attn_only:
            return self.hook_resid_post(resid_mid)
        return self.after_mid(self.hook_resid_mid(resid_mid))

    def after_mid(self, resid_mid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the stream after the block, given what the MLP reads of it."""
        return self.hook_resid_post(self.joined(resid_mid, self.mlp_output(resid_mid), self.ln2))

    def joined(
        self, stream: Tensor, written: Tensor, norm: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the stream with what has been written to it, normalised where the norms are on the stream."""
        return norm(stream + written) if self.norms_stream else stream + written

    def mlp_output(self, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return what the MLP adds, given the stream it reads; an edit at `hook_mlp_in` stays off the stream."""
        mlp_in = stream
        if self.hook_mlp_in.live:
            # A view of its own: its gradient is that of the MLP's reading alone.
            mlp_in = self.hook_mlp_in(protect(stream).view_as(stream))
        return self.hook_mlp_out(self.ln2_post(self.mlp(mlp_in if self.norms_stream else self.ln2(mlp_in))))

    def attention_inputs(
        self, resid_pre: Float[Tensor, "batch pos d_model"], shortformer_pos: Tensor | None = None
    ) -> HeadInputs:
        """Return the normalised inputs of queries, keys and values: one tensor for all, unless heads read their own."""
        sources = self.head_sources(resid_pre)
        q, k, v = self.normalized_sources(sources, resid_pre)
        if shortformer_pos is not None:
            q = q + (shortformer_pos if q.ndim == 3 else shortformer_pos[:, :, None])
            k = k + (shortformer_pos if k.ndim == 3 else shortformer_pos[:, :, None])
        return q, k, v

    def head_sources(self, resid_pre: Float[Tensor, "batch pos d_model"]) -> HeadInputs:
        """Return what queries, keys and values read, before the norm: `resid_pre` itself, or per-head copies of it."""
        points = (self.hook_attn_in, self.hook_q_input, self.hook_k_input, self.hook_v_input)
        if not any(point.live for point in points):
            return resid_pre, resid_pre, resid_pre
        attn_in = self._per_head(self.hook_attn_in, resid_pre, self.n_heads)
        return (
            self._per_head(self.hook_q_input, attn_in, self.n_heads),
            self._per_head(self.hook_k_input, attn_in, self.n_kv_heads),
            self._per_head(self.hook_v_input, attn_in, self.n_kv_heads),
        )

    @staticmethod
    def _per_head(point: HookPoint, source: Tensor, heads: int) -> Tensor:
        """Show per-head copies of `source` to a hook point; return them if they must carry the computation.

        Where a key-value head serves several query heads whose `hook_attn_in` differ, it reads their mean.
        """
        if source.ndim == 3:
            if not point.live:
                return source
            on_path = point.on_path
            copies = point(protect(source)[:, :, None].expand(-1, -1, heads, -1))
            return copies if on_path else source
        if source.shape[2] != heads:
            source = source.unflatten(2, (heads, -1)).mean(3)
        return point(protect(source).view_as(source)) if point.live else source

    def normalized_sources(self, sources: HeadInputs, resid_pre: Tensor) -> HeadInputs:
        """Apply `ln1` to each distinct input. Its hook points see the shared stream, never the per-head copies."""
        if not isinstance(self.ln1, Norm) or self.norms_stream:
            return sources
        q, k, v = sources
        if q is resid_pre and k is resid_pre and v is resid_pre:
            shared = self.ln1(resid_pre)
            return shared, shared, shared
        if not any(source is resid_pre for source in sources):
            self._show_unread_norm(self.ln1, resid_pre)
            return self.ln1.without_hooks(q), self.ln1.without_hooks(k), self.ln1.without_hooks(v)
        shared = self.ln1(resid_pre)

        def normalized(source: Tensor, norm: Norm = self.ln1) -> Tensor:
            return shared if source is resid_pre else norm.without_hooks(source)

        return normalized(q), normalized(k), normalized(v)

    @staticmethod
    def _show_unread_norm(ln1: Norm, resid_pre: Tensor) -> None:
        """Show the norm of the shared stream to whoever listens, though no head reads it.

        Raises:
            RuntimeError: a hook changes it, which would have no effect.
        """
        if not (ln1.hook_scale.live or ln1.hook_normalized.live):
            return
        if not torch.equal(ln1(resid_pre), ln1.step_by_step(resid_pre)):
            raise RuntimeError(
                f"an edit at {ln1.hook_normalized.name!r} or {ln1.hook_scale.name!r} would change nothing: queries, "
                "keys and values all read per-head copies here (hooks at attn_in, or at q_input, k_input and v_input), "
                "which are normalised on their own"
            )
