"""A model with merged heads, and what merging them costs beside ablating them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hooked_lm._support.integers import at_least_one
from hooked_lm.transformer import HookedTransformer

if TYPE_CHECKING:
    from hooked_lm.plotting import Figure

__all__ = ["Cost", "HeadMerge", "MergedGroup"]

# A line of `HeadMerge.rows`.
Row = dict[str, str | int | float | None]


class Cost(NamedTuple):
    """What a change of a model costs on prompts.

    Attributes:
        kl: the mean KL divergence from the old model's predictions to the new one's, over real tokens, in nats.
        loss: the new model's mean next-token loss, in nats; None where it predicts no next token.
    """

    kl: float
    loss: float | None


class MergedGroup(NamedTuple):
    """Heads that became one.

    Attributes:
        heads: the group.
        kept: the head in whose place the merged one is, and whose pattern it has.
        lost: the share of the squared norm of the summed OV circuits that is beyond rank `d_head`.
        pattern_error: the mean squared distance by which the group's output moves if all of it has the pattern of
            `kept`, as a share of its mean square.
        cost: of merging this group alone.
        ablated: of ablating the freed heads instead, in the old model.
    """

    heads: tuple[int, ...]
    kept: int
    lost: float
    pattern_error: float
    cost: Cost
    ablated: Cost

    @property
    def freed(self) -> tuple[int, ...]:
        """The heads that write nothing any more."""
        return tuple(head for head in self.heads if head != self.kept)


@dataclass(frozen=True, eq=False)
class HeadMerge:
    """A model in which one head stands for each group, and what that costs.

    Attributes:
        model: the new model.
        layer: the block.
        groups: what became of each group, in the order given.
        loss: of the old model; None where it predicts no next token.
        cost: of merging all groups.
        ablated: of ablating all freed heads instead, in the old model.
        n_tokens: how many tokens divergences are averaged over.
    """

    model: HookedTransformer
    layer: int
    groups: tuple[MergedGroup, ...]
    loss: float | None
    cost: Cost
    ablated: Cost
    n_tokens: int

    def top(self, k: int = 10) -> list[MergedGroup]:
        """Return the `k` groups that cost least to merge; of equal ones the first comes first.

        Args:
            k: how many.

        Raises:
            ValueError: `k` is below 1.
        """
        at_least_one(k, "k")
        return sorted(self.groups, key=lambda group: group.cost.kl)[:k]

    def rows(self) -> list[Row]:
        """Return a dictionary for each group, and of several one for all together; `pandas.DataFrame` takes them.

        Keys: `heads`, `kept`, `lost`, `pattern_error`, `kl`, `loss`, `ablated_kl`, `ablated_loss`. The three after
        `heads` are None for `"all"`.
        """
        rows = [_row(_heads(one), one.kept, one.lost, one.pattern_error, one.cost, one.ablated) for one in self.groups]
        together = _row("all", None, None, None, self.cost, self.ablated)
        return rows if len(rows) == 1 else [*rows, together]

    def table(self) -> str:
        """Return the groups as text: what is lost, the divergence and the loss, merged and with the heads ablated."""
        before = "" if self.loss is None else f"; loss before {self.loss:.4f}"
        lines = [
            f"layer {self.layer}, {self.n_tokens} tokens{before}",
            "heads     kept  lost  pattern error  KL merged  KL ablated  loss merged  loss ablated",
        ]
        for row in self.rows():
            kept, lost, error = (
                "" if row[key] is None else f"{row[key]:{form}}"
                for key, form in (("kept", ""), ("lost", ".2f"), ("pattern_error", ".2g"))
            )
            losses = ["" if row[key] is None else f"{row[key]:.4f}" for key in ("loss", "ablated_loss")]
            line = (
                f"{row['heads']:<8}  {kept:>4}  {lost:>4}  {error:>13}  {row['kl']:>9.2g}  {row['ablated_kl']:>10.2g}"
            )
            lines.append(f"{line}  {losses[0]:>11}  {losses[1]:>12}".rstrip())
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def figure(self, title: str = "") -> Figure:
        """Return the divergence with each group merged, and with its heads ablated, as bars. Needs the extra `viz`.

        Args:
            title: of the figure; by default the layer.

        Raises:
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import ablation_bars

        labels, values, highlight = list[str](), list[float](), list[bool]()
        costs = [(_heads(group), group.cost, group.ablated) for group in self.groups]
        for heads, merged, ablated in costs if len(costs) == 1 else [*costs, ("all", self.cost, self.ablated)]:
            labels += [f"{heads}: merged", f"{heads}: freed heads ablated"]
            values += [merged.kl, ablated.kl]
            highlight += [True, False]
        name = f"Heads of layer {self.layer}, merged or ablated"
        return ablation_bars(labels, values, highlight, axis="KL divergence (nats)", title=title or name)


def _heads(group: MergedGroup) -> str:
    return ", ".join(map(str, group.heads))


def _row(
    heads: str, kept: int | None, lost: float | None, pattern_error: float | None, cost: Cost, ablated: Cost
) -> Row:
    return {
        "heads": heads,
        "kept": kept,
        "lost": lost,
        "pattern_error": pattern_error,
        "kl": cost.kl,
        "loss": cost.loss,
        "ablated_kl": ablated.kl,
        "ablated_loss": ablated.loss,
    }
