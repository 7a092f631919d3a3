"""Comparison of models: a single changed weight is found, processing is not taken for a difference."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, Intervention, UnknownHookError, metrics
from hooked_lm.comparison import ModelComparison, compare, compare_checkpoints
from hooked_lm.patching.statistics import bootstrap_interval
from tests.helpers import tiny_model

TOKENS = torch.tensor([[1, 2, 3, 4, 5], [5, 1, 1, 2, 7]])


def model_of(seed: int = 0, **changes: object) -> HookedTransformer:
    model = tiny_model(**{"n_layers": 2, "dtype": torch.float64, **changes})
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.requires_grad_(False)


def changed(model: HookedTransformer, name: str, index: tuple[int, ...], by: float = 0.3) -> HookedTransformer:
    other = copy.deepcopy(model)
    dict(other.named_parameters())[name].data[index] += by
    return other


def compared(a: HookedTransformer, b: HookedTransformer, **settings: object) -> ModelComparison:
    return compare(a, b, TOKENS, verbose=False, **settings)  # type: ignore[arg-type]


# One weight

WEIGHTS = {
    "embed.W_E": ((2, 1), "hook_embed"),
    "pos_embed.W_pos": ((3, 1), "hook_pos_embed"),
    "blocks.0.ln1.w": ((1,), "blocks.0.attn.hook_q"),
    "blocks.1.ln1.b": ((1,), "blocks.1.attn.hook_q"),
    "blocks.1.attn.W_Q": ((0, 1, 2), "blocks.1.attn.hook_q"),
    "blocks.1.attn.b_K": ((1, 2), "blocks.1.attn.hook_k"),
    "blocks.0.attn.W_V": ((1, 0, 1), "blocks.0.attn.hook_v"),
    "blocks.1.attn.W_O": ((1, 0, 1), "blocks.1.attn.hook_result"),
    "blocks.0.attn.b_O": ((1,), "blocks.0.hook_attn_out"),
    "blocks.0.ln2.w": ((1,), "blocks.0.mlp.hook_pre"),
    "blocks.1.mlp.W_in": ((1, 3), "blocks.1.mlp.hook_pre"),
    "blocks.0.mlp.b_out": ((1,), "blocks.0.hook_mlp_out"),
    "ln_final.w": ((1,), "unembed.hook_in"),
    "unembed.W_U": ((1, 3), "unembed.hook_out"),
    "unembed.b_U": ((3,), "unembed.hook_out"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_single_changed_weight_is_found_with_the_first_site_that_it_changes(name: str) -> None:
    index, site = WEIGHTS[name]
    a = model_of(normalization_type="LN")
    b = changed(a, name, index)
    found = compared(a, b, sites=lambda name: True)
    [weight] = found.weights
    assert (weight.name, weight.kind, weight.n_differing, weight.index) == (name, "values", 1, index)
    assert weight.largest == pytest.approx(0.3)
    first = found.first
    assert first is not None
    assert first.site == site
    assert found.summary.startswith(f"1 of {found.n_weights} parameters differs: {name}. They first differ at {site}, ")
    # Positions before the change are as they were.
    if name == "embed.W_E":
        assert (first.prompt, first.pos) == (0, 1)
    if name == "pos_embed.W_pos":
        assert (first.prompt, first.pos) == (0, 3)
        assert float(first.by_position[:3].max()) == 0
    assert all(one.absolute == 0 for one in found.sites[: found.sites.index(first)])


def test_a_change_as_small_as_rounding_is_found_in_the_weights_and_not_called_a_difference() -> None:
    a = model_of()
    found = compared(a, changed(a, "blocks.1.mlp.W_in", (1, 3), by=1e-13))
    assert [one.name for one in found.weights] == ["blocks.1.mlp.W_in"]
    assert found.first is None
    assert found.same
    assert found.summary.endswith("equal up to rounding (1e-09), so these prompts do not show the difference.")
    assert compared(a, changed(a, "blocks.1.mlp.W_in", (1, 3), by=1e-13), tolerance=0.0).first is not None


def test_a_weight_that_the_prompts_do_not_use_changes_nothing() -> None:
    a = model_of()
    found = compared(a, changed(a, "embed.W_E", (9, 0)))
    assert found.same
    assert len(found.weights) == 1


def test_a_model_equals_itself_and_its_copy() -> None:
    a = model_of()
    for b in (a, copy.deepcopy(a)):
        found = compared(a, b)
        assert (found.weights, found.config, found.first, found.mean_kl) == ((), (), None, 0.0)
        assert found.same_argmax == 1.0
        assert found.loss_a == found.loss_b
        assert found.summary == (
            f"All {found.n_weights} parameters are equal. Activations and outputs are equal up to rounding (1e-09)."
        )


# Processing


PROMPTS = ["When Mary and John went to the store, John gave a drink to", "Q: What is the capital of France?\nA:"]
STEPS = {
    "all": {},
    "fold_ln": {"center_writing_weights": False, "center_unembed": False, "fold_value_biases": False},
    "none of the centring": {"center_writing_weights": False, "center_unembed": False},
    "refactored": {"refactor_factored_attn_matrices": True},
}


@pytest.mark.parametrize("steps", STEPS)
def test_processing_is_not_taken_for_a_difference(steps: str) -> None:
    a = HookedTransformer.from_pretrained("demo-tasks-4l", **STEPS[steps])  # type: ignore[arg-type]
    b = HookedTransformer.from_pretrained_no_processing("demo-tasks-4l")
    found = compare(a, b, PROMPTS, tolerance=1e-4, verbose=False)
    assert found.first is None, found.first and (found.first.site, found.first.relative)
    assert found.processing == (a.processed, ())
    assert found.summary.endswith("so the processing of the weights explains what differs in them.")
    noted = {one.site for one in found.sites if one.note}
    if steps == "fold_ln":
        assert noted == {"unembed.hook_in", "unembed.hook_out"}
    assert len([one for one in found.sites if one.absolute == one.absolute]) > 40


def test_a_changed_weight_is_found_through_processing() -> None:
    a = HookedTransformer.from_pretrained("demo-tasks-4l")
    b = HookedTransformer.from_pretrained_no_processing("demo-tasks-4l")
    b.blocks[2].mlp.W_out.data[3, 5] += 3.0
    found = compare(a, b, PROMPTS, tolerance=1e-4, verbose=False)
    assert found.first is not None
    assert found.first.site == "blocks.2.hook_mlp_out"
    assert found.first.note == "less its mean, which processing takes out"


def test_half_precision_has_a_tolerance_of_its_own() -> None:
    a = HookedTransformer.from_pretrained("demo-tasks-4l")
    b = HookedTransformer.from_pretrained("demo-tasks-4l", dtype=torch.bfloat16)
    found = compare(a, b, PROMPTS, verbose=False)
    assert found.tolerance == 8e-2
    assert found.weights
    assert found.same
    assert [one.field for one in found.config] == ["dtype"]


# Outputs


def test_divergence_loss_and_agreement_by_brute_force() -> None:
    a, b = model_of(1), model_of(2)
    lengths = [5, 3, 1]
    tokens = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 5, 1, 1], [0, 0, 0, 0, 4]])
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    found = compare(a, b, tokens, attention_mask=mask, batch_size=2, verbose=False)
    kls, agree, losses = [], [], ([], [])  # type: ignore[var-annotated]
    for row, length in enumerate(lengths):
        alone = tokens[row : row + 1, 5 - length :]
        one, other = (model(alone)[0].log_softmax(-1).detach() for model in (a, b))
        kls.append((one.exp() * (one - other)).sum(-1))
        agree += (one.argmax(-1) == other.argmax(-1)).tolist()
        for kept, log_probs in zip(losses, (one, other), strict=True):
            kept.extend((-log_probs[:-1].gather(-1, alone[0, 1:, None])[:, 0]).tolist())
        assert torch.allclose(found.kl[row, 5 - length :], kls[-1])
        assert bool(found.kl[row, : 5 - length].isnan().all())
    assert found.mean_kl == pytest.approx(float(torch.cat(kls).mean()))
    assert found.same_argmax == pytest.approx(sum(agree) / len(agree))
    assert found.loss_a == pytest.approx(sum(losses[0]) / len(losses[0]))
    assert found.loss_b == pytest.approx(sum(losses[1]) / len(losses[1]))
    means = torch.stack([one.mean() for one in kls])
    low, high = bootstrap_interval(means, weights=torch.tensor(lengths).double())
    assert (found.kl_low, found.kl_high) == (pytest.approx(float(low)), pytest.approx(float(high)))
    assert found.real.tolist() == mask.bool().tolist()
    worst = found.top(1)[0]
    assert worst["kl"] == pytest.approx(float(torch.cat(kls).max()))


def test_places_are_counted_in_the_prompt_and_not_in_its_padding() -> None:
    a = HookedTransformer.from_pretrained("demo-tasks-4l")
    b = copy.deepcopy(a)
    b.pos_embed.W_pos.data[2] += 1.0
    found = compare(a, b, ["When Mary and John went to the store", "When Mary"], verbose=False)
    assert found.first is not None
    assert (found.first.site, found.first.prompt, found.first.pos) == ("hook_pos_embed", 0, 2)
    assert found.top(1)[0]["context"].startswith("<|endoftext|>When Mary")  # type: ignore[union-attr]
    row = compare(a, b, ["When Mary and John went to the store", "When Mary"], batch_size=1, verbose=False)
    assert torch.allclose(row.kl.nan_to_num(), found.kl.nan_to_num(), atol=1e-6)


def test_one_prompt_has_no_interval() -> None:
    found = compare(model_of(1), model_of(2), TOKENS[:1], verbose=False)
    assert found.kl_low != found.kl_low
    assert found.figure().layout.title.text.startswith("first different at hook_embed")


# Effects


def test_effects_of_heads_are_those_of_a_loop() -> None:
    a, b = model_of(1), model_of(2)
    metric = metrics.log_prob(3)
    found = compared(a, b, metric=metric).effects
    assert found is not None
    assert found.shape == (2, a.cfg.n_heads)
    for model, effects in ((a, found.a), (b, found.b)):
        base = metric(model(TOKENS))
        for place, label in enumerate(found.labels):
            layer, head = divmod(place, model.cfg.n_heads)
            assert label == f"L{layer}H{head}"
            zero = Intervention(f"blocks.{layer}.attn.hook_z", "zero", head=head)
            assert float(effects[place]) == pytest.approx(float(metric(model.run(TOKENS, interventions=[zero])) - base))
    most = max(range(len(found.labels)), key=lambda i: abs(float(found.b[i] - found.a[i])))
    assert found.top(1) == [(found.labels[most], float(found.a[most]), float(found.b[most]))]
    assert found.figure().data[0].z.shape == found.shape
    assert str(found).startswith(f"effects\n  {found.labels[most]}: ")
    assert found.rows()[most] == {"label": found.labels[most], "a": float(found.a[most]), "b": float(found.b[most])}


def test_effects_of_interventions_that_are_given() -> None:
    a, b = model_of(1), model_of(2)
    cell = Intervention("blocks.1.hook_mlp_out", "zero")
    found = compared(a, b, metric=metrics.log_prob(3), interventions=[cell]).effects
    assert found is not None
    assert found.labels == ("zero at blocks.1.hook_mlp_out",)
    assert list(found.figure().data[-1].x) == [float(found.b - found.a)]


# Other shapes


def test_models_of_other_shapes_are_compared_where_they_can_be() -> None:
    a, b = model_of(1), model_of(1, n_layers=3, d_mlp=12)
    found = compared(a, b)
    assert [one.field for one in found.config if one.field in ("n_layers", "d_mlp")] == ["n_layers", "d_mlp"]
    kinds = {one.name: one.kind for one in found.weights}
    assert kinds["blocks.2.mlp.W_in"] == "only in b"
    assert kinds["blocks.0.mlp.W_in"] == "shape"
    assert {one.site: one.note for one in found.sites}["blocks.0.mlp.hook_pre"].startswith("shapes (5, ")
    only_wider = compared(model_of(1), model_of(1, d_mlp=12), sites="blocks.0.mlp.hook_pre")
    assert "They first differ at blocks.0.mlp.hook_pre, which has shapes (5, " in only_wider.summary
    assert "nan" not in str(only_wider)


def test_other_vocabularies_raise() -> None:
    with pytest.raises(ValueError, match=r"the models have \d+ and 21 tokens"):
        compared(model_of(), model_of(d_vocab=21))


def test_wrong_settings_raise() -> None:
    a = model_of()
    with pytest.raises(ValueError, match="batch_size is at least 1"):
        compared(a, a, batch_size=0)
    with pytest.raises(ValueError, match="tolerance not negative"):
        compared(a, a, tolerance=-1.0)
    with pytest.raises(UnknownHookError):
        compared(a, a, sites="blocks.9.hook_resid_pre")
    with pytest.raises(ValueError, match="k is at least 1"):
        compared(a, a).top(0)
    with pytest.raises(ValueError, match="no prompt 2: there are 0 to 1"):
        compared(a, a).kl_figure(2)


# Checkpoints


def test_checkpoints_are_compared_with_the_last(tmp_path: Path) -> None:
    last = model_of(1)
    middle = changed(last, "unembed.W_U", (1, 3), 0.1)
    first = changed(last, "embed.W_E", (2, 1), 1.0)
    middle.save_pretrained(tmp_path / "middle")
    loaded: list[Tensor] = []

    def load() -> HookedTransformer:
        loaded.append(TOKENS)
        return first

    found = compare_checkpoints(
        [("first", load), ("middle", tmp_path / "middle"), ("last", last)], TOKENS, verbose=False
    )
    assert found.names == ("first", "middle", "last")
    assert [row["first"] for row in found.rows()] == ["hook_embed", "log-probabilities", None]
    assert float(found.kl[2]) == 0
    assert [name for name, _ in found.top(1)] == ["first" if found.kl[0] > found.kl[1] else "middle"]
    assert len(loaded) == 1
    assert "nowhere" in str(found).splitlines()[-1]
    assert list(found.figure().data[1].y) == pytest.approx(found.kl.tolist())
    with pytest.raises(ValueError, match="two checkpoints or more"):
        compare_checkpoints([("last", last)], TOKENS)


def test_the_table_and_figures_say_what_was_found() -> None:
    a = model_of()
    found = compared(a, changed(a, "blocks.1.mlp.W_in", (1, 3)), metric=metrics.log_prob(3))
    text = str(found)
    assert text.startswith(found.summary)
    assert "  blocks.1.mlp.W_in: 1 of " in text
    assert f"KL {found.mean_kl:.4g} nats ({found.kl_low:.3g} to {found.kl_high:.3g})" in text
    assert "effects\n  L" in text
    assert [row["site"] for row in found.rows()][-1] == "log-probabilities"
    map_ = found.figure()
    assert map_.data[0].z.shape == (len(found.sites), 5)
    assert "KL(a || b)" in found.kl_figure().html()
