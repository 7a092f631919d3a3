"""InputReading: turn the input of a forward pass into checked tokens, mask and layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hooked_lm import tokenization
from hooked_lm._support.inference import as_differentiable
from hooked_lm._support.precision import autocasts
from hooked_lm._support.torch_internals import values_readable
from hooked_lm.components import SequenceLayout
from hooked_lm.components.sequence import Prompt
from hooked_lm.hooks import HookedRootModule, any_live
from hooked_lm.kv_cache import HookedTransformerKeyValueCache
from hooked_lm.tokenization import PaddingSide, Prompts
from hooked_lm.tokenization.methods import TextInterface, check_attention_mask, describe, mask_tensor

__all__ = ["InputReading"]


class InputReading(TextInterface, HookedRootModule):
    """The input methods of `HookedTransformer`."""

    def _prompt(
        self,
        input: Prompts,
        prepend_bos: bool | None,
        padding_side: PaddingSide | None,
        attention_mask: Tensor | None,
        past_kv_cache: HookedTransformerKeyValueCache | None,
        start_at_layer: int | None,
        tokens: Tensor | None,
    ) -> Prompt:
        """Return the checked input of a pass; a key-value cache is extended by the mask of the new positions."""
        if start_at_layer is None:
            if tokens is not None:
                raise ValueError("tokens= goes with start_at_layer; without it the input is the tokens")
            tokens, attention_mask = self._read(input, prepend_bos, padding_side, attention_mask, past_kv_cache)
            layout = self._layout(tokens.shape[0], tokens.shape[1], attention_mask, past_kv_cache)
            return Prompt(tokens, attention_mask, None, layout)
        residual = self._check_residual(input, tokens)
        if attention_mask is not None:
            continuing = past_kv_cache is not None and past_kv_cache.length > 0
            attention_mask = mask_tensor(attention_mask, residual[..., 0], continuing)
        if tokens is not None:
            tokens = self._check_tokens(tokens)
            attention_mask = self._infer_mask(tokens, attention_mask, prepend_bos, padding_side, past_kv_cache)
        layout = self._layout(residual.shape[0], residual.shape[1], attention_mask, past_kv_cache)
        if any_live(self.hook_points()):
            # Without a copy, cached activations would share memory with the caller's tensor.
            residual = residual.clone()
        return Prompt(tokens, attention_mask, residual, layout)

    def tokens_and_mask(
        self,
        input: Prompts,
        attention_mask: Tensor | None = None,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the tokens [batch pos] of an input, and their mask; None if nothing is padded.

        Args:
            input, attention_mask, prepend_bos, padding_side: as for `forward`.
        """
        return self._read(input, prepend_bos, padding_side, attention_mask, None)

    def _read(
        self,
        input: Prompts,
        prepend_bos: bool | None,
        padding_side: PaddingSide | None,
        attention_mask: Tensor | None,
        past_kv_cache: HookedTransformerKeyValueCache | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return tokens [batch pos] on the model's device, and their mask (None if nothing is padded)."""
        if isinstance(input, str) or (isinstance(input, (list, tuple)) and input and isinstance(input[0], str)):
            if attention_mask is not None:
                raise ValueError("the attention mask of strings follows from their padding: pass tokens to use another")
            batch = self._tokenize(input, prepend_bos, padding_side)
            mask = None if batch.attention_mask is None else batch.attention_mask.to(self.embed.W_E.device)
            return self._check_tokens(batch.tokens), mask
        if not isinstance(input, (Tensor, np.ndarray, list, tuple)) or _has_no_axis(input):
            raise TypeError(f"the input is a string, a list of strings or tokens, got {describe(input)}")
        if len(input) == 0:
            raise ValueError(f"the input is empty, {describe(input)}: give one prompt at least, of one token at least")
        tokens = self._check_tokens(input)
        return tokens, self._infer_mask(tokens, attention_mask, prepend_bos, padding_side, past_kv_cache)

    def _check_residual(self, residual: object, tokens: Tensor | None) -> Tensor:
        if not isinstance(residual, Tensor) or residual.ndim != 3 or residual.shape[-1] != self.cfg.d_model:
            raise ValueError(
                f"with start_at_layer the input is the residual stream [batch pos {self.cfg.d_model}], "
                f"got {describe(residual)}"
            )
        if residual.numel() == 0:
            raise ValueError(f"the residual stream is empty: {describe(residual)}")
        if residual.is_floating_point() and autocasts(residual):
            residual = residual.to(self.embed.W_E.dtype)
        if residual.dtype != self.embed.W_E.dtype:
            raise ValueError(f"the residual stream has dtype {residual.dtype}, the model {self.embed.W_E.dtype}")
        if tokens is not None and (1, *tokens.shape)[-2:] != tuple(residual.shape[:2]):
            raise ValueError(f"tokens {tuple(tokens.shape)} do not fit the residual {tuple(residual.shape)}")
        return as_differentiable(residual)

    def _infer_mask(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        prepend_bos: bool | None,
        padding_side: PaddingSide | None,
        past_kv_cache: HookedTransformerKeyValueCache | None,
    ) -> Tensor | None:
        """Return the given mask, or that inferred from tokens where padding would change a number.

        Without a key-value cache padding on the right changes none in causal attention, and nothing is inferred.
        """
        side = self._padding_side(padding_side)
        tokenization.check_padding_side(side)
        continuing = past_kv_cache is not None and past_kv_cache.length > 0
        if attention_mask is not None:
            attention_mask = mask_tensor(attention_mask, tokens, continuing)
        if attention_mask is not None or self.tokenizer is None or (side == "right" and past_kv_cache is None):
            return attention_mask
        if side == "left" and not continuing:
            return tokenization.infer_attention_mask(self.tokenizer, tokens, self._prepends_bos(prepend_bos), side)
        return tokenization.infer_cached_padding(self.tokenizer, tokens, side, continuing)

    def _layout(
        self,
        batch: int,
        n_new: int,
        attention_mask: Tensor | None,
        past_kv_cache: HookedTransformerKeyValueCache | None,
    ) -> SequenceLayout:
        device = self.embed.W_E.device
        n_past = 0 if past_kv_cache is None else past_kv_cache.length
        if n_past + n_new > self.cfg.n_ctx:
            raise ValueError(f"{n_past + n_new} positions are more than this model's n_ctx of {self.cfg.n_ctx}")
        if past_kv_cache is not None and (len(past_kv_cache), past_kv_cache.batch_size) != (self.cfg.n_layers, batch):
            raise ValueError(
                f"the key-value cache is for {len(past_kv_cache)} layers and batch {past_kv_cache.batch_size}; "
                f"the model has {self.cfg.n_layers} layers and the input batch {batch}"
            )
        if past_kv_cache is not None and self.outgrows(past_kv_cache, n_new):
            raise ValueError(
                f"with {n_past + n_new} positions this model rotates the {n_past} in the key-value cache anew, so that "
                "the cached keys are out of date: run the whole text with a new cache (generate does)"
            )
        padded = False
        if attention_mask is not None:
            check_attention_mask(attention_mask, batch, n_new, continuing=n_past > 0)
            # Where values cannot be read, padding is assumed.
            padded = not (values_readable(attention_mask) and bool(attention_mask.all()))
            attention_mask = as_differentiable(attention_mask.to(device=device, dtype=torch.long))
        if past_kv_cache is not None:
            if attention_mask is None:
                attention_mask = torch.ones(batch, n_new, dtype=torch.long, device=device)
            before = past_kv_cache.is_padded()
            attention_mask = past_kv_cache.append_attention_mask(attention_mask, padded)
            padded = padded or before
        valid = attention_mask.bool() if attention_mask is not None and padded else None
        return SequenceLayout(n_new, n_past, device, valid)

    def outgrows(self, cache: HookedTransformerKeyValueCache, n_new: int = 1) -> bool:
        """Return whether `n_new` more positions would change the keys in a key-value cache.

        They do where rotary frequencies depend on the prompt's length (dynamic NTK, LongRoPE).

        Args:
            cache: the key-value cache.
            n_new: how many positions are to come.
        """
        if cache.length == 0 or not (self.cfg.use_dynamic_rope or self.cfg.use_longrope):
            return False
        lengths = cache.previous_attention_mask.sum(1).tolist()
        return any(self.cfg.rotation_changes(length, length + n_new) for length in lengths)


def _has_no_axis(input: Tensor | np.ndarray | Sequence[object]) -> bool:
    return isinstance(input, (Tensor, np.ndarray)) and input.ndim == 0
