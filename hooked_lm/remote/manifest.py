"""The manifest of a served model: its config, sites, weights' shapes and tokenizer as plain data, without weights."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from torch import Tensor

from hooked_lm._support.plain_data import PlainData
from hooked_lm._support.tensor_bytes import bytes_of
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooked_model import HookedModel
from hooked_lm.sweep.exactness import walking_obstacle
from hooked_lm.tokenization import Tokenizer
from hooked_lm.tracing.target import Target
from hooked_lm.transformer import HookedTransformer

__all__ = ["TOKENIZER_FILES", "manifest_of", "target_of", "tokenizer_of", "weights_sha256"]

# A client writes these files, and no others, to a folder of its own.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def manifest_of(model: HookedTransformer) -> PlainData:
    """Return what a client must know of a model to record traces for it.

    Args:
        model: the model.
    """
    config = model.cfg.to_dict()
    config.update(device=None, tokenizer_name=None)
    files = _tokenizer_files(model.tokenizer)

    def shape(name: str, part: Tensor) -> tuple[int, ...]:
        return tuple(part.shape) if model.ranks is None else model.ranks.whole_shape(name, tuple(part.shape))

    return {
        "config": config,
        "axes": [[name, list(point.axes)] for name, point in model.hook_dict.items() if point.axes],
        "weights": {name: list(shape(name, one)) for name, one in model.named_parameters()},
        "weights_sha256": weights_sha256(model),
        "tokenizer": files,
        "tokenizer_sha256": hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest(),
        "can_sweep": walking_obstacle(model, ()) is None,
    }


def weights_sha256(model: HookedModel) -> str:
    """Return the SHA-256 of a model's parameters: names, dtypes, shapes and contents.

    Args:
        model: the model.
    """
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        one = parameter.detach() if model.ranks is None else model.ranks.whole_parameter(name, parameter.detach())
        found.update(f"{name} {one.dtype} {tuple(one.shape)} ".encode())
        found.update(bytes_of(one.cpu()).numpy().data)
    return found.hexdigest()


def _tokenizer_files(tokenizer: Tokenizer | None) -> dict[str, str]:
    if tokenizer is None or not hasattr(tokenizer, "save_pretrained"):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        found = [Path(folder) / name for name in TOKENIZER_FILES]
        return {path.name: path.read_text("utf-8") for path in found if path.exists()}


def tokenizer_of(manifest: PlainData) -> Tokenizer | None:
    """Return the tokenizer of a manifest; None if it has none.

    Args:
        manifest: as `manifest_of` returns it.

    Raises:
        ValueError: it holds files that belong to no tokenizer.
    """
    files = manifest["tokenizer"]
    if not files:
        return None
    strange = sorted(set(files) - set(TOKENIZER_FILES))
    if strange:
        raise ValueError(f"the server sends {strange[0]!r} with the tokenizer; there are {', '.join(TOKENIZER_FILES)}")
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text, "utf-8")
        return cast(Tokenizer, AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))


class _NoText:
    """Reads no prompts: a server is sent tokens."""

    def __call__(self, *prompts: object) -> list[list[int]]:
        raise ValueError("a trace that is sent holds tokens")


def target_of(manifest: PlainData, cfg: HookedTransformerConfig, read: object = None) -> Target:
    """Return what traces are recorded against, of a manifest.

    Args:
        manifest: as `manifest_of` returns it.
        cfg: the manifest's config.
        read: prompts -> tokens; None where only tokens come.
    """
    shapes: Mapping[str, list[int]] = manifest["weights"]

    def weight_shape(name: str) -> tuple[int, ...] | None:
        return tuple(shapes[name]) if name in shapes else None

    axes = {name: tuple(one) for name, one in manifest["axes"]}
    return Target(cfg, axes, weight_shape, read if callable(read) else _NoText())
