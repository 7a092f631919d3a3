"""Our own format of a model folder: its config and its weights, compared before anything is built from either."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.conversion import MOST_MISSING
from weight_conversion.errors import CheckpointError
from weight_conversion.fields import HFConfig
from weight_conversion.source import CONFIG_DIGEST, TensorSource

__all__ = [
    "CONFIG_DIGEST",
    "OWN_FORMAT",
    "OWN_VERSION",
    "OwnWeights",
    "check_saved_together",
    "config_digest",
    "digest_header",
    "processed_steps",
    "read_own_config",
]

# The name of our own format and its newest version, as `config.json` of a model folder gives them.
OWN_FORMAT, OWN_VERSION = "hooked_lm", 1
_OF_LOADING = ("model_name", "init_weights")
_BLOCK = re.compile(r"blocks\.(\d{1,9})\.(.+)")


def config_digest(content: Mapping[str, object]) -> str:
    """Return the SHA-256 of what `config.json` of a model folder says about its weights.

    Left out are the digest itself and the fields of the config that a model gets when it is loaded.

    Args:
        content: of the file.
    """
    said = {name: value for name, value in content.items() if name != CONFIG_DIGEST}
    fields = said.get("config")
    if isinstance(fields, dict):
        said["config"] = {name: value for name, value in fields.items() if name not in _OF_LOADING}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def digest_header(digest: str) -> dict[str, str]:
    """Return the metadata of the safetensors file that goes with a config of some digest."""
    return {CONFIG_DIGEST: digest}


def check_saved_together(config: Path, content: HFConfig, tensors: TensorSource) -> None:
    """Check that the config and the weights of a folder come from one save.

    Folders that were written before there were digests have none in either file, and are not checked.

    Args:
        config: the path of `config.json`.
        content: what it holds.
        tensors: the weights beside it.

    Raises:
        CheckpointError: they come from two saves.
    """
    said = content.get(CONFIG_DIGEST)
    for path, digest in tensors.config_digests.items():
        if digest != said:
            raise CheckpointError(
                f"{config} and {path.name} come from two saves: their {CONFIG_DIGEST} is {_short(said)} and "
                f"{_short(digest)}. A save was cut off between the two files, or one was copied from elsewhere. Save "
                f"the model again; or, if you made one of the files yourself, remove {CONFIG_DIGEST!r} from "
                "config.json and from the metadata of the weights"
            )


def _short(digest: object) -> str:
    return "absent" if digest is None else f"{str(digest)[:12]!r}"


def read_own_config(path: Path, content: HFConfig, tensors: TensorSource) -> HookedTransformerConfig:
    """Return the config of a folder in our own format, whose sizes are those of the weights.

    Args:
        path: of `config.json`.
        content: what it holds.
        tensors: the weights, of which only names and shapes are looked at.

    Raises:
        CheckpointError: there is no whole config, or it is not of these weights.
    """
    _check_version(path, content.get("version", 1))
    fields = content.get("config")
    if isinstance(fields, dict):
        _check_number_of_layers(path, fields.get("n_layers"), tensors)
    try:
        cfg = HookedTransformerConfig.from_dict(content.get("config", {}))
    # A field of the wrong type can fail anywhere in the checks.
    except (TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} does not hold a whole config: {error}") from error
    _check_sizes(path, cfg, tensors)
    return cfg


def processed_steps(path: Path, content: HFConfig) -> tuple[str, ...]:
    """Return the processing steps that the weights have been through, by name; `hooked_lm.weights` checks the names.

    Args:
        path: of `config.json`.
        content: what it holds.

    Raises:
        CheckpointError: it is no list of names.
    """
    processed = content.get("processed", [])
    if not isinstance(processed, list) or not all(isinstance(step, str) for step in processed):
        raise CheckpointError(f"{path}: processed={processed!r} is no list of processing steps")
    if len(set(processed)) < len(processed):
        raise CheckpointError(f"{path}: processed={processed!r} has a step twice")
    origin = content.get("origin")
    if origin is not None and not isinstance(origin, dict):
        raise CheckpointError(f"{path}: origin is a HuggingFace config or null, not {type(origin).__name__}")
    return tuple(processed)


def _check_version(path: Path, version: object) -> None:
    """Check that this code reads a model folder; one without a number was written before there were numbers."""
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path}: {version!r} is no version number of the format, which counts from 1")
    if version > OWN_VERSION:
        read = "version 1" if OWN_VERSION == 1 else f"versions 1 to {OWN_VERSION}"
        raise CheckpointError(
            f"{path} has version {version} of the format; this hooked_lm reads {read}: update hooked_lm"
        )


def _check_number_of_layers(path: Path, n_layers: object, tensors: TensorSource) -> None:
    """Check that there are not far more layers than blocks: a config of a billion of them takes minutes to make."""
    blocks = {int(found[1]) for found in map(_BLOCK.match, tensors) if found}
    last = max(blocks, default=-1)
    if isinstance(n_layers, int) and n_layers > last + 1 + MOST_MISSING:
        have = f"blocks 0-{last}" if blocks else "no blocks"
        raise CheckpointError(f"{path} says n_layers={n_layers}, and the weights beside it have {have}")


def _check_sizes(path: Path, cfg: HookedTransformerConfig, tensors: TensorSource) -> None:
    """Compare the sizes of the large weights, so that a model with wrong ones is never built."""
    faults = []
    for name, shape in _large_weights(cfg).items():
        if -1 in shape:  # the tokenizer gives the size of the vocabulary
            continue
        if name not in tensors:
            faults.append(f"{name} is missing")
        elif tensors.shape(name) != shape:
            faults.append(f"{name} has shape {tensors.shape(name)} instead of {shape}")
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CheckpointError(
            f"{path.parent} does not hold the tensors that its config implies: {'; '.join(faults[:8])}{more}"
        )


def _large_weights(cfg: HookedTransformerConfig) -> dict[str, tuple[int, ...]]:
    """The weights that show each size of a config, with their shapes."""
    shapes: dict[str, tuple[int, ...]] = {"embed.W_E": (cfg.d_vocab, cfg.d_model)}
    if cfg.positional_embedding_type in ("standard", "shortformer"):
        shapes["pos_embed.W_pos"] = (cfg.n_ctx, cfg.d_model)
    if not cfg.tie_word_embeddings:
        shapes["unembed.W_U"] = (cfg.d_model, cfg.d_vocab_out)
    for layer in range(cfg.n_layers):
        attn, mlp = f"blocks.{layer}.attn", f"blocks.{layer}.mlp"
        if cfg.d_latent_q is None:
            shapes[f"{attn}.W_Q"] = (cfg.n_heads, cfg.d_model, cfg.d_head)
        else:
            shapes[f"{attn}.W_UQ"] = (cfg.n_heads, cfg.d_latent_q, cfg.d_head)
        if cfg.d_latent_kv is None:
            shapes[f"{attn}.W_K"] = (cfg.n_kv_heads, cfg.d_model, cfg.d_head)
        else:
            shapes[f"{attn}.W_UV"] = (cfg.n_heads, cfg.d_latent_kv, cfg.value_width)
        if cfg.attn_only:
            continue
        if cfg.has_experts(layer):
            shapes[f"{mlp}.W_in"] = (cfg.weighted_experts, cfg.d_model, cfg.expert_width)
            if cfg.d_shared_expert is not None:
                shapes[f"{mlp}.shared.W_in"] = (cfg.d_model, cfg.d_shared_expert)
        else:
            shapes[f"{mlp}.W_in"] = (cfg.d_model, cfg.d_mlp or 0)
        if cfg.has_shortcut(layer):
            shapes[f"blocks.{layer}.shortcut.W_in"] = (cfg.weighted_experts, cfg.d_model, cfg.expert_width)
    return shapes


class OwnWeights:
    """A folder in our own format, whose tensors need no conversion. Blocks beyond `kept` are left unread.

    Args:
        tensors: of the folder.
        n_layers: of the model in the folder.
        kept: how many blocks are wanted.
        before_reading: called before the first tensor is read, when names and shapes have been checked.

    Attributes:
        shapes: every name and its shape.

    Raises:
        CheckpointError: there is a block too many, or a tensor that holds no floats.
    """

    def __init__(
        self, tensors: TensorSource, n_layers: int, kept: int, before_reading: Callable[[], None] = lambda: None
    ) -> None:
        self._before_reading = before_reading
        self._tensors, self._chunks = tensors, [list[str]() for _ in range(kept + 1)]
        for name in tensors:
            block = _BLOCK.match(name)
            layer = int(block[1]) if block else -1
            if layer >= n_layers:
                raise CheckpointError(f"the checkpoint has {name}, and its config says n_layers={n_layers}")
            if layer < kept:
                tensors.dtype(name)
                self._chunks[layer + 1].append(name)
        self.shapes = {name: tensors.shape(name) for chunk in self._chunks for name in chunk}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the weights, first those outside the blocks, then block by block."""
        self._before_reading()
        for chunk in self._chunks:
            yield {name: self._tensors[name] for name in chunk}
            self._tensors.check()

    @property
    def mapped(self) -> bool:
        """Whether the tensors that are read are private views of a file."""
        return self._tensors.mapped

    def release(self) -> None:
        """Free the memory of the tensors that have been read, except those still referenced elsewhere."""
        self._tensors.release()
