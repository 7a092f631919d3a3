"""Helpers of the classic library that this library needs in no other place."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import reduce
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from hooked_lm.components import MLP, GatedMLP, MoE
from hooked_lm.tokenization import Tokenizer, infer_attention_mask
from weight_conversion.aliases import ALIASES, hub_id

__all__ = [
    "DEFAULT_MODEL_ALIASES",
    "MODEL_ALIASES",
    "OFFICIAL_MODEL_NAMES",
    "SOFTCAP_DISABLED",
    "CanBeUsedAsMLP",
    "apply_softcap",
    "filter_dict_by_prefix",
    "get_device",
    "get_device_for_block_index",
    "get_input_with_manually_prepended_bos",
    "get_nested_attr",
    "get_official_model_name",
    "get_tokens_with_bos_removed",
    "is_library_available",
    "make_model_alias_map",
    "set_nested_attr",
    "softcap_enabled",
]

T = TypeVar("T")


class _IsAnMLP(type(nn.Module)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: object) -> bool:
        ours = cls is CanBeUsedAsMLP and isinstance(instance, (MLP, GatedMLP, MoE))
        return ours or super().__instancecheck__(instance)


class CanBeUsedAsMLP(nn.Module, metaclass=_IsAnMLP):
    """A base class for MLPs of one's own; the MLPs of this library count as instances."""


# The value of a soft cap that caps nothing.
SOFTCAP_DISABLED = -1.0


def softcap_enabled(cap: float | None) -> bool:
    """Return whether a soft cap caps anything: it is given and above 0."""
    return cap is not None and cap > 0


def apply_softcap(x: Tensor, cap: float | None) -> Tensor:
    """Return `cap * tanh(x / cap)`; `x` itself if the cap is off.

    Args:
        x: of any shape.
        cap: None, or not above 0, for none.
    """
    return x if cap is None or not softcap_enabled(cap) else cap * torch.tanh(x / cap)


def get_device() -> str:
    """Return `"cuda"` where there is such a device, else `"cpu"`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def get_device_for_block_index(index: int, cfg: object, device: str | torch.device | None = None) -> torch.device:
    """Return the device of a block of a model on one device. For one that was spread, see `model.spread_over`.

    Args:
        index: of the block.
        cfg: the model's config.
        device: instead of the config's.
    """
    return torch.device(device or getattr(cfg, "device", None) or "cpu")


def get_nested_attr(obj: object, attr_str: str) -> object:
    """Return the attribute at a dotted path; the parts of the path may be indices of a list.

    Args:
        obj: where the path begins.
        attr_str: as `"blocks.0.attn"`.

    Raises:
        AttributeError: the path leads nowhere.
    """
    return reduce(getattr, attr_str.split("."), obj)


def set_nested_attr(obj: object, attr_str: str, value: object) -> None:
    """Set the attribute at a dotted path.

    Args:
        obj, attr_str: as for `get_nested_attr`.
        value: the new value.

    Raises:
        AttributeError: the path leads nowhere.
    """
    owner, _, name = attr_str.rpartition(".")
    setattr(get_nested_attr(obj, owner) if owner else obj, name, value)


def filter_dict_by_prefix(dictionary: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Return the entries below a dotted prefix, their names without it.

    Args:
        dictionary: entries by dotted names, as a state dict.
        prefix: with or without the last dot.
    """
    prefix = prefix.removesuffix(".") + "."
    return {name.removeprefix(prefix): value for name, value in dictionary.items() if name.startswith(prefix)}


def get_input_with_manually_prepended_bos(bos_token: str | None, input: str | list[str]) -> str | list[str]:
    """Return texts with the BOS token's text in front of each.

    Args:
        bos_token: its text.
        input: a text or several.

    Raises:
        ValueError: there is no BOS token.
    """
    if bos_token is None:
        raise ValueError("get_input_with_manually_prepended_bos got bos_token=None: the tokenizer has no BOS token")
    return bos_token + input if isinstance(input, str) else [bos_token + text for text in input]


def get_tokens_with_bos_removed(
    tokenizer: Tokenizer, tokens: Int[Tensor, "*batch pos"], padding_side: str | None = None
) -> Int[Tensor, "*batch shorter_pos"]:
    """Return tokens without the BOS token of each prompt, one position shorter.

    Args:
        tokenizer: its padding token and side tell where a padded prompt begins.
        tokens: prompts that begin with BOS.
        padding_side: overrides the tokenizer's.
    """
    if (padding_side or tokenizer.padding_side) == "right" or tokens.ndim == 1:
        return tokens[..., 1:]
    mask = infer_attention_mask(tokenizer, tokens, prepend_bos=True, padding_side="left")
    first = torch.zeros_like(tokens[:, :1]) if mask is None else mask.argmax(-1, keepdim=True)
    kept = torch.arange(tokens.shape[1], device=tokens.device) != first
    return tokens[kept].view(len(tokens), -1)


def is_library_available(name: str) -> bool:
    """Return whether a package is installed.

    Args:
        name: the package's import name.
    """
    return importlib.util.find_spec(name) is not None


# The hub ids that have aliases. Other ids of supported families load too.
OFFICIAL_MODEL_NAMES = sorted(set(ALIASES.values()))


def make_model_alias_map() -> dict[str, str]:
    """Return the hub id of each alias."""
    return dict(ALIASES)


MODEL_ALIASES: dict[str, list[str]] = {
    official: [alias for alias, named in ALIASES.items() if named == official] for official in OFFICIAL_MODEL_NAMES
}
# The first alias of each model, or its hub id.
DEFAULT_MODEL_ALIASES = [MODEL_ALIASES[official][0] for official in OFFICIAL_MODEL_NAMES]


def get_official_model_name(model_name: str) -> str:
    """Return the hub id that a name stands for.

    Args:
        model_name: an alias or a hub id, in upper or lower case.

    Raises:
        ValueError: the name is neither; `from_pretrained` takes also such names, of folders and other hub ids.
    """
    official = hub_id(model_name)
    if official not in MODEL_ALIASES:
        raise ValueError(
            f"{model_name!r} has no alias here; HookedTransformer.from_pretrained takes any hub id or folder"
        )
    return official
