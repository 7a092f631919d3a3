"""What can be asked of a direct logit attribution, and how it is shown."""

from __future__ import annotations

from typing import Any

import jaxtyping
import pytest
import torch

from hooked_lm import ActivationCache, HookedTransformer
from hooked_lm.circuits.direct_logit import hooks_for_attribution, logit_attribution
from hooked_lm.names import UnknownHookError
from tests.direct_logit_helpers import BATCH, MODELS, POS, SPLITS, attributed, recorded, splits_of
from tests.helpers import VOCAB, LargestTensor, tiny_config, tiny_model, tiny_tokenizer, tiny_tokens

# What is asked for


def test_each_prompt_may_have_a_token_and_a_position_of_its_own() -> None:
    model = tiny_model()
    cache = recorded(model)
    logits = cache["unembed.hook_out"].detach()
    pos, tokens, wrong = torch.tensor([2, -1]), torch.tensor([3, 4]), [8, 0]
    for split in SPLITS:
        attribution = attributed(cache, split, tokens=tokens, incorrect_tokens=wrong, pos=pos)
        assert attribution.logit.tolist() == [
            float(logits[0, 2, 3] - logits[0, 2, 8]),
            float(logits[1, 6, 4] - logits[1, 6, 0]),
        ]
        alone = attributed(cache, split, tokens=4, incorrect_tokens=0, pos=6)
        torch.testing.assert_close(attribution.values[:, 1], alone.values[:, 1])
    torch.testing.assert_close(
        logit_attribution(cache, 3).values, attributed(cache, "component", incorrect_tokens=None, pos=6).values
    )


def test_tokens_may_be_strings() -> None:
    model = tiny_model(d_vocab=VOCAB, n_ctx=64)
    model.set_tokenizer(tiny_tokenizer())
    cache = model.run_with_cache("Mary went to the store")[1]
    by_string = logit_attribution(cache, "Par", ["is"])
    by_number = logit_attribution(cache, model.to_single_token("Par"), model.to_single_token("is"))
    assert torch.equal(by_string.values, by_number.values)


def test_only_the_layers_asked_for_are_taken_apart() -> None:
    cache = recorded(tiny_model())
    whole, heads, some = (
        attributed(cache, "component"),
        attributed(cache, "head"),
        attributed(cache, "head", layers=[1]),
    )
    assert some.layers == (1,)
    assert torch.equal(some.grid, heads.grid[1:])
    assert some.labels[:3] == ["L1H0", "L1H1", "L1H2"]
    label = "0_attn_out"
    assert torch.equal(some.rest[some.rest_labels.index(label)], whole.values[whole.labels.index(label)])


def test_neurons_of_dense_layers_can_be_split_where_others_hold_experts() -> None:
    model = tiny_model(num_experts=4, experts_per_token=2, moe_layers=[True, False])
    attribution = attributed(recorded(model), "neuron", layers=[1])
    assert attribution.grid.shape == (1, 48, BATCH)
    assert "0_mlp_out" in attribution.rest_labels
    with pytest.raises(ValueError, match=r"layers \[0\] add the output of experts"):
        attributed(recorded(model), "neuron")


def test_a_run_without_a_batch_axis_or_with_one_position_recorded_will_do() -> None:
    model, tokens = tiny_model(), tiny_tokens(batch=1)
    whole = model.run_with_cache(tokens)[1]
    bare = model.run_with_cache(tokens, remove_batch_dim=True)[1]
    for split in SPLITS:
        assert torch.equal(attributed(bare, split).values, attributed(whole, split).values)
    last = model.run_with_cache(tokens, pos_slice=[POS])[1]
    for split in ("component", "head", "neuron"):
        torch.testing.assert_close(attributed(last, split, pos=-1).values, attributed(whole, split).values)
    with pytest.raises(ValueError, match="attends to 7 positions, and the cache has values of 1"):
        attributed(last, "source", pos=-1)


def test_a_run_that_kept_some_logits_only_raises() -> None:
    cache = tiny_model().run_with_cache(tiny_tokens(), logits_to_keep=1)[1]
    with pytest.raises(ValueError, match="7 positions in this cache and the logits 1: record the run without"):
        logit_attribution(cache, 3)


@pytest.mark.parametrize(
    "name",
    ["layer norm", "norms before and after", "norms on the stream, attention-only", "soft-capped logits", "no norm"],
)
def test_the_activations_that_are_needed_are_those_that_are_named(name: str) -> None:
    model = tiny_model(**MODELS[name])
    everything = recorded(model)
    for split in splits_of(model):
        names = hooks_for_attribution(model, split)  # type: ignore[arg-type]
        cache = model.run_with_cache(tiny_tokens(batch=BATCH), names_filter=names)[1]
        torch.testing.assert_close(attributed(cache, split).values, attributed(everything, split).values)
        for missing in names:
            rest = {key: value for key, value in cache.cache_dict.items() if key != missing}
            with pytest.raises(UnknownHookError, match=missing):
                attributed(ActivationCache(rest, model), split)


def test_a_soft_capped_logit_is_split_before_the_cap_or_not_at_all() -> None:
    model = tiny_model(output_logits_soft_cap=0.2)
    cache = recorded(model)
    with pytest.raises(ValueError, match=r"soft-capped at 0\.2, and a capped logit is no sum of parts"):
        logit_attribution(cache, 3)
    attribution = logit_attribution(cache, 3, before_soft_cap=True)
    said = cache["unembed.hook_out"][:, -1, 3].detach()
    assert float((attribution.logit - said).abs().max()) > 0.02  # the cap is within reach
    torch.testing.assert_close(0.2 * torch.tanh(attribution.values.sum(0) / 0.2), said)
    with model.hooks(fwd_hooks=[("unembed.hook_out", lambda x, hook: x * 0.9)]):
        changed = recorded(model)
    with pytest.raises(ValueError, match=r"computed again from unembed\.hook_in is"):
        logit_attribution(changed, 3, before_soft_cap=True)


@pytest.mark.parametrize(
    ("changes", "call", "said"),
    [
        ({}, {"split": "component", "layers": [0]}, "a split by component takes none apart"),
        ({}, {"split": "head", "layers": [2]}, "layers are some of 0-1"),
        ({}, {"split": "head", "layers": []}, "layers are some of 0-1"),
        ({"attn_only": True}, {"split": "neuron"}, "attention-only: it has no neurons"),
        ({}, {"tokens": 20}, "tokens are 0-19, got 20"),
        ({}, {"tokens": [3, 4, 5]}, "one for each of 2 prompts"),
        ({}, {"tokens": torch.tensor([0.5, 1.0])}, "one for each of 2 prompts"),
        ({}, {"incorrect_tokens": -1}, "tokens are 0-19, got -1"),
        ({}, {"pos": 7}, "pos 7 is out of range: the cached logits have 7 positions"),
        ({}, {"pos": -8}, "pos -8 is out of range"),
        ({}, {"pos": torch.tensor([0, 1, 2])}, "one for each of 2 prompts"),
    ],
)
def test_what_cannot_be_asked_raises(changes: dict[str, Any], call: dict[str, Any], said: str) -> None:
    cache = recorded(tiny_model(**changes))
    with pytest.raises(ValueError, match=said):
        logit_attribution(cache, **{"tokens": 3, **call})


def test_a_split_nobody_knows_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests
    cache = recorded(tiny_model())
    for ask in (lambda split: attributed(cache, split), lambda split: hooks_for_attribution(cache.model, split)):
        with pytest.raises(ValueError, match="split is one of component, head, neuron, source, not 'layer'"):
            ask("layer")


def test_neither_heads_nor_sources_nor_neurons_are_written_out() -> None:
    model = HookedTransformer(
        tiny_config(n_layers=1, n_heads=8, d_head=4, d_model=64, d_mlp=256, n_ctx=40, d_vocab=8, dtype=torch.float32)
    )
    cache = model.run_with_cache(tiny_tokens(batch=3, pos=40, vocab=8))[1]
    recorded_most = max(activation.numel() for activation in cache.values())  # 38,400: the pattern
    for split in SPLITS:
        with LargestTensor() as largest:
            logit_attribution(cache, 3, split=split)  # type: ignore[arg-type]
        assert (
            largest.numbers <= recorded_most
        )  # [batch head key d_model] would be 61,440, [batch neuron d_model] 49,152


# For people


def test_labels_name_layer_head_neuron_and_source() -> None:
    cache = recorded(tiny_model())
    sources = attributed(cache, "source", layers=[1])
    assert sources.labels[:8] == [*(f"L1H0<{key}" for key in range(7)), "L1H1<0"]
    assert sources.label(20) == "L1H2<6"
    assert attributed(cache, "neuron").label(50) == "L1N2"
    assert attributed(cache, "head").labels[:6] == ["L0H0", "L0H1", "L0H2", "L1H0", "L1H1", "L1H2"]
    with pytest.raises(IndexError, match="no part 99: there are parts 0-"):
        attributed(cache, "component").label(99)
    with pytest.raises(ValueError, match="a split by component has no grid"):
        _ = attributed(cache, "component").grid


def test_the_table_holds_the_largest_parts_the_others_and_the_sum() -> None:
    attribution = attributed(recorded(tiny_model()), "head")
    means = dict(zip(attribution.labels, attribution.values.mean(-1).tolist(), strict=True))
    order = sorted(means, key=lambda label: -abs(means[label]))
    assert [label for label, _ in attribution.top(4)] == order[:4]
    lines = [line.rsplit(maxsplit=1) for line in attribution.table(2).splitlines()]
    assert [line[0] for line in lines] == [*order[:2], "all others", "sum"]
    numbers = [float(line[1]) for line in lines]
    assert numbers[0] == pytest.approx(means[order[0]], abs=1e-4)
    assert numbers[-1] == pytest.approx(float(attribution.logit.mean()), abs=1e-4)
    assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=1e-3)
    assert len(attribution.top(1000, prompt=1)) == len(attribution.labels)
    with pytest.raises(ValueError, match="prompt in 0-1"):
        attribution.top(3, prompt=2)
