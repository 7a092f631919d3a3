"""Information flow routes: from a final residual state down to the tokens, along the terms that make up each state.

Ferrando and Voita 2024, "Information Flow Routes: Automatically Interpreting Language Models at Scale". Every residual
state is a sum: the state before, what each head writes of each source position (pattern times value times `W_O`), what
the MLP writes, and biases. A term `t` of a state `y` is as important as it is close to the state (proximity, as in
Ferrando et al. 2022, "Measuring the Mixture of Contextual Information in the Transformer"):

    proximity(t) = max(0, ||y||_1 - ||y - t||_1)        importance(t) = proximity(t) / sum of all proximities

From the final state of one position downwards, edges whose importance is above a threshold are kept. One forward pass.
Where large terms cancel each other, none of them may be close to the state: the routes end there (`cancelled`).

What is a term: a value includes `b_V`, so that bias counts with the position it is read at. `b_O`, and the bias of a
norm behind the heads or on the stream, depend on no position: together they are one term of the kind "bias". `b_out`
counts with the MLP. A norm on what heads write, or on the stream itself (post-norm), is linear once its scale is held
at what it was in the run: a term is what arrives in the stream behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from hooked_lm._support.integers import integer
from hooked_lm._support.precision import at_least_single, not_autocast
from hooked_lm.activation_cache import ActivationCache
from hooked_lm.circuits.folded import linear_part
from hooked_lm.circuits.routes_result import EdgeKind, InformationRoutes, RouteEdge, RouteNode
from hooked_lm.circuits.stock_only import require_stock_attention
from hooked_lm.components.norm import Norm
from hooked_lm.components.projections import per_query_head
from hooked_lm.components.stock import require_stock
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooked_model import HookedModel
from hooked_lm.names import get_act_name
from hooked_lm.tokenization import Prompts
from hooked_lm.tokenization.methods import check_attention_mask

__all__ = ["information_routes"]

# A sum counts as exact if its error is below this number of rounding errors of the largest possible terms.
_ROUNDINGS = 64
# The numbers of the terms of heads that are formed at a time: 16 MB in float32.
_NUMBERS_AT_A_TIME = 2**22


@torch.no_grad()
def information_routes(
    model: HookedModel,
    prompt: Prompts,
    *,
    pos: int = -1,
    threshold: float = 0.04,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    prepend_bos: bool | None = None,
    precision: float | None = None,
    verbose: bool = True,
) -> InformationRoutes:
    """Return the routes on which information comes to the final residual state of a position, after one forward pass.

    Hooks and interventions that are in place act in the run, as long as each state stays the sum of its terms. States
    that no kept edge leads to are not taken apart.

    Args:
        model: a `HookedTransformer`.
        prompt: one prompt: a string, or tokens [pos] or [1 pos].
        pos: the position whose final state is explained, padding included in the count; negative from the end.
        threshold: edges with a larger importance are kept, each head's edge from each position by itself. 0 keeps all
            that contribute.
        attention_mask: [1 pos], 0 at padding, for tokens.
        prepend_bos: as for the model.
        precision: the relative precision of the run, by which float error in the sums is judged; by default that of the
            weights. Use `2**-10` for a float32 model that ran in TF32.
        verbose: show a progress bar.

    Raises:
        ValueError: several prompts, a position that the prompt lacks or that is padding, a threshold outside 0 to 1,
            overridden attention or norms around it, experts that write past a layer (`shortcut_experts`), or terms that
            do not sum to a state, because a hook changed the run in between.
    """
    _check_settings(threshold, precision)
    _check_model(model)
    tokens, mask = model.tokens_and_mask(prompt, attention_mask, prepend_bos)
    if mask is None:
        mask = torch.ones_like(tokens)
    check_attention_mask(mask, *tokens.shape)
    start = _checked_position(tokens, mask, pos)
    steps = list(_steps(model.cfg))
    _, cache = model.run_with_cache(
        tokens,
        attention_mask=mask,
        names_filter=sorted({name for step in steps for name in step.names(model)}),
        stop_at_layer=model.cfg.n_layers,
        return_type=None,
    )
    run = _ObservedRun(model, cache, precision)
    with not_autocast(model.embed.W_E):
        return _walked(model, run, steps, tokens[0], start, threshold, verbose)


def _check_settings(threshold: float, precision: float | None) -> None:
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold is an importance, from 0 to below 1, got {threshold!r}")
    if precision is not None and not 0 < precision < 1:
        raise ValueError(f"precision is relative, between 0 and 1, got {precision!r}")


def _check_model(model: HookedModel) -> None:
    if model.cfg.n_layers == 0:
        raise ValueError("this model has no layers, and so no routes through them")
    if model.cfg.shortcut_experts:
        raise ValueError(
            "in this model experts of one layer write to the stream in the next: what a layer adds is not made from "
            "that layer's input alone, and routes would lead past them"
        )
    for layer, block in enumerate(model.blocks):
        require_stock_attention(model, layer, "information routes")
        if model.cfg.norm_placement == "residual" and not model.cfg.attn_only:
            require_stock("information routes", f"blocks.{layer}.ln2", block.ln2)


def _checked_position(tokens: Tensor, mask: Tensor, pos: int) -> int:
    n_pos, pos = tokens.shape[1], integer(pos, "pos")
    if len(tokens) != 1:
        raise ValueError(f"routes are of one prompt, got {len(tokens)}: call once for each")
    if not -n_pos <= pos < n_pos:
        raise ValueError(f"the prompt has positions 0-{n_pos - 1}, got pos {pos}")
    if not bool(mask[0, pos]):
        raise ValueError(f"pos {pos} is padding in this prompt")
    return pos % n_pos


# The sums


@dataclass(frozen=True)
class _Step:
    """A sublayer, and the sum that the stream is after it.

    layer: the block.
    before, after: the stream's names on either side, `"pre"`, `"mid"` or `"post"`.
    parts: which sublayers write in this step: `"attn"`, `"mlp"`, or in parallel blocks both.
    norm: the name of the norm on the stream at the end of the step; None if there is none.
    """

    layer: int
    before: str
    after: str
    parts: tuple[str, ...]
    norm: str | None

    def stream(self, name: str) -> str:
        return get_act_name(f"resid_{name}", self.layer)

    def names(self, model: HookedModel) -> Iterator[str]:
        """Yield the activations that the step's terms are made from."""
        yield from (self.stream(self.before), self.stream(self.after))
        block = model.blocks[self.layer]
        norms = [] if self.norm is None else [getattr(block, self.norm)]
        if "mlp" in self.parts:
            yield get_act_name("mlp_out", self.layer)
        if "attn" in self.parts:
            norms.append(block.ln1_post)
            sites = ("v", "pattern", "gate") if model.cfg.attention_gate else ("v", "pattern")
            yield from (get_act_name(site, self.layer) for site in sites)
        yield from (norm.hook_scale.name for norm in norms if isinstance(norm, Norm))


def _steps(cfg: HookedTransformerConfig) -> Iterator[_Step]:
    """Yield the sublayers in the order in which they write."""
    on_stream = cfg.norm_placement == "residual"
    for layer in range(cfg.n_layers):
        if cfg.attn_only:
            yield _Step(layer, "pre", "post", ("attn",), "ln1" if on_stream else None)
        elif cfg.parallel_attn_mlp:
            yield _Step(layer, "pre", "post", ("attn", "mlp"), None)
        else:
            yield _Step(layer, "pre", "mid", ("attn",), "ln1" if on_stream else None)
            yield _Step(layer, "mid", "post", ("mlp",), "ln2" if on_stream else None)


class _ObservedRun:
    """The recorded run of one prompt: activations without batch axis, on one device, half precision as float32."""

    def __init__(self, model: HookedModel, cache: ActivationCache, precision: float | None) -> None:
        self.model, self.cache = model, cache
        W_E = model.embed.W_E
        self.device = W_E.device
        self.eps = torch.finfo(W_E.dtype).eps if precision is None else precision

    def at(self, name: str) -> Tensor:
        """Return an activation, [pos ...] or [head query key]."""
        return self.exact(self.cache[name][0])

    def exact(self, x: Tensor) -> Tensor:
        """Return a tensor in single precision at least, on the device of the others."""
        return at_least_single(x.detach().to(self.device))

    def scale(self, norm: nn.Module, queries: Int[Tensor, " query"]) -> Float[Tensor, "query 1"] | float:
        """Return what a norm divided by; 1 for a module that is no norm."""
        return self.at(norm.hook_scale.name)[queries] if isinstance(norm, Norm) else 1.0

    def bias(self, norm: nn.Module) -> Tensor | float:
        """Return what a norm adds; 0 for a module that is no norm."""
        return self.exact(norm.b) if isinstance(norm, Norm) and norm.b is not None else 0.0


@dataclass(frozen=True)
class _Sum:
    """The states at some positions after a step, and their terms.

    state: as the model computed it, [query d_model].
    whole: terms that are one vector for each position, by kind.
    heads: what the heads write of each source position; None in a step without attention.
    """

    state: Float[Tensor, "query d_model"]
    whole: dict[EdgeKind, Float[Tensor, "query d_model"]]
    heads: _HeadTerms | None

    def importances(self) -> tuple[dict[EdgeKind, Float[Tensor, " query"]], Float[Tensor, "query head key"] | None]:
        """Return the importances of the terms; together they sum to 1 at each position."""
        size = self.state.abs().sum(-1)
        whole = {kind: (size - (self.state - term).abs().sum(-1)).clamp(min=0) for kind, term in self.whole.items()}
        total = torch.stack(list(whole.values())).sum(0)
        heads = None if self.heads is None else self.heads.proximities(self.state)
        if heads is not None:
            total = total + heads.sum((1, 2))
        # Terms that cancel each other may all be further from the state than nothing is: then it has no edges.
        total = total.where(total > 0, 1.0)
        shares = {kind: proximity / total for kind, proximity in whole.items()}
        return shares, None if heads is None else heads / total[:, None, None]

    def off(self, eps: float, name: str) -> float:
        """Return the largest difference between a state and the sum of its terms.

        Raises:
            ValueError: it is larger than rounding.
        """
        total, size = torch.zeros_like(self.state), torch.zeros_like(self.state[:, 0])
        for term in self.whole.values():
            total, size = total + term, size + term.norm(dim=-1)
        if self.heads is not None:
            total, size = total + self.heads.summed(), size + self.heads.size()
        off, allowed = (total - self.state).abs().amax(-1), _ROUNDINGS * eps * size
        if not bool((off <= allowed).all()):
            worst = int((off - allowed).nan_to_num(float("inf")).argmax())
            raise ValueError(
                f"the terms of {name} sum to another vector: off by {float(off[worst]):.3g}, and float error explains "
                f"{float(allowed[worst]):.1g}. A hook or intervention changed the run in between, or it ran in less "
                "precision than the weights have (then say precision=)"
            )
        return float(off.max())


@dataclass(frozen=True)
class _HeadTerms:
    """What heads write of each source position: `coefficients` times what `written` returns.

    coefficients: the pattern, divided by the scales of norms behind the heads, [query head key].
    v: [head key d_head].
    W: from values to the stream, through the linear part of these norms, [head d_head d_model].
    gate: factors on the values, [query head d_head]; None in a model without gates.
    """

    coefficients: Float[Tensor, "query head key"]
    v: Float[Tensor, "head key d_head"]
    W: Float[Tensor, "head d_head d_model"]
    gate: Float[Tensor, "query head d_head"] | None

    def summed(self) -> Float[Tensor, "query d_model"]:
        """Return the sum of all terms."""
        z = einsum(self.coefficients, self.v, "query head key, head key d_head -> query head d_head")
        z = z if self.gate is None else z * self.gate
        total: Tensor = einsum(z, self.W, "query head d_head, head d_head d_model -> query d_model")
        return total

    def size(self) -> Float[Tensor, " query"]:
        """Return how large the terms could be in all; rounding errors are relative to it."""
        widths: Tensor = torch.linalg.vector_norm(self.v, dim=-1) * torch.linalg.matrix_norm(self.W)[:, None]
        return (self.coefficients.abs() * widths).sum((1, 2))

    def proximities(self, state: Float[Tensor, "query d_model"]) -> Float[Tensor, "query head key"]:
        """Return each term's proximity to the state, a block of terms at a time."""
        n_queries, n_heads, n_keys = self.coefficients.shape
        found, size = torch.zeros_like(self.coefficients), state.abs().sum(-1)
        block = max(1, _NUMBERS_AT_A_TIME // (n_keys * state.shape[-1]))
        n_rows = max(1, block // n_heads)
        for heads in _slices(n_heads, block):
            written = einsum(self.v[heads], self.W[heads], "head key d_head, head d_head d_model -> head key d_model")
            for rows in _slices(n_queries, n_rows):
                if self.gate is not None:
                    gated = self.v[heads] * self.gate[rows, heads, None]
                    written = einsum(
                        gated, self.W[heads], "query head key d_head, head d_head d_model -> query head key d_model"
                    )
                terms = self.coefficients[rows, heads, :, None] * written
                apart = (state[rows, None, None] - terms).abs().sum(-1)
                found[rows, heads] = (size[rows, None, None] - apart).clamp(min=0)
        return found


def _slices(n: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n, size)]


def _sum_after(run: _ObservedRun, step: _Step, queries: Int[Tensor, " query"]) -> _Sum:
    """Take apart the states after a step."""
    block = run.model.blocks[step.layer]
    norm = nn.Identity() if step.norm is None else getattr(block, step.norm)
    scale = run.scale(norm, queries)

    def arriving(x: Float[Tensor, "query d_model"]) -> Float[Tensor, "query d_model"]:
        return linear_part(norm, x) / scale

    state = run.at(step.stream(step.after))[queries]
    whole: dict[EdgeKind, Tensor] = {"residual": arriving(run.at(step.stream(step.before))[queries])}
    bias, heads = torch.zeros_like(state) + run.bias(norm), None
    if "mlp" in step.parts:
        whole["mlp"] = arriving(run.at(get_act_name("mlp_out", step.layer))[queries])
    if "attn" in step.parts:
        inner = run.scale(block.ln1_post, queries)
        b_O = linear_part(block.ln1_post, run.exact(block.attn.b_O)) / inner + run.bias(block.ln1_post)
        bias = bias + arriving(torch.zeros_like(state) + b_O)
        heads = _head_terms(run, step.layer, queries, lambda W: linear_part(norm, W), inner * scale)
    whole["bias"] = bias
    return _Sum(state, whole, heads)


def _head_terms(
    run: _ObservedRun,
    layer: int,
    queries: Int[Tensor, " query"],
    behind: Callable[[Tensor], Tensor],
    scale: Float[Tensor, "query 1"] | float,
) -> _HeadTerms:
    """The terms of heads; `behind` is the linear part of the norm on the stream, `scale` of all norms behind them."""
    block, n_heads = run.model.blocks[layer], run.model.cfg.n_heads
    pattern = run.at(get_act_name("pattern", layer))[:, queries].movedim(0, 1)
    v = per_query_head(run.at(get_act_name("v", layer)), n_heads, dim=1).movedim(0, 1)
    gate = run.at(get_act_name("gate", layer))[queries] if run.model.cfg.attention_gate else None
    W = behind(linear_part(block.ln1_post, run.exact(block.attn.W_O)))
    return _HeadTerms(pattern / (scale[..., None] if isinstance(scale, Tensor) else scale), v, W, gate)


# The graph


def _walked(
    model: HookedModel,
    run: _ObservedRun,
    steps: list[_Step],
    tokens: Tensor,
    start: int,
    threshold: float,
    verbose: bool,
) -> InformationRoutes:
    """Go down from the final state, and keep the edges above the threshold."""
    flow = torch.zeros(len(tokens), dtype=torch.float64)
    flow[start], reached = 1.0, {start}
    edges, cancelled, off, bias_flow = list[RouteEdge](), list[RouteNode](), 0.0, 0.0
    for depth in tqdm(range(len(steps), 0, -1), disable=not verbose, desc="routes", leave=False):
        step = steps[depth - 1]
        queries = torch.tensor(sorted(reached), device=run.device)
        terms = _sum_after(run, step, queries)
        off = max(off, terms.off(run.eps, step.stream(step.after)))
        shares, by_head = terms.importances()
        nothing_near = torch.stack(list(shares.values())).sum(0) + (0 if by_head is None else by_head.sum((1, 2))) == 0
        cancelled += [_node(step, depth, int(pos)) for pos in queries[nothing_near]]
        below = torch.zeros_like(flow)
        reached = set[int]()
        for edge in _edges(steps, depth, queries.tolist(), shares, by_head, threshold, flow):
            edges.append(edge)
            if edge.source is None:
                bias_flow += edge.flow
            else:
                below[edge.source.pos] += edge.flow
                reached.add(edge.source.pos)
        flow = below
        if not reached:
            break
    strings = [str(one) for one in tokens.tolist()] if model.tokenizer is None else model.to_str_tokens(tokens)
    return InformationRoutes(
        tokens=tokens.cpu(),
        strings=tuple(str(one) for one in strings),
        start=RouteNode(len(steps), f"{model.cfg.n_layers - 1}_post", start),
        threshold=threshold,
        edges=tuple(edges),
        inputs=flow,
        bias_flow=bias_flow,
        cancelled=tuple(cancelled),
        n_layers=model.cfg.n_layers,
        n_heads=model.cfg.n_heads,
        off=off,
    )


def _node(step: _Step, depth: int, pos: int) -> RouteNode:
    return RouteNode(depth, f"{step.layer}_{step.after}", pos)


def _edges(
    steps: list[_Step],
    depth: int,
    queries: list[int],
    shares: dict[EdgeKind, Float[Tensor, " query"]],
    by_head: Float[Tensor, "query head key"] | None,
    threshold: float,
    flow: Float[Tensor, " pos"],
) -> Iterator[RouteEdge]:
    """Yield the edges above the threshold into the states after a step, a state at a time, the strongest first."""
    step = steps[depth - 1]
    for row, pos in enumerate(queries):
        into, arriving = _node(step, depth, pos), float(flow[pos])
        found: list[tuple[float, EdgeKind, int | None, int | None]] = [
            (float(share[row]), kind, None, None if kind == "bias" else pos) for kind, share in shares.items()
        ]
        if by_head is not None:
            kept = (by_head[row] > threshold).nonzero().tolist()
            found += [(float(by_head[row, head, key]), "head", head, key) for head, key in kept]
        for value, kind, head, key in sorted(found, key=lambda one: -one[0]):
            if value > threshold:
                source = None if key is None else _below(steps, depth, key)
                yield RouteEdge(kind, step.layer, head, source, into, value, arriving * value)


def _below(steps: list[_Step], depth: int, pos: int) -> RouteNode:
    return RouteNode(0, "0_pre", pos) if depth == 1 else _node(steps[depth - 2], depth - 1, pos)
