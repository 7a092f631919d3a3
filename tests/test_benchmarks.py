"""The benchmark's runner: who is compared, what counts as the same, and that the page is what the results say."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from benchmarks import page
from benchmarks.__main__ import app
from benchmarks.grids import make_grid, make_prompts
from benchmarks.measurements import FULL, OURS, QUICK, TARGETS, TINY, Fresh, Patching, Peak, Task, plan
from benchmarks.models import random_gpt2, write_model
from benchmarks.peers.contestant import Contestant, bytes_of
from benchmarks.peers.contestant import Task as ServedTask
from benchmarks.peers.minimal import MinimalGPT2
from benchmarks.peers.process import PEERS, interpreter_of
from benchmarks.report import beside_table, cell, figure, line, ratio, ratio_table, ratios, target_table, trouble
from benchmarks.runner import CPU, IMPORTS, Result, Run, Where, in_turn, largest_difference
from hooked_lm import HookedTransformer

COLUMNS = {"transformers": "`transformers`", "minimal": "minimal"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the benchmark's tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder, random_gpt2(**TINY))
    return folder


class Fake:
    """A contestant that needs no process.

    Args:
        name: its own.
        logits: what it computes.
        seconds: what it takes, one turn after the other.
    """

    def __init__(self, name: str, logits: torch.Tensor | None, seconds: list[float]) -> None:
        self.name, self.logits, self.seconds = name, logits, iter(seconds)
        self.asked: list[str] = []
        self.told: dict[str, dict[str, Any]] = {}

    def ask(self, what: str, **arguments: Any) -> Any:
        self.asked.append(what)
        self.told[what] = arguments
        match what:
            case "prepare" if self.logits is None:
                return None
            case "prepare":
                save_file({"logits": self.logits}, arguments["into"])
                return {"held": 8}
            case "run":
                return next(self.seconds)
            case _:
                return {}


def measured(folder: Path, *others: Fake, where: Where = CPU, **changes: Any) -> list[Result]:
    """Return the results of a task that ours and some others do."""
    ours = Fake(OURS, torch.arange(6.0), [1.0, 2.0, 3.0])
    task = Task(**{"name": "forward", "group": "G", "model": None, "task": "forward", "rounds": 2, **changes})
    run = Run([ours, *others], folder, 1, {}, where)
    return run.measure(task, lambda: None)


ARGUMENTS: dict[str, Any] = {"arguments": {"tokens": [[0]]}}


# Ratios


def test_ratios_are_taken_round_by_round() -> None:
    found = ratio("forward 1x128", "transformers", [1.0, 2.0, 9.0], [2.0, 2.0, 3.0])
    assert (found.median, found.low, found.high) == (1.0, 0.5, 3.0)
    assert found.target == 1.0
    assert found.met


def test_a_ratio_above_its_target_is_missed() -> None:
    found = ratio("forward 8x128", "transformers", [1.05], [1.0])
    assert found.met is False
    assert cell(found) == "1.05"
    assert ratio("forward 8x128", "somebody", [0.95], [1.0]).met is None


@pytest.mark.parametrize(("number", "text"), [(12.345, "12.35"), (0.5, "0.50"), (0.0333, "0.033"), (0.0004, "4.0e-04")])
def test_a_small_ratio_keeps_two_digits(number: float, text: str) -> None:
    assert figure(number) == text


def test_rounds_have_to_be_as_many() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratio("forward", "transformers", [1.0], [1.0, 2.0])


def test_every_target_is_of_a_measurement() -> None:
    planned = plan(FULL)
    names = {one.name for one in planned}
    names |= {f"{one.name}: bytes held" for one in planned if isinstance(one, Task) and one.held}
    assert {name for name, _ in TARGETS} <= names
    assert len({one.name for one in planned}) == len(planned)


def test_what_a_target_compares_with_takes_part() -> None:
    tasks = {one.name: one for one in plan(FULL) if isinstance(one, Task)}
    for name, other in TARGETS:
        task = tasks.get(name.removesuffix(": bytes held"))
        assert task is None or other in (*task.who, *task.beside)


# Who counts


def test_everybody_is_asked_in_turn_and_backwards_every_other_round() -> None:
    order: list[str] = []
    contestants = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}  # type: ignore[misc]
    ticks: list[int] = []
    failed: dict[str, str] = {}
    seconds = in_turn(contestants, 2, lambda: ticks.append(1), failed)
    assert "".join(order) == "cba" + "abc" + "cba"  # the first is to warm up
    assert seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [1.0, 1.0]}
    assert len(ticks) == 2
    assert failed == {}


def test_who_fails_in_the_middle_is_not_asked_again_and_named() -> None:
    turns = iter(range(10))

    def second_time() -> float:
        if next(turns) == 2:
            raise RuntimeError("could not:\nKeyError: 'x'")
        return 1.0

    failed: dict[str, str] = {}
    seconds = in_turn({"a": second_time, "b": lambda: 2.0}, 4, lambda: None, failed)
    assert seconds == {"b": [2.0] * 4}
    assert failed == {"a": "KeyError: 'x'"}
    assert next(turns) == 3


def test_times_of_equal_values_count(tmp_path: Path) -> None:
    other = Fake("transformers", torch.arange(6.0) + 5e-5, [1.0, 4.0, 4.0])
    (result,) = measured(tmp_path, other, **ARGUMENTS)
    assert result.values == {OURS: [2.0, 3.0], "transformers": [4.0, 4.0]}
    assert result.difference["transformers"] == pytest.approx(5e-5, rel=0.05)
    assert [one.median for one in ratios(result)] == [0.625]
    assert other.asked == ["begin", "prepare", "run", "run", "run", "forget"]


def test_a_wrong_contestant_is_left_out_and_named(tmp_path: Path) -> None:
    wrong = Fake("transformers", torch.arange(6.0) + 2e-4, [])
    (result,) = measured(tmp_path, wrong, **ARGUMENTS)
    assert "run" not in wrong.asked
    assert list(result.values) == [OURS]
    assert ratios(result) == []
    assert list(trouble(result)) == ["forward, transformers: values differ by 0.0002, more than 0.0001"]
    assert "differ" in line(result)


def test_in_half_precision_differences_are_noted_and_not_judged(tmp_path: Path) -> None:
    other = Fake("transformers", torch.arange(6.0) + 0.25, [1.0, 4.0, 4.0])
    (result,) = measured(tmp_path, other, where=Where("cpu", "bfloat16"), **ARGUMENTS)
    assert result.values == {OURS: [2.0, 3.0], "transformers": [4.0, 4.0]}
    assert result.difference == {"transformers": 0.25}
    assert other.told["begin"] == {"threads": 1, "device": "cpu", "dtype": "bfloat16"}


def test_who_has_no_such_thing_is_absent_and_no_trouble(tmp_path: Path) -> None:
    (result,) = measured(tmp_path, Fake("transformers", None, []), **ARGUMENTS)
    assert result.absent == ["transformers"]
    assert list(trouble(result)) == []


def test_who_fails_is_left_out_with_his_last_words(tmp_path: Path) -> None:
    class Failing(Fake):
        def ask(self, what: str, **arguments: Any) -> Any:
            if what == "prepare":
                raise RuntimeError("could not prepare:\nTraceback ...\nValueError: no room\n")
            return {}

    (result,) = measured(tmp_path, Failing("transformers", None, []), **ARGUMENTS)
    assert result.failed == {"transformers": "ValueError: no room"}
    assert OURS in result.values


def test_who_leaves_something_out_is_left_out(tmp_path: Path) -> None:
    class Less(Fake):
        def ask(self, what: str, **arguments: Any) -> Any:
            if what == "prepare":
                save_file({"something else": torch.arange(6.0)}, arguments["into"])
                return {"held": None}
            return super().ask(what, **arguments)

    (result,) = measured(tmp_path, Less("transformers", None, []), **ARGUMENTS)
    assert result.wrong == {"transformers": "values are missing: logits"}


def test_bytes_are_a_result_of_their_own(tmp_path: Path) -> None:
    _, held = measured(tmp_path, held=True, **ARGUMENTS)
    assert (held.name, held.unit, held.values) == ("forward: bytes held", "bytes", {OURS: [8.0]})


@pytest.mark.parametrize(
    ("theirs", "difference"),
    [
        ({"x": torch.tensor([1.0, 2.5])}, 0.5),
        ({"x": torch.tensor([1.0, math.nan])}, math.inf),
        ({"x": torch.tensor([1.0])}, math.inf),
        ({"x": torch.tensor([1, 2])}, math.inf),
        ({"y": torch.tensor([1.0, 2.0])}, math.inf),
        ({"x": torch.tensor([1.0, 2.0]), "y": torch.zeros(1)}, 0.0),
    ],
)
def test_values_that_are_missing_or_of_another_shape_differ_without_end(
    theirs: dict[str, torch.Tensor], difference: float
) -> None:
    assert largest_difference({"x": torch.tensor([1.0, 2.0])}, theirs) == difference


def test_tokens_are_the_same_or_not() -> None:
    ours = {"tokens": torch.tensor([1, 2])}
    assert largest_difference(ours, {"tokens": torch.tensor([1, 2])}) == 0
    assert largest_difference(ours, {"tokens": torch.tensor([1, 3])}) == math.inf


class Loop(Fake):
    """Patches cell by cell: a cell's value is the sum of its numbers, and each takes a second.

    Args:
        name: its own.
        turns: what is added to the values of each turn, or what is raised; nothing after that.
    """

    def __init__(self, name: str, *turns: float | RuntimeError) -> None:
        super().__init__(name, None, [])
        self.turns = iter(turns)

    def ask(self, what: str, **arguments: Any) -> Any:
        match what:
            case "patch":
                shift = next(self.turns, 0.0)
                if isinstance(shift, RuntimeError):
                    raise shift
                cells = arguments["cells"]
                return {"seconds": 1.0 * len(cells), "values": [shift + sum(cell) for cell in cells]}
            case "sweep":
                return {"seconds": 2.0, "values": [layer + pos for layer in range(2) for pos in range(3)]}
            case _:
                return {}


def grid_beside(other: Loop, folder: Path, rounds: int, cells: int) -> Result:
    """Return the result of a small grid, done so often, with so many cells by the loops each time."""
    grid = make_grid("residual grid", "resid_pre", (2, 3))
    prompts, _ = make_prompts(3, 10)
    run = Run([Loop(OURS), other], folder, 1, {})
    (result,) = run.measure(Patching(grid.name, "P", "small", grid, prompts, rounds, cells), lambda: None)
    return result


def test_a_loop_with_wrong_values_is_left_out_of_a_grid(tmp_path: Path) -> None:
    result = grid_beside(Loop("transformers", 1.0, 1.0, 1.0), tmp_path, 1, 4)
    # Four of six cells in four seconds are six seconds for all.
    assert result.values == {OURS: [2.0], "ours, plain loop": [6.0]}
    assert list(result.wrong) == ["transformers"]


@pytest.mark.parametrize("shift", [math.nan, math.inf])
def test_values_that_are_no_numbers_are_wrong_in_whatever_round(shift: float, tmp_path: Path) -> None:
    # One turn to warm up, and two halves of each round.
    result = grid_beside(Loop("transformers", 0.0, 0.0, 0.0, shift), tmp_path, 2, 3)
    assert result.wrong == {"transformers": "values differ by inf, more than 0.0001"}
    assert list(result.values) == [OURS, "ours, plain loop"]


@pytest.mark.parametrize("turn", range(4))
def test_a_loop_that_fails_is_left_out_of_a_grid_and_named(turn: int, tmp_path: Path) -> None:
    turns = [*[0.0] * turn, RuntimeError("could not patch:\nMemoryError")]
    result = grid_beside(Loop("transformers", *turns), tmp_path, 2, 3)
    assert result.failed == {"transformers": "MemoryError"}
    assert result.values == {OURS: [2.0, 2.0], "ours, plain loop": [6.0, 6.0]}


# Contestants


def test_the_minimal_transformer_equals_ours(tiny: Path) -> None:
    minimal = MinimalGPT2.from_folder(tiny / "huggingface")
    ours = HookedTransformer.from_pretrained_no_processing(str(tiny / "huggingface"))
    tokens = torch.randint(0, 1000, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(minimal(tokens), ours(tokens), rtol=0, atol=1e-5)
        wrong = minimal(tokens.flip(1))
        assert (wrong - ours(tokens)).abs().max() > 1e-2


def test_biases_and_gains_of_the_models_are_random(tiny: Path) -> None:
    ours = HookedTransformer.from_pretrained_no_processing(str(tiny / "huggingface"))
    vectors = [ours.blocks[0].ln1.w - 1, ours.blocks[0].attn.b_O, ours.blocks[0].mlp.b_in, ours.ln_final.b]
    assert all(vector.std() > 0.01 for vector in vectors)


def test_bytes_of_shared_memory_count_once() -> None:
    whole = torch.zeros(10)
    assert bytes_of([whole, whole[:5], torch.zeros(1)]) == 44


def test_a_task_runs_without_gradients_unless_it_wants_them() -> None:
    class Nobody(Contestant):
        def load_model(self, folder: Path, way: str) -> Any: ...

        def logits(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
            return tokens

    task = Nobody().forward([[1]])
    with task.mode():
        assert torch.is_inference_mode_enabled()
    with ServedTask(task.run, task.values, gradients=True).mode():
        assert torch.is_grad_enabled()


# Tables and the page


REPORT: dict[str, Any] = {
    "date": "2026-11",
    "rounds": None,
    "quick": False,
    "machine": {
        "cpu": "a CPU",
        "cores": 2,
        "threads": 2,
        "python": "3.11",
        "torch": "2.0",
        "transformers": "5.0",
    },
    "versions": {
        OURS: {"hooked-lm": "0.1.0"},
        "transformer_lens-3": {"transformer_lens": "3.9.0", "torch": "2.0", "transformers": "5.0"},
    },
    "results": [
        {
            "name": "forward 8x128",
            "group": "Forward",
            "values": {OURS: [1.05, 1.09], "transformers": [1.0, 1.0], "ours, forward": [0.5, 0.5]},
        },
        {
            "name": "attribution 1x128",
            "group": "Gradients",
            "values": {OURS: [0.1]},
            "wrong": {"transformers": "values differ by 1, more than 0.0001"},
        },
    ],
}


def test_a_table_from_a_given_report() -> None:
    results = [Result(**REPORT["results"][0])]
    assert ratio_table(results, COLUMNS) == (
        "|  | ours | `transformers` |\n| --- | --- | --- |\n| forward 8x128 | 1.07 s | 1.07 (1.05-1.09) |"
    )
    assert beside_table(results, COLUMNS).splitlines()[-1] == (
        "| forward 8x128 | 1.07 s | ours, forward | 500 ms | 2.14 (2.10-2.18) |"
    )
    other = [ratio("forward 8x128", "transformers", [0.5], [1.0]), ratio("forward 1x128", "transformers", [0.5], [1.0])]
    assert target_table([("One", ratios(results[0])), ("Two", other)], COLUMNS).splitlines() == [
        "|  | beside | at most | One | Two |",
        "| --- | --- | --- | --- | --- |",
        "| forward 1x128 | `transformers` | 1 |  | 0.50 |",
        "| forward 8x128 | `transformers` | 1 | **1.07** | 0.50 |",
    ]


def another_report() -> dict[str, Any]:
    """Return a report of another processor, on which a forward pass takes less."""
    forward = {**REPORT["results"][0], "values": {OURS: [0.5], "transformers": [1.0], "minimal": [2.0]}}
    return {**REPORT, "machine": {**REPORT["machine"], "cpu": "Another(R) CPU", "threads": 1}, "results": [forward]}


def test_a_page_from_given_reports() -> None:
    template = "\n\n".join(f"<!-- measured: {name} -->" for name in ("leftout", "ratios", "targets", "notes"))
    notes = "Preface.\n\n## forward 8x128\n\nFor this reason.\n"
    text = page.rendered([REPORT, another_report()], template, notes)
    assert "### a CPU, 2 threads\n\nMeasured in 2026-11: 2 cores, threads used: 2, " in text
    assert "### Another CPU, one thread\n\nMeasured in 2026-11: 2 cores, threads used: 1, " in text
    assert "`transformer_lens` 3.9.0" in text
    assert "Not measured, since no environment was named for them: transformer_lens-4, nnsight." in text
    assert "- a CPU, 2 threads: attribution 1x128, transformers: values differ by 1, more than 0.0001" in text
    assert text.count("#### Forward\n\n|  | ours |") == 2
    assert "| forward 8x128 | `transformers` | 1 | **1.07** | 0.50 |" in text
    assert text.count("### Missed: forward 8x128\n\nFor this reason.") == 1
    assert "Preface" not in text
    assert "trial run" not in text


def test_a_summary_shows_the_worst_of_the_reports() -> None:
    for reports in ([REPORT, another_report()], [another_report(), REPORT]):
        lines = page.summary(reports).splitlines()
        assert lines[0] == "|  | `transformers` | minimal |"
        assert "| forward pass, 8 x 128 | 1.07 | 0.25 |" in lines
        readme = "before\n<!-- measured: summary -->\nold\n<!-- end of summary -->\nafter\n"
        expected = readme.replace("old", f"\n{page.summary(reports)}\n")
        assert page.with_summary(readme, reports) == expected
        assert page.with_summary(expected, reports) == expected


def test_a_missed_target_without_a_note_says_so() -> None:
    assert page.explanations([REPORT], {}) == "### Missed: forward 8x128\n\nNot explained yet."


def test_every_peer_is_imported_has_a_column_and_is_named_with_its_version() -> None:
    versions = {
        name: {"torch": "2", "transformers": "5", "transformer_lens": "9.8.7", "nnsight": "6.5"} for name in PEERS
    }
    report = {**REPORT, "versions": REPORT["versions"] | versions}
    assert IMPORTS.keys() >= PEERS.keys()
    assert page.columns(report).keys() >= PEERS.keys()
    text = page.machine(report)
    assert text.count("`transformer_lens` 9.8.7 with torch 2, transformers 5.") == 2
    assert text.count("`nnsight` 6.5 with torch 2, transformers 5.") == 1


def test_a_run_of_few_rounds_is_marked_as_such() -> None:
    assert "trial run" in page.machine({**REPORT, "rounds": 1})


def test_notes_are_about_measurements() -> None:
    planned = plan(FULL)
    names = {one.name for one in planned}
    names |= {f"{one.name}: bytes held" for one in planned if isinstance(one, Task) and one.held}
    assert page.read_notes(page.NOTES.read_text()).keys() <= names


def test_the_page_and_the_readme_are_what_the_results_say() -> None:
    reports = page.read_reports()
    text = page.rendered(reports, page.TEMPLATE.read_text(), page.NOTES.read_text())
    assert page.PAGE.read_text() == text, "run `python -m benchmarks --render`"
    assert page.MARKER.search(text) is None
    readme = page.README.read_text()
    assert page.with_summary(readme, reports) == readme, "run `python -m benchmarks --render`"
    assert page.summary(reports) in readme


def test_two_kinds_of_processors_are_measured() -> None:
    vendors = {title.split()[0] for title in map(page.title, page.read_reports())}
    assert vendors >= {"AMD", "Intel"}


def test_the_page_has_the_headings_that_others_link_to() -> None:
    headings = re.findall(r"^## (.+)$", page.PAGE.read_text(), flags=re.MULTILINE)
    assert {"Loading", "Patching"} <= set(headings)


# The command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setattr("benchmarks.__main__.torch.set_num_threads", lambda n: None)
    return CliRunner()


def plain(text: str) -> str:
    """Return what typer prints without its box."""
    return " ".join(re.sub(r"[│╭╮╰╯─]|\x1b\[[0-9;]*m", " ", text).split())


def test_an_unknown_peer_is_an_error_that_names_those_there_are(command: CliRunner) -> None:
    done = command.invoke(app, ["--peer", "transformerlens=python"])
    assert done.exit_code == 2
    assert "no peer 'transformerlens': there are transformer_lens-3, transformer_lens-4, nnsight" in plain(done.output)


def test_a_peer_without_an_interpreter_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"'/nowhere' is no file: give --peer transformer_lens-3=FOLDER/bin/python"):
        interpreter_of("transformer_lens-3=/nowhere")
    assert interpreter_of(f"transformer_lens-3={sys.executable}") == ("transformer_lens-3", sys.executable)


def test_an_unknown_measurement_is_an_error_that_names_those_there_are(command: CliRunner) -> None:
    done = command.invoke(app, ["--only", "forwards"])
    assert done.exit_code == 2
    assert "no measurement 'forwards': there are import;" in plain(done.output)


@pytest.mark.parametrize("part", [["--quick"], ["--rounds", "1"], ["--only", "import"], ["--dtype", "bfloat16"]])
def test_the_page_is_not_written_from_a_part(part: list[str], command: CliRunner) -> None:
    done = command.invoke(app, [*part, "--page"])
    assert done.exit_code == 2
    assert "leave out --only, --quick, --rounds, --device and --dtype" in plain(done.output)


def test_a_list_of_what_is_measured(command: CliRunner) -> None:
    done = command.invoke(app, ["--list", "--only", "tiny: forward*"])
    names = ["tiny: forward 1x128", "tiny: forward 8x128", "tiny: forward 1x32"]
    assert done.output.split("\n") == [*names, ""]


def test_a_quick_run_skips_missing_peers_by_name_and_everybody_computes_the_same(
    command: CliRunner, tmp_path: Path
) -> None:
    found = tmp_path / "results.json"
    # Without what starts fresh interpreters, which takes most of the time.
    names = [one.name for one in plan(QUICK) if isinstance(one, (Task, Patching))]
    options = [part for name in names for part in ("--only", name)]
    done = command.invoke(app, ["--quick", "--threads", "1", "--json", str(found), *options])
    assert done.exit_code == 0, done.output
    assert "transformer_lens-3: skipped, for want of --peer transformer_lens-3=PYTHON" in done.output
    report = json.loads(found.read_text())
    assert set(report["versions"]) == {OURS, "transformers", "minimal"}
    results = {one["name"]: one for one in report["results"]}
    assert {"transformers", "minimal"} <= results["tiny: forward 1x16"]["difference"].keys()
    assert results["generation of 5, batch 2"]["difference"] == {"transformers": 0.0}
    assert results["full cache 1x16"]["absent"] == ["transformers"]
    assert set(results["residual grid 2x4, one token differs"]["values"]) == {OURS, "ours, plain loop", "transformers"}
    lazy = results["lazy cache 1x32: bytes held"]["values"]
    assert lazy[OURS][0] < lazy["ours, full cache"][0] / 10
    assert set(results["traced residual grid 2x4"]["values"]) == {OURS, "ours, sweep"}
    assert set(results["traced forward 1x16"]["values"]) == {OURS, "ours, forward"}
    assert set(names) <= results.keys()
    assert report["machine"]["threads"] == 1
    assert "more rows, float32" in report["machine"]["kernels"]
    by_function = results["residual grid 2x4, every token differs, metric a function"]
    assert max(by_function["difference"].values()) < 1e-5


def test_on_an_accelerator_nothing_is_loaded_and_two_precisions_are_compared(
    command: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not [one for one in plan(QUICK, "cuda") if isinstance(one, (Fresh, Peak)) or one.group == "Import and load"]
    asked: list[tuple[list[str], Where]] = []

    def run_all(measurements: list[Any], *_: Any) -> tuple[list[Result], dict[str, dict[str, str]]]:
        asked.append(([one.name for one in measurements], _[-1]))
        return [], {}

    monkeypatch.setattr("benchmarks.__main__.run_all", run_all)
    monkeypatch.setattr("benchmarks.__main__.device_name", lambda device: "an accelerator")
    found = tmp_path / "results.json"
    done = command.invoke(app, ["--device", "cuda", "--only", "forward 1x128", "--json", str(found)])
    assert done.exit_code == 0, done.output
    assert asked == [
        (["forward 1x128"], Where("cuda", "float32")),
        (["forward 1x128, bfloat16"], Where("cuda", "bfloat16")),
    ]
    assert json.loads(found.read_text())["machine"]["device"] == "an accelerator"
