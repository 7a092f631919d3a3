"""Documents of the tasks."""

from __future__ import annotations

import itertools
import re

from hooked_lm.tasks import (
    get_task,
)
from hooked_lm.tasks.words import NAMES


def documents(name: str, n: int = 4000, seed: int = 0) -> list[str]:
    return list(itertools.islice(get_task(name).documents(seed), n))


def names_in(text: str) -> list[str]:
    return [word for word in re.findall(r"[A-Z][a-z]+", text) if word in NAMES]
