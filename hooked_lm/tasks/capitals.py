"""Capitals: "Q: What is the capital of France?\\nA:" -> " Paris".

A model can know only the capitals it was trained on. Held out are therefore ways of asking: for each country
training never uses one of the four questions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from hooked_lm.tasks.split import bucket
from hooked_lm.tasks.task_set import Example, Task, TaskSet
from hooked_lm.tasks.words import CAPITALS

__all__ = ["COUNTRIES", "NAME", "QUESTIONS", "TASK", "document", "held_out_question", "lexicon", "make_examples"]

NAME = "capitals"
QUESTIONS = (
    "What is the capital of {country}?",
    "Which city is the capital of {country}?",
    "Can you tell me the capital of {country}?",
    "What do we call the capital city of {country}?",
)
COUNTRIES = tuple(CAPITALS)


def held_out_question(country: str) -> int:
    """Return the index in `QUESTIONS` of the one that training never asks about a country."""
    return bucket(NAME, country, buckets=len(QUESTIONS))


def document(rng: random.Random) -> str:
    """Return a training document: one to five questions about different countries, each with its answer."""
    countries = rng.sample(COUNTRIES, rng.randint(1, 5))
    return "\n".join(f"{_ask(country, _seen_question(rng, country))} {CAPITALS[country]}" for country in countries)


def make_examples(
    n: int = len(COUNTRIES), seed: int = 0, question: int | None = None, shots: int = 0, held_out: bool = True
) -> TaskSet:
    """Return examples about different countries, each asked as training never asks about it.

    Args:
        n: how many examples.
        seed: decides which countries, and in which order. The corrupted prompt asks the same about another country.
        question: an index into `QUESTIONS`; then only countries for which that question is held out. None: any.
        shots: the number of questions with answers before.
        held_out: False allows questions that training may have asked word for word.

    Raises:
        ValueError: there is no such question, or there are fewer countries.
    """
    if question is not None and not 0 <= question < len(QUESTIONS):
        raise ValueError(f"there is no question {question} about capitals: they are 0 to {len(QUESTIONS) - 1}")
    if not 0 <= shots < 10:
        raise ValueError(f"shots are 0 to 9, not {shots}")
    countries = [one for one in COUNTRIES if question is None or not held_out or held_out_question(one) == question]
    if n > len(countries):
        raise ValueError(f"there are {len(countries)} countries to ask about in this way, not {n}")
    rng = random.Random(seed)
    return TaskSet(NAME, tuple(_example(rng, country, question, shots) for country in rng.sample(countries, n)))


def _example(rng: random.Random, country: str, question: int | None, shots: int) -> Example:
    other, *before = rng.sample([one for one in COUNTRIES if one != country], 1 + shots)
    asked = held_out_question(country) if question is None else question
    turns = "".join(f"{_ask(one, _seen_question(rng, one))} {CAPITALS[one]}\n" for one in before)
    return Example(
        prompt=turns + _ask(country, asked),
        answer=f" {CAPITALS[country]}",
        wrong=f" {CAPITALS[other]}",
        corrupted=turns + _ask(other, asked),
        corrupted_answer=f" {CAPITALS[other]}",
    )


def _seen_question(rng: random.Random, country: str) -> int:
    return rng.choice([index for index in range(len(QUESTIONS)) if index != held_out_question(country)])


def _ask(country: str, question: int) -> str:
    return f"Q: {QUESTIONS[question].format(country=country)}\nA:"


def lexicon() -> Iterator[str]:
    """Yield texts with every word of the task."""
    yield from (f"{_ask(country, 0)} {capital}\n" for country, capital in CAPITALS.items())
    yield from (_ask(COUNTRIES[0], index) for index in range(len(QUESTIONS)))


TASK = Task(NAME, "the capital of a country, as question and answer", document, make_examples, lexicon)
