"""ActivationCache: a run's activations, and the residual stream split into the parts that heads and neurons write."""

from __future__ import annotations

from typing import Literal, overload

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from hooked_lm.activation_cache.streams import ResidualStreams, Stack
from hooked_lm.components.stock import require_stock
from hooked_lm.names import get_act_name
from hooked_lm.slicing import Slice

__all__ = ["ActivationCache"]


class ActivationCache(ResidualStreams):
    """The activations of a run, and the components that the residual stream is the sum of.

    The residual stream is the sum of the components' outputs. So its projection on a direction (say, a token's logit)
    is the sum of the components' projections (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").
    """

    # Heads

    def compute_head_results(self) -> None:
        """Add `hook_result`, the output of each head, [batch pos head d_model], for every layer whose `z` is cached."""
        for layer, block in enumerate(self.model.blocks):
            name = get_act_name("result", layer)
            if name not in self.cache_dict:
                require_stock("a head's output", f"blocks.{layer}.attn", block.attn)
                self.cache_dict[name] = _head_results(self["z", layer], block.attn.W_O)

    @overload
    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: Literal[False] = False,
        incl_remainder: bool = False,
        pos_slice: object = None,
        apply_ln: bool = False,
    ) -> Stack: ...

    @overload
    def stack_head_results(
        self,
        layer: int | None = -1,
        *,
        return_labels: Literal[True],
        incl_remainder: bool = False,
        pos_slice: object = None,
        apply_ln: bool = False,
    ) -> tuple[Tensor, list[str]]: ...

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: object = None,
        apply_ln: bool = False,
    ) -> Tensor | tuple[Tensor, list[str]]:
        """Return the output of every head before `layer`, [layer*head batch pos d_model].

        Args:
            layer: None or -1 for all heads.
            return_labels: also return `"L0H0"`, `"L0H1"`, ..., `"remainder"`.
            incl_remainder: add one component for embeddings, MLPs and biases, so that the stack sums to the stream.
            pos_slice: positions to keep.
            apply_ln: scale as the norm at the input of `layer` does, by its cached statistics.
        """
        last, positions = self._final(layer), self._positions(pos_slice)
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
        """Return the outputs of a layer's heads: as recorded, or from `z`."""
        attn = self.model.blocks[layer].attn
        require_stock("a head's output", f"blocks.{layer}.attn", attn)
        # Positions are selected before the product, so that only theirs is computed.
        return _head_results(positions.apply(self["z", layer], dim=-3), attn.W_O)

    def _require_additive(self) -> None:
        """Raise ValueError if a norm follows the heads and neurons, so that their outputs do not add up."""
        if self.model.cfg.normalizes_writes:
            raise ValueError(
                "this model normalises the sum of the heads' (and neurons') outputs before adding it to the stream, so "
                "the sum does not split into what each of them adds"
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
            layer: take the blocks before this layer; None or -1 for all.
            sublayer_type: the module of the activation, needed for norms: `"ln1"`.

        Raises:
            ValueError: no block comes before layer 0, or the layer is out of range.
        """
        last = self._final(layer)
        if last == 0:
            raise ValueError("no block comes before layer 0, so there is nothing to stack")
        return torch.stack([self[activation_name, depth, sublayer_type] for depth in range(last)])

    # Neurons

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: object = None,
        pos_slice: object = None,
        project_output_onto: Float[Tensor, " d_model *out"] | None = None,
    ) -> Float[Tensor, "*batch_and_pos neuron d_model"] | Float[Tensor, "*batch_and_pos neuron *out"]:
        """Return the output of each neuron of a layer: its activation times its row of `W_out`.

        Args:
            layer: the block of the neurons.
            neuron_slice, pos_slice: neurons and positions to keep, anything `Slice` takes.
            project_output_onto: a direction [d_model], or several [d_model out], to return only the outputs' products
                with, [... neuron] or [... neuron out].
        """
        post, W_out = self._neurons(layer, Slice.unwrap(neuron_slice), self._positions(pos_slice))
        if project_output_onto is None:
            return post[..., None] * W_out
        projected = W_out @ project_output_onto
        return post * projected if projected.ndim == 1 else post[..., None] * projected

    def _neurons(self, layer: int, neurons: Slice, positions: Slice) -> tuple[Tensor, Tensor]:
        """Return activations [batch pos neuron] and output weights [neuron d_model] of some neurons."""
        self._require_additive()
        if self.model.cfg.attn_only or self.model.cfg.num_experts is not None:
            raise ValueError("neurons are those of plain MLPs: this model has none, or a mixture of experts")
        if not 0 <= layer < self.model.cfg.n_layers:
            raise ValueError(f"layer {layer} is out of range: 0-{self.model.cfg.n_layers - 1}")
        if neurons.mode == "int":
            neurons = Slice([neurons.slice])
        require_stock("a neuron's output", f"blocks.{layer}.mlp", self.model.blocks[layer].mlp)
        post = positions.apply(self["post", layer], dim=-2)
        W_out = neurons.apply(self.model.blocks[layer].mlp.W_out, dim=0)
        return neurons.apply(post, dim=-1), W_out.to(post.device)

    @overload
    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: object = None,
        neuron_slice: object = None,
        return_labels: Literal[False] = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Float[Tensor, " d_model *out"] | None = None,
    ) -> Tensor: ...

    @overload
    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: object = None,
        neuron_slice: object = None,
        *,
        return_labels: Literal[True],
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Float[Tensor, " d_model *out"] | None = None,
    ) -> tuple[Tensor, list[str]]: ...

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: object = None,
        neuron_slice: object = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Float[Tensor, " d_model *out"] | None = None,
    ) -> Tensor | tuple[Tensor, list[str]]:
        """Return the output of every neuron before `layer`, [layer*neuron batch pos d_model].

        Args:
            layer: None or -1 for all.
            pos_slice, neuron_slice: positions and neurons to keep.
            return_labels: also return `"L0N0"`, ..., `"remainder"`.
            incl_remainder: add one component for everything in the stream but these neurons.
            apply_ln: scale as the norm at the input of `layer` does, by its cached statistics.
            project_output_onto: a direction [d_model], or several [d_model out]: the result is [... batch pos] or
                [... batch pos out], and the full outputs, `d_model` times as large, are never formed.
        """
        last = self._final(layer)
        neurons, positions = Slice.unwrap(neuron_slice), self._positions(pos_slice)
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
        """Return the neurons' outputs, [neuron batch pos d_model] or, projected, [neuron batch pos *out]."""
        if onto is None:
            stack = (post[..., None] * W_out).movedim(-2, 0)
            return self.apply_ln_to_stack(stack, layer, pos_slice=positions) if apply_ln else stack
        if not apply_ln:
            projected = W_out @ onto
            return post.movedim(-1, 0)[(...,) + (None,) * (onto.ndim - 1)] * _spread(projected, post.ndim - 1)
        # The norm is linear once its scale is fixed: centre and gain act on W_out, the scale on the activations.
        norm, scale = self._norm_and_scale(layer, False, positions)
        if norm is not None:
            W_out = W_out - W_out.mean(-1, keepdim=True) if norm.centred else W_out
            W_out = W_out if norm.w is None else W_out * norm.w.to(W_out.device)
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

    @overload
    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: object = None,
        return_labels: Literal[False] = False,
        project_output_onto: Float[Tensor, " d_model *out"] | None = None,
    ) -> Tensor: ...

    @overload
    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: object = None,
        *,
        return_labels: Literal[True],
        project_output_onto: Float[Tensor, " d_model *out"] | None = None,
    ) -> tuple[Tensor, list[str]]: ...

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: object = None,
        return_labels: bool = False,
        project_output_onto: Float[Tensor, " d_model *out"] | None = None,
    ) -> Tensor | tuple[Tensor, list[str]]:
        """Return all components of the stream before `layer`: heads, neurons (or MLPs), embeddings and biases.

        They sum to the residual stream.

        Args:
            layer, mlp_input, apply_ln, pos_slice, return_labels: as for `decompose_resid`; labels end with `"bias"`.
            expand_neurons: one component per neuron; False for one per MLP, its bias included.
            project_output_onto: as for `stack_neuron_results`.
        """
        last, positions = self._final(layer), self._positions(pos_slice)
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


def _head_results(
    z: Float[Tensor, "*batch_and_pos head d_head"], W_O: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "*batch_and_pos head d_model"]:
    return einsum(z, W_O.to(z.device), "... head d_head, head d_head d_model -> ... head d_model")


def _spread(projected: Tensor, between: int) -> Tensor:
    """Return [neuron *out] with `between` axes of length 1 after the first."""
    return projected.reshape(projected.shape[0], *(1,) * between, *projected.shape[1:])
