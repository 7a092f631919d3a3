"""Ablation and causal tracing equal plain hooked runs, and say what a trained model needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, UnknownHookError, metrics
from hooked_lm.circuits.induction import repeated_random_tokens
from hooked_lm.patching import ablate, causal_trace
from tests.helpers import tiny_model, tiny_tokens

TOKENS, OTHERS = tiny_tokens(3, 5, seed=1), tiny_tokens(4, 5, seed=2)
METRIC = metrics.logit([3, 4, 5])
QUIET: dict[str, Any] = {"verbose": False}
Edit = Callable[[Tensor], None]


def scores_with(model: HookedTransformer, site: str, edit: Edit, **kwargs: Any) -> Tensor:
    """Each prompt's logit of its answer when an activation is edited in place."""

    def hook_function(x: Tensor, hook: Any) -> Tensor:
        edit(x)
        return x

    logits = model.run_with_hooks(TOKENS, fwd_hooks=[(site, hook_function)], **kwargs)
    return torch.stack([logits[prompt, -1, 3 + prompt] for prompt in range(3)]).detach()


def intact(model: HookedTransformer) -> Tensor:
    return scores_with(model, "blocks.0.hook_resid_pre", lambda x: None)


def setting(index: tuple[Any, ...], value: Tensor | float) -> Edit:
    def edit(x: Tensor) -> None:
        x[index] = value

    return edit


ALL = slice(None)

# What is ablated -> its axes after the layer, its hook, and where in [batch pos ...] a cell lies.
UNITS: dict[str, tuple[tuple[str, ...], str, Callable[..., tuple[Any, ...]]]] = {
    "heads": (("head",), "attn.hook_z", lambda head: (ALL, ALL, head)),
    "attention": ((), "hook_attn_out", lambda: (ALL,)),
    "mlps": ((), "hook_mlp_out", lambda: (ALL,)),
    "neurons": (("neuron",), "mlp.hook_post", lambda neuron: (ALL, ALL, neuron)),
    "positions": (("pos",), "hook_resid_pre", lambda pos: (ALL, pos)),
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"d_mlp": 6},
    "grouped and gated": {"d_mlp": 6, "n_key_value_heads": 1, "gated_mlp": True, "normalization_type": "RMS"},
}


def every_cell(shape: torch.Size) -> list[tuple[int, ...]]:
    return [tuple(cell) for cell in torch.ones(shape).nonzero().tolist()]


# Ablation


@pytest.mark.parametrize("unit", list(UNITS))
@pytest.mark.parametrize("kind", list(MODELS))
def test_zero_ablation_is_a_hooked_run_with_zeros(kind: str, unit: Any) -> None:
    model = tiny_model(**MODELS[kind])
    result = ablate(model, TOKENS, METRIC, unit, **QUIET)
    inner, site, where = UNITS[unit]
    assert result.axes == ("layer", *inner)
    assert result.effect.shape[0] == 2
    for layer, *cell in every_cell(result.effect.shape):
        expected = scores_with(model, f"blocks.{layer}.{site}", setting(where(*cell), 0.0))
        torch.testing.assert_close(result.scores[(layer, *cell)], expected)
    torch.testing.assert_close(result.intact, intact(model))
    torch.testing.assert_close(result.effect, (result.scores - intact(model)).mean(-1))
    assert result.effect.std() > 1e-4


@pytest.mark.parametrize("unit", list(UNITS))
def test_mean_ablation_puts_in_the_mean_over_prompts_and_positions(unit: Any) -> None:
    model = tiny_model(d_mlp=6)
    _, site, where = UNITS[unit]
    result = ablate(model, TOKENS, METRIC, unit, "mean", reference=OTHERS[:, :4], **QUIET)
    _, cache = model.run_with_cache(OTHERS[:, :4])
    for layer, *cell in every_cell(result.effect.shape):
        name = f"blocks.{layer}.{site}"
        mean = sum(cache[name][prompt, pos] for prompt in range(4) for pos in range(4)) / 16
        place = where(*cell)
        value = mean.expand(3, 5, *mean.shape)[place]
        torch.testing.assert_close(result.scores[(layer, *cell)], scores_with(model, name, setting(place, value)))


@pytest.mark.parametrize("unit", list(UNITS))
def test_mean_ablation_per_position_puts_in_the_mean_at_each_position(unit: Any) -> None:
    model = tiny_model(d_mlp=6)
    _, site, where = UNITS[unit]
    result = ablate(model, TOKENS, METRIC, unit, "mean", reference=OTHERS, per_position=True, **QUIET)
    _, cache = model.run_with_cache(OTHERS)
    for layer, *cell in every_cell(result.effect.shape):
        name = f"blocks.{layer}.{site}"
        mean = sum(cache[name][prompt] for prompt in range(4)) / 4  # [pos ...]
        place = where(*cell)
        value = mean.expand(3, *mean.shape)[place]
        torch.testing.assert_close(result.scores[(layer, *cell)], scores_with(model, name, setting(place, value)))


def test_by_default_means_are_over_the_prompts_themselves() -> None:
    model = tiny_model()
    own = ablate(model, TOKENS, METRIC, "heads", "mean", **QUIET)
    torch.testing.assert_close(
        own.scores, ablate(model, TOKENS, METRIC, "heads", "mean", reference=TOKENS, **QUIET).scores
    )
    other = ablate(model, TOKENS, METRIC, "heads", "mean", reference=OTHERS, **QUIET)
    assert not torch.allclose(own.scores, other.scores)


def test_padding_counts_for_nothing_in_a_mean() -> None:
    model = tiny_model()
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    padded = ablate(model, TOKENS, METRIC, "heads", "mean", reference=OTHERS[:1], reference_mask=mask, **QUIET)
    alone = ablate(model, TOKENS, METRIC, "heads", "mean", reference=OTHERS[:1, 2:], **QUIET)
    torch.testing.assert_close(padded.scores, alone.scores)


@pytest.mark.parametrize("unit", list(UNITS))
def test_resampling_puts_in_what_the_activation_is_in_another_prompt(unit: Any) -> None:
    model = tiny_model(d_mlp=6)
    _, site, where = UNITS[unit]
    # With one reference prompt there is nothing to draw.
    result = ablate(model, TOKENS, METRIC, unit, "resample", reference=OTHERS[:1], **QUIET)
    _, cache = model.run_with_cache(OTHERS[:1])
    for layer, *cell in every_cell(result.effect.shape):
        name, place = f"blocks.{layer}.{site}", where(*cell)
        value = cache[name].expand(3, *cache[name].shape[1:])[place]
        torch.testing.assert_close(result.scores[(layer, *cell)], scores_with(model, name, setting(place, value)))


def test_a_prompt_never_stands_in_for_itself_and_over_many_draws_each_other_does_equally_often() -> None:
    model = tiny_model()
    result = ablate(model, TOKENS, METRIC, "positions", "resample", n_draws=400, layers=[1], by_pos=[-1], **QUIET)
    _, cache = model.run_with_cache(TOKENS)
    stream = cache["resid_pre", 1][:, -1]
    shifted = [scores_with(model, "blocks.1.hook_resid_pre", setting((ALL, -1), stream.roll(by, 0))) for by in (1, 2)]
    # The mean of the draws is a mixture of both other prompts, about half and half.
    share = (result.scores[0, 0] - shifted[0]) / (shifted[1] - shifted[0])
    torch.testing.assert_close(share, torch.full_like(share, 0.5), atol=0.1, rtol=0)
    # With two prompts the draw is certain: the other one.
    pair = ablate(model, TOKENS[:2], metrics.logit([3, 4]), "positions", "resample", layers=[1], by_pos=[-1], **QUIET)
    swapped = model.run_with_hooks(
        TOKENS[:2],
        fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: torch.cat((x[:, :-1], x[:, -1:].flip(0)), 1))],
    )
    torch.testing.assert_close(pair.scores[0, 0], torch.stack([swapped[0, -1, 3], swapped[1, -1, 4]]).detach())


def test_the_seed_decides_the_draws() -> None:
    model = tiny_model()

    def scores(seed: int) -> Tensor:
        return ablate(model, TOKENS, METRIC, "heads", "resample", reference=OTHERS, seed=seed, **QUIET).scores

    before = torch.get_rng_state()
    torch.testing.assert_close(scores(0), scores(0))
    assert len({tuple(scores(seed).flatten().tolist()) for seed in range(4)}) > 1
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("unit", ["heads", "attention", "mlps", "neurons"])
@pytest.mark.parametrize("method", ["zero", "mean", "resample"])
def test_parts_can_be_ablated_at_one_position_at_a_time(unit: Any, method: Any) -> None:
    model = tiny_model(d_mlp=6)
    inner, site, where = UNITS[unit]
    how = {} if method == "zero" else {"reference": OTHERS[:1]}
    result = ablate(model, TOKENS, METRIC, unit, method, by_pos=True, **how, **QUIET)  # type: ignore[arg-type]
    assert result.axes == ("layer", "pos", *inner)
    assert result.positions == tuple(range(5))
    _, cache = model.run_with_cache(OTHERS[:1])
    for layer, pos, *cell in every_cell(result.effect.shape):
        name = f"blocks.{layer}.{site}"
        there = torch.zeros_like(cache[name]) if method == "zero" else cache[name]
        if method == "mean":
            there = there.mean(1, keepdim=True).expand_as(there)
        place = where(*cell)
        at_pos = (ALL, pos, *place[2:])
        value = there.expand(3, *there.shape[1:])[at_pos]
        torch.testing.assert_close(result.scores[(layer, pos, *cell)], scores_with(model, name, setting(at_pos, value)))


def test_layers_positions_and_neurons_can_be_chosen() -> None:
    model = tiny_model(d_mlp=6)
    whole = ablate(model, TOKENS, METRIC, "neurons", by_pos=True, **QUIET)
    some = ablate(model, TOKENS, METRIC, "neurons", by_pos=[-1, 2], layers=[-1], neurons=[5, 0, 3], **QUIET)
    assert (some.layers, some.positions, some.neurons) == ((1,), (4, 2), (5, 0, 3))
    torch.testing.assert_close(some.scores, whole.scores[1:][:, [4, 2]][:, :, [5, 0, 3]])
    assert whole.neurons == tuple(range(6))
    assert ablate(model, TOKENS, METRIC, "heads", **QUIET).positions is None


def test_a_function_on_logits_serves_as_a_metric_for_ablation() -> None:
    model = tiny_model()
    mine = ablate(model, TOKENS, lambda logits: torch.stack([logits[i, -1, 3 + i] for i in range(3)]).mean(), **QUIET)
    assert mine.scores.shape == (2, 3, 1)
    torch.testing.assert_close(mine.effect, ablate(model, TOKENS, METRIC, **QUIET).effect)


def test_zeroing_the_stream_at_every_layer_leaves_no_trace_of_the_token() -> None:
    model = tiny_model()
    changed = TOKENS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 20
    scores = [
        ablate(model, tokens, METRIC, "positions", layers=[0], by_pos=[-1], **QUIET) for tokens in (TOKENS, changed)
    ]
    torch.testing.assert_close(scores[0].scores, scores[1].scores)
    assert not torch.allclose(scores[0].intact, scores[1].intact)


def test_the_ablation_scores_cannot_be_changed_and_say_what_they_are() -> None:
    result = ablate(tiny_model(), TOKENS, METRIC, **QUIET)
    assert repr(result).startswith("AblationScores('heads', 'zero', layer 2, head 3, intact ")
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.method = "mean"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"unit": "head"}, "unit is one of heads, attention, mlps, neurons, positions; got 'head'"),
        ({"method": "noise"}, "method is one of zero, mean, resample; got 'noise'"),
        ({"layers": [2]}, "no layer 2: there are layers 0-1"),
        ({"layers": []}, "there is no layer to ablate"),
        ({"by_pos": [5]}, "no position 5: there are positions 0-4"),
        ({"unit": "neurons", "neurons": [6]}, "no neuron 6: there are neurons 0-5"),
        ({"neurons": [1]}, "neurons are chosen among neurons; the unit is 'heads'"),
        ({"reference": OTHERS}, "method 'zero' takes nothing from a reference"),
        ({"method": "mean", "reference_mask": torch.ones(3, 5)}, "reference_mask belongs to a reference"),
        ({"method": "resample", "per_position": True}, "per_position is about means"),
        ({"method": "mean", "n_draws": 2}, "1 unless the method is 'resample'; got 2 for 'mean'"),
        ({"method": "resample", "n_draws": 0}, "n_draws is 1 or more"),
        ({"method": "mean", "per_position": True, "reference": OTHERS[:, :4]}, "5 positions, the reference 4"),
        ({"method": "resample", "reference": OTHERS[:, :4]}, "5 positions, the reference 4"),
        (
            {"method": "resample", "attention_mask": torch.tensor([[0, 1, 1, 1, 1]] + [[1] * 5] * 2)},
            "padding shifts positions",
        ),
        ({"metric": lambda logits: logits[:, -1, 0]}, r"returned shape \(3,\)"),
        ({"metric": lambda logits: logits.mean() * float("nan")}, "is not a number"),
    ],
)
def test_ablations_that_make_no_sense_raise(how: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ablate(tiny_model(d_mlp=6), TOKENS, **{"metric": METRIC, **how}, **QUIET)


def test_a_single_prompt_has_no_other_to_be_resampled_from() -> None:
    with pytest.raises(ValueError, match="a single prompt has no other"):
        ablate(tiny_model(), TOKENS[:1], metrics.logit(3), "heads", "resample", **QUIET)


@pytest.mark.parametrize(
    ("changes", "unit"),
    [
        ({"attn_only": True}, "mlps"),
        ({"attn_only": True}, "neurons"),
        ({"num_experts": 4, "experts_per_token": 2, "gated_mlp": True, "act_fn": "silu"}, "neurons"),
    ],
)
def test_a_model_without_such_parts_raises(changes: dict[str, Any], unit: Any) -> None:
    with pytest.raises(UnknownHookError, match=f"this model has no {unit} in layer 0"):
        ablate(tiny_model(**changes), TOKENS, METRIC, unit, **QUIET)


# Causal tracing


def embeddings_with_noise(
    model: HookedTransformer, subject: list[int], scale: float, seed: int, n: int
) -> list[Tensor]:
    """The embeddings of each sample: the draws as documented, normal and on the subject's tokens only."""
    embeddings = model.W_E[TOKENS].detach()
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(n):
        noise = torch.randn(embeddings.shape, generator=generator)
        sample = embeddings.clone()
        sample[:, subject] += scale * noise[:, subject].double()
        samples.append(sample)
    return samples


def plain_trace(model: HookedTransformer, noisy: Tensor, site: str, window: int) -> tuple[Tensor, Tensor]:
    """Corrupted scores [prompt] and restored ones [layer pos prompt], by hooked runs."""
    _, cache = model.run_with_cache(TOKENS)

    def run(restored: list[tuple[str, int]]) -> Tensor:
        hooks: list[tuple[str, Any]] = [("hook_embed", lambda x, hook: noisy)]
        for name, pos in restored:

            def restore(x: Tensor, hook: Any, name: str = name, pos: int = pos) -> Tensor:
                x[:, pos] = cache[name][:, pos]
                return x

            hooks.append((name, restore))
        logits = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
        return torch.stack([logits[prompt, -1, 3 + prompt] for prompt in range(3)]).detach()

    n_layers = model.cfg.n_layers
    grid = torch.zeros(n_layers, 5, 3, dtype=torch.float64)
    for layer in range(n_layers):
        for pos in range(5):
            # Windows of the paper: as many layers before as after, and one more before where the number is even.
            layers = [one for one in range(n_layers) if -(window // 2) <= one - layer < window - window // 2]
            grid[layer, pos] = run([(f"blocks.{one}.hook_{site}", pos) for one in layers])
    return run([]), grid


@pytest.mark.parametrize(("site", "window"), [("resid_post", 1), ("mlp_out", 2), ("attn_out", 3)])
def test_a_trace_is_a_noised_run_with_states_restored(site: str, window: int) -> None:
    model = tiny_model(n_layers=3)
    trace = causal_trace(
        model, TOKENS, [1, 2], METRIC, site=site, window=window, noise=0.7, n_samples=2, seed=5, **QUIET
    )
    assert trace.restored.shape == (3, 5, 2, 3)
    for sample, noisy in enumerate(embeddings_with_noise(model, [1, 2], 0.7, seed=5, n=2)):
        corrupted, restored = plain_trace(model, noisy, site, window)
        torch.testing.assert_close(trace.corrupted[sample], corrupted)
        torch.testing.assert_close(trace.restored[:, :, sample], restored)
    torch.testing.assert_close(trace.clean, intact(model))
    assert trace.corrupted.std() > 1e-3


def test_the_effects_are_means_over_samples_and_prompts() -> None:
    trace = causal_trace(tiny_model(), TOKENS, [1], METRIC, n_samples=3, **QUIET)
    total = trace.clean.mean() - sum(trace.corrupted[sample].mean() for sample in range(3)) / 3
    torch.testing.assert_close(trace.total_effect, total)
    for layer in range(2):
        for pos in range(5):
            brought_back = trace.restored[layer, pos].mean() - trace.corrupted.mean()
            torch.testing.assert_close(trace.indirect_effect[layer, pos], brought_back)
    torch.testing.assert_close(trace.per_prompt.mean(-1), trace.indirect_effect)


def test_restoring_the_last_state_where_the_answer_is_read_brings_everything_back() -> None:
    trace = causal_trace(tiny_model(), TOKENS, [0, 3], METRIC, **QUIET)
    torch.testing.assert_close(trace.indirect_effect[-1, -1], trace.total_effect)
    # Before the subject nothing was hidden, and the last layer's other positions are not read.
    assert trace.indirect_effect[-1, :-1].abs().max() < 1e-12
    only_last = causal_trace(tiny_model(), TOKENS, [3], METRIC, **QUIET)
    assert only_last.indirect_effect[:, :3].abs().max() < 1e-12
    assert only_last.per_prompt[0, 3].abs().max() > 1e-3


def test_the_noise_is_three_times_as_wide_as_the_subjects_embeddings() -> None:
    model = tiny_model()
    trace = causal_trace(model, TOKENS, [1, 2], METRIC, n_samples=1, **QUIET)
    entries = model.W_E[TOKENS[:, 1:3]].flatten().tolist()
    mean = sum(entries) / len(entries)
    variance = sum((entry - mean) ** 2 for entry in entries) / (len(entries) - 1)
    assert trace.noise == pytest.approx(3 * variance**0.5)


def test_each_prompt_can_have_its_own_subject() -> None:
    model = tiny_model()
    together = causal_trace(model, TOKENS, [[0], [1, 2], [-1]], METRIC, noise=1.0, n_samples=1, **QUIET)
    for prompt, subject in enumerate(([0], [1, 2], [4])):
        alone = causal_trace(model, TOKENS, subject, METRIC, noise=1.0, n_samples=1, **QUIET)
        torch.testing.assert_close(together.restored[..., prompt], alone.restored[..., prompt])


def test_the_seed_decides_the_noise_and_the_global_generator_is_left_alone() -> None:
    model = tiny_model()
    before = torch.get_rng_state()
    first, second, third = (causal_trace(model, TOKENS, [1], METRIC, seed=seed, **QUIET) for seed in (0, 0, 1))
    torch.testing.assert_close(first.corrupted, second.corrupted)
    assert not torch.allclose(first.corrupted, third.corrupted)
    assert not torch.allclose(first.corrupted[0], first.corrupted[1])
    assert torch.equal(before, torch.get_rng_state())


def test_a_function_on_logits_serves_as_a_metric_for_tracing() -> None:
    model = tiny_model()
    mine = causal_trace(
        model, TOKENS, [1], lambda logits: torch.stack([logits[i, -1, 3 + i] for i in range(3)]).mean(), **QUIET
    )
    assert mine.restored.shape == (2, 5, 10, 1)
    torch.testing.assert_close(mine.indirect_effect, causal_trace(model, TOKENS, [1], METRIC, **QUIET).indirect_effect)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"subject": []}, "the subject of prompt 0 is a list of one or more positions"),
        ({"subject": [5]}, "the subject of prompt 0 has position 5; there are 5"),
        ({"subject": [[1], [2]]}, "positions of 2 subjects, and 3 prompts"),
        ({"subject": [[1], [], [2]]}, r"the subject of prompt 1 is a list of one or more positions, got \[\]"),
        ({"subject": [0], "attention_mask": torch.tensor([[1] * 5, [0, 1, 1, 1, 1], [1] * 5])}, "0, .* 1, is padding"),
        ({"window": 3}, "a window is of 1-2 layers, got 3"),
        ({"noise": 0.0}, "noise is a standard deviation above 0"),
        ({"n_samples": 0}, "n_samples is 1 or more"),
        ({"site": "z_out"}, "unknown activation 'z_out'"),
        ({"site": "pattern"}, r"\[batch pos \.\.\.\]"),
        ({"metric": lambda logits: logits[:, -1, 0]}, r"returned shape \(3,\)"),
        ({"metric": lambda logits: logits.mean() * float("nan")}, "is not a number"),
    ],
)
def test_traces_that_make_no_sense_raise(how: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        causal_trace(tiny_model(), TOKENS, **{"subject": [1], "metric": METRIC, **how}, **QUIET)


def test_a_trace_at_a_site_that_the_model_lacks_raises() -> None:
    with pytest.raises(UnknownHookError, match=r"blocks\.0\.hook_mlp_out"):
        causal_trace(tiny_model(attn_only=True), TOKENS, [1], METRIC, site="mlp_out", **QUIET)


# A circuit that is known


@pytest.fixture(scope="module")
def induction() -> tuple[HookedTransformer, Tensor, metrics.Metric]:
    """The bundled model, repeated tokens less the last, and the metric of predicting that one."""
    model = HookedTransformer.from_pretrained("demo-induction-2l")
    repeated = repeated_random_tokens(16, 12, 96, torch.Generator().manual_seed(2), start_token=0)
    return model, repeated[:, :-1], metrics.log_prob(repeated[:, -1])


@pytest.mark.parametrize("method", ["zero", "mean", "resample"])
def test_the_induction_circuit_cannot_be_done_without_and_the_other_heads_can(
    induction: tuple[HookedTransformer, Tensor, metrics.Metric], method: Any
) -> None:
    effect = ablate(*induction, "heads", method, **QUIET).effect
    needed = torch.zeros(2, 4, dtype=torch.bool)
    needed[0, 0] = needed[1, 1] = True
    assert effect[needed].max() < -4
    assert effect[~needed].abs().max() < 0.01


def test_hiding_the_earlier_token_is_undone_where_the_first_head_writes_and_where_the_second_does(
    induction: tuple[HookedTransformer, Tensor, metrics.Metric],
) -> None:
    model, tokens, metric = induction
    earlier = 11  # where the last token stood the first time
    trace = causal_trace(model, tokens, [earlier], metric, site="attn_out", n_samples=4, **QUIET)
    assert trace.total_effect > 4
    share = trace.indirect_effect / trace.total_effect
    assert share[0, earlier + 1] > 0.95
    assert share[1, -1] > 0.95
    share[0, earlier + 1] = share[1, -1] = 0.0
    assert share.abs().max() < 0.05
