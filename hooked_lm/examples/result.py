"""The highest activations of units in a corpus, with the tokens around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

from hooked_lm._support.integers import integer, is_integer

if TYPE_CHECKING:
    from hooked_lm.plotting import HtmlFigure

__all__ = ["ActivatingExample", "MaxActivating"]

# A line of `MaxActivating.rows`.
Row = dict[str, str | int | float]


@dataclass(frozen=True)
class ActivatingExample:
    """A token on which a unit is active, and the tokens around it.

    Attributes:
        unit: the unit's name.
        value: its activation.
        text: the number of the text in the corpus, from 0.
        pos: the position of the token in the text as the model reads it, BOS included.
        tokens: this token and those around it, in order.
        strings: the same as strings; numbers for a model without a tokenizer.
        activations: the unit's activation on each; NaN on BOS.
        index: which of them is this token.
    """

    unit: str
    value: float
    text: int
    pos: int
    tokens: tuple[int, ...]
    strings: tuple[str, ...]
    activations: tuple[float, ...]
    index: int

    def __str__(self) -> str:
        shown = [_on_a_line(string) for string in self.strings]
        shown[self.index] = f"«{shown[self.index]}»"
        return "".join(shown)


@dataclass(frozen=True, eq=False)
class MaxActivating:
    """The highest activations of each unit in a corpus, the highest first; of equal ones the first in the corpus.

    Where the corpus has fewer than k tokens, values are -inf and texts and positions -1. In contexts, tokens are -1
    beyond the text's ends, and activations are NaN there and on BOS.

    Attributes:
        site: the full hook name.
        units: their names: `"feature 17"`, `"head 3"`, `"head 3 feature 5"`, `"direction 0"`.
        values: [unit k].
        texts: the number of the text in the corpus, from 0, [unit k].
        positions: in the text as the model reads it, BOS included, [unit k].
        context_tokens: the token in the middle and those around it, [unit k context].
        context_values: the unit's activations on them, [unit k context].
        strings: every token of a context as a string; None without a tokenizer.
        n_texts, n_tokens: how many were read; BOS and padding are not counted.
    """

    site: str
    units: tuple[str, ...]
    values: Float[Tensor, "unit k"]
    texts: Int[Tensor, "unit k"]
    positions: Int[Tensor, "unit k"]
    context_tokens: Int[Tensor, "unit k context"]
    context_values: Float[Tensor, "unit k context"]
    strings: Mapping[int, str] | None
    n_texts: int
    n_tokens: int

    def top(self, k: int | None = None, unit: int | str = 0) -> list[ActivatingExample]:
        """Return the `k` highest examples of a unit; fewer where there are fewer.

        Args:
            k: how many; by default all that were kept.
            unit: its index in `units`, or its name.

        Raises:
            ValueError: `k` is below 1, or there is no such unit.
        """
        if k is not None and integer(k, "k") < 1:
            raise ValueError(f"k is at least 1, got {k}")
        row = self._index(unit)
        kept = int((self.texts[row] >= 0).sum())
        return [self._example(row, rank) for rank in range(kept if k is None else min(k, kept))]

    def _index(self, unit: int | str) -> int:
        if isinstance(unit, str) and unit in self.units:
            return self.units.index(unit)
        if is_integer(unit) and 0 <= integer(unit, "unit") < len(self.units):
            return integer(unit, "unit")
        raise ValueError(f"no unit {unit!r}: there are 0-{len(self.units) - 1}, such as {self.units[-1]!r}")

    def _example(self, row: int, rank: int) -> ActivatingExample:
        tokens, values = self.context_tokens[row, rank], self.context_values[row, rank]
        there = tokens >= 0
        inside = tuple(tokens[there].tolist())
        return ActivatingExample(
            unit=self.units[row],
            value=float(self.values[row, rank]),
            text=int(self.texts[row, rank]),
            pos=int(self.positions[row, rank]),
            tokens=inside,
            strings=tuple(str(token) if self.strings is None else self.strings[token] for token in inside),
            activations=tuple(values[there].tolist()),
            index=int(there[: len(tokens) // 2].sum()),
        )

    def rows(self) -> list[Row]:
        """Return a dictionary for each example of each unit; `pandas.DataFrame` takes them.

        Keys: `unit`, `rank` (from 0), `value`, `text`, `pos`, `token`, `context`.
        """
        return [
            {
                "unit": example.unit,
                "rank": rank,
                "value": example.value,
                "text": example.text,
                "pos": example.pos,
                "token": example.strings[example.index],
                "context": str(example),
            }
            for unit in range(len(self.units))
            for rank, example in enumerate(self.top(unit=unit))
        ]

    def table(self, k: int = 10, unit: int | str = 0) -> str:
        """Return a unit's highest examples as text: the activation, the text's number, and the token in its context.

        Args:
            k, unit: as for `top`.

        Raises:
            ValueError: as `top`.
        """
        lines = [f"{self.units[self._index(unit)]} at {self.site}"]
        lines += [f"{example.value:>8.3f}  {example.text:>6}  {example}" for example in self.top(k, unit)]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def figure(self, k: int = 10, unit: int | str = 0, title: str = "") -> HtmlFigure:
        """Return a unit's highest examples, a line each, every token on the colour of its activation.

        A mark without colour ends an example. Needs the extra `viz`.

        Args:
            k, unit: as for `top`.
            title: of the figure; by default the unit and its site.

        Raises:
            ValueError: as `top`, or the corpus has no tokens.
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import coloured_tokens

        examples = self.top(k, unit)
        if not examples:
            raise ValueError("there is nothing to draw: the corpus has no tokens besides BOS and padding")
        strings, values = list[str](), list[float]()
        for example in examples:
            strings += [_on_a_line(string) for string in example.strings] + ["\n"]
            values += [*example.activations, float("nan")]
        name = f"{examples[0].unit} at {self.site}"
        return coloured_tokens(strings[:-1], values[:-1], unit="activation", title=title or name)


def _on_a_line(string: str) -> str:
    return string.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥")
