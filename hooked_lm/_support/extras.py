"""Optional packages, installed with an extra of this package."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["require", "require_pandas"]


def require_pandas(what: str) -> ModuleType:
    """Return pandas.

    Args:
        what: the function that needs it, for the message.

    Raises:
        ImportError: pandas is not installed; the message names the extra to install.
    """
    return require("pandas", what, "notebooks")


def require(package: str, what: str, extra: str) -> ModuleType:
    """Return an optional package.

    Args:
        package: its name.
        what: the function that needs it, for the message.
        extra: of this package, which brings it.

    Raises:
        ImportError: it is not installed; the message names the extra to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{what} needs {package}: pip install 'hooked-lm[{extra}]'") from error
