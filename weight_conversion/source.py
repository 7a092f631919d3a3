"""Finding a checkpoint and reading its tensors: a folder, the hub, or a model in memory."""

from __future__ import annotations

import json
import zipfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weight_conversion.aliases import ALIASES
from weight_conversion.errors import CheckpointError
from weight_conversion.fields import HFConfig

__all__ = [
    "SafetensorFile",
    "SafetensorFiles",
    "TensorSource",
    "TensorsInMemory",
    "find_folder",
    "open_tensors",
    "read_json",
]

# What `safe_open` returns: its methods have no types.
SafetensorFile = Any

_SAFETENSORS, _PICKLE = "model.safetensors", "pytorch_model.bin"
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def find_folder(name_or_path: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint: the path itself, or a download of the hub id that a name stands for.

    Raises:
        CheckpointError: it is no folder, and the hub has no such checkpoint; the message lists the places tried.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"{path} is a folder, which has one version: there is no revision {revision!r} of it")
        return path
    if path.is_file():
        raise CheckpointError(f"{path} is a file: give the folder that holds config.json and the weights")
    return _download(str(name_or_path), revision)


def _download(name: str, revision: str | None) -> Path:
    # Only loading from the hub needs the hub's client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub_id = ALIASES.get(name, name)
    # A repository may hold copies of its weights in other formats, under other names.
    wanted = ["*.json", "*.txt", "*.model", "model*.safetensors"]
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]))
        if not any(folder.glob("model*.safetensors")):
            snapshot_download(hub_id, revision=revision, allow_patterns=["pytorch_model*.bin"], ignore_patterns=["*/*"])
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        short = hub_id.rsplit("/", maxsplit=1)[-1]
        at = "" if revision is None else f" --revision {revision}"
        raise CheckpointError(
            f"no checkpoint {name!r}. Tried: the folder {Path(name).absolute()} (there is none); {hub_id!r} in the "
            f"local HuggingFace cache and on the hub ({type(error).__name__}: {str(error).splitlines()[0]}). Without a "
            f"network, run `hf download {hub_id}{at} --local-dir {short}` where there is one, copy the folder and "
            "load it by its path"
        ) from error
    return folder


def read_json(path: Path) -> HFConfig:
    """Return the contents of a JSON file that holds an object.

    Raises:
        CheckpointError: there is no such file, or it does not hold a JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}: it is not the folder of a checkpoint")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def open_tensors(folder: Path) -> TensorSource:
    """Return a folder's tensors by name, each read when it is asked for.

    Safetensors come first; a pickle is read only without them, with `weights_only=True`.

    Raises:
        CheckpointError: the folder has no weights, a shard is absent, or a file is damaged.
    """
    for single, read in ((_SAFETENSORS, SafetensorFiles), (_PICKLE, _open_pickles)):
        # A whole file before an index, as in transformers: an index may be left over from older contents of the folder.
        if (folder / single).is_file():
            return read([folder / single])
        if (folder / f"{single}.index.json").is_file():
            where = read_json(folder / f"{single}.index.json").get("weight_map")
            if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
                raise CheckpointError(f"{folder / single}.index.json has no weight_map from tensors to files")
            names = set(where.values())
            absent = sorted(name for name in names if not (folder / name).is_file())
            if absent or not names:
                raise CheckpointError(f"{folder / single}.index.json names files that are absent: {', '.join(absent)}")
            return read([folder / name for name in sorted(names)])
    raise CheckpointError(
        f"{folder} has no weights: expected {_SAFETENSORS}, {_PICKLE}, or the .index.json of one in shards"
    )


class TensorSource(Mapping[str, Tensor]):
    """Tensors by name that can be asked about before they are read.

    Attributes:
        mapped: the tensors are private views of a file: a write to one changes neither the file nor another view, and
            pages take memory only once they are used.
    """

    mapped = False

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its values."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype without reading its values."""

    def release(self) -> None:
        """Free the memory of the tensors that have been read, except those still referenced elsewhere."""


class SafetensorFiles(TensorSource):
    """Safetensors files as one mapping. They are memory-mapped: a tensor costs nothing until its values are used."""

    mapped = True

    def __init__(self, paths: list[Path]) -> None:
        self._open: dict[Path, SafetensorFile] = {}
        self._paths: dict[str, Path] = {}
        for path in paths:
            self._paths |= dict.fromkeys(self._file(path).keys(), path)

    def _file(self, path: Path) -> SafetensorFile:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from error
        return self._open[path]

    def __getitem__(self, name: str) -> Tensor:
        path = self._paths[name]
        try:
            tensor: Tensor = self._file(path).get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{name} in {path} cannot be read: {error}") from error
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(self._paths[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        kind = self._file(self._paths[name]).get_slice(name).get_dtype()
        if kind not in _SAFETENSORS_DTYPES:
            raise CheckpointError(f"{name} has the dtype {kind}, which is not among {sorted(_SAFETENSORS_DTYPES)}")
        return _SAFETENSORS_DTYPES[kind]

    def release(self) -> None:
        # The pages that were read stay in memory as long as the file is mapped.
        self._open.clear()

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


class TensorsInMemory(TensorSource):
    """A state dict."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _open_pickles(paths: list[Path]) -> TensorsInMemory:
    """Return the tensors of PyTorch pickles, memory-mapped if possible; a file that holds anything else is refused."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            # PyTorch before 1.6 wrote pickles that are no zip archives and cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # a damaged file makes torch.load raise errors of many types
            raise CheckpointError(
                f"{path} is damaged, or holds more than tensors, and is not unpickled: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise CheckpointError(f"{path} does not hold tensors by name")
        tensors |= content
    return TensorsInMemory(tensors)
