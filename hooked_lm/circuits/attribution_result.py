"""What direct logit attribution returns: the parts of a logit, with their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["LogitAttribution", "Split"]

Split = Literal["component", "head", "neuron", "source"]


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """What each part adds to a logit, or to a difference of two.

    Attributes:
        values: the parts, [component batch]. They sum to `logit`. First the grid, if the split has one, then the parts
            that were not split.
        logit: the sum of the parts, as the model computed it, [batch].
        split: `"component"`, `"head"`, `"neuron"` or `"source"`.
        layers: the layers that were split, in the order of the grid.
        grid_shape: the lengths of the grid's axes: [layer head], [layer neuron] or [layer head key].
        rest_labels: the labels of the parts after the grid.
        off: the largest difference between sum and logit.
    """

    values: Float[Tensor, "component batch"]
    logit: Float[Tensor, " batch"]
    split: str
    layers: tuple[int, ...]
    grid_shape: tuple[int, ...]
    rest_labels: tuple[str, ...]
    off: float

    @property
    def grid(self) -> Float[Tensor, "layer *part batch"]:
        """The split parts: [layer head batch], [layer neuron batch] or [layer head key batch].

        Raises:
            ValueError: the split is by component, which has no grid.
        """
        if not self.grid_shape:
            raise ValueError("a split by component has no grid: look at values and labels")
        return torch.unflatten(self.values[: self._grid_size()], 0, self.grid_shape)

    @property
    def rest(self) -> Float[Tensor, "component batch"]:
        """The parts that were not split: embeddings, other layers' outputs, biases. In the order of `rest_labels`."""
        return self.values[self._grid_size() :]

    @property
    def labels(self) -> list[str]:
        """A name for each part: `"embed"`, `"0_attn_out"`, `"L0H1"`, `"L0N7"`, `"L0H1<3"` (source 3), `"0_b_O"`."""
        return [self.label(index) for index in range(len(self.values))]

    def label(self, index: int) -> str:
        """Return the name of one part.

        Raises:
            IndexError: there is no such part.
        """
        if not 0 <= index < len(self.values):
            raise IndexError(f"no part {index}: there are parts 0-{len(self.values) - 1}")
        if index >= self._grid_size():
            return self.rest_labels[index - self._grid_size()]
        *outer, last = self.grid_shape
        index, inner = divmod(index, last)
        if self.split == "source":
            layer, head = divmod(index, outer[1])
            return f"L{self.layers[layer]}H{head}<{inner}"
        return f"L{self.layers[index]}{'H' if self.split == 'head' else 'N'}{inner}"

    def top(self, k: int = 10, prompt: int | None = None) -> list[tuple[str, float]]:
        """Return the `k` parts that matter most, up or down, as (label, value); fewer where there are fewer.

        Args:
            k: how many parts.
            prompt: whose values count; by default the mean over prompts.

        Raises:
            ValueError: `k` is below 1, or there is no such prompt.
        """
        if k < 1 or (prompt is not None and not 0 <= prompt < len(self.logit)):
            raise ValueError(f"k is at least 1 and prompt in 0-{len(self.logit) - 1}; got k={k}, prompt={prompt}")
        values = self.values.mean(-1) if prompt is None else self.values[:, prompt]
        best = values.abs().argsort(descending=True, stable=True)[:k].tolist()
        return [(self.label(index), float(values[index])) for index in best]

    def table(self, k: int = 10, prompt: int | None = None) -> str:
        """Return the `k` parts that matter most, the sum of all others, and the logit, as text.

        Args:
            k: how many parts.
            prompt: whose values count; by default the mean over prompts.

        Raises:
            ValueError: as `top`.
        """
        top = self.top(k, prompt)
        logit = float(self.logit.mean() if prompt is None else self.logit[prompt])
        lines = [*top, ("all others", logit - sum(value for _, value in top)), ("sum", logit)]
        width = max(len(label) for label, _ in lines)
        return "\n".join(f"{label:<{width}}  {value:+.4f}" for label, value in lines)

    def __str__(self) -> str:
        return self.table()

    def _grid_size(self) -> int:
        return len(self.values) - len(self.rest_labels)
