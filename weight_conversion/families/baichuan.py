"""Baichuan 1 and 2 (Yang et al. 2023, "Baichuan 2") as published: Llama with fused projections.

The models of 13 billion parameters have ALiBi in place of rotary positions, and the unembedding of Baichuan 2 is
normalised token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.errors import CheckpointError
from weight_conversion.family import Family
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rotary import plain_parameters, rotary
from weight_conversion.rules import Entry, RuleTable, Tensors

__all__ = ["FAMILY", "UnitRows", "config", "rules"]

# The vocabularies tell the generations apart: their config files are alike otherwise.
_FIRST, _SECOND = 64000, 125696
# The first model of all, which has rotary positions and the first vocabulary, writes its name with a capital C.
_FIRST_NAME = "BaiChuanForCausalLM"
_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}


def config(fields: ConfigFields) -> Arguments:
    """Map the fields of a config.json whose `model_type` is "baichuan"."""
    fields.ignore("_from_model_config")
    d_model, n_heads = fields.take("hidden_size"), fields.take("num_attention_heads")
    # Configs of the models with ALiBi give this length only, those with rotary positions the other or both.
    longest = fields.get("model_max_length", None)
    return {
        "n_layers": fields.take("num_hidden_layers"),
        "d_model": d_model,
        "n_heads": n_heads,
        "d_mlp": fields.take("intermediate_size"),
        "d_vocab": fields.take("vocab_size"),
        "act_fn": fields.take("hidden_act"),
        "gated_mlp": True,
        "eps": fields.take("rms_norm_eps"),
        "normalization_type": "RMS",
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
        **_positions(fields, d_model // n_heads, longest),
    }


def _positions(fields: ConfigFields, d_head: int, longest: int | None) -> Arguments:
    if fields.get("max_position_embeddings", None) is not None:
        return rotary(fields, d_head, parameters=plain_parameters(fields))
    if longest is None:
        raise CheckpointError(
            f"the {fields.family} config has neither max_position_embeddings, as the models with rotary positions, nor "
            "model_max_length, as those with ALiBi"
        )
    return {"positional_embedding_type": "alibi", "n_ctx": longest}


def rules(cfg: HookedTransformerConfig, fields: ConfigFields) -> RuleTable:
    """Map the tensors of a `BaichuanForCausalLM`."""
    block = "layers.{layer}"
    W_E, W_U, b_U = tables.embeddings(cfg)
    if _normalises(fields):
        fields.require("tie_word_embeddings", False)
        W_U = UnitRows()
    return (
        *(W_E, W_U, b_U),
        *tables.norm(f"{block}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.fused_qkv(f"{block}.self_attn.W_pack", order="part head d_head"),
        *tables.attention_output(f"{block}.self_attn.o_proj"),
        *tables.stored_rotary(f"{block}.self_attn"),
        *tables.norm(f"{block}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *tables.gated_mlp(f"{block}.mlp"),
        *tables.norm("norm", "ln_final"),
    )


def _normalises(fields: ConfigFields) -> bool:
    """Whether the model divides each token's unembedding by its length."""
    vocab = fields.take("vocab_size")
    if fields.take("architectures") == [_FIRST_NAME]:
        return False
    if vocab not in (_FIRST, _SECOND):
        raise CheckpointError(
            f"{fields.family} with vocab_size={vocab} is not supported: {_FIRST} is Baichuan 1 and {_SECOND} Baichuan "
            "2, whose unembedding is normalised, and nothing else in the files tells the two apart"
        )
    return bool(vocab == _SECOND)


@dataclass(frozen=True)
class UnitRows(Entry):
    """The unembedding, of which the model uses each row divided by its Euclidean length."""

    source: str = "lm_head.weight"
    target: str = "unembed.W_U"

    @property
    def source_names(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def target_names(self) -> tuple[str, ...]:
        return (self.target,)

    def at(self, layer: int) -> Self:
        return self

    def apply(self, tensors: Tensors, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
        weight = tensors[self.source]
        if tuple(weight.shape) != (cfg.d_vocab_out, cfg.d_model):
            raise CheckpointError(
                f"{self.source} has shape {tuple(weight.shape)}, which is not [d_vocab_out d_model], "
                f"{[cfg.d_vocab_out, cfg.d_model]}: the weights do not belong to this config"
            )
        # In float64, so that the values are rounded once: when they are copied into a model.
        return {self.target: F.normalize(weight.double(), dim=1).T}

    def invert(self, weights: Tensors, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
        weight = weights[self.target].T
        lengths = weight.double().norm(dim=1)
        if not torch.allclose(lengths, torch.ones_like(lengths), atol=torch.finfo(weight.dtype).eps * cfg.d_model):
            raise CheckpointError(
                f"{self.target} has columns whose length is not 1, and this family has no place for their lengths: "
                "Baichuan 2 normalises its unembedding"
            )
        return {self.source: weight}


FAMILY = Family("Baichuan", ("BaichuanForCausalLM", _FIRST_NAME), config, rules, defaults=_DEFAULTS)
