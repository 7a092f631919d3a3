"""From HuggingFace checkpoints to `(config, weights)` of a hooked transformer.

`checkpoint.load` reads a checkpoint; `registry` has the families; a family in `families` is a config mapping and a
table of rules, which the engine in `conversion` applies. Nothing here builds a model.
"""

from weight_conversion.registry import register_family

__all__ = ["register_family"]
