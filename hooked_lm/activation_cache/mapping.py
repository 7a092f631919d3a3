"""CachedActivations: the activations of a run, by name."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, MutableMapping, Sequence, ValuesView
from functools import partial
from pathlib import Path
from typing import Protocol, Self, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from hooked_lm._support.inference import as_differentiable
from hooked_lm._support.integers import integer, is_integer
from hooked_lm._support.torch_internals import memory_reference
from hooked_lm.activation_cache.file import Memory, Offloading, memory_of
from hooked_lm.activation_cache.lazy import LazyActivations
from hooked_lm.activation_cache.of_model import differing_shapes, differing_sizes, sizes_of
from hooked_lm.activation_cache.reading import MappedActivations, read_cache
from hooked_lm.components import TransformerBlock, Unembed
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooks import HookPoint
from hooked_lm.names import (
    ActivationKey,
    NamesFilter,
    UnknownHookError,
    describe_unknown,
    get_act_name,
    is_pattern,
    select_names,
)
from hooked_lm.slicing import Slice
from hooked_lm.tokenization import LogitTokens

__all__ = ["CacheModel", "CachedActivations"]


class CacheModel(Protocol):
    """The part of a model that a cache reads."""

    cfg: HookedTransformerConfig
    hook_dict: dict[str, HookPoint]
    ln_final: nn.Module
    unembed: Unembed

    @property
    def blocks(self) -> Sequence[TransformerBlock]: ...

    def tokens_to_residual_directions(self, tokens: LogitTokens) -> Tensor: ...

    def accumulated_bias(self, layer: int, mlp_input: bool, include_mlp_biases: bool) -> Tensor: ...


class CachedActivations(Mapping[str, Tensor]):
    """A mapping from names to tensors. Names may be short: `cache["q", 3]`, `cache["scale", 4, "ln1"]`, `cache["k2a"]`.

    Attributes:
        cache_dict: full hook name -> tensor; `LazyActivations` in a lazy cache, `MappedActivations` in one on disk.
        model: the model of the run.
        has_batch_dim: whether the tensors have their batch axis.
        attention_mask: 0 where the cached positions are padding, [batch pos], also where the tensors have no batch
            axis; None if none is.
    """

    def __init__(
        self,
        cache_dict: MutableMapping[str, Tensor],
        model: CacheModel,
        has_batch_dim: bool = True,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> None:
        self.cache_dict = cache_dict
        self.model = model
        self.has_batch_dim = has_batch_dim
        padded = attention_mask is not None and not bool(attention_mask.all())
        self.attention_mask = attention_mask if padded else None

    def full_name(self, key: ActivationKey) -> str:
        """Return the full hook name of a key; negative layers count from the last.

        Args:
            key: a hook name, or the arguments of `get_act_name` as a tuple.

        Raises:
            UnknownHookError: there is no such hook name.
        """
        if isinstance(key, str) and key in self.cache_dict:
            return key
        parts = list(key) if isinstance(key, tuple) else [key]
        if len(parts) > 1 and is_integer(parts[1]):
            layer = integer(parts[1], "layer")
            parts[1:2] = [layer + self.model.cfg.n_layers if layer < 0 else layer]  # type: ignore[list-item]
        try:
            return get_act_name(*parts)
        except (ValueError, TypeError) as error:
            raise UnknownHookError(f"{key!r} names no activation: {error}") from error

    def __getitem__(self, key: ActivationKey) -> Tensor:
        name = self.full_name(key)
        if name in self.cache_dict:
            return self._differentiable(name, self.cache_dict[name])
        if name.removesuffix("_grad") in self.model.hook_dict:
            reason = _why_absent(self.model.hook_dict.get(name))
            raise UnknownHookError(f"{name!r} exists in the model but is not in this cache: {reason}")
        raise UnknownHookError(describe_unknown(name, list(self.model.hook_dict)))

    def _differentiable(self, name: str, tensor: Tensor) -> Tensor:
        """Return an entry as a tensor that autograd can save, which takes the place of one made in inference mode."""
        usable = as_differentiable(tensor)
        if usable is not tensor and not isinstance(self.cache_dict, LazyActivations):
            place = tensor.data_ptr()
            # Entries that are one tensor stay one.
            same = [
                other
                for other, one in self.cache_dict.items()
                if one.data_ptr() == place and memory_of(one) == memory_of(tensor)
            ]
            self.cache_dict.update(dict.fromkeys((name, *same), usable))
        return usable

    def __contains__(self, key: object) -> bool:
        try:
            return self.full_name(key) in self.cache_dict  # type: ignore[arg-type]
        except UnknownHookError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__} with {len(self)} activations: {list(self.cache_dict)}"

    def items(self) -> ItemsView[str, Tensor]:
        """Return the names and tensors; of a lazy cache, computed block by block."""
        return self.cache_dict.items()

    def values(self) -> ValuesView[Tensor]:
        """Return the tensors; of a lazy cache, computed block by block."""
        return self.cache_dict.values()

    def prefetch(self, names: NamesFilter | Iterable[ActivationKey]) -> Self:
        """Compute activations of a lazy cache, each block once, and hold them. Returns this cache.

        In a full cache the names are only checked: it holds every activation already.

        Args:
            names: a name, a glob, a predicate, a short key such as `("q", 3)`, or several of these.

        Raises:
            UnknownHookError: one of them is not in the cache. Nothing has been computed then.
        """
        if isinstance(names, tuple) and any(isinstance(part, int) for part in names):
            names = [names]
        if not callable(names) and names is not None:
            several = [names] if isinstance(names, str) else list(names)
            names = [one if isinstance(one, str) and is_pattern(one) else self.full_name(one) for one in several]
        picked = select_names(cast(NamesFilter, names), list(self.cache_dict))
        if isinstance(self.cache_dict, LazyActivations):
            self.cache_dict.prefetch(picked)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the tensors; of a lazy cache, of the tensors that are held."""
        entries = self.cache_dict
        tensors = entries.kept() if isinstance(entries, LazyActivations) else entries.values()
        storages = {memory_reference(one): one.untyped_storage().nbytes() for one in tensors}
        return sum(storages.values())

    # Moving and slicing

    def to(self, device: torch.device | str, move_model: bool = False) -> Self:
        """Move the tensors (and, if asked, the model) to a device. Returns this cache.

        Args:
            device: where to.
            move_model: move the model as well.
        """
        if isinstance(self.cache_dict, LazyActivations):
            self.cache_dict.run.check()
        if move_model:
            self.model.to(device)  # type: ignore[attr-defined]
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask.to(device)
        if isinstance(self.cache_dict, LazyActivations):
            self.cache_dict = self.cache_dict.moved(device)
        else:
            moved: dict[Memory, Tensor] = {}
            # Entries that share a tensor still share it afterwards.
            self._change(lambda name, tensor: moved.setdefault(memory_of(tensor), tensor.to(device)))
        return self

    def remove_batch_dim(self) -> Self:
        """Drop the batch axis of every tensor. Returns this cache.

        Raises:
            ValueError: the batch is not 1; nothing has been changed then.
        """
        if self.has_batch_dim:
            # In a lazy cache all entries have the batch of one run, so one shape suffices.
            for name in list(self)[:1] if isinstance(self.cache_dict, LazyActivations) else self:
                shape = tuple(self[name].shape)
                if shape[0] != 1:
                    raise ValueError(f"the batch axis can go only when it is 1; {name!r} has shape {shape}")
            self._change(_first)
            self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: object) -> Self:
        """Return a new cache with some of the prompts; a single index drops the batch axis.

        Args:
            batch_slice: which prompts, anything `Slice` takes.

        Raises:
            ValueError: the cache has no batch axis.
        """
        if not self.has_batch_dim:
            raise ValueError("this cache has no batch axis to slice")
        batch = Slice.unwrap(batch_slice)
        mask = self.attention_mask
        if mask is not None:
            mask = Slice([batch.slice]).apply(mask) if batch.mode == "int" else batch.apply(mask)
        sliced = type(self)(self.cache_dict, self.model, batch.mode != "int", mask)
        sliced._change(partial(_sliced, batch))
        return sliced

    def _change(self, change: Callable[[str, Tensor], Tensor]) -> None:
        """Apply a change to every tensor: at once, or in a lazy cache when the tensor is read."""
        if isinstance(self.cache_dict, LazyActivations):
            self.cache_dict = self.cache_dict.then(change)
        elif isinstance(self.cache_dict, MappedActivations):
            self.cache_dict = self.cache_dict.changed(change)
        else:
            self.cache_dict = {name: change(name, tensor) for name, tensor in self.cache_dict.items()}

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Turn gradients on or off for all of torch: caches of long runs with gradients keep whole graphs alive."""
        torch.set_grad_enabled(mode)

    def check_positions(self, positions: Slice, what: str = "pos_slice") -> None:
        """Check that some positions are not all padding in a prompt.

        Args:
            positions: which.
            what: the argument that chose them, for the message.

        Raises:
            ValueError: they are.
        """
        if self.attention_mask is None or positions.is_identity:
            return
        picked = (positions if positions.mode != "int" else Slice([positions.slice])).apply(self.attention_mask, dim=1)
        padded = torch.where(~picked.bool().any(1))[0].tolist()
        if padded:
            ends = self.attention_mask.shape[1] - 1 - self.attention_mask.flip(1).argmax(1)
            raise ValueError(
                f"{what} {positions.slice} is padding in prompt {padded[0]} of this run: run the prompts padded on the "
                "left (padding_side='left'), or take each prompt by itself with cache.apply_slice_to_batch_dim; their "
                f"last tokens are at positions {ends.tolist()}"
            )

    def _positions(self, pos_slice: object) -> Slice:
        """Return the positions of a `pos_slice`, checked not to be all padding in a prompt."""
        positions = Slice.unwrap(pos_slice)
        self.check_positions(positions)
        return positions

    def _read(self, keys: Iterable[ActivationKey]) -> list[Tensor]:
        """Return the tensors of several keys; a lazy cache runs each block once for all of them."""
        names = [self.full_name(key) for key in keys]
        if not isinstance(self.cache_dict, LazyActivations) or not all(name in self.cache_dict for name in names):
            return [self[name] for name in names]
        found = dict(self.cache_dict.pairs(dict.fromkeys(names)))
        return [found[name] for name in names]

    # On disk

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file. An entry that is the same tensor as another is written once."""
        with Offloading(path, self, self.has_batch_dim, sizes_of(self.model.cfg)) as file:
            file.attention_mask = self.attention_mask
            for name, tensor in self.items():
                file[name] = tensor

    @classmethod
    def load(cls, path: str | Path, model: CacheModel) -> Self:
        """Read a cache that `save` has written, for use with the model it came from.

        Args:
            path: the file.
            model: the model of the run.

        Raises:
            ValueError: the file is not a saved cache, is damaged, is of a newer version of the format, or is of a model
                of other sizes.
        """
        read = read_cache(path)
        differ = (
            differing_shapes(read.entries, model.hook_dict, model.cfg, read.has_batch_dim)
            if read.sizes is None
            else differing_sizes(read.sizes, model.cfg)
        )
        if differ:
            more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
            raise ValueError(
                f"{path} is the cache of another model: {'; '.join(differ[:5])}{more}. "
                "Load it with the model of its run"
            )
        return cls(read.entries, model, read.has_batch_dim, read.attention_mask)


def _why_absent(point: HookPoint | None) -> str:
    """Return why a cache may lack the activation of a hook point (None for one of gradients), and what to do."""
    if point is None or (point.flag is None and point.differentiable and not point.on_demand):
        return "it is not recorded in this run"
    flag = "" if point.flag is None else f", or set model.cfg.{point.flag} = True before the run"
    return f"it is recorded only where it is asked for: name it in names_filter{flag}"


def _first(name: str, tensor: Tensor) -> Tensor:
    return tensor[0]


def _sliced(batch: Slice, name: str, tensor: Tensor) -> Tensor:
    return batch.apply(tensor, dim=0)
