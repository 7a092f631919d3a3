"""Profile: the time and memory of a run by layer and part, its operations, the cost of hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hooked_lm._support.integers import at_least_one

if TYPE_CHECKING:
    from hooked_lm.plotting import Figure

__all__ = ["CallProfile", "HookCost", "Operation", "PartCost", "Profile"]

# A line of `Profile.rows`.
Row = dict[str, str | int | float | None]


@dataclass(frozen=True)
class PartCost:
    """What a part of the model takes of a run.

    Attributes:
        part: `"attn"`, `"mlp"`, `"ln1"`, ... of a block, `"block"` for what a block does between them; `"embed"`,
            `"unembed"`, ...; `"hook ..."` for a hook function; `"between the parts"`.
        layer: the block; None for parts outside of blocks.
        share: of the run's time.
        allocated: bytes that were allocated in it and not freed by the same operation.
    """

    part: str
    layer: int | None
    share: float
    allocated: int

    @property
    def name(self) -> str:
        """The part with its layer."""
        return self.part if self.layer is None else f"{self.layer} {self.part}"


@dataclass(frozen=True)
class Operation:
    """What one operation of torch takes.

    Attributes:
        name: as torch has it: `"aten::addmm"`.
        shapes: of its inputs.
        calls: how many.
        share: of the time of all operations, without those that it calls itself.
    """

    name: str
    shapes: str
    calls: int
    share: float


@dataclass(frozen=True)
class HookCost:
    """What a run takes more with hooks.

    Attributes:
        name: of the hook, the interventions or the cache.
        seconds: the median difference to the plain run of the same turn.
        spread: the smallest and the largest difference.
        plain_seconds: of the plain run.
    """

    name: str
    seconds: float
    spread: tuple[float, float]
    plain_seconds: float

    @property
    def share(self) -> float:
        """The cost in plain runs."""
        return self.seconds / self.plain_seconds

    @property
    def verdict(self) -> str:
        """The cost in words; one that the repeats cannot tell from 0 is called so."""
        low, high = self.spread
        if low <= 0 <= high:
            return f"no cost beyond the noise ({1000 * low:+.2f} to {1000 * high:+.2f} ms)"
        return f"{1000 * self.seconds:+.2f} ms ({100 * self.share:+.0f} %)"


@dataclass(frozen=True, eq=False)
class CallProfile:
    """Where the time of a call went.

    Attributes:
        seconds: that it took under the profiler.
        operations: of torch, those that took most first.
        peak_bytes: the most that torch had allocated meanwhile, beyond what there was before.
    """

    seconds: float
    operations: tuple[Operation, ...]
    peak_bytes: int

    def top(self, k: int = 10) -> list[Operation]:
        """Return the `k` operations that took most.

        Args:
            k: how many.

        Raises:
            ValueError: `k` is below 1.
        """
        return list(self.operations[: at_least_one(k, "k")])

    def rows(self) -> list[Row]:
        """Return a dictionary for each operation, with its attributes; `pandas.DataFrame` takes them."""
        return [dict(vars(one)) for one in self.operations]

    def table(self, k: int = 10) -> str:
        """Return the operations that took most as text.

        Args:
            k: how many.

        Raises:
            ValueError: as `top`.
        """
        head = f"{self.seconds:.3g} s under the profiler, at most {self.peak_bytes / 2**20:.1f} MiB"
        return "\n".join([head, *_operation_lines(self.top(k))])

    def __str__(self) -> str:
        return self.table()

    def figure(self, k: int = 15, title: str = "") -> Figure:
        """Return the operations that took most as bars. Needs the extra `viz`.

        Args:
            k: how many.
            title: of the figure.

        Raises:
            ValueError: as `top`.
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import stacked_bars

        shown = self.top(k)
        shares = {"share of the operations' time": [one.share for one in shown]}
        return stacked_bars(shares, [f"{one.name} {one.shapes}" for one in shown], title=title)


@dataclass(frozen=True, eq=False)
class Profile:
    """Where a forward pass spends its time and memory.

    Attributes:
        seconds: of a run with all hooks: the median.
        plain_seconds: of a run without any.
        spread: the fastest and the slowest of them.
        n_repeats: how many.
        profiler_factor: how many times as long the run under the profiler took. Shares are from that run.
        parts: in the order in which they ran.
        operations: of torch, those that took most first.
        hooks: the cost of each hook, of the interventions and of the cache.
        peak_bytes: the most that torch had allocated during the run, beyond what there was before.
    """

    seconds: float
    plain_seconds: float
    spread: tuple[float, float]
    n_repeats: int
    profiler_factor: float
    parts: tuple[PartCost, ...]
    operations: tuple[Operation, ...]
    hooks: tuple[HookCost, ...]
    peak_bytes: int

    def top(self, k: int = 5) -> list[PartCost]:
        """Return the `k` parts that take most of the time.

        Args:
            k: how many.

        Raises:
            ValueError: `k` is below 1.
        """
        return sorted(self.parts, key=lambda part: -part.share)[: at_least_one(k, "k")]

    def by_part(self) -> dict[str, float]:
        """Return the share of each kind of part, over all layers, the largest first."""
        found: dict[str, float] = {}
        for part in self.parts:
            found[part.part] = found.get(part.part, 0.0) + part.share
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))

    def rows(self) -> list[Row]:
        """Return a dictionary for each part; `pandas.DataFrame` takes them.

        Keys: `part`, `layer`, `share`, `seconds` (the share of the median run), `allocated` (bytes).
        """
        return [{**vars(part), "seconds": part.share * self.seconds} for part in self.parts]

    def table(self, k: int = 8) -> str:
        """Return the totals, the kinds of parts, the costs of hooks and the `k` operations that take most, as text.

        Args:
            k: how many operations.

        Raises:
            ValueError: `k` is below 1.
        """
        low, high = (1000 * one for one in self.spread)
        lines = [
            f"{1000 * self.seconds:.2f} ms a run ({low:.2f} to {high:.2f} in {self.n_repeats} runs), at most "
            f"{self.peak_bytes / 2**20:.1f} MiB beyond the weights; {self.profiler_factor:.1f} times as long under the "
            "profiler",
        ]
        lines += [f"{100 * share:>5.1f} %  {part}" for part, share in self.by_part().items()]
        lines += [f"{cost.name}: {cost.verdict}" for cost in self.hooks]
        return "\n".join([*lines, *_operation_lines(list(self.operations[: at_least_one(k, "k")]))])

    def __str__(self) -> str:
        return self.table()

    def figure(self, title: str = "") -> Figure:
        """Return the milliseconds of each layer as bars, divided into parts. Needs the extra `viz`.

        Args:
            title: of the figure; by default the time of a run.

        Raises:
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import stacked_bars

        groups = list(
            dict.fromkeys("outside the blocks" if p.layer is None else f"layer {p.layer}" for p in self.parts)
        )
        groups.sort(key=lambda group: (group[0] != "o", int(group.split()[-1]) if group[0] == "l" else 0))
        kinds = list(self.by_part())
        kept = kinds[:7]
        values = {kind: [0.0] * len(groups) for kind in [*kept, *(["others"] if len(kinds) > len(kept) else [])]}
        for part in self.parts:
            group = "outside the blocks" if part.layer is None else f"layer {part.layer}"
            values[part.part if part.part in kept else "others"][groups.index(group)] += (
                1000 * part.share * self.seconds
            )
        named = title or f"{1000 * self.seconds:.2f} ms a run; most in {self.top(1)[0].name}"
        return stacked_bars(values, groups, axis="milliseconds", title=named)


def _operation_lines(shown: Sequence[Operation]) -> list[str]:
    return [f"{100 * one.share:>5.1f} %  {one.calls:>5} x {one.name}  {one.shapes}"[:118] for one in shown]
