"""Plain sentences from templates, so that a model that learns the tasks has also seen their words elsewhere.

A document has one name at most, so that no pair of names occurs together.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from hooked_lm.tasks.words import CAPITALS, NAMES, OBJECTS, OPPOSITES, PAST, PLACES, PLURALS

__all__ = ["SENTENCES", "document", "lexicon"]

SENTENCES = (
    "{name} went to the {place} and found a {object}.",
    "{name} was born in {capital}, the largest city in {country}.",
    "{name} left the {object} at the {place} and went home.",
    "The {noun} was {adjective}, but the {other_noun} was {opposite}.",
    "There were many {nouns} near the {place}.",
    "They {past} for a long time, and then they {other_past}.",
    "In the year {year} there were {number} {nouns} in {country}.",
    "The train from {capital} was late again.",
    "Nobody in {country} has seen the {noun}.",
    "The {place} was full of {nouns}, and a {object} was on the table.",
)
# The opposites that describe a thing: the list up to the first pair that does not.
_ADJECTIVES = tuple(OPPOSITES)[: tuple(OPPOSITES).index("north")]


def document(rng: random.Random) -> str:
    """Return one to four sentences about one person and one country."""
    name, country = rng.choice(NAMES), rng.choice(tuple(CAPITALS))
    sentences = rng.sample(SENTENCES, rng.randint(1, 4))
    return " ".join(_fill(rng, sentence, name, country) for sentence in sentences)


def _fill(rng: random.Random, sentence: str, name: str, country: str) -> str:
    noun, other_noun = rng.sample(tuple(PLURALS), 2)
    past, other_past = rng.sample(tuple(PAST.values()), 2)
    adjective = rng.choice(_ADJECTIVES)
    return sentence.format(
        name=name,
        country=country,
        capital=CAPITALS[country],
        place=rng.choice(PLACES),
        object=rng.choice(OBJECTS),
        noun=noun,
        other_noun=other_noun,
        nouns=PLURALS[rng.choice(tuple(PLURALS))],
        past=past,
        other_past=other_past,
        adjective=adjective,
        opposite=OPPOSITES[adjective],
        year=rng.randint(1100, 1999),
        number=rng.randint(10, 99),
    )


def lexicon() -> Iterator[str]:
    """Yield texts with every word of the sentences."""
    rng = random.Random(0)
    for sentence in SENTENCES:
        text = _fill(rng, sentence, NAMES[0], "France")
        yield from (text, f" {text}")
    yield from NAMES
    yield from (f" {word}" for table in (PLURALS, PAST, OPPOSITES, CAPITALS) for pair in table.items() for word in pair)
    yield from (f" {number}" for number in range(10, 100))
