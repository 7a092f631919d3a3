"""Quantised checkpoints: dequantised where transformers can, else one line that names the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooked_lm import CheckpointError, verify
from tests.loading_helpers import edit_json, row_model, row_tokens, unprocessed
from weight_conversion import in_transformers

BLOCK = 8
TOKENS = row_tokens("llama")


def fp8_folder(folder: Path) -> Any:
    """Save a Llama with matrices in float8 and one scale for each block; return the model it stands for."""
    model: Any = row_model("llama")
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    plain = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        low, scales, plain[name] = in_blocks(tensors[name])
        tensors |= {name: low, f"{name}_scale_inv": scales}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    edit_json(folder / "config.json", quantization_config=fp8)
    model.load_state_dict(plain, strict=False)
    return model


def in_blocks(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix in float8, its scales [row block, column block], and the numbers that the two stand for."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448
    low = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return low.reshape(rows, columns), scales, (low.float() * scales[:, None, :, None]).reshape(rows, columns)


@torch.no_grad()
def test_a_checkpoint_in_float8_is_dequantised_by_its_scales(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    expected = fp8_folder(tmp_path)(TOKENS).logits
    ours = unprocessed(tmp_path, dtype=torch.float32)
    assert (ours(TOKENS) - expected).abs().max() < 1e-4
    assert (row_model("llama")(TOKENS).logits - expected).abs().max() > 1e-2
    assert verify(tmp_path, positions=12).passed


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "a new one"])
def test_a_method_that_cannot_be_undone_is_named_in_one_line(method: str, tmp_path: Path) -> None:
    row_model("llama").save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(CheckpointError, match=rf"quantised \({method}\).*load the checkpoint that it was") as raised:
        unprocessed(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("quantization", "packages"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "accelerate and bitsandbytes"),
        ({"load_in_8bit": True}, "accelerate and bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "accelerate and compressed_tensors"),
        ({"quant_method": "fp8"}, "accelerate"),
    ],
)
def test_without_its_package_a_method_says_what_to_install(
    quantization: dict[str, Any], packages: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_transformers, "find_spec", lambda name: None)
    row_model("llama").save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config=quantization)
    with pytest.raises(CheckpointError, match=rf"quantised.*Reading it takes {packages}: pip install"):
        unprocessed(tmp_path)


def test_a_quantised_model_in_memory_is_refused_with_what_to_do(tokenizer: Any) -> None:
    model: Any = row_model("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    packed = torch.zeros(4, 1, dtype=torch.uint8)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(CheckpointError, match=r"hf_model is quantised \(bitsandbytes\).*hf_model\.dequantize\(\)"):
        unprocessed(hf_model=model, tokenizer=tokenizer)
