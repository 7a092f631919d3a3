"""Attention and MLP with one norm between them in the checkpoint, and two here that training has moved apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hooked_lm import HookedTransformer
from tests.export_helpers import moved, reference, tensors_in, tokens
from tests.loading_helpers import row_model, unprocessed

# With biases and without, LayerNorms and RMS norms, plain and gated MLPs, experts alone and with shared ones.
ROWS = [
    *("gptj", "phi", "falcon-one-norm-biases", "cohere", "cohere-qk-norm-biases-untied", "cohere2", "cohere2-moe"),
    *("cohere2-moe-dense-first-rms-sum-biases-untied", "cohere2-moe-dense-by-pattern-none-shared-tied"),
]


def loaded(row_id: str, folder: Path) -> HookedTransformer:
    row_model(row_id).save_pretrained(folder / "theirs")
    return unprocessed(folder / "theirs")


def assert_written(model: HookedTransformer, folder: Path) -> None:
    """The checkpoint computes what the model does, here and in transformers."""
    expected = model(tokens())
    torch.testing.assert_close(reference(folder)(tokens()).logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(unprocessed(folder)(tokens()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("row_id", ROWS)
@torch.no_grad()
def test_gains_that_have_come_to_differ_are_folded_into_what_reads_them(row_id: str, tmp_path: Path) -> None:
    model = loaded(row_id, tmp_path)
    before = model(tokens())
    moved(model, "ln1.w", "ln2.w")
    assert (model(tokens()) - before).abs().max() > 0.01
    model.to_huggingface(tmp_path / "ours")
    assert_written(model, tmp_path / "ours")


@pytest.mark.parametrize("row_id", ["gptj", "cohere", "cohere2-moe"])
@torch.no_grad()
def test_a_gain_of_zero_is_folded_too(row_id: str, tmp_path: Path) -> None:
    model = moved(loaded(row_id, tmp_path), "ln1.w", "ln2.w")
    for norm in (model.blocks[0].ln1, model.blocks[1].ln2):
        norm.w[2:5] = 0.0
    model.blocks[0].ln2.w[4:6] = 0.0  # in one place both
    if row_id == "gptj":  # its queries have no bias that could make up for a bias without a gain
        model.blocks[0].ln1.b[2:5] = 0.0
    model.to_huggingface(tmp_path / "ours")
    assert_written(model, tmp_path / "ours")


@pytest.mark.parametrize("row_id", ["gptj", "phi", "falcon-one-norm-biases"])
@torch.no_grad()
def test_biases_that_have_come_to_differ_go_into_the_biases_of_the_mlp(row_id: str, tmp_path: Path) -> None:
    model = moved(loaded(row_id, tmp_path), "ln1.w", "ln2.w", "ln1.b", "ln2.b")
    model.to_huggingface(tmp_path / "ours")
    assert_written(model, tmp_path / "ours")


@pytest.mark.parametrize("row_id", ["falcon", "stablelm-parallel-qk-norm-tied"])
@torch.no_grad()
def test_a_bias_that_the_mlp_cannot_make_up_for_is_left_out_and_named(row_id: str, tmp_path: Path) -> None:
    model = moved(loaded(row_id, tmp_path), "ln1.w", "ln2.w", "ln2.b")
    lost = (
        r"no place for blocks\.0\.ln2\.b \(by up to .* from what blocks\.0\.ln1 and blocks\.0\.ln2 share\), .*left out"
    )
    with pytest.warns(UserWarning, match=lost):
        model.to_huggingface(tmp_path / "ours")
    for block in model.blocks:
        block.ln2.b.copy_(block.ln1.b * block.ln2.w / block.ln1.w)
    assert_written(model, tmp_path / "ours")


@torch.no_grad()
def test_biases_that_these_norms_lack_are_left_out_and_named_as_they_moved(tmp_path: Path) -> None:
    model = moved(loaded("cohere", tmp_path), "ln1.w", "ln2.w")
    model.blocks[1].ln1.b[0], model.blocks[1].ln2.b[0] = 0.5, 0.25
    lost = r"no place for blocks\.1\.ln1\.b \(by up to 0\.5 from 0\), blocks\.1\.ln2\.b \(by up to 0\.25 from 0\), "
    with pytest.warns(UserWarning, match=lost):
        model.to_huggingface(tmp_path / "ours")
    for norm in (model.blocks[1].ln1, model.blocks[1].ln2):
        norm.b.zero_()
    assert_written(model, tmp_path / "ours")


def test_two_norms_that_are_one_there_may_change_together(tmp_path: Path) -> None:
    model = loaded("gptj", tmp_path)
    with torch.no_grad():
        for name in ("ln1", "ln2"):
            model.get_parameter(f"blocks.1.{name}.w").mul_(2.0)
    model.to_huggingface(tmp_path / "ours")
    written, read = tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs")
    changed = [name for name in read if not torch.equal(read[name], written[name])]
    assert changed == ["transformer.h.1.ln_1.weight"]
    assert torch.equal(written[changed[0]], 2.0 * read[changed[0]])
