"""store_activations: run a model over many texts, and keep what its sites hold, shard by shard."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm._support.files import write_whole
from hooked_lm._support.integers import integer
from hooked_lm._support.locks import folder_lock
from hooked_lm._support.plain_data import PlainData
from hooked_lm._support.reading import SafetensorFile, read_json_object
from hooked_lm._support.tensor_bytes import bytes_of
from hooked_lm._support.versions import check_version
from hooked_lm.datasets.store import COLUMNS, FORMAT, MANIFEST, ActivationStore
from hooked_lm.examples.corpus import Corpus, batches, read_batch, scored_tokens
from hooked_lm.hooked_model import HookedModel
from hooked_lm.names import NamesFilter, layer_of, select_names
from hooked_lm.remote.manifest import weights_sha256

__all__ = ["store_activations"]


@torch.no_grad()
def store_activations(
    model: HookedModel,
    texts: Corpus,
    sites: NamesFilter,
    folder: str | Path,
    *,
    last_only: bool = False,
    keep_bos: bool = False,
    dtype: torch.dtype | None = None,
    max_tokens: int | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
    shard_size: int = 2**28,
    n_texts: int | None = None,
    verbose: bool = True,
) -> ActivationStore:
    """Run a model over texts and store the activations of sites, a row for each token; return the store.

    The model runs once over each batch, and no further than the last site. A shard is written whole or not at all. A
    call that was interrupted, with the same arguments, goes on after the last shard that is complete; the store is the
    same to the byte as one made in one go. Padding is left out, and BOS unless asked for. Hooks in place act.

    Args:
        model: a `HookedTransformer`.
        texts: texts, or for each text its tokens without padding; any iterable, read lazily. To go on after an
            interruption it must give the same texts again.
        sites: as for `run_with_cache`: names, globs, a predicate; activations [batch pos ...].
        folder: of the store; made where it is missing.
        last_only: store only the last token of each text.
        keep_bos: store BOS too.
        dtype: to store activations in; by default as they are. Numbers that become infinite in it raise.
        max_tokens: read no more of a text than these tokens, BOS included; by default a longer text raises.
        prepend_bos: as for the model; for texts.
        batch_size: texts that are run at a time.
        shard_size: bytes after which a shard is written.
        n_texts: the number of texts, for the progress bar.
        verbose: show a progress bar.

    Raises:
        UnknownHookError: the model has no such site.
        ValueError: a site without positions, a count out of range, a text that is too long, a folder that holds another
            store, that cannot be written to, or that another process writes to.
        TypeError: the texts are one string, or neither texts nor rows of tokens.
    """
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size), ("max_tokens", max_tokens)):
        if value is not None and integer(value, name) < 1:
            raise ValueError(f"{name} is 1 or more, got {value}")
    names = _checked_sites(model, sites)
    settings: PlainData = {
        "sites": names,
        "last_only": last_only,
        "keep_bos": keep_bos,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "max_tokens": max_tokens,
        "prepend_bos": prepend_bos,
        "batch_size": batch_size,
        "shard_size": shard_size,
    }
    place = Path(folder)
    head = {"activation_store": FORMAT, "model": _model_hashes(model), "settings": settings}
    _check_folder(place, head)
    with folder_lock(place, "storing activations in"):
        writing = _Writing(model, place, settings, dtype)
        with tqdm(total=n_texts, disable=not verbose, desc="texts", leave=False) as bar:
            for batch in batches(texts, batch_size):
                writing.add(batch)
                bar.update(len(batch))
        writing.finish(head)
    return ActivationStore.open(place)


def _checked_sites(model: HookedModel, sites: NamesFilter) -> list[str]:
    names = [name for name in model.hook_dict if name in set(select_names(sites, list(model.hook_dict)))]
    for name in names:
        if model.hook_dict[name].axes[:2] != ("batch", "pos"):
            raise ValueError(
                f"{name} has axes {' '.join(model.hook_dict[name].axes)}: a store has a row for each token, so it "
                "takes sites with axes batch pos ..."
            )
    return names


def _model_hashes(model: HookedModel) -> PlainData:
    config = {**model.cfg.to_dict(), "device": None, "model_name": None, "tokenizer_name": None, "seed": None}
    return {
        "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "weights_sha256": weights_sha256(model),
    }


def _check_folder(place: Path, head: PlainData) -> None:
    """Make the folder and its manifest, or check that the store there is the one that is asked for."""
    path = place / MANIFEST
    if not path.exists():
        if place.is_dir() and any(place.glob("shard-*")):
            raise ValueError(f"{place} holds shards without a {MANIFEST}: give another folder")
        write_whole(path, json.dumps(head, indent=1, sort_keys=True) + "\n")
        return
    there = read_json_object(path)
    check_version(str(path), there.get("activation_store"), FORMAT)
    differ = [
        f"{name} {there.get(part, {}).get(name)!r} (now {value!r})"
        for part in ("model", "settings")
        for name, value in head[part].items()
        if there.get(part, {}).get(name) != value
    ]
    if differ:
        raise ValueError(f"{place} holds a store with {', '.join(differ)}: give another folder, or the same arguments")


@dataclass
class _Shard:
    """Rows that are not written yet."""

    first_text: int
    n_texts: int = 0
    size: int = 0
    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    digest: bytes = b""

    def add(self, rows: dict[str, Tensor]) -> None:
        for name, part in rows.items():
            self.parts.setdefault(name, []).append(part)
            self.size += part.nbytes


class _Writing:
    """A store that is being written: shards that are there are read past, and others are made."""

    def __init__(self, model: HookedModel, place: Path, settings: PlainData, dtype: torch.dtype | None) -> None:
        self.model, self.place, self.settings, self.dtype = model, place, settings, dtype
        self.shards: list[PlainData] = []
        self.n_texts = 0
        self.layout: PlainData = {}
        layers = [layer_of(name) for name in settings["sites"]]
        deepest = [layer for layer in layers if layer is not None]
        last = (
            None
            if any(name.startswith(("ln_final", "unembed")) for name in settings["sites"])
            else max(deepest, default=-1)
        )
        self.stop = None if last is None else model.cfg.stop_after(last) if last >= 0 else 0
        self.there = self._next_there()
        self.open = _Shard(0)

    def _next_there(self) -> SafetensorFile | None:
        """The next shard that an earlier call has written."""
        path = self.place / self._file(len(self.shards))
        return SafetensorFile(path) if path.is_file() else None

    def _file(self, index: int) -> str:
        return f"shard-{index:05}.safetensors"

    def add(self, batch: list[str] | list[list[int]]) -> None:
        """Take the next batch of texts."""
        read = read_batch(self.model, batch, self.n_texts, self.settings["prepend_bos"], self.settings["max_tokens"])
        self.n_texts += len(batch)
        self.open.n_texts += len(batch)
        if read is not None:
            tokens, mask, numbers = read
            self.open.digest = hashlib.sha256(
                self.open.digest + bytes_of(tokens.cpu()).numpy().tobytes() + bytes_of(mask.cpu()).numpy().tobytes()
            ).digest()
            if self.there is None:
                self.open.add(self._rows(tokens, mask, numbers))
        if self.there is not None:
            self._pass_over()
        elif self.open.size >= self.settings["shard_size"]:
            self._write()

    def _pass_over(self) -> None:
        """Go on to the next shard once the texts of one that is there have come, and check that they are its own."""
        assert self.there is not None
        texts = json.loads(self.there.metadata["texts"])
        n_texts = int(texts["n"])
        if self.open.n_texts < n_texts:
            return
        if self.open.n_texts > n_texts or texts["sha256"] != self.open.digest.hex():
            raise ValueError(
                f"{self.there.path} was made of other texts than texts {self.open.first_text} to "
                f"{self.open.first_text + n_texts - 1} of this call: give the same texts, or another folder"
            )
        self._note(self.there)

    def _rows(self, tokens: Tensor, mask: Tensor, numbers: list[int]) -> dict[str, Tensor]:
        kept = mask.bool() if self.settings["keep_bos"] else scored_tokens(self.model, tokens, mask)
        if self.settings["last_only"]:
            places = torch.arange(tokens.shape[1], device=tokens.device)
            kept = kept & (places == (places * kept).amax(1, keepdim=True))
        _, cache = self.model.run_with_cache(
            tokens,
            attention_mask=mask,
            names_filter=self.settings["sites"],
            stop_at_layer=self.stop,
            return_type=None,
            return_cache_object=False,
        )
        text, position = kept.cpu().nonzero(as_tuple=True)
        rows = {
            name: self._converted(name, cache[name][kept.to(cache[name].device)].cpu())
            for name in self.settings["sites"]
        }
        return {
            **rows,
            "text": torch.tensor(numbers)[text],
            "position": position,
            "token": tokens.cpu()[kept.cpu()].to(torch.int64),
        }

    def _converted(self, name: str, rows: Tensor) -> Tensor:
        if self.dtype is None or not rows.is_floating_point():
            return rows
        found = rows.to(self.dtype)
        if bool((found.isinf() & ~rows.isinf()).any()):
            raise ValueError(
                f"activations of {name} reach {float(rows.abs().max()):.3g}, which is infinite in {self.dtype}: give a "
                "dtype with a larger range, such as bfloat16"
            )
        return found

    def _write(self) -> None:
        """Write the open shard, and begin the next."""
        tensors = {name: torch.cat(parts).contiguous() for name, parts in self.open.parts.items()}
        # One entry: the format keeps several in no order, and the same content has to be the same bytes.
        metadata = {"texts": json.dumps({"n": self.open.n_texts, "sha256": self.open.digest.hex()})}
        path = self.place / self._file(len(self.shards))
        write_whole(path, lambda unfinished: save_file(tensors, unfinished, metadata))
        self._note(SafetensorFile(path))

    def _note(self, file: SafetensorFile) -> None:
        for name in self.settings["sites"]:
            tensor = file.tensor(name)
            self.layout[name] = {"shape": list(tensor.shape[1:]), "dtype": str(tensor.dtype).removeprefix("torch.")}
        with file.path.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        self.shards.append({"file": file.path.name, "rows": file.shape(COLUMNS[0])[0], "sha256": sha256})
        self.open = _Shard(self.n_texts)
        self.there = self._next_there()

    def finish(self, head: PlainData) -> None:
        """Write the last shard and the manifest of a store that is complete."""
        if self.there is not None:
            raise ValueError(
                f"{self.there.path} was made of more texts than the {self.n_texts} of this call: give the same texts, "
                "or another folder"
            )
        if self.open.parts:
            self._write()
        if not self.shards:
            raise ValueError(f"there is nothing to store: the {self.n_texts} texts have no tokens")
        whole = {**head, "shards": self.shards, "layout": self.layout, "n_texts": self.n_texts}
        write_whole(self.place / MANIFEST, json.dumps(whole, indent=1, sort_keys=True) + "\n")
