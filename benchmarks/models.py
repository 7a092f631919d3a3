"""The models that are measured: of usual sizes, with random weights, written in every format that contestants read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hooked_lm import HookedTransformer

# Fields of a classic config, and of one with rotary positions and a gated MLP.
_SHARED = ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "n_ctx", "d_vocab", "act_fn", "eps")
_ROTARY = ("positional_embedding_type", "rotary_dim", "rotary_base", "rotary_adjacent_pairs", "gated_mlp")


def random_gpt2(**changes: Any) -> GPT2LMHeadModel:
    """Return a GPT-2 with random weights, biases and gains too; GPT-2 small unless changed."""
    torch.manual_seed(0)
    return with_random_vectors(GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **changes)).eval())


def random_llama(**changes: Any) -> LlamaForCausalLM:
    """Return a Llama with random weights, gains too."""
    torch.manual_seed(0)
    return with_random_vectors(LlamaForCausalLM(LlamaConfig(bos_token_id=0, eos_token_id=0, **changes)).eval())


@torch.no_grad()
def with_random_vectors(model: Any) -> Any:
    """Move every bias and gain of a HuggingFace model from its zero or one."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(model.config.initializer_range * torch.randn_like(parameter))
    return model


def write_model(folder: Path, theirs: nn.Module) -> None:
    """Write a model of `transformers` to a folder: for HuggingFace, in the classic names, and a tokenizer beside it."""
    huggingface = folder / "huggingface"
    theirs.save_pretrained(huggingface)  # type: ignore[operator]
    config = json.loads((huggingface / "config.json").read_text())
    if config["model_type"] == "gpt2":
        # The released config has this field, and the classic library asks for it, and for this name.
        (huggingface / "config.json").write_text(json.dumps(config | {"n_ctx": config["n_positions"]}))
        (folder / "gpt2").symlink_to("huggingface")
    ours = HookedTransformer.from_pretrained_no_processing(str(huggingface))
    weights = ours.state_dict() | {"unembed.W_U": ours.W_U}
    save_file({name: weight.contiguous().clone() for name, weight in weights.items()}, folder / "classic.safetensors")
    rotary = ours.cfg.positional_embedding_type == "rotary"
    fields = {name: getattr(ours.cfg, name) for name in _SHARED + (_ROTARY if rotary else ())}
    fields["normalization_type"] = ours.cfg.normalization_type
    (folder / "classic.json").write_text(json.dumps(fields))
    word = "<none>"
    tokenizer = Tokenizer(models.WordLevel({word: 0}, unk_token=word))
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), word)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "tokenizer")
