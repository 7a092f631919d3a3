"""The certificate notices what it is there to notice, says where, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from typer.testing import CliRunner

from hooked_lm import Certificate, CheckpointError, HookedTransformer, verify
from hooked_lm.certificate import Comparison
from hooked_lm.cli import app
from tests.family_rows import ROWS

unprocessed = HookedTransformer.from_pretrained_no_processing
runner = CliRunner()

CHECKS = ["activations", "cached decoding", "left padding", "gradients"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a row's checkpoint. Do not write to it."""
    folders: dict[str, Path] = {}

    def folder(row_id: str) -> Path:
        if row_id not in folders:
            folders[row_id] = tmp_path_factory.mktemp(row_id)
            next(row for row in ROWS if row.id == row_id).build().save_pretrained(folders[row_id])
        return folders[row_id]

    return folder


def replace_ours(monkeypatch: pytest.MonkeyPatch, load: Callable[..., HookedTransformer]) -> None:
    """Have certificates made of another model of ours than the checkpoint's."""
    monkeypatch.setattr("hooked_lm.certificate.HookedTransformer", SimpleNamespace(from_pretrained_no_processing=load))


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[HookedTransformer], object]) -> None:
    """Have certificates made of our model after a change to it."""

    def load(*args: Any, **kwargs: Any) -> HookedTransformer:
        model = unprocessed(*args, **kwargs)
        with torch.no_grad():
            change(model)
        return model

    replace_ours(monkeypatch, load)


def failures(certificate: Certificate) -> list[Comparison]:
    return [comparison for comparison in certificate.comparisons if not comparison.passed]


def quick(folder: Path, **kwargs: Any) -> Certificate:
    return verify(folder, **{"positions": 12, "float64": False, **kwargs})


# What it notices


def test_a_faithful_model_passes_every_check_in_both_precisions(checkpoint: Callable[[str], Path]) -> None:
    certificate = verify(checkpoint("gpt2"), positions=12)
    assert certificate.passed
    assert certificate.exact_in_float64
    assert {(comparison.check, comparison.precision) for comparison in certificate.comparisons} == {
        (check, precision) for check in CHECKS for precision in ("float32", "float64")
    }
    sites = {comparison.site for comparison in certificate.comparisons if comparison.check == "activations"}
    assert sites == {
        *(
            f"blocks.{layer}.{site}"
            for layer in range(3)
            for site in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")
        ),
        *(f"blocks.{layer}.attn.hook_pattern" for layer in range(3)),
        "blocks.2.hook_resid_post",
        "unembed.hook_in",
        "unembed.hook_out",
    }
    assert certificate.not_compared == {}
    assert certificate.tokens == (2, 12)


def test_a_certificate_is_made_where_gradients_are_turned_off_too(checkpoint: Callable[[str], Path]) -> None:
    with torch.no_grad():
        assert verify(checkpoint(ROWS[0].id)).passed


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("embed.W_E", "blocks.0.hook_resid_pre"),
        ("blocks.0.ln1.w", "blocks.0.hook_attn_out"),
        ("blocks.0.attn.W_Q", "blocks.0.hook_attn_out"),
        ("blocks.1.attn.W_K", "blocks.1.hook_attn_out"),
        ("blocks.2.attn.W_O", "blocks.2.hook_attn_out"),
        ("blocks.1.mlp.W_gate", "blocks.1.hook_mlp_out"),
        ("blocks.2.ln2.w", "blocks.2.hook_mlp_out"),
        ("blocks.2.mlp.b_out", "blocks.2.hook_mlp_out"),
        ("ln_final.w", "unembed.hook_in"),
        ("unembed.W_U", "unembed.hook_out"),
    ],
)
def test_one_wrong_number_fails_first_where_it_is_read(
    name: str, first: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda model: model.get_parameter(name).select(-1, 3).add_(0.1))
    certificate = quick(checkpoint("llama"))
    assert not certificate.passed
    assert failures(certificate)[0].site == first
    before = certificate.comparisons[: certificate.comparisons.index(failures(certificate)[0])]
    assert all(comparison.relative < 1e-6 for comparison in before)
    assert {comparison.check for comparison in failures(certificate)} >= {"activations", "cached decoding"}


@pytest.mark.parametrize(
    ("row_id", "changes", "first"),
    [
        ("gpt2", {"layer_norm_epsilon": 1e-3}, "blocks.0.hook_attn_out"),
        ("gpt2", {"activation_function": "gelu"}, "blocks.0.hook_mlp_out"),
        ("gpt2", {"scale_attn_weights": False}, "blocks.0.hook_attn_out"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "blocks.1.hook_attn_out"),
        ("llama", {"rms_norm_eps": 1e-4}, "blocks.0.hook_attn_out"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 9000.0}}, "blocks.0.hook_attn_out"),
        ("llama", {"hidden_act": "gelu"}, "blocks.0.hook_mlp_out"),
        ("mixtral", {"num_experts_per_tok": 1}, "blocks.0.hook_mlp_out"),
        ("mixtral", {"sliding_window": 4}, "blocks.0.hook_attn_out"),
        ("gpt-neox", {"use_parallel_residual": False}, "blocks.0.hook_mlp_out"),
    ],
)
def test_a_config_field_that_is_read_wrongly_fails_first_where_it_acts(
    row_id: str,
    changes: dict[str, Any],
    first: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = shutil.copytree(checkpoint(row_id), tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, **changes}))
    replace_ours(monkeypatch, lambda folder, **kwargs: unprocessed(wrong, **kwargs))
    certificate = quick(checkpoint(row_id))
    assert not certificate.passed
    assert failures(certificate)[0].site == first


class Doubled(torch.autograd.Function):
    """The identity, with twice the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


def wrong_in(check: str) -> Callable[[HookedTransformer], None]:
    """A change to a model that nothing but one check can see."""

    def change(model: Any) -> None:
        right = model.forward

        def forward(given: Any, **kwargs: Any) -> Any:
            if check == "gradients" and kwargs.get("start_at_layer") is not None:
                given = Doubled.apply(given)
            logits = right(given, **kwargs)
            cache, mask = kwargs.get("past_kv_cache"), kwargs.get("attention_mask")
            wrong = (check == "cached decoding" and cache is not None) or (check == "left padding" and mask is not None)
            return logits + 0.1 if wrong else logits

        model.forward = forward

    return change


@pytest.mark.parametrize("check", CHECKS[1:])
def test_each_check_fails_alone_when_it_alone_is_wrong(
    check: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, wrong_in(check))
    certificate = quick(checkpoint("llama"))
    assert {comparison.check for comparison in failures(certificate)} == {check}
    assert not certificate.passed


def test_what_is_not_a_number_fails_and_is_the_worst(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda model: model.get_parameter("blocks.1.mlp.W_out").fill_(torch.nan))
    certificate = quick(checkpoint("llama"))
    assert failures(certificate)[0].site == "blocks.1.hook_mlp_out"
    worst = certificate.worst()
    assert worst is not None
    assert worst.relative != worst.relative


def test_an_error_of_ours_in_float64_is_an_error(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(model: HookedTransformer) -> None:
        if model.cfg.dtype is torch.float64:
            model.unembed.float()

    spoil(monkeypatch, change)
    with pytest.raises(RuntimeError, match=r"dtype|Double"):
        verify(checkpoint("llama"), positions=12)


def test_a_reference_that_does_not_run_in_float64_is_not_compared_in_it(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = transformers.GPT2LMHeadModel.forward

    def single_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.dtype is torch.float64:
            raise RuntimeError("expected Float\nand a long story")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "forward", single_only)
    certificate = verify(checkpoint("gpt2"), positions=12)
    assert certificate.not_compared == {"float64": "the reference does not run in it: expected Float"}
    assert {comparison.precision for comparison in certificate.comparisons} == {"float32"}
    assert certificate.passed
    assert not certificate.exact_in_float64


def test_a_certificate_of_nothing_does_not_pass() -> None:
    empty = Certificate("it", "ItForCausalLM", "2", "5", (0, 0), (), {})
    assert not empty.passed
    assert not empty.exact_in_float64
    assert empty.worst() is None


# What it does not compare, and why


def test_what_is_not_compared_is_named_with_the_reason(checkpoint: Callable[[str], Path]) -> None:
    short = quick(checkpoint("gpt2"), positions=2)
    assert short.passed
    assert short.not_compared == {"left padding": "it takes two prompts of at least three tokens"}
    assert "left padding" in quick(checkpoint("gpt2"), batch=1).not_compared
    # Its reference is trusted with fused attention only, which gives no patterns.
    assert quick(checkpoint("falcon-alibi")).not_compared == {"patterns": "the reference does not give them"}
    # No module of its reference outputs what the MLP writes.
    assert list(quick(checkpoint("granite-moe-shared-tied")).not_compared) == ["blocks.*.hook_mlp_out"]


@pytest.mark.parametrize("row_id", ["gpt2", "llama", "mixtral", "llama-dynamic"])
@pytest.mark.parametrize("positions", [1, 3])
def test_the_shortest_prompts_pass(row_id: str, positions: int, checkpoint: Callable[[str], Path]) -> None:
    certificate = quick(checkpoint(row_id), positions=positions)
    assert certificate.passed, certificate
    assert certificate.tokens == (2, positions)


def test_prompts_are_64_tokens_or_as_long_as_the_context(checkpoint: Callable[[str], Path]) -> None:
    assert quick(checkpoint("gpt2"), positions=None).tokens == (2, 32)
    assert quick(checkpoint("gpt2"), positions=32).passed


@pytest.mark.parametrize("positions", [0, -1, 33])
def test_prompts_that_the_model_cannot_read_are_refused(positions: int, checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=rf"positions={positions} is not in 1-32"):
        quick(checkpoint("gpt2"), positions=positions)


def test_a_folder_of_our_own_format_has_no_reference(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    unprocessed(checkpoint("gpt2")).save_pretrained(tmp_path)
    for name in (tmp_path, "demo-induction-2l"):
        with pytest.raises(CheckpointError, match="saved by this library: there is no reference"):
            verify(name)


# What it leaves behind


def test_no_hook_stays_on_either_model_and_no_random_number_is_drawn(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[nn.Module] = []
    load_theirs = transformers.AutoModelForCausalLM.from_pretrained

    def keep_theirs(*args: Any, **kwargs: Any) -> Any:
        models.append(load_theirs(*args, **kwargs))
        return models[-1]

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", keep_theirs)
    spoil(monkeypatch, models.append)
    state = torch.get_rng_state()
    verify(checkpoint("mixtral"), positions=12)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(models) == 4
    for model in models:
        for name, module in model.named_modules():
            # transformers registers some of its own.
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            assert not any(hook.__module__.startswith("hooked_lm") for hook in hooks), name
        assert all(parameter.grad is None for parameter in model.parameters())


def test_the_files_of_a_checkpoint_stay_as_they_are(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("gpt2")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    quick(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_same_seed_gives_the_same_certificate_and_another_seed_another(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("gpt2")
    assert quick(folder, seed=1) == quick(folder, seed=1)
    assert quick(folder, seed=1) != quick(folder, seed=2)


# How it reads


def test_the_report_goes_through_json(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    certificate = quick(checkpoint("gpt2"), positions=2)
    certificate.save(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert (written.pop("passed"), written.pop("exact_in_float64")) == (True, False)
    comparisons = tuple(Comparison(**comparison) for comparison in written.pop("comparisons"))
    again = Certificate(**{**written, "comparisons": comparisons, "tokens": tuple(written["tokens"])})
    assert again == certificate


def test_the_text_names_what_was_compared_what_failed_and_what_was_not_compared(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda model: model.get_parameter("blocks.1.mlp.W_out").select(-1, 3).add_(0.1))
    certificate = quick(checkpoint("gpt2"), positions=2)
    first, *lines, last = str(certificate).splitlines()
    assert first == f"{checkpoint('gpt2')} (GPT2LMHeadModel), 2 prompts of 2 tokens"
    assert last == "certificate: FAILED"
    failed = [line.split()[1] for line in lines if "FAILED: above 1e-05" in line]
    assert failed == [comparison.site for comparison in failures(certificate) if comparison.check == "activations"] + [
        "decoding"
    ]
    assert failed[0] == "blocks.1.hook_mlp_out"
    assert "not compared: left padding (it takes two prompts of at least three tokens)" in lines
    monkeypatch.undo()
    assert str(quick(checkpoint("gpt2"))).splitlines()[-1] == "certificate: passed"


# The command


def test_the_command_exits_with_0_when_they_agree(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    report = tmp_path / "deep" / "report.json"
    run = runner.invoke(app, ["verify", str(checkpoint("gpt2")), "--positions", "9", "--json", str(report)])
    assert run.exit_code == 0, run.output
    assert "certificate: passed" in run.output
    written = json.loads(report.read_text())
    assert written["passed"] is True
    assert written["exact_in_float64"] is True
    assert written["tokens"] == [2, 9]


def test_the_command_exits_with_1_when_they_differ_and_still_writes_the_report(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda model: model.get_parameter("blocks.1.mlp.W_out").select(-1, 3).add_(0.1))
    arguments = ["verify", str(checkpoint("gpt2")), "--positions", "9", "--no-float64"]
    run = runner.invoke(app, [*arguments, "--json", str(tmp_path / "report.json")])
    assert run.exit_code == 1
    assert "certificate: FAILED" in run.output
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["passed"] is False
    assert {comparison["precision"] for comparison in written["comparisons"]} == {"float32"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder, good: ["/no/such/folder"], "no checkpoint '/no/such/folder'"),
        (lambda folder, good: [str(folder)], "has no config.json"),
        (lambda folder, good: [str(good), "--positions", "33"], "positions=33 is not in 1-32"),
        (lambda folder, good: [str(good), "--revision", "v2"], "no revision 'v2'"),
        (lambda folder, good: ["demo-induction-2l"], "saved by this library"),
        (lambda folder, good: [str(good), "--positions", "0"], "positions"),
    ],
)
def test_the_command_exits_with_2_when_there_is_nothing_to_compare(
    make: Callable[[Path, Path], list[str]], message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    run = runner.invoke(app, ["verify", *make(tmp_path, checkpoint("gpt2")), "--json", str(report)])
    assert run.exit_code == 2
    assert message in " ".join((run.stdout + run.stderr).split())
    assert not report.exists()


def test_the_command_exits_with_2_when_transformers_does_not_load_the_checkpoint(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError("not today")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    run = runner.invoke(app, ["verify", str(checkpoint("gpt2"))])
    assert run.exit_code == 2
    assert "transformers does not load" in run.stderr
    assert "not today" in run.stderr
