"""Folders in the classic library's format: a config in its words, and a state dict in its names."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hooked_lm.config import RENAMED, HookedTransformerConfig
from weight_conversion.classic_state import from_classic
from weight_conversion.errors import CheckpointError
from weight_conversion.fields import Arguments, FieldValue
from weight_conversion.published_aliases import PUBLISHED_ALIASES
from weight_conversion.source import has_weights, open_pickles, open_tensors

__all__ = ["is_classic_format", "read_classic_folder"]

# Fields of ours that say how a model was made or where it was, and nothing of what it computes.
_OF_TRAINING = frozenset(
    ["seed", "device", "dtype", "init_mode", "init_weights", "initializer_range", "tokenizer_name"]
)
# Fields that the published configs name otherwise, or that are read by name here.
_OTHERWISE = frozenset(["normalization", "shortformer_pos", "architecture"])
# The first SoLU models: norms are called otherwise, and some matrices lie as [out in].
_EARLY = "neel-solu-old"
_NORM = re.compile(r"(^|\.)norm(\d?)\.")
# Of those with up to so many layers all matrices lie so, and of those with more, up to so many, W_pos alone does.
_ALL_TURNED, _POSITIONS_TURNED = 6, 8
# The published models that are not of the first, by the last part of their hub ids, which is that of a download's path.
_LATER = tuple(
    {hub_id.rpartition("/")[2] for hub_id in PUBLISHED_ALIASES.values() if hub_id.endswith(("_C4_Code", "_Finetune"))}
)
_EMBEDDINGS = ("embed.W_E", "tok_emb.weight")
# minGPT, in which Othello-GPT was trained: each linear map is stored [out in].
_LINEAR = {"query": "Q", "key": "K", "value": "V"}


def is_classic_format(content: Mapping[str, FieldValue]) -> bool:
    """Return whether a `config.json` is in the classic library's words: sizes, and no model type of transformers."""
    return {"d_model", "n_layers", "n_ctx"} <= set(content) and "model_type" not in content


def read_classic_folder(
    folder: Path, content: Mapping[str, FieldValue]
) -> tuple[HookedTransformerConfig, dict[str, Tensor]]:
    """Return the config and the weights of a folder, in this library's names. Pickles are read with `weights_only`.

    Fields that neither library's config has describe the training; a warning lists them.

    Args:
        folder: the folder.
        content: of its `config.json`.

    Raises:
        CheckpointError: the config cannot be used, there are no weights, or it is open which file has them.
    """
    try:
        cfg = HookedTransformerConfig.from_dict(_arguments(folder, content))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} does not hold a whole config: {error}") from error
    source = open_tensors(folder) if has_weights(folder) else open_pickles([_pickle_in(folder)])
    state = dict(source.items())
    if "tok_emb.weight" in state:
        weights = _from_mingpt(state, cfg)
    else:
        weights = _in_order(folder, content, state, cfg)
    weights = _with_zero_biases(from_classic(weights))
    if "embed.W_E" not in weights:
        raise CheckpointError(f"{folder} has no embed.W_E: its weights are not in the classic library's names")
    return cfg.replace(dtype=source.dtype(next(name for name in state if name in _EMBEDDINGS))), weights


def _arguments(folder: Path, content: Mapping[str, FieldValue]) -> Arguments:
    known = {field.name for field in dataclasses.fields(HookedTransformerConfig)} | RENAMED.keys()
    arguments = {name: value for name, value in content.items() if name in known - _OF_TRAINING}
    if "normalization" in content:
        arguments["normalization_type"] = content["normalization"]
    if "positional_embedding_type" not in arguments:
        arguments["positional_embedding_type"] = "shortformer" if content.get("shortformer_pos") else "standard"
    if "architecture" in content:
        arguments["original_architecture"] = content["architecture"]
    unread = sorted(set(content) - known - _OTHERWISE)
    if unread:
        warnings.warn(f"{folder / 'config.json'} has fields that no config reads: {', '.join(unread)}", stacklevel=2)
    return arguments


def _pickle_in(folder: Path) -> Path:
    """The file with the weights: the only one, or the only one of the end of training."""
    found = sorted([*folder.glob("*.pth"), *folder.glob("*.pt")])
    final = [path for path in found if path.stem.endswith("final")]
    for candidates in (found, final):
        if len(candidates) == 1:
            return candidates[0]
    if not found:
        raise CheckpointError(f"{folder} has no weights: expected a safetensors file, or one that ends in .pth or .pt")
    names = ", ".join(path.name for path in final or found)
    raise CheckpointError(f"{folder} holds several files of weights: {names}. Keep the one you mean")


def _in_order(
    folder: Path, content: Mapping[str, FieldValue], state: Mapping[str, Tensor], cfg: HookedTransformerConfig
) -> dict[str, Tensor]:
    """Rename the norms of the first SoLU models, and turn their matrices that lie as [out in]. Others stay so."""
    named = {_NORM.sub(_norm_here, name): value for name, value in state.items()}
    W_Q = named.get("blocks.0.attn.W_Q")
    turned = W_Q is not None and cfg.d_head != cfg.d_model and tuple(W_Q.shape[1:]) == (cfg.d_head, cfg.d_model)
    W_pos = named.get("pos_embed.W_pos")
    positions_turned = W_pos is not None and (turned or _positions_turned(folder, content, named != state, W_pos, cfg))
    return {
        name: value.mT if (positions_turned if name == "pos_embed.W_pos" else turned and ".W_" in name) else value
        for name, value in named.items()
    }


def _norm_here(found: re.Match[str]) -> str:
    return f"{found[1]}ln{found[2]}." if found[2] or found[1] else "ln_final."


def _positions_turned(
    folder: Path,
    content: Mapping[str, FieldValue],
    has_early_names: bool,
    W_pos: Tensor,
    cfg: HookedTransformerConfig,
) -> bool:
    """Whether W_pos is [d_model n_ctx] where no other matrix is turned: by its shape, or else by what is said of it.

    Raises:
        CheckpointError: it is square, and nothing tells which way round it is.
    """
    if cfg.n_ctx != cfg.d_model:
        return tuple(W_pos.shape) == (cfg.d_model, cfg.n_ctx)
    if not _ALL_TURNED < cfg.n_layers <= _POSITIONS_TURNED:
        return False
    if "architecture" in content:
        return bool(content["architecture"] == _EARLY)
    # A download's path holds the published name.
    if has_early_names or any(part.endswith("_old") for part in folder.parts):
        return True
    # Of the published models, the first have MLPs with SoLU, and a config from before there were kinds of positions.
    may_be_early = str(cfg.act_fn).startswith("solu") and "positional_embedding_type" not in content
    if may_be_early and not any(part.endswith(_LATER) for part in folder.parts):
        raise CheckpointError(
            f"{folder} holds a SoLU model of {cfg.n_layers} layers whose W_pos is square: the first such models have "
            f'it transposed, and nothing here tells whether this is one. Add "architecture" to config.json: "{_EARLY}" '
            'for one of the first, "neel" for a later one'
        )
    return False


def _from_mingpt(state: Mapping[str, Tensor], cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """Rename minGPT's tensors. What has no name here goes on as it is, and is then refused as surplus."""
    outer = {"tok_emb.weight": "embed.W_E", "ln_f.weight": "ln_final.w", "ln_f.bias": "ln_final.b"}
    weights: dict[str, Tensor] = {}
    for name, value in state.items():
        block, _, rest = name.partition(".attn.") if ".attn." in name else name.partition(".mlp.")
        part, _, kind = rest.rpartition(".")
        letter = "W" if kind == "weight" else "b"
        if name in outer:
            weights[outer[name]] = value
        elif name == "pos_emb":
            weights["pos_embed.W_pos"] = value.squeeze(0)
        elif name == "head.weight":
            weights["unembed.W_U"] = value.T
        elif ".attn." in name and part in _LINEAR:
            split = value.unflatten(0, (cfg.n_heads, cfg.d_head))
            weights[f"{block}.attn.{letter}_{_LINEAR[part]}"] = split.mT if letter == "W" else split
        elif ".attn." in name and part == "proj":
            ours = value.T.unflatten(0, (cfg.n_heads, cfg.d_head)) if letter == "W" else value
            weights[f"{block}.attn.{letter}_O"] = ours
        elif ".mlp." in name and part in ("0", "2"):
            ours = value.T if letter == "W" else value
            weights[f"{block}.mlp.{letter}_{'in' if part == '0' else 'out'}"] = ours
        else:
            weights[re.sub(r"(\.ln\d)\.(w|b)\w+$", r"\1.\2", name)] = value
    return weights


def _with_zero_biases(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the biases that a model was trained without, as zeros."""
    added = {}
    for name, value in weights.items():
        prefix, _, last = name.rpartition(".")
        letter = last.removeprefix("W_")
        if last.startswith("W_") and letter in ("Q", "K", "V", "O", "in", "out", "U"):
            shape = (value.shape[0], value.shape[2]) if letter in ("Q", "K", "V") else (value.shape[-1],)
            added[f"{prefix}.b_{letter}"] = value.new_zeros(shape)
    return {**added, **weights}
