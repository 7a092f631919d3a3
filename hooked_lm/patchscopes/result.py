"""What patchscopes give: the tokens that follow a target prompt with a source's state in it, for pairs of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooked_lm._support.integers import at_least_one, integer
from hooked_lm.patching.statistics import bootstrap_interval
from hooked_lm.patchscopes.target import TargetPrompt

if TYPE_CHECKING:
    from hooked_lm.plotting import Figure

__all__ = ["Patchscope", "ScopeCell"]

# A line of `Patchscope.rows`.
Row = dict[str, str | int | float]


class ScopeCell(NamedTuple):
    """A pair of layers for one source prompt. `pandas.DataFrame` takes a list of them.

    Attributes:
        source_layer, target_layer: where the state was taken, and where it was put.
        prompt: the number of the source prompt.
        token: the likeliest next token.
        probability: of that token.
        text: the continuation of the target prompt; empty where none was generated.
    """

    source_layer: int
    target_layer: int
    prompt: int
    token: str
    probability: float
    text: str


@dataclass(frozen=True, eq=False)
class Patchscope:
    """What the model says after the target prompt, for each pair of layers and each source prompt.

    Attributes:
        site: `"resid_pre"`, `"resid_mid"` or `"resid_post"`.
        target: the prompt and the position that states were put into.
        source_layers, target_layers: the blocks; of a grid every pair is a cell, otherwise each source layer with the
            target layer in the same place.
        is_grid: whether every pair is a cell.
        source_tokens: the token that each state was taken at, [prompt].
        top_tokens: the likeliest next tokens, the likeliest first, [cell prompt top].
        top_log_probs: their log-probabilities in nats, [cell prompt top].
        answers: the token asked about for each prompt, [prompt]; None where none was.
        answer_ranks: how many tokens are likelier, [cell prompt].
        answer_log_probs: its log-probability in nats, [cell prompt].
        new_tokens: the continuation, greedily, [cell prompt new]; None where none was generated.
        texts: the continuations as text, for each cell and prompt.
        strings: every token above as a string; None without a tokenizer.
    """

    site: str
    target: TargetPrompt
    source_layers: tuple[int, ...]
    target_layers: tuple[int, ...]
    is_grid: bool
    source_tokens: Int[Tensor, " prompt"]
    top_tokens: Int[Tensor, "cell prompt top"]
    top_log_probs: Float[Tensor, "cell prompt top"]
    answers: Int[Tensor, " prompt"] | None
    answer_ranks: Int[Tensor, "cell prompt"] | None
    answer_log_probs: Float[Tensor, "cell prompt"] | None
    new_tokens: Int[Tensor, "cell prompt new"] | None
    texts: tuple[tuple[str, ...], ...] | None
    strings: Mapping[int, str] | None

    @property
    def cells(self) -> tuple[tuple[int, int], ...]:
        """The pairs (source layer, target layer), in the order of the axis `cell`; of a grid source by source."""
        if not self.is_grid:
            return tuple(zip(self.source_layers, self.target_layers, strict=True))
        return tuple((source, target) for source in self.source_layers for target in self.target_layers)

    @property
    def n_prompts(self) -> int:
        """How many source prompts there are."""
        return len(self.source_tokens)

    def grid(self, values: Shaped[Tensor, " cell *rest"]) -> Shaped[Tensor, " source target *rest"]:
        """Return values of cells with an axis for either layer.

        Args:
            values: one entry for each cell.

        Raises:
            ValueError: the cells are no grid.
        """
        if not self.is_grid:
            raise ValueError("each source layer has one target layer here: give target_layers for a grid")
        return torch.unflatten(values, 0, (len(self.source_layers), len(self.target_layers)))

    @property
    def precision(self) -> Float[Tensor, " cell"]:
        """The share of prompts whose answer is the likeliest next token (precision@1).

        Raises:
            ValueError: no answers were given.
        """
        return self._hits().mean(-1)

    def precision_interval(
        self, confidence: float = 0.95, n_resamples: int = 1000, seed: int = 0
    ) -> tuple[Float[Tensor, " cell"], Float[Tensor, " cell"]]:
        """Return the ends of the bootstrap interval of the precision; prompts are drawn.

        Args:
            confidence, n_resamples, seed: as for `patching.bootstrap_interval`.

        Raises:
            ValueError: no answers were given, or fewer than two prompts.
        """
        return bootstrap_interval(self._hits(), confidence, n_resamples, seed)

    def _hits(self) -> Float[Tensor, "cell prompt"]:
        if self.answer_ranks is None:
            raise ValueError("no answers were given: say answers=, a token for each prompt")
        return (self.answer_ranks == 0).to(self.top_log_probs.dtype)

    def str_token(self, token: int) -> str:
        """Return a token that occurs here as a string; its number where the model has no tokenizer."""
        return str(token) if self.strings is None else self.strings[token]

    def top(self, k: int = 5, prompt: int | None = None) -> list[ScopeCell]:
        """Return the `k` cells whose answer is likeliest; without answers those that are surest of their token.

        Args:
            k: how many; fewer where there are fewer.
            prompt: the cells of one source prompt; by default of all.

        Raises:
            ValueError: `k` is below 1, or there is no such prompt.
        """
        at_least_one(k, "k")
        by = self.top_log_probs[..., 0] if self.answer_log_probs is None else self.answer_log_probs
        chosen = range(self.n_prompts) if prompt is None else [self._prompt(prompt)]
        places = [(cell, one) for cell in range(len(self.cells)) for one in chosen]
        return [self._cell(*place) for place in sorted(places, key=lambda place: -float(by[place]))[:k]]

    def _prompt(self, prompt: int) -> int:
        if not 0 <= integer(prompt, "prompt") < self.n_prompts:
            raise ValueError(f"no prompt {prompt}: there are prompts 0-{self.n_prompts - 1}")
        return integer(prompt, "prompt")

    def _cell(self, cell: int, prompt: int) -> ScopeCell:
        token, probability = self.top_tokens[cell, prompt, 0], self.top_log_probs[cell, prompt, 0].exp()
        text = "" if self.texts is None else self.texts[cell][prompt]
        return ScopeCell(*self.cells[cell], prompt, self.str_token(int(token)), float(probability), text)

    def rows(self) -> list[Row]:
        """Return a dictionary for each cell and prompt; `pandas.DataFrame` takes them.

        Keys: `source_layer`, `target_layer`, `prompt`, `source_token`, `top`, `top_prob`, and where they were asked for
        `answer`, `answer_rank`, `answer_prob`, and `text`.
        """
        return [self._row(cell, prompt) for cell in range(len(self.cells)) for prompt in range(self.n_prompts)]

    def _row(self, cell: int, prompt: int) -> Row:
        read = self._cell(cell, prompt)
        row: Row = {
            "source_layer": read.source_layer,
            "target_layer": read.target_layer,
            "prompt": prompt,
            "source_token": self.str_token(int(self.source_tokens[prompt])),
            "top": read.token,
            "top_prob": read.probability,
        }
        if self.answers is not None and self.answer_ranks is not None and self.answer_log_probs is not None:
            row["answer"] = self.str_token(int(self.answers[prompt]))
            row["answer_rank"] = int(self.answer_ranks[cell, prompt])
            row["answer_prob"] = float(self.answer_log_probs[cell, prompt].exp())
        if self.texts is not None:
            row["text"] = read.text
        return row

    def table(self, prompt: int = 0) -> str:
        """Return a prompt's readings as text: of a grid a line for each source layer and a column for each target.

        Otherwise a line for each pair, with the continuation and, where there are answers, the precision over all
        prompts.

        Args:
            prompt: the number of the source prompt.

        Raises:
            ValueError: no such prompt.
        """
        prompt = self._prompt(prompt)
        read = [self._cell(cell, prompt) for cell in range(len(self.cells))]
        said = [f"{one.token!r} {one.probability:.0%}" for one in read]
        if self.is_grid:
            width = len(self.target_layers)
            lines = [["source", *(f"into {layer}" for layer in self.target_layers)]]
            lines += [
                [str(layer), *said[row * width : (row + 1) * width]] for row, layer in enumerate(self.source_layers)
            ]
        else:
            asked = self.answer_ranks is not None
            lines = [["layers", "next token", *(["precision"] if asked else []), *(["text"] if self.texts else [])]]
            for cell, one in enumerate(read):
                precise = [f"{float(self.precision[cell]):.2f}"] if asked else []
                text = [repr(one.text)] if self.texts else []
                lines.append([f"{one.source_layer} -> {one.target_layer}", said[cell], *precise, *text])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        head = f"{self.site} of {self.str_token(int(self.source_tokens[prompt]))!r} in {str(self.target)!r}"
        return "\n".join([head, *("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)])

    def __str__(self) -> str:
        return self.table()

    def figure(self, prompt: int | None = None, title: str = "") -> Figure:
        """Return the likeliest next tokens, in the colour of their probability. Needs the extra `viz`.

        Of a grid the source layers are rows and the target layers columns; otherwise each pair is a row, and each
        prompt a column.

        Args:
            prompt: the number of the source prompt; by default the first of a grid, and all otherwise.
            title: of the figure; by default what is shown.

        Raises:
            ValueError: no such prompt.
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import lens_table

        if self.is_grid:
            chosen = [self._prompt(0 if prompt is None else prompt)]
            at = self.grid(torch.arange(len(self.cells)))
            tokens, log_probs = self.top_tokens[at, chosen[0]], self.top_log_probs[at, chosen[0]]
            rows = [f"from {layer}" for layer in self.source_layers]
            columns, axis = [f"into {layer}" for layer in self.target_layers], "target layer"
            source = repr(self.str_token(int(self.source_tokens[chosen[0]])))
        else:
            chosen = list(range(self.n_prompts)) if prompt is None else [self._prompt(prompt)]
            tokens, log_probs = self.top_tokens[:, chosen], self.top_log_probs[:, chosen]
            rows = [f"{source} -> {target}" for source, target in self.cells]
            columns = [self.str_token(int(self.source_tokens[one])) for one in chosen]
            axis, source = "source token", f"{len(chosen)} prompts"
        words = [[[self.str_token(one) for one in cell] for cell in row] for row in tokens.tolist()]
        # The whole target prompt may be longer than the figure is wide.
        gap = repr(self.target.strings[self.target.pos])
        named = title or f"{self.site} of {source}, in the place of {gap} at position {self.target.pos} of the target"
        figure = lens_table(words, log_probs.exp(), rows, columns, title=named)
        return figure.update_xaxes(title_text=axis)
