"""Models that generate text, or say what they are told to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hooked_lm import HookedTransformer
from tests.helpers import VOCAB, randomise_, tiny_config, tiny_tokenizer

BOS = 0
TOKENIZER = tiny_tokenizer()
GREEDY: dict[str, Any] = {"do_sample": False, "verbose": False}


def text_model(tokenizer: Any = TOKENIZER, **changes: Any) -> HookedTransformer:
    """A tiny model that reads text."""
    fields = {"d_vocab": VOCAB, "n_ctx": 64, **changes}
    return randomise_(HookedTransformer(tiny_config(**fields), tokenizer))  # type: ignore[return-value]


def say(*tokens: int) -> Any:
    """Return a hook for `unembed.hook_out` that makes every prompt go on with these tokens, one per step."""
    steps = iter(tokens)

    def force(logits: Tensor, hook: object) -> Tensor:
        forced = torch.zeros_like(logits)
        forced[:, -1, next(steps)] = 100.0
        return forced

    return [("unembed.hook_out", force)]
