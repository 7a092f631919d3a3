"""Fields of a config that the user asks to leave out: in the certificate, and in every command that loads a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hooked_lm import CheckpointError, verify
from hooked_lm.cli import app
from tests.loading_helpers import edit_json, row_model

runner = CliRunner()

PROMPT = "When John and Mary went to the store, John gave a"
COMMANDS = {
    "info": (),
    "lens": (PROMPT,),
    "heads": ("--length", "4", "--batch", "1"),
    "patch": (
        *("--clean", PROMPT, "--corrupted", PROMPT.replace("John gave", "Mary gave")),
        *("--answer", " Mary", "--wrong", " John"),
    ),
    "verify": ("--positions", "8", "--no-float64"),
}


@pytest.mark.parametrize(("field", "value", "passes"), [("sliding_window", 2, True), ("is_causal", False, False)])
def test_a_certificate_passes_only_if_an_ignored_field_does_not_matter(
    field: str, value: object, passes: bool, tmp_path: Path
) -> None:
    row_model("llama").save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **{field: value})
    with pytest.raises(CheckpointError, match=rf"ignore_config_fields=\['{field}'\]"):
        verify(tmp_path, positions=8)
    certificate = verify(tmp_path, positions=8, ignore_config_fields=[field])
    assert certificate.passed is passes


@pytest.mark.parametrize(("command", "options"), COMMANDS.items(), ids=COMMANDS)
def test_a_command_reads_a_checkpoint_without_the_fields_that_it_is_told_to_ignore(
    command: str, options: tuple[str, ...], gpt2_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(gpt2_folder, tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", is_causal=True, sliding_window=2)
    call = [command, str(tmp_path / "model"), *options, "--json", str(tmp_path / "numbers.json")]
    refused = runner.invoke(app, [*call, "--ignore-config-fields", "is_causal"])
    assert refused.exit_code == 2
    assert "sliding_window" in refused.stderr
    run = runner.invoke(app, [*call, "--ignore-config-fields", "is_causal", "--ignore-config-fields", "sliding_window"])
    assert run.exit_code == 0, run.output
    assert json.loads((tmp_path / "numbers.json").read_text())


def test_the_demo_of_another_model_takes_them_too(gpt2_folder: Path) -> None:
    run = runner.invoke(app, ["demo", "--model", str(gpt2_folder), "--ignore-config-fields", "twist"])
    assert run.exit_code == 2
    assert "ignore_config_fields names ['twist'], which this config lacks" in run.stderr
