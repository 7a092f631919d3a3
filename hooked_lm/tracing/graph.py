"""The graph of a trace: runs, and nodes that read, compute, write and save. It holds data only.

A node refers to others by their index in the list of nodes, always to earlier ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from hooked_lm.generation.decoding import Sampling
from hooked_lm.interventions import Operation
from hooked_lm.metrics import Metric
from hooked_lm.tracing.types import TensorType

__all__ = [
    "Apply",
    "Compute",
    "Constant",
    "Decoding",
    "Generated",
    "Gradient",
    "Graph",
    "Node",
    "Piece",
    "Read",
    "RunSpec",
    "Score",
    "Select",
    "Weight",
    "Write",
]

Entries = int | tuple[int, ...] | None
Piece = str


@dataclass(frozen=True)
class Select:
    """The part of an activation that is read or written; None for all entries along an axis.

    Attributes:
        pos: positions of each prompt's own tokens; negative counts from its end.
        head, feature, batch: heads, entries of the last axis, prompts of the run.
        step: steps of a generation; 0 reads the prompt, each later one the token before it.
    """

    pos: Entries = None
    head: Entries = None
    feature: Entries = None
    batch: Entries = None
    step: Entries = None

    def chosen(self) -> dict[str, int | tuple[int, ...]]:
        """Return the selections that are not None, by the name of their field."""
        fields = {
            "pos": self.pos,
            "head": self.head,
            "feature": self.feature,
            "batch": self.batch,
            "step": self.step,
        }
        return {name: entries for name, entries in fields.items() if entries is not None}


@dataclass(frozen=True)
class Decoding:
    """How a run continues its prompts.

    Attributes:
        max_new_tokens: how many steps it has.
        sampling: how tokens are drawn.
        seed: of the draws.
        eos_token_ids: tokens that end a prompt, which goes on with the first of them.
        use_past_kv_cache: read only the newest token at each step.
    """

    max_new_tokens: int
    sampling: Sampling
    seed: int = 0
    eos_token_ids: tuple[int, ...] = ()
    use_past_kv_cache: bool = True


@dataclass(frozen=True)
class RunSpec:
    """One run of the model.

    Attributes:
        tokens: of each prompt, without padding.
        decoding: for a generation, how it goes on; None for one pass over the prompts.
    """

    tokens: tuple[tuple[int, ...], ...]
    decoding: Decoding | None = None

    @property
    def n_prompts(self) -> int:
        """How many prompts there are."""
        return len(self.tokens)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each prompt has."""
        return tuple(map(len, self.tokens))

    @property
    def length(self) -> int | None:
        """The number of tokens of every prompt; None if they differ."""
        lengths = set(self.lengths)
        return lengths.pop() if len(lengths) == 1 else None

    def steps(self, step: Entries) -> list[int]:
        """Return the steps of a selection; without a generation there is one, 0.

        Args:
            step: the selection.
        """
        if self.decoding is None:
            return [0]
        if step is None:
            return list(range(self.decoding.max_new_tokens))
        return list(step) if isinstance(step, tuple) else [step]

    def spans(self, axis: str, step: Entries) -> tuple[int, ...]:
        """Return the lengths along an axis of positions: of every prompt, at every step.

        Args:
            axis: `"pos"`, `"query"` or `"key"`.
            step: the steps.
        """
        return tuple(length for one in self.steps(step) for length in self.spans_at(axis, one))

    def spans_at(self, axis: str, step: int) -> tuple[int, ...]:
        """Return the lengths along an axis of positions, of every prompt, at one step.

        Args:
            axis: `"pos"`, `"query"` or `"key"`.
            step: the step; each after the first reads one position, and attends to all before it.
        """
        if step == 0:
            return self.lengths
        return tuple(length + step for length in self.lengths) if axis == "key" else (1,) * self.n_prompts


@dataclass(frozen=True)
class Node:
    """One node of a graph.

    Attributes:
        type: of its value; of the part that is written, for a write.
    """

    type: TensorType

    @property
    def inputs(self) -> tuple[int, ...]:
        """The nodes whose values it needs."""
        return ()


@dataclass(frozen=True)
class Read(Node):
    """An activation, or a part of it.

    Attributes:
        run: index of the run.
        site: full hook name.
        select: the part.
        version: how many writes at this site of this run come before it.
    """

    run: int
    site: str
    select: Select
    version: int


@dataclass(frozen=True)
class Generated(Node):
    """The new tokens of a generation [batch, step].

    Attributes:
        run: index of the run.
    """

    run: int


@dataclass(frozen=True)
class Write(Node):
    """An edit of an activation.

    Attributes:
        run, site, select: as for `Read`.
        ordinal: how many writes at this site of this run come before it.
        how: `"replace"`, `"add"`, `"scale"` or `"zero"`.
        value: the node of its value; None for `"zero"`.
    """

    run: int
    site: str
    select: Select
    ordinal: int
    how: Operation
    value: int | None

    @property
    def inputs(self) -> tuple[int, ...]:
        return () if self.value is None else (self.value,)


@dataclass(frozen=True)
class Compute(Node):
    """An operation of the table in `tracing.ops`.

    Attributes:
        name: of the operation.
        operands: the nodes that it takes.
        params: its other arguments.
    """

    name: str
    operands: tuple[int, ...]
    params: Mapping[str, object] = field(hash=False)

    @property
    def inputs(self) -> tuple[int, ...]:
        return self.operands


@dataclass(frozen=True, eq=False)
class Constant(Node):
    """A tensor, or a number.

    Attributes:
        value: of the constant. A number takes the precision of what it is combined with.
    """

    value: Tensor | float | int | bool


@dataclass(frozen=True)
class Apply(Node):
    """A piece of the model applied to a value.

    Attributes:
        piece: `"ln_final"`, `"unembed"`, `"logits_of"` or `"embed"`.
        operand: the node that it is applied to.
    """

    piece: Piece
    operand: int

    @property
    def inputs(self) -> tuple[int, ...]:
        return (self.operand,)


@dataclass(frozen=True)
class Weight(Node):
    """A parameter of the model.

    Attributes:
        name: as in `model.named_parameters()`.
    """

    name: str


@dataclass(frozen=True, eq=False)
class Score(Node):
    """A metric of a run's logits, one score for each prompt.

    Attributes:
        run: index of the run.
        metric: the metric.
        logits: the node that reads the logits at the metric's position.
    """

    run: int
    metric: Metric
    logits: int

    @property
    def inputs(self) -> tuple[int, ...]:
        return (self.logits,)


@dataclass(frozen=True)
class Gradient(Node):
    """The gradient of a number with respect to an activation that is read.

    Attributes:
        scalar: the node of the number.
        of: the node of the read.
    """

    scalar: int
    of: int

    @property
    def inputs(self) -> tuple[int, ...]:
        return (self.scalar, self.of)


@dataclass
class Graph:
    """An experiment: runs, nodes and what is saved.

    Attributes:
        runs: by index.
        nodes: in an order in which each comes after the nodes that it needs.
        saves: name -> the node that is saved.
        lines: node -> the line of code that recorded it, where that is known.
    """

    runs: list[RunSpec] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    saves: dict[str, int] = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)

    def writes(self, run: int) -> list[tuple[int, Write]]:
        """Return the writes of a run, each with its index, in order."""
        return [(index, node) for index, node in enumerate(self.nodes) if isinstance(node, Write) and node.run == run]
