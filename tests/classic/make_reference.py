"""Store what every scenario gives in the classic library.

To be run from the repository's root, in an environment with `transformer_lens` (this library need not be there):

    python -m tests.classic.make_reference [FOLDER] [TOPIC ...]
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import warnings
from pathlib import Path

import torch

from tests.classic.library import Library
from tests.classic.scenario import scenarios, topics
from tests.classic.store import FOLDER, Flat, flat, write

PACKAGE = "transformer_lens"


def outcomes(topic: str) -> dict[str, Flat]:
    """Return what the scenarios of a topic give in the classic library."""
    found: dict[str, Flat] = {}
    for name, scenario in scenarios(topic).items():
        torch.manual_seed(0)
        try:
            found[name] = flat(scenario.run(Library(PACKAGE)))
        except Exception as error:
            error.add_note(f"in {name}")
            raise
    return found


def main(folder: Path = FOLDER, *chosen: str) -> None:
    """Write one file for each topic."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    made_with = f"{PACKAGE} {importlib.metadata.version('transformer-lens')}, torch {torch.__version__}"
    for topic in chosen or topics():
        write(topic, outcomes(topic), made_with, folder)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:2]), *sys.argv[2:])
