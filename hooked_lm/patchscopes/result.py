"""What the model reads in hidden states that were put into another prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_lm._support.integers import integer

if TYPE_CHECKING:
    from hooked_lm.plotting import Figure

__all__ = ["Patchscope", "ReadingPrecision"]

# A line of `Patchscope.rows`.
Row = dict[str, str | int | float | None]


@dataclass(frozen=True, eq=False)
class Patchscope:
    """What the target prompt is continued by, with the hidden state of each source prompt in it.

    Attributes:
        site: whose activations were moved.
        source_layers: from which they were taken.
        target_layers: into which they were put; empty where each went into its own layer.
        top_tokens: the likeliest next tokens, [prompt source target top]; target has size 1 where each state went into
            its own layer.
        top_log_probs: their log-probabilities in nats.
        answer_log_probs: of each prompt's answer, [prompt source target]; None where there are no answers.
        base_tokens: the likeliest next tokens of the target prompt as it is, [top].
        texts: continuations, by prompt, source and target; None where none were asked for.
        strings: the tokens that occur, as texts; None without a tokenizer.
    """

    site: str
    source_layers: tuple[int, ...]
    target_layers: tuple[int, ...]
    top_tokens: Int[Tensor, "prompt source target top"]
    top_log_probs: Float[Tensor, "prompt source target top"]
    answer_log_probs: Float[Tensor, "prompt source target"] | None
    base_tokens: Int[Tensor, " top"]
    texts: tuple[tuple[tuple[str, ...], ...], ...] | None
    strings: dict[int, str] | None

    def word(self, token: int) -> str:
        """Return a token as text; as its number without a tokenizer.

        Args:
            token: one that occurs.
        """
        return str(token) if self.strings is None else self.strings[token]

    def read(
        self, prompt: int = 0, source_layer: int | None = None, target_layer: int | None = None
    ) -> list[tuple[str, float]]:
        """Return the likeliest tokens of one reading with their probabilities.

        Args:
            prompt: its number.
            source_layer: by default the last that was read.
            target_layer: by default the first; None also where each state went into its own layer.

        Raises:
            ValueError: there is no such reading.
        """
        source = self.source_layers[-1] if source_layer is None else source_layer
        if source not in self.source_layers or not 0 <= integer(prompt, "prompt") < len(self.top_tokens):
            raise ValueError(
                f"no reading of prompt {prompt} at layer {source}: there are prompts 0 to {len(self.top_tokens) - 1} "
                f"and layers {list(self.source_layers)}"
            )
        if target_layer is not None and target_layer not in (self.target_layers or (source,)):
            raise ValueError(f"no state was put into layer {target_layer}: {list(self.target_layers or (source,))}")
        column = 0 if target_layer is None or not self.target_layers else self.target_layers.index(target_layer)
        row = self.source_layers.index(source)
        tokens, scores = (
            self.top_tokens[prompt, row, column].tolist(),
            self.top_log_probs[prompt, row, column].exp().tolist(),
        )
        return [(self.word(token), score) for token, score in zip(tokens, scores, strict=True)]

    def top(self, k: int = 5, prompt: int = 0) -> list[Row]:
        """Return the `k` readings of a prompt that are the surest of their token, or of the answer where there is one.

        Args:
            k: how many.
            prompt: its number.

        Raises:
            ValueError: `k` is below 1, or there is no such prompt.
        """
        if integer(k, "k") < 1:
            raise ValueError(f"k is at least 1, got {k}")
        if not 0 <= integer(prompt, "prompt") < len(self.top_tokens):
            raise ValueError(f"no prompt {prompt}: there are 0 to {len(self.top_tokens) - 1}")
        key = "probability" if self.answer_log_probs is None else "answer"
        rows = [row for row in self.rows() if row["prompt"] == prompt]
        return sorted(rows, key=lambda row: -float(row[key] or 0))[:k]

    def rows(self) -> list[Row]:
        """Return a dictionary for each reading; `pandas.DataFrame` takes them.

        Keys: `prompt`, `source`, `target` (layers), `token`, `probability`, `answer` (its probability, or None), `text`
        (the continuation, or None).
        """
        found: list[Row] = []
        for prompt, source, target in (
            torch.cartesian_prod(*map(torch.arange, self.top_tokens.shape[:3])).view(-1, 3).tolist()
        ):
            layer = self.source_layers[source]
            answer = (
                None if self.answer_log_probs is None else float(self.answer_log_probs[prompt, source, target].exp())
            )
            found.append(
                {
                    "prompt": prompt,
                    "source": layer,
                    "target": self.target_layers[target] if self.target_layers else layer,
                    "token": self.word(int(self.top_tokens[prompt, source, target, 0])),
                    "probability": float(self.top_log_probs[prompt, source, target, 0].exp()),
                    "answer": answer,
                    "text": None if self.texts is None else self.texts[prompt][source][target],
                }
            )
        return found

    def table(self, prompt: int = 0) -> str:
        """Return a prompt's readings as text: a row for each source layer, a column for each target layer.

        Args:
            prompt: its number.

        Raises:
            ValueError: there is no such prompt.
        """
        if not 0 <= integer(prompt, "prompt") < len(self.top_tokens):
            raise ValueError(f"no prompt {prompt}: there are 0 to {len(self.top_tokens) - 1}")
        heads = [f"into {layer}" for layer in self.target_layers] or ["into the same"]
        n_rows, n_columns = len(self.source_layers), len(heads)
        cells = [[self._cell(prompt, row, column) for column in range(n_columns)] for row in range(n_rows)]
        width = max(len(cell) for cell in [*heads, *(one for line in cells for one in line)])
        lines = ["from layer  " + "  ".join(head.ljust(width) for head in heads)]
        for layer, line in zip(self.source_layers, cells, strict=True):
            lines.append(f"{layer:>10}  " + "  ".join(cell.ljust(width) for cell in line))
        lines.append(f"without a patch: {self.word(int(self.base_tokens[0]))!r}")
        return "\n".join(line.rstrip() for line in lines)

    def _cell(self, prompt: int, row: int, column: int) -> str:
        token = self.word(int(self.top_tokens[prompt, row, column, 0]))
        return f"{token!r} {float(self.top_log_probs[prompt, row, column, 0].exp()):.2f}"

    def __str__(self) -> str:
        return self.table()

    def figure(self, prompt: int = 0, title: str = "") -> Figure:
        """Return a prompt's readings as a table of tokens on the colour of their probability. Needs the extra `viz`.

        Args:
            prompt: its number.
            title: of the figure.

        Raises:
            ValueError: there is no such prompt.
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import lens_table

        if not 0 <= integer(prompt, "prompt") < len(self.top_tokens):
            raise ValueError(f"no prompt {prompt}: there are 0 to {len(self.top_tokens) - 1}")
        tokens = [[[self.word(one) for one in cell] for cell in row] for row in self.top_tokens[prompt].tolist()]
        columns = [f"into {layer}" for layer in self.target_layers] or ["into the same layer"]
        rows = [f"from {layer}" for layer in self.source_layers]
        figure = lens_table(tokens, self.top_log_probs[prompt].exp(), rows, columns, title)
        return figure.update_xaxes(title="target layer")


@dataclass(frozen=True, eq=False)
class ReadingPrecision:
    """How often a hidden state tells the model's own next token, read by a patchscope and by the logit lens.

    Attributes:
        layers: whose states were read.
        patchscope, lens: the share of prompts, [layer].
        patchscope_interval, lens_interval: ends of the bootstrap intervals, [end layer].
        n_prompts: how many.
    """

    layers: tuple[int, ...]
    patchscope: Float[Tensor, " layer"]
    lens: Float[Tensor, " layer"]
    patchscope_interval: Float[Tensor, "end layer"]
    lens_interval: Float[Tensor, "end layer"]
    n_prompts: int

    def top(self, k: int = 5) -> list[tuple[int, float, float]]:
        """Return the `k` layers at which the patchscope is most precise, as (layer, patchscope, lens).

        Args:
            k: how many.

        Raises:
            ValueError: `k` is below 1.
        """
        if integer(k, "k") < 1:
            raise ValueError(f"k is at least 1, got {k}")
        order = self.patchscope.argsort(descending=True, stable=True)[:k].tolist()
        return [(self.layers[i], float(self.patchscope[i]), float(self.lens[i])) for i in order]

    def rows(self) -> list[Row]:
        """Return a dictionary for each layer: `layer`, `patchscope`, `lens`; `pandas.DataFrame` takes them."""
        return [
            {"layer": layer, "patchscope": float(one), "lens": float(other)}
            for layer, one, other in zip(self.layers, self.patchscope, self.lens, strict=True)
        ]

    def table(self) -> str:
        """Return the layers as text, with 95 % intervals."""
        lines = [f"layer  patchscope           logit lens    ({self.n_prompts} prompts)"]
        for i, layer in enumerate(self.layers):
            one, other = (
                f"{float(share[i]):.2f} ({float(ends[0, i]):.2f} to {float(ends[1, i]):.2f})"
                for share, ends in ((self.patchscope, self.patchscope_interval), (self.lens, self.lens_interval))
            )
            lines.append(f"{layer:>5}  {one:<20} {other}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def figure(self, title: str = "") -> Figure:
        """Return both precisions over layers as curves. Needs the extra `viz`.

        Args:
            title: of the figure.

        Raises:
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import layer_curves

        labels = [str(layer) for layer in self.layers]
        curves = {"patchscope": self.patchscope, "logit lens": self.lens}
        return layer_curves(curves, labels, axis="share of prompts", title=title)
