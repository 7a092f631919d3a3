"""Parts of the network called by hand."""

from __future__ import annotations

from typing import Any

import torch

from tests.classic.library import Library
from tests.classic.rules import numbers, parameter, tokens
from tests.classic.scenario import Outcome, scenario

STREAM = numbers("stream", (2, 5, 8))


@scenario("plain", "rotary", "grouped", "alibi", "local", "qk_norm", "bidirectional", "no_scale", "gemma")
def attention(lib: Library, model: Any) -> Outcome:
    attn = model.blocks[1].attn
    out: Outcome = {"keywords": attn(query_input=STREAM, key_input=STREAM, value_input=STREAM)}
    out["in order"] = attn(STREAM, STREAM, STREAM)
    other = numbers("other stream", (2, 5, 8))
    out["other values"] = attn(query_input=STREAM, key_input=STREAM, value_input=other)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    masked = attn(query_input=STREAM, key_input=STREAM, value_input=STREAM, attention_mask=mask)
    out["masked"] = masked[mask.bool()]
    out["type"] = attn.attn_type
    return out


@scenario("plain", "rotary", "grouped", "alibi")
def attention_with_a_cache(lib: Library, model: Any) -> Outcome:
    attn = model.blocks[0].attn
    entry = lib.KeyValueCache.init_cache(model.cfg, "cpu", 2)[0]
    first = attn(STREAM[:, :3], STREAM[:, :3], STREAM[:, :3], past_kv_cache_entry=entry)
    rest = attn(
        query_input=STREAM[:, 3:], key_input=STREAM[:, 3:], value_input=STREAM[:, 3:], past_kv_cache_entry=entry
    )
    return {"first": first, "rest": rest, "stored": list(entry.past_keys.shape)}


@scenario("plain", "rms", "ln_pre", "rms_pre")
def norms(lib: Library, model: Any) -> Outcome:
    return {"ln1": model.blocks[0].ln1(STREAM), "ln_final": model.ln_final(STREAM)}


@scenario("plain", "gated", "experts", "solu_ln", "gpt_j", "no_norm", "wide_heads")
def mlps(lib: Library, model: Any) -> Outcome:
    return {"mlp": model.blocks[0].mlp(STREAM)}


@scenario("plain", "attn_only", "parallel", "rms", "grouped", "both_sides", "rotary", "shortformer", "llama")
def blocks(lib: Library, model: Any) -> Outcome:
    out: Outcome = {}
    if model.cfg.positional_embedding_type == "shortformer":
        added = model.pos_embed(tokens(2, 5))
        return {"with positions": model.blocks[0](STREAM, shortformer_pos_embed=added), "positions": added}
    out["block"] = model.blocks[0](STREAM)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    out["masked"] = model.blocks[1](STREAM, attention_mask=mask)[mask.bool()]
    entry = lib.KeyValueCache.init_cache(model.cfg, "cpu", 2)[0]
    out["cached"] = model.blocks[0](STREAM[:, :3], past_kv_cache_entry=entry)
    out["cached rest"] = model.blocks[0](STREAM[:, 3:], past_kv_cache_entry=entry)
    return out


@scenario("plain", "embedding_norm", "shortformer", "vocab_out")
def embeddings(lib: Library, model: Any) -> Outcome:
    out: Outcome = {"embed": model.embed(tokens(2, 4)), "unembed": model.unembed(STREAM)}
    if model.cfg.positional_embedding_type in ("standard", "shortformer"):
        out["pos_embed"] = model.pos_embed(tokens(2, 4))
        out["later"] = model.pos_embed(tokens(2, 4), 3)
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        out["masked"] = model.pos_embed(tokens(2, 4), 0, mask)[mask.bool()]
    return out


@scenario("plain", "rotary", "grouped", "parallel")
def a_network_by_hand(lib: Library, model: Any) -> Outcome:
    stream = model.embed(tokens(1, 4))
    if model.cfg.positional_embedding_type == "standard":
        stream = stream + model.pos_embed(tokens(1, 4))
    for block in model.blocks:
        stream = block(stream)
    return {"logits": model.unembed(model.ln_final(stream))}


FIELDS: dict[str, Any] = {
    "n_layers": 1,
    "d_model": 8,
    "n_ctx": 12,
    "d_head": 4,
    "n_heads": 2,
    "d_mlp": 12,
    "d_vocab": 11,
    "act_fn": "relu",
    "init_weights": False,
    "device": "cpu",
    "seed": 0,
}


def _filled(module: Any) -> Any:
    state = {name: parameter(name, tuple(value.shape)) for name, value in module.named_parameters()}
    module.load_state_dict(state, strict=False)
    return module


@scenario()
def built_from_dicts(lib: Library) -> Outcome:
    """Components built from a dict of fields, as well as from a config."""
    parts = lib.components
    out: Outcome = {}
    for name in ("MLP", "LayerNorm", "LayerNormPre", "RMSNorm", "RMSNormPre"):
        out[name] = _filled(getattr(parts, name)(FIELDS))(STREAM)
    out["Embed"] = _filled(parts.Embed(FIELDS))(tokens(2, 4))
    out["PosEmbed"] = _filled(parts.PosEmbed(FIELDS))(tokens(2, 4))
    out["Unembed"] = _filled(parts.Unembed(FIELDS))(STREAM)
    out["Attention"] = _filled(parts.Attention(FIELDS, "global", 0))(STREAM, STREAM, STREAM)
    out["TransformerBlock"] = _filled(parts.TransformerBlock(FIELDS, 0))(STREAM)
    cfg = lib.HookedTransformerConfig.unwrap(FIELDS)
    out["from a config"] = _filled(parts.MLP(cfg))(STREAM)
    narrow = _filled(parts.RMSNorm(cfg, length=4))
    out["of another width"] = narrow(numbers("narrow", (2, 5, 4)))
    return out
