"""Greedy generation, and the key-value cache by hand."""

from __future__ import annotations

from typing import Any

import torch

from tests.classic.library import Library
from tests.classic.rules import tokens
from tests.classic.scenario import Outcome, scenario

GREEDY: dict[str, Any] = {"do_sample": False, "verbose": False}
POSITIONS = ("plain", "rotary", "alibi", "shortformer", "grouped_rotary", "local", "gemma", "gpt_j", "llama")


@scenario(
    *(f"text_{name}" for name in ("plain", "rotary", "alibi", "shortformer", "llama", "parallel", "local", "gemma"))
)
def greedy(lib: Library, model: Any) -> Outcome:
    long: dict[str, Any] = {**GREEDY, "stop_at_eos": False}
    given = model.to_tokens("the cat sat")
    return {
        "text": model.generate("the cat sat", max_new_tokens=6, **long),
        "tokens": model.generate(given, max_new_tokens=6, **long),
        "without a cache": model.generate(given, max_new_tokens=6, use_past_kv_cache=False, **long),
        "as tokens": model.generate("the cat", max_new_tokens=4, return_type="tokens", **long),
        "as text": model.generate(given, max_new_tokens=4, return_type="str", **long),
        "alone": model.generate("the cat", max_new_tokens=3, prepend_bos=False, return_type="tokens", **long),
        "batch": model.generate(tokens(3, 4, vocab=40, name="ordinary") % 30 + 4, max_new_tokens=4, **long),
    }


@scenario(*(f"text_{name}" for name in ("plain", "rotary", "alibi", "grouped_rotary")))
def greedy_of_padded_texts(lib: Library, model: Any) -> Outcome:
    prompts = ["the cat sat on the mat", "John ran"]
    fields: dict[str, Any] = {**GREEDY, "stop_at_eos": False, "return_type": "tokens"}
    out: Outcome = {"left": model.generate(prompts, max_new_tokens=4, padding_side="left", **fields)[:, -4:]}
    out["alone"] = model.generate(prompts[1], max_new_tokens=4, **fields)[:, -4:]
    out["plainly"] = model.generate(prompts, max_new_tokens=4, padding_side="left", use_past_kv_cache=False, **fields)[
        :, -4:
    ]
    return out


@scenario("text_plain", "text_rotary")
def stops_at_eos(lib: Library, model: Any) -> Outcome:
    free = model.generate(model.to_tokens("the"), max_new_tokens=8, stop_at_eos=False, **GREEDY)
    stop = int(free[0, 4])
    out: Outcome = {"one": model.generate(model.to_tokens("the"), max_new_tokens=8, eos_token_id=stop, **GREEDY)}
    rows = torch.tensor([[4, 5, 6], [7, 8, 9], [10, 11, 12]])
    out["several"] = model.generate(rows, max_new_tokens=6, eos_token_id=stop, **GREEDY)
    out["one of two"] = model.generate(rows, max_new_tokens=6, eos_token_id=[stop, 5], **GREEDY)
    return out


@scenario("text_plain")
def penalties(lib: Library, model: Any) -> Outcome:
    fields: dict[str, Any] = {**GREEDY, "stop_at_eos": False, "max_new_tokens": 6}
    given = model.to_tokens("the cat")
    return {
        "one choice": model.generate(
            given, top_k=1, do_sample=True, verbose=False, stop_at_eos=False, max_new_tokens=5
        ),
        "little probability": model.generate(
            given, top_p=1e-6, do_sample=True, verbose=False, stop_at_eos=False, max_new_tokens=5
        ),
        "repetition": model.generate(given, repetition_penalty=1.5, **fields),
        "greedy with frequency": model.generate(given, freq_penalty=2.0, **fields),
        "cold": model.generate(
            given, temperature=1e-4, do_sample=True, verbose=False, stop_at_eos=False, max_new_tokens=5
        ),
    }


@scenario("text_plain")
def streamed(lib: Library, model: Any) -> Outcome:
    fields: dict[str, Any] = {**GREEDY, "stop_at_eos": False, "max_new_tokens": 7, "max_tokens_per_yield": 3}
    pieces = list(model.generate_stream(model.to_tokens("the cat"), **fields))
    texts = list(model.generate_stream("the cat", return_type="str", **fields))
    return {"count": len(pieces), "pieces": {str(i): piece for i, piece in enumerate(pieces)}, "texts": texts}


@scenario("text_plain")
def logits_of_generation(lib: Library, model: Any) -> Outcome:
    found = model.generate(
        model.to_tokens("the cat"),
        max_new_tokens=3,
        output_logits=True,
        return_type="tokens",
        stop_at_eos=False,
        **GREEDY,
    )
    return {"tokens": found.sequences, "logits": torch.stack(list(found.logits))}


@scenario("text_plain")
def from_embeddings(lib: Library, model: Any) -> Outcome:
    given = model.embed(model.to_tokens("the cat"))
    fields: dict[str, Any] = {**GREEDY, "stop_at_eos": False, "max_new_tokens": 3}
    return {
        "tokens": model.generate(given, return_type="tokens", **fields),
        "embeddings": model.generate(given, return_type="embeds", **fields),
    }


@scenario(*(f"text_{name}" for name in POSITIONS))
def cached_chunks(lib: Library, model: Any) -> Outcome:
    """A prompt in pieces, with what is remembered of it."""
    given = 4 + tokens(2, 8)
    cache = lib.KeyValueCache.init_cache(model.cfg, model.cfg.device, 2)
    out: Outcome = {"empty": [list(entry.past_keys.shape) for entry in cache.entries]}
    out["first"] = model(given[:, :3], past_kv_cache=cache)
    out["second"] = model(given[:, 3:6], past_kv_cache=cache)
    out["values"] = cache[0].past_values
    out["shapes"] = [list(entry.past_keys.shape) for entry in cache.entries]
    cache.freeze()
    out["frozen"] = model(given[:, 6:], past_kv_cache=cache)
    out["again"] = model(given[:, 6:], past_kv_cache=cache)
    out["still"] = [list(entry.past_values.shape) for entry in cache.entries]
    cache.unfreeze()
    out["one"] = model(given[:, 6:7], past_kv_cache=cache)
    if model.cfg.positional_embedding_type != "rotary":
        out["keys"] = cache[1].past_keys
    return out


@scenario(*(f"text_{name}" for name in ("plain", "rotary", "alibi", "grouped_rotary", "shortformer", "local")))
def cached_chunks_under_masks(lib: Library, model: Any) -> Outcome:
    given = 4 + tokens(2, 7)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    cache = lib.KeyValueCache.init_cache(model.cfg, model.cfg.device, 2)
    out: Outcome = {"first": model(given[:, :4], past_kv_cache=cache, attention_mask=mask[:, :4])[mask[:, :4].bool()]}
    out["mask"] = cache.previous_attention_mask
    out["second"] = model(given[:, 4:6], past_kv_cache=cache, attention_mask=mask[:, 4:6])
    out["third"] = model(given[:, 6:], past_kv_cache=cache)
    out["mask at the end"] = cache.previous_attention_mask
    return out


@scenario("text_plain", "text_rotary")
def cached_padding(lib: Library, model: Any) -> Outcome:
    """Padding in tokens is recognised with a cache too."""
    given = model.to_tokens(["the cat sat on the mat", "John ran"], padding_side="left")
    cache = lib.KeyValueCache.init_cache(model.cfg, model.cfg.device, 2)
    out: Outcome = {"prompts": model(given, past_kv_cache=cache, padding_side="left")[:, -1]}
    out["next"] = model(torch.tensor([[5], [6]]), past_kv_cache=cache, padding_side="left")
    out["mask"] = cache.previous_attention_mask
    return out


@scenario("text_plain")
def activations_with_a_cache(lib: Library, model: Any) -> Outcome:
    given = 4 + tokens(1, 6)
    cache = lib.KeyValueCache.init_cache(model.cfg, model.cfg.device, 1)
    model(given[:, :4], past_kv_cache=cache)
    _, activations = model.run_with_cache(given[:, 4:], past_kv_cache=cache)
    names = ("hook_pattern", "hook_k", "hook_z", "hook_pos_embed", "hook_attn_scores")
    return {"values": {name: value for name, value in activations.items() if name.endswith(names)}}


@scenario("plain", "grouped")
def entries_by_hand(lib: Library, model: Any) -> Outcome:
    cache = lib.KeyValueCache.init_cache(model.cfg, "cpu", 2)
    entry = type(cache[0]).init_cache_entry(model.cfg, "cpu", 2)
    heads = entry.past_keys.shape[2]
    keys, values = torch.ones(2, 3, heads, 4), torch.zeros(2, 3, heads, 4)
    all_keys, all_values = entry.append(keys, values)
    out: Outcome = {"appended": [list(all_keys.shape), list(all_values.shape), list(entry.past_keys.shape)]}
    entry.frozen = True
    entry.append(keys, values)
    out["frozen"] = list(entry.past_keys.shape)
    out["mask"] = cache.append_attention_mask(torch.ones(2, 3).long())
    out["count"] = len(cache.entries)
    return out
