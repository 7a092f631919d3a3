"""Relations between words, shown by examples: "old: young, vanish: appear, dark:" -> " light".

A word takes part in several relations, so that " dark" alone has several answers, and the relation of the pairs before
it decides. Queries and answers alike follow a space: so a word is the same token everywhere but at the start. (Todd et
al. 2023, "Function Vectors in Large Language Models", ask in this way.)

Held out are pairs of neighbours: for each relation, about one in eight (word, next word) never stand next to each other
in training. Every example ends on such a pair.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

from hooked_lm.tasks.split import is_held_out
from hooked_lm.tasks.task_set import Example, Task, TaskSet, check_choice
from hooked_lm.tasks.words import RELATIONS

__all__ = [
    "CORRUPTIONS",
    "MOST_PAIRS",
    "NAME",
    "ONE_IN",
    "TASK",
    "are_held_out",
    "document",
    "lexicon",
    "make_examples",
]

NAME = "relations"
ONE_IN = 8
CORRUPTIONS = ("relation", "shuffled", "query")
MOST_PAIRS = 12
# French has about as many words as the others together.
_WEIGHTS = {"opposite": 3, "plural": 2, "past": 3, "french": 5, "capital": 2}


@cache
def are_held_out(relation: str, before: str, query: str) -> bool:
    """Return whether training never shows this query right after this word in this relation."""
    return is_held_out(NAME, relation, before, query, one_in=ONE_IN)


def document(rng: random.Random) -> str:
    """Return a training document: one to twelve pairs of one relation."""
    (relation,) = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))
    words = _draw(rng, relation, rng.randint(1, MOST_PAIRS), ())
    return _pairs(relation, words) + "."


def make_examples(
    n: int, seed: int = 0, relation: str | None = None, shots: int = 5, corruption: str | None = None
) -> TaskSet:
    """Return examples whose last pair before the query never stood before it in training.

    Args:
        n, seed: how many examples, and which.
        relation: one of `RELATIONS`; None: each in turn.
        shots: pairs before the query, 0 to 11. With 0 every query occurs in training, and none is held out.
        corruption: `"relation"`, the default where there are shots: the shots show another relation of the query word,
            whose answer is then right. `"shuffled"`: the shots' answers change places, and no answer is right.
            `"query"`, the default without shots: another query.

    The wrong answer is the query's own in another relation; with `"query"`, and where it has none, that of another
    query in the same relation.

    Raises:
        ValueError: an unknown relation or corruption, or shots that do not allow it.
    """
    corruption = corruption or ("relation" if shots else "query")
    check_choice("corruption", corruption, CORRUPTIONS)
    if relation is not None:
        check_choice("relation", relation, tuple(RELATIONS))
    least = {"relation": 1, "shuffled": 2, "query": 0}[corruption]
    if not least <= shots < MOST_PAIRS:
        raise ValueError(f"corruption {corruption!r} needs {least} to {MOST_PAIRS - 1} shots, not {shots}")
    rng = random.Random(seed)
    asked = [relation] if relation is not None else list(RELATIONS)
    return TaskSet(NAME, tuple(_example(rng, asked[i % len(asked)], shots, corruption) for i in range(n)))


def _example(rng: random.Random, relation: str, shots: int, corruption: str) -> Example:
    query = rng.choice([word for word in RELATIONS[relation] if corruption != "relation" or _others(relation, word)])
    before = _shots_before(rng, relation, query, shots)
    answer = RELATIONS[relation][query]
    other_query = rng.choice([w for w in RELATIONS[relation] if w not in (query, answer, *before)])
    others = _others(relation, query)
    other = rng.choice(others) if others else None
    wrong = RELATIONS[other][query] if other else RELATIONS[relation][other_query]
    corrupted_answer: str | None = None
    if corruption == "relation":
        assert other is not None
        corrupted = _prompt(other, _shots_before(rng, other, query, shots), query)
        corrupted_answer = wrong
    elif corruption == "shuffled":
        corrupted = _shuffled(rng, relation, before) + f", {query}:"
    else:
        corrupted = _prompt(relation, before, other_query)
        wrong = corrupted_answer = RELATIONS[relation][other_query]
    return Example(
        prompt=_prompt(relation, before, query),
        answer=f" {answer}",
        wrong=f" {wrong}",
        corrupted=corrupted,
        corrupted_answer=None if corrupted_answer is None else f" {corrupted_answer}",
    )


def _others(relation: str, word: str) -> list[str]:
    """The other relations that a word takes part in with another answer."""
    answer = RELATIONS[relation][word]
    return [other for other in RELATIONS if other != relation and RELATIONS[other].get(word, answer) != answer]


def _shots_before(rng: random.Random, relation: str, query: str, shots: int) -> list[str]:
    """Words to show before a query; training never shows the last one right before it."""
    if shots == 0:
        return []
    taken = (query, RELATIONS[relation][query])
    lasts = [
        word
        for word, answer in RELATIONS[relation].items()
        if are_held_out(relation, word, query) and word not in taken and answer not in taken
    ]
    last = rng.choice(lasts)
    return [*_draw(rng, relation, shots - 1, (*taken, last, RELATIONS[relation][last])), last]


def _draw(rng: random.Random, relation: str, n: int, taken: tuple[str, ...]) -> list[str]:
    """Draw words of a relation: no taken word, no answer to another, no held-out neighbours."""
    table = RELATIONS[relation]
    words: list[str] = []
    used = set(taken)
    pool = list(table)
    while len(words) < n:
        word = rng.choice(pool)
        if word in used or table[word] in used or (words and are_held_out(relation, words[-1], word)):
            continue
        words.append(word)
        used |= {word, table[word]}
    return words


def _pairs(relation: str, words: list[str]) -> str:
    return ", ".join(f"{word}: {RELATIONS[relation][word]}" for word in words)


def _prompt(relation: str, words: list[str], query: str) -> str:
    return f"{_pairs(relation, words)}, {query}:" if words else f"{query}:"


def _shuffled(rng: random.Random, relation: str, words: list[str]) -> str:
    """The pairs of these words with their answers moved round, so that none is with its own."""
    answers = [RELATIONS[relation][word] for word in words]
    by = rng.randrange(1, len(words))
    return ", ".join(f"{w}: {a}" for w, a in zip(words, answers[by:] + answers[:by], strict=True))


def lexicon() -> Iterator[str]:
    """Yield texts with every word of the task."""
    for table in RELATIONS.values():
        yield from (f"{word}: {answer}, {word}:" for word, answer in table.items())


TASK = Task(NAME, "what the pairs before have in common, applied to a word", document, make_examples, lexicon)
