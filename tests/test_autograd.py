"""Derivatives beyond the first, and forward-mode differentiation: they work, and are those of the model's function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from hooked_lm import HookedTransformer
from hooked_lm.components import fused
from hooked_lm.components.attention import Attention
from hooked_lm.components.fused import fused_attention
from hooked_lm.components.linear import linear
from tests.autograd_helpers import ARCHITECTURES, MASK, TOKENS, directions_of, loaded, model_of, slope, weights_of
from tests.helpers import counted

# torch's own rules for forward-mode differentiation are compiled with it.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

INPUTS = pytest.mark.parametrize("mask", [None, MASK], ids=["unpadded", "padded"])
EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)


def gradients(model: HookedTransformer, mask: Tensor | None = None, create_graph: bool = False) -> dict[str, Tensor]:
    """The gradient of the loss at every parameter."""
    parameters = dict(model.named_parameters())
    loss = model(TOKENS, return_type="loss", attention_mask=mask)
    found = torch.autograd.grad(loss, list(parameters.values()), create_graph=create_graph)
    return dict(zip(parameters, found, strict=True))


def product(left: dict[str, Tensor], right: dict[str, Tensor]) -> Tensor:
    return torch.stack([(left[name] * right[name]).sum() for name in left]).sum()


def assert_all_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


# The second derivative


@EVERY
@INPUTS
def test_the_hessian_times_a_direction_is_the_slope_of_the_gradient(architecture: str, mask: Tensor | None) -> None:
    model = model_of(architecture)
    weights = weights_of(model)
    direction = directions_of(weights)
    along = product(gradients(model, mask, create_graph=True), direction)
    found = torch.autograd.grad(along, list(model.parameters()), allow_unused=True)

    def moved(step: float) -> Tensor:
        there = loaded(model, {name: value + step * direction[name] for name, value in weights.items()})
        return torch.cat([one.flatten() for one in gradients(there, mask).values()])

    expected = slope(moved)
    assert expected.abs().max() > 1e-2
    flat = [
        torch.zeros(w.numel()).double() if one is None else one.flatten()
        for one, w in zip(found, weights.values(), strict=True)
    ]
    torch.testing.assert_close(torch.cat(flat), expected, rtol=0, atol=1e-8)


@EVERY
@INPUTS
def test_a_gradient_with_a_graph_is_the_gradient_without(architecture: str, mask: Tensor | None) -> None:
    model = model_of(architecture)
    assert_all_close(gradients(model, mask, create_graph=True), gradients(model, mask), atol=1e-12)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["causal", "none", "boolean", "numbers"])
def test_fused_attention_has_derivatives_of_every_order(kind: str, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = random(2, 3, 4, 2), random(2, 3, kv_heads, 2), random(2, 3, kv_heads, 2)
    mask = None
    if kind == "boolean":
        mask = torch.tensor([[[[1, 0, 1], [1, 1, 0], [0, 0, 1]]], [[[1, 1, 1], [0, 1, 0], [1, 0, 1]]]]).bool()
    if kind == "numbers":
        mask = random(1, 4, 1, 3).detach()

    def attend(*inputs: Tensor) -> Tensor:
        return fused_attention(*inputs, mask, kind == "causal", 0.7)

    assert torch.autograd.gradcheck(attend, (q, k, v))
    assert torch.autograd.gradgradcheck(attend, (q, k, v))

    def second(*inputs: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(attend(*inputs).pow(2).sum(), inputs[0], create_graph=True)
        return first.pow(2).sum()

    assert torch.autograd.gradgradcheck(second, (q, k, v))


def test_queries_alone_have_a_second_derivative() -> None:
    q, k, v = (torch.randn(1, 3, 2, 4, dtype=torch.float64) for _ in range(3))
    q.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda one: fused_attention(one, k, v, None, True, 1.0), q)


def test_a_first_derivative_is_left_to_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("layer-norm")
    eager = counted(monkeypatch, Attention, "eager_attention")
    plain = counted(monkeypatch, fused, "_gradients")  # type: ignore[arg-type]
    gradients(model)
    assert not eager
    assert not plain
    gradients(model, create_graph=True)
    assert not eager
    assert len(plain) == model.cfg.n_layers


def test_nothing_is_kept_for_backward_without_gradients() -> None:
    model = model_of("layer-norm").requires_grad_(False)
    assert model(TOKENS).grad_fn is None


def test_a_gradient_penalty_trains() -> None:
    model = model_of("rotary, grouped queries, gated")
    residual = model(TOKENS, stop_at_layer=1).detach().requires_grad_()
    loss = model(residual, start_at_layer=1, return_type="loss", tokens=TOKENS)
    (at_residual,) = torch.autograd.grad(loss, residual, create_graph=True)
    (loss + at_residual.square().sum()).backward()
    W_Q = model.blocks[1].attn.W_Q
    assert W_Q.grad is not None
    weights, direction = weights_of(model), torch.randn_like(W_Q)

    def moved(step: float) -> Tensor:
        there = loaded(model, {**weights, "blocks.1.attn.W_Q": W_Q.detach() + step * direction})
        again = there(residual, start_at_layer=1, return_type="loss", tokens=TOKENS)
        (gradient,) = torch.autograd.grad(again, residual)
        return again.detach() + gradient.square().sum()

    torch.testing.assert_close((W_Q.grad * direction).sum(), slope(moved), rtol=0, atol=1e-9)


@pytest.mark.parametrize("vectorize", [False, True])
def test_the_hessians_of_torch_agree(vectorize: bool) -> None:
    model = model_of("window")

    def loss(shift: Tensor) -> Tensor:
        hook = ("blocks.0.hook_resid_mid", lambda x, hook: x + shift)
        return model.run_with_hooks(TOKENS, fwd_hooks=[hook], return_type="loss")

    here = torch.zeros(16, dtype=torch.float64)
    found = torch.autograd.functional.hessian(loss, here, vectorize=vectorize)
    direction = torch.linspace(-1, 1, 16, dtype=torch.float64)
    (_, along) = torch.autograd.functional.hvp(loss, here, direction)
    expected = slope(lambda step: torch.autograd.functional.jacobian(loss, step * direction))
    torch.testing.assert_close(found @ direction, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(along, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.func.hessian(loss)(here), found, rtol=0, atol=1e-12)


@EVERY
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_in_a_batch_are_those_one_by_one(architecture: str, create_graph: bool) -> None:
    model = model_of(architecture)
    logits = model(TOKENS)
    seeds = torch.randn(4, *logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attn = model.blocks[0].attn
    W_K = attn.W_UK if architecture == "latent attention" else attn.W_K
    (together,) = torch.autograd.grad(
        logits, W_K, seeds, is_grads_batched=True, retain_graph=True, create_graph=create_graph
    )
    singly = [torch.autograd.grad(logits, W_K, seed, retain_graph=True)[0] for seed in seeds]
    torch.testing.assert_close(together, torch.stack(singly), rtol=0, atol=1e-12)


def test_a_graph_made_outside_of_a_vmap_is_differentiated_inside() -> None:
    model = model_of("layer-norm")
    logits, W_K = model(TOKENS), model.blocks[0].attn.W_K
    seeds = torch.randn(4, *logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def pulled(seed: Tensor) -> Tensor:
        return torch.autograd.grad(logits, W_K, seed, retain_graph=True)[0]

    expected = torch.stack([pulled(seed) for seed in seeds])
    torch.testing.assert_close(torch.func.vmap(pulled)(seeds), expected, rtol=0, atol=1e-12)


def test_the_second_derivative_goes_through_checkpoints() -> None:
    model = model_of("rotary, grouped queries, gated")
    W_V = model.blocks[0].attn.W_V

    def second(checkpointed: bool) -> Tensor:
        residual = model(TOKENS, stop_at_layer=0)
        for block in model.blocks:
            residual = checkpoint(block, residual, use_reentrant=False) if checkpointed else block(residual)
        (first,) = torch.autograd.grad(model.logits_of(residual).square().mean(), W_V, create_graph=True)
        return torch.autograd.grad(first.square().sum(), W_V)[0]

    torch.testing.assert_close(second(True), second(False), rtol=0, atol=1e-12)


def test_the_second_derivative_under_autocast_is_near_that_without() -> None:
    model = model_of("rotary, grouped queries, gated", dtype=torch.float32)
    W_K = model.blocks[0].attn.W_K

    def second(autocast: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(TOKENS, return_type="loss")
        (first,) = torch.autograd.grad(loss, W_K, create_graph=True)
        return torch.autograd.grad(first.square().sum(), W_K)[0]

    found, expected = second(True), second(False)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_products_have_second_derivatives(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, bias = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((5, 512), (512,)))
    weight = torch.randn(512, 512, generator=generator, dtype=dtype) / 20

    def second(multiply: Any) -> Tensor:
        inputs = [one.clone().requires_grad_() for one in (x, weight, bias)]
        first = torch.autograd.grad(multiply(*inputs).tanh().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum((one**2).sum() for one in first), inputs[1])[0]

    found, expected = second(linear), second(F.linear)
    assert (found - expected).norm() < (1e-4 if dtype == torch.float32 else 1e-12) * expected.norm()


# With hooks


COPIES = pytest.mark.parametrize("site", ["hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"])


def output_of_edits(model: HookedTransformer, site: str, shift: Tensor, scale: float) -> Tensor:
    """A number computed with the copies of the stream shifted, and a hook at the norm that reads them."""
    hooks = [
        (f"blocks.1.{site}", lambda x, hook: x * scale + shift),
        ("blocks.1.ln1.hook_normalized", lambda x, hook: x * 1.3),
    ]
    return model.run_with_hooks(TOKENS, fwd_hooks=hooks).square().mean()


def curvature(model: HookedTransformer, site: str, here: Tensor, direction: Tensor, scale: float) -> Tensor:
    def gradient(step: float) -> Tensor:
        shift = (here + step * direction).requires_grad_()
        return torch.autograd.grad(output_of_edits(model, site, shift, scale), shift)[0]

    return slope(gradient)


@COPIES
def test_edited_copies_of_the_stream_have_second_derivatives(site: str) -> None:
    model, here = model_of("layer-norm"), torch.full((16,), 0.2, dtype=torch.float64)
    direction = torch.linspace(-1, 1, 16, dtype=torch.float64)
    _, found = torch.autograd.functional.hvp(lambda shift: output_of_edits(model, site, shift, 1.1), here, direction)
    expected = curvature(model, site, here, direction, 1.1)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@COPIES
def test_copies_that_equal_the_stream_have_them_by_torch_func_and_raise_otherwise(site: str) -> None:
    model, here = model_of("layer-norm"), torch.zeros(16, dtype=torch.float64)
    direction = torch.linspace(-1, 1, 16, dtype=torch.float64)
    shift = here.clone().requires_grad_()
    (first,) = torch.autograd.grad(output_of_edits(model, site, shift, 1.0), shift, create_graph=True)
    (plain,) = torch.autograd.grad(output_of_edits(model, site, shift, 1.0), shift)
    torch.testing.assert_close(first, plain, rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match=r"no second derivative by backward: take one by torch\.func"):
        torch.autograd.grad((first * direction).sum(), shift)
    found = torch.func.hessian(lambda shift: output_of_edits(model, site, shift, 1.0))(here) @ direction
    torch.testing.assert_close(found, curvature(model, site, here, direction, 1.0), rtol=0, atol=1e-8)


def test_backward_hooks_see_the_gradient_at_z_under_create_graph() -> None:
    model = model_of("alibi")
    seen: list[Tensor] = []
    for create_graph in (False, True):
        with model.hooks(bwd_hooks=[("blocks.0.attn.hook_z", lambda grad, hook: seen.append(grad.detach()))]):
            gradients(model, create_graph=create_graph)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-12)


# Forward mode


@EVERY
@INPUTS
def test_the_derivative_forwards_is_the_slope(architecture: str, mask: Tensor | None) -> None:
    model = model_of(architecture)
    with torch.no_grad():
        model.unembed.b_U.zero_()  # zeros may have a derivative
    weights = weights_of(model)
    direction = directions_of(weights)

    def logits(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (TOKENS,), {"attention_mask": mask})

    value, found = torch.func.jvp(logits, (weights,), (direction,))

    def moved(step: float) -> Tensor:
        there = loaded(model, {name: one + step * direction[name] for name, one in weights.items()})
        return there(TOKENS, attention_mask=mask).detach()

    torch.testing.assert_close(value, moved(0.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, slope(moved), rtol=0, atol=1e-8)


def test_dual_numbers_go_through_the_model() -> None:
    model = model_of("layer-norm").requires_grad_(False)
    residual = model(TOKENS, stop_at_layer=1)
    direction = torch.randn(residual.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(residual, direction)
        found = forward_ad.unpack_dual(model(dual, start_at_layer=1)).tangent
    assert found is not None
    expected = slope(lambda step: model(residual + step * direction, start_at_layer=1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@COPIES
def test_a_copy_that_equals_the_stream_may_have_a_derivative(site: str) -> None:
    """A shift by zero changes no value, so that only its derivative says that the copy was edited."""
    model = model_of("layer-norm")

    def logits(shift: Tensor) -> Tensor:
        hooks = [(f"blocks.1.{site}", lambda x, hook: x + shift), ("blocks.1.ln1.hook_scale", lambda x, hook: x * 1.5)]
        return model.run_with_hooks(TOKENS, fwd_hooks=hooks)

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    direction = torch.linspace(-1, 1, 16, dtype=torch.float64)
    _, found = torch.func.jvp(lambda size: logits(size * direction), (zero,), (one,))
    expected = slope(lambda step: logits(step * direction).detach())
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.func.jacrev(logits)(0 * direction) @ direction, expected, rtol=0, atol=1e-9)
