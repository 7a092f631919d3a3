"""Indirect object identification: "When John and Mary went to the store, John gave a drink to" -> " Mary".

Source: Wang et al. 2022, "Interpretability in the Wild". Two names occur, one comes again, the other is the answer.
Pairs of names are held out: no training sentence has both names of such a pair. (Rows of random tokens, which are part
of the training mixture too, may hold any two tokens.)
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from hooked_lm.tasks.split import is_held_out
from hooked_lm.tasks.task_set import Example, Task, TaskSet, check_choice
from hooked_lm.tasks.words import NAMES, OBJECTS, PLACES

__all__ = [
    "CORRUPTIONS",
    "NAME",
    "ONE_IN",
    "OPENINGS",
    "ORDERS",
    "TASK",
    "TEMPLATES",
    "are_held_out",
    "document",
    "lexicon",
    "make_examples",
]

NAME = "ioi"
ONE_IN = 8
CORRUPTIONS = ("swap", "abc", "unrelated")
ORDERS = ("abba", "baba")

# Every template starts with a word that is no name, so that a name always has a space in front.
TEMPLATES = (
    "When {first} and {second} went to the {place}, {giver} gave a {object} to",
    "After {first} and {second} went to the {place}, {giver} gave a {object} to",
    "Then, {first} and {second} went to the {place}. {giver} gave a {object} to",
    "While {first} and {second} were working at the {place}, {giver} handed a {object} to",
    "Yesterday {first} and {second} met at the {place}, and {giver} offered a {object} to",
    "Friends {first} and {second} found a {object} at the {place}. {giver} gave it to",
    "When {first} and {second} got a {object} at the {place}, {giver} decided to give it to",
    "Then {first} and {second} had a long talk at the {place}. Afterwards {giver} sent a {object} to",
    "As {first} and {second} left the {place}, {giver} showed a {object} to",
    "Because {first} and {second} were alone in the {place}, {giver} brought a {object} to",
)
# Texts before a training sentence, so that names do not always stand at the same positions.
OPENINGS = ("", "", "Today was fine. ", "It was late, and the house was quiet. ", "This is a short story. ")


def are_held_out(one: str, other: str) -> bool:
    """Return whether training never shows these two names in one sentence. Their order does not matter."""
    return is_held_out(NAME, *sorted((one, other)), one_in=ONE_IN)


def document(rng: random.Random) -> str:
    """Return a training document: one sentence with its answer. In one of eight, a third name gives."""
    names = rng.sample(NAMES, 3)
    while any(are_held_out(one, other) for one in names for other in names if one < other):
        names = rng.sample(NAMES, 3)
    giver = names[2] if rng.random() < 1 / 8 else rng.choice(names[:2])
    answer = rng.choice([name for name in names[:2] if name != giver])
    return rng.choice(OPENINGS) + _fill(rng.choice(TEMPLATES), names[0], names[1], giver, *_scene(rng)) + f" {answer}."


def make_examples(
    n: int, seed: int = 0, corruption: str = "swap", order: str | None = None, template: int | None = None
) -> TaskSet:
    """Return examples whose two names never meet in training.

    Args:
        n, seed: how many examples, and which.
        corruption: `"swap"`: the other name gives, and the answer is the other way round. `"abc"`: a third name gives,
            and either name would do. `"unrelated"`: three other names, as in the paper's `p_ABC`.
        order: `"abba"`: the second name gives; `"baba"`: the first name gives; None: each in turn.
        template: an index into `TEMPLATES`; prompts of one template have one length, but for objects of several words.
            None takes each in turn.

    Raises:
        ValueError: an unknown corruption, order or template.
    """
    check_choice("corruption", corruption, CORRUPTIONS)
    if order is not None:
        check_choice("order", order, ORDERS)
    if template is not None and not 0 <= template < len(TEMPLATES):
        raise ValueError(f"there is no IOI template {template}: they are 0 to {len(TEMPLATES) - 1}")
    rng = random.Random(seed)
    pairs = [(one, other) for one in NAMES for other in NAMES if one != other and are_held_out(one, other)]
    return TaskSet(
        NAME,
        tuple(
            _example(
                rng,
                rng.choice(pairs),
                TEMPLATES[(index // 2) % len(TEMPLATES) if template is None else template],
                order or ORDERS[index % 2],
                corruption,
            )
            for index in range(n)
        ),
    )


def _example(rng: random.Random, pair: tuple[str, str], template: str, order: str, corruption: str) -> Example:
    giver, answer = (pair[1], pair[0]) if order == "abba" else pair
    third = rng.choice([name for name in NAMES if name not in pair])
    other_giver = answer if corruption == "swap" else third
    scene = _scene(rng)
    names: tuple[str, ...] = (*pair, other_giver)
    if corruption == "unrelated":
        names = tuple(rng.sample([name for name in NAMES if name not in pair], 3))
    return Example(
        prompt=_fill(template, *pair, giver, *scene),
        answer=f" {answer}",
        wrong=f" {giver}",
        corrupted=_fill(template, names[0], names[1], names[2], *scene),
        corrupted_answer=f" {giver}" if corruption == "swap" else None,
    )


def _scene(rng: random.Random) -> tuple[str, str]:
    return rng.choice(PLACES), rng.choice(OBJECTS)


def _fill(template: str, first: str, second: str, giver: str, place: str, thing: str) -> str:
    return template.format(first=first, second=second, giver=giver, place=place, object=thing)


def lexicon() -> Iterator[str]:
    """Yield texts with every word of the task."""
    yield from (f" {word}." for word in (*NAMES, *PLACES, *OBJECTS))
    yield from OPENINGS
    for template in TEMPLATES:
        text = _fill(template, NAMES[0], NAMES[1], NAMES[0], PLACES[0], OBJECTS[0])
        yield from (text, f" {text}")


TASK = Task(NAME, "who of two people is given something, when the other gives", document, make_examples, lexicon)
