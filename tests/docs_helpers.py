"""What the tests of the documentation share."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def is_elsewhere(url: str) -> bool:
    return re.match(r"(?:[a-z]+:)?//", url) is not None
