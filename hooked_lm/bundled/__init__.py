"""The trained demo models that come with the package, one folder each, in the format of `save_pretrained`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["find", "names"]


def names() -> list[str]:
    """Return the names of the bundled models, in alphabetical order."""
    return sorted(folder.name for folder in _home().iterdir() if _holds_a_model(folder))


def find(name: str) -> Path | None:
    """Return the folder of a bundled model, or None if no bundled model has this name.

    A name is never read as a path: `"../secrets"` and `""` name no bundled model.
    """
    return _home() / name if name in names() else None


def _home() -> Path:
    return Path(str(files(__name__)))


def _holds_a_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
