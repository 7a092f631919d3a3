"""Tools that experiments get as arguments, traces under their hash, figures, the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hooked_lm import HookedTransformer, circuits, plotting
from hooked_lm.cli import app
from hooked_lm.experiments import Bench, Tool
from hooked_lm.experiments.bench.tools import READY
from hooked_lm.tracing import TraceError
from tests.bench.test_recording import model_of

TOKENS = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "bench", png=False)


# Tools


@pytest.mark.parametrize("name", READY)
def test_every_ready_tool_is_there_and_says_what_it_is_for(bench: Bench, name: str) -> None:
    tool = bench.tools[name]
    assert any(callable(part) for part in tool.parts.values())
    assert [name, *tool.about.split()] in [line.split() for line in str(bench.tools).splitlines()]
    for part in tool.parts:
        assert getattr(tool, part) is not None


def test_there_are_ten_ready_tools_or_more(bench: Bench) -> None:
    assert len(bench.tools) >= 10


@pytest.mark.parametrize("outermost", ["record", "use_tools"])
def test_a_function_gets_its_tools_and_their_calls_are_noted(bench: Bench, outermost: str) -> None:
    def experiment(model: HookedTransformer, length: int, heads: Tool, own: Tool) -> tuple[circuits.HeadScores, int]:
        return heads.attention_scores(model, TOKENS, "previous_token"), own(length)  # type: ignore[operator, return-value]

    bench.add_tool("own", lambda x: 2 * x, about="doubles")
    if outermost == "record":
        run = bench.record(bench.use_tools("heads", "own")(experiment))
    else:
        run = bench.use_tools("heads", "own")(bench.record(experiment))
    model = model_of()
    scores, doubled = run(model, length=3)
    assert torch.equal(scores.scores, circuits.attention_scores(model, TOKENS, "previous_token").scores)
    assert doubled == 6
    record = bench.get("experiment")
    assert [(call["tool"], call["function"]) for call in record.tools] == [
        ("heads", "attention_scores"),
        ("own", "<lambda>"),
    ]
    assert "used heads: attention_scores" in str(record)
    assert {"model", "length"} <= record.arguments.keys()
    assert 'return heads.attention_scores(model, TOKENS, "previous_token")' in record.source


def test_a_call_of_a_tool_that_fails_is_noted_too(bench: Bench) -> None:
    def failing(own: Tool) -> None:
        own()

    def divide() -> float:
        return 1 / 0

    bench.add_tool("own", divide)
    with pytest.raises(ZeroDivisionError):
        bench.record(bench.use_tools("own")(failing))()
    assert [call["function"] for call in bench.get("failing").tools] == ["divide"]


def test_tools_of_ones_own_are_functions_modules_or_objects(bench: Bench) -> None:
    class Counter:
        """Counts."""

        start = 1

        def up(self) -> int:
            return self.start + 1

    made = bench.add_tool("counter", Counter())
    assert (made.up(), made.start) == (2, 1)  # type: ignore[operator]
    assert str(bench.tools).splitlines()[-1].split() == ["counter", "Counts."]
    assert bench.add_tool("figures", plotting).parts.keys() == set(plotting.__all__)
    with pytest.raises(AttributeError, match="the tool 'counter' has no 'down': it has start, up"):
        _ = made.down
    with pytest.raises(TypeError, match="the tool 'counter' has several functions: start, up"):
        made()
    with pytest.raises(ValueError, match="'heads' is a ready tool"):
        bench.add_tool("heads", len)
    with pytest.raises(ValueError, match="'my tool' is none"):
        bench.add_tool("my tool", len)
    with pytest.raises(ValueError, match="a tool is a function, a module or an object with methods"):
        bench.add_tool("nothing", object())


def test_a_tool_or_a_parameter_that_is_not_there_raises_at_once(bench: Bench) -> None:
    with pytest.raises(ValueError, match="there is no tool 'head': there are ablation, attribution, "):
        bench.use_tools("head")
    with pytest.raises(ValueError, match=r"has no parameter of that name: write def experiment\(\.\.\., heads\)"):

        @bench.use_tools("heads")
        def experiment(model: HookedTransformer) -> None: ...

    with pytest.raises(ValueError, match="use_tools takes the names of tools"):
        bench.use_tools()


# Traces


def test_a_trace_is_recorded_under_its_hash_and_runs_again_elsewhere(bench: Bench) -> None:
    model = model_of()
    with bench.trace(model) as t:
        run = t.prompts(TOKENS)
        run["pattern", 0].save("pattern")
    expected = model.run_with_cache(TOKENS)[1]["pattern", 0]
    assert torch.allclose(t["pattern"], expected, atol=1e-6)
    [name] = bench.names
    assert name == f"trace-{t.hash[:12]}"
    record = bench.get(name)
    assert record.data["function"]["sha256"] == t.hash
    assert torch.equal(record.result["pattern"], t["pattern"])  # type: ignore[index]
    elsewhere = Bench(bench.folder).rerun(name, model=model_of())
    assert elsewhere.same
    assert elsewhere.record.version == 2
    other = Bench(bench.folder).rerun(name, model=model_of(5))
    assert [one.path for one in other.diff.results] == ["pattern"]


def test_a_trace_that_no_file_can_hold_raises_and_is_not_recorded(bench: Bench) -> None:
    with pytest.raises(TraceError, match="saves nothing"), bench.trace(model_of()) as t:
        t.prompts(TOKENS)
    with pytest.raises(ZeroDivisionError), bench.trace(model_of()) as t:
        _ = 1 / 0
    assert [entry.outcome for entry in bench.all()] in ([], ["TraceError"])


# Figures


def test_figures_are_kept_as_pages(bench: Bench) -> None:
    @bench.record
    def drawn() -> dict[str, object]:
        return {"curve": plotting.layer_curves({"a": [1.0, 2.0]}, ["0", "1"]), "more": [1.5]}

    drawn()
    record = bench.get("drawn")
    assert list(record.figures) == ["00-result-curve"]
    page = record.figures["00-result-curve"].read_text()
    assert page.startswith("<!doctype html>")
    assert record.result["curve"] == record.figures["00-result-curve"]  # type: ignore[index]
    assert "figure 00-result-curve" in str(record)
    drawn()
    assert bench.diff("drawn@1", "drawn@2").same_results


def test_a_picture_is_made_where_it_can_be_and_noted_where_not(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(self: plotting.Figure, path: Path) -> None:
        path.write_bytes(b"picture")

    def no_browser(self: plotting.Figure, path: Path) -> None:
        raise RuntimeError("there is no browser\nto draw it")

    drawn: Callable[[], object] = lambda: plotting.layer_curves({"a": [1.0, 2.0]}, ["0", "1"])  # noqa: E731
    monkeypatch.setattr(plotting.Figure, "save", save)
    Bench(bench.folder).record(name="drawn")(drawn)()
    monkeypatch.setattr(plotting.Figure, "save", no_browser)
    Bench(bench.folder).record(name="drawn")(drawn)()
    first, second = bench.get("drawn", 1), bench.get("drawn", 2)
    assert first.figures["00-result"].with_suffix(".png").read_bytes() == b"picture"
    assert second.data["notes"] == ["figure 00-result has no picture: there is no browser"]
    assert not second.figures["00-result"].with_suffix(".png").exists()


def test_the_figure_of_a_result_is_drawn_where_that_is_asked_for(bench: Bench) -> None:
    class Result:
        def figure(self) -> plotting.Figure:
            return plotting.layer_curves({"a": [1.0, 2.0]}, ["0", "1"])

        def table(self) -> str:
            return "a table"

    with pytest.warns(UserWarning, match="only the text is kept"):
        bench.record(name="result", figures=True)(Result)()
    assert list(bench.get("result").figures) == ["00-figure"]
    assert str(bench.get("result")).endswith("a table")


# Differences


def test_a_diff_has_the_largest_differences_first_and_a_figure(bench: Bench) -> None:
    run = bench.record(name="two")(
        lambda x, text: {"a": x, "b": [1.0, 2 * x], "t": torch.tensor([x, 1.0]), "s": text, "n": torch.tensor([x > 1])}
    )
    run(1.0, "one")
    run(1.5, "other")
    found = bench.diff("two@1", "two@2")
    assert [str(one) for one in found.results] == [
        "a: 1 -> 1.5",
        "b[1]: 2 -> 3",
        "n: 1 of 1 entries differ",
        "s: 'one' -> 'other'",
        "t: 1 of 2 entries differ, by at most 0.5",
    ]
    assert [one.path for one in found.top(3)] == ["n", "s", "b[1]"]
    assert found.largest == 1.0
    assert [row["of"] for row in found.rows()] == ["arguments"] * 2 + ["results"] * 5
    assert [list(curve.y) for curve in found.figure().data] == [[1.0, 2.0], [1.5, 3.0]]
    assert found.summary == "other arguments; 5 results differ, by at most 1"
    same = bench.diff("two@1", "two@1")
    assert same.same_results
    assert same.same_inputs
    with pytest.raises(ValueError, match="nothing to draw"):
        same.figure()


def test_a_diff_of_a_run_that_failed_and_one_that_did_not(bench: Bench) -> None:
    run = bench.record(name="inverse")(lambda x: 1 / x)
    with pytest.raises(ZeroDivisionError):
        run(0)
    run(1)
    assert [str(one) for one in bench.diff("inverse@1", "inverse@2").results] == [
        "result: ZeroDivisionError: division by zero -> complete"
    ]


def test_a_diff_shows_the_lines_of_the_source_that_differ(bench: Bench) -> None:
    def one(x: int) -> int:
        y = x + 1
        return y

    def other(x: int) -> int:
        y = x + 2
        return y

    bench.record(name="sum")(one)(1)
    bench.record(name="sum")(other)(1)
    lines = bench.diff("sum@1", "sum@2").source
    assert "-    y = x + 1" in lines
    assert "+    y = x + 2" in lines
    assert lines[:2] == ("--- sum@1", "+++ sum@2")


# The command line


def test_the_command_line_lists_shows_and_compares(bench: Bench) -> None:
    run = bench.record(name="twice")(lambda x: {"value": 2 * x})
    run(1)
    run(2)
    bench.run(model_of)

    def said(*words: str) -> str:
        result = CliRunner().invoke(app, ["bench", *words])
        assert result.exit_code == 0, result.output
        return result.output

    folder = str(bench.folder)
    assert [line.split()[0] for line in said("list", folder).splitlines()] == [
        "record",
        "twice@1",
        "twice@2",
        "model_of@1",
    ]
    assert "model_of" not in said("list", folder, "--name", "twice")
    assert said("list", folder, "--last", "1").count("\n") == 3
    assert json.loads(said("list", folder, "--json", "-"))["records"][1]["value"] == 4
    assert "value: 4" in said("show", folder, "twice@2")
    assert "lambda x: {" in said("show", folder, "twice", "--source")
    assert json.loads(said("show", folder, "twice@1", "--json", "-"))["summary"]["results"] == {"value": 2}
    assert "value: 2 -> 4" in said("diff", folder, "twice@1", "twice@2")
    wrong = CliRunner().invoke(app, ["bench", "show", folder, "thrice"])
    assert wrong.exit_code == 2
    nowhere = CliRunner().invoke(app, ["bench", "list", str(bench.folder.parent)])
    assert nowhere.exit_code == 2
