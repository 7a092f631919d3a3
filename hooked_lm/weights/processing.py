"""Rewriting a model's weights without changing its log-probabilities: folding, centring, refactoring.

Pure functions `(config, weights) -> (config, weights)` on a state dict; their arguments are not changed. Loading uses
the steps of `STEPS`, which do the same in place. Each block is rewritten from its own weights alone, so a state dict
with only some whole blocks can be processed too.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from einops import einsum
from torch import Tensor

from hooked_lm._support.precision import at_least_single
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.factored_matrix import FactoredMatrix

__all__ = [
    "STEPS",
    "NormReaders",
    "Processed",
    "Step",
    "Weights",
    "center_reader_",
    "center_unembed",
    "center_writing_weights",
    "fold_into_reader_",
    "fold_layer_norm",
    "fold_value_biases",
    "norms_with_readers",
    "plan_processing",
    "process",
    "process_",
    "refactor_factored_attn_matrices",
    "untie",
    "unties",
    "with_own_copies",
]

Weights = dict[str, Tensor]
Processed = tuple[HookedTransformerConfig, Weights]


def fold_layer_norm(cfg: HookedTransformerConfig, weights: Weights) -> Processed:
    """Move gains and biases of `ln1`, `ln2`, `ln_final`, SoLU's `ln` and `unembed.transform.ln` into their readers.

    `x_hat * w + b` read by `W` is `x_hat` read by `diag(w) W`, with `b W` added to the reader's bias. After LayerNorm,
    whose output has mean zero, the readers' mean over `d_model` does nothing and is removed.

    The config's `normalization_type` becomes `"LNPre"` or `"RMSPre"`. Without a gain to fold, nothing changes.

    Args:
        cfg: the config that the weights are of.
        weights: tensors by their names; they are left as they are.
    """
    return _purely("fold_ln", cfg, weights)


def center_writing_weights(cfg: HookedTransformerConfig, weights: Weights) -> Processed:
    """Subtract the mean over `d_model` from all weights and biases that write to the residual stream.

    LayerNorm subtracts that mean anyway. The positions of `"shortformer"` are left alone: they bypass the stream.

    Args:
        cfg: the config that the weights are of.
        weights: tensors by their names; they are left as they are.
    """
    return _purely("center_writing_weights", cfg, weights)


def center_unembed(cfg: HookedTransformerConfig, weights: Weights) -> Processed:
    """Subtract the mean over the vocabulary from `W_U` and `b_U`: a softmax is unchanged by a constant.

    Args:
        cfg: the config that the weights are of.
        weights: tensors by their names; they are left as they are.
    """
    return _purely("center_unembed", cfg, weights)


def fold_value_biases(cfg: HookedTransformerConfig, weights: Weights) -> Processed:
    """Move `b_V` into `b_O`: a pattern's rows sum to one, so every destination receives the whole of it.

    Args:
        cfg: the config that the weights are of.
        weights: tensors by their names; they are left as they are.
    """
    return _purely("fold_value_biases", cfg, weights)


def refactor_factored_attn_matrices(cfg: HookedTransformerConfig, weights: Weights) -> Processed:
    """Rotate each head's internal basis to the singular vectors of its QK and OV matrices.

    `W_Q` and `W_K`, with their biases as one more row, share the singular values of their product equally. `b_V` is
    folded into `b_O`, then `W_V = U diag(S)` and `W_O = V^T`.

    Args:
        cfg: the config that the weights are of.
        weights: tensors by their names; they are left as they are.

    Raises:
        ValueError: something fixes the basis, such as rotary positions, so that it cannot be rotated.
    """
    return _purely("refactor_factored_attn_matrices", cfg, weights)


def untie(cfg: HookedTransformerConfig, weights: Weights) -> Processed:
    """Return weights with a separate `W_U`, a transposed copy of `W_E`, for a config with tied embeddings.

    Args:
        cfg: the config that the weights are of.
        weights: tensors by their names; they are left as they are.
    """
    if not cfg.tie_word_embeddings:
        return cfg, weights
    cfg = cfg.replace(tie_word_embeddings=False)
    if "embed.W_E" not in weights:
        return cfg, weights  # blocks alone
    W_U = weights["embed.W_E"].T.clone(memory_format=torch.contiguous_format)
    return cfg, {**weights, "unembed.W_U": W_U}


def _purely(name: str, cfg: HookedTransformerConfig, weights: Weights) -> Processed:
    """Return the result of a step, applied to copies of the tensors it writes to."""
    if STEPS[name].unties:
        cfg, weights = untie(cfg, weights)
    owned = with_own_copies(name, cfg, weights)
    return STEPS[name].rewrite(cfg, owned), owned


def with_own_copies(step: str, cfg: HookedTransformerConfig, weights: Weights) -> Weights:
    """Return the weights with copies of those that a step writes to.

    Args:
        step: the name of the step.
        cfg: the config that the weights are of.
        weights: tensors by their names.
    """
    written = STEPS[step].writes(cfg)
    return {name: value.clone() if re.fullmatch(written, name) else value for name, value in weights.items()}


# In place: each function writes to the tensors of the dictionary it is given, and returns the config that results.


def _fold_norms_(cfg: HookedTransformerConfig, weights: Weights) -> HookedTransformerConfig:
    if cfg.normalization_type not in ("LN", "RMS"):
        return cfg
    for norm in norms_with_readers(cfg, weights):
        gain, bias = weights.pop(f"{norm.name}.w", None), weights.pop(f"{norm.name}.b", None)
        if gain is not None:
            for reader in norm.readers:
                fold_into_reader_(weights, reader, gain, bias)
                if norm.centred:
                    center_reader_(weights, reader)
    return cfg.replace(normalization_type=f"{cfg.normalization_type}Pre")


@dataclass(frozen=True)
class NormReaders:
    """A norm and the weights that read its output.

    Attributes:
        name: of the norm, such as `"blocks.0.ln1"`.
        readers: the names of the weights, those that there are.
        centred: the norm's output has mean zero, so that the readers' mean over it does nothing.
    """

    name: str
    readers: tuple[str, ...]
    centred: bool


def norms_with_readers(cfg: HookedTransformerConfig, weights: Weights) -> Iterator[NormReaders]:
    """Yield the norms whose gains and biases can be folded into the weights that read from them.

    Args:
        cfg: the config that the weights are of.
        weights: tensors by their names.
    """
    centred = cfg.normalization_type in ("LN", "LNPre")

    def norm(name: str, readers: Iterable[str], centred: bool) -> NormReaders:
        return NormReaders(name, tuple(reader for reader in readers if reader in weights), centred)

    mlp_readers = ("W_in", "W_gate", "W_router", "shared.W_in", "shared.W_gate", "W_shared_gate")
    for prefix in _block_prefixes(weights):
        if cfg.norm_placement != "residual":  # the output of a norm on the stream is the stream itself
            yield norm(f"{prefix}ln1", [f"{prefix}attn.W_{name}" for name in _ATTENTION_READERS], centred)
            # Folded, the gain would be missing in what experts without weights write.
            if not cfg.writes_normalized(int(prefix.split(".")[1])):
                readers = [f"{prefix}{mlp}.{reader}" for mlp in ("mlp", "shortcut") for reader in mlp_readers]
                yield norm(f"{prefix}ln2", readers, centred)
        if cfg.is_layer_norm_activation():
            yield norm(f"{prefix}mlp.ln", [f"{prefix}mlp.W_out"], True)
    reader = "unembed.W_U" if cfg.unembed_act_fn is None else "unembed.transform.W_dense"
    yield norm("ln_final", [reader], centred and not cfg.final_rms)
    if cfg.unembed_act_fn is not None:
        yield norm("unembed.transform.ln", ["unembed.W_U"], centred)


def fold_into_reader_(weights: Weights, reader: str, gain: Tensor, bias: Tensor | None) -> None:
    """Fold a norm's gain, and its bias unless it is None, into a weight that reads from it and the weight's bias.

    Args:
        weights: tensors by their names, which are changed.
        reader: the name of the weight.
        gain, bias: of the norm, [d_model].

    Raises:
        ValueError: there is a bias to fold, and the reader has none to take it.
    """
    W = weights[reader]  # [... d_model out]
    if bias is not None:
        module, _, name = reader.rpartition(".")
        target = f"{module}.b{name.removeprefix('W')}"
        if target not in weights:
            raise ValueError(
                f"the bias of the norm before {reader} is folded into {target}, and the state dict has no such tensor: "
                "add it (fill_missing_keys does)"
            )
        weights[target].add_(einsum(bias, W, "d_model, ... d_model out -> ... out"))
    W.mul_(gain[:, None])


def center_reader_(weights: Weights, reader: str) -> None:
    """Subtract from a weight [... d_model out] its mean over `d_model`.

    Args:
        weights: tensors by their names, which are changed.
        reader: the name of the weight.
    """
    weights[reader].sub_(weights[reader].mean(-2, keepdim=True))


# Of the stream, in any kind of attention.
_ATTENTION_READERS = ("Q", "K", "V", "G", "DQ", "DKV", "KR")
_WRITERS = r"embed\.W_E|blocks\.\d+\.(attn\.(W_O|b_O)|(mlp|shortcut)\.(shared\.)?(W_out|b_out))"


def _center_writing_(cfg: HookedTransformerConfig, weights: Weights) -> HookedTransformerConfig:
    writers = _WRITERS if cfg.positional_embedding_type == "shortformer" else rf"{_WRITERS}|pos_embed\.W_pos"
    for name, value in weights.items():
        if re.fullmatch(writers, name):
            value.sub_(value.mean(-1, keepdim=True))
    return cfg


def _center_unembed_(cfg: HookedTransformerConfig, weights: Weights) -> HookedTransformerConfig:
    for name in ("unembed.W_U", "unembed.b_U"):
        if name in weights:
            weights[name].sub_(weights[name].mean(-1, keepdim=True))
    return cfg


def _fold_value_biases_(cfg: HookedTransformerConfig, weights: Weights) -> HookedTransformerConfig:
    for prefix in _block_prefixes(weights):
        if f"{prefix}attn.b_V" not in weights:
            continue  # values of latent attention have no biases
        W_O, b_V = weights[f"{prefix}attn.W_O"], weights[f"{prefix}attn.b_V"]
        per_head = b_V.repeat_interleave(W_O.shape[0] // b_V.shape[0], dim=0)
        weights[f"{prefix}attn.b_O"].add_(einsum(per_head, W_O, "head d_head, head d_head d_model -> d_model"))
        b_V.zero_()
    return cfg


def _refactor_(cfg: HookedTransformerConfig, weights: Weights) -> HookedTransformerConfig:
    obstacle = _refactoring_obstacle(cfg)
    if obstacle:
        raise ValueError(f"refactor_factored_attn_matrices: {obstacle}")
    _fold_value_biases_(cfg, weights)
    for prefix in _block_prefixes(weights):

        def augmented(which: str, prefix: str = prefix) -> Tensor:
            W, b = weights[f"{prefix}attn.W_{which}"], weights[f"{prefix}attn.b_{which}"]
            return at_least_single(torch.cat((W, b[:, None]), dim=1))  # [head d_model+1 d_head]

        even = FactoredMatrix(augmented("Q"), augmented("K").mT).make_even()
        for which, factor in (("Q", even.A), ("K", even.B.mT)):
            weights[f"{prefix}attn.W_{which}"].copy_(factor[:, :-1])
            weights[f"{prefix}attn.b_{which}"].copy_(factor[:, -1])
        values, output = (at_least_single(weights[f"{prefix}attn.W_{which}"]) for which in ("V", "O"))
        U, S, V = FactoredMatrix(values, output).svd()
        weights[f"{prefix}attn.W_V"].copy_(U * S[:, None])
        weights[f"{prefix}attn.W_O"].copy_(V.mT)
    return cfg


# Obstacles: why a step would change the function of a model with this config, or None.


def _refactoring_obstacle(cfg: HookedTransformerConfig) -> str | None:
    if cfg.positional_embedding_type == "rotary":
        return "rotary positions act on a head's dimensions, which therefore cannot be rotated freely"
    if cfg.use_qk_norm:
        return "the query-key norm acts on a head's dimensions, which therefore cannot be rotated freely"
    if cfg.n_kv_heads != cfg.n_heads:
        return "with grouped queries several heads share one key-value basis"
    if cfg.attention_gate:
        return "the gate acts on a head's dimensions, which therefore cannot be rotated freely"
    if cfg.d_head > cfg.d_model:
        return f"d_head {cfg.d_head} exceeds d_model {cfg.d_model}: the singular vectors would not fill a head"
    return _value_bias_obstacle(cfg)


def _value_bias_obstacle(cfg: HookedTransformerConfig) -> str | None:
    if cfg.clip_qkv is not None:
        return "values are clipped with their bias, which therefore cannot be added later"
    if cfg.attention_sinks:
        return "with attention sinks a pattern's rows do not sum to one, so less than the whole bias is passed on"
    if cfg.attention_gate:
        return "values are multiplied by a gate with their bias, which therefore cannot be added later"
    return None


def _folding_obstacle(cfg: HookedTransformerConfig) -> str | None:
    if cfg.positional_embedding_type == "shortformer":
        return "shortformer adds positions after ln1, so its gain cannot move past them"
    return None


def _writing_obstacle(cfg: HookedTransformerConfig) -> str | None:
    if cfg.normalization_type not in ("LN", "LNPre") or cfg.final_rms:
        return "only LayerNorm ignores the residual stream's mean"
    # A norm of the embeddings removes their mean before anything reads them, unless positions are added after it.
    normed_embeddings = cfg.post_embedding_ln and cfg.positional_embedding_type != "standard"
    all_normed = cfg.norm_placement not in ("after", "residual") and (cfg.first_norm or normed_embeddings)
    if not (all_normed and cfg.final_norm):
        return "parts of the model read the residual stream without a norm that would remove its mean"
    return None


def _unembed_obstacle(cfg: HookedTransformerConfig) -> str | None:
    if cfg.output_logits_soft_cap > 0:
        return "a soft-capped logit is changed by a constant"
    return None


@dataclass(frozen=True)
class Step:
    """One processing step.

    Attributes:
        rewrite: changes the weights in place and returns the resulting config.
        writes: config -> a regular expression of the names of the tensors it writes to.
        obstacle: config -> why the step would change the model's function, or None.
        default: whether it is applied by default.
        unties: it changes embedding and unembedding differently, so that they can no longer be one tensor.
    """

    rewrite: Callable[[HookedTransformerConfig, Weights], HookedTransformerConfig]
    writes: Callable[[HookedTransformerConfig], str]
    obstacle: Callable[[HookedTransformerConfig], str | None]
    default: bool = True
    unties: bool = False


def _readers(cfg: HookedTransformerConfig) -> str:
    """Return a pattern of the weights that read from a norm: unembedding, attention, MLP; W_out after SoLU's."""
    out = r"|blocks\.\d+\.mlp\.[Wb]_out" if cfg.is_layer_norm_activation() else ""
    mlp = r"(mlp|shortcut)\.((shared\.)?[Wb]_(in|gate)|[Wb]_(router|shared_gate))"
    attn = rf"attn\.[Wb]_({'|'.join(_ATTENTION_READERS)})"
    return rf"unembed\.([Wb]_U|transform\.[Wb]_dense)|blocks\.\d+\.({attn}|{mlp}){out}"


def _always(pattern: str) -> Callable[[HookedTransformerConfig], str]:
    return lambda cfg: pattern


# The order matters: folding the norms creates the biases that later steps move.
STEPS: dict[str, Step] = {
    "fold_ln": Step(_fold_norms_, _readers, _folding_obstacle, unties=True),
    "center_writing_weights": Step(
        _center_writing_, _always(rf"{_WRITERS}|pos_embed\.W_pos"), _writing_obstacle, unties=True
    ),
    "center_unembed": Step(_center_unembed_, _always(r"unembed\.[Wb]_U"), _unembed_obstacle, unties=True),
    "fold_value_biases": Step(_fold_value_biases_, _always(r"blocks\.\d+\.attn\.(b_V|b_O)"), _value_bias_obstacle),
    "refactor_factored_attn_matrices": Step(
        _refactor_, _always(r"blocks\.\d+\.attn\.[Wb]_[QKVO]"), _refactoring_obstacle, default=False
    ),
}


def plan_processing(cfg: HookedTransformerConfig, asked: dict[str, bool | None]) -> list[str]:
    """Return the steps to apply, in order.

    Args:
        cfg: the unprocessed config.
        asked: step name -> True (apply), False (leave out), None (by default, where it preserves the function).

    Warns:
        UserWarning: a step that was True would change the log-probabilities; it is left out.
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
    """Apply the named steps, one after the other, and leave the given weights as they are.

    Args:
        cfg: the config that the weights are of.
        weights: tensors by their names; they are left as they are.
        plan: the names of steps.
    """
    for name in plan:
        cfg, weights = _purely(name, cfg, weights)
    return cfg, weights


def process_(cfg: HookedTransformerConfig, weights: Weights, plan: Iterable[str]) -> HookedTransformerConfig:
    """Apply the named steps to the given weights themselves, and return the config that results.

    The caller unties tied embeddings first, where a step needs it: see `unties`.

    Args:
        cfg: the config that the weights are of.
        weights: tensors by their names, which are changed.
        plan: the names of steps.
    """
    for name in plan:
        cfg = STEPS[name].rewrite(cfg, weights)
    return cfg


def unties(cfg: HookedTransformerConfig, plan: Iterable[str]) -> bool:
    """Return whether a step of the plan changes tied embeddings differently, so that they must be untied first.

    Args:
        cfg: the config.
        plan: the names of steps.
    """
    return cfg.tie_word_embeddings and any(STEPS[name].unties for name in plan)


def _block_prefixes(weights: Weights) -> list[str]:
    """Return the `blocks.{layer}.` prefixes of the weights, in order of appearance."""
    found = (re.match(r"blocks\.\d+\.", name) for name in weights)
    return list(dict.fromkeys(match[0] for match in found if match))
