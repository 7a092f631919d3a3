"""Packages that only an extra brings."""

from __future__ import annotations

from types import ModuleType

__all__ = ["require_pandas"]


def require_pandas(what: str) -> ModuleType:
    """Return pandas.

    Args:
        what: the function that needs it, for the message.

    Raises:
        ImportError: it is not installed; the message says which extra brings it.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError(f"{what} needs pandas: pip install 'hooked-lm[notebooks]'") from error
    module: ModuleType = pandas
    return module
