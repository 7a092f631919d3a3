"""Breakage: one fault that `break_on_purpose` makes, with the tests that should notice it."""

from __future__ import annotations

import re
from dataclasses import dataclass


class AnchorError(Exception):
    """The code that a breakage changes is not where it was."""


@dataclass(frozen=True)
class Breakage:
    """One fault.

    Attributes:
        name: what is broken, in words with hyphens.
        file: the module, from the root of the repository.
        anchor: a regular expression of the code that is changed, found once in that file.
        broken: what stands there instead; `\\1` is the anchor's first group.
        tests: the files under `tests` that should notice.
    """

    name: str
    file: str
    anchor: str
    broken: str
    tests: tuple[str, ...]

    def applied(self, source: str) -> str:
        """Return the module's source with the fault in it.

        Raises:
            AnchorError: the anchor is found nowhere, or in several places.
        """
        places = len(re.findall(self.anchor, source))
        if places != 1:
            raise AnchorError(
                f"{self.name}: {self.file} has {places or 'no'} places like {self.anchor!r}. The code has changed: "
                "give the breakage an anchor that is found once"
            )
        broken = re.sub(self.anchor, self.broken, source)
        if broken == source:
            raise AnchorError(f"{self.name}: the replacement changes nothing in {self.file}")
        return broken
