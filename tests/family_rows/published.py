"""Families whose code comes with their checkpoints: InternLM and InternLM2, Baichuan and EXAONE 3.

transformers has no class for them. The reference is a Llama of transformers with the same weights, and the checkpoint
is written from it by hand: under the published names, with a published config.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from tests.family_rows.base import LLAMA, LLAMA3_SCALING
from tests.family_rows.row import Row, randomise_reference
from tests.family_rows.variants import ROTARY
from weight_conversion.registry import family_of

Tensors = dict[str, Tensor]

HEAD = "lm_head.weight"


class AlibiLlama(LlamaForCausalLM):
    """Llama of four heads with ALiBi: all positions are 0, so that nothing rotates, and the mask holds the biases."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        places = torch.arange(input_ids.shape[1])
        distance = places[:, None] - places[None]
        bias = -torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256])[:, None, None] * distance
        mask = bias.masked_fill(distance < 0, float("-inf")).to(self.dtype).expand(len(input_ids), -1, -1, -1)
        return super().forward(input_ids, attention_mask=mask, position_ids=torch.zeros_like(input_ids), **options)


@dataclass(frozen=True)
class PublishedRow(Row):
    """A row whose checkpoints are written by hand.

    Attributes:
        config_json: the published config, without the architecture.
        names: patterns of the reference's names -> the published names.
        llama: the class of the reference.
        fused: the projections of queries, keys and values are one tensor: "groups", "blocks", or "" for not fused.
        unit_rows: the unembedding in the checkpoint has rows of any length, and the model uses them at length 1.
    """

    config_json: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    llama: type[LlamaForCausalLM] = LlamaForCausalLM
    fused: str = ""
    unit_rows: bool = False

    def build(self, seed: int = 0, **changes: Any) -> Any:
        config = self.hf_config(**changes)
        model = self.llama._from_config(config, attn_implementation=self.attention)
        model = randomise_reference(model.eval(), seed)
        if self.unit_rows:
            model.lm_head.weight.data = F.normalize(model.lm_head.weight.data)
        return model

    def config_fields(self) -> dict[str, Any]:
        defaults = family_of(self.architecture).defaults or {}
        return {"architectures": [self.architecture], **defaults, **self.config_json}

    def save(self, model: Any, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({"architectures": [self.architecture], **self.config_json}))
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            del tensors[HEAD]
        if self.unit_rows:
            tensors[HEAD] = tensors[HEAD] * torch.linspace(0.5, 2.0, len(tensors[HEAD]))[:, None].to(tensors[HEAD])
        if self.fused:
            for layer in range(model.config.num_hidden_layers):
                self._fuse(tensors, f"model.layers.{layer}.self_attn")
        save_file(
            {self._published(name): one.contiguous() for name, one in tensors.items()}, folder / "model.safetensors"
        )

    def load(self, folder: Path, **options: Any) -> Any:
        stored = load_file(folder / "model.safetensors")
        model = self.llama._from_config(self.hf_config(), attn_implementation=self.attention).eval()
        model.to(options.get("dtype", next(iter(stored.values())).dtype))
        tensors = {}
        for name in model.state_dict():
            part = re.search(r"\.([qkv])_proj\.(\w+)$", name) if self.fused else None
            if name == HEAD and self.config_json["tie_word_embeddings"]:
                tensors[name] = stored[self._published("model.embed_tokens.weight")]
            elif part is None:
                tensors[name] = stored[self._published(name)]
            else:
                fused = stored[self._published(name.replace(f"{part[1]}_proj", "qkv"))]
                tensors[name] = self._parts(fused)["qkv".index(part[1])].flatten(0, -2 if part[2] == "weight" else -1)
        if self.unit_rows:
            tensors[HEAD] = F.normalize(tensors[HEAD].double())
        model.load_state_dict(tensors)
        return model

    def reference(self, folder: Path) -> nn.Module:
        loaded: nn.Module = self.load(folder)
        return loaded

    def _published(self, name: str) -> str:
        for pattern, published in self.names.items():
            name = re.sub(pattern, published, name)
        return name

    def _fuse(self, tensors: Tensors, attention: str) -> None:
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"{attention}.{letter}_proj.{kind}", None) for letter in "qkv"]
            q, k, v = parts
            if q is None or k is None or v is None:
                continue
            if self.fused == "groups":
                heads, kv_heads = self.fields["num_attention_heads"], self.fields["num_key_value_heads"]
                d_head, rest = len(q) // heads, q.shape[1:]
                by_group = [part.reshape(kv_heads, -1, d_head, *rest) for part in (q, k, v)]
                tensors[f"{attention}.qkv.{kind}"] = torch.cat(by_group, 1).flatten(0, 2)
            else:
                tensors[f"{attention}.qkv.{kind}"] = torch.cat((q, k, v))

    def _parts(self, fused: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, each with its heads as an axis before the width of a head."""
        heads, kv_heads = self.fields["num_attention_heads"], self.fields["num_key_value_heads"]
        group, rest = heads // kv_heads, fused.shape[1:]
        if self.fused == "groups":
            by_group = fused.reshape(kv_heads, group + 2, -1, *rest)
            q, k, v = by_group.split((group, 1, 1), 1)
            return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        by_head = fused.reshape(heads + 2 * kv_heads, -1, *rest)
        q, k, v = by_head.split((heads, kv_heads, kv_heads))
        return q, k, v


# The published models have heads that together are as wide as the stream.
COMMON: dict[str, Any] = {**LLAMA, "head_dim": 6, "rope_parameters": ROTARY}
ALIKE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 100.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
    "transformers_version": "4.33.2",
    "use_cache": True,
    "tie_word_embeddings": False,
}

INTERNLM2_JSON: dict[str, Any] = {
    **ALIKE,
    "attn_implementation": "eager",
    "auto_map": {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
    },
    "bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "internlm2",
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rope_scaling": None,
}
INTERNLM2_NAMES = {
    r"self_attn\.qkv": "attention.wqkv",
    r"self_attn\.o_proj": "attention.wo",
    r"mlp\.gate_proj": "feed_forward.w1",
    r"mlp\.up_proj": "feed_forward.w3",
    r"mlp\.down_proj": "feed_forward.w2",
    r"input_layernorm": "attention_norm",
    r"post_attention_layernorm": "ffn_norm",
    r"model\.embed_tokens": "model.tok_embeddings",
    r"^lm_head": "output",
}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0}

EXAONE_JSON: dict[str, Any] = {
    **{
        name: ALIKE[name] for name in ALIKE if name not in ("num_hidden_layers", "rms_norm_eps", "transformers_version")
    },
    "activation_function": "silu",
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_exaone.ExaoneConfig",
        "AutoModelForCausalLM": "modeling_exaone.ExaoneForCausalLM",
    },
    "embed_dropout": 0.0,
    "head_dim": 6,
    "layer_norm_epsilon": 1e-6,
    "model_type": "exaone",
    "num_layers": 3,
    "pad_token_id": 0,
    "rope_scaling": {name: value for name, value in LLAMA3_SCALING.items() if name != "rope_theta"},
}
EXAONE_NAMES = {
    r"model\.layers\.": "transformer.h.",
    r"self_attn\.o_proj": "attn.attention.out_proj",
    r"self_attn\.": "attn.attention.",
    r"mlp\.gate_proj": "mlp.c_fc_0",
    r"mlp\.up_proj": "mlp.c_fc_1",
    r"mlp\.down_proj": "mlp.c_proj",
    r"input_layernorm": "ln_1",
    r"post_attention_layernorm": "ln_2",
    r"model\.embed_tokens": "transformer.wte",
    r"model\.norm": "transformer.ln_f",
}

BAICHUAN: dict[str, Any] = {**COMMON, "num_key_value_heads": 4, "rope_parameters": {**ROTARY, "rope_theta": 10000.0}}
BAICHUAN_JSON: dict[str, Any] = {
    **{name: ALIKE[name] for name in ALIKE if name not in ("num_key_value_heads", "rope_theta")},
    "_from_model_config": True,
    "auto_map": {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    },
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_max_length": 32,
    "model_type": "baichuan",
    "pad_token_id": 0,
    "tokenizer_class": "BaichuanTokenizer",
}
BAICHUAN_NAMES = {r"self_attn\.qkv": "self_attn.W_pack"}
FIRST, SECOND = {"vocab_size": 64000}, {"vocab_size": 125696}

INTERNLM: dict[str, Any] = {
    **COMMON,
    "num_key_value_heads": 4,
    "attention_bias": True,
    "rope_parameters": {**ROTARY, "rope_theta": 10000.0},
}
INTERNLM_JSON: dict[str, Any] = {
    **{name: ALIKE[name] for name in ALIKE if name not in ("num_key_value_heads", "rope_theta")},
    "auto_map": {
        "AutoConfig": "configuration_internlm.InternLMConfig",
        "AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM",
    },
    "bias": True,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "internlm",
    "pad_token_id": 2,
}

ROWS = (
    PublishedRow("internlm", "InternLMForCausalLM", "LlamaConfig", INTERNLM, config_json=INTERNLM_JSON),
    PublishedRow(
        "internlm-no-biases-dynamic-tied",
        "InternLMForCausalLM",
        "LlamaConfig",
        {
            **INTERNLM,
            "attention_bias": False,
            "max_position_embeddings": 8,
            "rope_parameters": DYNAMIC,
            "tie_word_embeddings": True,
        },
        pos=14,
        features={"scaling": {"rope_parameters": ROTARY}},
        config_json={
            **INTERNLM_JSON,
            "bias": False,
            "max_position_embeddings": 8,
            "rotary": {"type": "dynamic", "base": 100.0, "scaling_factor": 3.0},
            "tie_word_embeddings": True,
        },
    ),
    PublishedRow(
        "internlm2",
        "InternLM2ForCausalLM",
        "LlamaConfig",
        COMMON,
        config_json=INTERNLM2_JSON,
        names=INTERNLM2_NAMES,
        fused="groups",
    ),
    PublishedRow(
        "internlm2-biases-dynamic-tied",
        "InternLM2ForCausalLM",
        "LlamaConfig",
        {
            **COMMON,
            "attention_bias": True,
            "max_position_embeddings": 8,
            "rope_parameters": DYNAMIC,
            "tie_word_embeddings": True,
        },
        pos=14,
        features={"scaling": {"rope_parameters": ROTARY}},
        config_json={
            **INTERNLM2_JSON,
            "bias": True,
            "max_position_embeddings": 8,
            "rope_scaling": {"type": "dynamic", "factor": 3.0},
            "tie_word_embeddings": True,
        },
        names=INTERNLM2_NAMES,
        fused="groups",
    ),
    PublishedRow(
        "baichuan-first",
        "BaiChuanForCausalLM",
        "LlamaConfig",
        BAICHUAN,
        config_json={name: value for name, value in BAICHUAN_JSON.items() if name != "model_max_length"},
        names=BAICHUAN_NAMES,
        fused="blocks",
    ),
    PublishedRow(
        "baichuan-alibi",
        "BaichuanForCausalLM",
        "LlamaConfig",
        {**BAICHUAN, **FIRST},
        config_json={
            **{name: value for name, value in BAICHUAN_JSON.items() if name != "max_position_embeddings"},
            **FIRST,
        },
        names=BAICHUAN_NAMES,
        llama=AlibiLlama,
        fused="blocks",
    ),
    PublishedRow(
        "baichuan2",
        "BaichuanForCausalLM",
        "LlamaConfig",
        {**BAICHUAN, **SECOND},
        config_json={**BAICHUAN_JSON, **SECOND},
        names=BAICHUAN_NAMES,
        fused="blocks",
        unit_rows=True,
    ),
    PublishedRow(
        "exaone3",
        "ExaoneForCausalLM",
        "LlamaConfig",
        {**COMMON, "rope_parameters": LLAMA3_SCALING},
        pos=24,
        features={"scaling": {"rope_parameters": ROTARY}},
        config_json=EXAONE_JSON,
        names=EXAONE_NAMES,
    ),
    PublishedRow(
        "exaone3-tied",
        "ExaoneForCausalLM",
        "LlamaConfig",
        {**COMMON, "tie_word_embeddings": True},
        config_json={**EXAONE_JSON, "rope_scaling": None, "tie_word_embeddings": True},
        names=EXAONE_NAMES,
    ),
)
