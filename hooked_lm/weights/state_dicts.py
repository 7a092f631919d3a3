"""Processing a state dict that belongs to no model yet: the classic functions from tensors to tensors.

The result has the names that the given state dict has, so that it loads into a model of the same config. A norm whose
gain has been folded away keeps it, as ones, and its bias, as zeros; under a config whose norms have neither (`LNPre`,
`RMSPre`), both are left out.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from hooked_lm.config import HookedTransformerConfig
from hooked_lm.weights import processing
from hooked_lm.weights.processing import Weights
from weight_conversion.classic_state import from_classic

__all__ = ["fill_missing", "fold_norms", "folded_away", "process_state_dict"]

# Gains and biases of the norms that folding moves into other weights.
_FOLDED_AWAY = re.compile(r"(blocks\.\d+\.(ln[12]|mlp\.ln)|ln_final|unembed\.transform\.ln)\.[wb]")
# Matrices without which a layer computes nothing.
_ESSENTIAL = re.compile(r"blocks\.\d+\.(attn|mlp|shortcut)\.(.+\.)?W_\w+")


def folded_away(name: str) -> bool:
    """Return whether a tensor is the gain or bias of a norm that folding moves into other weights.

    Args:
        name: of the tensor.
    """
    return _FOLDED_AWAY.fullmatch(name) is not None


@torch.no_grad()
def process_state_dict(cfg: HookedTransformerConfig, state_dict: Mapping[str, Tensor], step: str) -> Weights:
    """Return a state dict after one processing step other than `fold_ln`; the given one is left as it is.

    Args:
        cfg: of the model that the state dict is for.
        state_dict: tensors by their names, or by those of the classic library.
        step: a name of `weights.STEPS`.

    Raises:
        ValueError: the step is impossible under this config.
    """
    cfg, weights = _read(cfg, state_dict)
    return processing.process(cfg, weights, [step])[1]


@torch.no_grad()
def fold_norms(
    cfg: HookedTransformerConfig, state_dict: Mapping[str, Tensor], fold_biases: bool = True, center: bool | None = None
) -> Weights:
    """Return a state dict with the norms' gains and biases folded into the weights that read from them.

    Args:
        cfg: of the model that the state dict is for.
        state_dict: tensors by their names, or by those of the classic library; it is left as it is.
        fold_biases: False folds the gains alone and leaves the biases of the norms as they are.
        center: subtract from the weights that read from a norm their mean over `d_model`; None does so where the norm
            removes the mean, and centring changes nothing that the model computes.

    Raises:
        ValueError: a bias of a norm has to be folded into a bias that the state dict lacks.

    Warns:
        UserWarning: `center=True` changes what the model computes, since a norm does not remove the mean.
    """
    cfg, weights = _read(cfg, state_dict)
    weights = processing.with_own_copies("fold_ln", cfg, weights)
    keeps_gains = cfg.normalization_type in ("LN", "RMS")
    changed = False
    for norm in processing.norms_with_readers(cfg, weights):
        gain, bias = weights.get(f"{norm.name}.w"), weights.get(f"{norm.name}.b") if fold_biases else None
        for reader in norm.readers:
            if gain is not None:
                processing.fold_into_reader_(weights, reader, gain, bias)
            if norm.centred if center is None else center:
                changed = changed or not norm.centred
                processing.center_reader_(weights, reader)
        for name, value, neutral in ((f"{norm.name}.w", gain, 1.0), (f"{norm.name}.b", bias, 0.0)):
            if value is not None and keeps_gains:
                weights[name] = torch.full_like(value, neutral)
            elif value is not None:
                del weights[name]
    if changed:
        warnings.warn(
            "fold_layer_norm: a norm of this model does not remove the mean, so that centring the weights that read "
            "from it changes what the model computes: pass center_weights=False",
            stacklevel=4,  # past the no_grad wrapper and the method
        )
    return weights


def fill_missing(own: Weights, state_dict: Mapping[str, Tensor]) -> tuple[Weights, list[str]]:
    """Return a state dict with the tensors that it lacks taken from a model, and their names.

    Args:
        own: the model's tensors by their names.
        state_dict: tensors by their names, or by those of the classic library; it is left as it is.

    Raises:
        ValueError: it lacks a matrix of attention or of an MLP, which no default can stand for.
    """
    weights = from_classic(dict(state_dict))
    missing = [name for name in own if name not in weights]
    essential = [name for name in missing if _ESSENTIAL.fullmatch(name)]
    if essential:
        raise ValueError(
            f"the state dict has no {', '.join(essential[:8])}{' and others' if len(essential) > 8 else ''}, and a "
            "layer without its matrix computes something else: is it of another architecture, or named otherwise?"
        )
    return {**weights, **{name: own[name] for name in missing}}, missing


def _read(cfg: HookedTransformerConfig, state_dict: Mapping[str, Tensor]) -> tuple[HookedTransformerConfig, Weights]:
    """Return a state dict in this library's names, and the config it is of: untied if it has an unembedding."""
    weights = from_classic(dict(state_dict))
    if "unembed.W_U" in weights:
        cfg = cfg.replace(tie_word_embeddings=False)
    return cfg, weights
