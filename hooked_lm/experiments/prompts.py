"""Examples that a tokenizer suits, of one length: what is patched position by position."""

from __future__ import annotations

from hooked_lm.tasks import TaskSet
from hooked_lm.tokenization import Tokenizer


def aligned(examples: TaskSet, tokenizer: Tokenizer, n: int | None = None) -> TaskSet:
    """Return the examples of the commonest length among those that a tokenizer suits, `n` at most.

    A tokenizer suits an example if its answers are one token each, and both its prompts have one length. One that was
    not made for the task, like GPT-2's, may not know every name.

    Raises:
        ValueError: it suits none; the message says what is wrong with the first.
    """
    suited = tuple(example for example in examples.examples if _suits(TaskSet(examples.task, (example,)), tokenizer))
    if not suited:
        examples.check(tokenizer)
    longest = max(TaskSet(examples.task, suited).groups(tokenizer), key=len)
    return TaskSet(examples.task, longest.examples[:n])


def _suits(example: TaskSet, tokenizer: Tokenizer) -> bool:
    try:
        example.check(tokenizer)
    except ValueError:
        return False
    return True
