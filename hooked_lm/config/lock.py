"""The lock on a built model's config: fields that act when they are changed can be assigned, the others raise."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar

import torch

from hooked_lm.config.checks import parse_dtype, require_choice, require_positive_integer
from hooked_lm.config.choices import ATTENTION_DIRECTIONS, INIT_MODES, PADDING_SIDES

if TYPE_CHECKING:
    from hooked_lm.config.config import HookedTransformerConfig

__all__ = ["ASSIGNABLE", "FixedList", "Item", "Lockable", "OwnerCallback", "plain"]

OwnerCallback = Callable[[str, object], object]
Item = TypeVar("Item")


class _Lock(NamedTuple):
    """The part of a locked config that is not a field.

    Attributes:
        owner_callback: moves the model; called with `"dtype"` or `"device"` and the new value.
        n_learned_positions: the longest sequence for which the model has learned positions; None for any length.
    """

    owner_callback: OwnerCallback
    n_learned_positions: int | None


class Lockable:
    """The part of a config that a model can lock."""

    __slots__ = ("_lock",)
    _lock: _Lock

    @property
    def is_locked(self) -> bool:
        """Whether the config belongs to a built model."""
        return hasattr(self, "_lock")

    def lock(self, owner_callback: OwnerCallback) -> None:
        """Make this the config of a built model.

        From now on a field can be assigned only if assigning it changes what the model does, or if it only describes
        the model (`ASSIGNABLE`). Assigning any other field raises AttributeError, unless the value is the present one.
        The lists among the fields can no longer be changed in place. Copies of a locked config are not locked.

        Args:
            owner_callback: called with `"dtype"` or `"device"` and the new value, to move the model's parameters. The
                config keeps it alive, so a callback that holds the model weakly avoids a reference cycle.

        Raises:
            RuntimeError: the config is locked already.
        """
        if self.is_locked:
            raise RuntimeError("this config belongs to a model already: give the other model a copy, cfg.replace()")
        cfg = _config(self)
        for name, value in _fields(cfg).items():
            if isinstance(value, list):
                object.__setattr__(self, name, FixedList(value))
        learned = cfg.positional_embedding_type in ("standard", "shortformer")
        self._lock = _Lock(owner_callback, cfg.n_ctx if learned else None)

    def set_unlocked(self, **fields: object) -> None:
        """Set fields of a config, locked or not, as they are given: unchecked, and without a call to the owner.

        For the model itself, which changes `normalization_type` when norms are folded and `dtype` when it is moved.

        Raises:
            AttributeError: there is no such field; then none is set.
        """
        for name in fields:
            if name not in _fields(_config(self)):
                raise AttributeError(f"a config has no field {name!r}")
        for name, value in fields.items():
            if self.is_locked and isinstance(value, list):
                object.__setattr__(self, name, FixedList(value))
            else:
                object.__setattr__(self, name, plain(value))

    def __setattr__(self, name: str, value: object) -> None:
        if not self.is_locked:
            object.__setattr__(self, name, plain(value))
        elif name in _fields(_config(self)):
            _assign(_config(self), name, value, self._lock)
        elif name == "_lock":
            raise AttributeError("a config cannot be unlocked: take a copy, cfg.replace()")
        else:
            object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if self.is_locked and (name == "_lock" or name in _fields(_config(self))):
            raise AttributeError(f"cfg.{name} cannot be deleted: this config belongs to a model that is already built")
        object.__delattr__(self, name)

    def __getstate__(self) -> object:
        """Return the attributes without the lock, so that copies and unpickled configs are not locked."""
        # Python's own state of an object with slots is a pair (its __dict__ or None, its slots).
        state = object.__getstate__(self)
        if isinstance(state, tuple):
            attributes, slots = state
            return attributes, {name: value for name, value in slots.items() if name != "_lock"}
        return state

    def __setstate__(self, state: object) -> None:
        """Take the attributes of a copy or a pickle, which may be of a config of the classic library."""
        if isinstance(state, dict):  # a class without slots has pickled its fields
            state = type(_config(self)).from_dict(state).__getstate__()
        assert isinstance(state, tuple)
        for attributes in state:
            for name, value in (attributes or {}).items():
                setattr(self, name, value)


class FixedList(list[Item]):
    """A list among the fields of a locked config: equal to a plain list, and it cannot be changed."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(
            "changing this list would change nothing: it belongs to the config of a model that is already built. "
            "Build a model anew with model.cfg.replace(...) and a new list"
        )

    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse
    append = clear = extend = insert = pop = remove = reverse = sort = _refuse

    def __reduce__(self) -> tuple[type[list[Item]], tuple[list[Item]]]:
        """Copies and pickles are plain lists."""
        return list, (list(self),)


def plain(value: object) -> object:
    """Return a plain list for a `FixedList`, and any other value as it is."""
    return list(value) if isinstance(value, FixedList) else value


# Each function below checks a value that is assigned to a locked config and returns the value to store.


def _any_value(cfg: HookedTransformerConfig, name: str, value: object) -> object:
    return value


def _true_or_false(cfg: HookedTransformerConfig, name: str, value: object) -> object:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is True or False; got {value!r}")
    return value


def _real_number(cfg: HookedTransformerConfig, name: str, value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} is a finite number; got {value!r}")
    return float(value)


def _context_length(cfg: HookedTransformerConfig, name: str, value: object) -> object:
    require_positive_integer(name, value)
    longest = cfg._lock.n_learned_positions
    if longest is not None and isinstance(value, int) and value > longest:
        raise ValueError(f"n_ctx={value} is more than the {longest} positions this model has learned")
    return value


def _attention_direction(cfg: HookedTransformerConfig, name: str, value: object) -> object:
    require_choice(name, value, ATTENTION_DIRECTIONS)
    if cfg.alibi_in_bfloat16 and value == "bidirectional":
        raise ValueError("alibi_in_bfloat16 counts from the first key, which only causal attention allows")
    return value


def _one_of(choices: tuple[str, ...]) -> Callable[[HookedTransformerConfig, str, object], object]:
    def check(cfg: HookedTransformerConfig, name: str, value: object) -> object:
        require_choice(name, value, choices)
        return value

    return check


def _dtype(cfg: HookedTransformerConfig, name: str, value: object) -> object:
    return parse_dtype(value)


def _device(cfg: HookedTransformerConfig, name: str, value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        raise ValueError(f"device is a torch device or its name; got {value!r}")
    return str(torch.device(value))


_MOVING = ("dtype", "device")
_DESCRIBING = (
    "model_name",
    "tokenizer_name",
    "tokenizer_prepends_bos",
    "original_architecture",
    "from_checkpoint",
    "checkpoint_index",
    "checkpoint_label_type",
    "checkpoint_value",
    "seed",
    "initializer_range",
    "init_weights",
)

# The fields that can be assigned on a locked config, each with the function that checks and parses the value.
ASSIGNABLE: Mapping[str, Callable[[HookedTransformerConfig, str, object], object]] = {
    "attn_scores_soft_cap": _real_number,
    "output_logits_soft_cap": _real_number,
    "attention_dir": _attention_direction,
    "n_ctx": _context_length,
    "dtype": _dtype,
    "device": _device,
    "default_prepend_bos": _true_or_false,
    "default_padding_side": _one_of(PADDING_SIDES),
    "use_attn_result": _true_or_false,
    "use_split_qkv_input": _true_or_false,
    "use_attn_in": _true_or_false,
    "use_hook_mlp_in": _true_or_false,
    "use_hook_tokens": _true_or_false,
    "ungroup_grouped_query_attention": _true_or_false,
    "init_mode": _one_of(INIT_MODES),
    **dict.fromkeys(_DESCRIBING, _any_value),
}


# Assigning the first field sets the second too, unless that is None: the model's tokenizer follows the config.
_FOLLOWERS = {"default_prepend_bos": "tokenizer_prepends_bos"}


def _assign(cfg: HookedTransformerConfig, name: str, value: object, lock: _Lock) -> None:
    """Assign a field of a locked config, or raise."""
    present = getattr(cfg, name)
    if _is_same(present, value):
        return
    if name not in ASSIGNABLE:
        raise AttributeError(
            f"cfg.{name} = {value!r} would change nothing: this config belongs to a model that is already built. "
            f"Build a model anew: HookedTransformer(model.cfg.replace({name}={value!r}))"
        )
    value = ASSIGNABLE[name](cfg, name, value)
    if _is_same(present, value):
        return
    if name in _MOVING:
        lock.owner_callback(name, value)
        # The owner may have set the field itself, more precisely: "cuda:0" for "cuda".
        if not _is_same(getattr(cfg, name), present):
            return
    object.__setattr__(cfg, name, value)
    follower = _FOLLOWERS.get(name)
    if follower is not None and getattr(cfg, follower) is not None:
        object.__setattr__(cfg, follower, value)


def _is_same(present: object, value: object) -> bool:
    """Whether assigning `value` would change nothing. An array is never the same: its equality has no one answer."""
    if present is value:
        return True
    return isinstance(value, (bool, int, float, str, list)) and bool(present == value)


def _config(lockable: Lockable) -> HookedTransformerConfig:
    """The same object, as the only subclass there is."""
    return lockable  # type: ignore[return-value]


def _fields(cfg: HookedTransformerConfig) -> Mapping[str, object]:
    """A config's fields by name; one that is not set yet is left out."""
    names = (field.name for field in dataclasses.fields(cfg))
    return {name: getattr(cfg, name) for name in names if hasattr(cfg, name)}
