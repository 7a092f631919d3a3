"""`hooked-lm lens`: the tokens that can be read from the residual stream after each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hooked_lm._support.plain_data import PlainData
from hooked_lm.cli.inputs import (
    TEXT_RULE,
    Device,
    IgnoredFields,
    ModelName,
    Revision,
    load_model,
    one_line_errors,
    read_answer,
    read_prompt,
    spell,
    token_data,
)
from hooked_lm.cli.outputs import (
    HtmlPath,
    JsonPath,
    check_outputs,
    clipped,
    columns_of,
    footer,
    give_out,
    shows_progress,
    terminal_width,
    text_table,
)

if TYPE_CHECKING:
    from hooked_lm.circuits.logit_lens import LogitLens
    from hooked_lm.transformer import HookedTransformer

__all__ = ["TITLE", "Reading", "lens"]

TITLE = "The logit lens"
_WHERE = {"pre": "enters", "mid": "after attention", "post": "after the layer"}


def lens(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(help=TEXT_RULE)],
    answer: Annotated[str | None, typer.Option(help="A token whose rank is wanted, such as ' Paris'.")] = None,
    positions: Annotated[int, typer.Option(min=1, help="How many of the last positions to read.")] = 12,
    json_path: JsonPath = None,
    html: HtmlPath = None,
    device: Device = "cpu",
    revision: Revision = None,
    ignored: IgnoredFields = None,
) -> None:
    """Read the residual stream of every layer as if it were the last: the likeliest tokens, the answer's rank."""
    with one_line_errors():
        check_outputs(json_path, html)
        loaded = load_model(model, revision, device, ignored)
        found = Reading(loaded, prompt, answer, positions)
        give_out(found.report(), found.to_dict(), json_path, html, found.page)


class Reading:
    """A prompt read through the lens, as text, data and page.

    Args:
        model: the model.
        prompt, answer: as given.
        positions: how many of the last positions to read.
    """

    def __init__(self, model: HookedTransformer, prompt: str, answer: str | None, positions: int) -> None:
        import torch

        from hooked_lm.circuits.logit_lens import logit_lens

        tokens = read_prompt(model, prompt, "the prompt")
        self.model, self.prompt, self.n_tokens = model, prompt, tokens.shape[1]
        self.answer = None if answer is None else read_answer(model, answer, "--answer")
        self.lens: LogitLens = logit_lens(
            model,
            tokens,
            targets=self.answer,
            positions=slice(-positions, None),
            top_k=min(5, model.cfg.d_vocab_out),
            attention_mask=torch.ones_like(tokens),
            verbose=shows_progress(),
        )
        self.labels = [
            f"{position}: {spell(model, token)}"
            for position, token in zip(self.lens.positions.tolist(), self.lens.tokens[0].tolist(), strict=True)
        ]
        # `resid_pre` of a layer equals `resid_post` of the layer before: only the first is shown.
        self.sites = [site for site, label in enumerate(self.lens.labels) if site == 0 or not label.endswith("_pre")]

    # In the terminal

    def report(self) -> str:
        """Return the tables."""
        parts = [self._summary(), self._likeliest()]
        if self.answer is not None:
            parts += [self._verdict(), self._ranks()]
        return "\n\n".join(parts)

    def _summary(self) -> str:
        return (
            f"{self.model.cfg.model_name} reads {self.prompt!r}, {self.n_tokens} tokens.\n"
            "What it would say if it ended after a layer: the likeliest token and its probability. The end is on top."
        )

    def _likeliest(self) -> str:
        rows = [
            [_place(self.lens.labels[site]), *(self._best(site, column) for column in range(len(self.labels)))]
            for site in reversed(self.sites)
            if not self.lens.labels[site].endswith("_mid")
        ]
        header = ["", *(clipped(label, 16) for label in self.labels)]
        # The last positions that fit the terminal.
        widths = [max(columns_of(line[column]) + 2 for line in (header, *rows)) for column in range(len(header))]
        first = len(header) - 1
        while first > 1 and widths[0] + sum(widths[first - 1 :]) <= terminal_width() + 2:
            first -= 1
        kept = [[line[0], *line[first:]] for line in (header, *rows)]
        table = text_table(kept[0], kept[1:], left=True)
        note = f"\nThe last {len(header) - first} of {len(self.labels)} positions that were read; a wider terminal, "
        return table if first == 1 else table + note + "--json and --html show all."

    def _best(self, site: int, column: int) -> str:
        token, probability = self.lens.top_tokens[site, 0, column, 0], self.lens.top_probs[site, 0, column, 0]
        return f"{clipped(spell(self.model, int(token)), 12)} {float(probability):.0%}"

    def _verdict(self) -> str:
        ranks = self.lens.target_ranks[:, 0, -1, 0].tolist()
        name = spell(self.model, self.answer or 0)
        if ranks[-1] != 0:
            best = int(self.lens.top_tokens[-1, 0, -1, 0])
            return f"The answer {name} ends with rank {ranks[-1]}: the model says {spell(self.model, best)}."
        first = len(ranks)
        while first > 0 and ranks[first - 1] == 0:
            first -= 1
        label = self.lens.labels[first]
        where = "from the embedding on" if first == 0 else f"from layer {label.split('_')[0]} on, {_said(label)}"
        return f"The answer {name} is the likeliest token {where}."

    def _ranks(self) -> str:
        kinds = [kind for kind in ("mid", "post") if any(label.endswith(kind) for label in self.lens.labels)]
        cells = {
            label: f"{rank}  {probability:6.1%}"
            for label, rank, probability in zip(
                self.lens.labels,
                self.lens.target_ranks[:, 0, -1, 0].tolist(),
                self.lens.target_probs[:, 0, -1, 0].tolist(),
                strict=True,
            )
        }
        rows = [
            [f"layer {layer}", *(cells[f"{layer}_{kind}"] for kind in kinds)]
            for layer in reversed(range(self.model.cfg.n_layers))
        ]
        rows.append(["embedding", *[""] * (len(kinds) - 1), cells["0_pre"]])
        header = ["", *(_WHERE[kind] for kind in kinds)]
        return "Its rank (0 is the likeliest) and probability at the last position:\n" + text_table(header, rows)

    # As data

    def to_dict(self) -> PlainData:
        """Return every reading as plain data."""
        lens, model = self.lens, self.model
        tokens = lens.tokens[0].tolist()
        return {
            "model": model.cfg.model_name,
            "prompt": self.prompt,
            "n_tokens": self.n_tokens,
            "positions": [
                {"pos": position, **token_data(model, token)}
                for position, token in zip(lens.positions.tolist(), tokens, strict=True)
            ],
            "answer": None if self.answer is None else token_data(model, self.answer),
            "sites": [self._site(site, label) for site, label in enumerate(lens.labels)],
        }

    def _site(self, site: int, label: str) -> PlainData:
        lens = self.lens
        tops = zip(lens.top_tokens[site, 0].tolist(), lens.top_probs[site, 0].tolist(), strict=True)
        data: PlainData = {
            "site": label,
            "top": [
                [
                    {**token_data(self.model, token), "probability": probability}
                    for token, probability in zip(*row, strict=True)
                ]
                for row in tops
            ],
            "entropy": lens.entropy[site, 0].tolist(),
            "kl_to_output": lens.kl[site, 0].tolist(),
        }
        if self.answer is not None:
            data["answer_rank"] = lens.target_ranks[site, 0, :, 0].tolist()
            data["answer_probability"] = lens.target_probs[site, 0, :, 0].tolist()
        return data

    # As a page

    def page(self) -> str:
        """Return a page of figures."""
        from hooked_lm import plotting
        from hooked_lm.plotting import PageFigure

        lens = self.lens
        places = [_place(lens.labels[site]) for site in self.sites]
        tops = [
            [[spell(self.model, token) for token in row] for row in lens.top_tokens[site, 0].tolist()]
            for site in self.sites
        ]
        sections = [
            PageFigure(
                "What it would say",
                "A column for each position, a row for each place in the model, the end on top. In each cell stands "
                "the token that the residual stream there would make likeliest, through the final norm and the "
                "unembedding; the darker, the surer. Point at a cell for the next tokens.",
                (plotting.lens_table(tops, lens.top_probs[self.sites, 0].cpu(), places, self.labels),),
            )
        ]
        facts = [(str(self.n_tokens), "tokens in the prompt"), (str(self.model.cfg.n_layers), "layers")]
        if self.answer is not None:
            name = spell(self.model, self.answer)
            ranks = [[[f"{rank}"] for rank in row] for row in lens.target_ranks[self.sites, 0, :, 0].tolist()]
            probabilities = lens.target_probs[self.sites, 0].cpu()
            sections.append(
                PageFigure(
                    f"Where {name} is",
                    f"{self._verdict()} In each cell stands its rank, 0 for the likeliest token; the colour is its "
                    "probability.",
                    (plotting.lens_table(ranks, probabilities, places, self.labels),),
                )
            )
            facts = [
                (f"{float(lens.target_probs[-1, 0, -1, 0]):.1%}", f"probability of {name} at the end"),
                (str(int(lens.target_ranks[-1, 0, -1, 0])), f"rank of {name} at the end; 0 is the likeliest"),
                *facts,
            ]
        return plotting.page_html(
            TITLE,
            f"{self.model.cfg.model_name} reads {self.prompt!r}. After every layer we ask what it would say if it "
            "stopped there (nostalgebraist 2020, “interpreting GPT: the logit lens”).",
            sections,
            facts,
            footer(self.model.cfg.model_name, "lens"),
        )


def _place(label: str) -> str:
    layer, _, kind = label.partition("_")
    if kind == "pre":
        return "embedding"
    return f"layer {layer}" if kind == "post" else f"layer {layer}, attention"


def _said(label: str) -> str:
    return "once attention has written" if label.endswith("_mid") else "at its end"
