"""Tiny random multimodal models of transformers, one for each kind whose text part is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf

from tests.helpers import VOCAB, randomise_

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
# Rotary positions over time, height and width, as Qwen's have them.
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 1]}}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "out_hidden_size": 24, "num_heads": 2, "patch_size": 4}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}


def text(kind: str | None = None, **changes: Any) -> dict[str, Any]:
    return {**TEXT, **({} if kind is None else {"model_type": kind}), **changes}


def vision(kind: str | None = None, **changes: Any) -> dict[str, Any]:
    return {**VISION, **({} if kind is None else {"model_type": kind}), **changes}


CONFIGS: dict[str, Callable[[], Any]] = {
    "AyaVisionForConditionalGeneration": lambda: hf.AyaVisionConfig(
        text_config=text("cohere2", **WINDOWS), vision_config=vision("siglip_vision_model")
    ),
    "Gemma3ForConditionalGeneration": lambda: hf.Gemma3Config(
        text_config=text(**WINDOWS), vision_config=vision(), mm_tokens_per_image=4
    ),
    "Idefics3ForConditionalGeneration": lambda: hf.Idefics3Config(
        text_config=text("llama"), vision_config=vision(), scale_factor=1
    ),
    "InternVLForConditionalGeneration": lambda: hf.InternVLConfig(
        text_config=text("qwen2"), vision_config=vision(image_size=[16, 16], patch_size=[8, 8])
    ),
    "LlavaForConditionalGeneration": lambda: hf.LlavaConfig(
        text_config=text("llama"), vision_config=vision("clip_vision_model")
    ),
    "LlavaNextForConditionalGeneration": lambda: hf.LlavaNextConfig(
        text_config=text("mistral", sliding_window=4), vision_config=vision("clip_vision_model")
    ),
    "LlavaOnevisionForConditionalGeneration": lambda: hf.LlavaOnevisionConfig(
        text_config=text("qwen2"), vision_config=vision("siglip_vision_model")
    ),
    "Mistral3ForConditionalGeneration": lambda: hf.Mistral3Config(
        text_config=text("mistral"), vision_config=vision("pixtral", head_dim=8)
    ),
    "Qwen2VLForConditionalGeneration": lambda: hf.Qwen2VLConfig(
        text_config=text(**MROPE),
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 24, "num_heads": 2, "patch_size": 4},
    ),
    "Qwen2_5_VLForConditionalGeneration": lambda: hf.Qwen2_5_VLConfig(
        text_config=text(**MROPE), vision_config={**QWEN_VISION, "intermediate_size": 20}
    ),
    "Qwen3VLForConditionalGeneration": lambda: hf.Qwen3VLConfig(
        text_config=text(**MROPE),
        vision_config={**QWEN_VISION, "intermediate_size": 20, "deepstack_visual_indexes": [0]},
    ),
    "SmolVLMForConditionalGeneration": lambda: hf.SmolVLMConfig(
        text_config=text("llama"), vision_config=vision(), scale_factor=1
    ),
    "VipLlavaForConditionalGeneration": lambda: hf.VipLlavaConfig(
        text_config=text("llama"), vision_config=vision("clip_vision_model"), vision_feature_layers=[-1]
    ),
}


def multimodal_model(architecture: str, **changes: Any) -> Any:
    """Return a tiny model with every parameter random, in eval mode; changes are to the whole config."""
    config = CONFIGS[architecture]()
    for name, value in changes.items():
        setattr(config, name, value)
    return randomise_(getattr(hf, architecture)(config).eval())
