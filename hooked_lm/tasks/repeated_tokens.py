"""Repeated random tokens: the token that followed a token the first time follows it again.

As text the tokens are words; as tokens, `circuits.induction.repeated_random_tokens` gives whole rows to evaluate, and
`draw_tokens` rows to train on. Blocks of certain lengths are held out of training: none is ever repeated as a whole.
(Pieces of a longer block, up to `LONGEST_PIECE` tokens, come again in any length.)
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from hooked_lm.tasks.task_set import Example, Task, TaskSet
from hooked_lm.tasks.words import CAPITALS, EVENTS, NAMES, PLACES, RELATIONS

__all__ = [
    "HELD_OUT_LENGTHS",
    "LENGTHS",
    "LONGEST_PIECE",
    "NAME",
    "TASK",
    "TRAINED_LENGTHS",
    "WORDS",
    "document",
    "draw_tokens",
    "lexicon",
    "make_examples",
]

NAME = "repeated_tokens"
# The lengths of a block; the blocks of examples have held-out lengths.
LENGTHS = range(4, 61)
HELD_OUT_LENGTHS = tuple(length for length in LENGTHS if length % 5 == 0)
TRAINED_LENGTHS = tuple(length for length in LENGTHS if length not in HELD_OUT_LENGTHS)
LONGEST_PIECE = 20

WORDS = tuple(
    sorted({*NAMES, *PLACES, *EVENTS, *CAPITALS.values(), *(w for table in RELATIONS.values() for w in table)})
)


def document(rng: random.Random) -> str:
    """Return a training document: a block of random words, twice."""
    block = rng.sample(WORDS, rng.choice(TRAINED_LENGTHS))
    return "".join(f" {word}" for word in block * 2)


def draw_tokens(rng: random.Random, tokens: range, room: int) -> tuple[list[int], list[bool]]:
    """Draw a block of random tokens and repeats of it, at most `room` tokens in all.

    Half the time the block comes again as a whole; otherwise it comes in pieces until the room is full, each from a
    random place and of random length, so that neither a position nor a distance tells what comes next.

    Args:
        rng: the source of randomness.
        tokens: the tokens to draw from.
        room: at least 8.

    Returns:
        The tokens, and for each whether those before it determine it. Blocks have lengths of `TRAINED_LENGTHS`.
    """
    length = rng.choice([length for length in TRAINED_LENGTHS if 2 * length <= room])
    block = rng.sample(tokens, length)
    drawn, determined = list(block), [False] * length
    whole = rng.random() < 0.5
    while len(drawn) < (2 * length if whole else room):
        start = 0 if whole else rng.randrange(length - 1)
        piece = block if whole else block[start : start + rng.randint(2, LONGEST_PIECE)]
        drawn += piece
        determined += [False] + [True] * (len(piece) - 1)
    return drawn[:room], determined[:room]


def make_examples(n: int, seed: int = 0, length: int = 20) -> TaskSet:
    """Return a block of random words and the first half of it again; the answer is the word that follows.

    Args:
        n, seed: how many examples, and which.
        length: words in the block, one of `HELD_OUT_LENGTHS`. In the corrupted prompt the block has another word in
            place of the answer.

    Raises:
        ValueError: a length that is not held out.
    """
    if length not in HELD_OUT_LENGTHS:
        raise ValueError(f"a block of {length} words is not held out of training: {HELD_OUT_LENGTHS} are")
    rng = random.Random(seed)
    return TaskSet(NAME, tuple(_example(rng, length) for _ in range(n)))


def _example(rng: random.Random, length: int) -> Example:
    other, *block = rng.sample(WORDS, length + 1)
    half = length // 2
    answer = block[half]
    clean, corrupted = (
        "".join(f" {w}" for w in (*block[:half], word, *block[half + 1 :], *block[:half])) for word in (answer, other)
    )
    return Example(clean, f" {answer}", f" {other}", corrupted, f" {other}")


def lexicon() -> Iterator[str]:
    """Yield texts with every word of the task."""
    yield from (f" {word}" for word in WORDS)


TASK = Task(NAME, "a run of random words, again", document, make_examples, lexicon)
