"""Target prompts: where a hidden state is put, so that the model says in words what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_lm._support.integers import integer
from hooked_lm.hooked_model import HookedModel
from hooked_lm.tokenization import Prompts

__all__ = ["TargetPrompt", "identity_prompt", "target_of"]

# Shorter words are too often parts of others.
_LETTERS = 3


@dataclass(frozen=True, eq=False)
class TargetPrompt:
    """A prompt, and the token in it that a hidden state takes the place of.

    Attributes:
        tokens: [pos].
        pos: the position, from 0.
        strings: the tokens as strings; their numbers for a model without a tokenizer.
    """

    tokens: Int[Tensor, " pos"]
    pos: int
    strings: tuple[str, ...]

    def __str__(self) -> str:
        shown = list(self.strings)
        shown[self.pos] = f"«{shown[self.pos]}»"
        return "".join(shown)


def target_of(
    model: HookedModel, prompt: Prompts | TargetPrompt, pos: int | None, prepend_bos: bool | None = None
) -> TargetPrompt:
    """Return a target prompt, checked.

    Args:
        model: a `HookedTransformer`.
        prompt: a string, tokens [pos] or [1 pos], or a target prompt.
        pos: the position; negative from the end. None for the last, or that of a target prompt.
        prepend_bos: as for the model; for a string.

    Raises:
        ValueError: several prompts, an empty one, or a position that it lacks.
    """
    if isinstance(prompt, TargetPrompt):
        tokens, pos = prompt.tokens[None], prompt.pos if pos is None else pos
    else:
        tokens, _ = model.tokens_and_mask(prompt, None, prepend_bos)
    if len(tokens) != 1 or not tokens.numel():
        raise ValueError(f"the target is one prompt with at least a token, got tokens {tuple(tokens.shape)}")
    n_pos, pos = tokens.shape[1], integer(-1 if pos is None else pos, "target_pos")
    if not -n_pos <= pos < n_pos:
        raise ValueError(f"the target prompt has positions 0-{n_pos - 1}, got target_pos {pos}")
    limit = model.cfg.d_vocab
    if int(tokens.min()) < 0 or int(tokens.max()) >= limit:
        raise ValueError(f"tokens of the target prompt are 0-{limit - 1}, got {tokens[0].tolist()}")
    row = tokens[0].to(model.embed.W_E.device)
    strings = row.tolist() if model.tokenizer is None else model.to_str_tokens(row)
    return TargetPrompt(row, pos % n_pos, tuple(str(one) for one in strings))


def identity_prompt(
    model: HookedModel,
    words: Sequence[str] | None = None,
    *,
    n_words: int = 5,
    arrow: str = "->",
    separator: str = "\n",
    placeholder: str = "?",
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> TargetPrompt:
    """Return a few-shot prompt that repeats words, `cat->cat`, and ends in a token for a state to take the place of.

    Source: Ghandeharioun et al. 2024, "Patchscopes: A Unifying Framework for Inspecting Hidden Representations of
    Language Models", whose prompt for the next token is `cat->cat\\n1135->1135\\nhello->hello\\n?`, the state at the
    last position.

    Args:
        model: a `HookedTransformer` with a tokenizer.
        words: those to repeat; by default drawn from those tokens that are words of three letters or more.
        n_words: how many to draw.
        arrow, separator: between a word and its copy, and after the copy.
        placeholder: the text at the end, one token there.
        prepend_bos: as for the model.
        seed: of the draw.

    Raises:
        ValueError: the model has no tokenizer, there are no words, fewer in the vocabulary than asked for, or the
            placeholder is not one token at the end of the prompt.
    """
    if model.tokenizer is None:
        raise ValueError(
            "an identity prompt is made of words, and this model has no tokenizer: give tokens as a target"
        )
    chosen = _drawn_words(model, n_words, seed) if words is None else list(words)
    if not chosen or not all(isinstance(word, str) and word for word in chosen) or isinstance(words, str):
        raise ValueError(f"words are one or more strings, none empty; got {words!r}")
    shots = "".join(f"{word}{arrow}{word}{separator}" for word in chosen)
    before = model.to_tokens(shots, prepend_bos)[0]
    tokens = model.to_tokens(shots + placeholder, prepend_bos)[0]
    if len(tokens) != len(before) + 1 or not torch.equal(tokens[:-1], before):
        ending = model.to_str_tokens(tokens)[len(before) :]
        raise ValueError(
            f"the placeholder {placeholder!r} is one token at the end of the prompt, not {ending}: choose another"
        )
    return target_of(model, tokens, -1)


def _drawn_words(model: HookedModel, n_words: int, seed: int) -> list[str]:
    """Draw words that are tokens."""
    if integer(n_words, "n_words") < 1:
        raise ValueError(f"n_words is 1 or more, got {n_words}")
    order = torch.randperm(model.cfg.d_vocab, generator=torch.Generator().manual_seed(seed))
    found = list[str]()
    for token in order.tolist():
        word = str(model.to_string([token])).strip()
        if len(word) >= _LETTERS and word.isalpha() and word.islower() and word not in found:
            found.append(word)
        if len(found) == n_words:
            return found
    raise ValueError(f"the vocabulary has {len(found)} lower-case words of three letters or more, not {n_words}")
