"""Single hook sites: heads' results and inputs, what no hook may write to, and when attention is fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hooked_lm import HookedTransformer, HookPoint
from tests.helpers import tiny_model
from tests.hook_sites_helpers import BATCH, POS, TOKENS, direction_for, model_of, sites_of

# Single sites


@pytest.mark.parametrize(
    "name",
    ["gpt2", "grouped gated rms rotary", "alibi", "attention only", "sinks, mixture with a limit"],
)
def test_head_results_sum_to_what_attention_writes(name: str) -> None:
    model = model_of(name)
    _, cache = model.run_with_cache(TOKENS, names_filter=["blocks.*.attn.hook_result", "blocks.*.hook_attn_out"])
    for layer in range(model.cfg.n_layers):
        total = cache["result", layer].sum(2) + model.blocks[layer].attn.b_O
        torch.testing.assert_close(total, cache["attn_out", layer], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "parallel"])
def test_an_edit_at_mlp_in_stays_off_the_skip_path(name: str) -> None:
    model = model_of(name)
    names = [f"blocks.0.hook_{site}" for site in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    _, clean = model.run_with_cache(TOKENS, names_filter=names)
    with model.hooks([("blocks.0.hook_mlp_in", lambda x, hook: x.zero_())]):
        _, edited = model.run_with_cache(TOKENS, names_filter=names)
    assert torch.equal(edited["resid_pre", 0], clean["resid_pre", 0])
    assert torch.equal(edited["attn_out", 0], clean["attn_out", 0])
    assert not torch.allclose(edited["mlp_out", 0], clean["mlp_out", 0])
    total = clean["resid_pre", 0] + clean["attn_out", 0] + edited["mlp_out", 0]
    torch.testing.assert_close(edited["resid_post", 0], total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("site", ["attn_in", "q_input", "k_input", "v_input"])
@pytest.mark.parametrize("grad", [False, True])
def test_an_edit_at_a_per_head_input_stays_off_the_skip_path(site: str, grad: bool) -> None:
    model = model_of("gpt2")
    names = [f"blocks.0.hook_{name}" for name in ("resid_pre", "attn_out", "resid_mid", "mlp_in")]
    with (
        torch.set_grad_enabled(grad),
        model.hooks([(f"blocks.0.hook_{site}", lambda x, hook: x.zero_())]),
    ):
        _, edited = model.run_with_cache(TOKENS, names_filter=names)
    clean = model.run_with_cache(TOKENS, names_filter=names)[1]
    assert torch.equal(edited["resid_pre", 0], clean["resid_pre", 0])
    assert not torch.allclose(edited["attn_out", 0], clean["attn_out", 0])
    assert torch.equal(edited["resid_mid", 0], edited["resid_pre", 0] + edited["attn_out", 0])
    assert torch.equal(edited["mlp_in", 0], edited["resid_mid", 0])


@pytest.mark.parametrize(
    ("site", "reached"), [("q_input", "q"), ("k_input", "k"), ("v_input", "v"), ("attn_in", "qkv")]
)
@pytest.mark.parametrize("name", ["gpt2", "shortformer", "grouped gated rms rotary"])
def test_patching_one_heads_input_changes_that_heads_reading_only(name: str, site: str, reached: str) -> None:
    model = model_of(name)
    head, group = 1, model.cfg.n_heads // model.cfg.n_kv_heads

    def patch(x: Tensor, hook: HookPoint) -> None:
        x[:, :, head] = 3 * x[:, :, head] + direction_for(tuple(x.shape))[:, :, head]

    names = [f"blocks.0.attn.hook_{letter}" for letter in "qkv"]
    _, clean = model.run_with_cache(TOKENS, names_filter=names)
    with model.hooks([(f"blocks.0.hook_{site}", patch)]):
        _, edited = model.run_with_cache(TOKENS, names_filter=names)
    for letter in "qkv":
        before, after = clean[letter, 0], edited[letter, 0]
        # The edited head of `attn_in` is a query head; its keys and values are those of its group.
        changed = head // group if site == "attn_in" and letter != "q" else head
        for i in range(before.shape[2]):
            same = torch.allclose(before[:, :, i], after[:, :, i], rtol=0, atol=1e-12)
            assert same == (not (letter in reached and i == changed)), (letter, i)


def test_each_head_reading_its_own_unedited_copy_restores_the_output() -> None:
    model = model_of("grouped gated rms rotary")
    sites = [f"blocks.*.hook_{site}" for site in ("attn_in", "q_input", "k_input", "v_input")]
    with torch.no_grad():
        hooked = model.run_with_hooks(TOKENS, fwd_hooks=[(site, lambda x, hook: x.mul_(1)) for site in sites])
        torch.testing.assert_close(hooked, model(TOKENS), rtol=0, atol=1e-12)


def test_an_edit_at_ln1_acts_on_the_copies_that_heads_read_too() -> None:
    """Where every head's copy is shifted, the edited norm is that of the shifted stream."""
    model = model_of("gpt2")
    per_head = [(f"blocks.0.hook_{x}_input", lambda x, hook: x + 1) for x in "qkv"]
    stream = ("blocks.0.hook_resid_pre", lambda x, hook: x + 1)
    for site in ("hook_normalized", "hook_scale"):
        norm_edit = (f"blocks.0.ln1.{site}", lambda x, hook: 2 * x)
        _, expected = model.run_with_cache(TOKENS)
        with model.hooks(fwd_hooks=[stream, norm_edit]):
            _, expected = model.run_with_cache(TOKENS, names_filter="blocks.0.attn.hook_*")
        for inputs in (per_head, [("blocks.0.hook_attn_in", lambda x, hook: x + 1)]):
            with model.hooks(fwd_hooks=[*inputs, norm_edit]):
                _, cache = model.run_with_cache(TOKENS, names_filter="blocks.0.attn.hook_*")
            for name, value in cache.items():
                torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10)
    assert not any(point.live for point in model.hook_points())


# What no hook may write to


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "shortformer",
        "no norms, no positions",
        "mixture",
        "sinks, mixture with a limit",
        "norms on the stream, xielu, no final norm",
        "qk LN with a gain per head, some layers rotate, scaled queries, tied, scaled logits",
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_hooks_in_place_never_write_to_the_weights_or_the_callers_tokens(name: str, grad: bool) -> None:
    model = model_of(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    # One prompt: positions that are expanded over a batch of one look like memory of their own.
    for tokens in (TOKENS.clone(), TOKENS[:1].clone()):
        kept = tokens.clone()
        with torch.set_grad_enabled(grad):
            clean = model(tokens)
            for site in sites_of(model):
                if not site.endswith("hook_expert_indices"):
                    model.run_with_hooks(tokens, fwd_hooks=[(site, lambda x, hook: x.zero_())])
            assert torch.equal(tokens, kept)
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
            assert torch.equal(model(tokens), clean)


@pytest.mark.parametrize("name", ["gpt2", "parallel"])
@pytest.mark.parametrize("grad", [False, True])
def test_hooks_in_place_never_write_to_the_callers_residual(name: str, grad: bool) -> None:
    model = model_of(name)
    residual = direction_for((BATCH, POS, model.cfg.d_model))
    kept = residual.clone()
    with torch.set_grad_enabled(grad):
        for site in sites_of(model):
            if site.startswith(("blocks.1", "ln_final", "unembed")):
                model.run_with_hooks(residual, start_at_layer=1, fwd_hooks=[(site, lambda x, hook: x.zero_())])
    assert torch.equal(residual, kept)


def test_a_tensor_that_a_hook_returned_is_not_written_to_by_later_hooks() -> None:
    model = model_of("gpt2")
    mine = direction_for((BATCH, POS, model.cfg.d_model))
    kept = mine.clone()
    for value in (mine, mine[:, :]):
        with torch.no_grad():
            model.run_with_hooks(
                TOKENS,
                fwd_hooks=[
                    ("blocks.0.hook_resid_post", lambda x, hook, value=value: value),
                    ("blocks.0.hook_resid_post", lambda x, hook: x.zero_()),
                    ("blocks.1.hook_resid_pre", lambda x, hook: x.add_(1)),
                    ("blocks.1.hook_mlp_in", lambda x, hook: x.add_(1)),
                ],
            )
        assert torch.equal(mine, kept)


# Fused and eager attention


@pytest.fixture
def fused_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers, in the order they run, whose attention was fused. Their score scales tell them apart."""
    layers: list[int] = []
    fused = F.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        layers.append(round(1 / (kwargs["scale"] * 2.0)) - 1)
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return layers


def three_layers() -> HookedTransformer:
    return tiny_model(n_layers=3, scale_attn_by_inverse_layer_idx=True)


@pytest.mark.parametrize("site", ["hook_attn_scores", "hook_pattern"])
def test_attention_is_eager_only_in_the_layer_whose_scores_or_pattern_are_wanted(
    fused_layers: list[int], site: str
) -> None:
    model = three_layers()
    name = f"blocks.1.attn.{site}"
    model(TOKENS)
    assert fused_layers == [0, 1, 2]
    for run in (
        lambda: model.run_with_cache(TOKENS, names_filter=name),
        lambda: model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda x, hook: None)]),
        lambda: model.run_with_hooks(TOKENS, bwd_hooks=[(name, lambda grad, hook: None)]),
    ):
        fused_layers.clear()
        run()
        assert fused_layers == [0, 2]
    fused_layers.clear()
    model(TOKENS)
    assert fused_layers == [0, 1, 2]


def test_attention_stays_fused_whatever_else_is_hooked(fused_layers: list[int]) -> None:
    model = three_layers()
    others = [site for site in model.hook_dict if not site.endswith(("hook_attn_scores", "hook_pattern"))]
    model.run_with_cache(TOKENS, names_filter=others)
    assert fused_layers == [0, 1, 2]
    fused_layers.clear()
    model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.*.attn.hook_[qkvz]", lambda x, hook: 2 * x)])
    assert fused_layers == [0, 1, 2]
    fused_layers.clear()
    model.run_with_cache(TOKENS)
    assert fused_layers == []
