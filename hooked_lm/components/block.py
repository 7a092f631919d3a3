"""One transformer block: attention and MLP, each reading from and writing to the residual stream."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm.components.attention import Attention
from hooked_lm.components.head_inputs import HeadInputs, per_head_inputs
from hooked_lm.components.mlp import MLP, GatedMLP
from hooked_lm.components.moe import MoE
from hooked_lm.components.norm import make_block_norm
from hooked_lm.components.sequence import SequenceLayout
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooks import HookPoint, any_live, is_live
from hooked_lm.kv_cache import HookedTransformerKeyValueCacheEntry


class TransformerBlock(nn.Module):
    """`resid_mid = resid_pre + attn(ln1(resid_pre))`, `resid_post = resid_mid + mlp(ln2(resid_mid))`.

    Parallel blocks feed `resid_pre` to the MLP too and have no `resid_mid`; attention-only blocks have no MLP. With
    norms on the stream (post-norm), `resid_mid = ln1(resid_pre + attn(resid_pre))`, and likewise `resid_post`.

    The stages of `forward` are methods, which sweeps and path patching run one by one. A subclass that overrides some
    and keeps the rest as they are says so with `keeps_stages = True`; see `components.stock`.
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
    ) -> Float[Tensor, "out_batch pos d_model"]:
        resid_pre = self.hook_resid_pre(resid_pre)
        q_in, k_in, v_in = self.attention_inputs(resid_pre, shortformer_pos)
        return self.after_attention(resid_pre, self.attention_output(self.attn(q_in, k_in, v_in, layout, past)))

    # The stages

    def attention_inputs(
        self, resid_pre: Float[Tensor, "batch pos d_model"], shortformer_pos: Tensor | None = None
    ) -> HeadInputs:
        """Return the normalised inputs of queries, keys and values: one tensor for all, unless heads read their own.

        Args:
            resid_pre: the stream that enters the block.
            shortformer_pos: [batch pos d_model], added to what queries and keys read.
        """
        points = (self.hook_attn_in, self.hook_q_input, self.hook_k_input, self.hook_v_input)
        if any_live(points):
            ln1 = None if self.norms_stream else self.ln1
            q, k, v = per_head_inputs(ln1, points, resid_pre, self.n_heads, self.n_kv_heads)
        else:
            q = k = v = resid_pre if self.norms_stream else self.ln1(resid_pre)
        if shortformer_pos is not None:
            q = q + (shortformer_pos if q.ndim == 3 else shortformer_pos[:, :, None])
            k = k + (shortformer_pos if k.ndim == 3 else shortformer_pos[:, :, None])
        return q, k, v

    def attention_output(self, written: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "out_batch pos d_model"]:
        """Return what attention adds to the stream, given what its heads write together."""
        return self.hook_attn_out(self.ln1_post(written))

    def after_attention(
        self, resid_pre: Float[Tensor, "batch pos d_model"], attn_out: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "out_batch pos d_model"]:
        """Return the stream after the block, given the stream that entered it and what attention adds."""
        if self.parallel and not self.attn_only:
            return self.hook_resid_post(resid_pre + attn_out + self.mlp_output(resid_pre))
        resid_mid = self.joined(resid_pre, attn_out, self.ln1)
        if self.attn_only:
            return self.hook_resid_post(resid_mid)
        return self.after_mid(self.hook_resid_mid(resid_mid))

    def after_mid(self, resid_mid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "out_batch pos d_model"]:
        """Return the stream after the block, given the stream that the MLP reads."""
        return self.hook_resid_post(self.joined(resid_mid, self.mlp_output(resid_mid), self.ln2))

    def joined(
        self, stream: Tensor, written: Tensor, norm: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "out_batch pos d_model"]:
        """Return the stream with what has been written to it, normalised where the norms are on the stream."""
        return norm(stream + written) if self.norms_stream else stream + written

    def mlp_output(self, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "out_batch pos d_model"]:
        """Return what the MLP adds, given the stream it reads; an edit at `hook_mlp_in` stays off the stream."""
        mlp_in = stream
        if is_live(self.hook_mlp_in):
            # A view of its own: its gradient is that of the MLP's reading alone.
            mlp_in = self.hook_mlp_in(stream.view_as(stream))
        return self.hook_mlp_out(self.ln2_post(self.mlp(mlp_in if self.norms_stream else self.ln2(mlp_in))))
