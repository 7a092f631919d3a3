"""Scaled rotary frequencies: beside their formulas, beside transformers, and where they depend on a prompt's length."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hooked_lm import HookedTransformer, HookedTransformerConfig
from hooked_lm.components.positions import RotarySpec, rotary_frequencies, rotary_tables
from tests.helpers import tiny_config, tiny_model, tiny_tokens

DIM, BASE, ORIGINAL, FACTOR = 16, 100.0, 8, 4.0
ROTARY: dict[str, Any] = {
    "positional_embedding_type": "rotary",
    "n_heads": 2,
    "d_head": DIM,
    "rotary_base": BASE,
    "n_ctx": 40,
}
SHORT = [1.0 + 0.1 * i for i in range(DIM // 2)]
LONG = [2.0 + 0.5 * i for i in range(DIM // 2)]
YARN: dict[str, Any] = {
    "use_yarn_rope": True,
    "yarn_factor": FACTOR,
    "yarn_beta_fast": 0.9,
    "yarn_beta_slow": 0.05,
    "yarn_original_max_position_embeddings": ORIGINAL,
}
LONGROPE: dict[str, Any] = {
    "use_longrope": True,
    "longrope_short_factors": SHORT,
    "longrope_long_factors": LONG,
    "longrope_attention_factor": 1.3,
    "longrope_original_ctx_len": ORIGINAL,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": {"rotary_scaling_factor": FACTOR},
    "by parts": {
        "use_NTK_by_parts_rope": True,
        "NTK_by_parts_factor": FACTOR,
        "NTK_by_parts_low_freq_factor": 0.2,
        "NTK_by_parts_high_freq_factor": 0.9,
        "NTK_original_ctx_len": ORIGINAL,
    },
    "yarn": YARN,
    "yarn, not rounded": {**YARN, "yarn_truncate": False},
    "yarn, its own amplitude": {**YARN, "yarn_attention_factor": 0.6},
    "dynamic": {
        "use_dynamic_rope": True,
        "dynamic_rope_factor": FACTOR,
        "dynamic_rope_original_ctx_len": ORIGINAL,
    },
    "longrope": LONGROPE,
}
BY_LENGTH = ("dynamic", "longrope")
LENGTHS = (3, ORIGINAL, ORIGINAL + 1, 29)

every_scaling = pytest.mark.parametrize("name", SCALINGS)
by_length = pytest.mark.parametrize("name", BY_LENGTH)


def config_of(name: str, **changes: Any) -> HookedTransformerConfig:
    return tiny_config(**{**ROTARY, **SCALINGS[name], **changes})


def spec_of(name: str, **changes: Any) -> RotarySpec:
    return RotarySpec.of(config_of(name, **changes), 0)


def model_of(name: str, **changes: Any) -> HookedTransformer:
    return tiny_model(**{**ROTARY, **SCALINGS[name], **changes})


# The formulas, pair by pair and in double precision


def pair_that_turns(times: float) -> float:
    """Which pair turns so often over the original context: `ORIGINAL * BASE ** (-2 pair / DIM) = 2 pi times`."""
    return DIM / 2 * math.log(ORIGINAL / (2 * math.pi * times), BASE)


def expected_frequency(name: str, pair: int, length: int) -> float:
    plain = BASE ** (-2 * pair / DIM)
    if name == "linear":
        return plain / FACTOR
    if name == "by parts":
        turns = ORIGINAL * plain / (2 * math.pi)
        kept = min(max((turns - 0.2) / (0.9 - 0.2), 0.0), 1.0)
        return kept * plain + (1 - kept) * plain / FACTOR
    if name.startswith("yarn"):
        first, last = pair_that_turns(0.9), pair_that_turns(0.05)
        if name != "yarn, not rounded":
            first, last = math.floor(first), math.ceil(last)
        slowed = min(max((pair - max(first, 0)) / (last - max(first, 0)), 0.0), 1.0)
        return (1 - slowed) * plain + slowed * plain / FACTOR
    if name == "dynamic":
        stretch = FACTOR * max(length, ORIGINAL) / ORIGINAL - (FACTOR - 1)
        return float((BASE * stretch ** (DIM / (DIM - 2))) ** (-2 * pair / DIM))
    if name == "longrope":
        return plain / (LONG if length > ORIGINAL else SHORT)[pair]
    return plain


AMPLITUDES = {
    "yarn": 0.1 * math.log(FACTOR) + 1,
    "yarn, not rounded": 0.1 * math.log(FACTOR) + 1,
    "yarn, its own amplitude": 0.6,
    "longrope": 1.3,
}


@every_scaling
def test_frequencies_are_those_of_the_formula(name: str) -> None:
    got = rotary_frequencies(spec_of(name), torch.tensor(LENGTHS))
    for row, length in enumerate(LENGTHS):
        of_prompt = got[row if len(got) > 1 else 0]
        for pair in range(DIM // 2):
            assert float(of_prompt[pair]) == pytest.approx(expected_frequency(name, pair, length), rel=2e-6), (
                length,
                pair,
            )


@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "none"])
def test_a_scaling_does_something_to_some_pair_beyond_the_original_context(name: str) -> None:
    plain = rotary_frequencies(spec_of("none"), torch.tensor([29]))
    scaled = rotary_frequencies(spec_of(name), torch.tensor([29]))
    assert (scaled / plain).min() < 0.5


@pytest.mark.parametrize("name", ["by parts", "yarn", "yarn, not rounded"])
def test_the_slowest_pair_is_slowed_by_the_factor_and_the_fastest_is_left(name: str) -> None:
    ratio = rotary_frequencies(spec_of(name), torch.tensor([29]))[0] / rotary_frequencies(
        spec_of("none"), torch.tensor([29])
    )
    assert float(ratio[0, 0]) == pytest.approx(1.0)
    assert float(ratio[0, -1]) == pytest.approx(1 / FACTOR)
    assert ((ratio[0] > 1.01 / FACTOR) & (ratio[0] < 0.99)).any(), "nothing lies between the bounds"


@every_scaling
def test_tables_are_cosines_and_sines_times_the_amplitude(name: str) -> None:
    positions = torch.tensor([[0, 1, 5, 28]])
    cos, sin = rotary_tables(spec_of(name), positions, torch.tensor([29]))
    for i, position in enumerate(positions[0].tolist()):
        for pair in range(DIM // 2):
            angle, amplitude = position * expected_frequency(name, pair, 29), AMPLITUDES.get(name, 1.0)
            for column in (pair, pair + DIM // 2):
                assert float(cos[0, i, 0, column]) == pytest.approx(amplitude * math.cos(angle), abs=5e-6)
                assert float(sin[0, i, 0, column]) == pytest.approx(amplitude * math.sin(angle), abs=5e-6)


# Beside transformers

THEIRS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": FACTOR},
    "by parts": {
        "rope_type": "llama3",
        "factor": FACTOR,
        "low_freq_factor": 0.2,
        "high_freq_factor": 0.9,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": FACTOR,
        "beta_fast": 0.9,
        "beta_slow": 0.05,
        "original_max_position_embeddings": ORIGINAL,
    },
    "dynamic": {"rope_type": "dynamic", "factor": FACTOR},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "attention_factor": 1.3,
        "original_max_position_embeddings": ORIGINAL,
    },
}
THEIRS["yarn, not rounded"] = {**THEIRS["yarn"], "truncate": False}
THEIRS["yarn, its own amplitude"] = {**THEIRS["yarn"], "attention_factor": 0.6}


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_frequencies_and_amplitude_are_those_of_transformers(name: str, length: int, partial: float) -> None:
    dim = int(DIM * partial)
    rope = {"rope_theta": BASE, "partial_rotary_factor": partial, **THEIRS[name]}
    changes: dict[str, Any] = {"rotary_dim": dim}
    if name == "longrope":
        rope |= {"short_factor": SHORT[: dim // 2], "long_factor": LONG[: dim // 2]}
        changes |= {"longrope_short_factors": SHORT[: dim // 2], "longrope_long_factors": LONG[: dim // 2]}
    config = LlamaConfig(
        hidden_size=2 * DIM,
        num_attention_heads=2,
        head_dim=DIM,
        # Dynamic scaling starts from the context that the config says.
        max_position_embeddings=ORIGINAL if name == "dynamic" else int(FACTOR * ORIGINAL),
        rope_parameters=rope,
    )
    theirs, amplitude = ROPE_INIT_FUNCTIONS[str(rope["rope_type"])](config, torch.device("cpu"), seq_len=length)
    spec = spec_of(name, **changes)
    torch.testing.assert_close(rotary_frequencies(spec, torch.tensor([length]))[0], theirs, rtol=1e-6, atol=0)
    assert spec.amplitude == pytest.approx(amplitude)


# Which layers


def test_a_local_layer_with_a_base_of_its_own_is_free_of_all_scaling() -> None:
    for name in SCALINGS:
        cfg = config_of(name, rotary_base_local=7.0, window_size=3, attn_types=["local", "global"])
        assert RotarySpec.of(cfg, 0) == RotarySpec(DIM, 7.0)
        assert RotarySpec.of(cfg, 1) == spec_of(name)


# Prompts of several lengths


def test_when_a_rotation_changes_is_a_matter_of_the_original_context() -> None:
    dynamic, longrope, yarn = (config_of(name) for name in ("dynamic", "longrope", "yarn"))
    inside, across, beyond = (3, ORIGINAL), (ORIGINAL, ORIGINAL + 1), (ORIGINAL + 1, ORIGINAL + 2)
    assert [dynamic.rotation_changes(*step) for step in (inside, across, beyond)] == [False, True, True]
    assert [longrope.rotation_changes(*step) for step in (inside, across, beyond)] == [False, True, False]
    assert [yarn.rotation_changes(*step) for step in (inside, across, beyond)] == [False, False, False]
    assert not dynamic.rotation_changes(12, 12)


@by_length
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_prompt_of_a_padded_batch_turns_by_its_own_length(name: str, side: str) -> None:
    model, longest = model_of(name), 14
    lengths = [longest, ORIGINAL + 1, ORIGINAL, 2]
    tokens, mask = tiny_tokens(4, longest), torch.zeros(4, longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        real = slice(longest - length, longest) if side == "left" else slice(0, length)
        mask[row, real] = 1
    with torch.no_grad():
        together = model(tokens, attention_mask=mask)
        for row in range(4):
            kept = mask[row].bool()
            torch.testing.assert_close(together[row, kept], model(tokens[row, kept])[0], rtol=0, atol=1e-12)


@by_length
def test_the_length_reaches_every_position_of_a_prompt(name: str) -> None:
    """The last position of a longer prompt turns the first ones too: causal in the text, not in the frequencies."""
    model, tokens = model_of(name), tiny_tokens(1, 20)
    with torch.no_grad():
        whole = model(tokens)
        assert (model(tokens[:, :6]) - whole[:, :6]).abs().max() > 1e-3
        fixed = model_of("yarn")
        torch.testing.assert_close(fixed(tokens[:, :6]), fixed(tokens)[:, :6], rtol=0, atol=1e-12)


# The key-value cache


def recorded_logits(model: HookedTransformer, prompts: Tensor, mask: Tensor | None, use_cache: bool) -> tuple[Any, Any]:
    """The tokens a greedy generation gives, and the logits of the last position at every step."""
    seen: list[Tensor] = []
    with model.hooks([("unembed.hook_out", lambda logits, hook: seen.append(logits[:, -1].clone()))]):
        out = model.generate(
            prompts,
            max_new_tokens=6,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=use_cache,
            attention_mask=mask,
            verbose=False,
        )
    return out, torch.stack(seen)


@pytest.mark.parametrize("name", ["yarn", *BY_LENGTH])
@pytest.mark.parametrize("padded", [False, True])
def test_generation_across_the_original_context_is_the_same_with_and_without_a_cache(name: str, padded: bool) -> None:
    model, prompts, mask = model_of(name), tiny_tokens(3, 5), None
    if padded:
        # The prompts cross the boundary at different steps, the last one never.
        mask = torch.ones_like(prompts)
        mask[1, :1], mask[2, :4] = 0, 0
    tokens, logits = recorded_logits(model, prompts, mask, use_cache=True)
    expected_tokens, expected = recorded_logits(model, prompts, mask, use_cache=False)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "reads"), [("yarn", 1), ("longrope", 2), ("dynamic", 6)])
def test_generation_reads_the_text_anew_only_when_its_rotation_changes(name: str, reads: int) -> None:
    model, lengths = model_of(name), []
    with model.hooks([("hook_embed", lambda x, hook: lengths.append(x.shape[1]))]):
        model.generate(
            tiny_tokens(1, 5), max_new_tokens=9, stop_at_eos=False, do_sample=False, verbose=False
        )  # positions 5 to 13 are read
    assert len(lengths) == 9
    assert sum(length > 1 for length in lengths) == reads


@by_length
@pytest.mark.parametrize("frozen", [False, True])
def test_a_call_that_would_turn_what_the_cache_holds_raises_and_leaves_the_cache(name: str, frozen: bool) -> None:
    model, tokens = model_of(name), tiny_tokens(1, 12)
    cache = model.new_kv_cache()
    with torch.no_grad():
        model(tokens[:, :6], past_kv_cache=cache)
        assert not model.outgrows(cache, 2)
        assert model.outgrows(cache, 3)
        if frozen:
            cache.freeze()
        with pytest.raises(ValueError, match="with 9 positions this model rotates the 6 in the key-value cache anew"):
            model(tokens[:, 6:9], past_kv_cache=cache)
        assert cache.length == 6
        within = model(tokens[:, 6:8], past_kv_cache=cache)
        torch.testing.assert_close(within, model(tokens[:, :8])[:, 6:], rtol=0, atol=1e-12)


def test_past_the_boundary_a_longrope_model_goes_on_with_its_cache() -> None:
    model, tokens = model_of("longrope"), tiny_tokens(1, 15)
    cache = model.new_kv_cache()
    with torch.no_grad():
        model(tokens[:, :10], past_kv_cache=cache)
        assert not model.outgrows(cache, 5)
        went_on = model(tokens[:, 10:], past_kv_cache=cache)
        torch.testing.assert_close(went_on, model(tokens)[:, 10:], rtol=0, atol=1e-12)


@by_length
def test_one_prompt_that_crosses_the_boundary_is_enough(name: str) -> None:
    model, tokens = model_of(name), tiny_tokens(2, 9)
    mask = torch.ones_like(tokens[:, :8])
    mask[0, :6] = 0
    cache = model.new_kv_cache(2)
    with torch.no_grad():
        model(tokens[:, :8], past_kv_cache=cache, attention_mask=mask)
        with pytest.raises(ValueError, match="out of date: run the whole text with a new cache"):
            model(tokens[:, 8:], past_kv_cache=cache)


@every_scaling
def test_an_empty_cache_takes_a_prompt_of_any_length(name: str) -> None:
    model, tokens = model_of(name), tiny_tokens(1, 12)
    with torch.no_grad():
        cached = model(tokens, past_kv_cache=model.new_kv_cache())
        torch.testing.assert_close(cached, model(tokens), rtol=0, atol=1e-12)
