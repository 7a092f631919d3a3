"""Scores of a walk's cells: the logits that the metric reads, and no others, of the rows that the walk returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm.hooked_model import HookedModel
from hooked_lm.metrics import Metric, one_number
from hooked_lm.sweep.walk import WalkGroup
from hooked_lm.sweep.watched import watched_score

__all__ = ["FunctionScorer", "MetricScorer", "Scorer"]

# The logits of so many entries are computed at a time.
_MOST_LOGITS = 2**24


class Scorer(Protocol):
    """The scores of cells.

    Attributes:
        base_score: the score of the base run, [score].
        first_read, last_read: the first and the last position that the metric reads.
    """

    base_score: Float[Tensor, " score"]

    @property
    def first_read(self) -> int: ...

    @property
    def last_read(self) -> int: ...

    def scores(
        self, group: WalkGroup, normalized: Float[Tensor, "row pos d_model"]
    ) -> Iterator[tuple[int, Float[Tensor, " score"]]]:
        """Yield each cell's index and scores.

        Args:
            group: the cells.
            normalized: the final, normalised stream of their rows, from `group.start`.
        """
        ...


class MetricScorer:
    """Scores by a metric that says which position it reads: one of `hooked_lm.metrics`.

    Args:
        model: the model.
        metric: the metric.
        residual: the stream of the base run after the last block, [batch pos d_model].
    """

    def __init__(self, model: HookedModel, metric: Metric, residual: Float[Tensor, "batch pos d_model"]) -> None:
        self.model, self.metric, self.batch = model, metric, residual.shape[0]
        self.first_read = self.last_read = metric.pos % residual.shape[1]
        read = model.ln_final(residual[:, metric.pos, None])
        self.base_score = metric.scores(self._logits(read.transpose(0, 1)))[0]

    def scores(
        self, group: WalkGroup, normalized: Float[Tensor, "row pos d_model"]
    ) -> Iterator[tuple[int, Float[Tensor, " batch"]]]:
        """See `Scorer`: a score for each prompt."""
        read = normalized[:, self.last_read - group.start]
        scores = self.metric.scores(self._logits(read.unflatten(0, (-1, self.batch))))
        yield from zip((cell.index for cell in group.cells), scores, strict=True)

    def _logits(self, read: Float[Tensor, "cell batch d_model"]) -> Float[Tensor, "cell batch token"]:
        """Return the logits of the tokens that the metric reads. (No cell of a walk edits the unembedding.)"""
        tokens = self.metric.tokens
        if tokens is None:
            logits: Tensor = self.model.unembed(read)
            return logits
        return self.model.unembed.of_tokens(read, tokens.to(read.device))


class FunctionScorer:
    """Scores by any function of logits. Which positions it reads is found out on the logits of the base run.

    A function that turns out to read another position of some cell is given the logits of that cell's whole run.

    Args:
        model: the model.
        metric: the function.
        logits: of the base run, [batch pos vocab].
        whole_run: from a cell's index to the logits of the model's run with that cell.
    """

    def __init__(
        self,
        model: HookedModel,
        metric: Callable[[Tensor], Tensor | float],
        logits: Float[Tensor, "batch pos vocab"],
        whole_run: Callable[[int], Float[Tensor, "batch pos vocab"]],
    ) -> None:
        self.model, self.metric, self.base, self.whole_run = model, metric, logits, whole_run
        self.read: frozenset[int] = frozenset()
        # A cell's logits at the positions that are read, NaN at the others. Kept while the metric leaves it as it is.
        self._partial: Tensor | None = None
        self.base_score = self._of_whole(logits).reshape(1)
        if not self._reads_no_others():
            self.read = frozenset(range(logits.shape[1]))

    @property
    def first_read(self) -> int:
        return min(self.read)

    @property
    def last_read(self) -> int:
        return max(self.read)

    def _of_whole(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, ""]:
        """Return the score of whole logits, and add the positions that are read to `read`."""
        score = one_number(self.metric, logits.clone()).clone()
        read = frozenset(range(logits.shape[1]))
        # Some functions take plain tensors only.
        with suppress(Exception):
            watched = watched_score(self.metric, logits.clone())
            # One that writes to the logits or keeps them, or is not seen to read any, is given all of them.
            read = watched.read if watched.read and watched.untouched else read
        self.read |= read
        return score

    def _reads_no_others(self) -> bool:
        """Return whether the base run's logits of the positions that are read give the base run's score.

        Otherwise the function treats watched logits in another way, or reads them in a way that is not seen.
        """
        some = sorted(self.read)
        score = self._of_cell([], some, self.base[:, some])
        return score is not None and torch.equal(score, self.base_score[0])

    def scores(
        self, group: WalkGroup, normalized: Float[Tensor, "row pos d_model"]
    ) -> Iterator[tuple[int, Float[Tensor, " one"]]]:
        """See `Scorer`: one score."""
        rows = normalized.unflatten(0, (-1, self.base.shape[0]))
        if 2 * len(self.read) > self.base.shape[1] and group.start == group.first:
            for cell, stream in zip(group.cells, rows, strict=True):
                whole = torch.cat((self.base[:, : group.start], self.model.unembed(stream)), 1)
                yield cell.index, one_number(self.metric, whole).reshape(1)
            return
        indices = [cell.index for cell in group.cells]
        scores = list(self._of_positions(group, rows))
        lacking = torch.stack([torch.ones(()) if one is None else one.isnan().to("cpu") for one in scores])
        for index, score, whole in zip(indices, scores, lacking.tolist(), strict=True):
            yield index, (self._of_whole(self.whole_run(index)) if whole or score is None else score).reshape(1)

    def _of_positions(
        self, group: WalkGroup, rows: Float[Tensor, "cell batch pos d_model"]
    ) -> Iterator[Float[Tensor, ""] | None]:
        """Yield each cell's score by the logits of the positions that are read; None if others are read too."""
        old = [one for one in sorted(self.read) if one < group.first]
        new = [one for one in sorted(self.read) if one >= group.start]
        here = torch.tensor([one - group.start for one in new], dtype=torch.long, device=rows.device)
        at_once = max(1, _MOST_LOGITS // max(1, rows.shape[1] * len(new) * self.base.shape[2]))
        for some in rows.split(at_once):
            logits: Tensor = self.model.unembed(some.index_select(2, here).flatten(0, 1))
            for one in logits.unflatten(0, (-1, rows.shape[1])):
                yield self._of_cell(old, new, one)

    def _of_cell(
        self, old: list[int], new: list[int], logits: Float[Tensor, "batch read vocab"]
    ) -> Float[Tensor, ""] | None:
        partial = self.base.new_full(self.base.shape, float("nan")) if self._partial is None else self._partial
        partial[:, old], partial[:, new] = self.base[:, old], logits
        self._partial = None
        try:
            watched = watched_score(self.metric, partial, (*old, *new))
        except Exception:  # of reading another position, of logits that are watched, or the function's own
            return None
        self._partial = partial if watched.untouched else None
        return watched.score
