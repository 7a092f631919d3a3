"""The key-value cache: the keys and values of earlier positions, so that a longer prompt need not recompute them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_lm._support.precision import autocasts
from hooked_lm._support.torch_internals import transforms_active, values_readable
from hooked_lm.config import HookedTransformerConfig

__all__ = [
    "HookedTransformerKeyValueCache",
    "HookedTransformerKeyValueCacheEntry",
    "TransformerLensKeyValueCache",
    "TransformerLensKeyValueCacheEntry",
]


class HookedTransformerKeyValueCacheEntry:
    """Keys and values of one layer, in a buffer that doubles when it is full.

    Keys are stored after the rotary rotation, and for each query head where `ungroup_grouped_query_attention` is set; a
    cache can be in use while it is set and unset.

    Attributes:
        past_keys, past_values: [batch pos kv_head d_head] and [batch pos kv_head d_value], views of the stored
            positions. The two widths differ in latent attention alone, where each head's are stored, not the latent.
            Both may be assigned, to repeat or reorder prompts for example; the entry holds a copy.
        frozen: `append` then returns the longer keys and values but stores nothing.
    """

    def __init__(
        self,
        past_keys: Float[Tensor, "batch pos kv_head d_head"],
        past_values: Float[Tensor, "batch pos kv_head d_value"],
        frozen: bool = False,
    ) -> None:
        self._keys, self._values = past_keys.clone(), past_values.clone()
        self._length, self._n_values = past_keys.shape[1], past_values.shape[1]
        self.frozen = frozen

    @classmethod
    def init_cache_entry(
        cls, cfg: HookedTransformerConfig, device: torch.device | str | None, batch_size: int = 1, capacity: int = 0
    ) -> HookedTransformerKeyValueCacheEntry:
        """Return an empty entry for one layer of a model, with room for `capacity` positions.

        Args:
            cfg: the model's config.
            device: where the model is.
            batch_size: how many prompts.
            capacity: positions to make room for; the entry grows beyond.
        """

        def empty(width: int) -> Tensor:
            return torch.empty(batch_size, capacity, cfg.n_hooked_kv_heads, width, dtype=cfg.dtype, device=device)

        keys, values = empty(cfg.d_head), empty(cfg.value_width)
        entry = cls(keys[:, :0], values[:, :0])
        entry._keys, entry._values = keys, values
        return entry

    @property
    def allocated(self) -> tuple[Tensor, Tensor]:
        """The whole buffers of keys and values, room for further positions included."""
        return self._keys, self._values

    @property
    def past_keys(self) -> Float[Tensor, "batch pos kv_head d_head"]:
        """The keys stored, [batch pos kv_head d_head]."""
        return self._keys[:, : self._length]

    @past_keys.setter
    def past_keys(self, keys: Float[Tensor, "batch pos kv_head d_head"]) -> None:
        self._keys, self._length = keys.clone(), keys.shape[1]

    @property
    def past_values(self) -> Float[Tensor, "batch pos kv_head d_value"]:
        """The values stored, [batch pos kv_head d_value]."""
        return self._values[:, : self._n_values]

    @past_values.setter
    def past_values(self, values: Float[Tensor, "batch pos kv_head d_value"]) -> None:
        self._values, self._n_values = values.clone(), values.shape[1]

    def append(
        self, keys: Float[Tensor, "batch pos kv_head d_head"], values: Float[Tensor, "batch pos kv_head d_value"]
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all of them, [batch all_pos kv_head d_head] and d_value.

        Under autocast an empty cache takes the dtype that comes, and any other casts to its own.

        Args:
            keys, values: of the new positions, [batch pos kv_head d_head] and [batch pos kv_head d_value].

        Raises:
            ValueError: another batch size, dtype or device than the cache has; or keys and values were assigned that
                do not fit each other.
        """
        if self._values.shape[0] != self._keys.shape[0] or self._n_values != self._length:
            raise ValueError(
                f"past_keys {list(self.past_keys.shape)} and past_values {list(self.past_values.shape)} differ in "
                "prompts or positions: assign both"
            )
        if (keys.dtype, values.dtype) != (self._keys.dtype, self._values.dtype) and autocasts(keys):
            if self._length == 0:
                self._keys, self._values = self._keys.to(keys.dtype), self._values.to(values.dtype)
            keys, values = keys.to(self._keys.dtype), values.to(self._values.dtype)
        self._match_heads(keys.shape[2])
        keys, values = (_per_head(one, self._keys.shape[2]) for one in (keys, values))
        past = self._keys
        if (keys.shape[0], keys.dtype, keys.device) != (past.shape[0], past.dtype, past.device):
            raise ValueError(
                f"the key-value cache holds batch {past.shape[0]}, {past.dtype} on {past.device}; "
                f"got batch {keys.shape[0]}, {keys.dtype} on {keys.device}"
            )
        if self.frozen:
            return torch.cat((self.past_keys, keys), 1), torch.cat((self.past_values, values), 1)
        in_a_graph = torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad or self._in_a_graph)
        if in_a_graph or transforms_active():
            # A write into the buffer would break the graph through it, and torch.func cannot always make it.
            self._keys = torch.cat((self.past_keys, keys), 1)
            self._values = torch.cat((self.past_values, values), 1)
            self._length = self._n_values = self._keys.shape[1]
            return self._keys, self._values
        end = self._length + keys.shape[1]
        # A buffer in an autograd graph, or made under inference_mode, must not be written to in place: it is copied.
        sealed = self._in_a_graph or (past.is_inference() and not torch.is_inference_mode_enabled())
        if sealed or end > past.shape[1]:
            self._grow(max(end, 2 * self._length, 64))
        self._keys[:, self._length : end] = keys
        self._values[:, self._length : end] = values
        self._length = self._n_values = end
        return self.past_keys, self.past_values

    def _match_heads(self, n_heads: int) -> None:
        """Hold an entry for each of so many heads, where more come than are stored: keys that are no longer grouped."""
        if n_heads > self._keys.shape[2]:
            self._keys, self._values = _per_head(self._keys, n_heads), _per_head(self._values, n_heads)

    def rewind(self, length: int) -> None:
        """Forget every position from `length` on.

        Raises:
            ValueError: a negative length.
        """
        if length < 0:
            raise ValueError(f"a cache is rewound to a length, which is not negative; got {length}")
        self._length = self._n_values = min(length, self._length)

    @property
    def _in_a_graph(self) -> bool:
        return self._keys.requires_grad or self._values.requires_grad

    def _grow(self, capacity: int) -> None:
        def grown(buffer: Tensor) -> Tensor:
            longer = buffer.new_empty(buffer.shape[0], capacity, *buffer.shape[2:])
            longer[:, : self._length] = buffer[:, : self._length].detach()
            return longer

        self._keys, self._values = grown(self._keys), grown(self._values)


def _per_head(x: Tensor, n_heads: int) -> Tensor:
    """Return keys or values with an entry for each of so many heads, each head's repeated for those that share it."""
    return x if x.shape[2] == n_heads else x.repeat_interleave(n_heads // x.shape[2], dim=2)


class HookedTransformerKeyValueCache:
    """One entry per layer, and which positions are padding.

    Attributes:
        entries: the layers' `HookedTransformerKeyValueCacheEntry`s; `cache[layer]` is one of them.
        previous_attention_mask: [batch pos] of 0 and 1.
    """

    def __init__(self, entries: list[HookedTransformerKeyValueCacheEntry], previous_attention_mask: Tensor) -> None:
        self.entries = entries
        self.previous_attention_mask = previous_attention_mask
        self.frozen = False

    @property
    def previous_attention_mask(self) -> Tensor:
        """The mask of the stored positions, [batch pos] of 0 and 1."""
        return self._mask

    @previous_attention_mask.setter
    def previous_attention_mask(self, mask: Int[Tensor, "batch pos"]) -> None:
        self._mask = mask
        # Whether a stored position is padding; None where that has to be read from the mask.
        self._padded: bool | None = None if mask.numel() else False

    def is_padded(self) -> bool:
        """Return whether a stored position is padding. Where values cannot be read, it is assumed."""
        if self._padded is None:
            self._padded = not (values_readable(self._mask) and bool(self._mask.all()))
        return self._padded

    @classmethod
    def init_cache(
        cls,
        cfg: HookedTransformerConfig,
        device: torch.device | str | None,
        batch_size: int = 1,
        capacity: int = 0,
        block_devices: Sequence[torch.device] | None = None,
    ) -> HookedTransformerKeyValueCache:
        """Return an empty cache for a model's config, with room for `capacity` positions.

        Args:
            cfg: the model's config.
            device: where the model is.
            batch_size: how many prompts.
            capacity: positions to make room for; the cache grows beyond.
            block_devices: where each block is, if they are not all there.
        """
        places: Sequence[torch.device | str | None] = block_devices or [device] * cfg.n_layers
        entries = [
            HookedTransformerKeyValueCacheEntry.init_cache_entry(cfg, place, batch_size, capacity) for place in places
        ]
        return cls(entries, torch.empty(batch_size, 0, dtype=torch.long, device=device))

    @property
    def length(self) -> int:
        """The number of stored positions."""
        return self.previous_attention_mask.shape[1]

    @property
    def batch_size(self) -> int:
        """The number of prompts."""
        return self.previous_attention_mask.shape[0]

    def freeze(self) -> None:
        """Stop storing: later calls use the stored positions and add none."""
        self._set_frozen(True)

    def unfreeze(self) -> None:
        """Store new positions again."""
        self._set_frozen(False)

    def _set_frozen(self, frozen: bool) -> None:
        self.frozen = frozen
        for entry in self.entries:
            entry.frozen = frozen

    def append_attention_mask(
        self, attention_mask: Int[Tensor, "batch pos"], padded: bool | None = None
    ) -> Int[Tensor, "batch all_pos"]:
        """Store the mask of new positions (unless frozen) and return that of all positions.

        Args:
            attention_mask: of the new positions.
            padded: whether one of them is padding, where that is known. An accelerator then need not be waited for.
        """
        before = self._padded
        mask = torch.cat((self.previous_attention_mask, attention_mask.to(self.previous_attention_mask)), 1)
        if not self.frozen:
            self.previous_attention_mask = mask
            self._padded = None if before is None or padded is None else before or padded
        return mask

    def rewind(self, length: int) -> None:
        """Forget every position from `length` on, in every layer; used to undo a run that failed half-way.

        Raises:
            ValueError: a negative length.
        """
        for entry in self.entries:
            entry.rewind(length)
        self.previous_attention_mask = self.previous_attention_mask[:, :length]

    def __getitem__(self, layer: int) -> HookedTransformerKeyValueCacheEntry:
        return self.entries[layer]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[HookedTransformerKeyValueCacheEntry]:
        return iter(self.entries)


# The names that version 3 of the classic library gave them.
TransformerLensKeyValueCache = HookedTransformerKeyValueCache
TransformerLensKeyValueCacheEntry = HookedTransformerKeyValueCacheEntry
