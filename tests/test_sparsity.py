"""Activity equals counting token by token; curves equal a plain loop over hooked runs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, UnknownHookError, metrics
from hooked_lm.sparsity import ablation_curve, gini, hoyer, rate_bound, unit_activity
from tests.helpers import CORPUS, VOCAB, randomise_, tiny_config, tiny_model, tiny_tokenizer, tiny_tokens

ROWS = [[3, 4, 5], [6, 7, 8, 9, 10], [11], [12, 13, 14, 15, 16, 17, 18]]


def relu_model(**changes: Any) -> HookedTransformer:
    return tiny_model(**{"act_fn": "relu", "d_mlp": 10, **changes})


def counted_one_by_one(model: HookedTransformer, rows: list[Any], site: str, threshold: float = 0.0) -> list[Tensor]:
    """The activations [token unit] of each layer, one text at a time, BOS left out."""
    bos = None if model.tokenizer is None else model.tokenizer.bos_token_id
    found: list[list[Tensor]] = [[] for _ in range(model.cfg.n_layers)]
    for row in rows:
        tokens = model.to_tokens(row) if isinstance(row, str) else torch.tensor([row])
        _, cache = model.run_with_cache(tokens)
        for layer, pos in itertools.product(range(model.cfg.n_layers), range(tokens.shape[1])):
            if int(tokens[0, pos]) != bos:
                x = cache[site, layer][0, pos]
                found[layer].append(x.norm(dim=-1) if site == "z" else x)
    return [torch.stack(one) for one in found]


# Activity


@pytest.mark.parametrize("site", ["post", "z", "resid_mid"])
@pytest.mark.parametrize("relative", [False, True])
@torch.no_grad()
def test_activity_equals_counting_token_by_token(site: str, relative: bool) -> None:
    model = relu_model()
    threshold = 0.8 if relative else 2.2 if site == "z" else 0.3
    found = unit_activity(model, ROWS, site, threshold=threshold, relative=relative, batch_size=3, verbose=False)
    assert (found.n_texts, found.n_tokens) == (4, 16)
    for layer, values in enumerate(counted_one_by_one(model, ROWS, site)):
        levels = [threshold * float((x**2).mean().sqrt()) if relative else threshold for x in values]
        active = torch.stack([x.abs() > level for x, level in zip(values, levels, strict=True)])
        assert torch.equal(found.rate[layer], active.double().mean(0))
        assert 0.05 < active.double().mean() < 0.95
        torch.testing.assert_close(found.mean[layer], values.mean(0))
        torch.testing.assert_close(found.max[layer], values.amax(0))
        torch.testing.assert_close(found.mean_square[layer], (values**2).mean(0))
        each = active.sum(1).double()
        torch.testing.assert_close(found.l0[layer], each.mean())
        torch.testing.assert_close(found.l0_std[layer], each.std(correction=0))
        torch.testing.assert_close(found.hoyer[layer], torch.stack([hoyer(x) for x in values]).mean())
        torch.testing.assert_close(found.gini[layer], torch.stack([gini(x) for x in values]).mean())


@torch.no_grad()
def test_bos_and_padding_do_not_count_and_texts_are_read_as_the_model_reads_them() -> None:
    cfg = tiny_config(n_ctx=40, d_vocab=VOCAB, act_fn="relu", d_mlp=10)
    model = randomise_(HookedTransformer(cfg, tiny_tokenizer()))
    assert isinstance(model, HookedTransformer)
    texts = [*CORPUS, "", "Rome."]
    found = unit_activity(model, texts, verbose=False)
    values = counted_one_by_one(model, [text for text in texts if text], "post")
    assert found.n_tokens == len(values[0])
    assert found.n_texts == 5
    assert torch.equal(found.rate, torch.stack([(x > 0).double().mean(0) for x in values]))
    with_bos = model.run_with_cache(CORPUS[0])[1]["post", 0][0]
    assert found.n_tokens < sum(model.to_tokens(text).shape[1] for text in texts if text)
    assert len(with_bos)


@torch.no_grad()
def test_planted_dead_and_rare_units_are_found() -> None:
    model = relu_model()
    model.blocks[0].mlp.b_in[3] = -1e3  # never active
    model.blocks[1].mlp.b_in[7] = -1e3
    # Active on one token of sixteen: the largest input of this unit.
    inputs = counted_one_by_one(model, ROWS, "pre")[0][:, 5]
    first, second = inputs.topk(2).values
    model.blocks[0].mlp.b_in[5] -= (first + second) / 2
    found = unit_activity(model, ROWS, verbose=False)
    assert {(0, 3), (1, 7)} <= set(found.dead_units)
    assert float(found.rate[0, 5]) == 1 / 16
    assert all(
        (found.rate[layer, unit] == 0) == ((layer, unit) in found.dead_units) for layer in (0, 1) for unit in range(10)
    )
    assert [one[:2] for one in found.top(len(found.dead_units), least=True)] == list(found.dead_units)
    assert found.top(1)[0].rate == found.rate.max()
    assert found.rate_bound() == rate_bound(16)
    assert f"below {found.rate_bound(all_units=True):.2g}, of all of them at 95%" in found.table()
    assert f"{len([one for one in found.dead_units if one[0] == 1])}" in found.table().splitlines()[3]
    # Without the dead units the model computes the same.
    curve = ablation_curve(model, torch.tensor([ROWS[3]]), order=found.dead_units, steps=1, n_random=0, verbose=False)
    assert curve.scores[1] == pytest.approx(curve.intact, abs=1e-12)


@torch.no_grad()
def test_a_smooth_activation_is_active_everywhere_unless_a_threshold_is_given() -> None:
    model = tiny_model(act_fn="gelu_new")
    assert unit_activity(model, ROWS, verbose=False).rate.min() == 1
    assert unit_activity(model, ROWS, threshold=0.2, verbose=False).rate.min() < 1
    # Dead is what stays under the threshold, also above 0; not what is strong below 0 alone.
    found = unit_activity(model, ROWS, threshold=1.2, verbose=False)
    assert float(found.max[found.dead].max()) > 0.2
    with torch.no_grad():
        model.blocks[0].mlp.b_out[2] = -1e3
    below = unit_activity(model, ROWS, "mlp_out", threshold=0.01, verbose=False)
    assert float(below.max[0, 2]) < 0
    assert (0, 2) not in below.dead_units


def test_layers_are_chosen_and_a_token_without_activity_has_no_sparsity() -> None:
    model = relu_model()
    with torch.no_grad():
        model.blocks[1].mlp.b_in.fill_(-1e3)
    found = unit_activity(model, ROWS, layers=[1], verbose=False)
    assert found.layers == (1,)
    assert found.dead.all()
    assert math.isnan(found.hoyer[0])
    assert found.rows()[2] == {"layer": 1, "unit": "feature 2", "rate": 0, "mean": 0, "max": 0, "mean_square": 0}
    assert found.dead_units[0] == (1, 0)


def test_a_site_may_be_a_hook_name_with_the_layer_left_open() -> None:
    model = relu_model()
    named = unit_activity(model, ROWS, "blocks.{layer}.mlp.hook_post", layers=[1, 0], verbose=False)
    assert torch.equal(named.rate, unit_activity(model, ROWS, verbose=False).rate[[1, 0]])
    assert unit_activity(model, ROWS, "blocks.{layer}.ln1.hook_normalized", verbose=False).rate.shape == (2, 12)


@pytest.mark.usefixtures("no_type_checks")
def test_numbers_of_numpy_are_taken_as_pythons_are() -> None:
    model = relu_model()
    found = unit_activity(model, ROWS, threshold=np.float32(0.5), verbose=False)
    assert torch.equal(found.rate, unit_activity(model, ROWS, threshold=0.5, verbose=False).rate)
    for four in (4, np.int64(4), torch.tensor(4)):
        assert ablation_curve(model, TOKENS, steps=four, n_random=0, verbose=False).counts == (0, 5, 10, 15, 20)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"threshold": -1.0}, ValueError, "threshold is a magnitude"),
        ({"threshold": math.nan}, ValueError, "threshold is a magnitude"),
        ({"threshold": True}, ValueError, "threshold is a magnitude"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"max_tokens": 0}, ValueError, "max_tokens"),
        ({"site": "embed"}, ValueError, "belongs to the whole model"),
        ({"site": "pattern"}, ValueError, "units are read at sites"),
        ({"site": "pots"}, ValueError, "did you mean 'post'"),
        ({"layers": [2]}, ValueError, "2"),
        ({"layers": [0, -2]}, ValueError, "0 comes twice"),
        ({"corpus": [[], []]}, ValueError, "no tokens"),
        ({"corpus": "text"}, TypeError, "one text"),
    ],
)
def test_activity_checks_its_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        unit_activity(relu_model(), **{"corpus": ROWS, "verbose": False, **arguments})


def test_activations_that_are_no_numbers_raise() -> None:
    model = relu_model()
    with torch.no_grad():
        model.blocks[0].mlp.W_in[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.hook_post that are NaN or infinite"):
        unit_activity(model, ROWS, verbose=False)


# Measures


def test_hoyer_and_gini_of_known_vectors() -> None:
    one, equal, some = torch.tensor([0.0, -3.0, 0.0, 0.0]), torch.ones(4), torch.tensor([1.0, 2.0, 3.0, -4.0])
    assert hoyer(torch.stack([one, equal])).tolist() == pytest.approx([1, 0])
    assert gini(torch.stack([one, equal])).tolist() == pytest.approx([0.75, 0])
    assert float(hoyer(some)) == pytest.approx((2 - 10 / math.sqrt(30)) / (2 - 1))
    # The Gini index is half the mean difference of two entries over their mean.
    pairs = [abs(abs(x) - abs(y)) for x, y in itertools.product(some.tolist(), repeat=2)]
    assert float(gini(some)) == pytest.approx(sum(pairs) / len(pairs) / 2 / 2.5)
    assert torch.equal(hoyer(some), hoyer(some * -7))
    assert float(gini(some.clone().requires_grad_()).detach()) == float(gini(some))
    for measure in (hoyer, gini):
        # The sum of these is beyond single precision.
        assert measure(torch.full((4,), 3e38)).item() == pytest.approx(0, abs=1e-6)
        assert math.isnan(measure(torch.zeros(3)))
        with pytest.raises(ValueError, match="one entry or more"):
            measure(torch.zeros(2, 0))


def test_the_bound_of_a_rate_is_the_rule_of_three() -> None:
    assert rate_bound(1000) == pytest.approx(3 / 1000, rel=0.01)
    assert (1 - rate_bound(50, 0.9)) ** 50 == pytest.approx(0.1)
    for n_tokens, confidence, named in ((0, 0.95, "n_tokens"), (5, 1.0, "confidence"), (5, 0.0, "confidence")):
        with pytest.raises(ValueError, match=named):
            rate_bound(n_tokens, confidence)


def test_the_bound_of_dead_units_holds_for_all_of_them_however_they_were_found() -> None:
    activity = unit_activity(relu_model(), ROWS * 20, verbose=False)
    n_tokens, n_units, draws = activity.n_tokens, activity.rate.numel(), 4000
    one, every = activity.rate_bound(), activity.rate_bound(all_units=True)
    assert one == rate_bound(320)
    silent = torch.zeros(2)
    for index, rate in enumerate((one, every)):
        # How often some unit of so many, each active on this share of tokens, is dead all the same.
        dead = torch.rand(draws, n_units, dtype=torch.float64) < (1 - rate) ** n_tokens
        silent[index] = dead.any(1).double().mean()
    assert silent[0] > 0.5  # twenty units with the rate of the bound for one: mostly one is dead
    assert 0.035 < silent[1] < 0.065
    with pytest.raises(ValueError, match="confidence is between 0 and 1, got 2"):
        activity.rate_bound(2.0, all_units=True)


# Curves

TOKENS = tiny_tokens(3, 6)
MASK = torch.ones_like(TOKENS)
MASK[0, 4:] = 0
DIFF = metrics.logit_diff([1, 2, 3], [4, 5, 6], pos=3)


def loop(
    model: HookedTransformer, places: Any, counts: Any, site: str, values: Any, metric: Any = "loss"
) -> list[float]:
    """The metric at each step, a run with plain hooks each. Values [layer unit ...] replace activations."""
    found = []
    for count in counts:
        gone = places[:count]

        def ablated(x: Tensor, hook: Any, gone: Any = gone) -> Tensor:
            for layer, unit in gone:
                if layer == hook.layer():
                    x[:, :, unit] = values[layer][unit]
            return x

        hooks = [(f"blocks.{layer}.{site}", ablated) for layer in range(model.cfg.n_layers)]
        kind = "loss" if metric == "loss" else "logits"
        out = model.run_with_hooks(TOKENS, attention_mask=MASK, fwd_hooks=hooks, return_type=kind)
        found.append(float(out if metric == "loss" else metric(out)))
    return found


def activations(model: HookedTransformer, site: str) -> list[Tensor]:
    """The activations of the tokens that count, [token unit ...], by layer."""
    _, cache = model.run_with_cache(TOKENS, attention_mask=MASK)
    return [cache[site, layer][MASK.bool()] for layer in range(model.cfg.n_layers)]


@pytest.mark.parametrize("metric", ["loss", DIFF], ids=["loss", "logit_diff"])
@pytest.mark.parametrize("value", ["zero", "mean"])
@pytest.mark.parametrize(("unit", "site"), [("neurons", "mlp.hook_post"), ("heads", "attn.hook_z")])
@torch.no_grad()
def test_a_curve_equals_a_plain_loop(unit: Any, site: str, value: Any, metric: Any) -> None:
    model = tiny_model(act_fn="gelu_new", d_mlp=8)
    curve = ablation_curve(
        model, TOKENS, metric, unit, value=value, steps=3, attention_mask=MASK, n_random=2, verbose=False
    )
    found = activations(model, "post" if unit == "neurons" else "z")
    values = [x.mean(0) if value == "mean" else torch.zeros_like(x[0]) for x in found]
    assert curve.scores.tolist() == pytest.approx(loop(model, curve.places, curve.counts, site, values, metric))
    assert curve.counts == ((0, 5, 11, 16) if unit == "neurons" else (0, 2, 4, 6))
    assert curve.metric == ("loss" if metric == "loss" else DIFF.name)
    # Least active first.
    sizes = {
        (layer, index): float(
            (x[:, index] - values[layer][index]).reshape(len(x), -1).norm(dim=1).square().mean().sqrt()
        )
        for layer, x in enumerate(found)
        for index in range(x.shape[1])
    }
    assert list(curve.places) == sorted(sizes, key=lambda place: sizes[place])
    assert curve.sizes is not None
    assert curve.sizes.tolist() == pytest.approx(sorted(sizes.values()))
    assert curve.top(1)[0][:2] == max(sizes, key=lambda place: sizes[place])


@torch.no_grad()
def test_random_orders_are_orders_of_the_same_units_and_equal_a_loop() -> None:
    model = tiny_model(d_mlp=8)
    drawn = ablation_curve(model, TOKENS, order="random", n_random=3, steps=4, attention_mask=MASK, verbose=False)
    assert sorted(drawn.places) == [(layer, unit) for layer in (0, 1) for unit in range(8)]
    zeros = [torch.zeros(8)] * 2
    assert drawn.scores.tolist() == pytest.approx(loop(model, drawn.places, drawn.counts, "mlp.hook_post", zeros))
    # Each random order ablates nothing at first and everything in the end, and something of its own between.
    assert torch.equal(drawn.random[:, 0], drawn.scores[:1].expand(3))
    assert torch.equal(drawn.random[:, -1], drawn.scores[-1:].expand(3))
    assert len(set(drawn.random[:, 2].tolist())) == 3
    again = ablation_curve(model, TOKENS, order="random", n_random=3, steps=4, attention_mask=MASK, verbose=False)
    other = ablation_curve(
        model, TOKENS, order="random", n_random=3, steps=4, attention_mask=MASK, seed=1, verbose=False
    )
    assert torch.equal(drawn.random, again.random)
    assert not torch.equal(drawn.random, other.random)
    assert drawn.low is not None
    assert drawn.high is not None
    assert bool((drawn.low <= drawn.random.mean(0) + 1e-12).all())
    assert bool((drawn.random.mean(0) <= drawn.high + 1e-12).all())
    assert drawn.sizes is None


@pytest.mark.parametrize(("unit", "site", "matrix"), [("neurons", "post", "mlp.W_out"), ("heads", "z", "attn.W_O")])
@torch.no_grad()
def test_order_by_norm_is_that_of_what_units_write(unit: Any, site: str, matrix: str) -> None:
    model = tiny_model(d_mlp=8)
    curve = ablation_curve(
        model, TOKENS, unit=unit, order="norm", value="mean", steps=1, n_random=0, attention_mask=MASK, verbose=False
    )
    sizes = {}
    for layer, x in enumerate(activations(model, site)):
        W = model.blocks[layer].get_parameter(matrix)
        for index in range(x.shape[1]):
            moved = x[:, index] - x[:, index].mean(0)
            written = moved[:, None] * W[index] if unit == "neurons" else moved @ W[index]
            sizes[layer, index] = float(written.norm(dim=1).square().mean().sqrt())
    assert list(curve.places) == sorted(sizes, key=lambda place: sizes[place])
    assert curve.sizes is not None
    assert curve.sizes.tolist() == pytest.approx(sorted(sizes.values()))


@pytest.mark.parametrize("value", ["zero", "mean"])
@pytest.mark.parametrize(("unit", "site"), [("neurons", "post"), ("heads", "z")])
def test_order_by_attribution_is_the_slope_of_ablating_a_little(unit: Any, site: str, value: Any) -> None:
    model = tiny_model(d_mlp=8)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    curve = ablation_curve(
        model,
        TOKENS,
        unit=unit,
        order="attribution",
        value=value,
        steps=1,
        n_random=0,
        attention_mask=MASK,
        verbose=False,
    )
    means = [x.mean(0) if value == "mean" else torch.zeros_like(x[0]) for x in activations(model, site)]
    little, intact, slopes = 1e-5, curve.intact, {}
    for layer, index in curve.places:

        def nudged(x: Tensor, hook: Any, layer: int = layer, index: int = index) -> Tensor:
            x[:, :, index] += little * (means[layer][index] - x[:, :, index])
            return x

        name = "mlp.hook_post" if unit == "neurons" else "attn.hook_z"
        loss = model.run_with_hooks(
            TOKENS, attention_mask=MASK, fwd_hooks=[(f"blocks.{layer}.{name}", nudged)], return_type="loss"
        )
        slopes[layer, index] = abs(float(loss) - intact) / little
    assert curve.sizes is not None
    assert curve.sizes.tolist() == pytest.approx([slopes[place] for place in curve.places], rel=1e-3, abs=1e-6)
    assert curve.sizes.tolist() == sorted(curve.sizes.tolist())


@torch.no_grad()
def test_means_and_orders_come_from_the_reference_and_the_scores_from_the_prompts() -> None:
    model, others = tiny_model(d_mlp=8), tiny_tokens(4, 9, seed=3)
    options: Any = {"value": "mean", "steps": 2, "n_random": 0, "verbose": False}
    curve = ablation_curve(model, TOKENS, reference=others, attention_mask=MASK, batch_size=3, **options)
    _, cache = model.run_with_cache(others)
    values = [cache["post", layer].flatten(0, 1).mean(0) for layer in (0, 1)]
    assert curve.scores.tolist() == pytest.approx(loop(model, curve.places, curve.counts, "mlp.hook_post", values))
    assert curve.places == ablation_curve(model, others, **options).places
    assert curve.places != ablation_curve(model, TOKENS, attention_mask=MASK, **options).places
    by_slope = ablation_curve(model, TOKENS, order="attribution", reference=others, attention_mask=MASK, **options)
    assert by_slope.places == ablation_curve(model, others, order="attribution", **options).places


@torch.no_grad()
def test_means_and_activities_leave_out_bos_which_is_ablated_all_the_same() -> None:
    model = randomise_(HookedTransformer(tiny_config(n_ctx=40, d_vocab=VOCAB, d_mlp=6), tiny_tokenizer()))
    assert isinstance(model, HookedTransformer)
    curve = ablation_curve(model, CORPUS, value="mean", steps=1, n_random=0, verbose=False)
    values = [x.mean(0) for x in counted_one_by_one(model, list(CORPUS), "post")]

    def means(x: Tensor, hook: Any) -> Tensor:
        return values[hook.layer()].expand_as(x)

    loss = model.run_with_hooks(CORPUS, fwd_hooks=[("*mlp.hook_post", means)], return_type="loss")
    assert curve.scores[1] == pytest.approx(float(loss))
    spreads = torch.cat([x.std(0, correction=0) for x in counted_one_by_one(model, list(CORPUS), "post")])
    assert curve.sizes is not None
    assert curve.sizes.tolist() == pytest.approx(spreads.sort().values.tolist())


@torch.no_grad()
def test_half_precision_has_losses_in_single() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    curve = ablation_curve(model, TOKENS, steps=1, n_random=0, verbose=False)
    exact = model.loss_fn(model(TOKENS).float(), TOKENS)
    assert curve.intact == pytest.approx(float(exact), rel=1e-6)


@torch.no_grad()
def test_a_planted_order_spares_the_model_until_the_units_that_matter() -> None:
    model = tiny_model(d_mlp=10)
    for block in model.blocks:
        block.mlp.W_out[:7] *= 1e-6  # three of ten matter
    curve = ablation_curve(model, TOKENS, DIFF, order="norm", steps=20, verbose=False)
    assert {index for _, index in curve.places[:14]} == set(range(7))
    change = 1e-3 if curve.scores[-1] > curve.intact else -1e-3
    moved = (curve.scores - curve.intact).abs()
    assert curve.spared(change) >= 0.7
    assert moved[:15].max() < 1e-4
    assert curve.random_spared(change).max() < 0.7
    assert curve.spared(1e9) == 1
    expected = sum((curve.scores[i] + curve.scores[i + 1]) / 2 - curve.intact for i in range(20)) / 20
    assert curve.area == pytest.approx(float(expected))
    assert curve.random_areas.shape == (5,)
    with pytest.raises(ValueError, match="change is a rise"):
        curve.spared(0.0)


def test_what_has_come_back_is_not_spared() -> None:
    model = tiny_model(d_mlp=8)
    curve = ablation_curve(model, TOKENS, steps=4, n_random=0, verbose=False)
    object.__setattr__(curve, "scores", torch.tensor([1.0, 1.05, 1.2, 1.0, 0.5], dtype=torch.float64))
    assert curve.spared(0.1) == 0.25
    assert curve.spared(-0.4) == 0.75
    assert curve.spared(0.05) == pytest.approx(0.25 if 1.05 - 1.0 < 0.05 else 0)


def test_results_as_rows_text_and_figures() -> None:
    model = relu_model()
    curve = ablation_curve(model, TOKENS, steps=[4, 20], n_random=2, verbose=False)
    assert [row["ablated"] for row in curve.rows()] == [0, 4, 20]
    assert curve.rows()[1]["score"] == float(curve.scores[1])
    part = ablation_curve(model, TOKENS, steps=[5], n_random=0, verbose=False)
    assert part.shares.tolist() == [0, 0.25]
    assert part.area == pytest.approx(0.25 * (float(part.scores[1]) - part.intact) / 2)
    lines = curve.table().splitlines()
    assert str(curve) == curve.table()
    assert f"{curve.area:+.3f}" in lines[-1]
    assert f"{float(curve.scores[1]):.3f}" in lines[3]
    drawn = curve.figure()
    names = [one.name for one in drawn.data]
    assert names[:2] == ["by activity", "random orders, mean"]
    assert list(drawn.data[0].y) == pytest.approx(curve.scores.tolist())
    without = ablation_curve(model, TOKENS, order=[(0, 2), (1, 1)], steps=2, n_random=0, verbose=False)
    assert (without.order, without.low, without.rows()[0]["random"]) == ("given", None, None)
    assert "random" not in without.table()
    assert "by given" in [one.name for one in without.figure().data]
    activity = unit_activity(model, ROWS, verbose=False)
    assert str(activity) == activity.table()
    heights = activity.figure().data[1].y
    assert heights[0] == activity.rate[1].max()
    assert heights[-1] == activity.rate[1].min()
    with pytest.raises(ValueError, match="layer 5 was not read"):
        activity.figure([5])


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"metric": "lost"}, ValueError, "metric is 'loss'"),
        ({"unit": "neuron"}, ValueError, "unit is 'neurons'"),
        ({"order": "size"}, ValueError, "order is one of"),
        ({"order": [(0, 99)]}, ValueError, "no unit 99 of layer 0"),
        ({"order": [(0, 1), (0, 1)]}, ValueError, "each of them once"),
        ({"order": [3]}, ValueError, "pairs"),
        ({"order": 3}, ValueError, "order is one of .* got 3"),
        ({"value": "median"}, ValueError, "value is 'zero'"),
        ({"n_random": 1}, ValueError, "n_random"),
        ({"steps": 0}, ValueError, "steps is 1 or more"),
        ({"steps": [99]}, ValueError, "steps are numbers of units"),
        ({"steps": []}, ValueError, "steps are numbers of units"),
        ({"steps": iter([3, 99])}, ValueError, r"got \[3, 99\]"),
        ({"steps": 2.5}, TypeError, "steps is an integer"),
        ({"confidence": 1.0, "n_random": 0}, ValueError, "confidence is between 0 and 1"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"reference_mask": MASK}, ValueError, "reference_mask"),
        ({"layers": [7]}, ValueError, "7"),
        ({"layers": [1, 0, 1]}, ValueError, "1 comes twice"),
        ({"order": "attribution", "metric": metrics.accuracy([1, 2, 3])}, ValueError, "no gradient"),
    ],
)
def test_curves_check_their_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ablation_curve(relu_model(), TOKENS, **{"verbose": False, **arguments})


def test_models_without_such_units_or_such_a_loss_raise() -> None:
    with pytest.raises(UnknownHookError, match="no neurons in layer 0"):
        ablation_curve(tiny_model(attn_only=True), TOKENS, verbose=False)
    with pytest.raises(UnknownHookError, match=r"blocks\.0\.mlp\.hook_post"):
        unit_activity(tiny_model(attn_only=True), ROWS, verbose=False)
    with pytest.raises(ValueError, match="bidirectional"):
        ablation_curve(tiny_model(attention_dir="bidirectional"), TOKENS, verbose=False)
    with pytest.raises(ValueError, match="d_vocab_out=7"):
        ablation_curve(tiny_model(d_vocab_out=7), TOKENS, verbose=False)
