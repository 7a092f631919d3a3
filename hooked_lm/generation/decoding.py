"""Sampling, and the loop that extends prompts token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm._support.integers import integer
from hooked_lm._support.precision import at_least_single
from hooked_lm.hooks import reading_again
from hooked_lm.kv_cache import HookedTransformerKeyValueCache

__all__ = ["LanguageModel", "Sampling", "decode_steps", "sample_logits"]


@runtime_checkable
class LanguageModel(Protocol):
    """The methods of a model that the decoding loop calls."""

    def __call__(self, input: Tensor, **options: object) -> Tensor: ...

    def new_kv_cache(self, batch_size: int, capacity: int) -> HookedTransformerKeyValueCache: ...

    def outgrows(self, cache: HookedTransformerKeyValueCache) -> bool: ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        do_sample: draw from the distribution; False takes the likeliest token.
        top_k: keep the k likeliest tokens.
        top_p: keep the likeliest tokens that together reach this probability.
        temperature: logits are divided by it; 0 takes the likeliest token.
        freq_penalty: subtract this much from a token's logit, after the division, for each time it has occurred.
        repetition_penalty: divide the logit of a token that has occurred by this if it is positive, and multiply it
            otherwise (Keskar et al. 2019); before all other options.

    Raises:
        TypeError: a value of another type.
        ValueError: a value out of range, or NaN.
    """

    do_sample: bool = True
    top_k: int | None = None
    top_p: float | None = None
    temperature: float = 1.0
    freq_penalty: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("top_p", "temperature", "freq_penalty", "repetition_penalty"):
            value = getattr(self, name)
            if value is None and name == "top_p":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
                raise TypeError(f"{name} is a number, got {type(value).__name__} {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{name} is a finite number, got {value}")
        if self.top_k is not None and integer(self.top_k, "top_k") < 1:
            raise ValueError(f"top_k is at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is above 0 and at most 1, got {self.top_p}")
        if self.temperature < 0:
            raise ValueError(f"temperature is not negative, got {self.temperature}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty is above 0, and 1 for none; got {self.repetition_penalty}")

    @property
    def reads_text(self) -> bool:
        """Whether the tokens so far decide what is drawn."""
        return self.freq_penalty != 0 or self.repetition_penalty != 1

    def pick(
        self,
        logits: Float[Tensor, "batch vocab"],
        tokens: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> Int[Tensor, " batch"]:
        """Return one token for each prompt.

        Args:
            logits: of the position that is continued, [batch vocab].
            tokens: the text so far [batch pos], which the penalties count.
            attention_mask: [batch pos], 0 at padding, which is not counted.

        Raises:
            ValueError: a penalty without tokens, or logits of another shape, or NaN.
        """
        if logits.ndim != 2:
            raise ValueError(f"logits are [batch vocab], of one position of each prompt; got {tuple(logits.shape)}")
        wrong = torch.where(logits.isnan().any(-1))[0].tolist()
        if wrong:
            raise ValueError(
                f"the logits of prompt {wrong[0]} are NaN, so no token is the likeliest: look at the weights, the "
                "hooks in place and the precision"
            )
        greedy = not self.do_sample or self.temperature == 0
        if not greedy:
            # In half precision the probabilities of many unlikely tokens would be rounded to zero.
            logits = at_least_single(logits)
        logits = self._penalized(logits, 1.0 if greedy else self.temperature, tokens, attention_mask)
        if greedy:
            return logits.argmax(-1)
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if self.top_p is not None:
            logits = _nucleus(logits, self.top_p)
        return torch.multinomial(logits.softmax(-1), 1)[:, 0]

    def _penalized(
        self, logits: Tensor, temperature: float, tokens: Tensor | None, attention_mask: Tensor | None
    ) -> Float[Tensor, "batch vocab"]:
        """Divide by the temperature, and lower the logits of tokens that have occurred."""
        if not self.reads_text:
            return logits / temperature
        if tokens is None:
            raise ValueError(
                "freq_penalty counts the tokens so far, and repetition_penalty looks for them: give tokens [batch pos]"
            )
        once = torch.ones_like(tokens) if attention_mask is None else attention_mask
        counts = torch.zeros_like(logits).scatter_add_(1, tokens, once.to(logits.dtype))
        weaker = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
        return torch.where(counts > 0, weaker, logits) / temperature - self.freq_penalty * counts


def _nucleus(logits: Float[Tensor, "batch vocab"], top_p: float) -> Float[Tensor, "batch vocab"]:
    """Keep the likeliest tokens up to the one that brings their probability to `top_p` (Holtzman et al. 2020)."""
    ordered, order = logits.sort(-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
    before[:, 0] = 0.0
    ordered = ordered.masked_fill(before >= top_p, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def sample_logits(
    final_logits: Float[Tensor, "batch vocab"],
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    freq_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    tokens: Int[Tensor, "batch pos"] | None = None,
) -> Int[Tensor, " batch"]:
    """Return a token drawn from each row of logits.

    Args:
        final_logits: of the position that is continued, [batch vocab].
        top_k, top_p, temperature, freq_penalty, repetition_penalty: as in `Sampling`.
        tokens: the text so far, [batch pos], which the penalties count.

    Raises:
        ValueError: an option is out of range.
    """
    return Sampling(True, top_k, top_p, temperature, freq_penalty, repetition_penalty).pick(final_logits, tokens)


def decode_steps(
    model: LanguageModel,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"] | None,
    max_new_tokens: int,
    sampling: Sampling,
    eos_token_ids: tuple[int, ...] = (),
    use_past_kv_cache: bool = True,
    verbose: bool = False,
    all_steps: bool = False,
    logits_of_steps: list[Float[Tensor, "batch vocab"]] | None = None,
) -> Iterator[Int[Tensor, " batch"]]:
    """Yield the next token of every prompt, step by step.

    After an end-of-sequence token a prompt is padded with that token; the loop ends when all prompts have one.

    Args:
        model: called once per step, with its hooks.
        tokens, attention_mask: the prompts, padded on the left if at all.
        max_new_tokens: steps at most.
        sampling: how tokens are drawn.
        eos_token_ids: tokens that end a prompt; none by default.
        use_past_kv_cache: run only the new token at each step; False runs the whole text. Positions of interventions
            mean the same either way.
        verbose: show a progress bar.
        all_steps: go on to `max_new_tokens` when all prompts have ended.
        logits_of_steps: a list to which the logits of each step are appended, as the model gave them.
    """
    # The last new token needs no room in the cache: it is not run through the model.
    size = tokens.shape[0], tokens.shape[1] + max(max_new_tokens - 1, 0)
    cache = model.new_kv_cache(*size) if use_past_kv_cache else None
    if attention_mask is None:
        # An explicit mask, so that the model does not infer padding from the tokens.
        attention_mask = torch.ones_like(tokens)
    written: list[Tensor] = []
    ranks = getattr(model, "ranks", None)  # each may have drawn another token

    def text() -> tuple[Tensor, Tensor]:
        """Return the tokens so far and their mask."""
        return torch.cat((tokens, *written), 1), F.pad(attention_mask, (0, len(written)), value=1)

    unread: Tensor = tokens
    unread_mask: Tensor | None = attention_mask
    finished = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    ends = torch.tensor(eos_token_ids, dtype=tokens.dtype, device=tokens.device)
    for _ in tqdm(range(max_new_tokens), disable=not verbose, desc="generating", leave=False):
        again = None
        if cache is None or model.outgrows(cache):
            cache = None if cache is None else model.new_kv_cache(*size)
            unread, unread_mask = text()
            again = tokens.shape[1]
        with torch.no_grad(), reading_again(again):
            logits = model(
                unread,
                return_type="logits",
                past_kv_cache=cache,
                attention_mask=unread_mask,
                logits_to_keep=1,
            )
        if logits_of_steps is not None:
            logits_of_steps.append(logits[:, -1].clone())
        chosen = sampling.pick(logits[:, -1], *(text() if sampling.reads_text else ()))
        if ranks is not None:
            chosen = ranks.from_first(chosen)
        if eos_token_ids:
            chosen = torch.where(finished, ends[0], chosen)
            finished |= torch.isin(chosen, ends)
        unread, unread_mask = chosen[:, None], None
        written.append(unread)
        yield chosen
        if eos_token_ids and not all_steps and bool(finished.all()):
            return
