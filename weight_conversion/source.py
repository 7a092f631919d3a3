"""Finding a checkpoint and reading its tensors: a folder, the hub, or a model in memory."""

from __future__ import annotations

import re
import zipfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hooked_lm._support.reading import SafetensorFile, read_json_object
from hooked_lm._support.tensor_bytes import bytes_of
from weight_conversion.aliases import hub_id
from weight_conversion.errors import CheckpointError
from weight_conversion.fields import HFConfig
from weight_conversion.hub import Hub

__all__ = [
    "CONFIG_DIGEST",
    "SafetensorFiles",
    "TensorSource",
    "TensorsInMemory",
    "find_folder",
    "first_line",
    "has_weights",
    "open_pickles",
    "open_tensors",
    "read_json",
]

# In the header of our own weights: the digest of the config that was saved with them.
CONFIG_DIGEST = "config_digest"
_SAFETENSORS, _PICKLE = "model.safetensors", "pytorch_model.bin"
_HUB = Hub()
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def find_folder(name_or_path: str | Path, revision: str | None = None, hub: Hub = _HUB) -> Path:
    """Return where a checkpoint is: the path of a folder or GGUF file itself, or a download of a hub id.

    Args:
        name_or_path: an alias, a hub id or a path.
        revision: branch, tag or commit on the hub.
        hub: how it is fetched.

    Raises:
        CheckpointError: it is no such path, and the hub has no such checkpoint; the message lists the places tried.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        if revision is not None:
            what = "a folder" if path.is_dir() else "a file"
            raise CheckpointError(f"{path} is {what}, which has one version: there is no revision {revision!r} of it")
        return path
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file: give the folder that holds config.json and the weights, or the path of a .gguf file"
        )
    if isinstance(name_or_path, Path) or _is_path(name_or_path):
        raise CheckpointError(
            f"no checkpoint {str(name_or_path)!r}: there is no folder {path.absolute()}. Give the folder that holds "
            "config.json and the weights, or a hub id such as 'openai-community/gpt2'"
        )
    return _download(str(name_or_path), revision, hub)


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds the weights of a whole model, in one file or in shards."""
    return any((folder / f"{name}{end}").is_file() for name in (_SAFETENSORS, _PICKLE) for end in ("", ".index.json"))


def _is_path(name: str) -> bool:
    """Whether a name is a path, since no hub id looks like it: the hub is not asked then."""
    return name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1


def _download(name: str, revision: str | None, hub: Hub) -> Path:
    # Only loading from the hub needs the hub's client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    full = hub_id(name)

    def fetch(*patterns: str) -> Path:
        return Path(
            snapshot_download(
                full,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*"],
                # The type of the client's own arguments, which are more than these.
                **hub.keywords(),  # type: ignore[arg-type]
            )
        )

    try:
        # A repository may hold copies of its weights in other formats, under other names.
        folder = fetch("*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors", "adapter_model.safetensors")
        if not any(folder.glob("*.safetensors")):
            fetch("pytorch_model*.bin", "adapter_model.bin", "*final.pth")
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        short = full.rsplit("/", maxsplit=1)[-1]
        at = "" if revision is None else f" --revision {revision}"
        raise CheckpointError(
            f"no checkpoint {name!r}. Tried: the folder {Path(name).absolute()} (there is none); {full!r} in the "
            f"local HuggingFace cache and on the hub ({type(error).__name__}: {first_line(error)}). Without a "
            f"network, run `hf download {full}{at} --local-dir {short}` where there is one, copy the folder and "
            "load it by its path"
        ) from error
    return folder


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, which may be empty."""
    return next(iter(str(error).splitlines()), "")


def read_json(path: Path) -> HFConfig:
    """Return the contents of a JSON file that holds an object.

    Raises:
        CheckpointError: there is no such file, or it does not hold a JSON object.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} has no {path.name}: it is not the folder of a checkpoint, or a save there was cut off"
        )
    return read_json_object(path, CheckpointError)


def open_tensors(folder: Path) -> TensorSource:
    """Return a folder's tensors by name, each read when it is asked for.

    Safetensors come first; a pickle is read only without them, with `weights_only=True`.

    Raises:
        CheckpointError: the folder has no weights, a shard is absent, or a file is damaged.
    """
    for single, read in ((_SAFETENSORS, SafetensorFiles), (_PICKLE, open_pickles)):
        # A whole file before an index, as in transformers: an index may be left over from older contents of the folder.
        if (folder / single).is_file():
            return read([folder / single])
        if (folder / f"{single}.index.json").is_file():
            return read(_shards(folder / f"{single}.index.json"))
    raise CheckpointError(
        f"{folder} has no weights: expected {_SAFETENSORS}, {_PICKLE}, or the .index.json of one in shards"
    )


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    names = sorted(set(where.values()))
    outside = [name for name in names if not _stays_inside(name)]
    if outside:
        raise CheckpointError(
            f"{index} names files outside its folder: {', '.join(map(repr, outside))}. A weight_map names files in "
            "the folder of the index, by their plain names"
        )
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent or not names:
        raise CheckpointError(f"{index} names files that are absent: {', '.join(absent)}")
    return [index.parent / name for name in names]


def _stays_inside(name: str) -> bool:
    """Whether an entry of a weight_map names a file in the folder, on any system.

    The text is looked at and not where it leads: in the hub's cache the files themselves are links to elsewhere.
    """
    parts = re.split(r"[/\\]", name)
    return ".." not in parts and "\0" not in name and parts[0] != "" and ":" not in parts[0] if name else True


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
        """Return a weight's dtype without reading its values.

        Raises:
            CheckpointError: it is not a floating-point dtype that a weight may have.
        """

    @property
    def config_digests(self) -> dict[Path, str | None]:
        """For each file, the digest in its header of the config that was saved with it; None where there is none."""
        return {}

    def release(self) -> None:
        """Free the memory of the tensors that have been read, except those still referenced elsewhere."""

    def check(self) -> None:
        """Check that the files whose tensors are in use have not been written to since they were opened.

        Raises:
            CheckpointError: one has.
        """


class SafetensorFiles(TensorSource):
    """Safetensors files as one mapping. They are memory-mapped: a tensor costs nothing until its values are used."""

    mapped = True

    def __init__(self, paths: list[Path]) -> None:
        self._open: dict[Path, SafetensorFile] = {}
        self._paths: dict[str, Path] = {}
        self._states: dict[Path, tuple[object, ...]] = {}
        self.metadata: dict[Path, dict[str, str]] = {}
        for path in paths:
            file = self._file(path)
            self.metadata[path] = file.metadata
            for name in file.names:
                if name in self._paths:
                    _require_same(name, self._file(self._paths[name]), file)
                self._paths.setdefault(name, path)

    def _file(self, path: Path) -> SafetensorFile:
        if path not in self._open:
            file = SafetensorFile(path, CheckpointError)
            if self._states.setdefault(path, file.state) != file.state:
                raise CheckpointError(f"{path} was changed while it was being loaded: load the checkpoint again")
            self._open[path] = file
        return self._open[path]

    def __getitem__(self, name: str) -> Tensor:
        return self._file(self._paths[name]).tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(self._paths[name]).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        kind = self._file(self._paths[name]).dtype(name)
        if kind not in _SAFETENSORS_DTYPES:
            raise CheckpointError(_no_weight(name, kind, sorted(_SAFETENSORS_DTYPES)))
        return _SAFETENSORS_DTYPES[kind]

    @property
    def config_digests(self) -> dict[Path, str | None]:
        return {path: about.get(CONFIG_DIGEST) for path, about in self.metadata.items()}

    def check(self) -> None:
        for file in self._open.values():
            file.check()

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
        found = self._tensors[name].dtype
        if found not in _SAFETENSORS_DTYPES.values():
            raise CheckpointError(_no_weight(name, str(found), sorted(map(str, _SAFETENSORS_DTYPES.values()))))
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def open_pickles(paths: list[Path]) -> TensorsInMemory:
    """Return the tensors of PyTorch pickles, memory-mapped if possible; read with `weights_only=True`.

    Raises:
        CheckpointError: a file is damaged, or holds anything but tensors by name.
    """
    tensors: dict[str, Tensor] = {}
    came_from: dict[str, Path] = {}
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
        for name, tensor in content.items():
            if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
                raise CheckpointError(f"{name} in {path} is a sparse, quantised or empty tensor, and no plain weight")
            if name in tensors and not _same_values(tensors[name], tensor):
                raise CheckpointError(_contradiction(name, came_from[name], path))
            tensors.setdefault(name, tensor)
            came_from.setdefault(name, path)
    return TensorsInMemory(tensors)


def _require_same(name: str, first: SafetensorFile, second: SafetensorFile) -> None:
    """Check that a tensor in two files has the same bits in both."""
    about = [(file.shape(name), file.dtype(name)) for file in (first, second)]
    if about[0] != about[1] or not _same_values(first.tensor(name), second.tensor(name)):
        raise CheckpointError(_contradiction(name, first.path, second.path))


def _same_values(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # As bytes, so that nan equals itself.
    return torch.equal(bytes_of(one), bytes_of(other))


def _contradiction(name: str, first: Path, second: Path) -> str:
    return (
        f"{name} is in {first} and in {second}, with different values: the files do not belong together, or one is "
        "left over from another save. Remove the file that is wrong, or download the checkpoint again"
    )


def _no_weight(name: str, dtype: str, known: list[str]) -> str:
    return (
        f"{name} has the dtype {dtype}, which is not among {', '.join(known)}. Integers, float8 and complex numbers "
        "belong to a quantised model, or another one: convert the checkpoint to floats first, with the scales of its "
        "quantisation"
    )
