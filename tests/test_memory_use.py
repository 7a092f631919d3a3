"""Bytes computed from a config, against the bytes of a real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from hooked_lm import HookedTransformer
from hooked_lm.cli import app
from hooked_lm.cli.memory import MemoryUse, memory_report, memory_use
from hooked_lm.demo import MODEL
from hooked_lm.metrics import logit
from hooked_lm.patching.patches import PATCHES, patch_cells, patch_sites
from hooked_lm.sweep.engine import _Engine
from hooked_lm.sweep.plan import plan_cell
from scripts.memory_table import CONFIGS, PAGE, memory_page
from tests.helpers import tiny_config

TINY: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped queries, rotary, gated": {
        "n_heads": 4,
        "d_head": 4,
        "n_key_value_heads": 2,
        "positional_embedding_type": "rotary",
        "gated_mlp": True,
        "normalization_type": "RMS",
        "act_fn": "silu",
    },
    "attention only": {"attn_only": True},
    "parallel": {"parallel_attn_mlp": True},
    "experts": {"num_experts": 4, "experts_per_token": 2, "gated_mlp": True, "act_fn": "silu"},
    "tied": {"tie_word_embeddings": True},
    "flags": {"use_attn_result": True, "use_split_qkv_input": True, "use_hook_mlp_in": True},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", TINY)
def test_bytes_are_those_of_a_real_model(name: str, dtype: torch.dtype) -> None:
    cfg = tiny_config(**TINY[name], dtype=dtype)
    use, model = memory_use(cfg, dtype, length=7), HookedTransformer(cfg)
    assert use.weights == sum(one.nbytes for one in model.parameters())
    tokens = torch.arange(7)[None]
    stored = model.new_kv_cache()
    model(tokens, past_kv_cache=stored)
    assert 7 * use.cache_per_token == sum(e.past_keys.nbytes + e.past_values.nbytes for e in stored)
    _, cache = model.run_with_cache(tokens)
    assert use.activations == sum(one.nbytes for one in cache.values())


def test_a_length_outside_the_context_is_refused() -> None:
    for length in (0, 17):
        with pytest.raises(ValueError, match=f"1 to n_ctx=16 tokens; got length={length}"):
            memory_use(tiny_config(), torch.float32, length)


def test_the_whole_context_is_the_default_length() -> None:
    assert memory_use(tiny_config(), torch.float32) == memory_use(tiny_config(), torch.float32, 16)


# Parameters of the published checkpoints.
PUBLISHED = {
    "GPT-2": 124_439_808,
    "Llama 3.1 8B": 8_030_261_248,
    "Mixtral 8x7B": 46_702_792_704,
    "Llama 3.1 70B": 70_553_706_496,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_counted_without_memory(name: str) -> None:
    # Above them by the biases that checkpoints lack, which the model holds as zeros.
    above = memory_use(CONFIGS[name], torch.bfloat16).weights / 2 / PUBLISHED[name] - 1
    assert 0 <= above < 1e-3


def test_the_page_is_what_the_script_writes() -> None:
    assert memory_page() == PAGE.read_text()
    text = " ".join(PAGE.read_text().split())
    said = ("320 KiB a token", "40 KiB on each device", "17.6 GB for each", "0.12 s for it")
    assert all(one in text for one in said)


def test_sizes_are_written_in_binary_units() -> None:
    text = memory_report({"bfloat16": MemoryUse(3 * 2**30, 320 * 1024, 999, 77, 2048)})
    assert all(said in text for said in ("3 GiB", "320 KiB", "999 B", "77 B", "activations of 2,048 tokens"))


def test_info_shows_memory_by_precision_when_asked() -> None:
    shown = CliRunner().invoke(app, ["info", MODEL, "--memory", "--json", "-"])
    assert shown.exit_code == 0, shown.output
    memory = json.loads(shown.stdout)["memory"]
    assert memory["float64"]["weights"] == 2 * memory["float32"]["weights"] == 4 * memory["bfloat16"]["weights"]
    text = CliRunner().invoke(app, ["info", MODEL, "--memory"]).output
    assert "cache per token" in text
    assert "cache per token" not in CliRunner().invoke(app, ["info", MODEL]).output


@pytest.mark.parametrize("name", TINY)
def test_bytes_of_a_grid_are_those_that_a_sweep_keeps(name: str) -> None:
    cfg = tiny_config(**TINY[name], dtype=torch.float64)
    model, tokens = HookedTransformer(cfg), torch.arange(7)[None]
    grid = PATCHES["resid_pre"]
    sites = patch_sites(model, grid)
    clean = model.run_with_cache(tokens, names_filter=sites, return_cache_object=False)[1]
    cells, _ = patch_cells(model, grid, clean)
    planned = [plan_cell(index, (cell,), cfg, 7) for index, cell in enumerate(cells)]
    engine = _Engine(model, tokens, torch.ones_like(tokens), logit(1), (), 2**20)
    base, _ = engine.base_run(engine.base_names([one for one in planned if one]))
    kept = sum(one.nbytes for one in base.cache.values()) + sum(one.nbytes for one in clean.values())
    assert memory_use(cfg, torch.float64, 7).patching_grid == kept


def test_a_config_without_weights_is_enough(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=60, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "whole")
    for place, name in ((tmp_path / "config", "whole"), (tmp_path / "own", "ours")):
        place.mkdir()
        if name == "ours":
            HookedTransformer.from_pretrained_no_processing(tmp_path / "whole", tokenizer=False).save_pretrained(
                tmp_path / "ours"
            )
        (place / "config.json").write_text((tmp_path / name / "config.json").read_text())
        shown = CliRunner().invoke(app, ["info", str(place), "--memory", "--json", "-"])
        assert shown.exit_code == 0, shown.output
        whole = CliRunner().invoke(app, ["info", str(tmp_path / name), "--memory", "--json", "-"])
        found, expected = json.loads(shown.stdout), json.loads(whole.stdout)
        for key in ("memory", "n_layers", "n_parameters", "n_hook_points", "tied_embeddings", "positions"):
            assert found[key] == expected[key], key
