"""A naive interpreter of traces, the oracle of their tests: every read is a run of its own, of one prompt at a time.

It shares the graph's definition with the package, and nothing of the planner, the executor or the table of operations'
order of evaluation: values are computed by recursion, and a gradient is that with respect to zeros that are added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hooked_lm import HookedTransformer
from hooked_lm.names import selected_axis
from hooked_lm.tracing.graph import Apply, Compute, Constant, Gradient, Graph, Read, Score, Select, Weight, Write
from hooked_lm.tracing.ops import OPS


class UndefinedGradientError(Exception):
    """A gradient of a number that is not finite: what it is where the number does not depend on is left open."""


Perturbation = dict[tuple[int, str, int], list[Tensor | None]]


def interpret(model: HookedTransformer, graph: Graph, watched: bool = False) -> dict[str, Tensor]:
    """What a trace saves, by name.

    Args:
        model: the model.
        graph: the trace.
        watched: every run records all sites that the trace has in it, so that the model takes the same kernels.
    """
    reading = _Interpreter(model, graph, {}, watched)
    with torch.no_grad():
        return {name: torch.as_tensor(reading.value(node)).detach() for name, node in graph.saves.items()}


class _Interpreter:
    def __init__(self, model: HookedTransformer, graph: Graph, added: Perturbation, watched: bool = False) -> None:
        self.model, self.graph, self.added, self.watched = model, graph, added, watched
        self.places = {name: index for index, name in enumerate(model.hook_dict)}
        self.known: dict[int, Tensor | float] = {}

    def value(self, index: int) -> Tensor | float:
        if index not in self.known:
            self.known[index] = self._value(index)
        return self.known[index]

    def _value(self, index: int) -> Tensor | float:
        node = self.graph.nodes[index]
        if isinstance(node, Constant):
            return torch.tensor(node.value, dtype=torch.float64) if isinstance(node.value, float) else node.value
        if isinstance(node, Weight):
            return dict(self.model.named_parameters())[node.name].detach()
        if isinstance(node, Compute):
            return OPS[node.name].run([self.value(one) for one in node.operands], node.params)
        if isinstance(node, Apply):
            return self._apply(node.piece, torch.as_tensor(self.value(node.operand)))
        if isinstance(node, Score):
            logits = torch.as_tensor(self.value(node.logits))
            n_positions = self.graph.runs[node.run].lengths
            whole = logits[:, None].expand(-1, min(n_positions), -1)
            return node.metric.per_prompt(whole)
        if isinstance(node, Gradient):
            return self._gradient(node)
        assert isinstance(node, Read)
        return self._read(node)

    def _apply(self, piece: str, x: Tensor) -> Tensor:
        flat = x.reshape(1, -1) if piece == "embed" else x.reshape(1, -1, x.shape[-1])
        pieces: dict[str, Callable[[Tensor], Tensor]] = {
            "embed": lambda tokens: self.model.W_E[tokens],
            "ln_final": self.model.ln_final,
            "unembed": self.model.unembed,
            "logits_of": lambda stream: self.model.unembed(self.model.ln_final(stream)),
        }
        made = pieces[piece](flat)
        return made.reshape(*x.shape, -1) if piece == "embed" else made.reshape(*x.shape[:-1], -1)

    def _read(self, node: Read) -> Tensor:
        n_prompts = self.graph.runs[node.run].n_prompts
        chosen = range(n_prompts) if node.select.batch is None else _several(node.select.batch)
        whole = [self._activation(node, prompt) for prompt in chosen]
        axes = self.model.hook_dict[node.site].axes
        parts = [_part(one, axes, node.select) for one in whole]
        return parts[0] if isinstance(node.select.batch, int) else torch.stack(parts)

    def _activation(self, node: Read, prompt: int) -> Tensor:
        """The activation [1 ...] of one prompt: a plain run of it alone, with the writes that come before the read."""
        reached = (self.places[node.site], node.version)
        hooks: list[tuple[str, Callable[..., Tensor]]] = []
        writes = [
            (self.places[other.site], other.ordinal, other)
            for other in self.graph.nodes
            if isinstance(other, Write) and other.run == node.run
        ]
        for place, ordinal, write in sorted(writes, key=lambda one: one[:2]):
            if (place, ordinal) < reached:
                self._add_perturbation(hooks, node.run, write.site, ordinal, prompt)
                hooks.append((write.site, self._edit(write, prompt)))
        sites = {site for run, site, _ in self.added if run == node.run and self.places[site] <= reached[0]}
        for site in sites:
            written = sum(other.site == site for _, _, other in writes)
            last = node.version if site == node.site else written
            self._add_perturbation(hooks, node.run, site, last, prompt)
        tokens = torch.tensor([self.graph.runs[node.run].tokens[prompt]])
        if self.watched:
            with self.model.hooks(fwd_hooks=hooks):
                return self.model.run_with_cache(tokens, names_filter=self._sites(node.run))[1][node.site]
        kept: list[Tensor] = []

        def keep(x: Tensor, hook: object) -> Tensor:
            kept.append(x)
            return x

        self.model.run_with_hooks(tokens, prepend_bos=False, fwd_hooks=[*hooks, (node.site, keep)])
        return kept[0]

    def _sites(self, run: int) -> list[str]:
        found = {one.site for one in self.graph.nodes if isinstance(one, (Read, Write)) and one.run == run}
        return sorted(found)

    def _add_perturbation(
        self, hooks: list[tuple[str, Callable[..., Tensor]]], run: int, site: str, version: int, prompt: int
    ) -> None:
        zeros = self.added.get((run, site, version))
        if zeros is None:
            return

        def add(x: Tensor, hook: object) -> Tensor:
            if zeros[prompt] is None:
                zeros[prompt] = torch.zeros_like(x, requires_grad=True)
            return x + zeros[prompt]

        hooks.append((site, add))

    def _edit(self, write: Write, prompt: int) -> Callable[..., Tensor]:
        run = self.graph.runs[write.run]
        chosen = list(range(run.n_prompts)) if write.select.batch is None else list(_several(write.select.batch))
        if prompt not in chosen:
            return lambda x, hook: x
        value = None if write.value is None else torch.as_tensor(self.value(write.value))
        axes = self.model.hook_dict[write.site].axes

        def edit(x: Tensor, hook: object) -> Tensor:
            index = _index(x, axes, write.select)
            before = x[index]
            if value is None:
                after = torch.zeros_like(before)
            else:
                after = self._combined(write, before, value, axes, chosen.index(prompt))
            edited = x.clone()
            edited[index] = after
            return edited

        return edit

    def _combined(self, write: Write, before: Tensor, value: Tensor, axes: Sequence[str], row: int) -> Tensor:
        """The edited part [1 ...]: the value's own row, with dropped axes put back."""
        dropped = {selected_axis(axes, name) for name, one in write.select.chosen().items() if isinstance(one, int)}
        kept = [axis for axis in range(before.ndim) if axis not in dropped]
        given = value
        if 0 in kept and given.ndim == len(kept):
            given = given[row : row + 1] if given.shape[0] > 1 else given
        wide = given.reshape((1,) * (len(kept) - given.ndim) + tuple(given.shape))
        for axis in sorted(axis for axis in dropped if axis is not None):
            wide = wide.unsqueeze(axis)
        wide = wide.to(before.dtype)
        if write.how == "replace":
            return wide.expand_as(before)
        return before + wide if write.how == "add" else before * wide

    def _gradient(self, node: Gradient) -> Tensor:
        read = self.graph.nodes[node.of]
        assert isinstance(read, Read)
        zeros: list[Tensor | None] = [None] * self.graph.runs[read.run].n_prompts
        within = _Interpreter(self.model, self.graph, {(read.run, read.site, read.version): zeros})
        with torch.enable_grad():
            scalar = torch.as_tensor(within.value(node.scalar))
            if not scalar.isfinite():
                raise UndefinedGradientError
            shapes = [within._activation(read, prompt) for prompt in range(len(zeros))]
        axes = self.model.hook_dict[read.site].axes
        parts = []
        for prompt in range(len(zeros)) if read.select.batch is None else _several(read.select.batch):
            leaf = zeros[prompt]
            assert leaf is not None
            found = None
            if scalar.requires_grad:
                found = torch.autograd.grad(scalar, leaf, retain_graph=True, allow_unused=True)[0]
            gradient = torch.zeros_like(shapes[prompt]) if found is None else found
            parts.append(_part(gradient, axes, read.select))
        return parts[0] if isinstance(read.select.batch, int) else torch.stack(parts)


def _several(entries: int | tuple[int, ...] | None) -> tuple[int, ...]:
    assert entries is not None
    return entries if isinstance(entries, tuple) else (entries,)


def _index(x: Tensor, axes: Sequence[str], select: Select) -> tuple[np.ndarray, ...]:
    """An index of one prompt's part that keeps all axes."""
    lists = [list(range(size)) for size in x.shape]
    for name, entries in select.chosen().items():
        axis = selected_axis(axes, name)
        if name != "batch":
            assert axis is not None
            lists[axis] = [one % x.shape[axis] for one in _several(entries)]
    return np.ix_(*lists)


def _part(x: Tensor, axes: Sequence[str], select: Select) -> Tensor:
    """One prompt's part, without the batch axis and those of single entries."""
    part = x[_index(x, axes, select)]
    dropped = [selected_axis(axes, name) for name, one in select.chosen().items() if isinstance(one, int)]
    for axis in sorted({axis for axis in dropped if axis} | {0}, reverse=True):
        part = part.squeeze(axis)
    return part
