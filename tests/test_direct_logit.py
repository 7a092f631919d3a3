"""Every split of a logit sums to it, and each part is what the logit loses when that part alone is taken away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hooked_lm import ActivationCache, HookedTransformer
from hooked_lm.circuits.direct_logit import LogitAttribution, hooks_for_attribution, logit_attribution
from hooked_lm.circuits.induction import repeated_random_tokens
from tests.direct_logit_helpers import BATCH, MODELS, POS, SPLITS, attributed, recorded, splits_of
from tests.helpers import tiny_config, tiny_model, tiny_tokens

models = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())


def before_cap(model: HookedTransformer, logits: torch.Tensor) -> torch.Tensor:
    cap = model.cfg.output_logits_soft_cap
    return cap * torch.atanh(logits / cap) if cap > 0 else logits


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
