"""What a family is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from weight_conversion.fields import ConfigFields
from weight_conversion.rules import RuleTable


@dataclass(frozen=True)
class Family:
    """One family of HuggingFace models.

    Attributes:
        name: for messages and docs.
        architectures: the class names that a HuggingFace config may give.
        config: reads every field and returns the arguments of a `HookedTransformerConfig`.
        rules: the rule table, given the config mapping's result and whether embeddings are tied.
        embedding, unembedding: the source tensors that are one where embeddings are tied.
        prefix: stands before every tensor name of a language-model checkpoint, not of a bare one.
    """

    name: str
    architectures: tuple[str, ...]
    config: Callable[[ConfigFields], dict[str, Any]]
    rules: Callable[[bool], RuleTable]
    embedding: str
    unembedding: str
    prefix: str = ""
