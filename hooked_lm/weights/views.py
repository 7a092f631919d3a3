"""A model's weights under their circuit names: stacked over layers, and as factored QK and OV matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm._support.integers import integer
from hooked_lm._support.replaced import missing
from hooked_lm.components import Embed, PosEmbed, TransformerBlock, Unembed
from hooked_lm.components.projections import per_query_head
from hooked_lm.components.ranks import Ranks
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.factored_matrix import FactoredMatrix, composition_scores

__all__ = ["HeadLabels", "WeightViews"]

# What latent attention does not have, or not in every model.
_READ_FROM_LATENTS = ("W_Q", "W_K", "W_V", "b_Q", "b_K", "b_V", "QK", "OV")


# Methods of the classic library that the model does not have.
_REPLACED = {
    "load_sample_training_dataset": "load texts with datasets.load_dataset",
    "sample_datapoint": "load texts with datasets.load_dataset, and tokenize one with model.to_tokens",
    "move_model_modules_to_device": "use model.to(device), or model.spread(devices)",
    "get_residual": "use model(tokens, stop_at_layer=0), or input_to_embed",
    "get_pos_offset": "use past_kv_cache.length",
    "check_hooks_to_add": "a hook is checked when it is added",
    "check_and_add_hook": "use add_hook, which checks",
}


class HeadLabels(list[str]):
    """A list of labels that may also be called: existing code uses both `all_head_labels` and `all_head_labels()`."""

    def __call__(self) -> HeadLabels:
        return self


class WeightViews(nn.Module):
    """The weight accessors of `HookedTransformer`. Stacks over layers are copies; all others are the parameters."""

    cfg: HookedTransformerConfig
    blocks: Sequence[TransformerBlock]
    embed: Embed
    pos_embed: PosEmbed
    unembed: Unembed
    # The processes that share out heads and neurons; None in a model that has them all.
    ranks: Ranks | None = None

    def _stack(self, module: str, name: str) -> Tensor:
        if len(self.blocks) == 0:
            raise AttributeError(name)
        layers = [getattr(getattr(block, module), name) for block in self.blocks]
        if self.ranks is not None:
            names = (f"blocks.{layer}.{module}.{name}" for layer in range(len(layers)))
            layers = [self.ranks.whole_parameter(*one) for one in zip(names, layers, strict=True)]
        if len({layer.shape for layer in layers}) > 1:
            shapes = ", ".join(str(tuple(layer.shape)) for layer in layers)
            raise ValueError(
                f"{name} does not stack: its shapes are {shapes}, layer by layer. Take blocks[layer].{module}.{name}"
            )
        # A model on several devices has its stacks where its embeddings are.
        return torch.stack([layer.to(self.embed.W_E.device) for layer in layers])

    # Any: parameters, buffers and modules all come through torch's lookup.
    def __getattr__(self, name: str) -> Any:
        # A property whose parameter is missing raises AttributeError, on which Python calls this without the message.
        if isinstance(getattr(type(self), name, None), property):
            cfg = self.cfg
            if cfg.d_latent_kv is not None and name in _READ_FROM_LATENTS:
                raise AttributeError(
                    f"this model has no {name}: a norm stands between the stream and what its heads read, the latents "
                    "of blocks[layer].attn, which has W_DKV, W_KR, W_UK, W_UV and W_Q, or W_DQ and W_UQ, instead"
                )
            if cfg.attention_gate and name == "OV":
                raise AttributeError(
                    "this model has no OV: a gate, blocks[layer].attn.hook_gate, multiplies what heads read before "
                    "W_O. W_V and W_O are there"
                )
            raise AttributeError(
                f"this model has no {name}: positional_embedding_type={cfg.positional_embedding_type!r}, "
                f"n_layers={cfg.n_layers}, attn_only={cfg.attn_only}, gated_mlp={cfg.gated_mlp}"
            )
        if name in _REPLACED:
            raise missing("HookedTransformer", name, _REPLACED)
        return super().__getattr__(name)

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """Token embeddings, [vocab d_model], as `hook_embed` looks them up.

        The parameter is `embed.W_E`. Where the model multiplies it by an `embedding_scale` (Gemma, BioGPT) this is a
        copy with the scale, to be read only. Where a norm follows (`post_embedding_ln`: Bloom, nanochat), `hook_embed`
        is `embed.ln` of these rows.
        """
        W_E, scale = self.embed.W_E, self.cfg.embedding_scale
        return W_E if scale == 1.0 else W_E * W_E.new_tensor(scale)

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """Learned positions, [n_ctx d_model]."""
        return self.pos_embed.W_pos

    @property
    def W_E_pos(self) -> Float[Tensor, "vocab_and_ctx d_model"]:
        """Token and position embeddings one below the other: every input of a full circuit."""
        return torch.cat((self.W_E, self.W_pos))

    @property
    def W_U(self) -> Float[Tensor, "d_model vocab"]:
        """The unembedding, [d_model vocab]; with tied embeddings, a view of the embedding.

        `unembed.W_U` is the parameter to edit or to give to an optimizer: asking for it unties the two.
        """
        # A module in the unembedding's place need only have W_U.
        return self.unembed.matrix() if isinstance(self.unembed, Unembed) else self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, " vocab"]:
        """The unembedding's bias, [vocab]."""
        return self.unembed.b_U

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        """From the stream to queries, [layer head d_model d_head]."""
        return self._stack("attn", "W_Q")

    @property
    def W_K(self) -> Float[Tensor, "layer head d_model d_head"]:
        """From the stream to keys, [layer head d_model d_head]: each query head with those of its key-value head."""
        return self._per_query_head(self._stack("attn", "W_K"))

    @property
    def W_V(self) -> Float[Tensor, "layer head d_model d_head"]:
        """From the stream to values, [layer head d_model d_head], as `W_K`: `W_V[l, h] @ W_O[l, h]` is a head's OV."""
        return self._per_query_head(self._stack("attn", "W_V"))

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """From the heads' z to the stream, [layer head d_head d_model]."""
        return self._stack("attn", "W_O")

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        """Biases of the queries, [layer head d_head]."""
        return self._stack("attn", "b_Q")

    @property
    def b_K(self) -> Float[Tensor, "layer head d_head"]:
        """Biases of the keys, [layer head d_head], as `W_K`."""
        return self._per_query_head(self._stack("attn", "b_K"))

    @property
    def b_V(self) -> Float[Tensor, "layer head d_head"]:
        """Biases of the values, [layer head d_head], as `W_K`."""
        return self._per_query_head(self._stack("attn", "b_V"))

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        """Biases of attention's output, [layer d_model]."""
        return self._stack("attn", "b_O")

    @property
    def W_in(self) -> Float[Tensor, "layer *expert d_model d_mlp"]:
        """From the stream into the MLPs, [layer d_model d_mlp]; with experts [layer expert d_model d_mlp]."""
        return self._stack("mlp", "W_in")

    @property
    def W_gate(self) -> Float[Tensor, "layer *expert d_model d_mlp"]:
        """The gates of gated MLPs, in the shape of `W_in`."""
        return self._stack("mlp", "W_gate")

    @property
    def W_out(self) -> Float[Tensor, "layer *expert d_mlp d_model"]:
        """From the MLPs to the stream, [layer d_mlp d_model]; with experts [layer expert d_mlp d_model]."""
        return self._stack("mlp", "W_out")

    @property
    def b_in(self) -> Float[Tensor, "layer *expert d_mlp"]:
        """Biases of the MLPs' hidden layer, [layer d_mlp]; with experts [layer expert d_mlp]."""
        return self._stack("mlp", "b_in")

    @property
    def b_gate(self) -> Float[Tensor, "layer *expert d_mlp"]:
        """Biases of the gates, in the shape of `b_in`."""
        return self._stack("mlp", "b_gate")

    @property
    def b_out(self) -> Float[Tensor, "layer *expert d_model"]:
        """Biases of the MLPs' output, [layer d_model]; with experts [layer expert d_model]."""
        return self._stack("mlp", "b_out")

    @property
    def QK(self) -> FactoredMatrix:
        """`W_Q W_K^T` of every head, [layer head d_model d_model]: rows are destinations, columns sources."""
        return FactoredMatrix(self.W_Q, self.W_K.mT)

    @property
    def OV(self) -> FactoredMatrix:
        """`W_V W_O` of every head, [layer head d_model d_model]: from the source's residual to the output.

        Raises:
            AttributeError: heads have gates, or read latents: no product of weights describes what they write.
        """
        if self.cfg.attention_gate:
            raise AttributeError("OV")
        return FactoredMatrix(self.W_V, self.W_O)

    def _per_query_head(self, stacked: Tensor) -> Tensor:
        return per_query_head(stacked, self.cfg.n_heads, dim=1)

    def all_composition_scores(self, mode: Literal["Q", "K", "V"]) -> Float[Tensor, "layer head layer head"]:
        """Return how much each head's output is read by each later head, [writer layer, head, reader layer, head].

        `||W_OV W_read|| / (||W_OV|| ||W_read||)`, where `W_read` is the reader's QK for `"Q"`, its QK transposed for
        `"K"`, and its OV for `"V"` (Elhage et al. 2021). Zero unless the reader is in a later layer.

        Args:
            mode: `"Q"`, `"K"` or `"V"`: the input of the reader that is composed with.

        Raises:
            ValueError: another mode.
        """
        if mode not in ("Q", "K", "V"):
            raise ValueError(f"composition is by 'Q', 'K' or 'V', not {mode!r}")
        writes, reads = self.OV, self.OV if mode == "V" else self.QK if mode == "Q" else self.QK.T
        scores = writes.A.new_zeros(self.cfg.n_layers, self.cfg.n_heads, self.cfg.n_layers, self.cfg.n_heads)
        for layer in range(self.cfg.n_layers - 1):
            # All layers at once would hold the products of all pairs of heads in memory.
            scores[layer, :, layer + 1 :] = composition_scores(writes[layer], reads[layer + 1 :])
        return scores

    @property
    def all_head_labels(self) -> HeadLabels:
        """`"L0H0"`, `"L0H1"`, ... in the order in which `[layer head]` is flattened."""
        return HeadLabels(f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads))

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Return the sum of the output biases written to the stream before `layer`.

        Args:
            layer: 0 to n_layers; biases of the blocks before it are summed.
            mlp_input: also count attention's bias in `layer` itself.
            include_mlp_biases: count the MLPs' biases too.

        Raises:
            ValueError: a layer out of range; a model that normalises biases before they reach the stream; or biases of
                experts, which differ by token.
        """
        layer = integer(layer, "layer")
        if not 0 <= layer <= self.cfg.n_layers or (mlp_input and layer == self.cfg.n_layers):
            raise ValueError(f"layer {layer} is out of range: this model has blocks 0-{self.cfg.n_layers - 1}")
        if self.cfg.normalizes_writes:
            raise ValueError("this model normalises biases before they reach the stream, so they do not add up")
        if self.cfg.num_experts is not None and include_mlp_biases:
            raise ValueError("which experts' biases are written depends on the tokens: pass include_mlp_biases=False")
        total = torch.zeros(self.cfg.d_model, dtype=self.embed.W_E.dtype, device=self.embed.W_E.device)
        for block in self.blocks[: layer + int(mlp_input)]:
            total = total + block.attn.b_O.to(total.device)
        if include_mlp_biases and not self.cfg.attn_only:
            for block in self.blocks[:layer]:
                total = total + block.mlp.b_out.to(total.device)
        return total
