"""Small models in float64 whose weights are the same numbers in both libraries."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

VOCAB = 29

_SIZES: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 16,
    "n_heads": 4,
    "d_head": 4,
    "n_ctx": 12,
    "d_vocab": VOCAB,
    "dtype": torch.float64,
    "device": "cpu",
    "seed": 0,
}

GPT2_LIKE: dict[str, Any] = {**_SIZES, "d_mlp": 24, "act_fn": "gelu_new", "normalization_type": "LN"}

# Query groups, soft caps, a window, norms before and after: each within reach of prompts of ten tokens.
GEMMA_LIKE: dict[str, Any] = {
    **_SIZES,
    "d_mlp": 24,
    "act_fn": "gelu_pytorch_tanh",
    "gated_mlp": True,
    "n_key_value_heads": 2,
    "normalization_type": "RMS",
    "use_normalization_before_and_after": True,
    "positional_embedding_type": "rotary",
    "rotary_dim": 4,
    "attn_scores_soft_cap": 2.0,
    "output_logits_soft_cap": 3.0,
    "use_attn_scale": True,
    "use_local_attn": True,
    "window_size": 4,
    "attn_types": ["local", "global"],
    "final_rms": True,
}

BRACKET_CLASSIFIER: dict[str, Any] = {
    **_SIZES,
    # Where d_mlp is d_model, the classic library takes one for the other when it folds.
    "d_mlp": 20,
    "act_fn": "relu",
    "normalization_type": "LN",
    "attention_dir": "bidirectional",
    "d_vocab": 5,
    "d_vocab_out": 2,
    "use_attn_result": True,
    "use_hook_tokens": True,
}

ATTENTION_ONLY: dict[str, Any] = {**_SIZES, "attn_only": True, "act_fn": None, "normalization_type": "LN"}


def build(cfg: dict[str, Any], model_class: type[HookedTransformer] = HookedTransformer) -> HookedTransformer:
    """Return a model with every parameter drawn anew, by a generator that its name seeds."""
    model = model_class(HookedTransformerConfig(**cfg))
    gated = bool(cfg.get("gated_mlp"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.replace("._", ".").encode()))
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            # A gain is near one. Models with gated MLPs have no biases.
            around = 1.0 if name.endswith(".w") else 0.0
            scale = 0.0 if gated and name.split(".")[-1].lstrip("_").startswith("b_") else 0.3
            parameter.copy_(around + scale * drawn)
    return model


def tokens(batch: int, pos: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    """Return random tokens, [batch pos]."""
    return torch.randint(1, vocab, (batch, pos), generator=torch.Generator().manual_seed(seed))


def logit_difference(logits: Tensor) -> Tensor:
    """Return the mean of the last position's logit of token 3 less that of token 7, a scalar."""
    return (logits[:, -1, 3] - logits[:, -1, 7]).mean()
