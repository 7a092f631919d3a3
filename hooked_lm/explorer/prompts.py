"""What the explorer's page sends: prompts, answers and places, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from hooked_lm._support.plain_data import PlainData
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.tokenization import Tokenizer
from hooked_lm.tracing import Trace

__all__ = ["ExplorableModel", "Request", "example_prompts", "spelled"]

# Positions that maps can show.
MOST_TOKENS = 64


class ExplorableModel(Protocol):
    """A model that runs traces: a `HookedTransformer`, or one on a server."""

    cfg: HookedTransformerConfig

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    def to_tokens(self, input: str, prepend_bos: bool | None = None, /) -> Tensor: ...

    def trace(self) -> Trace: ...


class Request:
    """The fields of a request, read by name.

    Args:
        model: that the request is about.
        fields: as they came.
    """

    def __init__(self, model: ExplorableModel, fields: PlainData) -> None:
        self.model, self.fields = model, fields

    def tokens(self, name: str = "prompt") -> list[int]:
        """Return the tokens of a prompt.

        Args:
            name: of the field.

        Raises:
            ValueError: there is no text, it has too many tokens, or the model has no such tokens.
        """
        text = self._text(name)
        cfg = self.model.cfg
        if self.model.tokenizer is None:
            words = text.replace(",", " ").split()
            if not words or not all(word.isdecimal() and len(word) < 10 for word in words):
                raise ValueError(f"the {name} of a model without a tokenizer is token numbers: 0 5 9 12")
            found = [int(word) for word in words]
            if max(found) >= cfg.d_vocab:
                raise ValueError(f"token {max(found)} in the {name}: this model has tokens 0 to {cfg.d_vocab - 1}")
        else:
            if not text:
                raise ValueError(f"the {name} is empty")
            # The model's own reading cuts a text that is too long.
            self._check_length(name, len(self.model.tokenizer.encode(text, add_special_tokens=False)))
            found = self.model.to_tokens(text)[0].tolist()
        self._check_length(name, len(found))
        return found

    def _check_length(self, name: str, n_tokens: int) -> None:
        most = min(MOST_TOKENS, self.model.cfg.n_ctx)
        if n_tokens > most:
            raise ValueError(f"the {name} has {n_tokens} tokens; the page shows {most} at most")

    def answer(self, name: str) -> int:
        """Return the one token of an answer.

        Args:
            name: of the field.

        Raises:
            ValueError: it is no token, or several; the message lists them.
        """
        text = self._text(name)
        if self.model.tokenizer is None:
            if not text.strip().isdecimal() or int(text) >= self.model.cfg.d_vocab_out:
                raise ValueError(
                    f"the {name} is a token number from 0 to {self.model.cfg.d_vocab_out - 1}, got {text!r}"
                )
            return int(text)
        if not text:
            raise ValueError(f"the {name} is empty")
        found = self.model.to_tokens(text, False)[0].tolist()
        if len(found) != 1:
            pieces = ", ".join(map(repr, spelled(self.model, found)))
            spaced = self.model.to_tokens(" " + text, False)[0].tolist()
            hint = f"; {' ' + text!r} is one" if len(spaced) == 1 and not text.startswith(" ") else ""
            raise ValueError(f"the {name} {text!r} is {len(found)} tokens ({pieces}), and an answer is one{hint}")
        return int(found[0])

    def position(self, n_tokens: int) -> int:
        """Return the position that was chosen; the last by default.

        Args:
            n_tokens: of the prompt.

        Raises:
            ValueError: the prompt has no such position.
        """
        return self.number("pos", -n_tokens, n_tokens - 1, n_tokens - 1) % n_tokens

    def number(self, name: str, least: int, most: int, default: int | None = None) -> int:
        """Return a whole number.

        Args:
            name: of the field.
            least, most: the range.
            default: where there is none.

        Raises:
            ValueError: it is no whole number, or out of range.
        """
        value = self.fields.get(name, default)
        if value is None and default is not None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{name} is a whole number from {least} to {most}, got {value!r}")
        return value

    def real(self, name: str, furthest: float) -> float:
        """Return a number.

        Args:
            name: of the field.
            furthest: from 0.

        Raises:
            ValueError: it is no number, or too far from 0.
        """
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= furthest:
            raise ValueError(f"{name} is a number from {-furthest:g} to {furthest:g}, got {value!r}")
        return float(value)

    def heads(self) -> list[tuple[int, int]]:
        """Return the heads that were chosen, as (layer, head).

        Raises:
            ValueError: one is not the model's.
        """
        given, cfg = self.fields.get("heads", []), self.model.cfg
        fits = isinstance(given, list) and all(
            isinstance(one, list)
            and len(one) == 2
            and all(isinstance(part, int) and not isinstance(part, bool) for part in one)
            and 0 <= one[0] < cfg.n_layers
            and 0 <= one[1] < cfg.n_heads
            for one in given
        )
        if not fits:
            raise ValueError(f"heads are pairs [layer, head], of {cfg.n_layers} layers with {cfg.n_heads} heads")
        return sorted({(one[0], one[1]) for one in given})

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """Return one of several words.

        Args:
            name: of the field.
            choices: the words.

        Raises:
            ValueError: it is none of them.
        """
        value = self.fields.get(name)
        if value not in choices:
            raise ValueError(f"{name} is one of {', '.join(choices)}, got {value!r}")
        return str(value)

    def _text(self, name: str) -> str:
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise ValueError(f"{name} is a text, got {type(value).__name__}")
        return value


def spelled(model: ExplorableModel, tokens: Sequence[int]) -> list[str]:
    """Return tokens as texts; as numbers for a model without a tokenizer.

    Args:
        model: whose tokens they are.
        tokens: the tokens.
    """
    tokenizer = model.tokenizer
    return [str(token) if tokenizer is None else str(tokenizer.decode([token])) for token in tokens]


def example_prompts(model: ExplorableModel) -> list[PlainData]:
    """Return examples that the page offers: prompts with a second prompt and two answers.

    Each is there only if the model reads all of it: answers of one token, prompts of the same length.

    Args:
        model: that will read them.
    """
    found = []
    for example in _EXAMPLES if model.tokenizer is not None else _NUMBERS:
        request = Request(model, dict(example))
        try:
            lengths = {len(request.tokens(name)) for name in ("prompt", "corrupted")}
            answers = {request.answer(name) for name in ("answer", "wrong")}
        except ValueError:
            continue
        if len(lengths) == 1 and len(answers) == 2:
            found.append(dict(example))
    return found


_EXAMPLES: tuple[dict[str, str], ...] = (
    {
        "title": "Indirect object",
        "prompt": "When Mary and John went to the store, John gave a drink to",
        "corrupted": "When Mary and John went to the store, Mary gave a drink to",
        "answer": " Mary",
        "wrong": " John",
    },
    {
        "title": "Capital",
        "prompt": "Q: What is the capital of France?\nA:",
        "corrupted": "Q: What is the capital of Spain?\nA:",
        "answer": " Paris",
        "wrong": " Madrid",
    },
    {
        "title": "Opposites from examples",
        "prompt": "hot: cold, big: small, up:",
        "corrupted": "hot: cold, big: small, good:",
        "answer": " down",
        "wrong": " bad",
    },
)
_NUMBERS: tuple[dict[str, str], ...] = (
    {
        "title": "A repeat",
        "prompt": "0 5 9 12 33 7 21 5 9 12 33 7",
        "corrupted": "0 5 9 12 33 7 44 5 9 12 33 7",
        "answer": "21",
        "wrong": "44",
    },
)
