"""Text to tokens and back: functions that take a tokenizer and do not change it.

A beginning-of-sequence token (BOS) is put in front of strings, and never in front of tokens. These functions add it,
not the tokenizer, so that the result is the same for every tokenizer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hooked_lm._support.torch_internals import values_readable

__all__ = [
    "LogitTokens",
    "PaddingSide",
    "Prompts",
    "TokenBatch",
    "Tokenizer",
    "bos_id",
    "check_padding_side",
    "decode",
    "encode",
    "infer_attention_mask",
    "infer_cached_padding",
    "prepare_tokenizer",
    "single_token",
    "str_tokens",
    "token_position",
    "token_rows",
    "tokenize",
    "with_bos",
    "with_bos_string",
    "without_bos",
]

# Any: a transformers PreTrainedTokenizerBase; naming the type would import transformers.
Tokenizer = Any
PaddingSide = Literal["left", "right"]
# The input of a model: a string or several, or tokens [pos] or [batch pos].
Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor | np.ndarray

# Tokens of the output vocabulary: a string that is one token, a token, or tokens of any shape.
LogitTokens = str | int | Sequence[int] | Tensor


def prepare_tokenizer(tokenizer: Tokenizer, d_vocab: int | None = None) -> Tokenizer:
    """Return a copy of a tokenizer that has a padding token, if it has any special token to pad with.

    Padding is masked, so any token does: the tokenizer's own, or else its end-of-sequence token, BOS or `<unk>`. A
    special token without a row in the embedding counts as none, and BOS is never made up.

    Args:
        tokenizer: the tokenizer to copy.
        d_vocab: how many rows the embedding has; None for any number.
    """
    tokenizer = copy.deepcopy(tokenizer)

    def has_row(role: str) -> bool:
        token_id = getattr(tokenizer, f"{role}_token_id", None)
        return token_id is not None and (d_vocab is None or token_id < d_vocab)

    if not has_row("bos"):
        tokenizer.bos_token = None
    if not has_row("pad"):
        stand_in = next((role for role in ("eos", "bos", "unk") if has_row(role)), None)
        tokenizer.pad_token = None if stand_in is None else getattr(tokenizer, f"{stand_in}_token")
    return tokenizer


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy of a tokenizer that has a BOS token, and a padding token as from `prepare_tokenizer`.

    Args:
        tokenizer: the tokenizer to copy.

    Raises:
        ValueError: it has no BOS token. An end-of-sequence token does not stand in for one.
    """
    bos_id(tokenizer, "get_tokenizer_with_bos")
    return prepare_tokenizer(tokenizer)


def bos_id(tokenizer: Tokenizer, asked_by: str) -> int:
    """Return a tokenizer's BOS token.

    Args:
        tokenizer: any.
        asked_by: the call or the argument that needs one, for the message.

    Raises:
        ValueError: it has none.
    """
    if tokenizer.bos_token_id is None:
        raise ValueError(
            f"{asked_by} needs a BOS token, and this tokenizer has none: set its bos_token (model.tokenizer.bos_token) "
            "to the token that the model was trained to begin texts with, or go without BOS"
        )
    return int(tokenizer.bos_token_id)


@dataclass(frozen=True)
class TokenBatch:
    """Tokens [batch pos] and their attention mask [batch pos], which is None when nothing is padded."""

    tokens: Tensor
    attention_mask: Tensor | None


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return a string's tokens, with no special tokens added.

    Args:
        tokenizer: any.
        text: the string.
    """
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def tokenize(
    tokenizer: Tokenizer,
    text: str | Sequence[str],
    prepend_bos: bool,
    padding_side: PaddingSide,
    n_ctx: int | None = None,
) -> TokenBatch:
    """Return the tokens and mask of one string or several, padded to the longest.

    Args:
        tokenizer: as from `prepare_tokenizer`.
        text: a string or a sequence of strings.
        prepend_bos: put BOS in front of each; a text that begins with BOS does not get a second.
        padding_side: `"left"` or `"right"`.
        n_ctx: cut each prompt to this many tokens; None cuts nothing.

    Raises:
        TypeError: an entry is no string.
        ValueError: there are no strings, a string has no tokens, or there is no BOS or padding token where one is
            needed.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("there is nothing to tokenize: the list of strings is empty")
    for one in texts:
        if not isinstance(one, str):
            raise TypeError(f"expected strings to tokenize, got {type(one).__name__}: {one!r}")
    check_padding_side(padding_side)
    start = _start(tokenizer, prepend_bos)
    rows = [_begun(start, encode(tokenizer, one))[:n_ctx] for one in texts]
    for one, row in zip(texts, rows, strict=True):
        if not row:
            raise ValueError(f"the string {one!r} has no tokens; with prepend_bos=True it would have one")
    longest = max(map(len, rows))
    if all(len(row) == longest for row in rows):
        return TokenBatch(torch.tensor(rows), None)
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "prompts of several lengths need padding, and this tokenizer has no special token at all to pad with: set "
            "model.tokenizer.pad_token, or give one prompt at a time"
        )
    tokens = torch.full((len(rows), longest), tokenizer.pad_token_id)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(longest - len(row), None) if padding_side == "left" else slice(len(row))
        tokens[index, where] = torch.tensor(row)
        mask[index, where] = 1
    return TokenBatch(tokens, mask)


def _start(tokenizer: Tokenizer, prepend_bos: bool) -> list[int]:
    """The tokens that come before a text."""
    return [bos_id(tokenizer, "prepend_bos=True")] if prepend_bos else []


def _begun(start: list[int], tokens: list[int]) -> list[int]:
    return tokens if start and tokens[:1] == start else start + tokens


def check_padding_side(padding_side: str) -> None:
    """Check that a padding side is `"left"` or `"right"`.

    Raises:
        ValueError: it is neither.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side is 'left' or 'right', not {padding_side!r}")


def infer_attention_mask(tokenizer: Tokenizer, tokens: Tensor, prepend_bos: bool, padding_side: str) -> Tensor | None:
    """Return the attention mask [batch pos] inferred from padding tokens, or None if nothing is padded.

    Padding is the run of padding tokens at the padded side. Where padding and BOS are the same token and prompts start
    with BOS, the last token of a left run is that BOS.

    Args:
        tokenizer: its `pad_token_id` and `bos_token_id` are used.
        tokens: [batch pos].
        prepend_bos: whether prompts start with BOS.
        padding_side: `"left"` or `"right"`.
    """
    if tokenizer.pad_token_id is None:
        return None
    is_pad = tokens == tokenizer.pad_token_id
    if padding_side == "left":
        padded = is_pad.long().cumprod(1).bool()
        if prepend_bos and tokenizer.pad_token_id == tokenizer.bos_token_id:
            # Shifted by one to the left, so that the last token of the run counts as text.
            padded = torch.cat((padded[:, 1:], torch.zeros_like(padded[:, :1])), 1) & padded
    else:
        padded = is_pad.long().flip(1).cumprod(1).flip(1).bool()
        padded[:, 0] &= not (prepend_bos and tokenizer.pad_token_id == tokenizer.bos_token_id)
    return None if values_readable(padded) and not bool(padded.any()) else (~padded).long()


def infer_cached_padding(tokenizer: Tokenizer, tokens: Tensor, padding_side: str, continuing: bool) -> Tensor | None:
    """Return the mask [batch pos] of tokens that go into a key-value cache, or None if nothing is padded.

    What comes after them attends to them, so padding on the right counts too. Where the padding token also ends or
    begins texts, tokens that go on from others are all text, and of a run on the right that part is text which the
    prompts have in common: the end of a text, after which the shorter ones are padded.

    Args:
        tokenizer: its special tokens are used.
        tokens: [batch pos].
        padding_side: `"left"` or `"right"`.
        continuing: whether the tokens follow others. A single one is then text, as in a step of generation.
    """
    own_token = tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    n_tokens = tokens.shape[1]
    if continuing and (n_tokens == 1 or not own_token):
        return None
    mask = infer_attention_mask(tokenizer, tokens, False, padding_side)
    if mask is None or own_token:
        return mask
    n_padding = n_tokens - mask.sum(1, keepdim=True)
    text = n_tokens - (n_padding - n_padding.min())
    return (torch.arange(n_tokens, device=tokens.device) < text).long()


def token_rows(tokens: Prompts | int) -> Tensor:
    """Return tokens in any form as an integer tensor.

    Args:
        tokens: a token, a sequence of tokens, an array or a tensor.

    Raises:
        TypeError: they are not integers.
    """
    try:
        tensor = torch.as_tensor(tokens)
    except (ValueError, TypeError) as error:
        raise TypeError(
            f"these are no tokens: {tokens!r} ({error}). Tokens are integers, in lists of one length, an array or a "
            "tensor; prompts of several lengths are given as strings, or padded and with attention_mask"
        ) from error
    if isinstance(tokens, (list, tuple)) and not tokens:
        tensor = tensor.long()  # torch makes an empty list a float tensor
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"tokens are integers, got {tensor.dtype}: convert them with .long() if they are whole numbers")
    return tensor.long()


def decode(
    tokenizer: Tokenizer, tokens: Tensor | np.ndarray | Sequence[int] | int, special: bool = True
) -> str | list[str]:
    """Return the string of one sequence of tokens, or the list of strings of a batch.

    Args:
        tokenizer: any.
        tokens: a token, [pos] or [batch pos].
        special: with the special tokens among them, such as BOS.

    Raises:
        ValueError: they have more axes.
    """
    rows = token_rows(tokens)
    if rows.ndim > 2:
        raise ValueError(f"expected one sequence of tokens or a batch [batch pos], got shape {tuple(rows.shape)}")
    if rows.ndim == 2:
        return [str(decode(tokenizer, row, special)) for row in rows]
    ids = rows.reshape(-1).tolist()
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False, skip_special_tokens=not special))


def str_tokens(tokenizer: Tokenizer, tokens: Tensor | np.ndarray | Sequence[int]) -> list[str]:
    """Return each token of one sequence as the string it stands for, with the space that it begins with.

    Args:
        tokenizer: any.
        tokens: [pos] or [1 pos].
    """
    ids = token_rows(tokens).reshape(-1).tolist()

    def decoded(*tokens: int) -> str:
        return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    # Sentencepiece drops the space at the start of a text, so a token is decoded behind another one.
    before = encode(tokenizer, "a")[-1:]
    prefix = decoded(*before)
    special = set(getattr(tokenizer, "all_special_ids", ()))

    def string(token: int) -> str:
        behind = decoded(*before, token)
        return decoded(token) if token in special or not behind.startswith(prefix) else behind[len(prefix) :]

    strings = {token: string(token) for token in set(ids)}
    return [strings[token] for token in ids]


def single_token(tokenizer: Tokenizer, text: str) -> int:
    """Return the token of a string that is exactly one token.

    Args:
        tokenizer: any.
        text: the string.

    Raises:
        ValueError: the string is no token or several; the message lists them.
    """
    tokens = encode(tokenizer, text)
    if len(tokens) != 1:
        hint = "" if text.startswith(" ") else f"; words inside a text start with a space: {' ' + text!r}"
        raise ValueError(f"{text!r} is {len(tokens)} tokens, not one: {str_tokens(tokenizer, tokens)}{hint}")
    return tokens[0]


def token_position(single: int, tokens: Tensor, what: str, mode: Literal["first", "last"] = "first") -> int:
    """Return the position of a token in a sequence [pos] or [1 pos].

    Args:
        single: the token.
        tokens: [pos] or [1 pos].
        what: the name of the token in error messages.
        mode: `"first"` or `"last"` occurrence.

    Raises:
        ValueError: it does not occur, the tokens are a batch, or there is no such mode.
    """
    if mode not in ("first", "last"):
        raise ValueError(f"mode is 'first' or 'last', not {mode!r}")
    if tokens.ndim == 2:
        if tokens.shape[0] != 1:
            raise ValueError(f"positions are looked up in one sequence, got a batch with shape {tuple(tokens.shape)}")
        tokens = tokens[0]
    found = (tokens == single).nonzero().flatten().tolist()
    if not found:
        raise ValueError(f"{what} does not occur in the tokens {tokens.tolist()}")
    return int(found[0 if mode == "first" else -1])


def with_bos_string(bos_token: str | None, input: str | list[str]) -> str | list[str]:
    """Return a string, or several, with a BOS token in front; as they are without one.

    Args:
        bos_token: the token, or None.
        input: a string or a list of strings.
    """
    if bos_token is None:
        return input
    return bos_token + input if isinstance(input, str) else [bos_token + one for one in input]


def without_bos(tokenizer: Tokenizer, tokens: Tensor, padding_side: str | None = None) -> Tensor:
    """Return tokens [batch pos] without the BOS at the start of each row, [batch pos-1].

    Args:
        tokenizer: its BOS and padding tokens; without BOS the tokens are returned as they are.
        tokens: [batch pos], each with BOS in front of its text.
        padding_side: by default the tokenizer's.

    Raises:
        ValueError: a side that is neither, or a row padded on the left without BOS.
    """
    side = tokenizer.padding_side if padding_side is None else padding_side
    check_padding_side(side)
    if tokenizer.bos_token_id is None:
        return tokens
    if side == "right":
        return tokens[..., 1:]
    is_bos = tokens == tokenizer.bos_token_id
    if tokenizer.bos_token_id == tokenizer.pad_token_id:
        # The last of the run of padding tokens at the left is BOS.
        is_bos = is_bos.long().cumprod(-1).bool()
        first = is_bos.sum(-1, keepdim=True) - 1
    else:
        first = is_bos.long().argmax(-1, keepdim=True)
    if not bool(is_bos.any(-1).all()):
        raise ValueError(f"a row has no BOS token ({tokenizer.bos_token_id}) to remove: {tokens.tolist()}")
    kept = torch.ones_like(tokens, dtype=torch.bool).scatter(-1, first, False)
    return tokens[kept].view(*tokens.shape[:-1], -1)
