"""TextInterface: a model's methods between strings, tokens and unembedding directions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm import tokenization
from hooked_lm._support.inference import as_differentiable
from hooked_lm._support.integers import integer, is_integer
from hooked_lm._support.torch_internals import values_readable
from hooked_lm.components import Embed, Unembed
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.tokenization import LogitTokens, PaddingSide, Prompts, TokenBatch, Tokenizer
from hooked_lm.tokenization.linked import follows_bos, linked, unlinked

__all__ = ["Text", "TextInterface", "check_attention_mask", "describe", "mask_tensor"]

Text = str | Sequence[str]


class TextInterface(nn.Module):
    """The text methods of `HookedTransformer`."""

    cfg: HookedTransformerConfig
    embed: Embed
    unembed: Unembed
    _tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's own copy of its tokenizer; None if it has none."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        if tokenizer is None:
            self._tokenizer = None
        else:
            self.set_tokenizer(tokenizer)

    def set_tokenizer(self, tokenizer: Tokenizer, default_padding_side: str | None = None) -> None:
        """Set the model's tokenizer to a copy of this one, which shares its padding side and BOS with the config.

        `model.tokenizer.padding_side` and `model.cfg.default_padding_side` are one setting, and
        `model.tokenizer.encode(text)` has BOS where `model.cfg.default_prepend_bos` says so. A missing padding token is
        replaced by another special token, which is masked; a missing BOS is not, and turns `default_prepend_bos` off,
        with a warning. Tokens that have no row in the embedding are warned about here and raise where they are used.

        Args:
            tokenizer: a HuggingFace tokenizer, or an object with the same methods.
            default_padding_side: `"left"` or `"right"`, the new default; None keeps the present one.

        Raises:
            ValueError: the side is neither.
            TypeError: it is no tokenizer.
        """
        if not callable(getattr(tokenizer, "get_vocab", None)):
            raise TypeError(
                f"a tokenizer is an object such as AutoTokenizer.from_pretrained returns, got {tokenizer!r}: load it "
                "first, or name it in the config (tokenizer_name=)"
            )
        if default_padding_side is not None:
            tokenization.check_padding_side(default_padding_side)
            self.cfg.default_padding_side = default_padding_side
        rows = None if self.cfg.d_vocab == -1 else self.cfg.d_vocab
        without_row = sorted(
            (at, token) for token, at in tokenizer.get_vocab().items() if rows is not None and at >= rows
        )
        if without_row:
            warnings.warn(
                f"the tokenizer has {len(without_row)} tokens more than the embedding has rows ({rows}), such as "
                f"{without_row[0][1]!r} ({without_row[0][0]}): a text with one of them raises",
                stacklevel=2,
            )
        prepared = tokenization.prepare_tokenizer(unlinked(tokenizer), rows)
        if prepared.bos_token_id is None and self.cfg.default_prepend_bos:
            self.cfg.default_prepend_bos = False
            warnings.warn(
                "this tokenizer has no BOS token that the model could read, so none is put in front of prompts "
                "(default_prepend_bos=False)",
                stacklevel=2,
            )
        self._tokenizer = linked(prepared, self.cfg)
        # What code for the classic library asks before it adds or removes a BOS by hand. The config keeps it in step.
        follows = follows_bos(self._tokenizer)
        self.cfg.tokenizer_prepends_bos = bool(self.cfg.default_prepend_bos) if follows else None

    def _require_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError("this model has no tokenizer, so its input must be tokens; set one with set_tokenizer")
        return self._tokenizer

    def _prepends_bos(self, prepend_bos: bool | None) -> bool:
        return self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos

    def _padding_side(self, padding_side: PaddingSide | None) -> PaddingSide:
        return cast(PaddingSide, self.cfg.default_padding_side) if padding_side is None else padding_side

    def _tokenize(
        self, text: Text, prepend_bos: bool | None, padding_side: PaddingSide | None, n_ctx: int | None = None
    ) -> TokenBatch:
        batch = tokenization.tokenize(
            self._require_tokenizer(), text, self._prepends_bos(prepend_bos), self._padding_side(padding_side), n_ctx
        )
        self._check_rows(int(batch.tokens.max()))
        return batch

    def _check_rows(self, token: int) -> None:
        """Check that the embedding has a row for a token that a text has."""
        if token >= self.cfg.d_vocab:
            string = self._require_tokenizer().convert_ids_to_tokens(token)
            raise ValueError(
                f"the text has the token {string!r} ({token}), and this model's tokens are 0-{self.cfg.d_vocab - 1}: "
                "the tokenizer has more tokens than the embedding has rows. Leave it out, or load the model that was "
                "trained with it"
            )

    def _check_tokens(self, given: Prompts | int) -> Tensor:
        """Return tokens in any form as [batch pos] on the model's device, checked against its vocabulary."""
        tokens = tokenization.token_rows(given)
        if tokens.ndim == 1:
            tokens = tokens[None]
        if tokens.ndim != 2 or tokens.numel() == 0:
            raise ValueError(f"tokens have shape [batch pos], neither empty; got {tuple(tokens.shape)}")
        # On an accelerator the lookup itself fails for such a token; to read it here is to wait for all work so far.
        if tokens.device.type == "cpu" and values_readable(tokens):
            least, most = (int(extreme) for extreme in torch.aminmax(tokens))
            if least < 0 or most >= self.cfg.d_vocab:
                culprit = least if least < 0 else most
                raise ValueError(f"token {culprit} is out of range: this model's tokens are 0-{self.cfg.d_vocab - 1}")
        return as_differentiable(tokens.to(self.embed.W_E.device))

    def to_tokens(
        self,
        input: Text,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Tensor:
        """Return the tokens [batch pos] of a string or of several, padded to the longest.

        Args:
            input: a string or a list of strings.
            prepend_bos: put BOS in front; by default as the model's `default_prepend_bos`.
            padding_side: by default the model's.
            move_to_device: return the tokens on the model's device.
            truncate: cut to `n_ctx` tokens, with a warning.

        Raises:
            ValueError: there is no tokenizer, or a string has no tokens.
        """
        batch = self._tokenize(input, prepend_bos, padding_side)
        tokens = batch.tokens
        if truncate and tokens.shape[1] > self.cfg.n_ctx:
            warnings.warn(f"a prompt of {tokens.shape[1]} tokens was cut to n_ctx={self.cfg.n_ctx}", stacklevel=2)
            tokens = self._tokenize(input, prepend_bos, padding_side, self.cfg.n_ctx).tokens
        return tokens.to(self.embed.W_E.device) if move_to_device else tokens

    def to_string(self, tokens: Tensor | np.ndarray | Sequence[int] | int) -> str | list[str]:
        """Return the string of a sequence of tokens, or a list of strings for a batch.

        Args:
            tokens: a token, [pos] or [batch pos].

        Raises:
            ValueError: tokens of more than two axes, or the model has no tokenizer.
        """
        return tokenization.decode(self._require_tokenizer(), tokens)

    def to_str_tokens(
        self,
        input: Text | Tensor | np.ndarray,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
    ) -> list[str] | list[list[str]]:
        """Return the tokens of a prompt as strings; a list of such lists for a list of prompts.

        Args:
            input: a string, a list of strings, or the tokens of one sequence, [pos] or [1 pos]; a batch [batch pos]
                gives a list of lists.
            prepend_bos: for strings; by default as the model's `default_prepend_bos`.
            padding_side: accepted for compatibility, without effect: prompts are tokenized one by one.

        Raises:
            ValueError: tokens of more than two axes.
        """
        tokenizer = self._require_tokenizer()

        def of_text(text: str) -> list[str]:
            return tokenization.str_tokens(tokenizer, self._tokenize(text, prepend_bos, padding_side).tokens[0])

        if isinstance(input, str):
            return of_text(input)
        if isinstance(input, (list, tuple)) and input and isinstance(input[0], str):
            return [of_text(str(text)) for text in input]
        rows = tokenization.token_rows(input)
        if rows.ndim > 2:
            raise ValueError(f"expected tokens [pos] or [batch pos], got shape {tuple(rows.shape)}")
        if rows.ndim == 2 and rows.shape[0] > 1:
            return [tokenization.str_tokens(tokenizer, row) for row in rows]
        return tokenization.str_tokens(tokenizer, rows)

    def to_single_token(self, string: str) -> int:
        """Return the token of a string that is exactly one token.

        Args:
            string: the string.

        Raises:
            ValueError: the string is no token or several, or the model has no tokenizer.
        """
        token = tokenization.single_token(self._require_tokenizer(), string)
        self._check_rows(token)
        return token

    def to_single_str_token(self, int_token: int) -> str:
        """Return the string of a token.

        Args:
            int_token: the token.

        Raises:
            TypeError: it is no integer.
        """
        if not is_integer(int_token):
            raise TypeError(f"a token is an int, got {int_token!r}")
        return tokenization.str_tokens(self._require_tokenizer(), [integer(int_token, "a token")])[0]

    def get_token_position(
        self,
        single_token: str | int,
        input: str | Tensor,
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
    ) -> int:
        """Return the position of a token in a prompt, counting BOS where there is one.

        Args:
            single_token: a token, or a string that is one.
            input: a string, or tokens [pos] or [1 pos].
            mode: `"first"` or `"last"` occurrence.
            prepend_bos, padding_side: for a string, as in `to_tokens`.

        Raises:
            ValueError: it does not occur.
        """
        if isinstance(input, str):
            tokens = self._tokenize(input, prepend_bos, padding_side).tokens
        else:
            tokens = tokenization.token_rows(input)
        token = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        return tokenization.token_position(token, tokens, repr(single_token), mode)

    def tokens_to_residual_directions(self, tokens: LogitTokens) -> Float[Tensor, "*shape d_model"]:
        """Return the direction in the final stream that raises each token's logit: its column of `W_U`.

        Multiplied by `logit_scale`, if the model has one.

        Args:
            tokens: a string that is one token, a token, or tokens of any shape. A tensor of one token counts as a
                token, whatever its shape: its direction is [d_model].

        Raises:
            ValueError: a token out of range, a string that is not one token, or a model whose logits are not linear in
                the stream (`unembed_act_fn`).
        """
        self.unembed.require_linear("a token's direction in the stream")
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        index = tokenization.token_rows(tokens)
        if isinstance(tokens, Tensor) and index.numel() == 1:
            index = index.reshape(())
        limit = self.cfg.d_vocab_out
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < limit):
            raise ValueError(f"tokens {index.tolist()} are not all in 0-{limit - 1}")
        W_U = self.unembed.matrix()
        directions = W_U.T[index.to(W_U.device)]
        return directions if self.cfg.logit_scale == 1.0 else directions * self.cfg.logit_scale


def mask_tensor(mask: object, tokens: Tensor, continuing: bool = False) -> Tensor:
    """Return the attention mask of some tokens as a tensor; a NumPy array becomes one.

    Args:
        mask: the mask.
        tokens: [batch pos].
        continuing: as for `check_attention_mask`.

    Raises:
        ValueError: as `check_attention_mask`.
    """
    made = torch.as_tensor(mask) if isinstance(mask, np.ndarray) and mask.dtype.kind in "iufb" else mask
    check_attention_mask(made, tokens.shape[0], tokens.shape[1], continuing)
    return cast(Tensor, made)


def check_attention_mask(mask: object, batch: int, n_new: int, continuing: bool = False) -> None:
    """Check the attention mask of some tokens.

    Args:
        mask: the mask.
        batch, n_new: the shape of the tokens.
        continuing: whether the tokens follow others in a key-value cache.

    Raises:
        ValueError: it is not [batch pos] of 0 and 1, or marks a whole prompt that is not `continuing` as padding.
    """
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (batch, n_new):
        raise ValueError(
            f"attention_mask has shape [batch pos] = [{batch} {n_new}], got {describe(mask)}: give a tensor with 1 for "
            "each real token and 0 for padding"
        )
    if not values_readable(mask):
        return
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask holds 1 for real tokens and 0 for padding, and nothing else")
    if not continuing and not bool(mask.any(1).all()):
        raise ValueError("attention_mask marks a whole prompt as padding")


def describe(value: object) -> str:
    """Return a description of a value, for an error: its type, and shape and dtype if it is a tensor."""
    if isinstance(value, (Tensor, np.ndarray)):
        kind = "tensor" if isinstance(value, Tensor) else "NumPy array"
        return f"a {kind} with shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"{type(value).__name__} {value!r}"
