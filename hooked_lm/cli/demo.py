"""`hooked-lm demo`: the induction circuit of the bundled model, found and tested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from hooked_lm.cli.outputs import VIZ_REMEDY, has_plotly
from hooked_lm.files import write_whole

if TYPE_CHECKING:
    from hooked_lm.demo import DemoResult


def demo(
    html: Annotated[Path, typer.Option(help="Where to write the page of figures.")] = Path("demo.html"),
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers as JSON.")] = None,
) -> None:
    """Find the induction circuit of a small trained model, and show what happens without it."""
    from hooked_lm.demo import STEPS, run_demo

    with tqdm(total=len(STEPS), desc="demo", disable=None, leave=False) as bar:

        def advance(step: str) -> None:
            bar.set_postfix_str(step)
            bar.update()

        result = run_demo(on_step=advance)
    typer.echo(report(result))
    if json_path is not None:
        write_whole(json_path, json.dumps(result.to_dict(), indent=2) + "\n")
        typer.echo(f"The numbers are in {json_path}.")
    if not has_plotly():
        typer.echo(f"The page of figures was left out: it needs plotly. To have it: {VIZ_REMEDY}")
        return
    from hooked_lm.demo_page import write_demo_page

    typer.echo(f"The figures are in {write_demo_page(result, html)}: open it in a browser.")


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
