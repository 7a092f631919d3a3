"""Rewriting a model's weights without changing its log-probabilities: folding, centring, refactoring.

Pure functions `(config, weights) -> (config, weights)` on a state dict. Nothing given is written to. Each block is
rewritten from its own weights alone, so the functions also work on part of a model, any set of whole blocks.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from einops import einsum
from torch import Tensor

from hooked_lm.config import HookedTransformerConfig
from hooked_lm.factored_matrix import FactoredMatrix

Weights = dict[str, Tensor]
Processed = tuple[HookedTransformerConfig, Weights]


def fold_layer_norm(cfg: HookedTransformerConfig, weights: Weights) -> Processed:
    """Move the gains and biases of `ln1`, `ln2`, `ln_final` (and of SoLU's `ln`) into the weights that read from them.

    `x_hat * w + b` read by `W` is `x_hat` read by `diag(w) W`, with `b W` added to the reader's bias. After LayerNorm,
    whose output has mean zero, the readers' mean over `d_model` does nothing and is removed.

    The config's `normalization_type` becomes `"LNPre"` or `"RMSPre"`; without a gain to fold nothing happens.
    """
    if cfg.normalization_type not in ("LN", "RMS"):
        return cfg, weights
    weights = dict(weights)
    for prefix in _block_prefixes(weights):
        attn_readers = [(f"{prefix}attn.W_{x}", f"{prefix}attn.b_{x}") for x in "QKV"]
        mlp_readers = [(f"{prefix}mlp.W_{x}", f"{prefix}mlp.b_{x}") for x in ("in", "gate", "router")]
        _fold_norm(weights, f"{prefix}ln1", attn_readers, centre=cfg.normalization_type == "LN")
        _fold_norm(weights, f"{prefix}ln2", mlp_readers, centre=cfg.normalization_type == "LN")
        _fold_norm(weights, f"{prefix}mlp.ln", [(f"{prefix}mlp.W_out", f"{prefix}mlp.b_out")], centre=True)
    final_centred = cfg.normalization_type == "LN" and not cfg.final_rms
    _fold_norm(weights, "ln_final", [("unembed.W_U", "unembed.b_U")], centre=final_centred)
    return cfg.replace(normalization_type=f"{cfg.normalization_type}Pre"), weights


def _fold_norm(weights: Weights, norm: str, readers: Iterable[tuple[str, str]], centre: bool) -> None:
    gain, bias = weights.pop(f"{norm}.w", None), weights.pop(f"{norm}.b", None)
    if gain is None:
        return
    for W_name, b_name in readers:
        if W_name not in weights:
            continue
        W = weights[W_name]  # [... d_model out]
        if bias is not None:
            weights[b_name] = weights[b_name] + einsum(bias, W, "d_model, ... d_model out -> ... out")
        W = gain[:, None] * W
        weights[W_name] = W - W.mean(-2, keepdim=True) if centre else W


def center_writing_weights(cfg: HookedTransformerConfig, weights: Weights) -> Processed:
    """Subtract its mean over `d_model` from everything that is written to the residual stream.

    LayerNorm subtracts that mean anyway. The positions of `"shortformer"` are left alone: they bypass the stream.
    """
    writers = r"embed\.W_E|blocks\.\d+\.(attn\.(W_O|b_O)|mlp\.(W_out|b_out))"
    if cfg.positional_embedding_type != "shortformer":
        writers += r"|pos_embed\.W_pos"
    return cfg, {
        name: value - value.mean(-1, keepdim=True) if re.fullmatch(writers, name) else value
        for name, value in weights.items()
    }


def center_unembed(cfg: HookedTransformerConfig, weights: Weights) -> Processed:
    """Subtract the mean over the vocabulary from `W_U` and `b_U`: softmax does not see a constant."""
    return cfg, {
        name: value - value.mean(-1, keepdim=True) if name in ("unembed.W_U", "unembed.b_U") else value
        for name, value in weights.items()
    }


def fold_value_biases(cfg: HookedTransformerConfig, weights: Weights) -> Processed:
    """Move `b_V` into `b_O`: a pattern's rows sum to one, so every destination receives the whole of it."""
    weights = dict(weights)
    for prefix in _block_prefixes(weights):
        W_O, b_V = weights[f"{prefix}attn.W_O"], weights[f"{prefix}attn.b_V"]
        per_head = b_V.repeat_interleave(W_O.shape[0] // b_V.shape[0], dim=0)
        moved = einsum(per_head, W_O, "head d_head, head d_head d_model -> d_model")
        weights[f"{prefix}attn.b_O"] = weights[f"{prefix}attn.b_O"] + moved
        weights[f"{prefix}attn.b_V"] = torch.zeros_like(b_V)
    return cfg, weights


def refactor_factored_attn_matrices(cfg: HookedTransformerConfig, weights: Weights) -> Processed:
    """Rotate each head's internal basis to the singular vectors of its QK and OV matrices.

    `W_Q` and `W_K`, with their biases as one more row, share the singular values of their product equally. `b_V` is
    folded into `b_O`, then `W_V = U diag(S)` and `W_O = V^T`.

    Raises:
        ValueError: rotary positions, query-key norms or grouped queries fix the basis, so that it cannot be rotated.
    """
    obstacle = _refactoring_obstacle(cfg)
    if obstacle:
        raise ValueError(f"refactor_factored_attn_matrices: {obstacle}")
    cfg, weights = fold_value_biases(cfg, weights)
    for prefix in _block_prefixes(weights):

        def augmented(which: str, prefix: str = prefix) -> Tensor:
            W, b = weights[f"{prefix}attn.W_{which}"], weights[f"{prefix}attn.b_{which}"]
            return torch.cat((W, b[:, None]), dim=1)  # [head d_model+1 d_head]

        even = FactoredMatrix(augmented("Q"), augmented("K").mT).make_even()
        for which, factor in (("Q", even.A), ("K", even.B.mT)):
            weights[f"{prefix}attn.W_{which}"], weights[f"{prefix}attn.b_{which}"] = factor[:, :-1], factor[:, -1]
        U, S, V = FactoredMatrix(weights[f"{prefix}attn.W_V"], weights[f"{prefix}attn.W_O"]).svd()
        weights[f"{prefix}attn.W_V"], weights[f"{prefix}attn.W_O"] = U * S[:, None], V.mT
    return cfg, weights


def _refactoring_obstacle(cfg: HookedTransformerConfig) -> str | None:
    if cfg.positional_embedding_type == "rotary":
        return "rotary positions act on a head's dimensions, which therefore cannot be rotated freely"
    if cfg.use_qk_norm:
        return "the query-key norm acts on a head's dimensions, which therefore cannot be rotated freely"
    if cfg.n_kv_heads != cfg.n_heads:
        return "with grouped queries several heads share one key-value basis"
    if cfg.d_head > cfg.d_model:
        return f"d_head {cfg.d_head} exceeds d_model {cfg.d_model}: the singular vectors would not fill a head"
    return None


def _folding_obstacle(cfg: HookedTransformerConfig) -> str | None:
    if cfg.positional_embedding_type == "shortformer":
        return "shortformer adds positions after ln1, so its gain cannot move past them"
    return None


def _writing_obstacle(cfg: HookedTransformerConfig) -> str | None:
    if cfg.normalization_type not in ("LN", "LNPre") or cfg.final_rms:
        return "only LayerNorm ignores the residual stream's mean"
    return None


def _unembed_obstacle(cfg: HookedTransformerConfig) -> str | None:
    if cfg.output_logits_soft_cap > 0:
        return "the soft-cap on the logits is not blind to a constant"
    return None


@dataclass(frozen=True)
class Step:
    """One processing step: what it does, and why it would change the function of some models."""

    apply: Callable[[HookedTransformerConfig, Weights], Processed]
    obstacle: Callable[[HookedTransformerConfig], str | None]
    default: bool = True


# In this order: folding the norms makes the biases that later steps move.
STEPS: dict[str, Step] = {
    "fold_ln": Step(fold_layer_norm, _folding_obstacle),
    "center_writing_weights": Step(center_writing_weights, _writing_obstacle),
    "center_unembed": Step(center_unembed, _unembed_obstacle),
    "fold_value_biases": Step(fold_value_biases, lambda cfg: None),
    "refactor_factored_attn_matrices": Step(refactor_factored_attn_matrices, _refactoring_obstacle, default=False),
}


def plan_processing(cfg: HookedTransformerConfig, asked: dict[str, bool | None]) -> list[str]:
    """Return the steps to apply, in order.

    Args:
        cfg: the unprocessed config.
        asked: step name -> True (do it), False (leave it), None (the default: do it where it preserves the function).

    Warns:
        UserWarning: a step asked for by True would change the log-probabilities; it is left out.
    """
    plan = []
    for name, step in STEPS.items():
        wanted = asked.get(name)
        if wanted is False or (wanted is None and not step.default):
            continue
        obstacle = step.obstacle(cfg)
        if obstacle is None:
            plan.append(name)
        elif wanted:
            warnings.warn(
                f"{name} is left out, since it would change what the model computes: {obstacle}", stacklevel=3
            )
    return plan


def process(cfg: HookedTransformerConfig, weights: Weights, plan: Iterable[str]) -> Processed:
    """Apply the named steps, one after the other."""
    for name in plan:
        cfg, weights = STEPS[name].apply(cfg, weights)
    return cfg, weights


def _block_prefixes(weights: Weights) -> list[str]:
    """The `blocks.{layer}.` prefixes there are, in order of appearance."""
    found = (re.match(r"blocks\.\d+\.", name) for name in weights)
    return list(dict.fromkeys(match[0] for match in found if match))


# State dicts of the classic library

_CLASSIC_BUFFERS = re.compile(r"blocks\.\d+\.attn\.(mask|IGNORE|rotary_sin|rotary_cos|alibi)")
_CLASSIC_GROUPED = re.compile(r"(blocks\.\d+\.attn\.)_([Wb]_[KV])")
_CLASSIC_EXPERT = re.compile(r"(blocks\.\d+\.mlp\.)experts\.(\d+)\.([Wb]_(?:in|gate|out))(\.weight)?")
_CLASSIC_ROUTER = re.compile(r"(blocks\.\d+\.mlp\.W_gate)\.weight")


def from_classic(state_dict: Weights) -> Weights:
    """Return a state dict in today's names from one that the classic library may have saved.

    Buffers are dropped by name, `_W_K`-style grouped names lose their underscore, experts are stacked, and biases the
    classic library did not have are zero. Names of today pass through.

    Raises:
        ValueError: a gated MLP with a non-zero `b_in`, which the classic library added after the product of gate and
            input, where this one adds it before.
    """
    weights: Weights = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, value in state_dict.items():
        if _CLASSIC_BUFFERS.fullmatch(name):
            continue
        expert = _CLASSIC_EXPERT.fullmatch(name)
        if expert:
            experts.setdefault(expert[1] + expert[3], {})[int(expert[2])] = value.T if expert[4] else value
        elif _CLASSIC_ROUTER.fullmatch(name):
            weights[name.removesuffix(".weight")] = value.T
        else:
            weights[_CLASSIC_GROUPED.sub(r"\1\2", name)] = value
    # The classic router of a mixture is its `W_gate`, a name that here belongs to the experts.
    for prefix in {name.rpartition(".")[0] for name in experts}:
        if f"{prefix}.W_gate" in weights:
            weights[f"{prefix}.W_router"] = weights.pop(f"{prefix}.W_gate")
    for name, by_number in experts.items():
        weights[name] = torch.stack([by_number[number] for number in sorted(by_number)])
        W, _, which = name.rpartition(".")[2].partition("_")
        bias = f"{name.rpartition('.')[0]}.b_{which}"
        if W == "W" and bias not in experts and which != "gate":
            weights[bias] = weights[name].new_zeros((len(by_number), weights[name].shape[-1]))
    return _with_absent_biases(weights)


def _with_absent_biases(weights: Weights) -> Weights:
    added = {}
    for name, value in weights.items():
        prefix, _, last = name.rpartition(".")
        pairs = {"W_gate": "b_gate", "W_router": "b_router"}
        if prefix.endswith(".mlp") and last in pairs and f"{prefix}.{pairs[last]}" not in weights:
            b_in = weights.get(f"{prefix}.b_in")
            if last == "W_gate" and b_in is not None and bool(b_in.any()):
                raise ValueError(
                    f"{prefix}.b_in is not zero and {prefix}.b_gate is absent: the classic library added b_in after "
                    "the product of gate and input, which this model cannot express"
                )
            added[f"{prefix}.{pairs[last]}"] = value.new_zeros((*value.shape[:-2], value.shape[-1]))
    return {**weights, **added}
