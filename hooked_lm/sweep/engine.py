"""sweep: the metric of many interventions, without running the whole model for each.

`sweep(model, tokens, cells, metric)` returns the numbers of a loop of `metric(model.run(tokens, interventions=cell))`,
and recomputes only the activations that a cell can change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm.components.sequence import SequenceLayout
from hooked_lm.hooked_model import HookedModel
from hooked_lm.interventions import Intervention
from hooked_lm.metrics import Metric, one_number
from hooked_lm.names import get_act_name
from hooked_lm.sweep.exactness import walking_obstacle
from hooked_lm.sweep.first_change import from_first_change, is_compared
from hooked_lm.sweep.options import DEFAULT_MEMORY_BUDGET
from hooked_lm.sweep.plan import Stage, SweepCell, plan_cell, reads_per_head
from hooked_lm.sweep.scoring import FunctionScorer, MetricScorer, Scorer
from hooked_lm.sweep.walk import BaseRun, SweepWalk, key_site
from hooked_lm.sweep.wire import SweepPart, part_from_bytes, part_to_bytes, scores_from_bytes, scores_to_bytes
from hooked_lm.sweep.workers import Workers, check_workers
from hooked_lm.tokenization import Prompts

__all__ = ["AnyMetric", "run_part", "sweep"]

AnyMetric = Metric | Callable[[Tensor], Tensor | float]
# Cells that a worker runs one by one before it answers.
_RUNS_IN_A_PART = 16
# Cells that walk together at most. More are no faster, and workers can only share out whole chunks.
_CELLS_IN_A_CHUNK = 4096


@torch.no_grad()
def sweep(
    model: HookedModel,
    tokens: Prompts,
    cells: Iterable[Intervention | Sequence[Intervention]],
    metric: AnyMetric,
    *,
    always: Sequence[Intervention] = (),
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    per_prompt: bool = False,
    incremental: bool = True,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    verbose: bool = True,
    workers: Workers | None = None,
) -> Float[Tensor, " cell"] | Float[Tensor, "cell batch"]:
    """Return the metric of every cell, computed on the model's logits under the cell's interventions.

    Equal to running the model once per cell, up to the order of floating-point sums. Cells of any sites, layers and
    positions may be mixed. The whole model is run once per cell, and the progress bar shows the reason, for
    bidirectional models, models with hooks or with modified components (`components.stock`), cells that change tokens,
    embeddings or the unembedding, and `always` interventions in the blocks. Cells that change no logit that the metric
    reads get the score of the run without a cell.

    Args:
        model: a `HookedTransformer`.
        tokens: the prompts, as the model takes them.
        cells: each an intervention, or several that are made together.
        metric: one of `hooked_lm.metrics`, for which only the logits that it reads are computed, or any function from
            logits [batch pos vocab] to a scalar, for which those of the positions that it reads are. A function is
            called on the base run's logits too, to see which they are.
        always: interventions made in every run in addition to a cell's, such as noise on the embeddings.
        attention_mask: [batch pos], 0 at padding.
        per_prompt: keep the prompts apart: [cell batch]. Needs a metric of `hooked_lm.metrics`.
        incremental: False runs the model once per cell.
        memory_budget: approximate memory, in bytes, for the activations of one batched incremental forward.
        verbose: show a progress bar.
        workers: of `hooked_lm.workers`, which run parts of the sweep on models of their own. The scores are those of
            this process, to the bit where the workers compute with as many threads on the same build. Needs a metric of
            `hooked_lm.metrics`, and a model without hooks.

    Raises:
        UnknownHookError: a site that the model does not have.
        ValueError: a position, head or feature out of range, a value that does not broadcast (both raise before
            anything runs), or a metric that returns NaN or something other than a number; workers that have another
            model, or a metric or hooks that they cannot have.
        WorkerError: a part failed in a worker, or was lost with two of them.
    """
    if isinstance(cells, Intervention) or isinstance(always, Intervention):
        raise TypeError("cells and always are lists of interventions, got a single Intervention: put it into a list")
    plans = [(cell,) if isinstance(cell, Intervention) else tuple(cell) for cell in cells]
    if not callable(metric) or isinstance(metric, type):
        raise TypeError(f"metric is one of hooked_lm.metrics or a function of logits, got {metric!r}")
    if memory_budget <= 0:
        raise ValueError(f"memory_budget is a number of bytes, more than 0; got {memory_budget}")
    if per_prompt and not isinstance(metric, Metric):
        raise ValueError("per_prompt needs a metric of hooked_lm.metrics, which scores every prompt")
    tokens, attention_mask = model.tokens_and_mask(tokens, attention_mask)
    if attention_mask is None:
        # An explicit mask, so that a padding token at the start of a text is not taken for padding.
        attention_mask = torch.ones_like(tokens)
    if isinstance(metric, Metric):
        metric.check_run(tokens, model.cfg.d_vocab_out, attention_mask)
    if workers is not None:
        check_workers(model, metric, workers)
    _check(model, [*plans, tuple(always)], tokens)
    engine = _Engine(model, tokens, attention_mask, metric, tuple(always), memory_budget)
    obstacle = walking_obstacle(model, always) if incremental else "asked for"
    described = "sweep" if obstacle is None else f"one run per cell ({obstacle})"
    with tqdm(total=len(plans), disable=not verbose, desc=described, leave=False) as bar:
        results = engine.run(plans, incremental=obstacle is None, advance=bar.update, workers=workers)
    _check_numbers(results, plans)
    return results if per_prompt else results.mean(-1)


@torch.no_grad()
def run_part(model: HookedModel, content: bytes) -> bytes:
    """Return the scores of a part of a sweep, as a worker does: bytes in, bytes out.

    Args:
        model: the worker's.
        content: as `sweep.wire.part_to_bytes` makes it.

    Raises:
        UnknownHookError, ValueError: it is no part of a sweep, or does not fit the model.
    """
    part = part_from_bytes(content)
    tokens, mask = model.tokens_and_mask(part.tokens, part.mask)
    assert mask is not None
    part.metric.check_run(tokens, model.cfg.d_vocab_out, mask)
    _check(model, [*part.cells, part.always], tokens)
    engine = _Engine(model, tokens, mask, part.metric, part.always, DEFAULT_MEMORY_BUDGET)
    results = engine.no_scores(len(part.cells))
    if part.names is None:
        for index, interventions in enumerate(part.cells):
            results[index] = engine.scores(engine.plain(interventions))
        return scores_to_bytes(results)
    obstacle = walking_obstacle(model, part.always)
    if obstacle is not None:
        raise ValueError(f"this part of a sweep walks, and here one cannot: {obstacle}")
    chunk = []
    for index, (plan, first) in enumerate(zip(part.cells, part.firsts, strict=True)):
        cell = plan_cell(index, plan, model.cfg, tokens.shape[1]) if plan else None
        if cell is None or first >= tokens.shape[1]:
            raise ValueError(f"cell {index} of this part cannot walk from position {first}: run it whole")
        chunk.append(replace(cell, first=first))
    names = sorted({*part.names, *engine.base_names(chunk)})
    base, out = engine.base_run(names)
    walk = _Walk(tuple(names), base, engine.scorer(out, part.cells), chunk)
    engine.score_chunk(walk, chunk, results)
    return scores_to_bytes(results)


@dataclass(frozen=True)
class _Walk:
    """A base run, and the cells that walk from it.

    names: the activations of the base run.
    """

    names: tuple[str, ...]
    base: BaseRun
    scorer: Scorer
    cells: list[SweepCell]


class _Engine:
    """A sweep's settings, and its two implementations: incremental, and one run per cell."""

    def __init__(
        self,
        model: HookedModel,
        tokens: Tensor,
        attention_mask: Tensor | None,
        metric: AnyMetric,
        always: tuple[Intervention, ...],
        memory_budget: int,
    ) -> None:
        self.model, self.tokens, self.attention_mask, self.metric = model, tokens, attention_mask, metric
        self.always, self.memory_budget = always, memory_budget
        self.cfg = model.cfg

    def run(
        self,
        plans: Sequence[tuple[Intervention, ...]],
        *,
        incremental: bool,
        advance: Callable[[int], object],
        workers: Workers | None = None,
    ) -> Float[Tensor, "cell batch"]:
        results = self.no_scores(len(plans))
        planned = [
            plan_cell(index, plan, self.cfg, self.tokens.shape[1]) if plan else None for index, plan in enumerate(plans)
        ]
        walked = [cell for cell in planned if cell is not None] if incremental else []
        left = sorted(set(range(len(plans))) - {cell.index for cell in walked})
        walk = self.walk(walked, plans, results, advance) if walked else None
        chunks = [] if walk is None else list(self.chunks(walk.cells))
        if workers is not None:
            self.distribute(workers, walk, chunks, left, plans, results, advance)
            return results
        for chunk in chunks:
            assert walk is not None
            self.score_chunk(walk, chunk, results)
            advance(len(chunk))
        for index in left:
            results[index] = self.scores(self.plain(plans[index]))
            advance(1)
        return results

    def no_scores(self, n_cells: int) -> Float[Tensor, "cell batch"]:
        """Return room for the scores of so many cells."""
        n_scores = self.tokens.shape[0] if isinstance(self.metric, Metric) else 1
        precise = torch.promote_types(self.model.embed.W_E.dtype, torch.float32)
        return torch.zeros(n_cells, n_scores, dtype=precise, device=self.model.embed.W_E.device)

    def distribute(
        self,
        workers: Workers,
        walk: _Walk | None,
        chunks: Sequence[Sequence[SweepCell]],
        left: Sequence[int],
        plans: Sequence[tuple[Intervention, ...]],
        results: Tensor,
        advance: Callable[[int], object],
    ) -> None:
        """Let workers score chunks of a walk, and the cells that are left by whole runs."""
        assert isinstance(self.metric, Metric)
        assert self.attention_mask is not None
        given = SweepPart(self.tokens, self.attention_mask, self.metric, self.always, ())
        parts: list[tuple[Sequence[int], SweepPart]] = []
        for chunk in chunks:
            assert walk is not None
            firsts = tuple(cell.first for cell in chunk)
            parts.append(([cell.index for cell in chunk], replace(given, names=walk.names, firsts=firsts)))
        parts += [(left[start : start + _RUNS_IN_A_PART], given) for start in range(0, len(left), _RUNS_IN_A_PART)]
        bodies = (
            part_to_bytes(replace(part, cells=tuple(plans[index] for index in indices))) for indices, part in parts
        )
        for number, answer in workers.run_all(bodies):
            indices = parts[number][0]
            results[indices] = scores_from_bytes(answer).to(results)
            advance(len(indices))

    def plain(self, interventions: Sequence[Intervention]) -> Float[Tensor, "batch pos vocab"]:
        """Return the logits of one whole run."""
        logits: Tensor = self.model.run(
            self.tokens, interventions=[*self.always, *interventions], attention_mask=self.attention_mask
        )
        return logits

    def scores(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " score"]:
        """Return the metric's scores of one run, one per prompt or one in all."""
        if isinstance(self.metric, Metric):
            return self.metric.per_prompt(logits)
        return one_number(self.metric, logits).reshape(1)

    # The incremental way

    def walk(
        self,
        cells: list[SweepCell],
        plans: Sequence[tuple[Intervention, ...]],
        results: Tensor,
        advance: Callable[[int], object],
    ) -> _Walk:
        """Make the base run of some cells, and score those that it shows to have no effect."""
        names = self.base_names(cells)
        base, out = self.base_run(names)
        scorer = self.scorer(out, plans)
        changing = [from_first_change(cell, base.cache, self.model.hook_dict) for cell in cells]
        # A change after the last position that the metric reads has no effect either.
        walked = [cell for cell in changing if cell and cell.first <= scorer.last_read]
        without_effect = sorted({cell.index for cell in cells} - {cell.index for cell in walked})
        if without_effect:
            results[without_effect] = scorer.base_score.to(results.dtype)
            advance(len(without_effect))
        return _Walk(tuple(names), base, scorer, walked)

    def score_chunk(self, walk: _Walk, chunk: Sequence[SweepCell], results: Tensor) -> None:
        """Write the scores of a chunk of cells."""
        for group, normalized in SweepWalk(self.model, walk.base, chunk, walk.scorer.first_read).run(lambda: None):
            for index, scores in walk.scorer.scores(group, normalized):
                results[index] = scores.to(results.dtype)

    def scorer(self, out: Float[Tensor, "batch pos out"], plans: Sequence[tuple[Intervention, ...]]) -> Scorer:
        """Return what scores the walk's rows, from the output of the base run."""
        if isinstance(self.metric, Metric):
            return MetricScorer(self.model, self.metric, out)
        return FunctionScorer(self.model, self.metric, out, lambda index: self.plain(plans[index]))

    def base_names(self, cells: Sequence[SweepCell]) -> list[str]:
        """Return the names of the activations that rows of these cells start from and attend to."""
        layers = range(self.cfg.n_layers)
        names = {key_site(self.cfg, layer) for layer in layers} | {get_act_name("v", layer) for layer in layers}
        names |= {get_act_name("resid_pre", layer) for layer in layers}
        names.add(get_act_name("resid_post", self.cfg.n_layers - 1))
        for cell in cells:
            names |= self.joined_with(cell)
            sites = {one.site for one in (*cell.at_entry, *cell.on_the_way)}
            names |= {site for site in sites if is_compared(self.model.hook_dict[site])}
        if self.cfg.positional_embedding_type == "shortformer":
            names.add("hook_pos_embed")
        return sorted(names)

    def base_run(self, names: Sequence[str]) -> tuple[BaseRun, Float[Tensor, "batch pos out"]]:
        """Return the base run, with the activations of these names, and its output.

        The output is the residual after the last layer for a `Metric`, and the logits for another function.
        """
        with self.model.intervening(self.always):
            out, cache = self.model.run_with_cache(
                self.tokens,
                names_filter=list(names),
                attention_mask=self.attention_mask,
                return_cache_object=False,
                stop_at_layer=self.cfg.n_layers if isinstance(self.metric, Metric) else None,
            )
        mask = self.attention_mask
        valid = None if mask is None or bool(mask.all()) else mask.bool()
        layout = SequenceLayout(self.tokens.shape[1], 0, self.model.embed.W_E.device, valid)
        shortformer = cache.get("hook_pos_embed") if self.cfg.positional_embedding_type == "shortformer" else None
        if self.model.spread_over is not None:
            cache = self.model.spread_over.at_sites(cache)
        return BaseRun(cache, layout, shortformer), out

    def joined_with(self, cell: SweepCell) -> set[str]:
        """Return the names of the base run's activations that a cell's rows start from."""
        if cell.stage is Stage.START:
            return set()
        sites = {one.site for one in cell.at_entry}
        if cell.stage is Stage.Z:
            return sites
        if cell.stage is Stage.MID:
            return sites or {get_act_name("resid_mid", cell.layer)}
        if sites == {get_act_name("resid_post", cell.layer)}:
            return sites
        others = ("attn_out", "mlp_out") if self.cfg.parallel_attn_mlp and not self.cfg.attn_only else ("resid_mid",)
        exist = (get_act_name(name, cell.layer) for name in others)
        return sites | {name for name in exist if name in self.model.hook_dict}

    def chunks(self, cells: list[SweepCell]) -> Iterable[list[SweepCell]]:
        """Yield the cells in chunks whose activations fit the memory budget. Cells of one layer stay together."""
        cfg, (batch, n_positions) = self.cfg, self.tokens.shape
        width = 12 * cfg.d_model + 4 * (cfg.d_mlp or 0) + 3 * cfg.n_heads * n_positions + 6 * cfg.n_heads * cfg.d_head
        per_position = batch * width * self.model.embed.W_E.element_size()
        # The logits that a metric reads of all cells, and as much again for the metric; a function gets a few cells'.
        all_tokens = isinstance(self.metric, Metric) and self.metric.tokens is None
        per_cell = 2 * batch * cfg.d_vocab_out * self.model.embed.W_E.element_size() if all_tokens else 0
        chunk: list[SweepCell] = []
        used = 0
        # If one cell needs per-head inputs, all rows of its chunk get them: such cells have chunks of their own.
        apart = {cell.index: reads_per_head(cell.on_the_way) for cell in cells}
        for cell in sorted(cells, key=lambda cell: (apart[cell.index], cell.layer, cell.stage, cell.first)):
            needed = (n_positions - cell.first) * per_position + per_cell
            full = len(chunk) == _CELLS_IN_A_CHUNK or used + needed > self.memory_budget
            if chunk and (full or apart[cell.index] != apart[chunk[-1].index]):
                yield chunk
                chunk, used = [], 0
            chunk.append(cell)
            used += needed
        if chunk:
            yield chunk


def _check(model: HookedModel, plans: Iterable[Sequence[Intervention]], tokens: Tensor) -> None:
    """Check every intervention against the model and the prompts, before anything runs."""
    axes = {name: point.axes for name, point in model.hook_dict.items()}
    for plan in plans:
        for one in plan:
            if not isinstance(one, Intervention):
                raise TypeError(f"a cell is an Intervention or several, got {one!r}")
            one.check(model.cfg, axes)
            one.check_fit(model.cfg, axes, *tokens.shape)


def _check_numbers(results: Tensor, plans: Sequence[object]) -> None:
    wrong = torch.where(results.isnan().any(-1))[0].tolist()
    if wrong:
        raise ValueError(
            f"the metric is not a number for {len(wrong)} of {len(plans)} cells, first for {plans[wrong[0]]}"
        )
