"""Labelled examples, sets of them, and tasks, which make both examples and text to train on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_lm import metrics
from hooked_lm.hooked_model import HookedModel
from hooked_lm.metrics import Metric
from hooked_lm.tokenization import Tokenizer, single_token, tokenize

__all__ = ["Example", "Task", "TaskSet", "TaskTokens", "check_choice", "check_count"]


@dataclass(frozen=True)
class Example:
    """A prompt with a known answer, beside a corrupted prompt that differs in what the answer depends on.

    Attributes:
        prompt: the clean prompt, without the answer.
        answer: the answer to `prompt`, with the leading space it has in the text.
        wrong: an answer that would be right if one detail of the prompt were different.
        corrupted: the prompt with this detail changed; as many tokens as the clean prompt.
        corrupted_answer: the corrupted prompt's answer; None where it has no single one.
    """

    prompt: str
    answer: str
    wrong: str
    corrupted: str
    corrupted_answer: str | None


@dataclass(frozen=True, eq=False)
class TaskTokens:
    """A task set as tokens: `clean` and `corrupted` [batch pos], BOS included; `answers` and `wrong` [batch]."""

    clean: Int[Tensor, "batch pos"]
    corrupted: Int[Tensor, "batch pos"]
    answers: Int[Tensor, " batch"]
    wrong: Int[Tensor, " batch"]

    def metrics(self) -> dict[str, Metric]:
        """Return what a `Score` is the mean of, by its fields: metrics of the clean prompts' last position.

        They have a maker and arguments, so that a trace or a sweep can take them, also to another machine.
        """
        return {
            "top": metrics.accuracy(self.answers),
            "preferred": metrics.preferred(self.answers, self.wrong),
            "logit_diff": metrics.logit_diff(self.answers, self.wrong),
            "probability": metrics.prob(self.answers),
        }


@dataclass(frozen=True)
class TaskSet:
    """Labelled examples of one task.

    Attributes:
        task: its name.
        examples: at least one.

    Raises:
        ValueError: there are no examples.
    """

    task: str
    examples: tuple[Example, ...]

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError(f"a set of {self.task} examples needs at least one example")

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def clean(self) -> list[str]:
        """The clean prompts."""
        return [example.prompt for example in self.examples]

    @property
    def corrupted(self) -> list[str]:
        """The corrupted prompts."""
        return [example.corrupted for example in self.examples]

    @property
    def answers(self) -> list[str]:
        """The clean prompts' answers."""
        return [example.answer for example in self.examples]

    @property
    def wrong(self) -> list[str]:
        """The wrong answers."""
        return [example.wrong for example in self.examples]

    def check(self, tokenizer: Tokenizer) -> None:
        """Check that a tokenizer suits the examples: answers of one token, pairs of prompts of one length.

        Raises:
            ValueError: the tokenizer does not suit; the message names the example.
        """
        for index, example in enumerate(self.examples):
            for answer in (example.answer, example.wrong, example.corrupted_answer):
                if answer is not None:
                    self._check_answer(tokenizer, index, answer)
            clean, corrupted = (_length(tokenizer, prompt) for prompt in (example.prompt, example.corrupted))
            if clean != corrupted:
                raise ValueError(
                    f"{self.task} example {index}: the clean prompt {example.prompt!r} is {clean} tokens and the "
                    f"corrupted one {example.corrupted!r} is {corrupted}; patching needs the same length: choose words "
                    "that are one token each in this tokenizer"
                )

    def _check_answer(self, tokenizer: Tokenizer, index: int, answer: str) -> None:
        try:
            single_token(tokenizer, answer)
        except ValueError as error:
            raise ValueError(f"{self.task} example {index}: an answer has to be one token, but {error}") from error

    def groups(self, tokenizer: Tokenizer) -> list[TaskSet]:
        """Return the examples as sets with prompts of one length each, the shortest first."""
        lengths = [_length(tokenizer, prompt) for prompt in self.clean]
        return [
            TaskSet(self.task, tuple(e for e, length in zip(self.examples, lengths, strict=True) if length == one))
            for one in sorted(set(lengths))
        ]

    def tokens(self, model: HookedModel) -> TaskTokens:
        """Return the prompts and answers as tokens, on the model's device.

        Args:
            model: a `HookedTransformer` with a tokenizer; BOS is prepended as the model does by default.

        Raises:
            ValueError: the model has no tokenizer, it does not suit (see `check`), or the prompts are of several
                lengths.
        """
        tokenizer = model.tokenizer
        if tokenizer is None:
            raise ValueError("this model has no tokenizer, and the examples are text: set one with set_tokenizer")
        self.check(tokenizer)
        lengths = sorted({_length(tokenizer, prompt) for prompt in self.clean})
        if len(lengths) > 1:
            raise ValueError(
                f"the {self.task} prompts have {lengths[0]} to {lengths[-1]} tokens, and one batch takes one length: "
                "use groups(tokenizer), which gives one set for each length"
            )
        device, bos = model.cfg.device or "cpu", model.cfg.default_prepend_bos
        clean, corrupted = (
            tokenize(tokenizer, prompts, bos, "right").tokens.to(device) for prompts in (self.clean, self.corrupted)
        )
        answers, wrong = (
            torch.tensor([single_token(tokenizer, word) for word in words], device=device)
            for words in (self.answers, self.wrong)
        )
        return TaskTokens(clean, corrupted, answers, wrong)


def _length(tokenizer: Tokenizer, prompt: str) -> int:
    return tokenize(tokenizer, prompt, False, "right").tokens.shape[1]


@dataclass(frozen=True)
class Task:
    """A task: text to train on, and labelled examples that training never shows.

    Attributes:
        name: the name that `get_task` finds it by.
        summary: the question that it asks, in one line.
        document: draws one training document.
        make_examples: `(n, seed, **options)` to a `TaskSet`; the options are the task module's.
        lexicon: yields texts that together hold every word of the task's text, in each form that occurs.
    """

    name: str
    summary: str
    document: Callable[[random.Random], str]
    make_examples: Callable[..., TaskSet]
    lexicon: Callable[[], Iterator[str]]

    def documents(self, seed: int = 0) -> Iterator[str]:
        """Yield training documents without end; the same seed gives the same ones."""
        rng = random.Random(seed)
        while True:
            yield self.document(rng)

    def examples(self, n: int = 100, seed: int = 0, **options: object) -> TaskSet:
        """Return `n` labelled examples, made of combinations that no training document has.

        Args:
            n: how many examples.
            seed: the same seed gives the same examples.
            options: of the task, as its module's `make_examples` describes them.

        Raises:
            ValueError: `n` is not positive, or an option has an unknown value.
        """
        check_count(n)
        return self.make_examples(n, seed, **options)


def check_count(n: int) -> None:
    """Check that `n` is a number of examples.

    Raises:
        ValueError: it is below 1.
    """
    if n < 1:
        raise ValueError(f"the number of examples is 1 or more, not {n}")


def check_choice(what: str, given: object, known: tuple[str, ...]) -> None:
    """Check that a choice is one of the known ones.

    Args:
        what: what is chosen; for the message.
        given: the choice.
        known: the possible choices.

    Raises:
        ValueError: it is not; the message lists the known ones.
    """
    if given not in known:
        raise ValueError(f"unknown {what} {given!r}: it is one of {', '.join(map(repr, known))}")
