"""The classic library's entry in the list of installed packages, for code that asks for its version."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder
from os import PathLike
from pathlib import Path

__all__ = ["NAME", "VERSION", "ClassicDistribution", "ClassicDistributionFinder"]

NAME = "transformer-lens"
# The version whose names and meanings this library keeps.
VERSION = "3.9.0"


class ClassicDistribution(Distribution):
    """The metadata of the package: its name and version."""

    def read_text(self, filename: str) -> str | None:
        """Return a file of the metadata; None if there is none of the name.

        Args:
            filename: of the file; there is `METADATA` only.
        """
        lines = (
            "Metadata-Version: 2.1",
            f"Name: {NAME}",
            f"Version: {VERSION}",
            "Summary: served by hooked_lm",
        )
        return "\n".join((*lines, "")) if filename == "METADATA" else None

    def locate_file(self, path: str | PathLike[str]) -> Path:
        """Return where a file of the package would be.

        Args:
            path: of the file, within the package.
        """
        return Path(__file__).parent / path


class ClassicDistributionFinder(DistributionFinder):
    """A finder for `sys.meta_path` that finds this distribution and no modules."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        """Return None: other finders find the modules.

        Args:
            fullname, path, target: not used.
        """

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterator[Distribution]:
        """Yield the distribution, if it is asked for.

        Args:
            context: its `name` is the package asked for; None for all packages.
        """
        name = None if context is None else context.name
        if name is None or re.sub(r"[-_.]+", "-", name).lower() == NAME:
            yield ClassicDistribution()
