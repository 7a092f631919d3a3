"""`torch.func` on the model: functional calls, batches of weights and of prompts, Jacobians with hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value, jacfwd, jacrev, linearize, stack_module_state, vjp, vmap

from hooked_lm import HookedTransformer, Intervention
from hooked_lm.components.positions import _fixed_frequencies
from hooked_lm.components.sequence import SequenceLayout
from tests.autograd_helpers import ARCHITECTURES, MASK, TOKENS, directions_of, loaded, model_of, slope, weights_of
from tests.helpers import randomise_, tiny_tokenizer, tiny_tokens

# torch's own rules for forward-mode differentiation are compiled with it.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)
INPUTS = pytest.mark.parametrize("mask", [None, MASK], ids=["unpadded", "padded"])


def other_weights(model: HookedTransformer, seed: int = 1) -> dict[str, Tensor]:
    """Weights of the same shapes that have nothing to do with the model's own."""
    return weights_of(randomise_(copy.deepcopy(model), seed))  # type: ignore[arg-type]


def close(found: Tensor, expected: Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# Weights


@EVERY
@INPUTS
def test_a_functional_call_computes_with_the_weights_it_is_given(architecture: str, mask: Tensor | None) -> None:
    model = model_of(architecture)
    before, weights = model(TOKENS, attention_mask=mask), other_weights(model)
    found = functional_call(model, weights, (TOKENS,), {"attention_mask": mask}, strict=True)
    close(found, loaded(model, weights)(TOKENS, attention_mask=mask), atol=0)
    assert not torch.allclose(found, before)
    assert torch.equal(model(TOKENS, attention_mask=mask), before)


@EVERY
def test_each_weight_by_itself_is_followed(architecture: str) -> None:
    """Anything that were kept from the model's own weights would show here."""
    model = model_of(architecture)
    weights, others = weights_of(model), other_weights(model)
    for name in weights:
        mixed = {**weights, name: others[name]}
        close(functional_call(model, mixed, (TOKENS,)), loaded(model, mixed)(TOKENS), atol=0)


@EVERY
@INPUTS
def test_the_gradient_of_a_functional_call_is_that_of_backward(architecture: str, mask: Tensor | None) -> None:
    model = model_of(architecture)
    weights = other_weights(model)
    options = {"return_type": "loss", "attention_mask": mask}
    found, value = grad_and_value(lambda weights: functional_call(model, weights, (TOKENS,), options))(weights)
    twin = loaded(model, weights)
    loss = twin(TOKENS, **options)
    loss.backward()
    close(value, loss.detach())
    for name, parameter in twin.named_parameters():
        assert parameter.grad is not None
        close(found[name], parameter.grad)


@EVERY
@INPUTS
def test_gradients_per_prompt_are_those_of_a_loop(architecture: str, mask: Tensor | None) -> None:
    model = model_of(architecture)
    weights = weights_of(model)
    each = torch.ones_like(TOKENS) if mask is None else mask

    def loss(weights: dict[str, Tensor], tokens: Tensor, mask: Tensor) -> Tensor:
        return functional_call(model, weights, (tokens,), {"return_type": "loss", "attention_mask": mask[None]})

    found = vmap(grad(loss), in_dims=(None, 0, 0))(weights, TOKENS, each)
    for prompt in range(len(TOKENS)):
        model.zero_grad()
        model(TOKENS[prompt], return_type="loss", attention_mask=each[prompt, None]).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            close(found[name][prompt], parameter.grad)


@EVERY
@INPUTS
def test_an_ensemble_is_its_models_one_by_one(architecture: str, mask: Tensor | None) -> None:
    models = [model_of(architecture) for _ in range(3)]
    for seed, model in enumerate(models):
        randomise_(model, seed)
    with torch.no_grad():
        models[0].unembed.b_U.zero_()
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]

    def logits(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(models[0], (parameters, buffers), (TOKENS,), {"attention_mask": mask})

    found = vmap(logits)(parameters, buffers)
    for model, one in zip(models, found, strict=True):
        close(one, model(TOKENS, attention_mask=mask))


def test_a_bias_of_zeros_in_the_model_is_not_that_of_the_call() -> None:
    model = model_of("layer-norm")
    weights = weights_of(model)
    with torch.no_grad():
        model.unembed.b_U.zero_()
        found = functional_call(model, weights, (TOKENS,))
        close(found, loaded(model, weights)(TOKENS))


def test_a_separate_unembedding_for_tied_weights_raises_and_says_how_to_untie() -> None:
    model = model_of("tied")
    before, weights = model(TOKENS), other_weights(model)
    with pytest.raises(TypeError, match=r"functional_call.*call unembed\.untie\(\) first"):
        functional_call(model, {**weights, "unembed.W_U": torch.randn(16, 20).double()}, (TOKENS,))
    assert torch.equal(model(TOKENS), before)
    assert "W_U" not in vars(model.unembed)
    model.unembed.untie()
    weights = {**weights, "unembed.W_U": torch.randn(16, 20).double()}
    close(functional_call(model, weights, (TOKENS,)), loaded_untied(model, weights)(TOKENS))


def loaded_untied(model: HookedTransformer, weights: dict[str, Tensor]) -> HookedTransformer:
    twin = HookedTransformer(model.cfg.replace(tie_word_embeddings=False))
    twin.load_state_dict(weights)
    return twin


# Prompts


@EVERY
def test_prompts_in_a_vmap_get_the_logits_of_the_batch(architecture: str) -> None:
    model = model_of(architecture)
    close(vmap(model)(TOKENS)[:, 0], model(TOKENS))
    found = vmap(lambda tokens, mask: model(tokens, attention_mask=mask[None]))(TOKENS, MASK)
    close(found[:, 0], model(TOKENS, attention_mask=MASK))


def test_padding_is_inferred_under_vmap_too() -> None:
    model = model_of("layer-norm", d_vocab=300)
    model.set_tokenizer(tiny_tokenizer(), default_padding_side="left")
    assert model.tokenizer is not None
    padding = model.tokenizer.pad_token_id
    tokens = tiny_tokens(3, 6, vocab=300)
    tokens[tokens == padding] = 5
    tokens[0, :3] = padding
    expected = model(tokens, return_type="loss", loss_per_token=True)
    assert not torch.allclose(
        expected[0], model(tokens, return_type="loss", loss_per_token=True, padding_side="right")[0]
    )
    found = vmap(lambda one: model(one, return_type="loss", loss_per_token=True))(tokens)
    close(found[:, 0], expected)


def test_rotary_positions_that_depend_on_the_length_are_each_prompts_own() -> None:
    changes: dict[str, Any] = {"use_dynamic_rope": True, "dynamic_rope_factor": 4.0, "dynamic_rope_original_ctx_len": 4}
    model = model_of("rotary, grouped queries, gated", **changes)
    found = vmap(lambda tokens, mask: model(tokens, attention_mask=mask[None]))(TOKENS, MASK)
    close(found[:, 0], model(TOKENS, attention_mask=MASK))


@pytest.mark.parametrize("sparsemixer_jitter", [None, 0.1])
@pytest.mark.parametrize("d_shared_expert", [None, 8])
def test_every_prompt_of_a_vmap_has_its_own_experts(
    sparsemixer_jitter: float | None, d_shared_expert: int | None
) -> None:
    model = model_of("experts", sparsemixer_jitter=sparsemixer_jitter, d_shared_expert=d_shared_expert)
    _, cache = model.run_with_cache(TOKENS, names_filter="blocks.0.mlp.hook_expert_indices")
    assert cache["blocks.0.mlp.hook_expert_indices"].sort(-1).values.flatten(0, 1).unique(dim=0).shape[0] > 1
    close(vmap(model)(TOKENS)[:, 0], model(TOKENS))
    _, along = torch.func.jvp(lambda x: model(x, start_at_layer=0), *residual_and_direction(model))
    residual, direction = (one[0] for one in residual_and_direction(model))
    close(along, slope(lambda step: model(residual + step * direction, start_at_layer=0).detach()), atol=1e-8)


def residual_and_direction(model: HookedTransformer) -> tuple[tuple[Tensor], tuple[Tensor]]:
    residual = model(TOKENS, stop_at_layer=0).detach()
    direction = torch.randn(residual.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (residual,), (direction,)


def test_an_expert_that_no_token_chose_may_overflow_under_vmap() -> None:
    model = model_of("experts", experts_per_token=1)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.b_router[2] = -1e4
            block.mlp.W_out[2] = float("inf")
    found = vmap(model)(TOKENS)
    assert found.isfinite().all()
    close(found[:, 0], model(TOKENS))


# Hooks


def sites_of(model: HookedTransformer) -> list[str]:
    return [name for name, point in model.hook_dict.items() if point.differentiable]


@pytest.mark.parametrize("architecture", ["layer-norm", "rotary, grouped queries, gated", "experts"])
def test_a_batch_of_edits_at_any_site_is_a_loop_of_edits(architecture: str) -> None:
    model = model_of(architecture)
    scales = torch.tensor([0.5, 1.0, 1.7], dtype=torch.float64)
    for site in sites_of(model):

        def edited(scale: Tensor, site: str = site) -> Tensor:
            return model.run_with_hooks(TOKENS, fwd_hooks=[(site, lambda x, hook: x * scale)])

        found = vmap(edited)(scales)
        for scale, one in zip(scales, found, strict=True):
            torch.testing.assert_close(one, edited(scale), rtol=0, atol=1e-11, msg=lambda text, s=site: f"{s}: {text}")


@pytest.mark.parametrize("architecture", ["layer-norm", "rotary, grouped queries, gated"])
def test_the_jacobian_at_any_site_is_the_slope(architecture: str) -> None:
    model = model_of(architecture)
    here = torch.zeros(2, dtype=torch.float64)
    for site in sites_of(model):

        def edited(by: Tensor, site: str = site) -> Tensor:
            def edit(x: Tensor, hook: object) -> Tensor:
                finite = x.clamp(min=-10.0)  # masked scores are minus infinity
                return x + by[0] * finite + by[1] * finite.cos()

            return model.run_with_hooks(TOKENS, fwd_hooks=[(site, edit)])[:, -1]

        backwards, forwards = jacrev(edited)(here), jacfwd(edited)(here)
        for entry in range(2):
            unit = torch.eye(2, dtype=torch.float64)[entry]
            expected = slope(lambda step, unit=unit, edited=edited: edited(step * unit).detach())
            for found in (backwards, forwards):
                torch.testing.assert_close(
                    found[..., entry], expected, rtol=0, atol=1e-8, msg=lambda text, s=site: f"{s}: {text}"
                )


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "norms before and after", "solu_ln"])
def test_second_derivatives_are_the_same_in_every_order(architecture: str) -> None:
    """Forward mode twice, and backward mode over forward mode, need rules that PyTorch's fused layer norm lacks."""
    others: dict[str, dict[str, Any]] = {
        "norms before and after": {"use_normalization_before_and_after": True},
        "solu_ln": {"act_fn": "solu_ln"},
    }
    model = model_of("layer-norm", **others[architecture]) if architecture in others else model_of(architecture)
    directions = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(by: Tensor) -> Tensor:
        shift = by @ directions
        hook = ("blocks.0.hook_resid_pre", lambda x, hook: x + shift)
        return model.run_with_hooks(TOKENS, fwd_hooks=[hook], return_type="loss")

    here, units = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    gradient = grad(loss)
    expected = torch.stack([slope(lambda step, unit=unit: gradient(here + step * unit), 1e-4) for unit in units])
    assert expected.abs().max() > 1e-3
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            torch.testing.assert_close(outer(inner(loss))(here), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(torch.autograd.functional.hessian(loss, here), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("norm_site", ["ln1.hook_scale", "ln1.hook_normalized"])
@pytest.mark.parametrize("site", ["hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"])
def test_copies_of_the_stream_and_hooks_at_the_norm_go_together(site: str, norm_site: str) -> None:
    model = model_of("rotary, grouped queries, gated")

    def edited(scale: Tensor) -> Tensor:
        hooks = [(f"blocks.1.{site}", lambda x, hook: None), (f"blocks.1.{norm_site}", lambda x, hook: x * scale)]
        return model.run_with_hooks(TOKENS, fwd_hooks=hooks)

    scales = torch.tensor([0.5, 1.0, 1.7], dtype=torch.float64)
    close(vmap(edited)(scales), torch.stack([edited(scale) for scale in scales]))
    close(jacrev(edited)(scales[0]), slope(lambda step: edited(scales[0] + step).detach()), atol=1e-8)
    close(jacfwd(edited)(scales[0]), slope(lambda step: edited(scales[0] + step).detach()), atol=1e-8)


@pytest.mark.parametrize("operation", ["add", "scale", "replace"])
@pytest.mark.parametrize("chosen", [{}, {"pos": -1}, {"pos": (0, 3, 4), "head": (1, 2)}, {"head": 0, "feature": 2}])
def test_interventions_take_a_batch_of_values(operation: Any, chosen: dict[str, Any]) -> None:
    model = model_of("layer-norm")

    def run(value: Tensor) -> Tensor:
        return model.run(TOKENS, interventions=[Intervention("blocks.0.attn.hook_z", operation, value, **chosen)])

    values = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)
    close(vmap(run)(values), torch.stack([run(value) for value in values]))
    close(jacfwd(run)(values[0]), slope(lambda step: run(values[0] + step).detach()), atol=1e-8)
    close(jacrev(run)(values[0]), slope(lambda step: run(values[0] + step).detach()), atol=1e-8)


def test_a_vector_jacobian_product_with_a_hook() -> None:
    model = model_of("alibi")
    weights = directions_of(weights_of(model))

    def logits(shift: Tensor) -> Tensor:
        with model.hooks(fwd_hooks=[("blocks.0.hook_attn_out", lambda x, hook: x + shift)]):
            return functional_call(model, weights, (TOKENS,))

    here = torch.zeros(16, dtype=torch.float64)
    value, pull = vjp(logits, here)
    seed = torch.randn(value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (found,) = pull(seed)
    unit = torch.eye(16, dtype=torch.float64)[3]
    close(found[3], slope(lambda step: (logits(step * unit).detach() * seed).sum()), atol=1e-9)


# torch inserts constants into its own graph before they are there.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
def test_a_linearized_run_is_the_derivative_forwards() -> None:
    model = model_of("layer-norm")
    (residual,), (direction,) = residual_and_direction(model)
    _, linear = linearize(lambda x: model(x, start_at_layer=0), residual)
    _, expected = torch.func.jvp(lambda x: model(x, start_at_layer=0), (residual,), (direction,))
    close(linear(direction), expected)


def test_activations_are_returned_from_a_transform() -> None:
    model = model_of("layer-norm")

    def pattern(tokens: Tensor) -> Tensor:
        return model.run_with_cache(tokens)[1]["pattern", 1]

    close(vmap(pattern)(TOKENS)[:, 0], model.run_with_cache(TOKENS)[1]["pattern", 1])


def test_a_tensor_that_leaves_a_vmap_some_other_way_raises() -> None:
    model, kept = model_of("layer-norm"), []
    hook = ("blocks.1.hook_resid_pre", lambda x, hook: kept.append(x))
    vmap(lambda tokens: model.run_with_hooks(tokens, fwd_hooks=[hook]))(TOKENS)
    with pytest.raises(RuntimeError, match="escaped from inside a function being vmapped"):
        kept[0] + 1


@pytest.mark.parametrize("option", [{"lazy": True}, {"offload": "never-written.safetensors"}])
def test_caches_that_keep_values_only_raise(option: dict[str, Any]) -> None:
    model = model_of("layer-norm")
    with pytest.raises(ValueError, match=f"under torch.func .*cache without {next(iter(option))}="):
        vmap(lambda tokens: model.run_with_cache(tokens, **option)[0])(TOKENS)


def test_a_key_value_cache_carries_batches_and_derivatives() -> None:
    model = model_of("rotary, grouped queries, gated")
    weights = weights_of(model)
    direction = directions_of(weights)

    def logits(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
        cache = model.new_kv_cache(len(tokens), capacity=6)
        for part in (tokens[:, :3], tokens[:, 3:4], tokens[:, 4:]):
            out = functional_call(model, weights, (part,), {"past_kv_cache": cache})
        return out

    close(vmap(lambda tokens: logits(weights, tokens[None]))(TOKENS)[:, 0], model(TOKENS)[:, 4:])

    def whole(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(model, weights, (TOKENS,))[:, 4:]

    _, found = torch.func.jvp(lambda weights: logits(weights, TOKENS), (weights,), (direction,))
    _, expected = torch.func.jvp(whole, (weights,), (direction,))
    close(found, expected)
    stepwise, at_once = (
        grad(lambda w, f=f: f(w).square().sum())(weights) for f in (lambda w: logits(w, TOKENS), whole)
    )
    for name in weights:
        close(stepwise[name], at_once[name], atol=1e-9)


def test_no_table_of_a_transform_is_kept_for_later_runs() -> None:
    model = model_of("rotary, grouped queries, gated", rotary_base=123.0)
    _fixed_frequencies.cache_clear()
    grad(lambda weights: functional_call(model, weights, (TOKENS,), {"return_type": "loss"}))(weights_of(model))
    assert _fixed_frequencies.cache_info().currsize == 0
    model(TOKENS)
    assert _fixed_frequencies.cache_info().currsize == 1


def test_fused_and_plain_attention_take_the_same_masks() -> None:
    """What a transform computes is the plain form of what a run computes."""
    model = model_of("window", attn_types=["local", "local"])
    attention = model.blocks[0].attn
    q, k, v = torch.randn(3, 1, 6, 4, 4, dtype=torch.float64)
    layout = SequenceLayout(6, 0, q.device)
    close(attention.eager_attention(q, k, v, layout), attention.fused_attention(q, k, v, layout))
