"""GGUF files: read through transformers, dequantised, with their own tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from hooked_lm import CheckpointError, HookedTransformer, verify
from tests.helpers import VOCAB, tiny_gpt2, tiny_tokenizer, tiny_tokens
from tests.loading_helpers import unprocessed
from weight_conversion import in_transformers

TOKENS = tiny_tokens(vocab=VOCAB)
WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2


def write_gguf(path: Path) -> None:
    """Write a tiny random Llama whose matrices are in blocks of 8-bit integers."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    bpe = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = random.normal(0, 0.25, shape).astype(np.float32) + (1.0 if len(shape) == 1 else 0.0)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", VOCAB, WIDTH)
    add("output_norm.weight", WIDTH)
    add("output.weight", VOCAB, WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        narrow = WIDTH // HEADS * KV_HEADS
        add(f"{block}.attn_norm.weight", WIDTH)
        add(f"{block}.ffn_norm.weight", WIDTH)
        for name, rows in (("attn_q", WIDTH), ("attn_k", narrow), ("attn_v", narrow), ("attn_output", WIDTH)):
            add(f"{block}.{name}.weight", rows, WIDTH)
        add(f"{block}.ffn_gate.weight", HIDDEN, WIDTH)
        add(f"{block}.ffn_up.weight", HIDDEN, WIDTH)
        add(f"{block}.ffn_down.weight", WIDTH, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    write_gguf(path)
    return path


@torch.no_grad()
def test_a_gguf_file_has_the_logits_of_transformers(gguf_file: Path) -> None:
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).eval()
    for place in (gguf_file, str(gguf_file), gguf_file.parent):
        ours = unprocessed(place)
        assert ours.cfg.dtype is torch.float32
        assert (ours(TOKENS) - theirs(TOKENS).logits).abs().max() < 1e-4
    assert unprocessed(gguf_file).cfg.n_key_value_heads == KV_HEADS


def test_a_gguf_file_brings_its_tokenizer(gguf_file: Path) -> None:
    text = "The capital of France is Paris"
    assert unprocessed(gguf_file).to_tokens(text, prepend_bos=False).tolist() == [tiny_tokenizer().encode(text)]


def test_a_gguf_file_is_certified(gguf_file: Path) -> None:
    certificate = verify(gguf_file, positions=12)
    assert certificate.passed, certificate


@torch.no_grad()
def test_a_model_of_a_gguf_file_goes_to_huggingface_as_plain_weights(gguf_file: Path, tmp_path: Path) -> None:
    ours = unprocessed(gguf_file)
    ours.to_huggingface(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (ours(TOKENS) - theirs(TOKENS).logits).abs().max() < 1e-4


def test_of_several_files_in_a_folder_one_has_to_be_named(tmp_path: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"2 GGUF files: one\.gguf, two\.gguf\. Give the path of one"):
        HookedTransformer.from_pretrained(tmp_path)


def test_a_folder_with_weights_of_its_own_is_read_as_it_is(tmp_path: Path) -> None:
    theirs = tiny_gpt2()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"")
    assert unprocessed(tmp_path).cfg.n_layers == 3


def test_without_the_packages_the_error_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_transformers, "find_spec", lambda name: None)
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is a GGUF file.*gguf and accelerate: pip install 'hooked-lm\[gguf\]'"):
        HookedTransformer.from_pretrained(tmp_path / "model.gguf")


def test_a_damaged_file_raises_a_checkpoint_error(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    (tmp_path / "model.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(CheckpointError, match=r"transformers does not load .*model\.gguf"):
        HookedTransformer.from_pretrained(tmp_path / "model.gguf")
