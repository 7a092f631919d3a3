"""ProcessWeights: processing a state dict under a config, by the classic library's names.

ProcessWeights.fold_layer_norm(state_dict, cfg)   # a state dict from a state dict, without a model
ProcessWeights.process_weights(state_dict, cfg)   # all steps that preserve the function
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hooked_lm._support.plain_data import PlainData
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.weights.processing import Weights, plan_processing
from hooked_lm.weights.state_dicts import fold_norms, process_state_dict

__all__ = ["ProcessWeights"]


class ProcessWeights:
    """The processing steps as functions of a state dict and a config.

    Each returns a new state dict and leaves the given one as it is. `weights.process` does the same for a config and
    its weights together. `adapter=`, for checkpoints in other libraries' names, is not taken: `weight_conversion`
    converts those.
    """

    @staticmethod
    def fold_layer_norm(
        state_dict: Mapping[str, Tensor],
        cfg: HookedTransformerConfig | PlainData,
        fold_biases: bool = True,
        center_weights: bool | None = True,
    ) -> Weights:
        """Return a state dict with the norms folded; see `weights.state_dicts.fold_norms`.

        Args:
            state_dict: tensors by their names.
            cfg: of the model that the state dict is for.
            fold_biases: False folds the gains alone.
            center_weights: subtract from the weights that read from a norm their mean over `d_model`; None where that
                changes nothing that the model computes.
        """
        return fold_norms(HookedTransformerConfig.unwrap(cfg), state_dict, fold_biases, center_weights)

    @staticmethod
    def center_writing_weights(state_dict: Mapping[str, Tensor], cfg: HookedTransformerConfig | PlainData) -> Weights:
        """Return a state dict whose writing weights have mean zero; see `weights.center_writing_weights`.

        Args:
            state_dict, cfg: as for `fold_layer_norm`.
        """
        return _processed("center_writing_weights", state_dict, cfg)

    @staticmethod
    def center_unembed(
        state_dict: Mapping[str, Tensor], cfg: HookedTransformerConfig | PlainData | None = None
    ) -> Weights:
        """Return a state dict whose unembedding has mean zero over the vocabulary.

        Args:
            state_dict: tensors by their names, `unembed.W_U` among them.
            cfg: accepted for compatibility, without effect.
        """
        # Every centring of the unembedding is the same, so that any config serves.
        return _processed("center_unembed", state_dict, _ANY if cfg is None else cfg)

    @staticmethod
    def fold_value_biases(state_dict: Mapping[str, Tensor], cfg: HookedTransformerConfig | PlainData) -> Weights:
        """Return a state dict with `b_V` moved into `b_O`; see `weights.fold_value_biases`.

        Args:
            state_dict, cfg: as for `fold_layer_norm`.
        """
        return _processed("fold_value_biases", state_dict, cfg)

    @staticmethod
    def refactor_factored_attn_matrices(
        state_dict: Mapping[str, Tensor], cfg: HookedTransformerConfig | PlainData
    ) -> Weights:
        """Return a state dict with each head's basis rotated; see `weights.refactor_factored_attn_matrices`.

        Args:
            state_dict, cfg: as for `fold_layer_norm`.

        Raises:
            ValueError: something fixes the basis, such as rotary positions.
        """
        return _processed("refactor_factored_attn_matrices", state_dict, cfg)

    @staticmethod
    def process_weights(
        state_dict: Mapping[str, Tensor],
        cfg: HookedTransformerConfig | PlainData,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> Weights:
        """Return a state dict after all the steps asked for; one that would change the function is left out.

        Args:
            state_dict, cfg: as for `fold_layer_norm`.
            fold_ln, center_writing_weights, center_unembed, fold_value_biases, refactor_factored_attn_matrices: the
                steps to apply.

        Warns:
            UserWarning: a step asked for was left out.
        """
        cfg = HookedTransformerConfig.unwrap(cfg)
        asked: dict[str, bool | None] = {
            "fold_ln": fold_ln,
            "center_writing_weights": center_writing_weights,
            "center_unembed": center_unembed,
            "fold_value_biases": fold_value_biases,
            "refactor_factored_attn_matrices": refactor_factored_attn_matrices,
        }
        weights = dict(state_dict)
        for step in plan_processing(cfg, asked):
            weights = fold_norms(cfg, weights) if step == "fold_ln" else process_state_dict(cfg, weights, step)
        return weights

    # Of single tensors

    @staticmethod
    def fold_layer_norm_weight_single(w_tensor: Tensor, ln_weight: Tensor) -> Tensor:
        """Return a weight with a norm's gain folded in.

        Args:
            w_tensor: [... d_model out].
            ln_weight: the gain, [d_model].
        """
        return w_tensor * ln_weight[:, None]

    @staticmethod
    def fold_layer_norm_bias_single(w_tensor: Tensor, b_tensor: Tensor, ln_bias: Tensor) -> Tensor:
        """Return the bias of a weight with a norm's bias folded in.

        Args:
            w_tensor: the weight, [... d_model out].
            b_tensor: the weight's bias, [... out].
            ln_bias: [d_model].
        """
        return b_tensor + torch.einsum("d,...do->...o", ln_bias, w_tensor)

    @staticmethod
    def center_weight_single(w_tensor: Tensor) -> Tensor:
        """Return a weight without its mean over `d_model`.

        Args:
            w_tensor: [... d_model out].
        """
        return w_tensor - w_tensor.mean(-2, keepdim=True)


_ANY = HookedTransformerConfig(n_layers=1, d_model=1, n_heads=1, n_ctx=1, d_vocab=1, attn_only=True)


def _processed(step: str, state_dict: Mapping[str, Tensor], cfg: HookedTransformerConfig | PlainData) -> Weights:
    return process_state_dict(HookedTransformerConfig.unwrap(cfg), state_dict, step)
