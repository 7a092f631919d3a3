"""`generate` and `generate_stream`: the decoding loop, from text to text."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from hooked_lm import tokenization
from hooked_lm._support.integers import at_least_one, integer, is_integer
from hooked_lm.generation.decoding import Sampling, decode_steps
from hooked_lm.hooks import HookPoint, current_pass
from hooked_lm.interventions import Intervention
from hooked_lm.interventions.running import Intervening
from hooked_lm.tokenization.methods import TextInterface, describe, mask_tensor

__all__ = ["Generated", "ReturnAs", "StreamAs", "TextGeneration"]

ReturnAs = Literal["input", "str", "tokens", "embeds"]
StreamAs = Literal["input", "str", "tokens"]


class Generated(NamedTuple):
    """What `generate` returns with `output_logits=True`.

    Attributes:
        sequences: the tokens, [batch pos], the prompts with them unless those were embeddings.
        logits: of each step, as the model gave them, [batch vocab].
    """

    sequences: Tensor
    logits: tuple[Tensor, ...]


class TextGeneration(TextInterface, Intervening):
    """The generating methods of `HookedTransformer`."""

    def generate(
        self,
        input: str | Sequence[str] | Tensor = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        return_type: ReturnAs = "input",
        verbose: bool = True,
        attention_mask: Tensor | None = None,
        interventions: Sequence[Intervention] = (),
        output_logits: bool = False,
        repetition_penalty: float = 1.0,
    ) -> Tensor | str | list[str] | Generated:
        """Return prompts extended token by token.

        The model's hooks and the interventions act at every step. With the key-value cache, each step after the first
        runs only the newest position.

        Args:
            input: a string, a list of strings, tokens [pos] or [batch pos], or embeddings [batch pos d_model], in
                place of what `hook_embed` looks up. An empty string is BOS alone.
            max_new_tokens: steps at most.
            stop_at_eos: stop a prompt after `eos_token_id`; it is padded with that token until all have stopped.
            eos_token_id: one or several; by default the tokenizer's.
            do_sample, top_k, top_p, temperature, freq_penalty: how tokens are drawn; see `generation.Sampling`.
            use_past_kv_cache: False runs the whole text at each step. The logits are the same, under interventions too.
            prepend_bos: for strings; by default the model's.
            padding_side: for strings; only `"left"`, since new tokens are added at the right.
            return_type: `"str"`, `"tokens"`, `"embeds"`, or `"input"` for the type of the input.
            verbose: show a progress bar.
            attention_mask: [batch pos] for tokens or embeddings padded on the left.
            interventions: edits as data; their positions are those of the whole text.
            output_logits: return a `Generated`, with tokens and the logits of each step, whatever `return_type` is.
            repetition_penalty: of tokens that have occurred; see `generation.Sampling`.

        Returns:
            Tokens [batch pos] ([pos] if so given), padding included; their embeddings [batch pos d_model]; or the text
            up to the first end-of-sequence token, without special tokens, and a list of texts for several prompts. Of
            a prompt of embeddings there is no text: tokens and strings are those of the new tokens alone.

        Raises:
            ValueError: prompt and new tokens exceed `n_ctx`, or an option is out of range.
        """
        if return_type not in get_args(ReturnAs):
            raise ValueError(f"return_type is 'input', 'str', 'tokens' or 'embeds', not {return_type!r}")
        sampling = Sampling(do_sample, top_k, top_p, temperature, freq_penalty, repetition_penalty)
        embeds = self._checked_embeddings(input, sampling)
        if embeds is not None:
            input = torch.zeros(embeds.shape[:2], dtype=torch.long)  # placeholders, which are not padding
            attention_mask = torch.ones_like(input) if attention_mask is None else attention_mask
        tokens, mask, texts = self._prompts(input, prepend_bos, padding_side, attention_mask)
        self._check_room(tokens, max_new_tokens)
        ends = self._ends(stop_at_eos, eos_token_id)
        logits: list[Tensor] | None = [] if output_logits else None
        with self._all_acting(interventions), self._reading(embeds):
            steps = decode_steps(
                self,  # type: ignore[arg-type]
                tokens,
                mask,
                max_new_tokens,
                sampling,
                ends,
                use_past_kv_cache,
                verbose,
                logits_of_steps=logits,
            )
            new = [token[:, None] for token in steps]
        if embeds is not None:
            mask, tokens = None, tokens[:, :0]
        out = torch.cat((tokens, *new), 1)
        if logits is not None:
            return Generated(out, tuple(logits))
        if return_type == "input":
            return_type = "embeds" if embeds is not None else "tokens" if texts is None else "str"
        one_row = isinstance(input, Tensor) and input.ndim == 1
        if return_type == "str":
            strings = self._texts(out, mask, tokens.shape[1], ends)
            return strings[0] if len(strings) == 1 else strings
        out = self._looked_up(embeds, out) if return_type == "embeds" else out
        return out[0] if one_row else out

    @torch.no_grad()
    def _looked_up(self, before: Tensor | None, tokens: Tensor) -> Tensor:
        """Return embeddings, and behind them those of tokens."""
        looked_up: Tensor = self.embed(tokens)
        return looked_up if before is None else torch.cat((before, looked_up), 1)

    def _checked_embeddings(self, input: object, sampling: Sampling) -> Tensor | None:
        """Return a prompt of embeddings on the model's device; None if the prompt is none."""
        if not isinstance(input, Tensor) or not input.is_floating_point():
            return None
        W_E = self.embed.W_E
        if input.ndim != 3 or input.shape[-1] != W_E.shape[1] or 0 in input.shape or input.dtype != W_E.dtype:
            raise TypeError(
                f"a prompt of floats is embeddings [batch pos {W_E.shape[1]}] in {W_E.dtype}, got {describe(input)}: "
                "tokens are integers"
            )
        if sampling.reads_text:
            raise ValueError("freq_penalty and repetition_penalty count tokens, and the prompt's embeddings are none")
        return input.detach().to(W_E.device)

    @contextmanager
    def _reading(self, embeds: Tensor | None) -> Generator[None, None, None]:
        """Within a `with` block, put embeddings in the place of those of the first positions, before other hooks."""

        def replace(looked_up: Tensor, hook: HookPoint) -> Tensor | None:
            if embeds is None or current_pass().n_past:
                return None
            return torch.cat((embeds, looked_up[:, embeds.shape[1] :]), 1)

        replace.edits_in_place = False  # type: ignore[attr-defined]
        handles = [] if embeds is None else self.plan_hooks([("hook_embed", replace)], "fwd", this_thread=True)
        try:
            for handle in handles:
                handle.attach(prepend=True)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def generate_stream(
        self,
        input: str | Tensor = "",
        max_new_tokens: int = 10,
        max_tokens_per_yield: int = 25,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        return_type: StreamAs = "input",
        verbose: bool = True,
    ) -> Iterator[Tensor | str]:
        """Yield the text in pieces of `max_tokens_per_yield` tokens as it is generated, the prompt with the first.

        Joined, the pieces are what `generate` returns. The first piece has the prompt and at least one new token; the
        last may have fewer than the others.

        Args:
            max_tokens_per_yield: how many tokens a piece has, the prompt's among them.
            input: a string, or tokens [pos] or [batch pos].
            return_type: `"str"` yields text, of a single prompt; `"tokens"` and `"input"` yield tokens [batch pos]
                ([pos] if so given), for strings too.
            max_new_tokens, stop_at_eos, eos_token_id, prepend_bos, padding_side, verbose: as for `generate`.
            do_sample, top_k, top_p, temperature, freq_penalty, use_past_kv_cache: as for `generate`.

        Raises:
            ValueError: several prompts as text, pieces of no tokens, or as `generate`.
        """
        if return_type not in get_args(StreamAs):
            raise ValueError(f"return_type is 'input', 'str' or 'tokens', not {return_type!r}")
        at_least_one(max_tokens_per_yield, "max_tokens_per_yield")
        tokens, mask, _ = self._prompts(input, prepend_bos, padding_side, None)
        as_text = return_type == "str"
        if as_text and tokens.shape[0] != 1:
            raise ValueError(
                f"one prompt at a time can be streamed as text, got {tokens.shape[0]}: pass return_type='tokens'"
            )
        self._check_room(tokens, max_new_tokens)
        sampling = Sampling(do_sample, top_k, top_p, temperature, freq_penalty)
        ends = self._ends(stop_at_eos, eos_token_id)
        steps = decode_steps(
            self,  # type: ignore[arg-type]
            tokens,
            mask,
            max_new_tokens,
            sampling,
            ends,
            use_past_kv_cache,
            verbose,
        )

        pieces = _new_tokens(tokens, steps, max_tokens_per_yield)
        if as_text:
            yield from self._text_pieces(pieces)
        else:
            for new, _ in pieces:
                yield new[0] if isinstance(input, Tensor) and input.ndim == 1 else new

    def _text_pieces(self, pieces: Iterator[tuple[Tensor, bool]]) -> Iterator[str]:
        """Yield the text that each piece [1 pos] adds, without special tokens."""
        so_far: Tensor | None = None
        sent = text = ""
        for new, last in pieces:
            so_far = new if so_far is None else torch.cat((so_far, new), 1)
            text = self._plain_text(so_far[0])
            # The bytes of a character may be spread over tokens: an unfinished character waits for the next piece.
            finished = text if last else text.rstrip("\ufffd")
            yield finished[len(sent) :]
            sent = finished
        if text != sent:
            yield text[len(sent) :]

    def _prompts(
        self,
        input: str | Sequence[str] | Tensor,
        prepend_bos: bool | None,
        padding_side: str | None,
        attention_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, list[str] | None]:
        """Return tokens [batch pos], their mask, and the strings they came from; None for an input of tokens."""
        device = self.embed.W_E.device
        if padding_side == "right":
            raise ValueError("new tokens are added at the right, so prompts of unequal length are padded on the left")
        if isinstance(input, str) or (isinstance(input, (list, tuple)) and input and isinstance(input[0], str)):
            if attention_mask is not None:
                raise ValueError("the attention mask of strings follows from their padding: pass tokens to use another")
            texts = [input] if isinstance(input, str) else list(input)
            batch = self._tokenize(texts, prepend_bos, "left")
            mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
            return batch.tokens.to(device), mask, texts
        tokens = self._check_tokens(input)
        if attention_mask is not None:
            one = isinstance(attention_mask, (Tensor, np.ndarray)) and attention_mask.ndim == 1
            attention_mask = mask_tensor(attention_mask[None] if one else attention_mask, tokens)
            attention_mask = attention_mask.to(device, torch.long)
        elif tokens.shape[0] > 1 and self.tokenizer is not None:
            attention_mask = self._mask_of_batch(tokens, self._prepends_bos(prepend_bos))
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ValueError(
                "new tokens are added at the right, so the last position of every prompt has to be a real token"
            )
        return tokens, attention_mask, None

    def _mask_of_batch(self, tokens: Tensor, prepend_bos: bool) -> Tensor | None:
        """Return the mask of prompts padded on the left, whatever the model's padding side; None if nothing is padded.

        Raises:
            ValueError: some prompts, not all, end in padding, as if padded on the right.
        """
        tokenizer = self._require_tokenizer()
        if tokenizer.pad_token_id is None:
            return None
        is_pad = tokens == tokenizer.pad_token_id
        # Where padding and BOS are the same token, a row of padding tokens alone is a BOS.
        ends_in_padding = is_pad[:, -1] & ~is_pad.all(1)
        if bool(ends_in_padding.any()) and not bool(ends_in_padding.all()):
            raise ValueError(
                "some prompts end in padding tokens, and new tokens are added at the right: tokenize with "
                "padding_side='left', or pass attention_mask if these tokens are text"
            )
        return tokenization.infer_attention_mask(tokenizer, tokens, prepend_bos, "left")

    def _check_room(self, tokens: Tensor, max_new_tokens: int) -> None:
        if integer(max_new_tokens, "max_new_tokens") < 0:
            raise ValueError(f"max_new_tokens is not negative, got {max_new_tokens}")
        if tokens.shape[1] + max_new_tokens > self.cfg.n_ctx + 1:
            raise ValueError(
                f"a prompt of {tokens.shape[1]} tokens and {max_new_tokens} new ones do not fit n_ctx={self.cfg.n_ctx}"
            )

    def _ends(self, stop_at_eos: bool, eos_token_id: int | Sequence[int] | None) -> tuple[int, ...]:
        if not stop_at_eos:
            return ()
        if eos_token_id is not None:
            several = isinstance(eos_token_id, (Sequence, Tensor)) and not is_integer(eos_token_id)
            ends = tuple(
                integer(one, "eos_token_id")
                for one in (eos_token_id if several else [eos_token_id])  # type: ignore[union-attr]
            )
            if not ends or not all(0 <= one < self.cfg.d_vocab_out for one in ends):
                raise ValueError(
                    f"eos_token_id is one or several of the tokens 0-{self.cfg.d_vocab_out - 1} that the model can "
                    f"write, got {eos_token_id!r}; to go on to max_new_tokens say stop_at_eos=False"
                )
            return ends
        if self.tokenizer is None or self.tokenizer.eos_token_id is None:
            raise ValueError("stop_at_eos needs an end-of-sequence token: pass eos_token_id, or stop_at_eos=False")
        return (self.tokenizer.eos_token_id,)

    def _texts(self, tokens: Tensor, mask: Tensor | None, n_prompt: int, ends: tuple[int, ...]) -> list[str]:
        """Return each row as text, without padding and special tokens, up to the first end-of-sequence token."""
        strings = []
        for index, row in enumerate(tokens):
            prompt = row[:n_prompt] if mask is None else row[:n_prompt][mask[index].bool()]
            new = row[n_prompt:].tolist()
            stops = [at for at, token in enumerate(new) if token in ends]
            kept = new[: stops[0] + 1] if stops else new
            strings.append(self._plain_text(prompt.tolist() + kept))
        return strings

    def _plain_text(self, tokens: Sequence[int] | Tensor) -> str:
        """Return the text of a sequence of tokens without the special ones."""
        return str(tokenization.decode(self._require_tokenizer(), tokens, special=False))


def _new_tokens(tokens: Tensor, steps: Iterator[Tensor], per_piece: int) -> Iterator[tuple[Tensor, bool]]:
    """Yield the prompt and then the new tokens [batch pos], `per_piece` at a time; at least one is new.

    Each comes with whether it is known to be the last piece, since it has fewer tokens.
    """
    parts, pending = [tokens], tokens.shape[1]
    for token in steps:
        parts.append(token[:, None])
        pending += 1
        if pending >= per_piece:
            yield torch.cat(parts, 1), False
            parts, pending = [], 0
    if parts:
        yield torch.cat(parts, 1), True
