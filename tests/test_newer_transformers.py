"""Models that transformers knows from 5.24 on; the tests are skipped where the installed version lacks their config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from hooked_lm import CheckpointError, verify
from tests.family_rows.newer import NEWER_ROWS
from tests.family_rows.published import ROWS as PUBLISHED
from tests.family_rows.row import Row
from tests.loading_helpers import unprocessed
from weight_conversion.registry import family_of

rows = pytest.mark.parametrize("row", NEWER_ROWS, ids=lambda row: row.id)


def require(row: Row) -> None:
    if not hasattr(transformers, row.config):
        pytest.skip(f"transformers {transformers.__version__} has no {row.config}")


@rows
@torch.no_grad()
def test_a_model_that_only_newer_versions_know_gives_the_same_numbers(row: Row, tmp_path: Path) -> None:
    require(row)
    theirs = row.build()
    theirs.save_pretrained(tmp_path / "theirs")
    certificate = verify(tmp_path / "theirs", positions=row.pos)
    assert certificate.passed, certificate
    ours, expected = unprocessed(tmp_path / "theirs"), theirs(row.tokens()).logits
    assert (ours(row.tokens()) - expected).abs().max() < 1e-4
    in_memory = unprocessed(hf_model=theirs, tokenizer=False)
    assert (in_memory(row.tokens()) - expected).abs().max() < 1e-4
    ours.blocks[1].mlp.W_out[..., ::2] += 1.0
    ours.to_huggingface(tmp_path / "ours")
    assert (row.load(tmp_path / "ours")(row.tokens()).logits - ours(row.tokens())).abs().max() < 1e-4
    assert (ours(row.tokens()) - expected).abs().max() > 1e-2


def test_what_newer_versions_name_is_read_as_the_family_or_left_out_with_a_reason() -> None:
    assert family_of("SarvamMLAForCausalLM").name == "DeepSeek-V3"
    assert family_of("SarvamMoEForCausalLM").name == "Sarvam MoE"
    assert family_of("Apertus1p5TextForCausalLM").name == "Apertus"
    for name in ("DoryForCausalLM", "Inkling2LoopForCausalLM", "LaraMiniForCausalLM"):
        with pytest.raises(CheckpointError, match=r"several times|recurrent"):
            family_of(name)


@torch.no_grad()
def test_an_exaone_in_the_words_of_newer_versions_is_the_published_one(tmp_path: Path) -> None:
    """Without that version: the config it writes, beside the published tensors."""
    row = next(row for row in PUBLISHED if row.id == "exaone3")
    row.save(row.build(), tmp_path)
    expected = unprocessed(tmp_path)(row.tokens())
    content = json.loads((tmp_path / "config.json").read_text())
    scaling = content.pop("rope_scaling")
    renamed = {
        "num_hidden_layers": content.pop("num_layers"),
        "rms_norm_eps": content.pop("layer_norm_epsilon"),
        "hidden_act": content.pop("activation_function"),
        "rope_parameters": {"rope_theta": content.pop("rope_theta"), **scaling},
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
    }
    del content["auto_map"], content["embed_dropout"]
    (tmp_path / "config.json").write_text(json.dumps({**content, **renamed}))
    assert torch.equal(unprocessed(tmp_path)(row.tokens()), expected)
    (tmp_path / "config.json").write_text(json.dumps({**content, **renamed, "rms_norm_eps": 0.1}))
    assert (unprocessed(tmp_path)(row.tokens()) - expected).abs().max() > 1e-2
