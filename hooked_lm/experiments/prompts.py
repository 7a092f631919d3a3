"""Examples that a tokenizer suits. One that was not made for the tasks, like GPT-2's, may not know every word."""

from __future__ import annotations

from hooked_lm.tasks import TaskSet
from hooked_lm.tokenization import Tokenizer, single_token


def aligned(examples: TaskSet, tokenizer: Tokenizer, n: int | None = None) -> TaskSet:
    """Return the examples of the commonest length among those that a tokenizer suits, `n` at most.

    A tokenizer suits an example if its answers are one token each, and both its prompts have one length: what patching
    position by position needs.

    Args:
        examples: to choose from.
        tokenizer: the model's.
        n: how many at most; None for all.

    Raises:
        ValueError: it suits none; the message says what is wrong with the first.
    """
    suited = tuple(example for example in examples.examples if _suits(TaskSet(examples.task, (example,)), tokenizer))
    if not suited:
        examples.check(tokenizer)
    longest = max(TaskSet(examples.task, suited).groups(tokenizer), key=len)
    return TaskSet(examples.task, longest.examples[:n])


def answerable(examples: TaskSet, tokenizer: Tokenizer, n: int | None = None) -> TaskSet:
    """Return the examples whose answer is one token, whatever the lengths of the prompts, `n` at most.

    Args:
        examples: to choose from.
        tokenizer: the model's.
        n: how many at most; None for all.

    Raises:
        ValueError: there are none; the message says what is wrong with the first.
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
