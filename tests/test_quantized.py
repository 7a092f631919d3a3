"""Quantised checkpoints: dequantised where transformers can, else one line that names the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hooked_lm import CheckpointError, verify
from tests.loading_helpers import edit_json, row_model, row_tokens, unprocessed
from weight_conversion import in_transformers, quantized

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


def llama_in(precision: torch.dtype) -> Any:
    """The row's Llama with its parameters rounded to a precision, which computes in float32."""
    model: Any = row_model("llama")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(precision).float()
    return model


def assert_plain(folder: Path, weights: dict[str, Tensor], precision: torch.dtype) -> None:
    """The folder's model has these weights, not those before it was quantised; `transformers` agrees."""
    before, expected = llama_in(precision), llama_in(precision)
    expected.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()}, strict=False)
    ours = unprocessed(folder, dtype=torch.float32)
    assert (ours(TOKENS) - expected(TOKENS).logits).abs().max() < 1e-4
    assert (before(TOKENS).logits - expected(TOKENS).logits).abs().max() > 1e-2
    assert unprocessed(folder).cfg.dtype is precision
    assert verify(folder, positions=12).passed


# How many bits, which scales, and in which format compressed-tensors writes that.
COMPRESSED: dict[str, tuple[dict[str, Any], str]] = {
    "int4-groups": ({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}, "pack-quantized"),
    "int8-channels": ({"num_bits": 8, "type": "int", "strategy": "channel"}, "int-quantized"),
    "int8-tensors": ({"num_bits": 8, "type": "int", "strategy": "tensor"}, "int-quantized"),
    "float8-channels": ({"num_bits": 8, "type": "float", "strategy": "channel"}, "float-quantized"),
}


def compressed_folder(folder: Path, arguments: dict[str, Any], file_format: str) -> dict[str, Tensor]:
    """Save a Llama as compressed-tensors quantises it; return what its matrices stand for, by module."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    model: Any = row_model("llama")
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**arguments), format=file_format
    )
    config = quantization.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], format=file_format)
    quantization.apply_quantization_config(model, config)
    stands_for = {}
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            weight, scale = module.weight.data.float(), module.weight_scale.data
            groups = weight.reshape(*(scale.shape if scale.ndim == 2 else (1, 1)), -1)
            if scale.ndim == 2 and scale.shape[1] == 1:
                groups = weight[:, None]
            largest = 448.0 if arguments["type"] == "float" else 2.0 ** (arguments["num_bits"] - 1) - 1
            scale.copy_((groups.abs().amax(-1) / largest).reshape(scale.shape))
            steps = groups / scale.float().reshape(*groups.shape[:2], 1)
            steps = steps.to(torch.float8_e4m3fn).float() if arguments["type"] == "float" else steps.round()
            stands_for[name] = (steps * scale.float().reshape(*groups.shape[:2], 1)).reshape(weight.shape)
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return stands_for


@pytest.mark.parametrize("kind", COMPRESSED)
@torch.no_grad()
def test_a_compressed_tensors_checkpoint_is_dequantised_by_its_scales(kind: str, tmp_path: Path) -> None:
    assert_plain(tmp_path, compressed_folder(tmp_path, *COMPRESSED[kind]), torch.float32)


BITS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4-nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def bitsandbytes_folder(folder: Path, bits: dict[str, Any], precision: torch.dtype) -> dict[str, Tensor]:
    """Save a Llama as bitsandbytes quantises it; return what its matrices stand for, by module."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    row_model("llama").to(precision).save_pretrained(folder / "plain")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=BitsAndBytesConfig(**bits), dtype=precision
    )
    model.save_pretrained(folder)
    stands_for = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            stands_for[name] = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            stands_for[name] = module.weight.data * module.weight.SCB[:, None] / 127
    return stands_for


# In bfloat16 the parts that were never quantised are in another precision than the one that is asked for.
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_a_bitsandbytes_checkpoint_is_dequantised(bits: str, precision: torch.dtype, tmp_path: Path) -> None:
    assert_plain(tmp_path, bitsandbytes_folder(tmp_path, BITS[bits], precision), precision)


class Half(torch.nn.Module):
    """A dequantised model, as transformers leaves it: in two precisions."""

    def __init__(self) -> None:
        super().__init__()
        self.quantised = torch.nn.Linear(2, 2)
        self.other = torch.nn.Linear(2, 2).to(torch.bfloat16)

    def dequantize(self) -> Half:
        return self


@pytest.mark.parametrize("method", ["bitsandbytes", "compressed-tensors", "fp8", "mxfp4"])
def test_what_was_never_quantised_gets_the_precision_that_is_asked_for(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def load(what: str, folder: Path, **options: Any) -> Half:
        asked.append(options)
        return Half()

    monkeypatch.setattr(quantized, "load_in_transformers", load)
    monkeypatch.setattr(in_transformers, "find_spec", lambda name: name)
    monkeypatch.setattr(quantized, "config_class", lambda name: dict)
    loaded = quantized.QuantizedFolder(tmp_path, method).load(torch.float32)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert asked[0]["dtype"] is torch.float32
    # bitsandbytes loads as it is; of the others, plain weights are asked for.
    assert asked[0].get("quantization_config") == (None if method == "bitsandbytes" else {"dequantize": True})
    unasked = quantized.QuantizedFolder(tmp_path, method).load(None)
    assert {parameter.dtype for parameter in unasked.parameters()} == {torch.float32, torch.bfloat16}
    assert asked[1]["dtype"] == "auto"


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
