"""ActivationCache: a run's activations, and the residual stream taken apart."""

from __future__ import annotations

from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm.activation_cache.mapping import CachedActivations, CacheKey
from hooked_lm.components.norm import NoNorm, Norm
from hooked_lm.components.stock import not_stock, require_stock
from hooked_lm.hooks import without_hooks
from hooked_lm.names import UnknownHookError, get_act_name
from hooked_lm.slicing import Slice

Stack = Float[Tensor, "component *batch_and_pos d_model"]


class ActivationCache(CachedActivations):
    """The activations of a run, and what the residual stream is made of.

    Everything that is written to the residual stream adds up to it. So what is read from it along a direction (say,
    a token's logit) is the sum of what each component writes there (Elhage et al. 2021, "A Mathematical Framework").
    """

    def _final(self, layer: int | None) -> int:
        """`layer` as 0 to n_layers; None and -1 are the end of the model."""
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

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: object = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """Return the residual stream at every depth up to the input of `layer`, [component batch pos d_model].

        Args:
            layer: the block whose input comes last; None or -1 for the end of the model.
            incl_mid: also between attention and MLP.
            apply_ln: apply the norm that reads at `layer` (the final one at the end), each partial stream with its own
                statistics: the logit lens (nostalgebraist 2020).
            pos_slice: positions to keep, anything `Slice` takes.
            mlp_input: end with the input of `layer`'s MLP.
            return_labels: also return labels: `"0_pre"`, `"0_mid"`, ..., `"final_post"`.

        Raises:
            ValueError: `mlp_input` at the end of the model, or a layer out of range.
        """
        last = self._final(layer)
        n_layers = self.model.cfg.n_layers
        if mlp_input and last == n_layers:
            raise ValueError("mlp_input needs a layer whose MLP is meant: the end of the model has none")
        keys: list[tuple[str, CacheKey]] = []
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

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: object = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """Return what each layer writes, [component batch pos d_model]; with mode `"all"` it sums to the stream.

        Args:
            layer: up to the input of this block; None or -1 for the end of the model.
            mlp_input: up to the input of its MLP.
            mode: attention and MLPs, or one of them.
            apply_ln: scale as the norm that reads at `layer` scales, by its cached statistics.
            pos_slice: positions to keep.
            incl_embeds: start with the embeddings.
            return_labels: also return labels: `"embed"`, `"pos_embed"`, `"0_attn_out"`, `"0_mlp_out"`, ...

        Raises:
            ValueError: another mode, a layer out of range, or a model whose stream is no sum, since norms are applied
                to the stream itself.
        """
        if mode not in ("all", "mlp", "attn"):
            raise ValueError(f"mode is 'all', 'mlp' or 'attn', not {mode!r}")
        if self.model.cfg.norm_placement == "residual":
            raise ValueError(
                "this model normalises the residual stream itself after each layer has written to it, so the stream is "
                "no sum of what the layers write; accumulated_resid gives the stream at every layer"
            )
        last = self._final(layer)
        keys: list[tuple[str, CacheKey]] = self._embedding_keys() if incl_embeds else []
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

    def _embedding_keys(self) -> list[tuple[str, CacheKey]]:
        keys: list[tuple[str, CacheKey]] = [("embed", "hook_embed")]
        # Shortformer's positions never enter the stream.
        if self.model.cfg.positional_embedding_type == "standard":
            keys.append(("pos_embed", "hook_pos_embed"))
        return keys

    def _any_stream(self) -> str:
        """The name of some recorded tensor [batch pos d_model], for its shape."""
        for name in self.cache_dict:
            if name.endswith(("hook_embed", "hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out")):
                return name
        raise UnknownHookError("this cache holds nothing of the residual stream; record hook_embed or resid_pre")

    # Heads

    def compute_head_results(self) -> None:
        """Add `hook_result`, what each head writes, [batch pos head d_model], for every layer whose `z` is cached."""
        for layer, block in enumerate(self.model.blocks):
            name = get_act_name("result", layer)
            if name not in self.cache_dict:
                require_stock("what each head writes", f"blocks.{layer}.attn", block.attn)
                self.cache_dict[name] = _head_results(self["z", layer], block.attn.W_O)

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: object = None,
        apply_ln: bool = False,
    ) -> Any:
        """Return what every head before `layer` writes, [layer*head batch pos d_model].

        Args:
            layer: None or -1 for all heads.
            return_labels: also return `"L0H0"`, `"L0H1"`, ..., `"remainder"`.
            incl_remainder: add what is in the stream besides (embeddings, MLPs, biases), so that it sums to the stream.
            pos_slice: positions to keep.
            apply_ln: scale as the norm that reads at `layer` scales, by its cached statistics.
        """
        last, positions = self._final(layer), Slice.unwrap(pos_slice)
        self._require_additive()
        pieces, labels = [], []
        for depth in range(last):
            pieces.append(self._results_of(depth, positions).movedim(-2, 0))
            labels += [f"L{depth}H{head}" for head in range(self.model.cfg.n_heads)]
        stack = torch.cat(pieces) if pieces else self._stacked([], positions.apply(self[self._any_stream()], dim=-2))
        if incl_remainder:
            stack = self._with_remainder(stack, last, positions)
            labels.append("remainder")
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, pos_slice=positions)
        return (stack, labels) if return_labels else stack

    def _results_of(self, layer: int, positions: Slice) -> Float[Tensor, "*batch_and_pos head d_model"]:
        """What each head of a layer writes: as it was recorded, or from `z`."""
        attn = self.model.blocks[layer].attn
        if not_stock(attn) is not None and get_act_name("result", layer) in self.cache_dict:
            return positions.apply(self["result", layer], dim=-3)
        require_stock("what each head writes (record hook_result by name)", f"blocks.{layer}.attn", attn)
        # Of the product only the kept positions are formed.
        return _head_results(positions.apply(self["z", layer], dim=-3), attn.W_O)

    def _require_additive(self) -> None:
        """Heads and neurons write to the stream themselves only where no norm comes after them."""
        if self.model.cfg.normalizes_writes:
            raise ValueError(
                "what heads and neurons write is normalised together before it goes on in the stream here, so it does "
                "not split into what each of them adds"
            )

    def _with_remainder(self, stack: Stack, last: int, positions: Slice) -> Tensor:
        key = ("resid_post", last - 1) if last > 0 else ("resid_pre", 0)
        remainder = positions.apply(self[key], dim=-2) - stack.sum(0)
        return torch.cat((stack, remainder[None]))

    def stack_activation(
        self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> Float[Tensor, "layer ..."]:
        """Return one activation of every block before `layer`, stacked.

        Args:
            activation_name: the short name, such as `"z"` or `"scale"`.
            layer: the blocks before it count; None or -1 for all.
            sublayer_type: the module it is in, as for norms: `"ln1"`.

        Raises:
            ValueError: no block comes before layer 0, or the layer is out of range.
        """
        last = self._final(layer)
        if last == 0:
            raise ValueError("no block comes before layer 0, so there is nothing to stack")
        return torch.stack([self[activation_name, depth, sublayer_type] for depth in range(last)])

    # Neurons

    def get_neuron_results(
        self, layer: int, neuron_slice: object = None, pos_slice: object = None
    ) -> Float[Tensor, "*batch_and_pos neuron d_model"]:
        """Return what each neuron of a layer writes: its activation times its row of `W_out`.

        Args:
            layer: whose neurons.
            neuron_slice, pos_slice: neurons and positions to keep, anything `Slice` takes.
        """
        post, W_out = self._neurons(layer, Slice.unwrap(neuron_slice), Slice.unwrap(pos_slice))
        return post[..., None] * W_out

    def _neurons(self, layer: int, neurons: Slice, positions: Slice) -> tuple[Tensor, Tensor]:
        """Activations [batch pos neuron] and output weights [neuron d_model] of some neurons."""
        self._require_additive()
        if self.model.cfg.attn_only or self.model.cfg.num_experts is not None:
            raise ValueError("neurons are those of plain MLPs: this model has none, or a mixture of experts")
        if not 0 <= layer < self.model.cfg.n_layers:
            raise ValueError(f"layer {layer} is out of range: 0-{self.model.cfg.n_layers - 1}")
        if neurons.mode == "int":
            neurons = Slice([neurons.slice])
        require_stock("what neurons write", f"blocks.{layer}.mlp", self.model.blocks[layer].mlp)
        post = positions.apply(self["post", layer], dim=-2)
        return neurons.apply(post, dim=-1), neurons.apply(self.model.blocks[layer].mlp.W_out, dim=0)

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: object = None,
        neuron_slice: object = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Float[Tensor, " d_model *out"] | None = None,
    ) -> Any:
        """Return what every neuron before `layer` writes, [layer*neuron batch pos d_model].

        Args:
            layer: None or -1 for all.
            pos_slice, neuron_slice: positions and neurons to keep.
            return_labels: also return `"L0N0"`, ..., `"remainder"`.
            incl_remainder: add what is in the stream besides.
            apply_ln: scale as the norm that reads at `layer` scales, by its cached statistics.
            project_output_onto: a direction [d_model], or several [d_model out]: the result is [... batch pos] or
                [... batch pos out], and the outputs themselves, `d_model` times as large, are never formed.
        """
        last = self._final(layer)
        neurons, positions = Slice.unwrap(neuron_slice), Slice.unwrap(pos_slice)
        pieces, labels = [], []
        for depth in range(last):
            post, W_out = self._neurons(depth, neurons, positions)
            pieces.append(self._write(post, W_out, layer, positions, apply_ln, project_output_onto))
            labels += [f"L{depth}N{n}" for n in neurons.indices(self.model.cfg.d_mlp)]
        if incl_remainder:
            pieces.append(self._neuron_remainder(last, layer, neurons, positions, apply_ln, project_output_onto))
            labels.append("remainder")
        if not pieces:
            pieces = [self._stacked([], positions.apply(self[self._any_stream()], dim=-2))]
        stack = torch.cat(pieces)
        return (stack, labels) if return_labels else stack

    def _write(
        self,
        post: Tensor,
        W_out: Tensor,
        layer: int | None,
        positions: Slice,
        apply_ln: bool,
        onto: Tensor | None,
    ) -> Tensor:
        """[neuron batch pos d_model] or, projected, [neuron batch pos *out]."""
        if onto is None:
            stack = (post[..., None] * W_out).movedim(-2, 0)
            return self.apply_ln_to_stack(stack, layer, pos_slice=positions) if apply_ln else stack
        if not apply_ln:
            projected = W_out @ onto
            return post.movedim(-1, 0)[(...,) + (None,) * (onto.ndim - 1)] * _spread(projected, post.ndim - 1)
        # The norm is linear once its scale is fixed: centre and gain act on W_out, the scale on the activations.
        norm, scale = self._norm_and_scale(layer, False, positions, Slice())
        if norm is not None:
            W_out = W_out - W_out.mean(-1, keepdim=True) if norm.centred else W_out
            W_out = W_out if norm.w is None else W_out * norm.w
            post = post / scale
        return self._write(post, W_out, layer, positions, False, onto)

    def _neuron_remainder(
        self, last: int, layer: int | None, neurons: Slice, positions: Slice, apply_ln: bool, onto: Tensor | None
    ) -> Tensor:
        key = ("resid_post", last - 1) if last > 0 else ("resid_pre", 0)
        remainder = positions.apply(self[key], dim=-2)
        for depth in range(last):
            post, W_out = self._neurons(depth, neurons, positions)
            remainder = remainder - post @ W_out
        stack = remainder[None]
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, pos_slice=positions)
        return stack if onto is None else stack @ onto

    # Everything at once

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: object = None,
        return_labels: bool = False,
        project_output_onto: Float[Tensor, " d_model *out"] | None = None,
    ) -> Any:
        """Return everything written to the stream before `layer`: heads, neurons (or MLPs), embeddings and biases.

        It sums to the stream.

        Args:
            layer, mlp_input, apply_ln, pos_slice, return_labels: as for `decompose_resid`; labels end with `"bias"`.
            expand_neurons: each neuron by itself; False for each MLP as a whole, its bias included.
            project_output_onto: as for `stack_neuron_results`.
        """
        last, positions = self._final(layer), Slice.unwrap(pos_slice)
        heads, labels = self.stack_head_results(last + int(mlp_input), return_labels=True, pos_slice=positions)
        rest, rest_labels = [], []
        for label, key in self._embedding_keys():
            rest.append(positions.apply(self[key], dim=-2))
            rest_labels.append(label)
        bias = self.model.accumulated_bias(last, mlp_input, include_mlp_biases=expand_neurons)
        rest.append(bias.expand_as(positions.apply(self[self._any_stream()], dim=-2)))
        rest_labels.append("bias")

        def finished(stack: Stack) -> Tensor:
            if apply_ln:
                stack = self.apply_ln_to_stack(stack, layer, mlp_input, positions)
            return stack if project_output_onto is None else stack @ project_output_onto

        pieces = [finished(heads)]
        if not self.model.cfg.attn_only and last > 0:
            mlps, mlp_labels = self._mlp_pieces(
                last, mlp_input, expand_neurons, positions, apply_ln, project_output_onto
            )
            pieces += mlps
            labels = [*labels, *mlp_labels]
        stack = torch.cat((*pieces, finished(torch.stack(rest))))
        return (stack, [*labels, *rest_labels]) if return_labels else stack

    def _mlp_pieces(
        self, last: int, mlp_input: bool, expand: bool, positions: Slice, apply_ln: bool, onto: Tensor | None
    ) -> tuple[list[Tensor], list[str]]:
        pieces, labels = [], []
        reader = None if last == self.model.cfg.n_layers else last
        for depth in range(last):
            if expand:
                post, W_out = self._neurons(depth, Slice(), positions)
                labels += [f"L{depth}N{n}" for n in range(W_out.shape[0])]
                if not mlp_input:
                    pieces.append(self._write(post, W_out, reader, positions, apply_ln, onto))
                    continue
                stack = (post[..., None] * W_out).movedim(-2, 0)
            else:
                stack = positions.apply(self["mlp_out", depth], dim=-2)[None]
                labels.append(f"{depth}_mlp_out")
            stack = self.apply_ln_to_stack(stack, reader, mlp_input, positions) if apply_ln else stack
            pieces.append(stack if onto is None else stack @ onto)
        return pieces, labels

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
        """Return the stack as the norm that reads at `layer` would scale it.

        With the cached scale this is linear, so components still add up: it centres (LayerNorm), divides by the scale
        and multiplies with the gain, if that has not been folded away. A norm's own bias belongs to no component.

        Args:
            residual_stack: [component batch pos d_model], already sliced as `pos_slice` and `batch_slice` say.
            layer: the block that reads; None or -1 for the final norm.
            mlp_input: its MLP rather than its attention.
            pos_slice, batch_slice: which positions and prompts of the cached scale belong to the stack.
            has_batch_dim: whether the stack has a batch axis.
            recompute_ln: each component with statistics of its own, gain and bias included: for whole streams.
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
        """The norm that reads the stream at a layer, of whatever kind; None where none does."""
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
        require_stock("the share of a component in what a norm returns", "the norm that reads there", norm)
        assert isinstance(norm, Norm)
        depth = self._final(layer)
        if depth == self.model.cfg.n_layers:
            scale = self["scale"]
        else:
            scale = self["scale", depth, "ln2" if mlp_input else "ln1"]
        scale = positions.apply(scale, dim=-2)
        return norm, batch.apply(scale, dim=0) if self.has_batch_dim else scale

    def logit_attrs(
        self,
        residual_stack: Stack,
        tokens: Any,
        incorrect_tokens: Any = None,
        pos_slice: object = None,
        batch_slice: object = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, " component *batch_and_pos"]:
        """Return how much each component adds to a token's logit, or to a difference of two logits.

        The stack is scaled as the final norm scales it and projected on the tokens' unembedding directions. The biases
        of the norm and of the unembedding belong to no component.

        Args:
            residual_stack: [component batch pos d_model], sliced as below.
            tokens: a string that is one token, a token, or tensors [batch] or [batch pos].
            incorrect_tokens: the same; their logits are subtracted.
            pos_slice, batch_slice: which positions and prompts of the run the stack holds.
            has_batch_dim: whether the stack has a batch axis.

        Raises:
            ValueError: `tokens` and `incorrect_tokens` have different shapes, or are not tokens of the model.
        """
        require_stock("what a component adds to a logit", "unembed", self.model.unembed)
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


def _head_results(
    z: Float[Tensor, "*batch_and_pos head d_head"], W_O: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "*batch_and_pos head d_model"]:
    return einsum(z, W_O, "... head d_head, head d_head d_model -> ... head d_model")


def _spread(projected: Tensor, between: int) -> Tensor:
    """[neuron *out] with `between` axes of length 1 after the first."""
    return projected.reshape(projected.shape[0], *(1,) * between, *projected.shape[1:])
