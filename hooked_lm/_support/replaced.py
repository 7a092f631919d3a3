"""Names of the classic library that are not kept, and what to use instead."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["missing"]


def missing(owner: str, name: str, replacements: Mapping[str, str]) -> AttributeError:
    """Return the error for a name that a module or class does not have.

    Args:
        owner: the module or class, as it is named in the message.
        name: the name asked for.
        replacements: what stands in for names of the classic library.
    """
    replacement = replacements.get(name)
    hint = "" if replacement is None else f". The classic library's is not kept: {replacement}"
    return AttributeError(f"{owner} has no attribute {name!r}{hint}")
