"""ResidualStreams: the residual stream at every depth, the layers' shares of it, and the norms that read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm._support.integers import integer
from hooked_lm.activation_cache.mapping import CachedActivations
from hooked_lm.components.norm import NoNorm, Norm
from hooked_lm.components.spread import applied
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
        layer = None if layer is None else integer(layer, "layer")
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
        positions = self._positions(pos_slice)
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
        positions = self._positions(pos_slice)
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
        residual_stack: Float[Tensor, "*component_batch_and_pos d_model"],
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: object = None,
        batch_slice: object = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Float[Tensor, "*component_and_kept d_model"]:
        """Return the stack scaled as the norm at the input of `layer` would scale it.

        With the cached scale this is linear, so components still add up: it centres (LayerNorm), divides by the scale
        and multiplies by the gain, unless the gain has been folded away. The norm's own bias belongs to no component.

        Args:
            residual_stack: [component batch pos d_model] with every prompt of the run, already cut to `pos_slice`. An
                integer `pos_slice` drops the axis.
            layer: the block whose norm is meant; None or -1 for the final norm.
            mlp_input: the norm of its MLP rather than of its attention.
            pos_slice: the positions that the stack holds.
            batch_slice: the prompts to keep, of the stack and of the run; an integer drops the axis.
            has_batch_dim: False for a stack of one prompt without the batch axis: the prompt that an integer
                `batch_slice` picks, or the only one.
            recompute_ln: give each component statistics of its own, gain and bias included: for whole residuals.

        Raises:
            ValueError: the stack has not the run's prompts and these positions, `batch_slice` is given for a cache
                without batch axis, or a prompt has padding at all of these positions.
        """
        positions, batch = self._positions(pos_slice), Slice.unwrap(batch_slice)
        norm = self._norm(layer, mlp_input)
        if norm is None or recompute_ln:
            stack = self._stack_of(residual_stack, self._run_shape(positions), batch, has_batch_dim)
            if norm is None:
                return stack
            with without_hooks():
                normalized: Tensor = applied(norm, stack)
            return normalized
        norm, scale = self._norm_and_scale(layer, mlp_input, positions)
        assert norm is not None
        stack = self._stack_of(residual_stack, scale.shape[:-1], batch, has_batch_dim)
        if self.has_batch_dim:
            scale = batch.apply(scale, dim=0)
            scale = scale if has_batch_dim or batch.mode == "int" else scale[0]
        stack = stack - stack.mean(-1, keepdim=True) if norm.centred else stack
        stack = stack / scale
        return stack if norm.w is None else stack * norm.w.to(stack.device)

    def _stack_of(self, stack: Tensor, run: Sequence[int] | None, batch: Slice, has_batch_dim: bool) -> Tensor:
        """Return the part of a stack that belongs to some prompts.

        Args:
            stack: [component batch pos d_model].
            run: the lengths that its axes [batch pos] should have, without those that the cache or the slice of
                positions lacks; None if they are not known.
            batch: the prompts.
            has_batch_dim: whether the stack has the batch axis, if the cache has.
        """
        if not self.has_batch_dim and not batch.is_identity:
            raise ValueError(f"batch_slice={batch!r}: this cache has no batch axis to slice, leave batch_slice out")
        if run is None:
            return batch.apply(stack, dim=1) if has_batch_dim and not batch.is_identity else stack
        if has_batch_dim or not self.has_batch_dim:
            _check_stack(stack, run)
            return stack if batch.is_identity else batch.apply(stack, dim=stack.ndim - 1 - len(run))
        if len(batch.indices(run[0])) != 1:
            raise ValueError(
                f"has_batch_dim=False is for a stack of one prompt, and the run has {run[0]} prompts: say which one it "
                "is with an integer batch_slice"
            )
        _check_stack(stack, run[1:], most_axes=1 + len(run))
        return stack

    def _run_shape(self, positions: Slice) -> tuple[int, ...] | None:
        """Return the lengths of the run's axes [batch pos], without those that are dropped; None if not known."""
        points = self.model.hook_dict
        for name in reversed(list(self.cache_dict)):
            # unembed has the positions that logits_to_keep keeps, and learned positions are the same for all prompts.
            skipped = name == "hook_pos_embed" or name.startswith("unembed.") or name not in points
            if not skipped and tuple(points[name].axes[:2]) == ("batch", "pos"):
                x = self[name]
                lead = x.shape[:2] if self.has_batch_dim else x.shape[:1]
                return tuple(lead[:-1]) + (() if positions.mode == "int" else (len(positions.indices(lead[-1])),))
        return None

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

    def _norm_and_scale(self, layer: int | None, mlp_input: bool, positions: Slice) -> tuple[Norm | None, Tensor]:
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
        return norm, positions.apply(scale, dim=-2)

    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "*component_batch_and_pos d_model"],
        tokens: LogitTokens,
        incorrect_tokens: LogitTokens | None = None,
        pos_slice: object = None,
        batch_slice: object = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, "*component_and_kept"]:
        """Return how much each component adds to a token's logit, or to a difference of two logits.

        `ln_final(component) @ W_U[:, token]`, where the norm scales by its cached statistics (Elhage et al. 2021, "A
        Mathematical Framework"). The biases of the norm and of the unembedding belong to no component.

        Args:
            residual_stack: [component batch pos d_model] with every prompt of the run, already cut to `pos_slice`.
            tokens: a string that is one token, a token, or tokens [batch] or [batch pos]: of every prompt of the run,
                or of those that `batch_slice` keeps. A tensor of one token serves every prompt and position.
            incorrect_tokens: tokens in the same form; their logits are subtracted.
            pos_slice: the positions that the stack holds.
            batch_slice: the prompts to keep, of the stack and of the run; an integer drops the axis.
            has_batch_dim: as for `apply_ln_to_stack`.

        Raises:
            ValueError: `tokens` and `incorrect_tokens` have different shapes, are not tokens of the model or do not
                fit the stack; and as `apply_ln_to_stack`.
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
        positions, batch = self._positions(pos_slice), Slice.unwrap(batch_slice)
        scaled = self.apply_ln_to_stack(residual_stack, -1, False, positions, batch, has_batch_dim)
        has_batch = has_batch_dim and self.has_batch_dim and batch.mode != "int"
        lead = tuple(scaled.shape[-1 - has_batch - (positions.mode != "int") : -1])
        if directions.ndim > 1 and not batch.is_identity:
            run = self._run_shape(positions)
            if run is None or directions.shape[0] == run[0]:
                directions = batch.apply(directions, dim=0)
        if directions.shape[:-1].numel() == 1:
            directions = directions.reshape(-1)  # one token for the whole stack
        if directions.ndim == 2 and len(lead) == 2:
            directions = directions[:, None]  # [batch 1 d_model]: the same at every position
        came = tuple(directions.shape[:-1])
        if came and (len(came) != len(lead) or any(one not in (1, size) for one, size in zip(came, lead, strict=True))):
            raise ValueError(
                f"tokens are for {came} of the stack's prompts and positions, and it has {lead}: give one token, one "
                "for each prompt, or one for each position of each prompt"
            )
        return (scaled * directions).sum(-1)


def _check_stack(stack: Tensor, lead: Sequence[int], most_axes: int | None = None) -> None:
    """Check that a stack has axes of these lengths before its last one, and no more axes than so many."""
    axes = ("batch", "pos")[: len(lead)] if most_axes is None else ("pos",)[: len(lead)]
    came = tuple(stack.shape[-1 - len(lead) : -1])
    if came != tuple(lead) or (most_axes is not None and stack.ndim > most_axes):
        raise ValueError(
            f"the stack has shape {tuple(stack.shape)}, and should end in [{' '.join((*axes, 'd_model'))}] with "
            f"{tuple(lead)}, as the run has: pos_slice says which positions a stack holds that is cut to them; "
            "batch_slice cuts a stack that has every prompt, so for a stack that is cut already take "
            "cache.apply_slice_to_batch_dim and leave batch_slice out"
        )
