"""`hooked-lm patch`: activation patching of one pair of prompts."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
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
    footer,
    give_out,
    shows_progress,
    text_table,
)

if TYPE_CHECKING:
    from torch import Tensor

    from hooked_lm.transformer import HookedTransformer

__all__ = ["SITES", "TITLE", "Pair", "Patched", "check_sites", "patch"]

TITLE = "Activation patching"
# The name of a site -> its name in `patching.PATCHES`, and a description.
SITES = {
    "resid_pre": ("resid_pre", "the residual stream at the start of a layer, at one position"),
    "resid_mid": ("resid_mid", "the residual stream between attention and MLP, at one position"),
    "resid_post": ("resid_post", "the residual stream at the end of a layer, at one position"),
    "attn_out": ("attn_out", "the output of a layer's attention, at one position"),
    "mlp_out": ("mlp_out", "the output of a layer's MLP, at one position"),
    "heads": ("attn_head_out_all_pos", "the output of a head, at all positions"),
    "q": ("attn_head_q_all_pos", "the queries of a head, at all positions"),
    "k": ("attn_head_k_all_pos", "the keys of a key-value head, at all positions"),
    "v": ("attn_head_v_all_pos", "the values of a key-value head, at all positions"),
    "pattern": ("attn_head_pattern_all_pos", "the attention pattern of a head"),
}
# A smaller share is shown as a dot.
_NOTHING = 0.005


def patch(
    model: ModelName,
    clean: Annotated[str, typer.Option(metavar="PROMPT", help=f"The prompt that has the answer. {TEXT_RULE}")],
    corrupted: Annotated[
        str, typer.Option(metavar="PROMPT", help="A prompt of as many tokens, with the wrong answer.")
    ],
    answer: Annotated[str, typer.Option(metavar="TOKEN", help="What the clean prompt calls for, such as ' Mary'.")],
    wrong: Annotated[str, typer.Option(metavar="TOKEN", help="What the corrupted prompt calls for, such as ' John'.")],
    site: Annotated[
        list[str] | None,
        typer.Option(help=f"What to patch, resid_pre by default; may be repeated: {', '.join(SITES)}."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many cells to name.")] = 5,
    json_path: JsonPath = None,
    html: HtmlPath = None,
    device: Device = "cpu",
    revision: Revision = None,
    ignored: IgnoredFields = None,
) -> None:
    """Put activations of the clean run into the corrupted one, and see which bring the answer back."""
    with one_line_errors():
        check_outputs(json_path, html)
        sites = tuple(dict.fromkeys(site or ["resid_pre"]))
        check_sites(sites)
        loaded = load_model(model, revision, device, ignored)
        pair = Pair.read(loaded, clean, corrupted, answer, wrong)
        found = Patched(loaded, pair, sites, top)
        give_out(found.report(), found.to_dict(), json_path, html, found.page)


def check_sites(sites: Sequence[str]) -> None:
    """Raise a ValueError if a site is none of `SITES`."""
    for site in sites:
        if site not in SITES:
            near = difflib.get_close_matches(site, SITES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--site {site}: it is one of {', '.join(SITES)}{hint}")


@dataclass(frozen=True, eq=False)
class Pair:
    """Two prompts of one length and the two tokens between which the model chooses.

    Attributes:
        clean_prompt, corrupted_prompt: as given.
        clean, corrupted: their tokens, [1 pos].
        answer, wrong: tokens.
    """

    clean_prompt: str
    corrupted_prompt: str
    clean: Tensor
    corrupted: Tensor
    answer: int
    wrong: int

    @classmethod
    def read(cls, model: HookedTransformer, clean: str, corrupted: str, answer: str, wrong: str) -> Pair:
        """Return the pair that the options give.

        Raises:
            ValueError: an answer that is not one token, or prompts that cannot be patched position by position.
        """
        tokens = {
            name: read_prompt(model, text, name) for name, text in (("--clean", clean), ("--corrupted", corrupted))
        }
        answers = {name: read_answer(model, text, name) for name, text in (("--answer", answer), ("--wrong", wrong))}
        if len({one.shape[1] for one in tokens.values()}) > 1:
            counted = "; ".join(
                f"{name} has {one.shape[1]} ({', '.join(spell(model, token) for token in one[0].tolist())})"
                for name, one in tokens.items()
            )
            raise ValueError(f"patching goes position by position, so both prompts need as many tokens: {counted}")
        if bool((tokens["--clean"] == tokens["--corrupted"]).all()):
            raise ValueError("--clean and --corrupted are the same tokens: there is nothing to patch")
        if answers["--answer"] == answers["--wrong"]:
            raise ValueError("--answer and --wrong are the same token: their logits never differ")
        return cls(clean, corrupted, tokens["--clean"], tokens["--corrupted"], answers["--answer"], answers["--wrong"])


class Patched:
    """The grids of a pair, as text, data and page.

    Args:
        model: the model.
        pair: the prompts and answers.
        sites: what to patch.
        top: how many cells to name.

    Raises:
        ValueError: the model lacks a site, or both prompts give the same logit difference.
    """

    def __init__(self, model: HookedTransformer, pair: Pair, sites: Sequence[str], top: int) -> None:
        import torch

        from hooked_lm import metrics, patching
        from hooked_lm.names import UnknownHookError
        from hooked_lm.patching.activation import patch_sites

        self.model, self.pair, self.top = model, pair, top
        if not model.cfg.n_layers:
            raise ValueError("this model has no layers, so there is nothing to patch")
        names = []
        for site in sites:
            try:
                names += patch_sites(model, patching.PATCHES[SITES[site][0]])
            except UnknownHookError as error:
                raise ValueError(f"--site {site}: this model has none ({error})") from error
        metric = metrics.logit_diff(pair.answer, pair.wrong)
        # All tokens are read, although a start token may look like padding.
        whole = torch.ones_like(pair.clean)
        with torch.no_grad():
            logits, cache = model.run_with_cache(pair.clean, names_filter=names, attention_mask=whole)
            self.clean = float(metric(logits))
            self.corrupted = float(metric(model(pair.corrupted, attention_mask=whole)))
        gap = self.clean - self.corrupted
        if not abs(gap) > 1e-4 * max(1.0, abs(self.clean), abs(self.corrupted)):
            raise ValueError(
                f"both prompts give the same logit difference, {self.clean:.4f} and {self.corrupted:.4f}: take prompts "
                "that the model tells apart"
            )
        self.grids: dict[str, Tensor] = {}
        for site in sites:
            get = getattr(patching, f"get_act_patch_{SITES[site][0]}")
            grid = get(model, pair.corrupted, cache, metric, attention_mask=whole, verbose=shows_progress())
            self.grids[site] = grid.double().cpu()

    def shares(self, site: str) -> Tensor:
        """Return a grid on the scale on which the corrupted run is 0 and the clean run 1."""
        return (self.grids[site] - self.corrupted) / (self.clean - self.corrupted)

    def by_position(self, site: str) -> bool:
        """Whether the second axis of a grid is positions, and not heads."""
        from hooked_lm.patching import PATCHES

        return PATCHES[SITES[site][0]].axes[1] == "pos"

    def labels(self) -> list[str]:
        """Return each position's number and token, both tokens where the prompts differ."""
        labels = []
        for position, pair in enumerate(zip(self.pair.clean[0].tolist(), self.pair.corrupted[0].tolist(), strict=True)):
            clean, corrupted = (spell(self.model, token) for token in pair)
            labels.append(f"{position}: {clean}" if clean == corrupted else f"{position}: {clean} for {corrupted}")
        return labels

    def best(self, site: str) -> list[PlainData]:
        """Return the cells that bring back most, the best first."""
        shares, axis = self.shares(site), "pos" if self.by_position(site) else "head"
        values, places = shares.flatten().topk(min(self.top, shares.numel()))
        return [
            {
                "layer": place // shares.shape[1],
                axis: place % shares.shape[1],
                "logit_difference": float(self.grids[site].flatten()[place]),
                "share": share,
            }
            for share, place in zip(values.tolist(), places.tolist(), strict=True)
        ]

    # In the terminal

    def report(self) -> str:
        """Return both runs, and a table and the best cells of each site."""
        return "\n\n".join([self._runs(), *(self._table(site) for site in self.grids)])

    def _runs(self) -> str:
        pair, spelled = self.pair, (spell(self.model, token) for token in (self.pair.answer, self.pair.wrong))
        remark = (
            "" if self.clean > 0 else "\nThe clean prompt does not have the answer: the model prefers the wrong one."
        )
        return (
            f"{self.model.cfg.model_name}: logit of {' less that of '.join(spelled)}\n"
            f"  clean      {self.clean:8.3f}   {pair.clean_prompt!r}\n"
            f"  corrupted  {self.corrupted:8.3f}   {pair.corrupted_prompt!r}{remark}"
        )

    def _table(self, site: str) -> str:
        shares = self.shares(site)
        if self.by_position(site):
            labels = self.labels()
            moved = [bool((column.abs() >= _NOTHING).any()) for column in shares.T]
            header = ["", *(str(layer) for layer in range(shares.shape[0]))]
            rows = [
                [clipped(labels[position], 28), *map(_percent, shares[:, position].tolist())]
                for position in range(shares.shape[1])
                if moved[position]
            ]
            axes = "layers across, positions down"
            if not all(moved):
                axes += f" ({moved.count(False)} where nothing moves are left out)"
        else:
            header = ["", *(str(head) for head in range(shares.shape[1]))]
            rows = [[f"layer {layer}", *map(_percent, row)] for layer, row in enumerate(shares.tolist())]
            axes = "heads across, layers down"
        found = [cell for cell in self.best(site) if cell["share"] >= _NOTHING]
        best = [[self._named(site, one), f"{one['logit_difference']:.3f}", f"{one['share']:.0%}"] for one in found]
        lines = [
            f"{site}: {SITES[site][1]}",
            f"Percent of the way from corrupted (0) to clean (100); {axes}",
            text_table(header, rows) if rows else "Nothing moves anywhere.",
        ]
        if best:
            lines += ["", text_table(["The best", "logit difference", "share of the way"], best)]
        return "\n".join(lines)

    def _named(self, site: str, cell: PlainData) -> str:
        if "head" in cell:
            return f"L{cell['layer']}H{cell['head']}"
        return f"layer {cell['layer']}, position {self.labels()[cell['pos']]}"

    # As data

    def to_dict(self) -> PlainData:
        """Return both runs and every grid as plain data."""
        pair = self.pair

        def prompt(text: str, tokens: Tensor, difference: float) -> PlainData:
            spelled = [token_data(self.model, token) for token in tokens[0].tolist()]
            return {"prompt": text, "tokens": spelled, "logit_difference": difference}

        return {
            "model": self.model.cfg.model_name,
            "clean": prompt(pair.clean_prompt, pair.clean, self.clean),
            "corrupted": prompt(pair.corrupted_prompt, pair.corrupted, self.corrupted),
            "answer": token_data(self.model, pair.answer),
            "wrong": token_data(self.model, pair.wrong),
            "grids": {
                site: {
                    "axes": ["layer", "pos" if self.by_position(site) else "head"],
                    "logit_difference": grid.tolist(),
                    "share": self.shares(site).tolist(),
                    "best": self.best(site),
                }
                for site, grid in self.grids.items()
            },
        }

    # As a page

    def page(self) -> str:
        """Return a page of figures."""
        from hooked_lm import plotting
        from hooked_lm.plotting import PageFigure

        name, answer, wrong = (
            self.model.cfg.model_name,
            *(spell(self.model, one) for one in (self.pair.answer, self.pair.wrong)),
        )
        sections = []
        for site in self.grids:
            by_position = self.by_position(site)
            best = self.best(site)[0]
            figure = plotting.patching_grid(
                self.shares(site),
                self.labels() if by_position else None,
                axis="position" if by_position else "head",
                unit="share of the way",
            )
            sections.append(
                PageFigure(
                    site,
                    "Each cell is a run of the corrupted prompt with one thing taken from the clean run: "
                    f"{SITES[site][1]}. 0 is the corrupted run, 1 the clean one; orange leads away. The best is "
                    f"{self._named(site, best)}: {best['share']:.0%} of the way.",
                    (figure,),
                )
            )
        return plotting.page_html(
            TITLE,
            f"{name} reads {self.pair.clean_prompt!r} (clean) and {self.pair.corrupted_prompt!r} (corrupted). What "
            f"of the clean run does the corrupted one need to say {answer} rather than {wrong}?",
            sections,
            [
                (f"{self.clean:.2f}", f"logit of {answer} less that of {wrong}, clean"),
                (f"{self.corrupted:.2f}", "the same, corrupted"),
            ],
            footer(name, "patch"),
        )


def _percent(share: float) -> str:
    return "." if abs(share) < _NOTHING else f"{100 * share:.0f}"
