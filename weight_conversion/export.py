"""Writing a model as a HuggingFace checkpoint: a folder that `transformers` loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hooked_lm._support.files import write_whole
from hooked_lm.config import HookedTransformerConfig
from weight_conversion.checkpoint import IGNORED, read_family
from weight_conversion.conversion import block_entries
from weight_conversion.errors import CheckpointError
from weight_conversion.family import Family
from weight_conversion.fields import FieldValue
from weight_conversion.fitting import fitted
from weight_conversion.registry import family_of
from weight_conversion.rules import Entry, RuleTable, is_per_layer, stacked_names

__all__ = ["export", "inverted"]

# Fields that do not change the function a model computes.
_NOT_ARCHITECTURE = frozenset(
    [
        "init_mode",
        "initializer_range",
        "init_weights",
        "seed",
        "dtype",
        "device",
        "default_prepend_bos",
        "default_padding_side",
        "tokenizer_name",
        "tokenizer_prepends_bos",
        "model_name",
        "from_checkpoint",
        "checkpoint_index",
        "checkpoint_label_type",
        "checkpoint_value",
        "n_params",
        "use_attn_result",
        "use_split_qkv_input",
        "use_attn_in",
        "use_hook_mlp_in",
        "use_hook_tokens",
        "ungroup_grouped_query_attention",
    ]
)


def export(
    cfg: HookedTransformerConfig, weights: Mapping[str, Tensor], origin: Mapping[str, FieldValue], folder: str | Path
) -> None:
    """Write `config.json` and the weights in HuggingFace's format, in shards where they are large.

    Args:
        cfg: the model's config.
        weights: its weights, unprocessed.
        origin: the HuggingFace config it was loaded with.
        folder: the folder to write to, made if it is missing.

    Raises:
        CheckpointError: the model has been cut or changed in a way that its family has no place for, or the family's
            rules cannot be inverted.

    Warns:
        UserWarning: training has moved weights that the family has no tensors for, and they are left out: see
            `fitting.fitted`.
    """
    # Only an export needs the hub's client, which takes a while to import.
    from huggingface_hub import save_torch_state_dict

    (architecture,) = origin["architectures"]
    family = family_of(architecture)
    fields = dict(origin)
    original, table = read_family(family, fields, architecture)
    if original.tie_word_embeddings and not cfg.tie_word_embeddings:
        if torch.equal(weights["unembed.W_U"].T, weights["embed.W_E"]):
            cfg = cfg.replace(tie_word_embeddings=True)
        else:
            fields["tie_word_embeddings"] = False
            original, table = read_family(family, fields, architecture)
    _check_whole(cfg, original)
    tensors = inverted(table, cfg, fitted(_entries(table, cfg), cfg, weights))
    prefixed = {_with_prefix(name, family, architecture): tensor for name, tensor in tensors.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fields.pop(IGNORED, None)
    fields["dtype"] = str(cfg.dtype).removeprefix("torch.")
    fields.pop("torch_dtype", None)
    text = json.dumps(fields, indent=2) + "\n"
    # The folder is no model's while it holds parts of two: config.json goes first and comes last.
    (folder / "config.json").unlink(missing_ok=True)
    save_torch_state_dict(prefixed, folder)
    write_whole(folder / "config.json", text)


def inverted(table: RuleTable, cfg: HookedTransformerConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the checkpoint's tensors, by the names that the rules use, that would give these weights.

    Args:
        table: the family's rules.
        cfg: the model's config.
        weights: our tensors, by their names.

    Raises:
        CheckpointError: no such tensors exist; the message gives the reason.
    """
    tensors: dict[str, Tensor] = {}
    for entry in _entries(table, cfg):
        for source, tensor in _one_by_one(entry, cfg, weights).items():
            if source in tensors and not torch.equal(tensors[source], tensor):
                raise CheckpointError(
                    f"{source} is one tensor in this family's checkpoints, and it would have to hold both "
                    f"{' and '.join(entry.target_names)} and another weight of the model, which now differ"
                )
            tensors[source] = _by_itself(tensor)
    return tensors


def _entries(table: RuleTable, cfg: HookedTransformerConfig) -> list[Entry]:
    """The rules, those of blocks once for every block."""
    entries = [entry for entry in table if not is_per_layer(entry)]
    for layer in range(cfg.n_layers):
        entries += block_entries(table, layer)
    return entries


def _by_itself(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own: safetensors refuses a slice of another tensor, so a slice is copied."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _one_by_one(entry: Entry, cfg: HookedTransformerConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The source tensors of an entry; a stack over experts or heads becomes one tensor each."""
    separate: dict[str, Tensor] = {}
    for source, tensor in entry.invert(weights, cfg).items():
        names = stacked_names(source, cfg)
        separate |= {source: tensor} if names == [source] else dict(zip(names, tensor, strict=True))
    return separate


def _check_whole(cfg: HookedTransformerConfig, original: HookedTransformerConfig) -> None:
    for name in ("n_layers", "n_ctx", "d_vocab"):
        ours, theirs = getattr(cfg, name), getattr(original, name)
        if ours != theirs:
            raise CheckpointError(
                f"the model was loaded with {name}={ours} of {theirs}: load the whole model to export it"
            )
    ours, theirs = ({k: v for k, v in of.to_dict().items() if k not in _NOT_ARCHITECTURE} for of in (cfg, original))
    changed = ", ".join(f"{name}={ours[name]!r} was {theirs[name]!r}" for name in ours if ours[name] != theirs[name])
    if changed:
        raise CheckpointError(
            f"the config is no longer the one the model was loaded with ({changed}), and only weights are written back"
        )


def _with_prefix(name: str, family: Family, architecture: str) -> str:
    """A tensor's full name: no prefix in a bare model (`GPT2Model`), and never one for the unembedding."""
    beside = (family.unembedding.removesuffix("weight"), *(f"{module}." for module in family.beside))
    bare = not architecture.endswith(("ForCausalLM", "LMHeadModel"))
    return name if bare or name.startswith(beside) else family.prefix + name
