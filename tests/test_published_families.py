"""Families as they are published: fields that transformers does not have, and what is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hooked_lm import CheckpointError, HookedTransformer, verify
from tests.family_rows import ROWS, Row
from tests.family_rows.published import PublishedRow
from tests.loading_helpers import edit_json, unprocessed
from tests.test_families import assert_close
from weight_conversion.checkpoint import read_family
from weight_conversion.registry import family_of

ROW = {row.id: row for row in ROWS}

# Fields of published files that the config classes of transformers do not have, or have under another name.
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "granite4": {
        "layer_types": ["attention"] * 3,
        "init_method": "mup",
        "normalization_function": "rmsnorm",
        "rope_parameters": ...,
        "rope_theta": 100.0,
        "rope_scaling": None,
    },
    "hunyuan-moe": {
        "attention_head_dim": 8,
        "cla_share_factor": 2,
        "class_num": 0,
        "dense_list": [4096, 0],
        "mlp_bias": False,
        "moe_topk": [2, 2, 2],
        "norm_type": "rms",
        "use_cla": False,
        "use_qk_norm": True,
        "use_rotary_pos_emb": True,
    },
    "gpt-neox-japanese": {"rope_parameters": ..., "rotary_emb_base": 100, "rotary_pct": 0.5},
}


def checkpoint(row: Row, folder: Path, **changes: Any) -> Any:
    """Write a row's checkpoint, its config changed -> the reference."""
    theirs = row.build()
    row.save(theirs, folder)
    edit_json(folder / "config.json", **changes)
    return theirs


@pytest.mark.parametrize("row_id", AS_PUBLISHED)
@torch.no_grad()
def test_a_published_config_is_read(row_id: str, tmp_path: Path) -> None:
    row = ROW[row_id]
    theirs = checkpoint(row, tmp_path, **AS_PUBLISHED[row_id])
    assert_close(unprocessed(tmp_path)(row.tokens()), theirs(row.tokens()).logits)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Mamba layers": (
        "granite4",
        {"layer_types": ["mamba", "mamba", "attention"]},
        "Granite 4 with 1 layers of attention among 3 is not supported: its other layers are Mamba layers",
    ),
    "two rotary bases of DBRX": (
        "dbrx",
        {"rope_parameters": ...},
        r'two rotary bases.*rope_theta=100\.0.*rotates with 10000\.0.*Give config\.json "rope_parameters"',
    ),
    "another norm of the experts' weights": (
        "dbrx",
        {"ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 5, "moe_normalize_expert_weights": 2.0}},
        r"moe_normalize_expert_weights=2\.0 is not supported",
    ),
    "two bases in global layers": (
        "granite-swa-two-bases-biases-untied",
        {"layer_rope_theta": [1000.0, 10.0, 10.0, 500.0]},
        r"layer_rope_theta=\[1000\.0, 10\.0, 10\.0, 500\.0\] is not supported: the layers of one kind",
    ),
    "two bases that are scaled": (
        "granite-swa-one-base-linear-tied",
        {"layer_rope_theta": [1000.0, 10.0, 10.0, 10.0]},
        "with a rope_type other than 'default' all layers have",
    ),
    "other experts in other layers": (
        "hunyuan-moe",
        {"moe_topk": [2, 1, 2]},
        r"Hunyuan-MoE with moe_topk=\[2, 1, 2\] is not supported: it is the same in all layers",
    ),
    "sigmoids": ("cohere2-moe", {"expert_selection_fn": "sigmoid"}, "expert_selection_fn='softmax' only"),
    "an activation of Aria's shared expert alone": ("aria-text", {"hidden_act": "gelu"}, "hidden_act='gelu' is not"),
    "a Baichuan of neither generation": (
        "baichuan-alibi",
        {"vocab_size": 64001},
        "vocab_size=64001 is not supported: 64000 is Baichuan 1 and 125696 Baichuan 2, whose unembedding is normalised",
    ),
    "a Baichuan without a length": (
        "baichuan-first",
        {"max_position_embeddings": ...},
        "neither max_position_embeddings, as the models with rotary positions, nor model_max_length",
    ),
    "tied, normalised unembeddings": ("baichuan2", {"tie_word_embeddings": True}, "tie_word_embeddings=True is not"),
    "a width of heads of its own": ("exaone3", {"head_dim": 8}, "head_dim=8 is not supported; only 6 is"),
    # What transformers checks in other configs.
    "a scaling without its factor": (
        "internlm2-biases-dynamic-tied",
        {"rope_scaling": {"type": "dynamic"}},
        "the InternLM2 config cannot be used: it lacks 'factor'",
    ),
    "no heads": ("internlm2", {"num_attention_heads": 0}, "the InternLM2 config cannot be used: .*zero"),
    "a scaling that is a name": ("exaone3", {"rope_scaling": "llama3"}, "the EXAONE 3 config cannot be used"),
    "a size that is text": ("exaone3", {"hidden_size": "24"}, "the EXAONE 3 config cannot be used"),
    "as many rotary frequencies as another width has": (
        "deepseek-v3",
        {"head_dim": 3},
        "DeepSeek-V3 with head_dim=3 is not supported; only 4 is",
    ),
    "experts from none of the groups": (
        "glm4-moe-biases-one-group-tied",
        {"topk_group": 0},
        "with n_group=1 and topk_group=0: both are 1 at least",
    ),
    "no shared expert in Aria": ("aria-text", {"moe_num_shared_experts": 0}, "moe_num_shared_experts=0 is not supp"),
    "a field that is left out and has no default": (
        "internlm2",
        {"hidden_size": ...},
        "the InternLM2 config lacks 'hidden_size'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_numbers_is_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    row_id, changes, reason = REFUSED[name]
    checkpoint(ROW[row_id], tmp_path, **changes)
    with pytest.raises(CheckpointError, match=reason):
        unprocessed(tmp_path)


# Code that comes with a checkpoint

PUBLISHED = [row for row in ROWS if isinstance(row, PublishedRow)]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.id)
def test_no_code_of_the_checkpoint_runs_and_none_has_to(row: PublishedRow, tmp_path: Path) -> None:
    checkpoint(row, tmp_path)
    mark = tmp_path / "it ran"
    modules = json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoConfig"].split(".")[0]
    (tmp_path / f"{modules}.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    for trusted in (False, True):
        HookedTransformer.from_pretrained(tmp_path, trust_remote_code=trusted)
    assert not mark.exists()


def test_defaults_fill_in_what_a_config_leaves_out(tmp_path: Path) -> None:
    whole = ROW["exaone3-tied"]
    theirs = checkpoint(whole, tmp_path, activation_function=..., layer_norm_epsilon=..., tie_word_embeddings=...)
    ours = unprocessed(tmp_path)
    with torch.no_grad():
        assert_close(ours(whole.tokens()), theirs(whole.tokens()).logits)


def test_a_certificate_needs_a_reference_where_transformers_has_none(tmp_path: Path) -> None:
    row = ROW["internlm2"]
    checkpoint(row, tmp_path)
    with pytest.raises(CheckpointError, match="transformers does not load"):
        verify(tmp_path)
    assert verify(tmp_path, reference=row.reference(tmp_path), float64=False).passed
    other = verify(tmp_path, reference=row.build(seed=1), float64=False)
    assert not other.passed


def test_a_given_reference_stays_as_it_was(tmp_path: Path) -> None:
    row = ROW["exaone3"]
    checkpoint(row, tmp_path)
    given = row.reference(tmp_path)
    assert given is not None
    verify(tmp_path, reference=given, positions=4)
    assert {parameter.dtype for parameter in given.parameters()} == {torch.float32}


def test_an_unembedding_whose_columns_are_not_unit_vectors_has_no_way_back(tmp_path: Path) -> None:
    row = ROW["baichuan2"]
    checkpoint(row, tmp_path)
    ours = unprocessed(tmp_path)
    torch.testing.assert_close(ours.unembed.W_U.norm(dim=0), torch.ones(ours.cfg.d_vocab_out))
    stored = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    assert (stored.norm(dim=1) - 1).abs().max() > 0.4
    with torch.no_grad():
        ours.unembed.W_U[:, 0] *= 2
    with pytest.raises(CheckpointError, match="columns whose length is not 1"):
        ours.to_huggingface(tmp_path / "out")


def test_a_misshapen_unembedding_of_baichuan_2_is_named(tmp_path: Path) -> None:
    checkpoint(ROW["baichuan2"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"][:-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \(125695, 24\)"):
        unprocessed(tmp_path)


@pytest.mark.parametrize(
    ("row_id", "name"),
    [
        ("gemma2", "attn_logit_softcapping"),
        ("gemma2", "final_logit_softcapping"),
        ("nanochat", "final_logit_softcapping"),
    ],
)
def test_a_soft_cap_of_zero_by_which_transformers_divides_is_refused(row_id: str, name: str) -> None:
    row = next(row for row in ROWS if row.id == row_id)
    fields = {**row.build().config.to_dict(), "architectures": [row.architecture], name: 0.0}
    with pytest.raises(CheckpointError, match=rf"{name}=0\.0: a soft-cap is positive"):
        read_family(family_of(row.architecture), fields, row.architecture)
