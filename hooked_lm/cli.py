"""The command `hooked-lm`."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

import hooked_lm

if TYPE_CHECKING:
    from hooked_lm.demo import DemoResult

app = typer.Typer(
    help="Look inside language models.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(hooked_lm.__version__)


@app.command()
def demo(
    html: Annotated[Path, typer.Option(help="Where to write the page of figures.")] = Path("demo.html"),
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers as JSON.")] = None,
) -> None:
    """Find the induction circuit of a small trained model, and show what happens without it."""
    # PyTorch takes seconds to import; --help and version do without.
    from hooked_lm.demo import STEPS, run_demo

    with tqdm(total=len(STEPS), desc="demo", disable=None, leave=False) as bar:

        def advance(step: str) -> None:
            bar.set_postfix_str(step)
            bar.update()

        result = run_demo(on_step=advance)
    typer.echo(report(result))
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
        typer.echo(f"The numbers are in {json_path}.")
    if find_spec("plotly") is None:
        typer.echo("The page of figures was left out: it needs plotly. To have it: pip install 'hooked-lm[viz]'")
        return
    from hooked_lm.demo_page import write_demo_page

    typer.echo(f"The figures are in {write_demo_page(result, html)}: open it in a browser.")


@app.command()
def verify(
    path: Annotated[str, typer.Argument(help="A folder in HuggingFace's format, an alias, or a hub id.")],
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write the report as JSON.")] = None,
    positions: Annotated[int | None, typer.Option(min=1, help="Tokens in a prompt; 64 by default.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    float64: Annotated[bool, typer.Option(help="Compare in float64 too, which takes twice the memory.")] = True,
) -> None:
    """Compare a model with that of transformers, site by site. Exit code 1 if they differ, 2 if it cannot be loaded."""
    try:
        certificate = hooked_lm.verify(path, positions=positions, revision=revision, float64=float64)
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    typer.echo(str(certificate))
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        certificate.save(json_path)
        typer.echo(f"The report is in {json_path}.")
    raise typer.Exit(0 if certificate.passed else 1)


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


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
