"""`hooked-lm heads`: which heads attend to the previous token, to earlier copies or to the next token; which copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from hooked_lm._support.plain_data import PlainData
from hooked_lm.cli.inputs import Device, IgnoredFields, ModelName, Revision, load_model, one_line_errors
from hooked_lm.cli.outputs import HtmlPath, JsonPath, check_outputs, footer, give_out, shows_progress

if TYPE_CHECKING:
    from hooked_lm.circuits.heads import HeadScores
    from hooked_lm.transformer import HookedTransformer

__all__ = ["KINDS", "TITLE", "ScoredHeads", "heads", "score_heads"]

TITLE = "What the heads do"
# What each score measures.
KINDS = {
    "previous_token": "share of attention that goes to the token just before",
    "duplicate_token": "share of attention that goes, in the repeat, to the same token the first time",
    "induction": "share of attention that goes, in the repeat, to the token that came next the first time",
    "copying": "eigenvalue score of the full OV circuit, from -1 to 1: is what it attends to made likelier?",
}
_OF_ATTENTION = ("previous_token", "duplicate_token", "induction")


def heads(
    model: ModelName,
    top: Annotated[int, typer.Option(min=1, help="How many heads to name of each kind.")] = 5,
    length: Annotated[int, typer.Option(min=1, help="Random tokens in a sequence, which then come again.")] = 24,
    batch: Annotated[int, typer.Option(min=1, help="How many sequences.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the random tokens.")] = 0,
    json_path: JsonPath = None,
    html: HtmlPath = None,
    device: Device = "cpu",
    revision: Revision = None,
    ignored: IgnoredFields = None,
) -> None:
    """Score every head: previous-token, duplicate-token and induction on repeated random tokens, copying by weights."""
    with one_line_errors():
        check_outputs(json_path, html)
        loaded = load_model(model, revision, device, ignored)
        found = score_heads(loaded, length, batch, seed)
        give_out(found.report(top), found.to_dict(top), json_path, html, found.page)


@dataclass(frozen=True, eq=False)
class ScoredHeads:
    """The scores of every head, as text, data and page.

    Attributes:
        model_name: of the model.
        length, batch, seed: of the random tokens.
        scores: by kind.
        left_out: kind -> the reason why this model has no such score.
    """

    model_name: str
    length: int
    batch: int
    seed: int
    scores: dict[str, HeadScores]
    left_out: dict[str, str]

    def report(self, top: int) -> str:
        """Return the best heads of each kind."""
        n_layers, n_heads = self.scores["induction"].scores.shape
        parts = [
            f"{self.model_name}: {n_layers} layers of {n_heads} heads, on {self.batch} sequences of {self.length} "
            "random tokens that come twice"
        ]
        for kind, scores in self.scores.items():
            best = scores.top(min(top, len(scores.labels)))
            lines = [f"{_title(kind)}: {KINDS[kind]}", *(f"  {one.label:<8}{one.score:7.3f}" for one in best)]
            parts.append("\n".join(lines))
        parts += [f"{_title(kind)} is left out: {why}" for kind, why in self.left_out.items()]
        return "\n\n".join(parts)

    def to_dict(self, top: int) -> PlainData:
        """Return every score as plain data."""
        return {
            "model": self.model_name,
            "length": self.length,
            "batch": self.batch,
            "seed": self.seed,
            "scores": {kind: scores.scores.tolist() for kind, scores in self.scores.items()},
            "top": {
                kind: [one._asdict() for one in scores.top(min(top, len(scores.labels)))]
                for kind, scores in self.scores.items()
            },
            "left_out": self.left_out,
        }

    def page(self) -> str:
        """Return a page of figures."""
        from hooked_lm import plotting
        from hooked_lm.plotting import PageFigure

        best = {kind: scores.top(1)[0] for kind, scores in self.scores.items()}
        sections = []
        for kind, scores in self.scores.items():
            values = scores.scores.cpu()
            # Copying scores may be negative; and of many layers a map without numbers is enough.
            if kind == "copying" or len(values) > 16:
                figure = plotting.patching_grid(values, axis="head", limit=1.0)
            else:
                figure = plotting.head_scores(values)
            sections.append(
                PageFigure(
                    _title(kind),
                    f"Each cell is a head: {KINDS[kind]}. The highest is {best[kind].label}, {best[kind].score:.2f}.",
                    (figure,),
                )
            )
        facts = [(one.label, f"{_title(kind).lower()}, {one.score:.2f}") for kind, one in best.items()]
        left_out = "".join(f"{_title(kind)} is left out: {why}. " for kind, why in self.left_out.items())
        return plotting.page_html(
            TITLE,
            f"{self.model_name} reads {self.batch} sequences of {self.length} random tokens that come twice, where "
            f"nothing but their order can be attended to. {left_out}",
            sections,
            facts,
            footer(f"{self.model_name}, seed {self.seed}", "heads"),
        )


def score_heads(model: HookedTransformer, length: int, batch: int, seed: int) -> ScoredHeads:
    """Return the scores of every head.

    Args:
        model: the model.
        length: of the block that comes twice; shorter where the model's context or vocabulary has no room for it.
        batch, seed: of the random tokens.

    Raises:
        ValueError: the model has no heads, or no room for two tokens that come twice.
    """
    import torch

    from hooked_lm.circuits.heads import copying_scores, repeated_token_scores

    cfg = model.cfg
    fitting = min(length, (cfg.n_ctx - 1) // 2, cfg.d_vocab - 1)
    if fitting < 1:
        raise ValueError(
            f"a context of {cfg.n_ctx} and a vocabulary of {cfg.d_vocab} have no room for a start token and tokens "
            "that come twice"
        )
    scores = {
        kind: repeated_token_scores(
            model,
            kind,
            batch=batch,
            length=fitting,
            generator=torch.Generator().manual_seed(seed),
            verbose=shows_progress(),
        )
        for kind in _OF_ATTENTION
    }
    left_out = {}
    try:
        scores["copying"] = copying_scores(model, verbose=shows_progress())
    except ValueError as error:
        left_out["copying"] = str(error)
    return ScoredHeads(cfg.model_name, fitting, batch, seed, scores, left_out)


def _title(kind: str) -> str:
    return {"previous_token": "Previous token", "duplicate_token": "Duplicate token"}.get(kind, kind.capitalize())
