"""`Family`: how the checkpoints of one family of HuggingFace models are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.fields import Arguments, ConfigFields, FieldValue
from weight_conversion.rules import RuleTable

__all__ = ["Family", "Sites"]


@dataclass(frozen=True)
class Sites:
    """The modules of the transformers model whose outputs a certificate compares with ours.

    Attributes:
        layers: the path of the list of blocks within the language model.
        blocks_per_layer: how many of our blocks a layer of theirs is.
        attn, mlp: the modules of a block whose outputs attention and MLP add to the residual stream; None if no module
            has that output. `{half}` stands for the number of our block in a layer of theirs.
        write_scale: the config field, or the block's attribute, by which the block multiplies those outputs before
            adding them, if it does.
        read_divisor: the attribute of the config by which the model divides the input of the unembedding, if it does.
        attention: the implementation of attention in transformers that computes what the model was trained with.
        patterns: the weights of attention that transformers returns are those that multiply the values.
    """

    layers: str = "model.layers"
    blocks_per_layer: int = 1
    attn: str | None = "self_attn"
    mlp: str | None = "mlp"
    write_scale: str | None = None
    read_divisor: str | None = None
    attention: str = "eager"
    patterns: bool = True


@dataclass(frozen=True)
class Family:
    """One family of HuggingFace models.

    Attributes:
        name: the name in messages and in the documentation.
        architectures: the class names that a HuggingFace config may give.
        config: a function that reads the fields and returns the arguments of a `HookedTransformerConfig`.
        rules: a function that returns the rule table, given that `HookedTransformerConfig` and the fields. Each field
            is read or ignored in `config` or in `rules`.
        embedding, unembedding: the source tensors; one and the same if embeddings are tied.
        prefix: comes before every tensor name in the checkpoint of a language model, not of a bare model.
        beside: the modules of a language model, besides the unembedding, whose names do not begin with the prefix.
        sites: the modules of the transformers model that a certificate compares.
        defaults: the fields that a config.json may leave out, for a family whose configs transformers has no class for.
            They are then read as they are in the file, and no code that comes with a checkpoint runs. Otherwise None.
        renamed: fields of such configs by the names that a later version of transformers gives them -> the published.
        prepend_bos: whether prompts start with BOS by default; None if as the checkpoint's tokenizer does it.
    """

    name: str
    architectures: tuple[str, ...]
    config: Callable[[ConfigFields], Arguments]
    rules: Callable[[HookedTransformerConfig, ConfigFields], RuleTable]
    embedding: str = "embed_tokens.weight"
    unembedding: str = "lm_head.weight"
    prefix: str = "model."
    beside: tuple[str, ...] = ()
    sites: Sites = Sites()
    defaults: Mapping[str, FieldValue] | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    prepend_bos: bool | None = None
