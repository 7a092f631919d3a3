"""ActivationStore: the activations of many texts on disk, read row by row, in slices, or in shuffled batches.

manifest.json            format, model, settings; rows and SHA-256 of each shard once the store is complete
shard-00000.safetensors  a tensor [row ...] for each site; `text`, `position` and `token` of each row
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import cast, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_lm._support.integers import integer, is_integer
from hooked_lm._support.plain_data import PlainData
from hooked_lm._support.reading import SafetensorFile, read_json_object
from hooked_lm._support.versions import check_version

__all__ = ["COLUMNS", "FORMAT", "MANIFEST", "ActivationStore", "StoredActivations"]

FORMAT = 1
MANIFEST = "manifest.json"
COLUMNS = ("text", "position", "token")
# Shards that are open at a time: a process may have about a thousand files open.
_OPEN = 64
# Rows that are read at a time for means.
_CHUNK = 8192
Rows = int | slice | Sequence[int] | Tensor


class StoredActivations:
    """The activations of a site: a tensor [row ...] on disk, of which only what is asked for is read.

    Args:
        store: that holds them.
        site: the full hook name, or a column.

    Attributes:
        site: the full hook name.
        shape: of all rows together.
        dtype: as stored.
    """

    def __init__(self, store: ActivationStore, site: str) -> None:
        self.site, self._store = site, store
        shape, self.dtype = store.layout(site)
        self.shape = torch.Size((len(store), *shape))

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"StoredActivations({self.site!r}, {tuple(self.shape)}, {self.dtype})"

    def __getitem__(self, rows: Rows) -> Tensor:
        """Return rows: one by its number, a slice, or several in the order asked for.

        Raises:
            IndexError: there is no such row.
            ValueError: a shard is damaged or missing.
        """
        if isinstance(rows, slice):
            return self._store.read(self.site, torch.arange(*rows.indices(len(self))))
        if is_integer(rows):
            return self._store.read(self.site, torch.tensor([integer(rows, "row")]))[0]
        index = torch.as_tensor(rows)
        if index.dtype == torch.bool:
            if index.shape != (len(self),):
                raise IndexError(f"a mask of shape {tuple(index.shape)} for {len(self)} rows")
            index = index.nonzero()[:, 0]
        return self._store.read(self.site, index)


class ActivationStore:
    """Activations on disk. `store_activations` makes one, `ActivationStore.open(folder)` reads one.

    Args:
        folder: of the store.
        manifest: its manifest.

    Attributes:
        folder: of the store.
        manifest: format, model, settings, shards.
        sites: the full hook names.
        n_texts: how many texts were read.
    """

    def __init__(self, folder: Path, manifest: PlainData) -> None:
        self.folder, self.manifest = folder, manifest
        self.sites: tuple[str, ...] = tuple(manifest["settings"]["sites"])
        self.n_texts: int = manifest["n_texts"]
        self._counts: list[int] = [shard["rows"] for shard in manifest["shards"]]
        self._starts = [0, *accumulate(self._counts)]
        self._open: dict[int, SafetensorFile] = {}

    @classmethod
    def open(cls, folder: str | Path) -> ActivationStore:
        """Return the store of a folder.

        Args:
            folder: of a store that is complete.

        Raises:
            ValueError: there is none, it is not complete, or of a newer format.
        """
        path = Path(folder) / MANIFEST
        manifest = read_json_object(path)
        check_version(str(path), manifest.get("activation_store"), FORMAT)
        if "shards" not in manifest:
            raise ValueError(
                f"{folder} is not complete: call store_activations with the same arguments to go on with it"
            )
        return cls(Path(folder), manifest)

    def __len__(self) -> int:
        return self._starts[-1]

    def __repr__(self) -> str:
        return f"ActivationStore({str(self.folder)!r}, {len(self)} rows of {len(self.sites)} sites)"

    def __getitem__(self, site: str) -> StoredActivations:
        """Return the activations of a site, or the column `"text"`, `"position"` or `"token"`.

        Raises:
            KeyError: there is none of that name.
        """
        if site not in self.sites and site not in COLUMNS:
            raise KeyError(f"{site!r} is not stored: there are {', '.join((*self.sites, *COLUMNS))}")
        return StoredActivations(self, site)

    @property
    def texts(self) -> Int[Tensor, " row"]:
        """The number of each row's text, from 0."""
        return self["text"][:]

    @property
    def positions(self) -> Int[Tensor, " row"]:
        """Each row's position in its text as the model reads it, BOS included."""
        return self["position"][:]

    @property
    def tokens(self) -> Int[Tensor, " row"]:
        """Each row's token."""
        return self["token"][:]

    # Reading

    def layout(self, site: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape of a row and the dtype of a site.

        Args:
            site: full hook name, or a column.
        """
        if site in COLUMNS:
            return (), torch.int64
        described = self.manifest["layout"][site]
        return tuple(described["shape"]), getattr(torch, described["dtype"])

    def read(self, site: str, rows: Int[Tensor, " n"]) -> Tensor:
        """Return rows of a site, in the order asked for; each shard is read once.

        Args:
            site: full hook name, or a column.
            rows: their numbers; negative ones count from the end.

        Raises:
            IndexError: there is no such row.
            ValueError: a shard is damaged or missing.
        """
        if rows.ndim != 1 or rows.is_floating_point():
            raise IndexError(f"rows are whole numbers [n], got {rows.dtype} {tuple(rows.shape)}")
        if len(rows) and not (-len(self) <= int(rows.min()) and int(rows.max()) < len(self)):
            raise IndexError(f"rows {int(rows.min())} to {int(rows.max())}: the store has {len(self)}")
        rows = rows.where(rows >= 0, rows + len(self))
        shape, dtype = self.layout(site)
        found = torch.empty((len(rows), *shape), dtype=dtype)
        shard_of = torch.bucketize(rows, torch.tensor(self._starts[1:]), right=True)
        for shard in shard_of.unique().tolist():
            here = shard_of == shard
            found[here] = self._shard(shard).tensor(site)[rows[here] - self._starts[shard]].to(dtype)
        return found

    def _shard(self, index: int) -> SafetensorFile:
        if index not in self._open:
            path = self.folder / self.manifest["shards"][index]["file"]
            if not path.is_file():
                raise ValueError(f"{path} is missing from the store")
            while len(self._open) >= _OPEN:
                del self._open[next(iter(self._open))]
            self._open[index] = SafetensorFile(path)
        return self._open[index]

    @overload
    def batches(  # type: ignore[overload-overlap]
        self, sites: str, batch_size: int, *, shuffle: bool = ..., seed: int = ..., buffer: int | None = ...,
        rows: Int[Tensor, " n"] | None = ..., start_at: int = ..., drop_last: bool = ...,
        device: torch.device | str = ...,
    ) -> Iterator[Tensor]: ...  # fmt: skip

    @overload
    def batches(
        self, sites: Sequence[str], batch_size: int, *, shuffle: bool = ..., seed: int = ..., buffer: int | None = ...,
        rows: Int[Tensor, " n"] | None = ..., start_at: int = ..., drop_last: bool = ...,
        device: torch.device | str = ...,
    ) -> Iterator[dict[str, Tensor]]: ...  # fmt: skip

    def batches(
        self,
        sites: str | Sequence[str],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        buffer: int | None = None,
        rows: Int[Tensor, " n"] | None = None,
        start_at: int = 0,
        drop_last: bool = False,
        device: torch.device | str = "cpu",
    ) -> Iterator[Tensor] | Iterator[dict[str, Tensor]]:
        """Return batches of rows; every row comes exactly once.

        Args:
            sites: one, for tensors [row ...]; or several, and columns, for dictionaries of them.
            batch_size: rows of all but the last batch.
            shuffle: in a random order, each as likely as any other; False for the order of the texts.
            seed: of the order; give each epoch its own.
            buffer: for stores too large for an order of all rows (8 bytes each): shards are taken in a random order,
                and rows are shuffled among this many at a time.
            rows: only these rows.
            start_at: leave out so many batches at the beginning, to go on after an interruption.
            drop_last: leave out a last batch that is smaller.
            device: where the batches are put.

        Raises:
            KeyError: a site is not stored.
            ValueError: a count out of range, or `buffer` and `rows` together.
        """
        if integer(batch_size, "batch_size") < 1 or integer(start_at, "start_at") < 0:
            raise ValueError(f"batch_size is 1 or more and start_at 0 or more, got {batch_size} and {start_at}")
        if buffer is not None and (rows is not None or not shuffle or integer(buffer, "buffer") < batch_size):
            raise ValueError(
                "buffer shuffles all rows: it is at least batch_size, and goes without rows= and shuffle=False"
            )
        names = [sites] if isinstance(sites, str) else list(sites)
        views = {name: self[name] for name in names}
        return self._batches(
            views,
            isinstance(sites, str),
            self._order(shuffle, seed, buffer, rows),
            batch_size,
            start_at,
            drop_last,
            device,
        )  # type: ignore[return-value]

    def _batches(
        self,
        views: Mapping[str, StoredActivations],
        single: bool,
        order: Iterator[Tensor],
        batch_size: int,
        start_at: int,
        drop_last: bool,
        device: torch.device | str,
    ) -> Iterator[Tensor | dict[str, Tensor]]:
        for number, rows in enumerate(_in_batches(order, batch_size)):
            if number < start_at or (drop_last and len(rows) < batch_size):
                continue
            found = {name: view[rows].to(device) for name, view in views.items()}
            yield next(iter(found.values())) if single else found

    def _order(self, shuffle: bool, seed: int, buffer: int | None, rows: Tensor | None) -> Iterator[Tensor]:
        """The rows in the order of the batches, in pieces."""
        chosen = torch.arange(len(self)) if rows is None and buffer is None else rows
        generator = torch.Generator().manual_seed(seed)
        if chosen is not None:
            yield chosen[torch.randperm(len(chosen), generator=generator)] if shuffle else chosen
            return
        shards = torch.randperm(len(self._counts), generator=generator).tolist()
        kept = torch.empty(0, dtype=torch.int64)
        for shard in shards:
            kept = torch.cat([kept, torch.arange(self._starts[shard], self._starts[shard + 1])])
            while len(kept) >= cast(int, buffer):
                piece, kept = kept[:buffer], kept[buffer:]
                yield piece[torch.randperm(len(piece), generator=generator)]
        yield kept[torch.randperm(len(kept), generator=generator)]

    # Statistics

    def mean(self, site: str) -> Float[Tensor, "..."]:
        """Return the mean over rows, in float64.

        Args:
            site: full hook name.
        """
        return self._moments(site)[0]

    def std(self, site: str) -> Float[Tensor, "..."]:
        """Return the standard deviation over rows, with n - 1, in float64.

        Args:
            site: full hook name.
        """
        return self._moments(site)[1]

    def _moments(self, site: str) -> tuple[Tensor, Tensor]:
        """Mean and deviation by Chan's way of joining parts, which loses no digits to large means."""
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())
        for start in range(0, len(self), _CHUNK):
            part = self[site][start : start + _CHUNK].double()
            n, centre = len(part), part.mean(0)
            gap = centre - mean
            squares = squares + ((part - centre) ** 2).sum(0) + gap**2 * (count * n / (count + n))
            mean = mean + gap * (n / (count + n))
            count += n
        return mean, (squares / max(count - 1, 1)).sqrt()

    def rows_of(self, texts: Sequence[int]) -> Int[Tensor, " n"]:
        """Return the rows of some texts.

        Args:
            texts: their numbers.
        """
        return torch.isin(self.texts, torch.tensor(list(texts))).nonzero()[:, 0]

    # The whole

    def verify(self) -> None:
        """Check the SHA-256 of every shard.

        Raises:
            ValueError: a shard is missing, or is not what was stored.
        """
        for shard in self.manifest["shards"]:
            path = self.folder / shard["file"]
            if not path.is_file():
                raise ValueError(f"{path} is missing from the store")
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    raise ValueError(f"{path} is not what was stored: its SHA-256 differs")

    def text_of(self, row: int) -> tuple[int, int]:
        """Return which text a row is of, and its position there.

        Args:
            row: its number.
        """
        return int(self["text"][row]), int(self["position"][row])

    def table(self) -> str:
        """Return what is stored as text."""
        shards = f"{len(self._counts)} shard{'s' if len(self._counts) > 1 else ''}"
        size = sum((self.folder / shard["file"]).stat().st_size for shard in self.manifest["shards"])
        lines = [f"{len(self):,} tokens of {self.n_texts:,} texts in {shards}, {size / 2**20:.1f} MiB"]
        for site in self.sites:
            shape, dtype = self.layout(site)
            lines.append(f"  {site}  {list(shape)}  {str(dtype).removeprefix('torch.')}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _in_batches(order: Iterator[Tensor], batch_size: int) -> Iterator[Tensor]:
    kept = torch.empty(0, dtype=torch.int64)
    for piece in order:
        kept = torch.cat([kept, piece])
        whole = len(kept) // batch_size * batch_size
        yield from kept[:whole].split(batch_size) if whole else ()
        kept = kept[whole:]
    if len(kept):
        yield kept
