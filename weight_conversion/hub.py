"""`Hub`: how files are fetched from the HuggingFace hub."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Hub"]


@dataclass(frozen=True)
class Hub:
    """Settings of every download, in the hub client's own terms.

    Attributes:
        cache_dir: the folder of the cache; None for HuggingFace's own.
        token: for private and gated repositories; True or None for the one that is stored, False for none.
        local_files_only: take files from the cache and never ask the network.
    """

    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False

    def keywords(self) -> dict[str, str | Path | bool | None]:
        """Return the settings as keyword arguments of `huggingface_hub` and `transformers`."""
        return asdict(self)
