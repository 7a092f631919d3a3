"""What the tests share: tiny models with every parameter random, a tiny tokenizer, tiny HuggingFace checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hooked_lm import HookedTransformer, HookedTransformerConfig

VOCAB = 300
CORPUS = [
    "When John and Mary went to the store, John gave a drink to Mary.",
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Induction heads complete patterns: A B ... A B, again and again.",
]


def randomise_(model: nn.Module, seed: int = 0, std: float = 0.25) -> nn.Module:
    """Draw every parameter anew, biases and gains too: zero biases and unit gains hide swapped maps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, std, generator=generator)
            if name.endswith((".w", "ln_1.weight", "ln_2.weight", "ln_f.weight")):
                parameter.add_(1.0)
    return model


def tiny_config(**changes: Any) -> HookedTransformerConfig:
    """A model small enough to differentiate numerically: 2 layers, 3 heads, d_model 12, vocabulary 20."""
    fields: dict[str, Any] = {
        "n_layers": 2,
        "d_model": 12,
        "n_heads": 3,
        "n_ctx": 16,
        "d_vocab": 20,
        "act_fn": "gelu_new",
        "dtype": torch.float64,
        "seed": 0,
    }
    return HookedTransformerConfig(**{**fields, **changes})


def tiny_model(**changes: Any) -> HookedTransformer:
    """A tiny model with every parameter random, in float64 unless told otherwise."""
    return randomise_(HookedTransformer(tiny_config(**changes)))  # type: ignore[return-value]


def tiny_tokens(batch: int = 2, pos: int = 7, vocab: int = 20, seed: int = 0) -> torch.Tensor:
    """Random tokens [batch pos]."""
    return torch.randint(0, vocab, (batch, pos), generator=torch.Generator().manual_seed(seed))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, of three sentences; `<|endoftext|>` is BOS and EOS, and there is no padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token=None
    )


def tiny_gpt2(**changes: Any) -> GPT2LMHeadModel:
    """A tiny GPT-2 of transformers' with every parameter random, in eval mode."""
    fields: dict[str, Any] = {
        "n_layer": 3,
        "n_embd": 24,
        "n_head": 4,
        "n_positions": 32,
        "vocab_size": VOCAB,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return randomise_(GPT2LMHeadModel(GPT2Config(**{**fields, **changes})).eval())  # type: ignore[return-value]


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest tensor made under it has memory for."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, torch.Tensor):
                self.numbers = max(self.numbers, one.untyped_storage().nbytes() // one.element_size())
        return out


def counted(monkeypatch: pytest.MonkeyPatch, owner: type, method: str) -> list[tuple[Any, ...]]:
    """The arguments of every call of a method from now on."""
    calls: list[tuple[Any, ...]] = []
    original = getattr(owner, method)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    counting.keeps_stages = True  # type: ignore[attr-defined]
    monkeypatch.setattr(owner, method, counting)
    return calls


def luminance(colour: str) -> float:
    """The relative luminance of a colour `#rrggbb`, from 0 for black to 1 for white."""
    shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))
