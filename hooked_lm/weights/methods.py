"""WeightProcessing: a model's methods that fold, centre and refactor its weights, or those of a state dict."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Self, overload

import torch
from torch import Tensor, nn

from hooked_lm._support.plain_data import PlainData
from hooked_lm.components import Embed, Norm, TransformerBlock, Unembed
from hooked_lm.components.spread import Spread
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.tokenization import Tokenizer
from hooked_lm.weights import processing, state_dicts
from hooked_lm.weights.processing import Weights
from hooked_lm.weights.surgery import check_nothing_lost, chosen_layers, place_copies, select_layers, sources

__all__ = ["WeightProcessing"]


class WeightProcessing(nn.Module):
    """The processing methods of `HookedTransformer`.

    Those named after a step act on the model's weights in place and return nothing; with a state dict they return it
    processed (see `weights.state_dicts`) and leave the model, and the given state dict, as they are.
    """

    cfg: HookedTransformerConfig
    # The processing steps applied to the weights, so that loading a saved model does not apply them again.
    processed: tuple[str, ...] = ()
    # The HuggingFace config of the checkpoint, from which `to_huggingface` writes one.
    origin: PlainData | None = None
    tokenizer: Tokenizer | None
    spread_over: Spread | None
    embed: Embed
    blocks: Sequence[TransformerBlock]
    unembed: Unembed

    def own_tensors(self) -> Weights:
        """Return the state dict, without an unembedding that is the transpose of the embedding.

        Raises:
            ValueError: this process has a part of the weights.
        """
        if getattr(self, "ranks", None) is not None:
            raise ValueError("this process has a part of the model's weights: save and process the model on one device")
        weights: Weights = dict(self.state_dict())
        if self.cfg.tie_word_embeddings:
            weights.pop("unembed.W_U", None)
        return weights

    def process_weights_(
        self,
        fold_ln: bool | None = None,
        center_writing_weights: bool | None = None,
        center_unembed: bool | None = None,
        refactor_factored_attn_matrices: bool | None = None,
        fold_value_biases: bool | None = None,
    ) -> None:
        """Process the model's weights in place, by the steps that preserve its function.

        Args:
            fold_ln, center_writing_weights, center_unembed, refactor_factored_attn_matrices, fold_value_biases: True or
                False for a step; None for the default of `from_pretrained`. A step that would change the function is
                left out, with a warning if it was True.
        """
        asked = {
            "fold_ln": fold_ln,
            "center_writing_weights": center_writing_weights,
            "center_unembed": center_unembed,
            "fold_value_biases": fold_value_biases,
            "refactor_factored_attn_matrices": refactor_factored_attn_matrices,
        }
        for step in processing.plan_processing(self.cfg, asked):
            self._apply_step(step)

    @overload
    def fold_layer_norm(self, state_dict: None = None) -> None: ...
    @overload
    def fold_layer_norm(
        self, state_dict: Mapping[str, Tensor], fold_biases: bool = True, center_weights: bool | None = True
    ) -> Weights: ...
    def fold_layer_norm(
        self,
        state_dict: Mapping[str, Tensor] | None = None,
        fold_biases: bool = True,
        center_weights: bool | None = True,
    ) -> Weights | None:
        """Fold the norms' gains and biases into the weights that read from them; see `weights.fold_layer_norm`.

        Args:
            state_dict: tensors to process and return instead of the model's own.
            fold_biases, center_weights: for a state dict, as for `weights.state_dicts.fold_norms`. The model's own
                biases are always folded, and its weights are centred after LayerNorm.

        Raises:
            ValueError: one of the options is False without a state dict.
        """
        if state_dict is not None:
            return state_dicts.fold_norms(self.cfg, state_dict, fold_biases, center_weights)
        if not fold_biases or center_weights is False:
            raise ValueError(
                "fold_biases=False and center_weights=False are for a state dict: without their biases the model's "
                "norms could not be dropped. Pass model.state_dict(), and load what comes back"
            )
        return self._apply_step("fold_ln")

    @overload
    def center_writing_weights(self, state_dict: None = None) -> None: ...
    @overload
    def center_writing_weights(self, state_dict: Mapping[str, Tensor]) -> Weights: ...
    def center_writing_weights(self, state_dict: Mapping[str, Tensor] | None = None) -> Weights | None:
        """Centre the weights that write to the stream, whatever the norm; see `weights.center_writing_weights`.

        Args:
            state_dict: tensors to process and return instead of the model's own.
        """
        return self._process("center_writing_weights", state_dict)

    @overload
    def center_unembed(self, state_dict: None = None) -> None: ...
    @overload
    def center_unembed(self, state_dict: Mapping[str, Tensor]) -> Weights: ...
    def center_unembed(self, state_dict: Mapping[str, Tensor] | None = None) -> Weights | None:
        """Centre the unembedding over the vocabulary; see `weights.center_unembed`.

        Args:
            state_dict: tensors to process and return instead of the model's own.
        """
        return self._process("center_unembed", state_dict)

    @overload
    def fold_value_biases(self, state_dict: None = None) -> None: ...
    @overload
    def fold_value_biases(self, state_dict: Mapping[str, Tensor]) -> Weights: ...
    def fold_value_biases(self, state_dict: Mapping[str, Tensor] | None = None) -> Weights | None:
        """Move the value biases into attention's output bias; see `weights.fold_value_biases`.

        Args:
            state_dict: tensors to process and return instead of the model's own.
        """
        return self._process("fold_value_biases", state_dict)

    @overload
    def refactor_factored_attn_matrices(self, state_dict: None = None) -> None: ...
    @overload
    def refactor_factored_attn_matrices(self, state_dict: Mapping[str, Tensor]) -> Weights: ...
    def refactor_factored_attn_matrices(self, state_dict: Mapping[str, Tensor] | None = None) -> Weights | None:
        """Rotate each head's basis to its singular vectors; see `weights.refactor_factored_attn_matrices`.

        Args:
            state_dict: tensors to process and return instead of the model's own.

        Raises:
            ValueError: something fixes the basis, such as rotary positions.
        """
        return self._process("refactor_factored_attn_matrices", state_dict)

    def fill_missing_keys(self, state_dict: Mapping[str, Tensor]) -> Weights:
        """Return a state dict with the tensors that it lacks taken from this model; the given one is left as it is.

        Args:
            state_dict: tensors by their names, or by those of the classic library.

        Raises:
            ValueError: it lacks a matrix of attention or of an MLP, which no default can stand for.

        Warns:
            UserWarning: it lacks another matrix, a norm's gain or bias, or a bias that is not zero in this model; the
                message names them.
        """
        weights, missing = state_dicts.fill_missing(self.own_tensors(), state_dict)
        # A layer without biases is one with zeros.
        notable = [name for name in missing if ".b_" not in name or bool(weights[name].any())]
        if notable:
            warnings.warn(
                f"the state dict has no {', '.join(notable)}: filled with the model's present values", stacklevel=2
            )
        return weights

    def with_layers(self, layers: Sequence[int]) -> Self:
        """Return a new model with these blocks of this one, in this order; embeddings and unembedding are the same.

        Blocks may be left out, moved, or come several times. Each computes in its new place what it computed in its
        old one; see `weights.select_layers`. The new model has copies of the weights, a copy of its own for every time
        that a block comes, on the devices of the originals, and the tokenizer of this model.

        Args:
            layers: indices of layers, such as `[0, 2, 1, 1, 3]`; negative ones count from the end.

        Raises:
            TypeError: `layers` is not a sequence of integers.
            ValueError: a layer out of range; a block that would not be the same in its new place; hooks, components or
                attributes of one's own, which the new model would lack; or this process has a part of the weights.
        """
        cfg, weights = select_layers(self.cfg, self.own_tensors(), layers)
        chosen = chosen_layers(self.cfg, layers)
        kept = {"device": self.cfg.device, "tokenizer_name": cfg.tokenizer_name, "init_weights": cfg.init_weights}
        with torch.device("meta"):
            built = type(self)(cfg.replace(init_weights=False, device=None, tokenizer_name=None), move_to_device=False)
        if self.tokenizer is not None:
            built.tokenizer = self.tokenizer
        check_nothing_lost(self, built, chosen)
        here = {name for name, one in self.named_parameters() if one.requires_grad}
        moved = sources(here, chosen)
        place_copies(built, weights, moved.keys())
        built.cfg.set_unlocked(**kept)
        built.spread_over = Spread.of(built.embed.W_E, built.blocks)
        built.processed, built.origin = self.processed, self.origin
        built.train(self.training)
        return built

    def _process(self, step: str, state_dict: Mapping[str, Tensor] | None) -> Weights | None:
        if state_dict is None:
            return self._apply_step(step)
        return state_dicts.process_state_dict(self.cfg, state_dict, step)

    @torch.no_grad()
    def _apply_step(self, name: str) -> None:
        cfg, weights = processing.process(self.cfg, self.own_tensors(), [name])
        self._install(cfg, weights)
        self.processed = tuple(dict.fromkeys((*self.processed, name)))

    def _install(self, cfg: HookedTransformerConfig, weights: Weights) -> None:
        """Copy processed weights into the model; norms whose gain has been folded away lose it."""
        self.cfg.set_unlocked(normalization_type=cfg.normalization_type, tie_word_embeddings=cfg.tie_word_embeddings)
        if not cfg.tie_word_embeddings:
            self.unembed.untie(torch.contiguous_format)
        for name, module in self.named_modules():
            if isinstance(module, Norm) and f"{name}.w" not in weights:
                module.drop_gain_and_bias()
        nn.Module.load_state_dict(self, weights, strict=True)
