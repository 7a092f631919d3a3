"""Components called by hand, in words that both libraries know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.classic_reference.weights import activations_of, tokens_of

# Of the configs in `make`.
CALLED_BY_HAND = (
    *("plain", "relu", "rms", "folded", "no norm", "attention only", "shortformer", "rotary", "rotary part"),
    *("local rope", "alibi", "bidirectional", "local", "grouped", "grouped rotary", "gated", "parallel", "scaled"),
    *("capped", "query-key norm", "norms after", "embedding norm", "classes", "experts", "sinks", "clipped"),
)  # fmt: skip


def calls_by_hand(model: Any) -> dict[str, Tensor]:
    """Return what the components of a model give, called one by one: name of the call -> result.

    Results under a mask are given at real positions only: what stands at padding is another matter.
    """
    cfg, block, tokens = model.cfg, model.blocks[1], tokens_of(2, 6, 11)
    x = activations_of(2, 6, cfg.d_model)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    real = mask.bool()
    found = {
        "embed": model.embed(tokens),
        "unembed": model.unembed(x),
        "block": block(x),
        "attn": block.attn(x, x, x),
        "attn of three": block.attn(query_input=x, key_input=2 * x, value_input=x.flip(1)),
        "attn and numbers": block.attn(x, x, x, additive_attention_mask=activations_of(2, 1, 1, 6)),
        "QK": block.attn.QK.AB,
        "OV": block.attn.OV.AB,
        **_steps(block.attn, x),
    }
    if hasattr(model, "pos_embed") and cfg.positional_embedding_type in ("standard", "shortformer"):
        found["pos_embed"] = model.pos_embed(tokens)
        found["pos_embed later"] = model.pos_embed(tokens[:, :3], 2)
        found["pos_embed padded"] = model.pos_embed(tokens, 0, mask)
        found["pos_embed later, padded"] = model.pos_embed(tokens[:, 2:], past_kv_pos_offset=2, attention_mask=mask)
    if cfg.positional_embedding_type == "shortformer":
        found["block with positions"] = block(x, shortformer_pos_embed=activations_of(2, 6, cfg.d_model).flip(2))
    if cfg.normalization_type is not None:
        found |= {"ln1": block.ln1(x), "ln_final": model.ln_final(x)}
    if hasattr(block, "mlp"):
        found["mlp"] = block.mlp(x)
    if cfg.attention_dir == "causal":
        found["attn, padded"] = block.attn(x, x, x, attention_mask=mask)[real]
        found["block, padded"] = block(x, attention_mask=mask)[real]
    return found


def _steps(attn: Any, x: Tensor) -> dict[str, Tensor]:
    q, k, v = attn.calculate_qkv_matrices(x, 2 * x, x.flip(1))
    scores = attn.calculate_attention_scores(q, k)
    found = {"q": q, "k": k, "v": v, "scores": scores, "z": attn.calculate_z_scores(v, scores.softmax(-1))}
    found["masked"] = attn.apply_causal_mask(scores).softmax(-1)
    found["masked later"] = attn.apply_causal_mask(scores[:, :, 2:], 2).softmax(-1)
    found["type"] = torch.tensor(float(attn.attn_type == "local"))
    found["scale"] = torch.tensor(float(attn.attn_scale))
    if hasattr(attn, "rotary_sin"):
        found |= {"rotary_sin": attn.rotary_sin, "rotary_cos": attn.rotary_cos}
        found["rotated"] = attn.apply_rotary(q)
        found["rotated later"] = attn.apply_rotary(q[:, :4], 2)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
        found["rotated, padded"] = attn.apply_rotary(q, 0, mask)[mask.bool()]
    return found


def with_a_cache(model: Any, entry: Any) -> dict[str, Tensor]:
    """Return what attention and a block give in two parts, with an empty key-value cache entry of the second layer."""
    x = activations_of(2, 6, model.cfg.d_model)
    first = model.blocks[1](x[:, :4], past_kv_cache_entry=entry)
    second = model.blocks[1](x[:, 4:], past_kv_cache_entry=entry)
    return {"block in parts": torch.cat((first, second), 1), "past_values": entry.past_values}
