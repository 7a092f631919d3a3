"""Labels of examples, which of the examples are held out, and control tasks on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_lm._support.integers import integer
from hooked_lm.probing.division import Entries, hold_out, listed, numbered

__all__ = ["Label", "LabelledExamples", "Labels", "encode_labels"]

Label = str | int
Labels = Sequence[str] | Sequence[int] | Tensor | np.ndarray

# Random functions that are drawn for one control task before it is given up: each has to use two classes at least.
_MOST_DRAWS = 100


@dataclass(frozen=True, eq=False)
class LabelledExamples:
    """Labels of examples, and their division into examples that are fitted and examples that are held out.

    Attributes:
        classes: the labels that occur, in order.
        labels: of each example, as an index into `classes`, [example].
        groups: of each example; a group is held out as a whole, [example].
        held_out: which examples are held out, [example].
        controls: labels of each control task, [control example]; no control task without types.
        recurring: which held-out examples are of a type that is also fitted, [example]; none without types.
    """

    classes: tuple[Label, ...]
    labels: Int[Tensor, " example"]
    groups: Int[Tensor, " example"]
    held_out: Bool[Tensor, " example"]
    controls: Int[Tensor, "control example"]
    recurring: Bool[Tensor, " example"]

    @classmethod
    def divided(
        cls,
        labels: Labels,
        groups: Entries | None = None,
        types: Entries | None = None,
        *,
        n_controls: int = 3,
        test_share: float = 0.25,
        seed: int = 0,
    ) -> LabelledExamples:
        """Hold out random groups of examples, and draw the control tasks.

        A control task gives every type of example a label, drawn at random from the labels of the examples. It cannot
        be solved from what examples of different types have in common, only by knowing each type (Hewitt and Liang
        2019, "Designing and Interpreting Probes with Control Tasks").

        Args:
            labels: strings or whole numbers, one for each example.
            groups: of the examples; those of one group are held out together or not at all. By default each example is
                a group of its own.
            types: of the examples, such as their tokens; None for no control task.
            n_controls: how many control tasks are drawn.
            test_share: the share of the examples to hold out, between 0 and 1; whole groups are added until it is
                reached.
            seed: of the division and the control tasks.

        Raises:
            ValueError: fewer than two classes, also among the examples that are fitted; fewer than two groups on either
                side; lists of different lengths; or types that say nothing: a single one, or more than half of the
                held-out examples of types that are never fitted.
        """
        classes, encoded = encode_labels(labels)
        n_examples = len(encoded)
        group_of = torch.arange(n_examples) if groups is None else numbered(groups, n_examples, "groups")
        generator = torch.Generator().manual_seed(seed)
        held_out = hold_out(group_of, test_share, generator)
        if len(encoded[~held_out].unique()) < 2:
            raise ValueError(
                f"all {int((~held_out).sum())} examples to fit have the label {classes[int(encoded[~held_out][0])]!r}: "
                "give more examples, smaller groups, or another seed"
            )
        controls, recurring = encoded.new_empty(0, n_examples), torch.zeros_like(held_out)
        if types is not None:
            if integer(n_controls, "n_controls") < 1:
                raise ValueError(f"n_controls is 1 or more, got {n_controls}; for no control task give no types")
            type_of = numbered(types, n_examples, "types")
            recurring = _recurring(type_of, held_out)
            controls = torch.stack([_control(encoded, type_of, held_out, generator) for _ in range(n_controls)])
        return cls(classes, encoded, group_of, held_out, controls, recurring)

    def __len__(self) -> int:
        return len(self.labels)


def encode_labels(labels: Labels) -> tuple[tuple[Label, ...], Int[Tensor, " example"]]:
    """Return the labels that occur, in order, and each example's as an index into them, [example].

    Args:
        labels: strings or whole numbers, one for each example. True and False count as 1 and 0.

    Raises:
        ValueError: they are neither strings nor whole numbers, or fewer than two differ.
    """
    given = listed(labels)
    strings = [one for one in given if isinstance(one, str)]
    numbers = [int(one) for one in given if isinstance(one, int)]
    plain: list[str] | list[int] = strings if len(strings) == len(given) else numbers
    if len(plain) != len(given) or not given:
        names = ", ".join(sorted({type(one).__name__ for one in given})) or "none"
        raise ValueError(f"labels are strings or whole numbers, one for each example; got {names}")
    classes: tuple[Label, ...] = tuple(sorted(set(plain)))
    if len(classes) < 2:
        raise ValueError(f"a probe tells labels apart, and all {len(plain)} examples have {classes[0]!r}")
    place = {label: index for index, label in enumerate(classes)}
    return classes, torch.tensor([place[one] for one in plain])


def _recurring(types: Int[Tensor, " example"], held_out: Bool[Tensor, " example"]) -> Bool[Tensor, " example"]:
    if int(types.max()) == 0:
        raise ValueError(
            "all examples are of one type, so that a control task has one label: give types that differ, or types=None"
        )
    recurring = held_out & torch.isin(types, types[~held_out])
    n_recurring, n_held_out = int(recurring.sum()), int(held_out.sum())
    if n_recurring * 2 < n_held_out:
        raise ValueError(
            f"a control task is about types that recur, and {n_recurring} of {n_held_out} held-out examples have a "
            "type that is also fitted: give coarser types, or types=None"
        )
    return recurring


def _control(
    labels: Int[Tensor, " example"],
    types: Int[Tensor, " example"],
    held_out: Bool[Tensor, " example"],
    generator: torch.Generator,
) -> Int[Tensor, " example"]:
    for _ in range(_MOST_DRAWS):
        drawn = torch.randint(len(labels), (int(types.max()) + 1,), generator=generator)
        control = labels[drawn][types]
        if len(control[~held_out].unique()) > 1:
            return control
    raise ValueError(f"{_MOST_DRAWS} control tasks had one label each: the types or the labels are too lopsided")
