"""Optional packages, installed with an extra of this package."""

from __future__ import annotations

from types import ModuleType

__all__ = ["require_pandas"]


def require_pandas(what: str) -> ModuleType:
    """Return pandas.

    Args:
        what: the function that needs it, for the message.

    Raises:
        ImportError: pandas is not installed; the message names the extra to install.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError(f"{what} needs pandas: pip install 'hooked-lm[notebooks]'") from error
    module: ModuleType = pandas
    return module
