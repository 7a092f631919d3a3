"""`hooked-lm demo`: a guided tour of the bundled models, or of another one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from hooked_lm.cli.inputs import IgnoredFields
from hooked_lm.cli.outputs import VIZ_REMEDY, JsonPath, check_outputs, give_out, has_plotly

if TYPE_CHECKING:
    from hooked_lm.demo import DemoResult

__all__ = ["demo", "report"]


def demo(
    model: Annotated[
        str | None, typer.Option(help="Tour another model that can do the tasks: gpt2, a folder, a hub id.")
    ] = None,
    html: Annotated[Path, typer.Option(help="Where to write the page of figures.")] = Path("demo.html"),
    json_path: JsonPath = None,
    ignored: IgnoredFields = None,
) -> None:
    """Tour two small trained models: an induction circuit, and five experiments of the field, with their figures."""
    from hooked_lm.demo import STEPS, run_demo
    from hooked_lm.demo.tour import MODEL, take_tour
    from hooked_lm.demo.tour import STEPS as TOUR_STEPS

    page = html if has_plotly() else None
    try:
        check_outputs(json_path, page)
        n_steps = len(TOUR_STEPS) if model else len(STEPS) + len(TOUR_STEPS)
        with tqdm(total=n_steps, desc="demo", disable=None, leave=False) as bar:

            def advance(step: str) -> None:
                bar.set_postfix_str(step)
                bar.update()

            induction = None if model else run_demo(on_step=advance)
            tour = take_tour(model or MODEL, ignore_config_fields=ignored or (), on_step=advance)
    except (ValueError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error

    def draw() -> str:
        from hooked_lm.demo.page import demo_page

        return demo_page(induction, tour)

    text = "\n\n".join([*([report(induction)] if induction else []), tour.report()])
    data = {"induction": induction.to_dict() if induction else None, "tour": tour.to_dict()}
    give_out(text, data, json_path, page, draw)
    if page is None:
        typer.echo(f"The page of figures was left out: it needs plotly. To have it: {VIZ_REMEDY}", err=True)


def report(result: DemoResult) -> str:
    """Return the demo's numbers with a sentence each."""
    from hooked_lm.demo import label

    previous, induction = label(result.previous_token_head), label(result.induction_head)
    by_length = ", ".join(f"{length}: {accuracy:.1%}" for length, accuracy in result.accuracy_by_length.items())
    most = "the most" if result.pair_composes_most else "not the most"
    ablations = "\n".join(
        f"  {ablation.label:<44} loss {ablation.loss:6.3f}   accuracy {ablation.accuracy:6.1%}"
        for ablation in result.ablations
    )
    return f"""\
{result.model_name}: 2 layers of attention, no MLPs, {result.n_parameters:,} parameters.
It reads {result.length} random tokens, then the same {result.length} again ({result.batch} such sequences).

1. What it can do
  first half    log-probability {result.first_half.log_prob:7.3f}   accuracy {result.first_half.accuracy:6.1%}
  second half   log-probability {result.second_half.log_prob:7.3f}   accuracy {result.second_half.accuracy:6.1%}
  The first time round the tokens are random, so it can only guess. The second time it knows what comes next.
  Second-half accuracy at lengths it was never trained on: {by_length}.

2. Which heads do it
  {previous} is a previous-token head: {result.previous_token_score:.2f} of its attention goes to the token just before.
  {induction} is an induction head: {result.induction_score:.2f} of its attention, in the repeat, goes to the token
  that followed the same token the first time.

3. How they are linked
  K-composition of {previous} and {induction}: {result.pair_composition:.2f}, {most} of all heads in layer 0.
  {previous} notes at each position which token came before; {induction} looks for the position whose
  note is the token at hand. From the weights alone, their circuit picks the right token
  out of {result.d_vocab} for {result.circuit_accuracy:.1%} of tokens.

4. What happens without them (second half)
{ablations}
"""
