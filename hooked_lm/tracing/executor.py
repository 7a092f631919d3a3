"""Run a trace: its passes in order, with one hook at every site that is read or edited."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from hooked_lm.generation.decoding import decode_steps
from hooked_lm.hooked_model import HookedModel
from hooked_lm.hooks import HookHandle, HookPoint
from hooked_lm.names import layer_of
from hooked_lm.sweep import sweep
from hooked_lm.sweep.exactness import walking_obstacle
from hooked_lm.tracing.cells import SweepCells, intervention_of
from hooked_lm.tracing.graph import Decoding, Graph, Read, RunSpec, Write
from hooked_lm.tracing.placing import RunRows
from hooked_lm.tracing.planner import DEFAULT_MEMORY_BUDGET, PlannedPass, TracePlan, plan_trace
from hooked_lm.tracing.site_hooks import SiteHook, StepCount, StepHook
from hooked_lm.tracing.store import ValueStore
from hooked_lm.tracing.target import Target

__all__ = ["Watch", "plan_of", "run_trace"]

Watch = Callable[[int, int], None]


def run_trace(
    model: HookedModel,
    graph: Graph,
    target: Target,
    *,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    together: bool = True,
    watch: Watch | None = None,
) -> dict[str, Tensor]:
    """Return what a trace saves.

    Args:
        model: a `HookedTransformer`.
        graph: the trace.
        target: what the trace was recorded for.
        memory_budget: approximate memory, in bytes, for the activations of one pass.
        together: make several runs in one pass.
        watch: called with the index of a pass and the layer it has come to, at its start and after every block (of a
            sweep at its start only). What it raises ends the run.

    Raises:
        TraceError: values go around in a circle, or an operation fails.
    """
    plan = plan_of(model, graph, target, memory_budget=memory_budget, together=together)
    executor = _Executor(model, graph, plan.live, memory_budget, watch)
    with torch.no_grad():
        executor.store.begin()
        for number, one in enumerate(plan.passes):
            executor.run(number, one)
    return {name: executor.store.results[name] for name in graph.saves}


def plan_of(
    model: HookedModel,
    graph: Graph,
    target: Target,
    *,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    together: bool = True,
) -> TracePlan:
    """Return the passes in which `run_trace` runs a trace.

    Args:
        model, graph, target, memory_budget, together: as for `run_trace`.

    Raises:
        TraceError: values go around in a circle.
    """
    return plan_trace(
        graph,
        target,
        memory_budget=memory_budget,
        together=together,
        can_sweep=lambda: walking_obstacle(model, ()) is None,
    )


class _Executor:
    """The state of a trace while it runs."""

    def __init__(
        self, model: HookedModel, graph: Graph, live: set[int], memory_budget: int, watch: Watch | None
    ) -> None:
        self.model, self.graph, self.memory_budget, self.watch = model, graph, memory_budget, watch
        self.number = 0
        self.store = ValueStore(graph, live, self._apply, self._weight, model.embed.W_E.device)
        # A piece of the model that a value is put through is not a part of the run: the trace's hooks leave it alone.
        self.paused = False

    def run(self, number: int, planned: PlannedPass) -> None:
        """Make one pass, one generation or one sweep."""
        self.number = number
        if self.watch is not None:
            self.watch(number, 0)
        if planned.cells is not None:
            self._sweep(planned.runs, planned.cells)
            return
        spec = self.graph.runs[planned.runs[0]]
        if spec.decoding is None:
            self._read_prompts(planned)
        else:
            self._generate(planned, spec, spec.decoding)

    def _sweep(self, runs: Sequence[int], cells: SweepCells) -> None:
        """Score runs that are cells of one sweep."""
        interventions = []
        for run in runs:
            nodes = [(index, self.graph.nodes[index]) for index in cells.writes[run]]
            interventions.append(
                [intervention_of(node, self.store.for_write(at)) for at, node in nodes if isinstance(node, Write)]
            )
        tokens, mask = self._padded(self.graph.runs[runs[0]].tokens)
        scores = sweep(
            self.model,
            tokens,
            interventions,
            cells.metric,
            attention_mask=mask,
            per_prompt=True,
            memory_budget=self.memory_budget,
            verbose=False,
        )
        for run, score in zip(runs, scores, strict=True):
            self.store.put(cells.scores[run], score)

    def _generate(self, planned: PlannedPass, spec: RunSpec, decoding: Decoding) -> None:
        tokens, mask = self._padded(spec.tokens)
        steps = StepCount(max(spec.lengths))
        handles = []
        for name, events in planned.events.items():
            hook = StepHook(self, events, spec, steps)
            point = self.model.hook_dict[name]
            handles.append(HookHandle(point, hook, reads_only=hook.reads_only, by_keyword=False, this_thread=True))
        new = []
        with drawing_from(decoding.seed, tokens.device), self.model.attached([*handles, *self._watching()]):
            for token in decode_steps(
                self.model,  # type: ignore[arg-type]
                tokens,
                mask,
                decoding.max_new_tokens,
                decoding.sampling,
                decoding.eos_token_ids,
                decoding.use_past_kv_cache,
                all_steps=True,
            ):
                new.append(token)
                steps.now += 1
        for index in planned.generated:
            self.store.put(index, torch.stack(new, 1))

    def _watching(self) -> list[HookHandle]:
        """Handles that report each block's end to the watcher, and change nothing."""
        watch = self.watch
        if watch is None:
            return []

        def reporting(layer: int) -> Callable[[Tensor, HookPoint], None]:
            def report(x: Tensor, point: HookPoint) -> None:
                watch(self.number, layer)

            return report

        points = ((layer, f"blocks.{layer}.hook_resid_post") for layer in range(self.model.cfg.n_layers))
        return [
            HookHandle(
                self.model.hook_dict[name], reporting(layer + 1), reads_only=True, by_keyword=False, this_thread=True
            )
            for layer, name in points
        ]

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Prompts as tokens [batch pos] padded on the left, and their mask."""
        device, longest = self.model.embed.W_E.device, max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        return tokens, (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()

    def _read_prompts(self, planned: PlannedPass) -> None:
        specs = [self.graph.runs[run] for run in planned.runs]
        longest = max(max(spec.lengths) for spec in specs)
        prompts = [prompt for spec in specs for prompt in spec.tokens]
        rows: dict[int, RunRows] = {}
        start = 0
        for run, spec in zip(planned.runs, specs, strict=True):
            rows[run] = RunRows.of_prompts(start, spec.lengths, len(prompts), longest)
            start += spec.n_prompts
        tokens, mask = self._padded(prompts)
        handles = []
        for name, events in planned.events.items():
            hook = SiteHook(self, events, rows, planned.gradients)
            point = self.model.hook_dict[name]
            handles.append(HookHandle(point, hook, reads_only=hook.reads_only, by_keyword=False, this_thread=True))
        grad = torch.enable_grad() if planned.gradients else nullcontext()
        with grad, self.model.attached([*handles, *self._watching()]):
            self.model(tokens, attention_mask=mask, padding_side="left", **self._extent(planned, rows, longest))

    def _extent(self, planned: PlannedPass, rows: dict[int, RunRows], longest: int) -> dict[str, object]:
        """The options of the model that leave out layers and logits which nothing reads."""
        reads = [
            node.site
            for events in planned.events.values()
            for index in events
            if isinstance(node := self.graph.nodes[index], Read)
        ]
        deepest = max(reads, key=list(self.model.hook_dict).index)
        layer = layer_of(deepest)
        if layer is not None:
            return {"stop_at_layer": layer + 1}
        if not deepest.startswith(("ln_final.", "unembed.")):
            return {"stop_at_layer": 0}
        if not deepest.startswith("unembed."):
            return {"return_type": None}
        columns = self._columns(planned, rows, longest)
        return {} if columns is None else {"logits_to_keep": torch.tensor(columns)}

    def _columns(self, planned: PlannedPass, rows: dict[int, RunRows], longest: int) -> list[int] | None:
        """The columns of the pass whose logits are read or edited; None for all."""
        found: set[int] = set()
        for name, events in planned.events.items():
            if not name.startswith("unembed."):
                continue
            for index in events:
                node = self.graph.nodes[index]
                assert isinstance(node, (Read, Write))
                if node.select.pos is None:
                    return None
                entries = node.select.pos if isinstance(node.select.pos, tuple) else (node.select.pos,)
                for length in rows[node.run].lengths:
                    found.update(longest - length + one % length for one in entries)
        return None if len(found) == longest else sorted(found)

    def _weight(self, name: str) -> Tensor:
        weight, ranks = dict(self.model.named_parameters())[name].detach(), self.model.ranks
        return weight if ranks is None else ranks.whole_parameter(name, weight)

    def _apply(self, piece: str, operand: Tensor) -> Tensor:
        self.paused = True
        try:
            return self._piece(piece, operand)
        finally:
            self.paused = False

    def _piece(self, piece: str, operand: Tensor) -> Tensor:
        flat = operand.reshape(-1, 1) if piece == "embed" else operand.reshape(-1, 1, operand.shape[-1])
        if piece == "embed":
            made: Tensor = self.model.embed(flat)
        elif piece == "logits_of":
            made = self.model.logits_of(flat)
        else:
            made = self.model.ln_final(flat) if piece == "ln_final" else self.model.unembed(flat)
        shape = operand.shape if piece == "embed" else operand.shape[:-1]
        return made.reshape(*shape, made.shape[-1])


@contextmanager
def drawing_from(seed: int, device: torch.device) -> Generator[None, None, None]:
    """Within a `with` block, random numbers follow from a seed; the generators' states are restored afterwards.

    Args:
        seed: of the draws.
        device: on which they are made, besides the CPU.
    """
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield
