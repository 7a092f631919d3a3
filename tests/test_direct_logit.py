"""Every split of a logit sums to it, and each part is what the logit loses when that part alone is taken away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch

from hooked_lm import ActivationCache, HookedTransformer
from hooked_lm.circuits.direct_logit import LogitAttribution, hooks_for_attribution, logit_attribution
from hooked_lm.circuits.induction import repeated_random_tokens
from hooked_lm.names import UnknownHookError
from tests.helpers import VOCAB, tiny_config, tiny_model, tiny_tokenizer, tiny_tokens
from tests.test_full_circuits import LargestTensor

BATCH, POS = 2, 5
SPLITS = ("component", "head", "neuron", "source")
MODELS: dict[str, dict[str, Any]] = {
    "layer norm": {},
    "folded": {"normalization_type": "LNPre"},
    "RMS norm, gated, grouped, rotary": {
        "normalization_type": "RMS",
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "n_heads": 6,
        "d_head": 4,
        "n_key_value_heads": 2,
    },
    "norms before and after": {"norm_placement": "before_and_after"},
    "RMS norms after": {"norm_placement": "after", "normalization_type": "RMS"},
    "norms on the stream": {"norm_placement": "residual"},
    "norms on the stream, attention-only": {"norm_placement": "residual", "attn_only": True, "final_norm": False},
    "parallel, scaled logits": {"parallel_attn_mlp": True, "logit_scale": 0.3},
    "soft-capped logits": {"output_logits_soft_cap": 1.5, "logit_scale": 0.7},
    "no norm": {"normalization_type": None},
    "an RMS norm at the end": {"final_rms": True},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "scaled and normalised embeddings": {"embedding_scale": 3.0, "post_embedding_ln": True},
    "tied": {"tie_word_embeddings": True},
    "attention sinks, a window": {"attention_sinks": True, "window_size": 3},
    "mixture of experts": {"num_experts": 4, "experts_per_token": 2},
    "normalised activations": {"act_fn": "solu_ln"},
}
models = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())


def splits_of(model: HookedTransformer) -> list[str]:
    without_neurons = model.cfg.attn_only or model.cfg.num_experts is not None
    return [split for split in SPLITS if split != "neuron" or not without_neurons]


def recorded(model: HookedTransformer, pos: int = 7) -> ActivationCache:
    return model.run_with_cache(tiny_tokens(batch=BATCH, pos=pos))[1]


def before_cap(model: HookedTransformer, logits: torch.Tensor) -> torch.Tensor:
    cap = model.cfg.output_logits_soft_cap
    return cap * torch.atanh(logits / cap) if cap > 0 else logits


def attributed(cache: ActivationCache, split: str, **changes: Any) -> LogitAttribution:
    call = {"tokens": 3, "incorrect_tokens": 8, "pos": POS, "before_soft_cap": True, **changes}
    return logit_attribution(cache, split=split, **call)


# The parts


def lost_without(
    model: HookedTransformer, cache: ActivationCache, site: str, silence: Callable[[torch.Tensor], None]
) -> torch.Tensor:
    """How much the logit difference loses when something is silenced and all else, norms too, is held where it was."""
    layer = site.split(".")[1] if "." in site else ""
    module = "attn" if "attn" in site else "mlp"

    def held(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return cache[hook.name]

    def silenced(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        silence(x)
        return x

    scales = [name for name in cache if name.endswith("hook_scale") and ("post" in name or "final" in name)]
    if model.cfg.norm_placement == "residual":
        scales = [
            name for name in cache if name.endswith("hook_scale") and ".attn." not in name and ".mlp." not in name
        ]
    outputs = [name for name in cache if name.endswith(("attn_out", "mlp_out"))]
    outputs = [name for name in outputs if name != f"blocks.{layer}.hook_{module}_out"]
    hooks = [*((name, held) for name in (*scales, *outputs)), (site, silenced)]
    ablated = model.run_with_hooks(tiny_tokens(batch=BATCH), fwd_hooks=hooks)
    clean, ablated = (before_cap(model, logits)[:, POS] for logits in (cache["unembed.hook_out"], ablated))
    return (clean[:, 3] - clean[:, 8]) - (ablated[:, 3] - ablated[:, 8])


@models
@torch.no_grad()
def test_a_component_adds_what_the_logit_loses_without_it(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    cache = recorded(model)
    attribution = attributed(cache, "component")
    values = dict(zip(attribution.labels, attribution.values, strict=True))
    written = [label for label in values if label.endswith("_out")]
    assert written == [f"{layer}_{site}_out" for layer in (0, 1) for site in ("attn", "mlp")[: 2 - model.cfg.attn_only]]
    for label in written:
        layer, _, site = label.partition("_")
        lost = lost_without(model, cache, f"blocks.{layer}.hook_{site}", torch.Tensor.zero_)
        torch.testing.assert_close(values[label], lost)
    torch.testing.assert_close(values["embed"], lost_without(model, cache, "hook_embed", torch.Tensor.zero_))
    if model.cfg.positional_embedding_type == "standard":
        lost = lost_without(model, cache, "hook_pos_embed", torch.Tensor.zero_)
        torch.testing.assert_close(values["pos_embed"], lost)


@models
@torch.no_grad()
def test_a_head_adds_what_the_logit_loses_without_it(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    cache = recorded(model)
    grid = attributed(cache, "head").grid
    assert grid.shape == (2, model.cfg.n_heads, BATCH)
    for layer in (0, 1):
        for head in range(model.cfg.n_heads):
            lost = lost_without(model, cache, f"blocks.{layer}.attn.hook_z", lambda z, h=head: z[:, :, h].zero_())
            torch.testing.assert_close(grid[layer, head], lost)


@models
@torch.no_grad()
def test_a_source_position_adds_what_the_logit_loses_when_the_head_does_not_see_it(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    cache = recorded(model)
    grid = attributed(cache, "source").grid
    assert grid.shape == (2, model.cfg.n_heads, 7, BATCH)
    head = model.cfg.n_heads - 2
    for layer in (0, 1):
        for key in (0, 3, POS, POS + 1):
            lost = lost_without(
                model, cache, f"blocks.{layer}.attn.hook_pattern", lambda p, k=key: p[:, head, POS, k].zero_()
            )
            torch.testing.assert_close(grid[layer, head, key], lost)
    torch.testing.assert_close(grid.sum(2), attributed(cache, "head").grid)


@pytest.mark.parametrize("name", [name for name in MODELS if "attention-only" not in name and "experts" not in name])
@torch.no_grad()
def test_a_neuron_adds_what_the_logit_loses_without_it(name: str) -> None:
    model = tiny_model(**MODELS[name])
    cache = recorded(model)
    grid = attributed(cache, "neuron").grid
    assert grid.shape == (2, 48, BATCH)
    for layer in (0, 1):
        for neuron in (0, 17, 47):
            lost = lost_without(model, cache, f"blocks.{layer}.mlp.hook_post", lambda x, n=neuron: x[..., n].zero_())
            torch.testing.assert_close(grid[layer, neuron], lost)


def test_the_parts_are_those_of_the_caches_own_decompositions() -> None:
    cache = recorded(tiny_model())
    tokens, wrong = torch.tensor([3, 4]), torch.tensor([8, 0])

    def by_the_cache(stack: torch.Tensor) -> torch.Tensor:
        return cache.logit_attrs(stack, tokens, wrong, pos_slice=POS).detach()

    def ours(split: str) -> LogitAttribution:
        return attributed(cache, split, tokens=tokens, incorrect_tokens=wrong)

    components = cache.decompose_resid(pos_slice=POS)
    torch.testing.assert_close(ours("component").values[: len(components)], by_the_cache(components))
    heads = cache.stack_head_results(pos_slice=POS)
    torch.testing.assert_close(ours("head").grid.flatten(0, 1), by_the_cache(heads))
    neurons = cache.stack_neuron_results(None, pos_slice=POS)
    torch.testing.assert_close(ours("neuron").grid.flatten(0, 1), by_the_cache(neurons))


# The sum


@models
def test_every_split_sums_to_what_the_model_said(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    cache = recorded(model)
    logits = before_cap(model, cache["unembed.hook_out"])[:, POS].detach()
    for split in splits_of(model):
        for wrong, expected in ((None, logits[:, 3]), (8, logits[:, 3] - logits[:, 8])):
            attribution = attributed(cache, split, incorrect_tokens=wrong)
            torch.testing.assert_close(attribution.logit, expected)
            torch.testing.assert_close(attribution.values.sum(0), expected)
            assert attribution.off < 1e-13
            assert len(attribution.rest_labels) == len(set(attribution.rest_labels)) == len(attribution.rest)


def test_the_biases_are_parts_of_their_own() -> None:
    model = tiny_model()
    unembedding = model.W_U[:, 3].detach()
    attribution = attributed(recorded(model), "head", incorrect_tokens=None)
    rest = dict(zip(attribution.rest_labels, attribution.rest, strict=True))
    expected = ["embed", "pos_embed", "0_mlp_out", "1_mlp_out", "0_b_O", "1_b_O", "ln_final.b", "unembed.b_U"]
    assert list(rest) == expected
    torch.testing.assert_close(rest["unembed.b_U"], model.b_U[3].detach().expand(2))
    torch.testing.assert_close(rest["ln_final.b"], (model.ln_final.b.detach() @ unembedding).expand(2))
    assert "1_b_out" in attributed(recorded(model), "neuron").rest_labels
    placed = attributed(recorded(tiny_model(norm_placement="before_and_after")), "head").rest_labels
    assert "0_ln1_post.b" in placed
    assert "0_ln2_post.b" not in placed  # that one is in 0_mlp_out, which is left whole
    stream = attributed(recorded(tiny_model(norm_placement="residual")), "component").rest_labels
    assert stream[-6:] == ("0_ln1.b", "0_ln2.b", "1_ln1.b", "1_ln2.b", "ln_final.b", "unembed.b_U")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", SPLITS)
def test_sums_hold_to_the_precision_of_the_model(dtype: torch.dtype, split: str) -> None:
    attribution = attributed(recorded(tiny_model(dtype=dtype)), split)
    assert attribution.values.dtype == torch.float32
    assert attribution.off < (1e-5 if dtype == torch.float32 else 0.1)


EDITS = {
    # site: the splits that cannot hold any more once it is edited
    "blocks.1.hook_resid_pre": SPLITS,
    "blocks.0.hook_resid_mid": SPLITS,
    "ln_final.hook_normalized": SPLITS,
    "unembed.hook_out": SPLITS,
    "blocks.1.hook_attn_out": ("head", "source"),
    "blocks.1.hook_mlp_out": ("neuron",),
    "blocks.1.attn.hook_z": ("source",),
    "blocks.1.attn.hook_pattern": (),
    "blocks.0.mlp.hook_pre": (),
}


@pytest.mark.parametrize("site", EDITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_run_that_was_changed_on_the_way_to_the_logit_does_not_sum_and_raises(site: str, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    with model.hooks(fwd_hooks=[(site, lambda x, hook: x * 1.001)]):
        cache = recorded(model)
    for split in SPLITS:
        if split in EDITS[site]:
            with pytest.raises(ValueError, match=r"off by .*A hook or intervention changed the run"):
                attributed(cache, split)
        else:
            attributed(cache, split)


def test_the_error_says_by_how_much_the_sum_is_off_and_which_layer_it_was() -> None:
    model = tiny_model()

    def raised(logits: torch.Tensor, hook: Any) -> torch.Tensor:
        logits = logits.clone()
        logits[1, POS, 3] += 0.125
        return logits

    with model.hooks(fwd_hooks=[("unembed.hook_out", raised)]):
        cache = recorded(model)
    with pytest.raises(ValueError, match=r"the parts sum to .* \(prompt 1\): off by 0\.125, and float error explains"):
        attributed(cache, "head")
    with model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", lambda x, hook: x * 1.1)]):
        cache = recorded(model)
    with pytest.raises(ValueError, match="the parts of 1_attn_out sum to"):
        attributed(cache, "source")


def test_weights_that_are_not_those_of_the_run_raise() -> None:
    model = tiny_model()
    cache = recorded(model)
    with torch.no_grad():
        model.blocks[0].attn.W_O[1] *= 1.01
    attributed(cache, "component")
    with pytest.raises(ValueError, match="the weights are not those of the run"):
        attributed(cache, "head")


def test_what_counts_as_float_error_follows_the_precision_of_the_run() -> None:
    model = tiny_model(dtype=torch.float32)
    with model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", lambda x, hook: x * 1.001)]):
        cache = recorded(model)
    with pytest.raises(ValueError, match="then say precision="):
        attributed(cache, "head")
    assert attributed(cache, "head", precision=2**-10).off < 1e-2
    with pytest.raises(ValueError, match="precision is relative, between 0 and 1, got 0"):
        attributed(cache, "head", precision=0.0)


# Known answers


def averaging_copier() -> HookedTransformer:
    """One head that attends to all positions alike and copies them three-fold into the logits; no norm, no MLP."""
    model = HookedTransformer(
        tiny_config(
            n_layers=1,
            d_model=20,
            n_heads=2,
            d_head=20,
            attn_only=True,
            normalization_type=None,
            positional_embedding_type="none",
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E.copy_(torch.eye(20))
        model.unembed.W_U.copy_(torch.eye(20))
        model.unembed.b_U[5] = 0.25
        model.blocks[0].attn.W_V[1].copy_(torch.eye(20))
        model.blocks[0].attn.W_O[1].copy_(3 * torch.eye(20))
    return model


def test_a_hand_built_head_copies_from_where_the_token_stands() -> None:
    tokens = torch.tensor([[5, 2, 5, 7], [1, 5, 5, 5]])
    cache = averaging_copier().run_with_cache(tokens)[1]
    attribution = logit_attribution(cache, 5, split="source")
    third = 3 / 4  # three-fold, over four positions
    assert attribution.logit.tolist() == [2 * third + 0.25, 3 * third + 0.25 + 1]
    assert attribution.grid[0, 1].T.tolist() == [[third, 0, third, 0], [0, third, third, third]]
    assert attribution.grid[0, 0].abs().max() == 0
    rest = dict(zip(attribution.rest_labels, attribution.rest.tolist(), strict=True))
    assert rest == {"embed": [0.0, 1.0], "0_b_O": [0.0, 0.0], "unembed.b_U": [0.25, 0.25]}
    assert attribution.top(2, prompt=0) == [("L0H1<0", third), ("L0H1<2", third)]
    assert attribution.top(1, prompt=1) == [("embed", 1.0)]


def test_in_the_demo_model_the_induction_head_writes_the_answer_from_where_it_came_before() -> None:
    model = HookedTransformer.from_pretrained("demo-induction-2l")
    tokens = repeated_random_tokens(8, 12, model.cfg.d_vocab, torch.Generator().manual_seed(0))
    query = 21  # the token there stood 12 back, so that 10 is where its successor did
    names = hooks_for_attribution(model, "source")
    cache = model.run_with_cache(tokens, names_filter=names)[1]
    attribution = logit_attribution(cache, tokens[:, query + 1], pos=query, split="source")
    for prompt in range(8):
        assert attribution.top(1, prompt)[0][0] == "L1H1<10"
    assert float((attribution.grid[1, 1, 10] / attribution.logit).min()) > 0.8
    assert float(attribution.grid[1, [0, 2, 3]].sum((0, 1)).abs().max()) < 0.5


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
    with pytest.raises(ValueError, match=r"layers \[0\] are mixtures of experts"):
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
