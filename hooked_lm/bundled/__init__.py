"""The trained models that come with the package, one folder each in the format of `save_pretrained`."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def names() -> list[str]:
    """Return the names of the bundled models, for `HookedTransformer.from_pretrained`."""
    return sorted(folder.parent.name for folder in _HERE.glob("*/config.json"))


def find(name: str) -> Path | None:
    """Return the folder of a bundled model, or None if there is none of that name."""
    return _HERE / name if name in names() else None
