"""Greater-than: "The war lasted from the year 1732 to the year 17" -> a number above 32.

Source: Hanna et al. 2023, "How does GPT-2 compute greater-than?". The corrupted prompt begins in a year that ends in
01, after which every other number is possible. Combinations of event, century and year are held out. The tokenizer has
to split a year in two: " 17" and "32".
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm.tasks.split import is_held_out
from hooked_lm.tasks.task_set import Example, Task, TaskSet
from hooked_lm.tasks.words import EVENTS
from hooked_lm.tokenization import Tokenizer, single_token

__all__ = [
    "CENTURIES",
    "CORRUPTED_YEAR",
    "NAME",
    "ONE_IN",
    "TASK",
    "TEMPLATE",
    "YEARS",
    "are_held_out",
    "document",
    "lexicon",
    "make_examples",
    "probability_above",
]

NAME = "greater_than"
ONE_IN = 5
TEMPLATE = "The {event} lasted from the year {century}{year} to the year {century}"
CENTURIES = tuple(str(century) for century in range(11, 20))
# The years that training starts from: at least one later year is left.
YEARS = tuple(f"{year:02}" for year in range(1, 99))
CORRUPTED_YEAR = "01"


def are_held_out(event: str, century: str, year: str) -> bool:
    """Return whether training never shows an event that starts in this year."""
    return year != CORRUPTED_YEAR and is_held_out(NAME, event, century, year, one_in=ONE_IN)


def document(rng: random.Random) -> str:
    """Return a training document: a sentence with any later year of the century."""
    combination = rng.choice(EVENTS), rng.choice(CENTURIES), rng.choice(YEARS)
    while are_held_out(*combination):
        combination = rng.choice(EVENTS), rng.choice(CENTURIES), rng.choice(YEARS)
    return f"{_fill(*combination)}{rng.randint(int(combination[2]) + 1, 99):02}."


def make_examples(n: int, seed: int = 0) -> TaskSet:
    """Return examples that begin in a held-out year, 02 to 98; the answer is the next year, the wrong one the same.

    Args:
        n, seed: how many examples, and which.
    """
    rng = random.Random(seed)
    combinations = [
        (event, century, year)
        for event in EVENTS
        for century in CENTURIES
        for year in YEARS
        if are_held_out(event, century, year)
    ]
    return TaskSet(NAME, tuple(_example(*rng.choice(combinations)) for _ in range(n)))


def _example(event: str, century: str, year: str) -> Example:
    return Example(
        prompt=_fill(event, century, year),
        answer=f"{int(year) + 1:02}",
        wrong=year,
        corrupted=_fill(event, century, CORRUPTED_YEAR),
        corrupted_answer=None,
    )


def probability_above(
    logits: Float[Tensor, "batch vocab"], examples: TaskSet, tokenizer: Tokenizer
) -> Float[Tensor, " batch"]:
    """Return the probability that each prompt's last position gives to the years after its own.

    Args:
        logits: of the last position.
        examples: the prompts of these logits; `wrong` is the year that each begins in.
        tokenizer: the model's; "00" to "99" are one token each.

    Raises:
        ValueError: a number is several tokens, or logits and examples differ in number.
    """
    if len(logits) != len(examples):
        raise ValueError(f"there are {len(examples)} examples, but logits of {len(logits)} prompts")
    numbers = torch.tensor([single_token(tokenizer, f"{year:02}") for year in range(100)], device=logits.device)
    begin = torch.tensor([int(year) for year in examples.wrong], device=logits.device)
    later = torch.arange(100, device=logits.device) > begin[:, None]
    return logits.softmax(-1)[:, numbers].where(later, 0.0).sum(-1)


def _fill(event: str, century: str, year: str) -> str:
    return TEMPLATE.format(event=event, century=century, year=year)


def lexicon() -> Iterator[str]:
    """Yield texts with every word of the task."""
    yield from (_fill(event, CENTURIES[0], YEARS[0]) for event in EVENTS)
    yield from (_fill(EVENTS[0], CENTURIES[0], f"{year:02}") + "." for year in range(100))
    yield from (f" {year:02}" for year in range(10, 21))


TASK = Task(NAME, "a year later than the one that is given", document, make_examples, lexicon)
