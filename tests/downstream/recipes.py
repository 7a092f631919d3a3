"""All recipes by name, and `python -m tests.downstream.recipes FILE`, which writes what they give to a file.

Run it with the classic library's Python to make `reference.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tests.downstream import edges, notebooks, tracer

RECIPES: dict[str, Callable[[], dict[str, Tensor]]] = {
    recipe.__name__: recipe
    for recipe in (
        edges.edge_attribution,
        edges.integrated_edge_attribution,
        edges.pruned_edges,
        tracer.traced_attribution,
        notebooks.induction,
        notebooks.logit_attribution,
        notebooks.patching_by_hand,
        notebooks.bracket_classifier,
        notebooks.probe,
    )
}


def as_lists(values: dict[str, Tensor]) -> dict[str, list[object]]:
    """Return a recipe's values as nested lists, rounded to twelve places."""
    return {name: torch.round(value.detach().double(), decimals=12).tolist() for name, value in values.items()}


if __name__ == "__main__":
    found = {name: as_lists(recipe()) for name, recipe in RECIPES.items()}
    Path(sys.argv[1]).write_text(json.dumps(found, separators=(",", ":")) + "\n")
