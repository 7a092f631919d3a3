"""Tasks with known answers: text to train a small model on, and labelled examples that the text never shows.

task = get_task("ioi")
examples = task.examples(100)
examples.clean[0], examples.answers[0], examples.corrupted[0]
tokens = task.examples(100, template=0).groups(model.tokenizer)[0].tokens(model)
"""

from __future__ import annotations

from collections.abc import Iterator

from hooked_lm.tasks import capitals, greater_than, ioi, prose, relations, repeated_tokens
from hooked_lm.tasks.mixture import TaskBatches
from hooked_lm.tasks.scoring import Score, score
from hooked_lm.tasks.task_set import Example, Task, TaskSet, TaskTokens
from hooked_lm.tasks.tokenizer import word_tokenizer

__all__ = [
    "TASKS",
    "Example",
    "Score",
    "Task",
    "TaskBatches",
    "TaskSet",
    "TaskTokens",
    "get_task",
    "lexicon",
    "score",
    "word_tokenizer",
]

TASKS = {module.TASK.name: module.TASK for module in (ioi, repeated_tokens, capitals, relations, greater_than)}


def get_task(name: str) -> Task:
    """Return a task by its name.

    Raises:
        ValueError: there is no such task; the message lists those there are.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: the tasks are {', '.join(TASKS)}")
    return TASKS[name]


def lexicon() -> Iterator[str]:
    """Yield texts with every word of every task and of the prose, in each form: what a tokenizer has to know."""
    for task in TASKS.values():
        yield from task.lexicon()
    yield from prose.lexicon()
