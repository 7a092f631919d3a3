"""The names of the classic API, taken from either library, and models with parameters by rule."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from tests.classic import rules
from tests.classic.words import word_tokenizer


@dataclass(frozen=True)
class Library:
    """One of the two libraries; its attributes are what code imports from it."""

    package: str

    def __getattr__(self, name: str) -> Any:
        found = getattr(importlib.import_module(self.package), name, None)
        return found if found is not None else importlib.import_module(f"{self.package}.{name}")

    @property
    def KeyValueCache(self) -> Any:
        """Return the class of key-value caches, whose name changed there in 3.0."""
        classic = self.package == "transformer_lens"
        return self.TransformerLensKeyValueCache if classic else self.HookedTransformerKeyValueCache

    def new_model(self, config: str, **fields: Any) -> Any:
        """Return a model of a config, with the library's own initial weights; texts configs have the tokenizer."""
        cfg = self.HookedTransformerConfig(**{**rules.config_fields(config), **fields})
        return self.HookedTransformer(cfg, tokenizer=word_tokenizer() if config.startswith("text_") else None)

    def model(self, config: str, shapes: dict[str, list[int]] | None = None, **fields: Any) -> Any:
        """Return a model whose parameters are by rule, loaded from a state dict with the classic names.

        Args:
            config: a name of `rules.CONFIGS`, with `text_` before it for a model that reads texts.
            shapes: the classic parameters' shapes; without them, the model's own (in the classic library).
            fields: fields of the config that are set otherwise.
        """
        model = self.new_model(config, **fields)
        if shapes is None:
            shapes = {name: list(value.shape) for name, value in model.named_parameters()}
        # There a state dict without the buffers is incomplete.
        strict = self.package != "transformer_lens"
        model.load_state_dict(rules.state(shapes, gated=model.cfg.gated_mlp), strict=strict)
        return model.eval()
