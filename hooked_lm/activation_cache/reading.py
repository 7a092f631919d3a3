"""Reading a cache from its file, and the activations that stay there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hooked_lm._support.reading import SafetensorFile, parse_json
from hooked_lm._support.versions import check_version
from hooked_lm.activation_cache.file import CACHE_DTYPES, CACHE_FORMAT, CACHE_VERSION, MASK

__all__ = ["MappedActivations", "SavedCache", "read_cache"]


class MappedActivations(MutableMapping[str, Tensor]):
    """Activations that are views of a mapped file. Reading one raises if the file has changed since it was opened.

    Args:
        file: the open file.
        tensors: full hook name -> activation.
    """

    def __init__(self, file: SafetensorFile, tensors: Mapping[str, Tensor]) -> None:
        self._file, self._tensors = file, dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        self._file.check()
        return tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __reduce__(self) -> tuple[type[dict[str, Tensor]], tuple[dict[str, Tensor]]]:
        # A copy is in memory, and no longer needs the file.
        return dict, (dict(self),)

    def changed(self, change: Callable[[str, Tensor], Tensor]) -> MappedActivations:
        """Return the activations with a change made to each; views of the file may still be among them.

        Args:
            change: takes a name and its activation, and returns the new one.
        """
        return MappedActivations(self._file, {name: change(name, tensor) for name, tensor in self.items()})


@dataclass(frozen=True)
class SavedCache:
    """The content of a cache's file.

    Attributes:
        entries: full hook name -> activation.
        has_batch_dim: whether they have their batch axis.
        sizes: of the model of the run; None in files that were written before they held it.
        attention_mask: 0 where a cached position is padding, [batch pos]; None if none is.
    """

    entries: MappedActivations
    has_batch_dim: bool
    sizes: Mapping[str, object] | None
    attention_mask: Tensor | None


def read_cache(path: str | Path) -> SavedCache:
    """Return the content of a file that `ActivationCache.save` or an offloaded run has written.

    Args:
        path: of the file.

    Raises:
        ValueError: it is no such file, is damaged, or is of a newer version of the format.
    """
    file = SafetensorFile(path)
    about = file.metadata
    # Caches that were written before the format had a name and a number have neither.
    if about.get("format", CACHE_FORMAT if "order" in about else None) != CACHE_FORMAT:
        raise ValueError(f"{path} is not a saved ActivationCache")
    version = about.get("version", "1")
    number = int(version) if version.isdecimal() and len(version) < 10 else version
    check_version(f"the cache {path}", number, CACHE_VERSION)
    if not {"has_batch_dim", "aliases", "order"} <= about.keys():
        raise ValueError(f"{path} is a saved ActivationCache whose metadata is incomplete")
    if about["has_batch_dim"] not in ("True", "False"):
        raise ValueError(f"{path}: has_batch_dim is 'True' or 'False'; got {about['has_batch_dim']!r}")
    order, aliases = _names(path, about["order"]), _aliases(path, about["aliases"])
    stored = {name: aliases.get(name, name) for name in order}
    absent = sorted(set(stored.values()) - set(file.names))
    if absent:
        raise ValueError(f"{path} lacks tensors of its cache: {absent}")
    strange = {name: file.dtype(name) for name in stored.values() if file.dtype(name) not in CACHE_DTYPES}
    if strange:
        raise ValueError(f"{path} has tensors in dtypes that caches do not have: {strange}")
    # Each once, so that names of one tensor share it.
    tensors = {name: file.tensor(name) for name in dict.fromkeys(stored.values())}
    entries = MappedActivations(file, {name: tensors[place] for name, place in stored.items()})
    mask = file.tensor(MASK) if MASK in file.names else None
    if mask is not None and (mask.ndim != 2 or mask.is_floating_point()):
        raise ValueError(f"{path}: the attention mask is [batch pos] and whole numbers, got {tuple(mask.shape)}")
    return SavedCache(entries, about["has_batch_dim"] == "True", _sizes(path, about.get("model")), mask)


def _names(path: str | Path, text: str) -> list[str]:
    order = parse_json(text, f"order in the metadata of {path}")
    if not isinstance(order, list) or not all(isinstance(name, str) for name in order):
        raise ValueError(f"order in the metadata of {path} is no list of names")
    if len(set(order)) < len(order):
        raise ValueError(f"order in the metadata of {path} has a name twice")
    return order


def _aliases(path: str | Path, text: str) -> dict[str, str]:
    aliases = parse_json(text, f"aliases in the metadata of {path}")
    if not isinstance(aliases, dict) or not all(isinstance(name, str) for name in aliases.values()):
        raise ValueError(f"aliases in the metadata of {path} are no names of names")
    return aliases


def _sizes(path: str | Path, text: str | None) -> Mapping[str, object] | None:
    if text is None:
        return None
    sizes = parse_json(text, f"model in the metadata of {path}")
    if not isinstance(sizes, dict):
        raise ValueError(f"model in the metadata of {path} is no object of sizes")
    return sizes
