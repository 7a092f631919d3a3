"""Path patching: the effect of senders on receivers along chosen routes and no others.

As in Wang et al. 2022, "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small",
appendix B. Two runs on the corrupted prompts:

1. The senders' outputs are replaced by their clean values, and everything that is on no route keeps its corrupted
   value. The inputs of the receivers in this run are recorded.
2. The receivers' inputs are replaced by the recorded ones, and everything else is computed as usual.

The routes name what else, besides the residual stream, may carry the change from senders to receivers in the first run:

    "direct"  nothing: every attention output and every MLP output has its corrupted value
    "mlps"    the MLPs, which are computed anew; attention outputs have their corrupted values (the paper's choice)
    "all"     everything: the receivers' inputs are those of a run in which the senders are patched and nothing is held

In a model of stock components the first run is one pass up the residual stream for all sets of senders at once
(`path_walk`); where a component is not stock, it is one hooked run of the model for each set (`path_plain`), and the
progress bar says so. The second run is a sweep, one cell for each set of senders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Unpack, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from hooked_lm.components.stock import stages_obstacle
from hooked_lm.hooked_model import HookedModel
from hooked_lm.interventions import Intervention, Selection
from hooked_lm.metrics import Metric
from hooked_lm.names import get_act_name
from hooked_lm.patching.path_nodes import ROUTES, Node, NodeLike, NodeRules, Nodes, is_node
from hooked_lm.patching.path_plain import HookedFirstRun, outputs_of, replaced_points
from hooked_lm.patching.path_walk import PathRuns, StreamBatch
from hooked_lm.patching.sites import Clean, clean_activations, read_prompts, replacement
from hooked_lm.sweep import AnyMetric, sweep
from hooked_lm.sweep.options import DEFAULT_MEMORY_BUDGET, SweepOptions
from hooked_lm.tokenization import Prompts

__all__ = [
    "ROUTES",
    "Node",
    "NodeLike",
    "Nodes",
    "PathOptions",
    "get_act_patch_direct_path",
    "get_act_patch_direct_path_all_sources",
    "path_patch",
    "path_patch_heads",
    "path_patch_mlps",
]


class PathOptions(SweepOptions, total=False):
    """The options of path patching, as keyword arguments: those of a sweep, and the routes.

    Attributes:
        routes: `"direct"`, `"mlps"` or `"all"`; see `path_patch`.
    """

    routes: str


def path_patch(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean: Clean,
    metric: AnyMetric,
    senders: Sequence[Nodes],
    receivers: Nodes,
    *,
    routes: str = "direct",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    per_prompt: bool = False,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    verbose: bool = True,
) -> Float[Tensor, " sender"] | Float[Tensor, "sender batch"]:
    """Return the metric of the corrupted run with receivers' inputs from the first run, for each set of senders.

    Norms are computed anew in both runs. For the other direction, as in the paper, swap clean and corrupted.

    Args:
        model: a `HookedTransformer` without hooks.
        corrupted_tokens: the prompts that are run, as the model takes them.
        clean: the clean prompts, or a cache of a run on them; as many as the corrupted ones, or one for all.
        metric: one of `hooked_lm.metrics`, or any function from logits [batch pos vocab] to a scalar.
        senders: a list; each a node, or several that are patched together: `[("z", 0, 0), ("mlp_out", 0)]` are two
            sets, `[[("z", 0, 0), ("mlp_out", 0)]]` is one.
        receivers: a node, or several that receive together.
        routes: what may carry the change: `"direct"`, `"mlps"` or `"all"`; see above.
        attention_mask: [batch pos], 0 at padding.
        per_prompt: keep the prompts apart; needs a metric of `hooked_lm.metrics`.
        memory_budget: bytes that the activations of one pass may take, roughly.
        verbose: show progress bars.

    Raises:
        UnknownHookError: a layer or site that the model does not have, or a clean cache without the senders.
        ValueError: a node that can neither send nor receive, a head or position out of range, a sender that no receiver
            comes after, clean prompts of another number or length, hooks on the model, or a metric that returns no
            number.
    """
    paths = _PathPatching(
        model,
        corrupted_tokens,
        clean,
        routes=routes,
        attention_mask=attention_mask,
        per_prompt=per_prompt,
        memory_budget=memory_budget,
        verbose=verbose,
    )
    sets = [paths.rules.checked(nodes, "sender") for nodes in _as_several(senders)]
    reading = paths.rules.checked(receivers, "receiver")
    if not sets:
        raise ValueError("path_patch has no senders")
    for nodes in sets:
        paths.rules.check_reached(nodes, reading)
    return paths.patch(sets, [reading], metric)[:, 0]


def path_patch_heads(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean: Clean,
    metric: AnyMetric,
    receivers: Nodes,
    *,
    pos: Selection = None,
    **how: Unpack[PathOptions],
) -> Float[Tensor, "layer head"] | Float[Tensor, "layer head batch"]:
    """Return `path_patch` with each head in turn as the sender.

    Where no receiver comes after a head, the value is the corrupted run's metric.

    Args:
        model, corrupted_tokens, clean, metric, receivers: as for `path_patch`.
        pos: positions at which the heads send; None for all.
        how: the options of `path_patch`.
    """
    cfg = model.cfg
    senders = [Node("z", layer, head, pos) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    scores = _patch_where_reached(model, corrupted_tokens, clean, metric, senders, receivers, **how)
    return scores.reshape(cfg.n_layers, cfg.n_heads, *scores.shape[1:])


def path_patch_mlps(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean: Clean,
    metric: AnyMetric,
    receivers: Nodes,
    *,
    pos: Selection = None,
    **how: Unpack[PathOptions],
) -> Float[Tensor, " layer"] | Float[Tensor, "layer batch"]:
    """Return `path_patch` with each MLP in turn as the sender.

    Args:
        model, corrupted_tokens, clean, metric, receivers: as for `path_patch`.
        pos: positions at which the MLPs send; None for all.
        how: the options of `path_patch`.
    """
    senders = [Node("mlp_out", layer, pos=pos) for layer in range(model.cfg.n_layers)]
    return _patch_where_reached(model, corrupted_tokens, clean, metric, senders, receivers, **how)


def _patch_where_reached(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean: Clean,
    metric: AnyMetric,
    senders: Sequence[Node],
    receivers: Nodes,
    **how: Unpack[PathOptions],
) -> Tensor:
    paths = _PathPatching(model, corrupted_tokens, clean, **how)
    sets = [paths.rules.checked(node, "sender") for node in senders]
    return paths.patch(sets, [paths.rules.checked(receivers, "receiver")], metric)[:, 0]


# The classic functions


def get_act_patch_direct_path(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    corrupted_cache: Mapping[str, Tensor] | None,
    patching_metric: AnyMetric,
    src_layer: int,
    src_head: int,
    component: str = "q",
    verbose: bool = True,
) -> Float[Tensor, "layer kv_head"]:
    """Return the metric of patching the direct path from one head to one later head, for every later head.

    Exact for any norm, folded or not. Where there is no path the value is the corrupted run's metric.

    Args:
        model: a `HookedTransformer` without hooks.
        corrupted_tokens: the prompts that are run.
        clean_cache: a cache of the clean run, with `hook_z`; or the clean prompts.
        corrupted_cache: a cache of the corrupted run, which saves a run; None runs the prompts.
        patching_metric: logits [batch pos vocab] -> a scalar.
        src_layer, src_head: the sender.
        component: the receivers' input that is patched: `"q"`, `"k"` or `"v"` (the result has key-value heads for the
            last two).
        verbose: show progress bars.
    """
    paths = _PathPatching(model, corrupted_tokens, clean_cache, corrupted_cache, verbose=verbose)
    sender = paths.rules.checked(Node("z", src_layer, src_head), "sender")
    return paths.to_every_head([sender], component, patching_metric)[0]


def get_act_patch_direct_path_all_sources(
    model: HookedModel,
    corrupted_tokens: Prompts,
    clean_cache: Clean,
    corrupted_cache: Mapping[str, Tensor] | None,
    patching_metric: AnyMetric,
    component: str = "q",
    verbose: bool = True,
) -> Float[Tensor, "layer head to_layer to_head"]:
    """Return `get_act_patch_direct_path` of every head: [sender's layer, its head, receiver's layer, its head].

    Args:
        model, corrupted_tokens, clean_cache, corrupted_cache, patching_metric, component, verbose: as for
            `get_act_patch_direct_path`.
    """
    cfg = model.cfg
    paths = _PathPatching(model, corrupted_tokens, clean_cache, corrupted_cache, verbose=verbose)
    heads = [Node("z", layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    senders = [paths.rules.checked(head, "sender") for head in heads]
    result = paths.to_every_head(senders, component, patching_metric)
    return result.reshape(cfg.n_layers, cfg.n_heads, *result.shape[1:])


# Both runs


class _PathPatching:
    """Path patching of one model and one pair of runs.

    Args:
        model, corrupted_tokens, clean: as for `path_patch`.
        corrupted_cache: of a run on `corrupted_tokens`, if there is one.
        routes, attention_mask, per_prompt, memory_budget, verbose: the options of `path_patch`.
    """

    def __init__(
        self,
        model: HookedModel,
        corrupted_tokens: Prompts,
        clean: Clean,
        corrupted_cache: Mapping[str, Tensor] | None = None,
        *,
        routes: str = "direct",
        attention_mask: Tensor | None = None,
        per_prompt: bool = False,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        verbose: bool = True,
    ) -> None:
        if routes not in ROUTES:
            raise ValueError(f"routes are one of {ROUTES}, got {routes!r}")
        live = [point.name for point in model.hook_points() if point.live]
        if live:
            raise ValueError(f"path patching runs parts of blocks by themselves: remove the hook at {live[0]!r} first")
        if model.cfg.n_layers == 0:
            raise ValueError("a model without layers has no paths")
        self.model, self.cfg, self.routes = model, model.cfg, routes
        self.tokens, self.mask = read_prompts(model, corrupted_tokens, attention_mask)
        self.clean, self.corrupted_cache, self.given_mask = clean, corrupted_cache, attention_mask
        self.per_prompt, self.memory_budget, self.verbose = per_prompt, memory_budget, verbose
        self.rules = NodeRules(model, self.tokens.shape[1], routes)
        self.obstacle = stages_obstacle(cast(nn.Module, model))

    @torch.no_grad()
    def patch(
        self,
        senders: Sequence[Sequence[Node]],
        receivers: Sequence[Sequence[Node]],
        metric: AnyMetric,
    ) -> Float[Tensor, "sender receiver *batch"]:
        """Return the metric for every set of senders and every set of receivers."""
        if isinstance(metric, Metric):
            metric.check_run(self.tokens, self.cfg.d_vocab_out, self.mask)
        elif self.per_prompt:
            raise ValueError("per_prompt needs a metric of hooked_lm.metrics, which scores every prompt")
        everyone = list(dict.fromkeys(node for nodes in receivers for node in nodes))
        first_run = self._first_run(senders, everyone)
        results = []
        described = f"one run per sender ({self.obstacle})"
        hidden = not self.verbose or not self.obstacle
        with tqdm(total=len(senders), disable=hidden, desc=described, leave=False) as bar:
            for chunk in self._chunks(senders, everyone):
                cells = []
                for sent, arrived in zip(chunk, first_run(chunk, bar.update), strict=True):
                    cells += [
                        [arrived[one] for one in nodes if any(self.rules.reaches(sender, one) for sender in sent)]
                        for nodes in receivers
                    ]
                scores = self._second_run(cells, metric)
                results.append(scores.reshape(len(chunk), len(receivers), *scores.shape[1:]))
        return torch.cat(results)

    def to_every_head(
        self, senders: Sequence[Sequence[Node]], component: str, metric: AnyMetric
    ) -> Float[Tensor, "sender layer kv_head"]:
        """Return the metric for every set of senders and every head that receives."""
        if component not in ("q", "k", "v"):
            raise ValueError(f"component is 'q', 'k' or 'v', got {component!r}")
        n_heads = self.cfg.n_heads if component == "q" else self.cfg.n_hooked_kv_heads
        heads = [(Node(component, layer, head),) for layer in range(self.cfg.n_layers) for head in range(n_heads)]
        scores = self.patch(senders, heads, metric)
        return scores.reshape(scores.shape[0], self.cfg.n_layers, n_heads)

    def _chunks(self, senders: Sequence[Sequence[Node]], receivers: Sequence[Node]) -> Iterator[list[Sequence[Node]]]:
        """Split the sets of senders so that one pass stays within the memory budget, roughly."""
        cfg = self.cfg
        per_position = 6 * cfg.d_model + len(receivers) * max(cfg.d_head, cfg.d_model // 4)
        if self.routes != "direct" and cfg.d_mlp is not None:
            per_position += 3 * cfg.d_mlp
        if self.routes == "all":
            per_position += cfg.n_heads * (4 * cfg.d_head + 2 * self.tokens.shape[1])
        row = self.tokens.numel() * per_position * self.model.embed.W_E.element_size()
        size = max(1, self.memory_budget // row)
        for start in range(0, len(senders), size):
            yield list(senders[start : start + size])

    # The first run

    def _first_run(self, senders: Sequence[Sequence[Node]], receivers: Sequence[Node]) -> _FirstRun:
        """Return the function that makes the first run of some of the sets of senders."""
        last_layer = max(map(self._layer, receivers))
        if self.obstacle is None:
            names = ["resid_pre", *self._held_names()]
            runs = self._runs(senders, {get_act_name(name, layer) for layer in range(last_layer + 1) for name in names})
            return lambda chunk, advance: self._streams(runs, chunk, receivers, last_layer)
        layers = range(last_layer + 1)
        replaced = replaced_points(self.model, self._held_names(), layers)
        held = {get_act_name(name, layer) for layer in layers for name in self._held_names()}
        runs = self._runs(senders, held - set(replaced))
        if replaced:
            runs.corrupted.update(outputs_of(self.model, replaced, self.tokens, self.mask))
        hooked = HookedFirstRun(runs, last_layer, replaced)

        def one_by_one(chunk: Sequence[Sequence[Node]], advance: Callable[[int], object]) -> list[_Arrivals]:
            found = []
            for nodes in chunk:
                found.append(hooked.arrivals(nodes, receivers))
                advance(1)
            return found

        return one_by_one

    def _held_names(self) -> list[str]:
        """The short names of the outputs that have their corrupted values in the first run."""
        if self.routes == "all":
            return []
        return ["attn_out"] if self.routes == "mlps" or self.cfg.attn_only else ["attn_out", "mlp_out"]

    def _runs(self, senders: Sequence[Sequence[Node]], names: set[str]) -> PathRuns:
        """Get the senders' activations in both runs, and those of `names` in the corrupted one."""
        sites = {node.site(self.cfg.n_layers) for nodes in senders for node in nodes}
        clean = clean_activations(self.model, self.clean, sorted(sites), self.tokens, self.mask, self.given_mask)
        source = self.tokens if self.corrupted_cache is None else self.corrupted_cache
        corrupted = clean_activations(
            self.model, source, sorted(sites | names), self.tokens, self.mask, self.mask, run="corrupted"
        )
        return PathRuns(self.model, self.routes, self.tokens, self.mask, clean, corrupted)

    def _streams(
        self, runs: PathRuns, senders: Sequence[Sequence[Node]], receivers: Sequence[Node], last_layer: int
    ) -> list[_Arrivals]:
        """The first run by the stages of stock blocks."""
        streams = StreamBatch(runs, senders)
        arrived: list[_Arrivals] = [{} for _ in senders]
        for layer in range(last_layer + 1):
            here = [one for one in receivers if layer == self._layer(one)]
            for node, rows in streams.through_block(layer, here):
                for index, row in zip(streams.active, rows, strict=True):
                    site = node.site(self.cfg.n_layers)
                    arrived[index][node] = replacement(self.model, site, row, pos=node.pos, head=node.head)
        return arrived

    def _layer(self, node: Node) -> int:
        return self.cfg.n_layers - 1 if node.layer is None else node.layer

    # The second run

    def _second_run(self, cells: Sequence[Sequence[Intervention]], metric: AnyMetric) -> Float[Tensor, "..."]:
        """Return the metric of every cell, [cell] or [cell batch]; those without interventions share one run."""
        empty = [index for index, cell in enumerate(cells) if not cell]
        made: list[Sequence[Intervention]] = [cell for cell in cells if cell]
        scores = sweep(
            self.model,
            self.tokens,
            [*made, *[()] * bool(empty)],
            metric,
            attention_mask=self.mask,
            per_prompt=self.per_prompt,
            incremental=self.obstacle is None,
            memory_budget=self.memory_budget,
            verbose=self.verbose,
        )
        place = torch.full((len(cells),), scores.shape[0] - 1, device=scores.device)
        full = [index for index, cell in enumerate(cells) if cell]
        place[full] = torch.arange(len(full), device=scores.device)
        return scores[place]


# For each receiver, the intervention that puts in its input from the first run.
_Arrivals = dict[Node, Intervention]
# (sets of senders, function to call with the number of sets just done) -> the interventions for each set
_FirstRun = Callable[[Sequence[Sequence[Node]], Callable[[int], object]], list[_Arrivals]]


def _as_several(nodes: Nodes | Sequence[Nodes]) -> Sequence[Nodes]:
    return [nodes] if is_node(nodes) else cast(Sequence[Nodes], nodes)
