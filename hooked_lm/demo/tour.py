"""A tour of the five experiments on one model, with a headline number for each."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from hooked_lm._support.plain_data import PlainData
from hooked_lm.demo.induction import label, plain_data
from hooked_lm.experiments import (
    EarlyDecoding,
    IOIPatching,
    NameMovers,
    Repeats,
    TaskVectors,
    continue_repeats,
    decode_early,
    find_name_movers,
    patch_ioi,
    published,
    transplant_task,
)
from hooked_lm.experiments.prompts import aligned
from hooked_lm.experiments.published import Beside, beside_published
from hooked_lm.tasks import get_task
from hooked_lm.transformer import HookedTransformer

__all__ = ["MODEL", "STEPS", "Tour", "take_tour"]

T = TypeVar("T")

MODEL = "demo-tasks-4l"
# The steps of `take_tour`, for a progress bar.
STEPS = (
    "load the model",
    "read answers early",
    "patch the stream",
    "continue repeats",
    "move a task",
    "find name movers",
)


@dataclass(frozen=True, eq=False)
class Tour:
    """The results of the experiments on one model.

    Attributes:
        model_name, n_layers, n_heads: of the model.
        early: capitals, read layer by layer.
        patching: indirect objects, the stream patched.
        repeats: random tokens that come twice.
        vectors: opposites, moved to prompts without examples.
        movers: indirect objects, head by head.
        published: for GPT-2 small, numbers beside the published ones; otherwise empty.
    """

    model_name: str
    n_layers: int
    n_heads: int
    early: EarlyDecoding
    patching: IOIPatching
    repeats: Repeats
    vectors: TaskVectors
    movers: NameMovers
    published: tuple[Beside, ...]

    def headlines(self) -> list[tuple[str, str, str]]:
        """Return each experiment's name, its number, and the meaning of the number."""
        early, patching, repeats, vectors, movers = (
            self.early,
            self.patching,
            self.repeats,
            self.vectors,
            self.movers,
        )
        best = vectors.accuracy.max(-1).values
        return [
            (
                "Early decoding",
                f"layer {early.decisive_mlp}",
                f"has the MLP that capitals need most: without its update the answer's probability is "
                f"{float(early.probability_without.min()):.2f}, with it {float(early.probability[-1]):.2f}",
            ),
            (
                "Residual patching",
                f"{patching.accuracy:.0%}",
                f"of indirect objects right; logit difference {float(patching.clean.mean()):.2f}, corrupted "
                f"{float(patching.corrupted.mean()):.2f}",
            ),
            (
                "Repeated tokens",
                f"{repeats.second_accuracy:.0%}",
                f"of the second half right, {repeats.first_accuracy:.0%} of the first; {label(repeats.induction_head)} "
                f"has induction score {float(repeats.induction_scores.max()):.2f}{_without_mlp(repeats)}",
            ),
            (
                "Function vectors",
                f"{float(best[0]):.0%}",
                f"of opposites right without an example when the mean state is added at the best layer, "
                f"{float(best[1]):.0%} with the output of {len(vectors.vector.heads)} heads; "
                f"{vectors.base_accuracy:.0%} without, "
                f"{vectors.random_accuracy:.0%} with a random vector",
            ),
            (
                "Name movers",
                ", ".join(map(label, movers.movers)),
                f"move the name: without them {movers.accuracy_without:.0%} of the answers are given, without as many "
                f"other heads {float(movers.accuracy_without_others.median()):.0%}",
            ),
        ]

    def report(self) -> str:
        """Return the headlines as text, and the published numbers where there are some."""
        lines = [f"{self.model_name}: {self.n_layers} layers of {self.n_heads} heads."]
        for index, (name, number, meaning) in enumerate(self.headlines(), start=1):
            text = textwrap.fill(f"{number} {meaning}.", 100, initial_indent="  ", subsequent_indent="  ")
            lines += ["", f"{index}. {name}", text]
        if self.published:
            lines += ["", f"  {'GPT-2 small':42} measured  published"]
            lines += [f"  {one.what:42} {one.measured:8.3f}   {one.published:8.3f}" for one in self.published]
        return "\n".join(lines) + "\n"

    def to_dict(self) -> PlainData:
        """Return everything as plain data that JSON can hold."""
        return cast(PlainData, plain_data(self))


def _without_mlp(repeats: Repeats) -> str:
    """The accuracy of the second half when the MLP that matters most writes its output of the first half."""
    if not len(repeats.accuracy_without_mlp):
        return ""
    layer = int(repeats.accuracy_without_mlp.argmin())
    return f"; with the MLP of layer {layer} as in the first half {float(repeats.accuracy_without_mlp.min()):.0%}"


def take_tour(
    name_or_path: str | Path = MODEL,
    *,
    seed: int = 0,
    ignore_config_fields: Collection[str] = (),
    on_step: Callable[[str], None] | None = None,
) -> Tour:
    """Run the five experiments on a model.

    Args:
        name_or_path: a model that can do the tasks: the bundled one, or `"gpt2"` where it can be reached.
        seed: of the prompts.
        ignore_config_fields: as for `from_pretrained`.
        on_step: called with the name of each of `STEPS` when it is done.

    Raises:
        ValueError: the model cannot be loaded, or has no tokenizer that suits the tasks.
    """
    done = on_step or (lambda step: None)
    model = HookedTransformer.from_pretrained(name_or_path, ignore_config_fields=ignore_config_fields)
    if model.tokenizer is None:
        raise ValueError(f"{name_or_path} has no tokenizer, and the tasks of the tour are text")
    done(STEPS[0])
    ioi = get_task("ioi")
    unrelated = aligned(ioi.examples(120, seed, template=0, corruption="unrelated"), model.tokenizer, 50)
    one_order = aligned(ioi.examples(120, seed, template=0, order="abba"), model.tokenizer, 50)
    capitals = aligned(get_task("capitals").examples(70, seed), model.tokenizer, 40)

    def finished(step: int, result: T) -> T:
        done(STEPS[step])
        return result

    early = finished(1, decode_early(model, capitals, verbose=False))
    patching = finished(2, patch_ioi(model, one_order, verbose=False))
    repeats = finished(3, continue_repeats(model, seed=seed, verbose=False))
    return Tour(
        model_name=model.cfg.model_name,
        n_layers=model.cfg.n_layers,
        n_heads=model.cfg.n_heads,
        early=early,
        patching=patching,
        repeats=repeats,
        vectors=finished(4, transplant_task(model, seed=seed, verbose=False)),
        movers=finished(5, find_name_movers(model, unrelated, seed=seed, verbose=False)),
        published=beside_published(model, repeats) if model.cfg.model_name == published.MODEL else (),
    )
