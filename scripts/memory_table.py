"""Write the page on the memory of large models: `python -m scripts.memory_table`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hooked_lm import HookedTransformerConfig
from hooked_lm.cli.memory import MemoryUse, memory_use, readable_bytes

__all__ = ["CONFIGS", "LENGTH", "PAGE", "memory_page"]

PAGE = Path(__file__).parents[1] / "docs" / "howto" / "large_models.md"
LENGTH = 1024

_LLAMA: dict[str, Any] = {
    "n_ctx": 2048,
    "positional_embedding_type": "rotary",
    "rotary_dim": 128,
    "d_head": 128,
    "n_key_value_heads": 8,
    "gated_mlp": True,
    "act_fn": "silu",
    "normalization_type": "RMS",
}
# Sizes as published with each checkpoint.
CONFIGS: dict[str, HookedTransformerConfig] = {
    "GPT-2": HookedTransformerConfig(
        n_layers=12,
        d_model=768,
        n_heads=12,
        d_mlp=3072,
        d_vocab=50257,
        n_ctx=1024,
        act_fn="gelu_new",
        tie_word_embeddings=True,
    ),
    "Llama 3.1 8B": HookedTransformerConfig(
        n_layers=32, d_model=4096, n_heads=32, d_mlp=14336, d_vocab=128256, **_LLAMA
    ),
    "Mixtral 8x7B": HookedTransformerConfig(
        n_layers=32,
        d_model=4096,
        n_heads=32,
        d_mlp=14336,
        d_vocab=32000,
        num_experts=8,
        experts_per_token=2,
        **_LLAMA,
    ),
    "Llama 3.1 70B": HookedTransformerConfig(
        n_layers=80, d_model=8192, n_heads=64, d_mlp=28672, d_vocab=128256, **_LLAMA
    ),
}

_TEXT = """\
# Plan the memory of a large model

`hooked-lm info MODEL --memory` prints how much memory a model needs in each precision. The table has some published
models. Keys and values are those of one token in the key-value cache; the activation cache is that of
`run_with_cache` without `names_filter`, for one prompt of {length:,} tokens. Both are in bfloat16.

| model | weights, float32 | weights, bfloat16 | keys and values per token | activation cache |
|---|---:|---:|---:|---:|
{rows}

Attention scores and patterns grow with the square of the prompt's length, all other activations with the length. Name
the activations that an experiment needs in `names_filter`: they take a small part of a whole cache.
[Save memory](memory.md) has the other ways.

## 70 billion parameters on eight devices of 80 GB

Llama 3.1 70B has {parameters:.2f} billion parameters, with the biases that its checkpoint lacks and the model holds as
zeros. In bfloat16 they take {weights:.0f} GB, {share:.1f} GB for each of eight devices if the layers are divided
equally. Keys and values take {cache:.0f} KiB a token, {cache_share:.0f} KiB on each device.
"""


def memory_page() -> str:
    """Return the page, with every number computed from the configs."""
    halves = {name: memory_use(cfg, torch.bfloat16, LENGTH) for name, cfg in CONFIGS.items()}
    largest = halves["Llama 3.1 70B"]
    return _TEXT.format(
        length=LENGTH,
        rows="\n".join(_row(name, half) for name, half in halves.items()),
        parameters=largest.weights / 2e9,
        weights=largest.weights / 1e9,
        share=largest.weights / 8e9,
        cache=largest.cache_per_token / 1024,
        cache_share=largest.cache_per_token / 8192,
    )


def _row(name: str, half: MemoryUse) -> str:
    sizes = (2 * half.weights, half.weights, half.cache_per_token, half.activations)
    return f"| {name} | " + " | ".join(map(readable_bytes, sizes)) + " |"


if __name__ == "__main__":
    PAGE.write_text(memory_page())
