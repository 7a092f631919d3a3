"""From HuggingFace checkpoints to `(config, weights)` of a hooked transformer.

`checkpoint.load` reads one; `registry` knows the families; a family in `families` is a config mapping and a table of
rules, which `rules` applies. Nothing here builds a model.
"""
