"""Fingerprints: what tells one model from another, and one function's code from another's."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from hooked_lm._support.checksums import checksums
from hooked_lm._support.plain_data import PlainData
from hooked_lm._support.tensor_bytes import bytes_of
from hooked_lm.hooked_model import HookedModel
from hooked_lm.remote import RemoteModel
from hooked_lm.tokenization import Tokenizer
from hooked_lm.transformer import HookedTransformer

__all__ = ["ModelFingerprint", "fingerprint_of", "sha256", "tensor_sha256"]

# Fields that do not change what a built model computes.
_NOT_COMPUTED_WITH = ("device", "model_name", "tokenizer_name", "seed")
_vocabularies: WeakKeyDictionary[object, tuple[int, str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class ModelFingerprint:
    """What a record keeps of a model: enough to know it again, not to build it.

    Attributes:
        kind: the class.
        name: as its config has it; empty without one.
        config: the SHA-256 of the config; device, names and seed apart.
        weights: the SHA-256 of the names, dtypes, shapes and checksums of all parameters and buffers; for a model on a
            server, what the server says.
        processed: the processing steps that were applied to the weights.
        tokenizer: the SHA-256 of the vocabulary and the special tokens; empty without one.
        dtype: of the weights.
        n_params: the number of parameters.
        hooks: the hooks on the model outside of a run, which change what it computes.
    """

    kind: str
    name: str
    config: str
    weights: str
    processed: tuple[str, ...] = ()
    tokenizer: str = ""
    dtype: str = ""
    n_params: int = 0
    hooks: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: PlainData) -> ModelFingerprint:
        """Return the fingerprint that a record holds as plain data."""
        return cls(**{**data, "processed": tuple(data["processed"]), "hooks": tuple(data["hooks"])})

    def as_dict(self) -> PlainData:
        """Return it as plain data."""
        return {**asdict(self), "processed": list(self.processed), "hooks": list(self.hooks)}

    def differences(self, other: ModelFingerprint) -> list[str]:
        """Return what differs, in words; an empty list where nothing does.

        Args:
            other: the fingerprint to compare with.
        """
        said = {
            "kind": f"{self.kind} and {other.kind}",
            "config": "other configs",
            "weights": "other weights",
            "processed": f"processing {_listed(self.processed)} and {_listed(other.processed)}",
            "tokenizer": "other tokenizers",
            "dtype": f"{self.dtype} and {other.dtype}",
            "hooks": f"hooks {_listed(self.hooks)} and {_listed(other.hooks)}",
        }
        return [words for field, words in said.items() if getattr(self, field) != getattr(other, field)]

    def __str__(self) -> str:
        processed = f", {' '.join(self.processed)}" if self.processed else ""
        return f"{self.name or self.kind} ({self.n_params:,} parameters, weights {self.weights[:8]}{processed})"


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"


def sha256(content: object) -> str:
    """Return the SHA-256 of plain data, whatever the order of the keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint_of(model: object) -> ModelFingerprint | None:
    """Return the fingerprint of a model, or None of an object that is no model.

    All weights are read, at the speed of memory: a fingerprint that is kept would miss changes through `.data`.

    Args:
        model: a `HookedTransformer`, another torch module, or a model on a server.
    """
    if isinstance(model, RemoteModel):
        manifest = model.manifest
        return ModelFingerprint(
            kind="RemoteModel",
            name=model.name,
            config=sha256({**manifest["config"], **dict.fromkeys(_NOT_COMPUTED_WITH)}),
            weights=manifest["weights_sha256"],
            tokenizer=manifest["tokenizer_sha256"] if manifest["tokenizer"] else "",
            dtype=str(manifest["config"]["dtype"]),
        )
    if not isinstance(model, nn.Module):
        return None
    named = [*model.named_parameters(), *model.named_buffers()]
    sums = checksums([one for _, one in named])
    weights = [[name, str(one.dtype), list(one.shape), total] for (name, one), total in zip(named, sums, strict=True)]
    found = ModelFingerprint(
        kind=type(model).__name__,
        name="",
        config=sha256(str(model)),
        weights=sha256(weights),
        dtype=", ".join(sorted({str(one.dtype).removeprefix("torch.") for one in model.parameters()})),
        n_params=sum(one.numel() for one in model.parameters()),
    )
    if not isinstance(model, HookedTransformer):
        return found
    config = {**model.cfg.to_dict(), **dict.fromkeys(_NOT_COMPUTED_WITH)}
    return replace(
        found,
        name=model.cfg.model_name or "",
        config=sha256(config),
        processed=tuple(model.processed),
        tokenizer=_tokenizer_hash(model.tokenizer),
        hooks=_hooks(model),
    )


def _hooks(model: HookedModel) -> tuple[str, ...]:
    """The hooks that are on a model now, as `site: function`."""
    return tuple(
        f"{name}: {getattr(handle.hook, '__qualname__', type(handle.hook).__name__)}"
        for name, point in model.hook_dict.items()
        for handle in [*point.fwd_hooks, *point.bwd_hooks]
    )


def _tokenizer_hash(tokenizer: Tokenizer | None) -> str:
    """The SHA-256 of the vocabulary and what decides about special tokens; a vocabulary of one size is read once."""
    if tokenizer is None:
        return ""
    size, vocabulary = _vocabularies.get(tokenizer, (-1, ""))
    if size != len(tokenizer):
        size, vocabulary = len(tokenizer), sha256(tokenizer.get_vocab())
        _vocabularies[tokenizer] = (size, vocabulary)
    special = {name: str(getattr(tokenizer, name, None)) for name in ("bos_token", "eos_token", "pad_token")}
    return sha256([vocabulary, special, str(getattr(tokenizer, "padding_side", None))])


def tensor_sha256(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and contents."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    found.update(bytes_of(tensor).numpy().data)
    return found.hexdigest()
