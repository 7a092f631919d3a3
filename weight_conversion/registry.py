"""Which family an architecture belongs to, and short names for hub ids."""

from __future__ import annotations

import difflib

from weight_conversion.errors import CheckpointError
from weight_conversion.families import gpt2, llama
from weight_conversion.family import Family

FAMILIES: tuple[Family, ...] = (
    gpt2.FAMILY,
    llama.FAMILY,
)

_BY_ARCHITECTURE = {architecture: family for family in FAMILIES for architecture in family.architectures}

ALIASES: dict[str, str] = {
    "gpt2": "openai-community/gpt2",
    "gpt2-small": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
    "distillgpt2": "distilbert/distilgpt2",
}


def family_of(architecture: str) -> Family:
    """Return the family of a HuggingFace class name.

    Raises:
        CheckpointError: it is in none; the message names the nearest and where to add one.
    """
    if architecture in _BY_ARCHITECTURE:
        return _BY_ARCHITECTURE[architecture]
    near = difflib.get_close_matches(architecture, _BY_ARCHITECTURE, n=3, cutoff=0.4)
    nearest = f"the nearest are {', '.join(near)}" if near else f"those are {', '.join(_BY_ARCHITECTURE)}"
    raise CheckpointError(
        f"the architecture {architecture!r} is not among the supported ones; {nearest}. "
        "To add it, write a file in weight_conversion/families and a line in weight_conversion/registry.py"
    )
