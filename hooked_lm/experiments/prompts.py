"""Examples that suit a tokenizer. In one not made for the tasks, like GPT-2's, some words are several tokens."""

from __future__ import annotations

from hooked_lm.tasks import TaskSet
from hooked_lm.tokenization import Tokenizer, single_token

__all__ = ["aligned", "answerable"]


def aligned(examples: TaskSet, tokenizer: Tokenizer, n: int | None = None) -> TaskSet:
    """Return the examples of the commonest length among those that suit a tokenizer, at most `n`.

    An example suits a tokenizer if its answers are one token each and its two prompts have one length, as patching
    position by position needs.

    Args:
        examples: to choose from.
        tokenizer: the model's.
        n: the largest number of examples; None for all.

    Raises:
        ValueError: no example suits; the message says why the first does not.
    """
    suited = tuple(example for example in examples.examples if _suits(TaskSet(examples.task, (example,)), tokenizer))
    if not suited:
        examples.check(tokenizer)
    longest = max(TaskSet(examples.task, suited).groups(tokenizer), key=len)
    return TaskSet(examples.task, longest.examples[:n])


def answerable(examples: TaskSet, tokenizer: Tokenizer, n: int | None = None) -> TaskSet:
    """Return the examples whose answer is one token, whatever the lengths of the prompts, at most `n`.

    Args:
        examples: to choose from.
        tokenizer: the model's.
        n: the largest number of examples; None for all.

    Raises:
        ValueError: there is no such example; the message says why the first is none.
    """
    known = {answer for answer in set(examples.answers) if _is_one_token(tokenizer, answer)}
    suited = tuple(one for one in examples.examples if one.answer in known)
    if not suited:
        examples.check(tokenizer)
    return TaskSet(examples.task, suited[:n])


def _is_one_token(tokenizer: Tokenizer, answer: str) -> bool:
    try:
        single_token(tokenizer, answer)
    except ValueError:
        return False
    return True


def _suits(example: TaskSet, tokenizer: Tokenizer) -> bool:
    try:
        example.check(tokenizer)
    except ValueError:
        return False
    return True
