"""Trace: record an experiment on a model, then run it whole.

Within `with model.trace() as t:` nothing runs. Runs are named (`t.prompts`); their activations are read, edited and
computed with; at the end of the block the library plans the passes and makes them. A read sees its run with all edits
that the run has upstream of it, wherever they stand in the block; at one site, lines keep their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from hooked_lm._support.integers import entries_of, integer
from hooked_lm.generation.decoding import Sampling
from hooked_lm.tracing.errors import TraceError, calling_line
from hooked_lm.tracing.estimate import TraceEstimate, estimate_plan
from hooked_lm.tracing.graph import (
    Apply,
    Compute,
    Constant,
    Decoding,
    Gradient,
    Graph,
    Node,
    Read,
    RunSpec,
    Weight,
)
from hooked_lm.tracing.ops import infer_type
from hooked_lm.tracing.planner import TracePlan
from hooked_lm.tracing.runs import Run
from hooked_lm.tracing.target import Target
from hooked_lm.tracing.types import Kind, TensorType
from hooked_lm.tracing.values import Value, ValueLike, plain_params
from hooked_lm.tracing.wire import content_hash, save_graph

__all__ = ["Trace"]

_PIECES = ("ln_final", "unembed", "logits_of", "embed")
Executor = Callable[[Graph], dict[str, Tensor]]
Planner = Callable[[Graph], TracePlan]


class Trace:
    """An experiment that is recorded, checked and then run. `model.trace()` makes one.

    Args:
        target: what is known of the model.
        execute: runs the graph, and returns the saved tensors by name.
        plan: tells in which passes.

    Attributes:
        target: the model's sites and sizes.
        graph: what was recorded.
        results: name -> saved tensor, once the trace has run.
        runs_at_exit: whether the end of the `with` block runs it.
    """

    def __init__(self, target: Target, execute: Executor, plan: Planner) -> None:
        self.target = target
        self.graph = Graph()
        self.results: dict[str, Tensor] | None = None
        self.runs_at_exit = True
        self._execute, self._plan = execute, plan

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self.runs_at_exit:
            self.run()

    def run(self) -> dict[str, Tensor]:
        """Run the trace and return what it saves, by name. A `with` block does this when it ends.

        Raises:
            TraceError: it has run, saves nothing, or values in it go around in a circle.
        """
        self._check_open()
        if not self.graph.saves:
            raise TraceError("this trace saves nothing, so nothing would be run: call .save() on the values you want")
        self.results = self._execute(self.graph)
        return self.results

    # Runs

    def prompts(self, input: object, *, prepend_bos: bool | None = None, attention_mask: Tensor | None = None) -> Run:
        """Return a run of the model on prompts, which is made when the trace runs.

        Args:
            input: a string, a list of strings of any lengths, tokens [batch pos], or a list of lists of tokens.
            prepend_bos: for strings; by default the model's.
            attention_mask: [batch pos] of a tensor of tokens, 0 at padding.

        Raises:
            TraceError: the model does not take them.
        """
        self._check_open()
        try:
            tokens = self._read(input, prepend_bos, attention_mask)
        except (ValueError, TypeError) as error:
            raise TraceError(str(error), calling_line()) from error
        return self.run_of(RunSpec(tuple(tuple(row) for row in tokens)))

    def run_of(self, spec: RunSpec) -> Run:
        """Return a run of the model on tokens.

        Args:
            spec: the tokens.

        Raises:
            TraceError: no prompt, too long a one, or tokens that the model does not have.
        """
        cfg = self.target.cfg
        if not spec.tokens or min(spec.lengths) < 1 or max(spec.lengths) > cfg.n_ctx:
            raise TraceError(
                f"a run has one prompt or more, of 1 to {cfg.n_ctx} tokens (n_ctx); got lengths {list(spec.lengths)}",
                calling_line(),
            )
        if not all(0 <= token < cfg.d_vocab for row in spec.tokens for token in row):
            raise TraceError(f"tokens are 0 to {cfg.d_vocab - 1}", calling_line())
        if spec.decoding is not None:
            self._check_decoding(spec, spec.decoding)
        self.graph.runs.append(spec)
        return Run(self, len(self.graph.runs) - 1)

    def _check_decoding(self, spec: RunSpec, decoding: Decoding) -> None:
        cfg, longest = self.target.cfg, max(spec.lengths)
        if cfg.attention_dir != "causal":
            raise TraceError("a bidirectional model does not generate text", calling_line())
        if decoding.max_new_tokens < 1 or longest + decoding.max_new_tokens > cfg.n_ctx + 1:
            raise TraceError(
                f"{decoding.max_new_tokens} new tokens after a prompt of {longest}: there is room for 1 to "
                f"{cfg.n_ctx + 1 - longest} (n_ctx is {cfg.n_ctx})",
                calling_line(),
            )
        if not all(0 <= token < cfg.d_vocab_out for token in decoding.eos_token_ids):
            raise TraceError(f"eos_token_id is one of 0 to {cfg.d_vocab_out - 1}", calling_line())
        if not 0 <= decoding.seed < 2**63:
            raise TraceError(f"seed is an integer from 0 to 2**63 - 1, got {decoding.seed}", calling_line())

    def _read(self, input: object, prepend_bos: bool | None, attention_mask: Tensor | None) -> list[list[int]]:
        if isinstance(input, (list, tuple)) and input and isinstance(input[0], (list, tuple)):
            rows = [self.target.read(torch.tensor([list(row)]), prepend_bos, torch.ones(1, len(row))) for row in input]
            return [row for made in rows for row in made]
        return self.target.read(input, prepend_bos, attention_mask)

    def generate(
        self,
        input: object,
        max_new_tokens: int = 10,
        *,
        do_sample: bool = False,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        attention_mask: Tensor | None = None,
    ) -> Run:
        """Return a run that continues prompts. `gen["resid_post", 9].at(pos=-1, step=3)` is an activation at a step.

        Step 0 reads the prompt, each later step the token before it. All steps are made: a prompt that has ended goes
        on with its end-of-text token.

        Args:
            input, prepend_bos, attention_mask: as for `prompts`.
            max_new_tokens: how many steps there are.
            do_sample, top_k, top_p, temperature, freq_penalty, repetition_penalty: as for `model.generate`; by default
                the likeliest token.
            seed: of the draws.
            eos_token_id: tokens that end a prompt; None for no end.
            use_past_kv_cache: read only the newest token at each step. The values are the same without.

        Raises:
            TraceError: prompts, or options, that the model does not take.
        """
        self._check_open()
        ends = () if eos_token_id is None else entries_of(eos_token_id) or (eos_token_id,)
        try:
            tokens = self._read(input, prepend_bos, attention_mask)
            decoding = Decoding(
                integer(max_new_tokens, "max_new_tokens"),
                Sampling(do_sample, top_k, top_p, temperature, freq_penalty, repetition_penalty),
                integer(seed, "seed"),
                tuple(integer(one, "eos_token_id") for one in ends),
                bool(use_past_kv_cache),
            )
        except (ValueError, TypeError) as error:
            raise TraceError(str(error), calling_line()) from error
        return self.run_of(RunSpec(tuple(tuple(row) for row in tokens), decoding))

    # Values

    def constant(self, value: Tensor | np.ndarray | float | int) -> Value:
        """Return a tensor or a number as a value. Operations take tensors and numbers as they are, too.

        Args:
            value: the tensor, of which a copy is kept, or the number.
        """
        return self.as_value(value)

    def weight(self, name: str) -> Value:
        """Return a parameter of the model.

        Args:
            name: as in `model.named_parameters()`, `"blocks.0.attn.W_O"`.

        Raises:
            TraceError: there is no such parameter.
        """
        shape = self.target.weight_shape(name)
        if shape is None:
            raise TraceError(f"the model has no parameter {name!r}", calling_line())
        return self._value(Weight(TensorType(("",) * len(shape), shape), name))

    def where(self, condition: ValueLike, one: ValueLike, other: ValueLike) -> Value:
        """Return the entries of `one` where the condition is true, else those of `other`.

        Args:
            condition: truth values.
            one, other: values, tensors or numbers that broadcast.
        """
        return self.op("where", condition, one, other)

    def maximum(self, one: ValueLike, other: ValueLike) -> Value:
        """Return the larger entries.

        Args:
            one, other: values, tensors or numbers that broadcast.
        """
        return self.op("maximum", one, other)

    def minimum(self, one: ValueLike, other: ValueLike) -> Value:
        """Return the smaller entries.

        Args:
            one, other: values, tensors or numbers that broadcast.
        """
        return self.op("minimum", one, other)

    def einsum(self, equation: str, *operands: ValueLike) -> Value:
        """Return a contraction over named axes.

        Args:
            equation: `"batch d_model, vocab d_model -> batch vocab"`; the names are the equation's own.
            *operands: up to three.
        """
        return self.op("einsum", *operands, equation=equation)

    def stack(self, values: Sequence[ValueLike], axis: int = 0) -> Value:
        """Return values of one shape along a new axis.

        Args:
            values: the values.
            axis: where the new axis is.

        Raises:
            TraceError: no value, or values of different shapes.
        """
        made = [self.as_value(one) for one in values]
        if not made:
            raise TraceError("stack takes one value at least", calling_line())
        return self.op("stack", *made, axis=axis % (made[0].ndim + 1) if isinstance(axis, int) else axis)

    def cat(self, values: Sequence[ValueLike], axis: str | int = 0) -> Value:
        """Return values joined along an axis.

        Args:
            values: the values.
            axis: a name or an index.
        """
        return self.op("cat", *values, axis=axis)

    def randn(self, *shape: int | Sequence[int], seed: int) -> Value:
        """Return normal random numbers, which the seed decides.

        Args:
            *shape: the sizes, one by one or as one list.
            seed: of the draw.
        """
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        return self.op("randn", shape=list(sizes), seed=seed)

    def logits_of(self, residual: Value) -> Value:
        """Return the logits of a residual stream after the last block: final norm, then unembedding.

        Args:
            residual: [..., d_model].
        """
        return self.apply("logits_of", residual)

    def apply(self, piece: str, operand: ValueLike) -> Value:
        """Return a piece of the model applied to a value.

        Args:
            piece: `"ln_final"`, `"unembed"` or `"logits_of"` for a stream [..., d_model]; `"embed"` for tokens.
            operand: the value.

        Raises:
            TraceError: no such piece, or a value that it does not take.
        """
        if piece not in _PIECES:
            raise TraceError(f"a piece of the model is one of {', '.join(_PIECES)}, got {piece!r}", calling_line())
        value, cfg = self.as_value(operand), self.target.cfg
        if piece == "embed":
            if value.type.kind != "int":
                raise TraceError(f"embed takes tokens, got {value.type.kind} values {value.type}", calling_line())
            made = TensorType((*value.axes, "d_model"), (*value.shape, cfg.d_model))
            return self._value(Apply(made, piece, value.node))
        if value.shape[-1:] != (cfg.d_model,) or value.type.kind != "float":
            raise TraceError(f"{piece} takes a stream [..., {cfg.d_model}], got {value.type}", calling_line())
        last = ("d_model", cfg.d_model) if piece == "ln_final" else ("vocab", cfg.d_vocab_out)
        made = TensorType((*value.axes[:-1], last[0]), (*value.shape[:-1], last[1]))
        return self._value(Apply(made, piece, value.node))

    def gradient(self, scalar: Value, of: Value | Sequence[Value]) -> Value | list[Value]:
        """Return the gradient of a number with respect to activations.

        Args:
            scalar: a value with one entry, `run.metric(...).sum()`.
            of: an activation, `run["resid_post", 3]`, or several; all of it, or a part.

        Returns:
            A value with the shape of the activation, or a list of those.

        Raises:
            TraceError: several numbers, or something that is no activation of a run of prompts.
        """
        if not isinstance(scalar, Value) or scalar.type.numel != 1 or scalar.type.kind != "float":
            given = scalar.type if isinstance(scalar, Value) else repr(scalar)
            raise TraceError(f"a gradient is of one number: .sum() or .mean() first; got {given}", calling_line())
        made = []
        for one in [of] if isinstance(of, Value) else of:
            node = self.graph.nodes[one.node] if isinstance(one, Value) else None
            if isinstance(node, Read) and self.graph.runs[node.run].decoding is not None:
                raise TraceError("a generation has no gradients: take them in t.prompts(...)", calling_line())
            if not isinstance(node, Read) or node.type.kind != "float":
                raise TraceError(
                    "a gradient is with respect to an activation that a run is asked for, run['resid_post', 3]; "
                    f"got {one!r}",
                    calling_line(),
                )
            made.append(self._value(Gradient(node.type, scalar.node, one.node)))
        return made[0] if isinstance(of, Value) else made

    # Recording

    def op(self, name: str, /, *operands: ValueLike, **params: object) -> Value:
        """Return an operation of the table, by name.

        Args:
            name: of the operation.
            *operands: values, tensors and numbers.
            **params: its parameters.

        Raises:
            TraceError: no such operation, or operands or parameters that do not fit.
        """
        values = [self.as_value(one) for one in operands]
        types = [one.type for one in values]
        try:
            plain = plain_params(name, params, types)
            made = infer_type(name, types, plain)
        except ValueError as error:
            raise TraceError(f"{name}: {error}", calling_line()) from error
        return self._value(Compute(made, name, tuple(one.node for one in values), plain))

    def as_value(self, given: ValueLike) -> Value:
        """Return a value as it is, and a tensor or number as a constant.

        Args:
            given: a value, a tensor, an array or a number.

        Raises:
            TraceError: anything else, or a value of another trace.
        """
        if isinstance(given, Value):
            if given.trace is not self:
                raise TraceError(
                    "this value belongs to another trace: save it there, and use its .value here", calling_line()
                )
            return given
        if isinstance(given, (bool, int, float)) and not isinstance(given, np.generic):
            number: Kind = "bool" if isinstance(given, bool) else "int" if isinstance(given, int) else "float"
            return self._value(Constant(TensorType((), (), number), given))
        if isinstance(given, (np.ndarray, np.generic)):
            given = torch.as_tensor(given)
        if not isinstance(given, Tensor) or given.is_complex():
            raise TraceError(f"an operand is a value, a real tensor or a number, got {given!r}", calling_line())
        kind: Kind = "float" if given.is_floating_point() else "bool" if given.dtype == torch.bool else "int"
        type = TensorType(("",) * given.ndim, tuple(given.shape), kind)
        return self._value(Constant(type, given.detach().clone()))

    def record(self, node: Node) -> int:
        """Add a node to the graph and return its index.

        Args:
            node: the node.

        Raises:
            TraceError: the trace has run.
        """
        self._check_open()
        self.graph.nodes.append(node)
        line = calling_line()
        if line is not None:
            self.graph.lines[len(self.graph.nodes) - 1] = line
        return len(self.graph.nodes) - 1

    def _value(self, node: Node) -> Value:
        return Value(self, self.record(node), node.type)

    def save_node(self, node: int, name: str | None) -> str:
        """Mark a node as saved and return the name of the result.

        Args:
            node: its index.
            name: of the result; None for a number that is free.

        Raises:
            TraceError: the name is taken, or the trace has run.
        """
        self._check_open()
        if name is None:
            name = next(str(n) for n in range(len(self.graph.saves) + 1) if str(n) not in self.graph.saves)
        if not isinstance(name, str) or not name:
            raise TraceError(f"a result's name is a string, got {name!r}", calling_line())
        if self.graph.saves.get(name, node) != node:
            raise TraceError(f"a result named {name!r} is saved already", calling_line())
        self.graph.saves[name] = node
        return name

    def result(self, name: str) -> Tensor:
        """Return a saved tensor.

        Args:
            name: as it was saved.

        Raises:
            TraceError: the trace has not run, or nothing was saved under the name.
        """
        if self.results is None:
            raise TraceError("the trace has not run yet: values have numbers after the with block")
        if name not in self.results:
            raise TraceError(f"nothing was saved as {name!r}; there are {', '.join(self.results) or 'no results'}")
        return self.results[name]

    def __getitem__(self, name: str) -> Tensor:
        return self.result(name)

    # The experiment as data

    def estimate(self) -> TraceEstimate:
        """Return what the trace will cost: its passes, their tokens, operations and memory. Nothing is run."""
        return estimate_plan(self._plan(self.graph), self.graph, self.target.cfg)

    @property
    def hash(self) -> str:
        """The SHA-256 that names the experiment. It does not depend on the order of its lines."""
        return content_hash(self.graph, self.target)

    def save(self, path: str | Path) -> None:
        """Write the experiment to a file, which `tracing.load` reads.

        Args:
            path: of the file.

        Raises:
            TraceError: it has a metric that is a function of this process.
        """
        save_graph(path, self.graph, self.target)

    def _check_open(self) -> None:
        if self.results is not None:
            raise TraceError(
                "this trace has run: record what comes next in another one, and compute on the .value of what was "
                "saved. A with block runs it at its end; call run() only after model.trace(run=False)",
                calling_line(),
            )
