"""What a family is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import RuleTable

__all__ = ["Family", "Sites"]


@dataclass(frozen=True)
class Sites:
    """Which modules of the transformers model a certificate compares ours with.

    Attributes:
        layers: the list of blocks, from the language model.
        attn, mlp: the modules of a block whose output is what attention and MLP add to the residual stream. None where
            no module's output is that.
        write_scale: the config field by which the block multiplies those outputs before adding them, if it does.
        attention: which of transformers' implementations computes what the model was trained with.
    """

    layers: str = "model.layers"
    attn: str | None = "self_attn"
    mlp: str | None = "mlp"
    write_scale: str | None = None
    attention: str = "eager"


@dataclass(frozen=True)
class Family:
    """One family of HuggingFace models.

    Attributes:
        name: for messages and docs.
        architectures: the class names that a HuggingFace config may give.
        config: reads the fields and returns the arguments of a `HookedTransformerConfig`.
        rules: the rule table, given the config that came of it and the fields. Between them, `config` and `rules` read
            or ignore every field.
        embedding, unembedding: the source tensors that are one where embeddings are tied.
        prefix: stands before every tensor name of a language-model checkpoint, not of a bare one.
        sites: where to look in the transformers model.
    """

    name: str
    architectures: tuple[str, ...]
    config: Callable[[ConfigFields], Arguments]
    rules: Callable[[HookedTransformerConfig, ConfigFields], RuleTable]
    embedding: str = "embed_tokens.weight"
    unembedding: str = "lm_head.weight"
    prefix: str = "model."
    sites: Sites = Sites()
