"""A model that reads text, for the tests of evals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hooked_lm import HookedTransformer
from hooked_lm.tasks import lexicon, word_tokenizer
from tests.helpers import randomise_, tiny_config, tiny_tokenizer

TINY = tiny_tokenizer()  # " John" and " Mary" are one token, other names are not
WORDS = word_tokenizer(lexicon())


def text_model(tokenizer: Any = WORDS, **changes: Any) -> HookedTransformer:
    """A tiny model that reads text."""
    vocab = max(tokenizer.get_vocab().values()) + 1
    fields = {"d_vocab": vocab, "n_ctx": 64, **changes}
    return randomise_(HookedTransformer(tiny_config(**fields), tokenizer))  # type: ignore[return-value]


MODEL = text_model()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextmanager
def recorded_tokens(model: HookedTransformer) -> Iterator[list[Tensor]]:
    """What the model reads, run by run."""
    seen: list[Tensor] = []
    with model.hooks(fwd_hooks=[("hook_tokens", lambda tokens, hook: seen.append(tokens.clone()))]):
        yield seen
