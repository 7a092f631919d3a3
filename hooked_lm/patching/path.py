"""Path patching: what senders tell receivers, along chosen routes and no others.

As in Wang et al. 2022, "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small",
appendix B. Two runs on the corrupted prompts:

1. The senders' outputs are replaced by their clean values, and everything that is on no route keeps its corrupted one.
   What then reaches the receivers is noted.
2. The receivers' inputs are replaced by what was noted, and everything else is computed as usual.

The routes say what else may carry the senders' message in the first run:

    "direct"  the residual stream alone: every attention output and every MLP output stays as it was
    "mlps"    also the MLPs, which are computed anew; attention stays (the paper's choice)
    "all"     everything: what the receivers would get if the senders were patched in earnest

Along the first two, the first run needs no attention: it is a walk up the residual stream, for all senders at once. The
second is a sweep, one cell for each set of senders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_lm.components.sequence import SequenceLayout
from hooked_lm.interventions import Intervention, Selection
from hooked_lm.metrics import Metric
from hooked_lm.names import UnknownHookError, describe_unknown, get_act_name
from hooked_lm.patching.attribution import activations_of, replacement
from hooked_lm.sweep import AnyMetric, sweep

ROUTES = ("direct", "mlps", "all")

# The order of computation in a block: senders write, receivers read. In parallel blocks the MLP reads when heads do.
_WRITES = {
    "embed": 0,
    "pos_embed": 0,
    "resid_pre": 1,
    "z": 3,
    "attn_out": 4,
    "resid_mid": 5,
    "mlp_out": 7,
    "resid_post": 8,
}
_READS = {"resid_pre": 1, "q": 2, "k": 2, "v": 2, "resid_mid": 5, "mlp_in": 6, "resid_post": 8, "logits": 9}
_ALIASES = {"result": "z", "q_input": "q", "k_input": "k", "v_input": "v"}
_WITHOUT_LAYER = ("embed", "pos_embed", "logits")


@dataclass(frozen=True)
class Node:
    """One end of a path. A tuple `("z", 0, 3)` does as well.

    Attributes:
        name: of a sender `"z"` (a head's output), `"attn_out"`, `"mlp_out"`, `"embed"`, `"pos_embed"`, `"resid_pre"`,
            `"resid_mid"` or `"resid_post"`; of a receiver `"q"`, `"k"`, `"v"` (what a head reads for them), `"mlp_in"`,
            one of the three streams, or `"logits"` (the stream that the final norm reads).
        layer: its block; none for `"embed"`, `"pos_embed"` and `"logits"`.
        head: for `"z"` and `"q"` a head, for `"k"` and `"v"` a key-value head; several as a tuple; None for all.
        pos: positions; None for all.

    >>> Node("k", 1, head=1)
    Node(name='k', layer=1, head=1, pos=None)
    """

    name: str
    layer: int | None = None
    head: Selection = None
    pos: Selection = None

    def site(self, n_layers: int) -> str:
        """Return the hook name at which the node is patched."""
        if self.name == "logits":
            return get_act_name("resid_post", n_layers - 1)
        return get_act_name(self.name, self.layer)


NodeLike = Node | str | tuple[Any, ...]
Nodes = NodeLike | Sequence[NodeLike]


def path_patch(
    model: Any,
    corrupted_tokens: Int[Tensor, "batch pos"] | Any,
    clean: Any,
    metric: AnyMetric,
    senders: Sequence[Nodes],
    receivers: Nodes,
    *,
    routes: str = "direct",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    per_prompt: bool = False,
    memory_budget: int = 2**29,
    verbose: bool = True,
) -> Float[Tensor, " sender"] | Float[Tensor, "sender batch"]:
    """Return the metric of the corrupted run when receivers hear the clean senders, for each set of senders.

    Norms are computed anew on what arrives, here and in the second run. For the other direction, as in the paper, swap
    clean and corrupted.

    Args:
        model: a `HookedTransformer` without hooks.
        corrupted_tokens: the prompts that are run, as the model takes them.
        clean: the clean prompts, or the cache of a run on them.
        metric: one of `hooked_lm.metrics`, or any function from logits [batch pos vocab] to a scalar.
        senders: a list; each a node, or several that are patched together: `[("z", 0, 0), ("mlp_out", 0)]` are two
            sets, `[[("z", 0, 0), ("mlp_out", 0)]]` is one.
        receivers: a node, or several that receive together.
        routes: what may carry the message: `"direct"`, `"mlps"` or `"all"`; see above.
        attention_mask: [batch pos], 0 at padding.
        per_prompt: keep the prompts apart; needs a metric of `hooked_lm.metrics`.
        memory_budget: bytes that the activations of one walk may take, roughly.
        verbose: show progress bars.

    Raises:
        UnknownHookError: a layer or site that the model does not have, or a clean cache without the senders.
        ValueError: a node that neither sends nor receives, a head or position out of range, a sender that no receiver
            comes after, prompts of different shape, hooks on the model, or a metric that returns no number.
    """
    paths = _Paths(model, corrupted_tokens, clean, routes, attention_mask, memory_budget)
    sets = [paths.checked(nodes, _WRITES, "sender") for nodes in _as_several(senders)]
    reading = paths.checked(receivers, _READS, "receiver")
    if not sets:
        raise ValueError("path_patch has no senders")
    for nodes in sets:
        paths.check_reached(nodes, reading)
    return paths.patch(sets, [reading], metric, per_prompt=per_prompt, verbose=verbose)[:, 0]


def path_patch_heads(
    model: Any,
    corrupted_tokens: Int[Tensor, "batch pos"] | Any,
    clean: Any,
    metric: AnyMetric,
    receivers: Nodes,
    *,
    pos: Selection = None,
    **how: Any,
) -> Float[Tensor, "layer head"] | Float[Tensor, "layer head batch"]:
    """Return `path_patch` with each head in turn as the sender.

    Where no receiver comes after a head, the corrupted run's metric stands.

    Args:
        model, corrupted_tokens, clean, metric, receivers: as for `path_patch`.
        pos: positions at which the heads send; None for all.
        how: the options of `path_patch`.
    """
    cfg = model.cfg
    senders = [[Node("z", layer, head, pos)] for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    return _patch_where_reached(model, corrupted_tokens, clean, metric, senders, receivers, **how).unflatten(
        0, (cfg.n_layers, cfg.n_heads)
    )


def path_patch_mlps(
    model: Any,
    corrupted_tokens: Int[Tensor, "batch pos"] | Any,
    clean: Any,
    metric: AnyMetric,
    receivers: Nodes,
    *,
    pos: Selection = None,
    **how: Any,
) -> Float[Tensor, " layer"] | Float[Tensor, "layer batch"]:
    """Return `path_patch` with each MLP in turn as the sender.

    Args:
        model, corrupted_tokens, clean, metric, receivers: as for `path_patch`.
        pos: positions at which the MLPs send; None for all.
        how: the options of `path_patch`.
    """
    senders = [[Node("mlp_out", layer, pos=pos)] for layer in range(model.cfg.n_layers)]
    return _patch_where_reached(model, corrupted_tokens, clean, metric, senders, receivers, **how)


def _patch_where_reached(
    model: Any,
    corrupted_tokens: Any,
    clean: Any,
    metric: AnyMetric,
    senders: Sequence[Sequence[Node]],
    receivers: Nodes,
    routes: str = "direct",
    attention_mask: Tensor | None = None,
    per_prompt: bool = False,
    memory_budget: int = 2**29,
    verbose: bool = True,
) -> Tensor:
    paths = _Paths(model, corrupted_tokens, clean, routes, attention_mask, memory_budget)
    sets = [paths.checked(nodes, _WRITES, "sender") for nodes in senders]
    reading = paths.checked(receivers, _READS, "receiver")
    return paths.patch(sets, [reading], metric, per_prompt=per_prompt, verbose=verbose)[:, 0]


# The classic functions


def get_act_patch_direct_path(
    model: Any,
    corrupted_tokens: Int[Tensor, "batch pos"] | Any,
    clean_cache: Any,
    corrupted_cache: Mapping[Any, Tensor] | None,
    patching_metric: AnyMetric,
    src_layer: int,
    src_head: int,
    component: str = "q",
    verbose: bool = True,
) -> Float[Tensor, "layer kv_head"]:
    """Return the metric when one head's clean output reaches one later head directly, for every later head.

    Exact for any norm, folded or not. Where there is no path the corrupted run's metric stands.

    Args:
        model: a `HookedTransformer` without hooks.
        corrupted_tokens: the prompts that are run.
        clean_cache: the cache of the clean run, with `hook_z`; or the clean prompts.
        corrupted_cache: that of the corrupted run, which saves a run; None computes what is needed.
        patching_metric: logits [batch pos vocab] -> a scalar.
        src_layer, src_head: the sender.
        component: what the receivers read it for: `"q"`, `"k"` or `"v"` (the result has key-value heads for the
            last two).
        verbose: show progress bars.
    """
    paths = _Paths(model, corrupted_tokens, clean_cache, "direct", None, 2**29, corrupted_cache)
    sender = paths.checked(Node("z", src_layer, src_head), _WRITES, "sender")
    return paths.to_every_head([sender], component, patching_metric, verbose)[0]


def get_act_patch_direct_path_all_sources(
    model: Any,
    corrupted_tokens: Int[Tensor, "batch pos"] | Any,
    clean_cache: Any,
    corrupted_cache: Mapping[Any, Tensor] | None,
    patching_metric: AnyMetric,
    component: str = "q",
    verbose: bool = True,
) -> Float[Tensor, "layer head to_layer to_head"]:
    """Return `get_act_patch_direct_path` of every head: [sender's layer, its head, receiver's layer, its head].

    Args:
        model, corrupted_tokens, clean_cache, corrupted_cache, patching_metric, component, verbose: as for
            `get_act_patch_direct_path`.
    """
    paths = _Paths(model, corrupted_tokens, clean_cache, "direct", None, 2**29, corrupted_cache)
    heads = [Node("z", layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    senders = [paths.checked(head, _WRITES, "sender") for head in heads]
    result = paths.to_every_head(senders, component, patching_metric, verbose)
    return result.unflatten(0, (model.cfg.n_layers, model.cfg.n_heads))


# The machine


class _Paths:
    """Clean and corrupted activations, and what senders make of them at receivers.

    Args:
        model: the model.
        corrupted_tokens, clean, attention_mask, memory_budget: as for `path_patch`.
        routes: what is computed anew between senders and receivers.
        corrupted_cache: of a run on `corrupted_tokens`, if there is one.
    """

    def __init__(
        self,
        model: Any,
        corrupted_tokens: Any,
        clean: Any,
        routes: str,
        attention_mask: Tensor | None,
        memory_budget: int,
        corrupted_cache: Mapping[Any, Tensor] | None = None,
    ) -> None:
        if routes not in ROUTES:
            raise ValueError(f"routes are one of {ROUTES}, got {routes!r}")
        live = [point.name for point in model.hook_points() if point.live]
        if live:
            raise ValueError(f"path patching runs parts of blocks by themselves: remove the hook at {live[0]!r} first")
        if model.cfg.n_layers == 0:
            raise ValueError("a model without layers has no paths")
        self.model, self.cfg, self.routes = model, model.cfg, routes
        self.tokens, self.mask = model.tokens_and_mask(corrupted_tokens, attention_mask)
        self.clean_source, self.given_mask, self.memory_budget = clean, attention_mask, memory_budget
        self.corrupted_source = corrupted_cache
        self.clean: dict[str, Tensor] = {}
        self.corrupted: dict[str, Tensor] = {}

    # Which nodes

    def checked(self, nodes: Nodes, known: Mapping[str, int], role: str) -> tuple[Node, ...]:
        """Return nodes in one form, each checked against the model and the prompts."""
        made = tuple(self._node(one, known, role) for one in _as_several(nodes))
        if not made:
            raise ValueError(f"a set of {role}s is empty")
        return made

    def _node(self, given: NodeLike, known: Mapping[str, int], role: str) -> Node:
        node = given if isinstance(given, Node) else Node(given) if isinstance(given, str) else Node(*given)
        node = Node(_ALIASES.get(node.name, node.name), node.layer, node.head, node.pos)
        if node.name not in known:
            raise ValueError(f"{node.name!r} is no {role}: {role}s are {', '.join(map(repr, known))}")
        if (node.layer is None) != (node.name in _WITHOUT_LAYER):
            needs = "belongs to no layer" if node.name in _WITHOUT_LAYER else "lives in a layer: give it"
            raise ValueError(f"the {role} {node.name!r} {needs}; got layer={node.layer!r}")
        if node.layer is not None and not (isinstance(node.layer, int) and 0 <= node.layer < self.cfg.n_layers):
            raise ValueError(f"the {role} {node}: layers run 0-{self.cfg.n_layers - 1}")
        site = node.site(self.cfg.n_layers)
        axes = {name: point.axes for name, point in self.model.hook_dict.items()}
        if site not in axes:
            raise UnknownHookError(describe_unknown(site, list(axes)))
        if node.name == "pos_embed" and self.cfg.positional_embedding_type != "standard":
            raise ValueError("this model's position embeddings are not written to the stream: they send nothing")
        Intervention(site, "zero", pos=node.pos, head=node.head).check(self.cfg, axes)
        n_pos = self.tokens.shape[1]
        wrong = [one for one in _as_tuple(node.pos) if not -n_pos <= one < n_pos]
        if wrong:
            raise ValueError(f"the {role} {node.name!r} pos {wrong[0]}: the prompts have {n_pos} positions")
        return Node(node.name, node.layer, node.head, _from_start(node.pos, n_pos))

    def check_reached(self, senders: Sequence[Node], receivers: Sequence[Node]) -> None:
        """Check that each of the senders comes before some receiver.

        Raises:
            ValueError: one does not.
        """
        for sender in senders:
            if not any(self.reaches(sender, one) for one in receivers):
                among = ", ".join(map(str, receivers))
                raise ValueError(f"there is no path from {sender} to {among}: none is computed from it by this route")

    def reaches(self, sender: Node, receiver: Node) -> bool:
        """Whether the receiver is computed after the sender, at a position that the routes lead to."""
        if self._order(sender, _WRITES) >= self._order(receiver, _READS):
            return False
        if sender.pos is None or receiver.pos is None:
            return True
        sent, read = _as_tuple(sender.pos), _as_tuple(receiver.pos)
        if self.routes == "all":
            return self.cfg.attention_dir == "bidirectional" or min(sent) <= max(read)
        return bool(set(sent) & set(read))

    def _order(self, node: Node, order: Mapping[str, int]) -> tuple[int, int]:
        if node.layer is None:
            return (0, 0) if node.name != "logits" else (self.cfg.n_layers, 0)
        if node.name == "mlp_in" and self.cfg.parallel_attn_mlp:
            return node.layer, _READS["q"]
        return node.layer, order[node.name]

    # Patching

    @torch.no_grad()
    def patch(
        self,
        senders: Sequence[Sequence[Node]],
        receivers: Sequence[Sequence[Node]],
        metric: AnyMetric,
        per_prompt: bool = False,
        verbose: bool = True,
    ) -> Float[Tensor, "sender receiver *batch"]:
        """Return the metric for every set of senders and every set of receivers."""
        if isinstance(metric, Metric):
            metric.check_run(self.tokens, self.cfg.d_vocab_out, self.mask)
        elif per_prompt:
            raise ValueError("per_prompt needs a metric of hooked_lm.metrics, which scores every prompt")
        everyone = list(dict.fromkeys(node for nodes in receivers for node in nodes))
        self._gather(senders, everyone)
        results = []
        for chunk in self._chunks(senders, everyone):
            cells = []
            for sent, arrived in zip(chunk, self._arrivals(chunk, everyone), strict=True):
                cells += [
                    [arrived[one] for one in nodes if any(self.reaches(sender, one) for sender in sent)]
                    for nodes in receivers
                ]
            scores = self._sweep(cells, metric, per_prompt, verbose)
            results.append(scores.unflatten(0, (len(chunk), len(receivers))))
        return torch.cat(results)

    def _sweep(
        self, cells: Sequence[Sequence[Intervention]], metric: AnyMetric, per_prompt: bool, verbose: bool
    ) -> Float[Tensor, "..."]:
        """Return the metric of every cell, [cell] or [cell batch]; those without interventions share one run."""
        empty = [index for index, cell in enumerate(cells) if not cell]
        made = [cell for cell in cells if cell] + [()] * bool(empty)
        scores = sweep(
            self.model,
            self.tokens,
            made,
            metric,
            attention_mask=self.mask,
            per_prompt=per_prompt,
            memory_budget=self.memory_budget,
            verbose=verbose,
        )
        place = torch.full((len(cells),), len(made) - 1, device=scores.device)
        full = [index for index, cell in enumerate(cells) if cell]
        place[full] = torch.arange(len(full), device=scores.device)
        return scores[place]

    def to_every_head(
        self, senders: Sequence[Sequence[Node]], component: str, metric: AnyMetric, verbose: bool
    ) -> Float[Tensor, "sender layer kv_head"]:
        """Return the metric for every set of senders and every head that receives."""
        if component not in ("q", "k", "v"):
            raise ValueError(f"component is 'q', 'k' or 'v', got {component!r}")
        n_heads = self.cfg.n_heads if component == "q" else self.cfg.n_kv_heads
        heads = [(Node(component, layer, head),) for layer in range(self.cfg.n_layers) for head in range(n_heads)]
        return self.patch(senders, heads, metric, verbose=verbose).unflatten(1, (self.cfg.n_layers, n_heads))

    def _gather(self, senders: Sequence[Sequence[Node]], receivers: Sequence[Node]) -> None:
        """Get the activations that the walk needs: the senders' of both runs, and the corrupted blocks'."""
        sites = {node.site(self.cfg.n_layers) for nodes in senders for node in nodes}
        self.clean = activations_of(self.model, self.clean_source, sorted(sites), self.tokens, self.given_mask)
        layers = range(self._last_layer(receivers) + 1)
        names = sites | {get_act_name("resid_pre", layer) for layer in layers}
        if self.routes != "all":
            names |= {get_act_name("attn_out", layer) for layer in layers}
        if self.routes == "direct" and not self.cfg.attn_only:
            names |= {get_act_name("mlp_out", layer) for layer in layers}
        source = self.tokens if self.corrupted_source is None else self.corrupted_source
        self.corrupted = activations_of(self.model, source, sorted(names), self.tokens, self.mask, "corrupted")

    def _chunks(self, senders: Sequence[Sequence[Node]], receivers: Sequence[Node]) -> Iterator[list[Sequence[Node]]]:
        """Split the sets of senders so that one walk stays within the memory budget, roughly."""
        cfg = self.cfg
        per_position = 6 * cfg.d_model + len(receivers) * max(cfg.d_head, cfg.d_model // 4)
        if self.routes != "direct" and cfg.d_mlp is not None:
            per_position += 3 * cfg.d_mlp
        if self.routes == "all":
            per_position += cfg.n_heads * (4 * cfg.d_head + 2 * self.tokens.shape[1])
        row = self.tokens.numel() * per_position * self.model.W_E.element_size()
        size = max(1, self.memory_budget // row)
        for start in range(0, len(senders), size):
            yield list(senders[start : start + size])

    def _last_layer(self, receivers: Sequence[Node]) -> int:
        return max(self.cfg.n_layers - 1 if node.layer is None else node.layer for node in receivers)

    def _arrivals(self, senders: Sequence[Sequence[Node]], receivers: Sequence[Node]) -> list[dict[Node, Intervention]]:
        """Return, for each set of senders, what puts at each receiver what it hears of them."""
        walk = _Walk(self, senders)
        heard: list[dict[Node, Intervention]] = [{} for _ in senders]
        for layer in range(self._last_layer(receivers) + 1):
            here = [one for one in receivers if layer == (self.cfg.n_layers - 1 if one.layer is None else one.layer)]
            for node, rows in walk.through_block(layer, here):
                for index, row in zip(walk.active, rows, strict=True):
                    part = replacement(self.model, node.site(self.cfg.n_layers), row, pos=node.pos, head=node.head)
                    heard[index][node] = part
        return heard


class _Walk:
    """The first run: the residual streams of all sets of senders, walked up together, each from its first sender on."""

    def __init__(self, paths: _Paths, senders: Sequence[Sequence[Node]]) -> None:
        self.paths, self.model, self.cfg, self.routes = paths, paths.model, paths.cfg, paths.routes
        self.senders = senders
        self.first = [min(node.layer or 0 for node in nodes) for nodes in senders]
        self.active: list[int] = []
        self.rows = self._base("resid_pre", 0)[None][:0]  # [row batch pos d_model]
        mask = paths.mask
        self.valid = None if mask is None or bool(mask.all()) else mask.bool()

    def through_block(self, layer: int, receivers: Sequence[Node]) -> Iterator[tuple[Node, Tensor]]:
        """Walk through one block; yield each receiver on the way, with what reaches its site, row by row."""
        self._join(layer)
        if not self.active:
            return
        block = self.model.blocks[layer]
        self.rows = self._sent(self._sent_embeddings(self.rows, layer), "resid_pre", layer)
        resid_pre = self.rows
        layout, shortformer = self._layout()
        read = block.attention_inputs(resid_pre.flatten(0, 1), shortformer)
        yield from self._seen(receivers, "resid_pre", resid_pre)
        for name, x in zip("qkv", read, strict=True):
            if any(node.name == name for node in receivers):
                yield from self._seen(receivers, name, self._row_by_row(block.attn.project(x, name.upper())))
        attn_out = self._attention(layer, read, layout)
        stream = resid_pre
        if self.cfg.attn_only or not block.parallel:
            stream = self._row_by_row(block.joined(resid_pre.flatten(0, 1), attn_out.flatten(0, 1), block.ln1))
        if not self.cfg.attn_only:
            stream = self._sent(stream, "resid_mid", layer)
            yield from self._seen(receivers, "resid_mid", stream)
            yield from self._seen(receivers, "mlp_in", stream)
            stream = self._after_mlp(layer, stream, attn_out)
        self.rows = self._sent(stream, "resid_post", layer)
        yield from self._seen(receivers, "resid_post", self.rows)
        yield from self._seen(receivers, "logits", self.rows)

    def _join(self, layer: int) -> None:
        """Let the sets whose first sender is in this block join, with the corrupted stream."""
        new = [index for index, first in enumerate(self.first) if first == layer]
        if new:
            self.active += new
            stream = self._base("resid_pre", layer)
            self.rows = torch.cat((self.rows, stream.expand(len(new), *stream.shape)))

    def _attention(self, layer: int, read: tuple[Tensor, ...], layout: SequenceLayout) -> Tensor:
        """What attention writes to each row: as in the corrupted run, but for senders, unless it is on the routes."""
        block = self.model.blocks[layer]
        if self.routes == "all":
            q, k, v = block.attn.queries_keys_values(*read, layout)
            z = self._sent(self._row_by_row(block.attn.attend(q, k, v, layout)), "z", layer)
            attn_out = self._row_by_row(block.ln1_post(block.attn.write(z.flatten(0, 1))))
            return self._sent(attn_out, "attn_out", layer)
        attn_out = self._same_for_all("attn_out", layer)
        sending = [row for row, index in enumerate(self.active) if self._sends(index, "z", layer)]
        if sending:
            z = self._sent(self._same_for_all("z", layer), "z", layer)[sending]
            written = block.ln1_post(block.attn.write(z.flatten(0, 1)))
            attn_out = attn_out.index_copy(
                0, torch.tensor(sending, device=z.device), written.unflatten(0, (len(sending), -1))
            )
        return self._sent(attn_out, "attn_out", layer)

    def _after_mlp(self, layer: int, stream: Tensor, attn_out: Tensor) -> Tensor:
        """The stream after the MLP, which reads `stream`: frozen, unless it is on the routes."""
        block = self.model.blocks[layer]
        if self.routes == "direct":
            mlp_out = self._same_for_all("mlp_out", layer)
        else:
            mlp_out = self._row_by_row(block.mlp_output(stream.flatten(0, 1)))
        mlp_out = self._sent(mlp_out, "mlp_out", layer)
        if block.parallel:
            return stream + attn_out + mlp_out
        return self._row_by_row(block.joined(stream.flatten(0, 1), mlp_out.flatten(0, 1), block.ln2))

    def _layout(self) -> tuple[SequenceLayout, Tensor | None]:
        """The layout of all rows, and what is added to the inputs of queries and keys in shortformer models."""
        n_pos, valid = self.rows.shape[2], self.valid
        layout = SequenceLayout(
            n_pos, 0, self.rows.device, None if valid is None else valid.repeat(len(self.active), 1)
        )
        if self.cfg.positional_embedding_type != "shortformer":
            return layout, None
        return layout, self.model.pos_embed(layout, self.rows.shape[0] * self.rows.shape[1])

    # Rows, senders and receivers

    def _base(self, name: str, layer: int) -> Tensor:
        return self.paths.corrupted[get_act_name(name, layer)]

    def _same_for_all(self, name: str, layer: int) -> Tensor:
        """The corrupted activation, once for each row."""
        base = self._base(name, layer)
        return base.expand(len(self.active), *base.shape)

    def _row_by_row(self, flat: Tensor) -> Tensor:
        return flat.unflatten(0, (len(self.active), -1))

    def _sends(self, index: int, name: str, layer: int | None) -> list[Node]:
        return [node for node in self.senders[index] if (node.name, node.layer) == (name, layer)]

    def _sent(self, rows: Tensor, name: str, layer: int) -> Tensor:
        """Rows of an activation with the clean values of those senders that are there."""
        site, edited = get_act_name(name, layer), rows
        for row, index in enumerate(self.active):
            for node in self._sends(index, name, layer):
                if edited is rows:
                    edited = rows.clone()
                part = replacement(self.model, site, self.paths.clean[site], pos=node.pos, head=node.head)
                edited[row] = part.apply(edited[row], (self.model.hook_dict[site].axes or "").split())[0]
        return edited

    def _sent_embeddings(self, rows: Tensor, layer: int) -> Tensor:
        """Rows that enter block 0, with what the clean embeddings of senders change."""
        if layer > 0:
            return rows
        edited = rows.clone()
        for name in ("embed", "pos_embed"):
            for row, index in enumerate(self.active):
                for node in self._sends(index, name, None):
                    site = node.site(self.cfg.n_layers)
                    change = self.paths.clean[site].to(rows) - self.paths.corrupted[site]
                    positions = range(rows.shape[2]) if node.pos is None else _as_tuple(node.pos)
                    edited[row, :, list(positions)] += change[:, list(positions)]
        return edited

    @staticmethod
    def _seen(receivers: Sequence[Node], name: str, rows: Tensor) -> Iterator[tuple[Node, Tensor]]:
        for node in receivers:
            if node.name == name:
                yield node, rows


def _is_node(nodes: object) -> TypeGuard[NodeLike]:
    """Whether this is one node, in any of its forms, and not several."""
    return isinstance(nodes, (Node, str)) or (isinstance(nodes, tuple) and bool(nodes) and isinstance(nodes[0], str))


def _as_several(nodes: Any) -> Sequence[Any]:
    return [nodes] if _is_node(nodes) else nodes


def _as_tuple(selection: Selection) -> tuple[int, ...]:
    return () if selection is None else selection if isinstance(selection, tuple) else (selection,)


def _from_start(pos: Selection, n_pos: int) -> Selection:
    return tuple(one % n_pos for one in pos) if isinstance(pos, tuple) else None if pos is None else pos % n_pos
