"""The command line, run as a user would."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import hooked_lm
from hooked_lm import HookedTransformer, metrics, patching
from hooked_lm.circuits.heads import copying_scores, repeated_token_scores
from hooked_lm.circuits.logit_lens import logit_lens
from hooked_lm.cli import app, outputs
from hooked_lm.cli.demo import report
from hooked_lm.cli.info import describe
from hooked_lm.cli.info import report as info_report
from hooked_lm.components.kernels import describe_kernels
from hooked_lm.demo import MODEL, label, run_demo
from tests.helpers import tiny_model

runner = CliRunner()

PROMPT = "When John and Mary went to the store, John gave a"
OTHER = "When John and Mary went to the store, Mary gave a"
PAIR = ("--clean", PROMPT, "--corrupted", OTHER, "--answer", " Mary", "--wrong", " John")
NUMBERS = ("--clean", "0 5 9 12 30 7 5 9", "--corrupted", "0 5 9 30 12 7 5 9", "--answer", "12", "--wrong", "30")


def call(*arguments: object) -> Any:
    return runner.invoke(app, [str(argument) for argument in arguments])


def numbers_of(*arguments: object) -> dict[str, Any]:
    """What a command shows with `--json -`: nothing but the numbers."""
    run = call(*arguments, "--json", "-")
    assert run.exit_code == 0, run.output
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def model(gpt2_folder: Path) -> HookedTransformer:
    return HookedTransformer.from_pretrained(gpt2_folder)


@pytest.mark.parametrize("word", ["version", "--version"])
def test_version_prints_the_version(word: str) -> None:
    run = runner.invoke(app, [word])
    assert run.exit_code == 0
    assert run.output.strip() == hooked_lm.__version__


def test_help_answers_without_importing_torch() -> None:
    code = "import sys, hooked_lm.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_demo_writes_the_page_and_the_numbers_of_both_bundled_models(tmp_path: Path) -> None:
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    run = runner.invoke(app, ["demo", "--html", str(page), "--json", str(numbers)])
    assert run.exit_code == 0, run.output
    written = json.loads(numbers.read_text())
    induction, tour = written["induction"], written["tour"]
    assert f"accuracy {induction['second_half']['accuracy']:6.1%}" in run.output
    assert "lengths it was never trained on" in run.output
    assert f"{tour['repeats']['second_accuracy']:.0%} of the second half right" in " ".join(run.output.split())
    assert str(page) in run.output
    assert str(numbers) in run.output
    text = page.read_text(encoding="utf-8")
    assert text.count("<section>") == 5 + 5 + 2
    for head in ("previous_token_head", "induction_head"):
        assert label(tuple(induction[head])) in text


def test_demo_tours_another_model_by_itself(tmp_path: Path, reader_folder: Path) -> None:
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    run = runner.invoke(app, ["demo", "--model", str(reader_folder), "--html", str(page), "--json", str(numbers)])
    assert run.exit_code == 0, run.output
    assert json.loads(numbers.read_text())["induction"] is None
    assert page.read_text(encoding="utf-8").count("<section>") == 5
    assert "5. Name movers" in run.output


@pytest.mark.parametrize("model", ["demo-induction-2l", "no/such-folder/here"])
def test_demo_of_a_model_that_cannot_do_the_tasks_says_so_and_writes_nothing(model: str, tmp_path: Path) -> None:
    run = runner.invoke(app, ["demo", "--model", model, "--html", str(tmp_path / "page.html")])
    assert run.exit_code == 2
    assert "Traceback" not in run.output
    assert not list(tmp_path.iterdir())


def test_without_plotly_demo_gives_the_numbers_and_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reader_folder: Path
) -> None:
    find_spec: Callable[..., ModuleSpec | None] = importlib.util.find_spec
    monkeypatch.setattr("hooked_lm.cli.outputs.find_spec", lambda name: None if name == "plotly" else find_spec(name))
    page = tmp_path / "page.html"
    run = runner.invoke(app, ["demo", "--model", str(reader_folder), "--html", str(page)])
    assert run.exit_code == 0, run.output
    assert "3. Repeated tokens" in run.output
    assert "pip install 'hooked-lm[viz]'" in run.output
    assert not page.exists()


def test_an_unknown_command_fails() -> None:
    assert runner.invoke(app, ["dmeo"]).exit_code == 2


def test_the_report_says_each_number() -> None:
    result = run_demo()
    text = report(result)
    for number in (
        f"{result.first_half.log_prob:7.3f}",
        f"{result.second_half.accuracy:6.1%}",
        f"{result.previous_token_score:.2f} of its attention",
        f"{result.induction_score:.2f} of its attention",
        f"{result.pair_composition:.2f}, the most of all heads in layer 0",
        f"for {result.circuit_accuracy:.1%} of tokens",
        *(f"loss {ablation.loss:6.3f}" for ablation in result.ablations),
        *(f"{length}: {accuracy:.1%}" for length, accuracy in result.accuracy_by_length.items()),
    ):
        assert number in text


def test_the_package_runs_as_a_module() -> None:
    run = subprocess.run([sys.executable, "-m", "hooked_lm", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == hooked_lm.__version__


@pytest.mark.parametrize("command", ["info", "lens", "heads", "patch"])
def test_every_command_has_a_help_text_and_says_what_a_model_is(command: str) -> None:
    run = call(command, "--help")
    assert run.exit_code == 0
    assert "A bundled model, a folder" in " ".join(run.output.split())


# info


def test_info_says_what_a_checkpoint_is_as_it_was_trained(gpt2_folder: Path, model: HookedTransformer) -> None:
    found = numbers_of("info", gpt2_folder)
    assert (found["n_layers"], found["n_heads"], found["d_model"], found["d_vocab"]) == (3, 4, 24, 300)
    assert found["architecture"] == "GPT2LMHeadModel"
    assert found["tied_embeddings"] is True
    assert found["processed"] == []
    assert found["processing"] == list(model.processed)
    assert found["tokenizer"]["n_tokens"] == 300
    assert found["n_hook_points"] == len(model.hook_dict)
    assert set(found["hook_points"]) <= set(model.hook_dict)
    assert found["config"]["n_ctx"] == 32
    text = call("info", gpt2_folder).output
    for said in (
        "4 a layer, 6 wide",
        "96 wide, gelu_new",
        "learned",
        "29,988",
        "tied",
        "float32",
        "fold_ln",
        "300 tokens",
    ):
        assert said in text


def test_info_says_which_kernels_compute_products() -> None:
    run = call("info", MODEL, "--kernels")
    assert run.exit_code == 0
    assert "HOOKED_LM_KERNELS" in run.output
    assert "PyTorch's choice" in run.output
    assert numbers_of("info", MODEL, "--kernels")["kernels"] == describe_kernels()
    assert "HOOKED_LM_KERNELS" not in call("info", MODEL).output


def test_info_needs_no_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    run = call("info", MODEL)
    assert run.exit_code == 0
    assert "none: prompts are token numbers" in run.output


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n_heads": 4, "n_key_value_heads": 2}, "sharing 2 heads of keys and values"),
        ({"positional_embedding_type": "rotary", "rotary_dim": 2}, "rotary, 2 of 4 dimensions, base 10000"),
        ({"positional_embedding_type": "rotary", "use_yarn_rope": True, "yarn_factor": 2.0}, "YaRN"),
        ({"positional_embedding_type": "rotary", "rotary_layers": [True, False]}, "in 1 layers of 2"),
        ({"positional_embedding_type": "alibi"}, "ALiBi"),
        ({"normalization_type": "RMS", "norm_placement": "after"}, "RMSNorm, on what attention and MLP write"),
        ({"normalization_type": None}, "norm             none"),
        ({"use_qk_norm": True}, "RMSNorm on queries and keys"),
        ({"window_size": 4, "attn_types": ["local", "global"]}, "a window of 4 in 1 layers of 2"),
        ({"attn_scores_soft_cap": 30.0}, "scores capped at 30"),
        ({"gated_mlp": True, "parallel_attn_mlp": True}, "48 wide, gated, gelu_new, in parallel with attention"),
        (
            {"num_experts": 4, "experts_per_token": 2, "moe_layers": [False, True]},
            "4 experts 48 wide, 2 for a token in 1",
        ),
        ({"attn_only": True, "act_fn": None}, "before attention;"),
        ({"d_vocab_out": 7}, "20 tokens in, 7 out"),
        ({"n_layers": 0}, "layers           0"),
    ],
)
def test_info_puts_what_is_special_into_words(fields: dict[str, Any], said: str) -> None:
    found = describe(tiny_model(**fields))
    assert said in info_report(found)
    json.dumps(found)


# lens


def test_the_lens_gives_the_readings_of_logit_lens(gpt2_folder: Path, model: HookedTransformer) -> None:
    found = numbers_of("lens", gpt2_folder, PROMPT, "--answer", " Mary", "--positions", "3")
    expected = logit_lens(model, PROMPT, targets=" Mary", positions=slice(-3, None), verbose=False)
    assert [site["site"] for site in found["sites"]] == list(expected.labels)
    for index, site in enumerate(found["sites"]):
        assert site["answer_rank"] == expected.target_ranks[index, 0, :, 0].tolist()
        assert site["answer_probability"] == pytest.approx(expected.target_probs[index, 0, :, 0].tolist(), rel=1e-5)
        assert [one["token"] for one in site["top"][-1]] == expected.top_tokens[index, 0, -1].tolist()
    assert found["positions"][-1]["string"] == model.to_str_tokens(PROMPT)[-1]
    assert found["answer"] == {"token": model.to_single_token(" Mary"), "string": " Mary"}


def test_the_lens_shows_a_row_for_each_layer_and_the_rank_at_each_site(gpt2_folder: Path) -> None:
    found = numbers_of("lens", gpt2_folder, PROMPT, "--answer", " Mary")
    text = call("lens", gpt2_folder, PROMPT, "--answer", " Mary").output
    for row in ("layer 2", "layer 1", "layer 0", "embedding"):
        assert text.count(f"\n{row} ") == 2
    ranks = {site["site"]: site["answer_rank"][-1] for site in found["sites"]}
    last = text.split("after the layer")[1].splitlines()[1].split()
    assert [int(last[2]), int(last[4])] == [ranks["2_mid"], ranks["2_post"]]
    assert f"ends with rank {ranks['2_post']}" in text


def test_the_lens_reads_token_numbers_where_there_is_no_tokenizer_and_says_when_the_answer_comes() -> None:
    run = call("lens", MODEL, "0 5 9 12 30,7 5 9", "--answer", "12")
    assert "8 tokens" in run.output
    assert "The answer 12 is the likeliest token from layer 1 on, at its end." in run.output
    assert numbers_of("lens", MODEL, "0 5 9")["positions"][1] == {"pos": 1, "token": 5, "string": None}


def test_a_narrow_terminal_shows_the_last_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = call("lens", MODEL, "0 5 9 12 30 7 5 9").output
    assert "7: 9" in text
    assert "0: 0" not in text
    assert "of 8 positions" in text


# heads


def test_heads_gives_the_scores_of_the_library(gpt2_folder: Path, model: HookedTransformer) -> None:
    found = numbers_of("heads", gpt2_folder, "--top", "2", "--length", "7", "--batch", "3", "--seed", "5")
    for kind in ("previous_token", "duplicate_token", "induction"):
        generator = torch.Generator().manual_seed(5)
        expected = repeated_token_scores(model, kind, batch=3, length=7, generator=generator, verbose=False)
        torch.testing.assert_close(torch.tensor(found["scores"][kind]), expected.scores)
        assert [(one["layer"], one["head"]) for one in found["top"][kind]] == [one[:2] for one in expected.top(2)]
    torch.testing.assert_close(torch.tensor(found["scores"]["copying"]), copying_scores(model, verbose=False).scores)
    assert found["left_out"] == {}


def test_heads_finds_the_pair_of_the_bundled_model_and_takes_what_length_fits() -> None:
    text = call("heads", MODEL, "--top", "1", "--length", "1000").output
    assert "31 random tokens" in text  # its context is 64
    previous, _, induction, copying = (part.splitlines()[-1].split()[0] for part in text.strip().split("\n\n")[1:])
    assert (previous, induction, copying) == ("L0H0", "L1H1", "L1H1")


def test_scores_that_a_model_cannot_have_are_left_out_with_the_reason(tmp_path: Path) -> None:
    tiny_model(d_vocab_out=7).save_pretrained(tmp_path)
    run = call("heads", tmp_path, "--html", tmp_path / "page.html")
    assert run.exit_code == 0, run.output
    assert "Copying is left out: copying compares tokens in with tokens out" in run.output
    assert "Copying is left out" in (tmp_path / "page.html").read_text()
    assert list(numbers_of("heads", tmp_path)["left_out"]) == ["copying"]


# patch


def test_patch_gives_the_grids_of_the_library(gpt2_folder: Path, model: HookedTransformer) -> None:
    found = numbers_of("patch", gpt2_folder, *PAIR, "--site", "resid_pre", "--site", "heads")
    metric = metrics.logit_diff(model.to_single_token(" Mary"), model.to_single_token(" John"))
    with torch.no_grad():
        logits, cache = model.run_with_cache(PROMPT)
        ends = float(metric(logits)), float(metric(model(OTHER)))
    assert (found["clean"]["logit_difference"], found["corrupted"]["logit_difference"]) == pytest.approx(ends, abs=1e-5)
    for site, patch in (("resid_pre", "resid_pre"), ("heads", "attn_head_out_all_pos")):
        grid = getattr(patching, f"get_act_patch_{patch}")(model, OTHER, cache, metric, verbose=False)
        got = found["grids"][site]
        torch.testing.assert_close(torch.tensor(got["logit_difference"]), grid, atol=1e-5, rtol=1e-5)
        share = (grid - ends[1]) / (ends[0] - ends[1])
        torch.testing.assert_close(torch.tensor(got["share"]), share, atol=1e-3, rtol=1e-3)
        assert got["best"][0]["share"] == pytest.approx(float(share.max()), abs=1e-3)
    assert found["grids"]["heads"]["axes"] == ["layer", "head"]


def test_the_table_has_the_positions_where_something_moves() -> None:
    text = call("patch", MODEL, *NUMBERS, "--site", "resid_pre", "--site", "heads").output
    rows = [line.split() for line in text.splitlines()]
    assert ["3:", "12", "for", "30", "100", "100"] in rows
    assert "7 where nothing moves are left out" in text
    assert ["layer", "1", ".", "100", ".", "."] in rows
    assert any(row[0] == "L1H1" and row[-1] == "100%" for row in rows if row)


def test_a_clean_prompt_without_its_answer_is_remarked_on() -> None:
    # The other way round, and the pair's order swapped with it.
    swapped = ("--clean", NUMBERS[3], "--corrupted", NUMBERS[1], *NUMBERS[4:])
    assert "The clean prompt does not have the answer" in call("patch", MODEL, *swapped).output
    assert "does not have the answer" not in call("patch", MODEL, *NUMBERS).output


# Files


@pytest.mark.parametrize(
    ("command", "sections"),
    [
        (("lens", MODEL, "0 5 9 5", "--answer", "9"), 2),
        (("heads", MODEL), 4),
        (("patch", MODEL, *NUMBERS, "--site", "resid_pre", "--site", "heads"), 2),
    ],
)
def test_the_numbers_and_the_page_are_written_whole(command: tuple[str, ...], sections: int, tmp_path: Path) -> None:
    page, numbers = tmp_path / "new" / "page.html", tmp_path / "numbers.json"
    run = call(*command, "--html", page, "--json", numbers)
    assert run.exit_code == 0, run.output
    assert str(page) in run.output
    assert json.loads(numbers.read_text()) == numbers_of(*command)
    assert page.read_text(encoding="utf-8").count("<section>") == sections
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "numbers.json", "page.html"]


def test_what_could_not_be_written_leaves_nothing_and_spoils_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    numbers = tmp_path / "numbers.json"
    numbers.write_text("old")

    def half(path: Path, text: str, **options: Any) -> int:
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    run = call("info", MODEL, "--json", numbers)
    assert run.exit_code == 2
    assert f"{numbers} cannot be written: No space left on device" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]
    assert numbers.read_text() == "old"


def test_a_place_that_is_no_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    outputs.write_whole(Path("/dev/null"), "text")
    assert not Path("/dev/null").is_file()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "file.json")
    outputs.write_whole(link, "text")
    assert link.is_symlink()
    assert (tmp_path / "file.json").read_text() == "text"


def test_numbers_that_json_lacks_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    outputs.give_out("", {"a": [float("nan"), 1.0], "b": (float("inf"),)}, Path("-"))
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.0], "b": [None]}


# Bad input: one line, exit code 2, and no file


BAD = {
    "unknown model": (("info", "no/such/model"), "no checkpoint 'no/such/model'"),
    "words for numbers": (("lens", MODEL, "zero five"), "token numbers such as"),
    "no tokens": (("lens", MODEL, ""), "token numbers such as"),
    "a number too large": (("lens", MODEL, "0 96"), "token 96 is out of range: this model's tokens are 0-95"),
    "too long": (("lens", MODEL, "1 " * 65), "65 tokens, and this model reads 64 at most"),
    "a word for an answer": (("lens", MODEL, "0 5", "--answer", "x"), "one token number such as 12"),
    "an answer too large": (("lens", MODEL, "0 5", "--answer", "96"), "--answer: token 96 is out of range"),
    "an unknown device": (("heads", MODEL, "--device", "toaster"), "--device 'toaster': there are cpu"),
    "a device that is not there": (("heads", MODEL, "--device", "cuda:99"), "finds no such device"),
    "an unknown site": (("patch", MODEL, *NUMBERS, "--site", "heds"), "--site heds: it is one of resid_pre"),
    "a site it lacks": (("patch", MODEL, *NUMBERS, "--site", "mlp_out"), "--site mlp_out: this model has none"),
    "the same prompts": (("patch", MODEL, *NUMBERS[:3], NUMBERS[1], *NUMBERS[4:]), "the same tokens"),
    "the same answers": (("patch", MODEL, *NUMBERS[:7], "12"), "--answer and --wrong are the same token"),
    "other lengths": (
        ("patch", MODEL, *NUMBERS[:3], "0 5 9", *NUMBERS[4:]),
        "--clean has 8 (0, 5, 9, 12, 30, 7, 5, 9); --corrupted has 3 (0, 5, 9)",
    ),
    "a page on standard output": (("heads", MODEL, "--html", "-"), "--html takes the name of a file"),
}


@pytest.mark.parametrize(("command", "said"), BAD.values(), ids=BAD)
def test_bad_input_ends_with_one_line(command: tuple[str, ...], said: str, tmp_path: Path) -> None:
    run = call(*command, "--json", tmp_path / "numbers.json")
    assert run.exit_code == 2
    assert said in run.stderr
    assert run.stderr.count("\n") == 1
    assert run.stdout == ""
    assert not list(tmp_path.iterdir())


def test_an_answer_of_several_tokens_is_named_with_its_tokens(gpt2_folder: Path) -> None:
    run = call("patch", gpt2_folder, *PAIR[:6], "--wrong", " Paris is")
    assert run.exit_code == 2
    assert "--wrong: ' Paris is' is 4 tokens, not one" in run.stderr


def test_prompts_of_other_lengths_are_named_with_their_tokens(gpt2_folder: Path) -> None:
    run = call("patch", gpt2_folder, "--clean", "to the", "--corrupted", "to", *PAIR[4:])
    assert run.exit_code == 2
    assert "--clean has 4 ('<|endoftext|>', " in run.stderr
    assert "' the'); --corrupted has 3 (" in run.stderr


def test_a_model_that_does_not_tell_the_prompts_apart_is_remarked_on(tmp_path: Path) -> None:
    # A window of one position: the last one never hears of the others.
    tiny_model(window_size=1).save_pretrained(tmp_path)
    run = call("patch", tmp_path, "--clean", "1 2 3", "--corrupted", "1 4 3", "--answer", "5", "--wrong", "6")
    assert run.exit_code == 2
    assert "both prompts give the same logit difference" in run.stderr


def test_a_model_without_layers_has_nothing_to_show(tmp_path: Path) -> None:
    tiny_model(n_layers=0).save_pretrained(tmp_path)
    prompts = ("--clean", "1 2", "--corrupted", "1 3", "--answer", "5", "--wrong", "6")
    for command in (("lens", tmp_path, "1 2"), ("heads", tmp_path), ("patch", tmp_path, *prompts)):
        run = call(*command)
        assert run.exit_code == 2
        assert "layers" in run.stderr


@pytest.mark.parametrize("command", [("lens", MODEL, "0 5"), ("heads", MODEL), ("patch", MODEL, *NUMBERS)])
def test_without_plotly_a_page_is_refused_before_any_work(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("hooked_lm.cli.outputs.find_spec", lambda name: None)
    run = call(*command, "--html", tmp_path / "page.html")
    assert run.exit_code == 2
    assert run.stderr.strip() == "--html needs plotly, which is not installed: pip install 'hooked-lm[viz]'"
    assert run.stdout == ""
    assert not list(tmp_path.iterdir())


def test_places_where_no_file_can_be_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    for option, path in (("--json", tmp_path), ("--html", tmp_path / "file" / "page.html")):
        run = call("heads", MODEL, option, path)
        assert run.exit_code == 2
        assert run.stderr.startswith(f"{option} {path}: ")
        assert run.stdout == ""
    run = call("heads", MODEL, "--json", tmp_path / "same", "--html", tmp_path / "same")
    assert "give each a name of its own" in run.stderr


# Tables


def test_a_table_too_wide_goes_on_below_with_its_labels_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "17")
    header, row = ["", *map(str, range(6))], ["layer 0", *["100"] * 6]
    first, second, third = outputs.text_table(header, [row]).split("\n\n")
    assert first.splitlines() == ["           0    1", "layer 0  100  100"]
    assert second.splitlines()[1] == third.splitlines()[1] == "layer 0  100  100"


def test_wide_letters_and_marks_keep_the_columns_straight() -> None:
    assert outputs.columns_of("日本") == 4
    assert outputs.columns_of("é") == 1  # e and a mark
    assert outputs.clipped("日本語", 5) == "日本…"
    lines = outputs.text_table(["", "a"], [["日本", "1"], ["abc", "2"]]).splitlines()
    assert {outputs.columns_of(line) for line in lines} == {7}
