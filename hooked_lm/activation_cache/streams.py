"""ResidualStreams: the residual stream at every depth, the layers' shares of it, and the norms that read it."""

from __future__ import annotations

from typing import Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm.activation_cache.mapping import CachedActivations
from hooked_lm.components.norm import NoNorm, Norm
from hooked_lm.components.stock import require_stock
from hooked_lm.hooks import without_hooks
from hooked_lm.names import ActivationKey, UnknownHookError
from hooked_lm.slicing import Slice
from hooked_lm.tokenization import LogitTokens

__all__ = ["ResidualStreams", "Stack"]

Stack = Float[Tensor, "component *batch_and_pos d_model"]


class ResidualStreams(CachedActivations):
    """The residual stream of a run, whole and layer by layer."""

    def _final(self, layer: int | None) -> int:
        """Return `layer` as a number from 0 to n_layers; None and -1 are the end of the model."""
        n_layers = self.model.cfg.n_layers
        if layer is None or layer == -1:
            return n_layers
        if not 0 <= layer <= n_layers:
            raise ValueError(f"layer {layer} is out of range: 0-{n_layers}, or None for the end")
        return layer

    @staticmethod
    def _stacked(components: list[Tensor], like: Tensor) -> Tensor:
        return torch.stack(components) if components else like.new_empty((0, *like.shape))

    # Whole streams

    @overload
    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: object = None,
        mlp_input: bool = False,
        return_labels: Literal[False] = False,
    ) -> Stack: ...

    @overload
    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: object = None,
        mlp_input: bool = False,
        *,
        return_labels: Literal[True],
    ) -> tuple[Stack, list[str]]: ...

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: object = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Stack | tuple[Stack, list[str]]:
        """Return the residual stream at every depth up to the input of `layer`, [component batch pos d_model].

        Args:
            layer: the block whose input comes last; None or -1 for the end of the model.
            incl_mid: also between attention and MLP.
            apply_ln: apply the norm at the input of `layer` (the final norm at the end) to each partial residual, with
                statistics of its own: the logit lens (nostalgebraist 2020).
            pos_slice: positions to keep, anything `Slice` takes.
            mlp_input: end with the input of `layer`'s MLP.
            return_labels: also return labels: `"0_pre"`, `"0_mid"`, ..., `"final_post"`.

        Raises:
            ValueError: `mlp_input` at the end of the model, or a layer out of range.
        """
        last = self._final(layer)
        n_layers = self.model.cfg.n_layers
        if mlp_input and last == n_layers:
            raise ValueError("mlp_input needs a layer with an MLP; the end of the model is none")
        keys: list[tuple[str, ActivationKey]] = []
        for depth in range(last + 1):
            if depth == n_layers:
                keys.append(("final_post", ("resid_post", n_layers - 1)))
                break
            keys.append((f"{depth}_pre", ("resid_pre", depth)))
            if (incl_mid and depth < last) or (mlp_input and depth == last):
                keys.append((f"{depth}_mid", ("resid_mid", depth)))
        positions = Slice.unwrap(pos_slice)
        stack = torch.stack([positions.apply(stream, dim=-2) for stream in self._read(key for _, key in keys)])
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, positions, recompute_ln=True)
        return (stack, [label for label, _ in keys]) if return_labels else stack

    @overload
    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: object = None,
        incl_embeds: bool = True,
        return_labels: Literal[False] = False,
    ) -> Stack: ...

    @overload
    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: object = None,
        incl_embeds: bool = True,
        *,
        return_labels: Literal[True],
    ) -> tuple[Stack, list[str]]: ...

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: object = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Stack | tuple[Stack, list[str]]:
        """Return the outputs of each layer, [component batch pos d_model]; with mode `"all"` they sum to the stream.

        Args:
            layer: up to the input of this block; None or -1 for the end of the model.
            mlp_input: up to the input of its MLP.
            mode: attention and MLPs, or one of them.
            apply_ln: scale as the norm at the input of `layer` does, by its cached statistics.
            pos_slice: positions to keep.
            incl_embeds: start with the embeddings.
            return_labels: also return labels: `"embed"`, `"pos_embed"`, `"0_attn_out"`, `"0_mlp_out"`, ...

        Raises:
            ValueError: another mode, a layer out of range, or a model that normalises the residual stream itself,
                which then is no sum of the layers' outputs.
        """
        if mode not in ("all", "mlp", "attn"):
            raise ValueError(f"mode is 'all', 'mlp' or 'attn', not {mode!r}")
        if self.model.cfg.norm_placement == "residual":
            raise ValueError(
                "this model normalises the residual stream itself after each layer has written to it, so the stream is "
                "no sum of the layers' outputs; accumulated_resid gives the stream at every layer"
            )
        last = self._final(layer)
        for depth in range(last + int(mlp_input)):
            require_stock("the stream as a sum", f"blocks.{depth}", self.model.blocks[depth], alone=True)
        keys: list[tuple[str, ActivationKey]] = self._embedding_keys() if incl_embeds else []
        for depth in range(last + int(mlp_input)):
            if mode != "mlp":
                keys.append((f"{depth}_attn_out", ("attn_out", depth)))
            if mode != "attn" and not self.model.cfg.attn_only and depth < last:
                keys.append((f"{depth}_mlp_out", ("mlp_out", depth)))
        positions = Slice.unwrap(pos_slice)
        like = positions.apply(self[self._any_stream()], dim=-2)
        stack = self._stacked([positions.apply(one, dim=-2) for one in self._read(key for _, key in keys)], like)
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, positions)
        return (stack, [label for label, _ in keys]) if return_labels else stack

    def _embedding_keys(self) -> list[tuple[str, ActivationKey]]:
        keys: list[tuple[str, ActivationKey]] = [("embed", "hook_embed")]
        # Shortformer's positions never enter the stream.
        if self.model.cfg.positional_embedding_type == "standard":
            keys.append(("pos_embed", "hook_pos_embed"))
        return keys

    def _any_stream(self) -> str:
        """Return the name of a cached tensor [batch pos d_model], for its shape."""
        for name in self.cache_dict:
            if name.endswith(("hook_embed", "hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out")):
                return name
        raise UnknownHookError("this cache holds nothing of the residual stream; record hook_embed or resid_pre")

    # Norms and logits

    def apply_ln_to_stack(
        self,
        residual_stack: Stack,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: object = None,
        batch_slice: object = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Stack:
        """Return the stack scaled as the norm at the input of `layer` would scale it.

        With the cached scale this is linear, so components still add up: it centres (LayerNorm), divides by the scale
        and multiplies by the gain, unless the gain has been folded away. The norm's own bias belongs to no component.

        Args:
            residual_stack: [component batch pos d_model], already sliced by `pos_slice` and `batch_slice`.
            layer: the block whose norm is meant; None or -1 for the final norm.
            mlp_input: the norm of its MLP rather than of its attention.
            pos_slice, batch_slice: which positions and prompts of the cached scale belong to the stack.
            has_batch_dim: whether the stack has a batch axis.
            recompute_ln: give each component statistics of its own, gain and bias included: for whole residuals.
        """
        norm = self._norm(layer, mlp_input)
        if norm is None:
            return residual_stack
        if recompute_ln:
            with without_hooks():
                normalized: Tensor = norm(residual_stack)
            return normalized
        norm, scale = self._norm_and_scale(layer, mlp_input, Slice.unwrap(pos_slice), Slice.unwrap(batch_slice))
        assert norm is not None
        if self.has_batch_dim and not has_batch_dim and scale.shape[0] == 1:
            scale = scale[0]
        if norm.centred:
            residual_stack = residual_stack - residual_stack.mean(-1, keepdim=True)
        residual_stack = residual_stack / scale
        return residual_stack if norm.w is None else residual_stack * norm.w

    def _norm(self, layer: int | None, mlp_input: bool) -> nn.Module | None:
        """Return the norm of the residual stream at a layer's input; None if it has none."""
        depth = self._final(layer)
        if depth < self.model.cfg.n_layers and self.model.cfg.norm_placement == "residual":
            return None
        module: nn.Module = self.model.ln_final
        if depth < self.model.cfg.n_layers:
            block = self.model.blocks[depth]
            module = block.ln2 if mlp_input else block.ln1
        return None if type(module) is NoNorm else module

    def _norm_and_scale(
        self, layer: int | None, mlp_input: bool, positions: Slice, batch: Slice
    ) -> tuple[Norm | None, Tensor]:
        norm = self._norm(layer, mlp_input)
        if norm is None:
            return None, torch.ones(())
        depth = self._final(layer)
        place = "ln_final" if depth == self.model.cfg.n_layers else f"blocks.{depth}.{'ln2' if mlp_input else 'ln1'}"
        require_stock("a component's share of a norm's output", place, norm)
        assert isinstance(norm, Norm)
        if depth == self.model.cfg.n_layers:
            scale = self["scale"]
        else:
            scale = self["scale", depth, "ln2" if mlp_input else "ln1"]
        scale = positions.apply(scale, dim=-2)
        return norm, batch.apply(scale, dim=0) if self.has_batch_dim else scale

    def logit_attrs(
        self,
        residual_stack: Stack,
        tokens: LogitTokens,
        incorrect_tokens: LogitTokens | None = None,
        pos_slice: object = None,
        batch_slice: object = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, " component *batch_and_pos"]:
        """Return how much each component adds to a token's logit, or to a difference of two logits.

        `ln_final(component) @ W_U[:, token]`, where the norm scales by its cached statistics (Elhage et al. 2021, "A
        Mathematical Framework"). The biases of the norm and of the unembedding belong to no component.

        Args:
            residual_stack: [component batch pos d_model], sliced as below.
            tokens: a string that is one token, a token, or tokens [batch] or [batch pos].
            incorrect_tokens: tokens in the same form; their logits are subtracted.
            pos_slice, batch_slice: which positions and prompts of the run the stack holds.
            has_batch_dim: whether the stack has a batch axis.

        Raises:
            ValueError: `tokens` and `incorrect_tokens` have different shapes, or are not tokens of the model.
        """
        require_stock("a component's contribution to a logit", "unembed", self.model.unembed)
        directions = self.model.tokens_to_residual_directions(tokens)
        if incorrect_tokens is not None:
            wrong = self.model.tokens_to_residual_directions(incorrect_tokens)
            if wrong.shape != directions.shape:
                raise ValueError(
                    f"tokens have shape {tuple(directions.shape[:-1])}, incorrect_tokens {tuple(wrong.shape[:-1])}"
                )
            directions = directions - wrong
        batch = Slice.unwrap(batch_slice)
        if directions.ndim > 1 and self.has_batch_dim:
            directions = batch.apply(directions, dim=0)
        has_batch = has_batch_dim and self.has_batch_dim and batch.mode != "int"
        has_pos = residual_stack.ndim == 3 + has_batch
        if directions.ndim == 2 and has_batch and has_pos:
            directions = directions[:, None]  # [batch 1 d_model]: the same at every position
        scaled = self.apply_ln_to_stack(residual_stack, -1, False, pos_slice, batch_slice, has_batch_dim)
        return (scaled * directions).sum(-1)
