"""TraceEstimate: what a trace will cost, told before it runs."""

from __future__ import annotations

from dataclasses import dataclass

from hooked_lm.config import HookedTransformerConfig
from hooked_lm.names import layer_of
from hooked_lm.tracing.graph import Graph, Read
from hooked_lm.tracing.planner import PlannedPass, TracePlan, bytes_per_position

__all__ = ["PassEstimate", "TraceEstimate", "estimate_plan", "estimate_runs"]


@dataclass(frozen=True)
class PassEstimate:
    """The cost of one pass, one generation or one sweep.

    Attributes:
        kind: `"pass"`, `"generation"` or `"sweep"`.
        prompts: how many rows it has.
        tokens: how many positions it reads, padding included.
        layers: how many blocks it runs.
        flops: floating-point operations, roughly. For a sweep they are those of a whole run for each cell, an upper
            bound.
        memory: bytes for its activations, roughly.
    """

    kind: str
    prompts: int
    tokens: int
    layers: int
    flops: float
    memory: int


@dataclass(frozen=True)
class TraceEstimate:
    """The cost of a trace.

    Attributes:
        passes: of each pass, in order.
    """

    passes: tuple[PassEstimate, ...]

    @property
    def flops(self) -> float:
        """Floating-point operations of all passes, roughly."""
        return sum(one.flops for one in self.passes)

    @property
    def memory(self) -> int:
        """Bytes of the pass with the largest activations, roughly."""
        return max((one.memory for one in self.passes), default=0)

    def __str__(self) -> str:
        number = "1 pass" if len(self.passes) == 1 else f"{len(self.passes)} passes"
        lines = [f"{number}, {self.flops / 1e9:.3g} GFLOP, {self.memory / 2**20:.3g} MiB at most"]
        for one in self.passes:
            lines.append(
                f"  {one.kind}: {one.prompts} prompts, {one.tokens} tokens, {one.layers} layers, "
                f"{one.flops / 1e9:.3g} GFLOP"
            )
        return "\n".join(lines)


def estimate_plan(plan: TracePlan, graph: Graph, cfg: HookedTransformerConfig) -> TraceEstimate:
    """Return what a plan will cost.

    A token takes two operations for each weight that it is multiplied by, three times as many where gradients are
    taken, and in attention four for each earlier position and entry of the heads.

    Args:
        plan: the plan.
        graph: the trace.
        cfg: the model's config.
    """
    return TraceEstimate(tuple(_of_pass(one, graph, cfg) for one in plan.passes))


def _of_pass(planned: PlannedPass, graph: Graph, cfg: HookedTransformerConfig) -> PassEstimate:
    specs = [graph.runs[run] for run in planned.runs]
    decoding = specs[0].decoding
    prompts = sum(spec.n_prompts for spec in specs)
    length = max(max(spec.lengths) for spec in specs)
    if decoding is not None:
        length += decoding.max_new_tokens - 1
    layers = cfg.n_layers if decoding is not None or planned.cells is not None else _layers(planned, graph, cfg)
    kind = "generation" if decoding is not None else "sweep" if planned.cells is not None else "pass"
    return estimate_runs(kind, cfg, prompts, length, layers, gradients=planned.gradients)


def estimate_runs(
    kind: str,
    cfg: HookedTransformerConfig,
    prompts: int,
    length: int,
    layers: int | None = None,
    *,
    gradients: bool = False,
) -> PassEstimate:
    """Return what it costs to run prompts of one length.

    Args:
        kind: for the estimate.
        cfg: the model's config.
        prompts: how many.
        length: of each.
        layers: how many blocks run; None for all.
        gradients: with a backward pass.
    """
    layers, tokens = cfg.n_layers if layers is None else layers, prompts * length
    per_token = 2.0 * layers * _weights_per_layer(cfg) + 4.0 * layers * length * cfg.n_heads * cfg.d_head / 2
    flops = tokens * per_token
    if layers == cfg.n_layers:
        flops += 2.0 * prompts * cfg.d_model * cfg.d_vocab_out
    memory = tokens * bytes_per_position(cfg)
    return PassEstimate(kind, prompts, tokens, layers, flops * (3 if gradients else 1), memory)


def _layers(planned: PlannedPass, graph: Graph, cfg: HookedTransformerConfig) -> int:
    deepest = 0
    for site, events in planned.events.items():
        if any(isinstance(graph.nodes[index], Read) for index in events):
            layer = layer_of(site)
            ends = site.startswith(("ln_final.", "unembed."))
            deepest = max(deepest, cfg.n_layers if ends else 0 if layer is None else layer + 1)
    return deepest


def _weights_per_layer(cfg: HookedTransformerConfig) -> int:
    """The weights of a block that a token is multiplied by; of a block with experts, where some have them."""
    heads = cfg.d_model * cfg.d_head * 2 * (cfg.n_heads + cfg.n_kv_heads)
    width = cfg.d_mlp or 0
    if cfg.experts_per_token is not None:
        width = (cfg.d_expert or width) * cfg.experts_per_token + (cfg.d_shared_expert or 0)
    return heads + (0 if cfg.attn_only else width * cfg.d_model * (3 if cfg.gated_mlp else 2))
