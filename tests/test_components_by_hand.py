"""Components called by hand as code for the classic library does, against numbers computed with version 3.9 of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooked_lm import HookedTransformer, HookedTransformerConfig, HookPoint, components
from hooked_lm.components import MLP, Attention, Embed, GatedMLP, LayerNorm, PosEmbed, TransformerBlock, Unembed
from hooked_lm.components.stock import not_stock
from hooked_lm.kv_cache import (
    HookedTransformerKeyValueCache,
    HookedTransformerKeyValueCacheEntry,
    TransformerLensKeyValueCache,
    TransformerLensKeyValueCacheEntry,
)
from tests.classic_reference.calls import CALLED_BY_HAND, calls_by_hand, with_a_cache
from tests.classic_reference.weights import fingerprint
from tests.helpers import randomise_, tiny_config, tiny_model, tiny_tokens
from tests.test_classic_configs import SAVED, model_of

FOLDER = Path(__file__).parent / "classic_reference"
STORED: dict[str, Any] = json.loads((FOLDER / "by_hand.json").read_text())
# There the logits' cap is applied after `unembed`, and clipping after the hook points of queries, keys and values.
ELSEWHERE = {
    "capped": {"unembed"},
    "clipped": {"q", "k", "v", "scores", "z", "masked", "masked later"},
}


@pytest.mark.parametrize("name", CALLED_BY_HAND)
def test_calls_by_hand_give_the_classic_numbers(name: str) -> None:
    model = model_of(SAVED[name])
    entry = HookedTransformerKeyValueCacheEntry.init_cache_entry(model.cfg, "cpu", 2)
    with torch.no_grad():
        found = {**calls_by_hand(model), **with_a_cache(model, entry)}
    assert set(found) == set(STORED[name])
    rounded = model.cfg.positional_embedding_type == "rotary" or model.cfg.num_experts is not None
    for call in STORED[name].keys() - ELSEWHERE.get(name, set()):
        expected = STORED[name][call]
        given = fingerprint(found[call])
        assert given["shape"] == expected["shape"], call
        assert given["along"] == pytest.approx(expected["along"], abs=1e-5 if rounded else 1e-8), call


# Built by hand

FIELDS: dict[str, Any] = {"n_layers": 2, "d_model": 8, "n_ctx": 10, "d_head": 4, "act_fn": "relu", "d_vocab": 11}


@pytest.mark.parametrize("as_dict", [True, False])
def test_components_are_built_from_a_config_or_a_dictionary(as_dict: bool) -> None:
    cfg: Any = FIELDS if as_dict else HookedTransformerConfig(**FIELDS)
    built = {
        "Embed": Embed(cfg),
        "PosEmbed": PosEmbed(cfg),
        "Unembed": Unembed(cfg),
        "Attention": Attention(cfg, "global", 0),
        "LayerNorm": LayerNorm(cfg),
        "MLP": MLP(cfg),
        "GatedMLP": GatedMLP(cfg),
        "TransformerBlock": TransformerBlock(cfg, 1),
    }
    model = HookedTransformer(cfg)
    for name, component in built.items():
        assert component.cfg == model.cfg, name
        # No number is left uninitialised: weights and biases are zero, gains one.
        for key, parameter in component.named_parameters():
            assert torch.equal(parameter, torch.full_like(parameter, float(key.endswith(("w", ".w"))))), (name, key)
    assert built["TransformerBlock"].attn.layer_id == 1
    built["Attention"].load_state_dict(model.blocks[0].attn.state_dict())
    x = torch.randn(2, 5, 8)
    assert torch.equal(built["Attention"](x, x, x), model.blocks[0].attn(x, x, x))
    assert LayerNorm(cfg, length=5)(torch.randn(2, 3, 5)).shape == (2, 3, 5)
    with pytest.raises(ValueError, match="d_vocab is missing from the config"):
        Embed({name: value for name, value in FIELDS.items() if name != "d_vocab"})


def test_every_classic_name_is_a_component() -> None:
    cfg = {**FIELDS, "num_experts": 3, "experts_per_token": 2, "n_key_value_heads": 1, "gated_mlp": True}
    for name in (
        "Attention",
        "AbstractAttention",
        "GroupedQueryAttention",
        "LayerNormPre",
        "RMSNorm",
        "RMSNormPre",
        "MoE",
    ):
        assert getattr(components, name)(cfg).cfg.n_key_value_heads == 1
    assert components.RMSNorm(FIELDS, length=4).w.shape == (4,)
    for name in ("BertBlock", "T5Attention"):
        with pytest.raises(ImportError, match=f"has no attribute '{name}'.*there are decoders only here"):
            getattr(components, name)
    assert not hasattr(components, "Attentoin")


@pytest.mark.parametrize("attn_type", ["global", "local"])
def test_the_type_of_attention_decides_its_window(attn_type: Any) -> None:
    fields = {**FIELDS, "window_size": 2, "use_local_attn": True, "attn_types": ["local", "global"]}
    attn = Attention(fields, attn_type, 0)
    assert attn.attn_type == attn_type
    assert attn.mask.sum() == (10 * 11 // 2 if attn_type == "global" else 10 + 9)
    x = torch.randn(1, 5, 8)
    randomise_(attn)
    changed = torch.cat((x[:, :1] + 1, x[:, 1:]), 1)
    assert torch.equal(attn(x, x, x)[:, 4], attn(changed, changed, changed)[:, 4]) == (attn_type == "local")
    assert [Attention(fields, layer_id=layer).attn_type for layer in (0, 1)] == ["local", "global"]


def test_a_wrong_type_of_attention_is_named() -> None:
    wrong: Any = "sparse"
    with pytest.raises(Exception, match=r"attn_type"):
        Attention(FIELDS, wrong)
    with pytest.raises(ValueError, match="local attention needs the config's window_size"):
        Attention(FIELDS, attn_type="local")


# Inputs by head, and what is refused


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_inputs_may_have_a_head_axis(kv_heads: int | None) -> None:
    attn = tiny_model(n_key_value_heads=kv_heads).blocks[0].attn
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    by_head, by_kv_head = (x[:, :, None].expand(-1, -1, heads, -1) for heads in (3, kv_heads or 3))
    torch.testing.assert_close(attn(by_head, by_kv_head, by_kv_head), attn(x, x, x), rtol=0, atol=1e-12)
    other = torch.cat((by_head[:, :, :2], -by_head[:, :, 2:]), 2)
    difference = attn(other, by_kv_head, by_kv_head) - attn(x, x, x)
    assert difference.abs().max() > 1e-3


def test_what_cannot_be_kept_says_what_replaces_it() -> None:
    model = tiny_model(positional_embedding_type="rotary")
    attn, x = model.blocks[0].attn, torch.randn(1, 4, 12, dtype=torch.float64)
    entry = HookedTransformerKeyValueCacheEntry.init_cache_entry(model.cfg, None)
    with pytest.raises(ValueError, match=r"position_bias is T5's.*additive_attention_mask="):
        attn(x, x, x, position_bias=x)
    with pytest.raises(Exception, match="layout"):
        model.blocks[0](x, entry)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[batch key\] = \[1 4\].*got \[1, 3\]"):
        model.blocks[0](x, attention_mask=torch.ones(1, 3))
    with pytest.raises(Exception, match="shortformer_pos"):
        model.blocks[0](x, None, None, torch.ones(1, 4))
    with pytest.raises(AttributeError, match=r"assigning mask would change nothing.*hook_attn_scores"):
        attn.mask = torch.ones(16, 16, dtype=torch.bool)
    with pytest.raises(AttributeError, match=r"assigning rotary_sin would change nothing.*rotary_base="):
        attn.register_buffer("rotary_sin", 2 * attn.rotary_sin)
    with pytest.raises(AttributeError, match="assigning apply_causal_mask would change nothing"):
        attn.apply_causal_mask = lambda scores: scores
    with pytest.raises(
        TypeError, match=r"Capped overrides calculate_attention_scores, which no forward pass reads.*scores"
    ):
        type("Capped", (Attention,), {"calculate_attention_scores": lambda self, q, k: q})
    # What is there already may be assigned, as code that shares buffers between layers does.
    attn.mask, attn.rotary_cos = model.blocks[1].attn.mask, model.blocks[1].attn.rotary_cos
    assert not_stock(model) is None


def test_overriding_a_step_acts() -> None:
    class Halved(Attention):
        def scores(self, q: Tensor, k: Tensor) -> Tensor:
            return super().scores(q, k) / 2

    model = tiny_model()
    halved = Halved(model.cfg, layer_id=1)
    halved.load_state_dict(model.blocks[1].attn.state_dict())
    model.blocks[1].attn = halved.double()
    model.setup()
    _, cache = model.run_with_cache(tiny_tokens(), names_filter=["*1.attn.hook_attn_scores", "*1.attn.hook_[qk]"])
    plain = Attention.scores(halved, cache["q", 1], cache["k", 1])
    assert torch.equal(cache["attn_scores", 1][:, :, 6], plain[:, :, 6] / 2)


@pytest.mark.parametrize("pos", ["standard", "rotary", "shortformer"])
def test_own_components_with_the_classic_signature_run(pos: str) -> None:
    class ClassicBlock(nn.Module):
        def __init__(self, inner: TransformerBlock) -> None:
            super().__init__()
            self.inner = inner

        def forward(
            self,
            resid_pre: Tensor,
            shortformer_pos_embed: Tensor | None = None,
            past_kv_cache_entry: Any = None,
            attention_mask: Tensor | None = None,
        ) -> Tensor:
            return 2 * self.inner(  # type: ignore[no-any-return]
                resid_pre,
                shortformer_pos_embed=shortformer_pos_embed,
                past_kv_cache_entry=past_kv_cache_entry,
                attention_mask=attention_mask,
            )

    class ClassicAttention(Attention):
        def forward(  # type: ignore[override]
            self,
            query_input: Tensor,
            key_input: Tensor,
            value_input: Tensor,
            past_kv_cache_entry: Any = None,
            additive_attention_mask: Tensor | None = None,
            attention_mask: Tensor | None = None,
        ) -> Tensor:
            words: dict[str, Any] = {"past_kv_cache_entry": past_kv_cache_entry, "attention_mask": attention_mask}
            return 2 * super().forward(query_input, key_input, value_input, **words)

    plain, model = tiny_model(positional_embedding_type=pos), tiny_model(positional_embedding_type=pos)
    attn = ClassicAttention(model.cfg, layer_id=0).double()
    attn.load_state_dict(model.blocks[0].attn.state_dict())
    model.blocks[0].attn = attn
    model.blocks[1] = ClassicBlock(model.blocks[1])  # type: ignore[assignment]
    model.setup()
    plain.add_hook("blocks.0.hook_attn_out", lambda x, hook: 2 * x)
    plain.add_hook("blocks.1.hook_resid_post", lambda x, hook: 2 * x)
    tokens, mask = tiny_tokens(), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    for words in ({}, {"attention_mask": mask}):
        torch.testing.assert_close(model(tokens, **words), plain(tokens, **words), rtol=0, atol=1e-10)
    cache = model.new_kv_cache(2)
    parts = [model(tokens[:, :4], past_kv_cache=cache), model(tokens[:, 4:], past_kv_cache=cache)]
    torch.testing.assert_close(torch.cat(parts, 1), plain(tokens), rtol=0, atol=1e-10)


# The model's forward pass by hand


@pytest.mark.parametrize("pos", ["standard", "shortformer"])
def test_a_forward_pass_by_hand_is_the_models(pos: str) -> None:
    model, tokens = tiny_model(positional_embedding_type=pos), tiny_tokens()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    residual, positions = model.embed(tokens), model.pos_embed(tokens, 0, mask)
    added = positions if pos == "shortformer" else None
    residual = residual if pos == "shortformer" else residual + positions
    for block in model.blocks:
        residual = block(residual, shortformer_pos_embed=added, attention_mask=mask)
    logits = model.unembed(model.ln_final(residual))
    torch.testing.assert_close(logits, model(tokens, attention_mask=mask), rtol=0, atol=1e-12)


def test_given_positions_replace_those_of_a_shortformer() -> None:
    model, tokens = tiny_model(positional_embedding_type="shortformer"), tiny_tokens()
    residual, positions = model(tokens, stop_at_layer=1), model.pos_embed(tokens)
    logits = model(residual, start_at_layer=1, shortformer_pos_embed=positions)
    assert torch.equal(logits, model(tokens))
    assert not torch.allclose(model(residual, start_at_layer=1, shortformer_pos_embed=2 * positions), logits)
    with pytest.raises(ValueError, match="shortformer_pos_embed goes with start_at_layer"):
        model(tokens, shortformer_pos_embed=positions)
    with pytest.raises(ValueError, match=r"shape of the residual stream, \[2, 7, 12\]; got \[2, 6, 12\]"):
        model(residual, start_at_layer=1, shortformer_pos_embed=positions[:, :6])


def test_weights_are_drawn_anew() -> None:
    model = HookedTransformer(tiny_config())
    first = {name: value.clone() for name, value in model.state_dict().items()}
    randomise_(model)
    assert model.init_weights() is None
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())


def test_hooks_act_in_calls_by_hand() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    residual = model(tokens, stop_at_layer=1)
    seen: list[str] = []

    def edit(x: Tensor, hook: HookPoint) -> Tensor:
        seen.append(str(hook.name))
        return 0 * x

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", edit), ("blocks.1.hook_mlp_out", edit)]):
        out = model.blocks[1](residual)
    assert seen == ["blocks.1.attn.hook_pattern", "blocks.1.hook_mlp_out"]
    torch.testing.assert_close(out, residual + model.blocks[1].attn.b_O, rtol=0, atol=1e-12)


def test_the_key_value_cache_has_its_names_of_version_3() -> None:
    assert TransformerLensKeyValueCache is HookedTransformerKeyValueCache
    assert TransformerLensKeyValueCacheEntry is HookedTransformerKeyValueCacheEntry
    cfg = tiny_config(n_key_value_heads=1)
    entry = HookedTransformerKeyValueCacheEntry.init_cache_entry(cfg, "cpu", 3)
    assert entry.past_keys.shape == entry.past_values.shape == (3, 0, 1, 4)
    keys = torch.randn(3, 2, 1, 4, dtype=torch.float64)
    assert torch.equal(entry.append(keys, -keys)[1], -keys)
    entry.frozen = True
    assert entry.append(keys, keys)[0].shape == (3, 4, 1, 4)
    assert entry.past_keys.shape == (3, 2, 1, 4)


def test_the_prompts_of_a_key_value_cache_may_be_reordered_and_its_keys_assigned() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    cache = model.new_kv_cache(2, capacity=9)
    model(tokens[:, :4], past_kv_cache=cache)
    order = torch.tensor([1, 0, 1])
    for entry in cache.entries:
        entry.past_keys = entry.past_keys[order]
        entry.past_values = entry.past_values[order]
    cache.previous_attention_mask = cache.previous_attention_mask[order]
    logits = model(tokens[order, 4:], past_kv_cache=cache)
    torch.testing.assert_close(logits, model(tokens[order])[:, 4:], rtol=0, atol=1e-12)
    # A copy is held: going on from an earlier length does not write to the caller's tensor.
    keys = torch.randn(1, 3, 3, 4, dtype=torch.float64)
    entry, before = HookedTransformerKeyValueCacheEntry(past_keys=keys, past_values=keys), keys.clone()
    entry.rewind(1)
    entry.append(keys[:, :1], keys[:, :1])
    assert torch.equal(keys, before)
    entry.past_keys = keys[:, :1]
    with pytest.raises(
        ValueError, match=r"past_keys \[1, 1, 3, 4\] and past_values \[1, 2, 3, 4\] differ.*assign both"
    ):
        entry.append(keys[:, :1], keys[:, :1])
