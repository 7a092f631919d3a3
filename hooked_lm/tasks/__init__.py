"""Tasks with known answers: text to train a small model on, and labelled examples that the text never shows.

task = get_task("ioi")
examples = task.examples(100)
examples.clean[0], examples.answers[0], examples.corrupted[0]
tokens = task.examples(100, template=0).groups(model.tokenizer)[0].tokens(model)

`register_task` adds a task of your own, which `get_task` then finds.
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
    "register_task",
    "score",
    "word_tokenizer",
]

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK for module in (ioi, repeated_tokens, capitals, relations, greater_than)
}


def register_task(task: Task) -> None:
    """Add a task, which `get_task` then finds under its name; its words join `lexicon`.

    The mixture that the bundled models were trained on, `TaskBatches`, stays as it is.

    Args:
        task: its `name` must not be taken.

    Raises:
        TypeError: it is no `Task`.
        ValueError: the name is empty or taken.
    """
    if not isinstance(task, Task):
        raise TypeError(f"a task to register is a hooked_lm.tasks.Task, got {type(task).__name__}")
    if not task.name or task.name in TASKS:
        why = "taken" if task.name else "an empty name"
        raise ValueError(f"the task {task.name!r} cannot be registered: it is {why}")
    TASKS[task.name] = task


def get_task(name: str) -> Task:
    """Return a task by its name.

    Raises:
        ValueError: there is no such task; the message lists all tasks.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: the tasks are {', '.join(TASKS)}")
    return TASKS[name]


def lexicon() -> Iterator[str]:
    """Yield texts with every word of every task and of the prose, in each form: a tokenizer's vocabulary."""
    for task in TASKS.values():
        yield from task.lexicon()
    yield from prose.lexicon()
