"""Blocks in pairs: the first has experts beside its MLP, and the second adds what they write."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from hooked_lm.components.block import TransformerBlock
from hooked_lm.components.moe import MoE
from hooked_lm.components.sequence import SequenceLayout
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooks import HookPoint
from hooked_lm.kv_cache import HookedTransformerKeyValueCacheEntry

__all__ = ["ShortcutBlock", "make_block"]


class ShortcutBlock(TransformerBlock):
    """One of two blocks with shortcut-connected experts (Meituan 2025, "LongCat-Flash Technical Report").

    In both, `resid_post = resid_mid + hook_mlp_out`. The first has experts that read what its MLP reads,
    `hook_shortcut_out = shortcut(ln2(resid_mid))`, and does not add what they write. The second does:
    its `hook_mlp_out` is `mlp(ln2(resid_mid))` plus the first block's `hook_shortcut_out`, which the layout of the pass
    carries there. So the stream between the two is not all that the second depends on, and its stages do not run alone.
    """

    def __init__(self, cfg: HookedTransformerConfig, layer_id: int) -> None:
        super().__init__(cfg, layer_id)
        self.layer_id = layer_id
        self.shortcut = MoE(cfg) if cfg.has_shortcut(layer_id) else None
        if self.shortcut is not None:
            self.hook_shortcut_out = HookPoint("batch pos d_model")

    def forward(  # type: ignore[override]  # one of a pair is not called by hand
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        layout: SequenceLayout | None = None,
        past: HookedTransformerKeyValueCacheEntry | None = None,
        shortformer_pos: Float[Tensor, "batch pos d_model"] | None = None,
    ) -> Float[Tensor, "out_batch pos d_model"]:
        """Return the residual stream after the block, as `TransformerBlock.forward` does.

        Args:
            resid_pre: the residual stream before it.
            layout: lengths, padding and positions of the pass, which carries what the experts write.
            past: this layer's key-value cache, which is extended by the new positions.
            shortformer_pos: positions that are added to the inputs of queries and keys.

        Raises:
            ValueError: it is called by hand, without a layout.
        """
        if layout is None:
            raise ValueError(self._alone())
        resid_pre = self.hook_resid_pre(resid_pre)
        q_in, k_in, v_in = self.attention_inputs(resid_pre, shortformer_pos)
        attn_out = self.attention_output(self.attn(q_in, k_in, v_in, layout, past))
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        return self.hook_resid_post(resid_mid + self.mlp_and_experts(resid_mid, layout))

    def mlp_and_experts(
        self, stream: Float[Tensor, "batch pos d_model"], layout: SequenceLayout
    ) -> Float[Tensor, "out_batch pos d_model"]:
        """Return the MLP's contribution to the stream, with what the experts of the block before write.

        Args:
            stream: the residual at the MLP's input.
            layout: of the pass; takes what the experts of this block write to the next.

        Raises:
            ValueError: the block before has not run in this pass.
        """
        read = self.mlp_input(stream)
        if self.shortcut is not None:
            layout.carry(self.hook_shortcut_out(self.shortcut(read)))
            return self.hook_mlp_out(self.mlp(read))
        carried = layout.take_carried()
        if carried is None:
            raise ValueError(self._alone())
        return self.hook_mlp_out(self.mlp(read) + carried)

    def mlp_output(self, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "out_batch pos d_model"]:
        """Raise: what the MLP adds depends on more than the stream.

        Raises:
            ValueError: always.
        """
        raise ValueError(self._alone())

    def _alone(self) -> str:
        first = self.layer_id - self.layer_id % 2
        return (
            f"blocks {first} and {first + 1} run one after the other in one pass, which carries the output of experts "
            f"from {first} to {first + 1} beside the stream: run the model, from start_at_layer={first} if you like"
        )


def make_block(cfg: HookedTransformerConfig, layer_id: int) -> TransformerBlock:
    """Return a layer's block, of the kind that the config says."""
    return (ShortcutBlock if cfg.shortcut_experts else TransformerBlock)(cfg, layer_id)
