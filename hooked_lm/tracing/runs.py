"""Run and Site: a run of the model in a trace, and its activations, which are read and edited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hooked_lm.interventions import OPERATIONS, Intervention, Operation
from hooked_lm.metrics import Metric
from hooked_lm.names import ActivationKey, UnknownHookError
from hooked_lm.tracing.errors import TraceError, calling_line
from hooked_lm.tracing.graph import Generated, Read, RunSpec, Score, Select, Write
from hooked_lm.tracing.selecting import by_index, resolved, selected_type
from hooked_lm.tracing.types import TensorType, broadcast_shapes
from hooked_lm.tracing.values import Value, ValueLike

if TYPE_CHECKING:
    from hooked_lm.tracing.trace import Trace

__all__ = ["Run", "Site"]


class Run:
    """A run of the model on prompts. `run["resid_post", 8]` is an activation, which is read and edited.

    Attributes:
        trace: the trace that it belongs to.
        index: its place among the trace's runs.
    """

    def __init__(self, trace: Trace, index: int) -> None:
        self.trace, self.index = trace, index
        self.n_writes: dict[str, int] = {}

    @property
    def spec(self) -> RunSpec:
        """The prompts' tokens."""
        return self.trace.graph.runs[self.index]

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        """The tokens of each prompt."""
        return self.spec.tokens

    def __len__(self) -> int:
        return self.spec.n_prompts

    def __repr__(self) -> str:
        lengths = self.spec.lengths
        return f"Run({len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens)"

    def __getitem__(self, key: ActivationKey) -> Site:
        """Return an activation by its hook name or short key, as it is after the writes made to it so far."""
        try:
            name = self.trace.target.site(key)
        except (UnknownHookError, ValueError) as error:
            raise TraceError(str(error), calling_line()) from error
        return Site(self, name, Select(), self.n_writes.get(name, 0))

    def __setitem__(self, key: ActivationKey, value: ValueLike) -> None:
        site = self[key]
        if not site.is_result(value):  # `run[key] += value` has written already
            site.replace(value)

    @property
    def logits(self) -> Site:
        """The logits [batch pos vocab]."""
        return self["unembed.hook_out"]

    def metric(self, metric: Metric) -> Value:
        """Return the scores of a metric [batch], one for each prompt.

        Args:
            metric: one of `hooked_lm.metrics`. Its position counts each prompt's own tokens.
        """
        return self.scores(metric, self.logits.at(pos=metric.pos) if isinstance(metric, Metric) else self.logits)

    def scores(self, metric: Metric, logits: Site) -> Value:
        """Return the scores of a metric [batch], given the logits that it reads.

        Args:
            metric: one of `hooked_lm.metrics`.
            logits: those of the run at the metric's position.

        Raises:
            TraceError: no metric of the package's, logits of another run or position, or a metric that does not fit.
        """
        if self.spec.decoding is not None:
            raise TraceError(
                "a metric scores one pass over prompts: of a generation read gen.logits.at(pos=-1)", calling_line()
            )
        if not isinstance(metric, Metric):
            raise TraceError(
                f"a run takes a metric of hooked_lm.metrics, not {metric!r}: compute any other score from run.logits",
                calling_line(),
            )
        spec = self.spec
        try:
            metric.check(spec.n_prompts, min(spec.lengths), self.trace.target.cfg.d_vocab_out)
        except ValueError as error:
            raise TraceError(str(error), calling_line()) from error
        if logits.run is not self or (logits.name, logits.part) != (
            "unembed.hook_out",
            self.logits.at(pos=metric.pos).part,
        ):
            raise TraceError(f"{metric.name} reads the logits at position {metric.pos} of its run, got {logits!r}")
        made = TensorType(("batch",), (spec.n_prompts,))
        return Value(self.trace, self.trace.record(Score(made, self.index, metric, logits.node)), made)

    @property
    def generated(self) -> Value:
        """The new tokens [batch, step] of a generation; after its end of text a prompt goes on with that token.

        Raises:
            TraceError: this run is no generation.
        """
        spec = self.spec
        if spec.decoding is None:
            raise TraceError("t.prompts(...) generates nothing: t.generate(...) does", calling_line())
        made = TensorType(("batch", "step"), (spec.n_prompts, spec.decoding.max_new_tokens), "int")
        return Value(self.trace, self.trace.record(Generated(made, self.index)), made)

    def intervene(self, interventions: Intervention | Sequence[Intervention]) -> Run:
        """Make interventions in this run, in the order given, and return the run.

        Args:
            interventions: one, or several. Positions count each prompt's own tokens.

        Raises:
            TraceError: something else, or an intervention that does not fit the run.
        """
        several = [interventions] if isinstance(interventions, Intervention) else list(interventions)
        for one in several:
            if not isinstance(one, Intervention):
                raise TraceError(f"an intervention is an Intervention, got {one!r}", calling_line())
            self[one.site].at(**one.selections()).write(one.operation, one.value)
        return self


class Site(Value):
    """An activation of a run, or a part of it: a value that can also be edited.

    Attributes:
        run: the run.
        name: full hook name.
        part: which part of the activation.
        version: how many writes at this site of the run come before it.
        was_written: it came of a write, by `+=` and the like.
    """

    def __init__(self, run: Run, name: str, part: Select, version: int, was_written: bool = False) -> None:
        self.run, self.name, self.part, self.version, self.was_written = run, name, part, version, was_written
        self.trace = run.trace
        self._node: int | None = None
        self._name: str | None = None
        self._type: TensorType | None = None
        self._whole = self.trace.target.type_of(name, run.spec, part.step)

    @property
    def type(self) -> TensorType:  # type: ignore[override]
        """Its axes, their sizes and the kind of its entries.

        Raises:
            TraceError: all positions of prompts of unequal lengths, which make no tensor.
        """
        try:
            if self._type is None:
                self._type = selected_type(self.name, self._whole, self.run.spec, self.part)
            return self._type
        except ValueError as error:
            raise TraceError(str(error), calling_line()) from error

    @property
    def node(self) -> int:
        """The index of the node that reads it."""
        if self._node is None:
            self._node = self.trace.record(Read(self.type, self.run.index, self.name, self.part, self.version))
        return self._node

    def __repr__(self) -> str:
        chosen = "".join(f", {name}={entries}" for name, entries in self.part.chosen().items())
        return f"Site({self.name!r}{chosen})"

    def at(self, **selections: object) -> Site:
        """Return a part of the activation.

        Args:
            **selections: `pos`, `head`, `feature`, `batch`, and `step` of a generation: an integer, which drops the
                axis, a slice or several integers. Positions are those of each prompt's own tokens; negative ones count
                from its end.

        Raises:
            TraceError: no such selection, or out of range.
        """
        unknown = [name for name in selections if name not in Select.__dataclass_fields__]
        if unknown:
            known = ", ".join(Select.__dataclass_fields__)
            raise TraceError(f"there is no selection {unknown[0]!r}: there are {known}", calling_line())
        twice = [name for name in selections if name in self.part.chosen()]
        if twice:
            raise TraceError(f"{twice[0]} is selected already: {self!r}", calling_line())
        try:
            given = {**self.part.chosen(), **selections}
            part = resolved(self.name, self._whole, self.run.spec, given)
        except ValueError as error:
            raise TraceError(str(error), calling_line()) from error
        return Site(self.run, self.name, part, self.version)

    def __getitem__(self, index: object) -> Site:
        if self.part.chosen():
            raise TraceError(f"{self!r} is a part already: make all selections in one .at(...)", calling_line())
        try:
            return self.at(**by_index(index, self._whole.axes))
        except ValueError as error:
            raise error if isinstance(error, TraceError) else TraceError(str(error), calling_line()) from error

    def __setitem__(self, index: object, value: ValueLike) -> None:
        site = self[index]
        if not site.is_result(value, version=self.run.n_writes.get(self.name, 0)):
            site.replace(value)  # `site[index] += value` has written already

    def is_result(self, value: object, version: int | None = None) -> bool:
        """Return whether a value is what the last write at this part left there.

        Args:
            value: any value.
            version: of the site after that write; by default this one's.
        """
        if not isinstance(value, Site) or not value.was_written:
            return False
        newest = self.version if version is None else version
        return (value.run, value.name, value.part, value.version) == (self.run, self.name, self.part, newest)

    # Writing

    def replace(self, value: ValueLike) -> Site:
        """Replace this part of the activation by a value; return the part as it is then.

        Args:
            value: a value, tensor or number that broadcasts to the part.
        """
        return self.write("replace", value)

    def add(self, value: ValueLike) -> Site:
        """Add a value to this part of the activation; return the part as it is then.

        Args:
            value: as for `replace`.
        """
        return self.write("add", value)

    def scale(self, value: ValueLike) -> Site:
        """Multiply this part of the activation by a value; return the part as it is then.

        Args:
            value: as for `replace`.
        """
        return self.write("scale", value)

    def zero(self) -> Site:
        """Set this part of the activation to zero; return the part as it is then."""
        return self.write("zero", None)

    def write(self, how: Operation, value: ValueLike | None) -> Site:
        """Edit this part of the activation; return the part as it is then.

        Args:
            how: `"replace"`, `"add"`, `"scale"` or `"zero"`.
            value: as for `replace`; None to zero.

        Raises:
            TraceError: no such edit, or a value that does not broadcast to the part.
        """
        if how not in OPERATIONS or (how == "zero") != (value is None):
            raise TraceError(
                f"{how!r} at {self.name!r} with value {value!r}: an edit is one of {', '.join(OPERATIONS)}",
                calling_line(),
            )
        given = None if value is None else self.trace.as_value(value)
        part = selected_type(self.name, self._whole, self.run.spec, self.part, reading=False)
        if given is not None:
            _check_fit(f"{how} at {self.name!r}", given.type, part)
        ordinal = self.run.n_writes.get(self.name, 0)
        node = None if given is None else given.node
        self.trace.record(Write(part, self.run.index, self.name, self.part, ordinal, how, node))
        self.run.n_writes[self.name] = ordinal + 1
        return Site(self.run, self.name, self.part, ordinal + 1, was_written=True)

    def __iadd__(self, value: ValueLike) -> Site:
        return self.write("add", value)

    def __isub__(self, value: ValueLike) -> Site:
        return self.write("add", -self.trace.as_value(value))

    def __imul__(self, value: ValueLike) -> Site:
        return self.write("scale", value)

    def __itruediv__(self, value: ValueLike) -> Site:
        return self.write("scale", 1.0 / self.trace.as_value(value))


def _check_fit(what: str, value: TensorType, part: TensorType) -> None:
    try:
        fits = broadcast_shapes(value.shape, part.shape) == part.shape
    except ValueError:
        fits = False
    if not fits:
        raise TraceError(f"{what}: a value {value} does not broadcast to the part {part}", calling_line())
    if value.kind != part.kind and not (part.kind == "float" and value.kind == "int"):
        raise TraceError(f"{what}: the site holds {part.kind} entries, and the value {value.kind} ones", calling_line())
