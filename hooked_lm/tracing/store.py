"""ValueStore: the values of a trace while it runs. A node is computed once its inputs are, and freed after use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from hooked_lm._support.memory import is_out_of_memory
from hooked_lm.tracing.errors import TraceError
from hooked_lm.tracing.graph import (
    Apply,
    Compute,
    Constant,
    Generated,
    Gradient,
    Graph,
    Node,
    Read,
    Score,
    Weight,
    Write,
)
from hooked_lm.tracing.ops import Operand, compute

__all__ = ["ValueStore"]


class ValueStore:
    """The values of a trace while it runs.

    Args:
        graph: the trace.
        live: the nodes that are computed.
        apply: a piece of the model and a tensor -> the piece's output.
        weight: parameter name -> the parameter.
        device: where values are: that of the model's embeddings.

    Attributes:
        results: name -> saved tensor.
    """

    def __init__(
        self,
        graph: Graph,
        live: set[int],
        apply: Callable[[str, Tensor], Tensor],
        weight: Callable[[str], Tensor],
        device: torch.device,
    ) -> None:
        self.graph, self._apply, self._weight, self.device = graph, apply, weight, device
        self.results: dict[str, Tensor] = {}
        self._values: dict[int, Operand] = {}
        self._users: dict[int, list[int]] = defaultdict(list)
        self._missing: dict[int, int] = {}
        self._uses: dict[int, int] = defaultdict(int)
        self._names: dict[int, list[str]] = defaultdict(list)
        # Read node -> the activation of the pass with respect to which gradients are taken, and its part.
        self._watched: dict[int, tuple[Tensor, Callable[[Tensor], Tensor]]] = {}
        self._of_scalar: dict[int, list[int]] = defaultdict(list)
        self._gradients: dict[int, Tensor] = {}
        for name, saved in graph.saves.items():
            self._names[saved].append(name)
        for index in sorted(live):
            node = graph.nodes[index]
            inputs = set(node.inputs)
            self._missing[index] = len(inputs)
            for one in inputs:
                self._users[one].append(index)
                self._uses[one] += 1
            if isinstance(node, Gradient):
                self._of_scalar[node.scalar].append(index)
        self._open_gradients = sum(map(len, self._of_scalar.values()))
        self.watched_reads = {node.of for index in live if isinstance(node := graph.nodes[index], Gradient)}

    def begin(self) -> None:
        """Compute what needs no run."""
        for index in [index for index, missing in self._missing.items() if not missing]:
            if not isinstance(self.graph.nodes[index], (Read, Write, Generated)):
                self.put(index, self._computed(index))

    def watch(self, index: int, whole: Tensor, part: Callable[[Tensor], Tensor]) -> None:
        """Take the activation with respect to which gradients of a read are taken.

        Args:
            index: the node that reads it.
            whole: the activation of the pass.
            part: a tensor like `whole` -> the part that is read.
        """
        if index in self.watched_reads:
            self._watched[index] = (whole, part)

    def has(self, index: int) -> bool:
        """Return whether a value is there.

        Args:
            index: its node.
        """
        return index in self._values

    def for_write(self, index: int) -> Operand | None:
        """Return the value of a write.

        Args:
            index: the node of the write.
        """
        node = self.graph.nodes[index]
        assert isinstance(node, Write)
        if node.value is None:
            return None
        value = self._values[node.value]
        self._release(node.value)
        return value

    # Computing

    def put(self, index: int, value: Operand) -> None:
        """Store a value, and compute every node that has all its inputs now.

        Args:
            index: its node.
            value: the value: of a read, the part of the activation.
        """
        # The blocks of a model may be on several devices; what is computed of their activations is on one.
        stack = [(index, value.to(self.device) if isinstance(value, Tensor) else value)]
        while stack:
            at, made = stack.pop()
            self._values[at] = made
            for name in self._names.get(at, ()):
                self.results[name] = self._kept(made)
            for user in self._users.get(at, ()):
                self._missing[user] -= 1
                if not self._missing[user] and not isinstance(self.graph.nodes[user], (Read, Write)):
                    stack.append((user, self._computed(user)))
            if not self._uses[at]:
                self._values.pop(at, None)

    def _computed(self, index: int) -> Operand:
        node = self.graph.nodes[index]
        try:
            made = self._of(node, index)
        except (RuntimeError, IndexError, ValueError) as error:
            if is_out_of_memory(error):
                raise  # no fault of the node's
            raise TraceError(f"{type(node).__name__.lower()} failed: {error}", self.graph.lines.get(index)) from error
        for one in set(node.inputs):
            self._release(one)
        return made

    def _of(self, node: Node, index: int) -> Operand:
        if isinstance(node, Compute):
            return compute(node.name, [self._values[one] for one in node.operands], node.params, self.device)
        if isinstance(node, Constant):
            return node.value.to(self.device) if isinstance(node.value, Tensor) else node.value
        if isinstance(node, Weight):
            return self._weight(node.name).to(self.device)
        if isinstance(node, Gradient):
            return self._gradient(node, index)
        if isinstance(node, Apply):
            return self._apply(node.piece, self._tensor(node.operand))
        assert isinstance(node, Score)
        read = self._tensor(node.logits)
        if node.metric.tokens is not None:
            read = read.gather(-1, node.metric.tokens.to(read.device).expand(read.shape[0], -1))
        return node.metric.scores(read)

    def _tensor(self, index: int) -> Tensor:
        value = self._values[index]
        return value if isinstance(value, Tensor) else torch.as_tensor(value, device=self.device)

    def _gradient(self, node: Gradient, index: int) -> Tensor:
        """The gradient of a scalar: for all activations that are there already, in one backward pass."""
        if index not in self._gradients:
            scalar = self._tensor(node.scalar)
            asked = [one for one in self._of_scalar[node.scalar] if self._of_read(one) in self._watched]
            self._of_scalar[node.scalar] = [one for one in self._of_scalar[node.scalar] if one not in asked]
            whole = [self._watched[self._of_read(one)][0] for one in asked]
            self._open_gradients -= len(asked)
            found: tuple[Tensor | None, ...] = (None,) * len(asked)
            if scalar.requires_grad:
                found = torch.autograd.grad(scalar, whole, retain_graph=self._open_gradients > 0, allow_unused=True)
            for one, x, gradient in zip(asked, whole, found, strict=True):
                part = self._watched[self._of_read(one)][1]
                self._gradients[one] = part(torch.zeros_like(x) if gradient is None else gradient).to(self.device)
        return self._gradients.pop(index)

    def _of_read(self, gradient: int) -> int:
        node = self.graph.nodes[gradient]
        assert isinstance(node, Gradient)
        return node.of

    def _release(self, index: int) -> None:
        self._uses[index] -= 1
        if not self._uses[index]:
            self._values.pop(index, None)

    def _kept(self, value: Operand) -> Tensor:
        """A saved tensor of its own, without a graph and without the rest of the activation that it is a part of."""
        return torch.as_tensor(value, device=self.device).detach().clone(memory_format=torch.contiguous_format)
