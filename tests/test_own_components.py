"""Sweeps, grids and caches of models with components of one's own: the plain loop's numbers, or an error."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooked_lm import HookedTransformer, Intervention, metrics, patching
from hooked_lm.components import MLP, Attention, TransformerBlock, Unembed
from hooked_lm.components.stock import not_stock
from hooked_lm.hooks import HookPoint
from hooked_lm.sweep import sweep
from tests.helpers import randomise_, tiny_model, tiny_tokens
from tests.test_patching_own_components import CASES, changed_model

CLEAN, CORRUPTED = tiny_tokens(pos=5, seed=1), tiny_tokens(pos=5, seed=2)
METRIC = metrics.logit_diff(3, 4)
SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "z", "q", "v", "pattern", "post")
Change = Callable[[HookedTransformer], None]


def attends_anew(model: HookedTransformer) -> None:
    attn = model.blocks[1].attn
    attn.attend = lambda *args: Attention.attend(attn, *args) * 1.5


def other_activation(model: HookedTransformer) -> None:
    model.blocks[1].mlp.act_fn = lambda x: x.cumsum(1)  # looks at earlier positions


def other_module(model: HookedTransformer) -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model.blocks[1].hook_attn_out = Doubled()


def other_hook_point(model: HookedTransformer) -> None:
    class Halved(HookPoint):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(0.5 * x)

    model.blocks[1].hook_mlp_out = Halved("batch pos d_model")
    model.setup()


def torch_hook_at_a_hook_point(model: HookedTransformer) -> None:
    model.blocks[1].hook_attn_out.register_forward_hook(lambda module, args, out: out * 1.5)


class Loud(HookedTransformer):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        return out * 2 if kwargs.get("return_type", "logits") == "logits" else out


def swapped_blocks(model: HookedTransformer) -> None:
    model.blocks[0], model.blocks[2] = model.blocks[2], model.blocks[0]


def one_mlp_in_two_blocks(model: HookedTransformer) -> None:
    model.blocks[2].mlp = model.blocks[1].mlp
    model.setup()


def another_config(model: HookedTransformer) -> None:
    model.blocks[1].attn = randomise_(Attention(model.cfg.replace(attention_dir="bidirectional"), 1)).double()
    model.setup()


def plain_list_of_blocks(model: HookedTransformer) -> None:
    class Hot(TransformerBlock):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs) * 1.5

    blocks = list(model.blocks)
    blocks[1].__class__ = Hot
    del model.blocks
    model.blocks = blocks


def wrapped(model: HookedTransformer) -> None:
    class LoRA(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.down = base, nn.Parameter(torch.full((12, 2), 0.1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x @ self.down @ self.down.T

    model.blocks[1].mlp = LoRA(model.blocks[1].mlp)
    model.setup()


def method_of_a_mixin_behind(model: HookedTransformer) -> None:
    class Louder(nn.Module):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs) * 1.5

    model.blocks[1].attn.__class__ = type("LoudAttention", (Attention, Louder), {})


def forward_set_on_a_hook_point(model: HookedTransformer) -> None:
    model.blocks[1].hook_attn_out.forward = lambda x: 1.5 * x


def added_module(model: HookedTransformer) -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model.blocks[1].add_module("hook_attn_out", Doubled())


def other_model(model: HookedTransformer) -> None:
    model.__class__ = Loud


MORE: tuple[Change, ...] = (
    attends_anew,
    other_activation,
    other_module,
    other_hook_point,
    torch_hook_at_a_hook_point,
    swapped_blocks,
    one_mlp_in_two_blocks,
    another_config,
    plain_list_of_blocks,
    wrapped,
    method_of_a_mixin_behind,
    forward_set_on_a_hook_point,
    added_module,
    other_model,
)
EVERY_CASE = [pytest.param(case, id=" by ".join(case)) for case in CASES] + [
    pytest.param(change, id=change.__name__) for change in MORE
]


def made(case: Any) -> HookedTransformer:
    if isinstance(case, tuple):
        return changed_model(*case)
    model = tiny_model(n_layers=3)
    case(model)
    return model


def cells_of(model: HookedTransformer) -> list[Intervention]:
    """A cell at every layer, for some sites and positions, with the clean run's values."""
    _, clean = model.run_with_cache(CLEAN)
    names = [model_name for model_name in clean if model_name.split("hook_")[-1] in SITES]
    return [Intervention.from_cache(name, clean, pos=pos) for name in names for pos in (1, 4)]


@torch.no_grad()
@pytest.mark.parametrize("case", EVERY_CASE)
def test_a_sweep_is_the_plain_loop_and_says_why(case: Any) -> None:
    model, bar = made(case), io.StringIO()
    cells = cells_of(model)
    with redirect_stderr(bar):
        swept = sweep(model, CORRUPTED, cells, METRIC)
    loop = torch.stack([METRIC(model.run(CORRUPTED, interventions=[cell])) for cell in cells])
    torch.testing.assert_close(swept, loop, rtol=0, atol=1e-9)
    reason = not_stock(model)
    assert reason is not None
    assert f"one run per cell ({reason}" in bar.getvalue()


@torch.no_grad()
@pytest.mark.parametrize("case", EVERY_CASE)
def test_the_head_grid_is_that_of_hooks(case: Any) -> None:
    model = made(case)
    _, clean = model.run_with_cache(CLEAN)
    grid = patching.get_act_patch_attn_head_out_all_pos(model, CORRUPTED, clean, METRIC, verbose=False)
    for layer in range(3):
        for head in range(3):

            def patch(z: Tensor, hook: HookPoint, layer: int = layer, head: int = head) -> Tensor:
                z[:, :, head] = clean["z", layer][:, :, head]
                return z

            expected = METRIC(model.run_with_hooks(CORRUPTED, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", patch)]))
            torch.testing.assert_close(grid[layer, head], expected, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("case", EVERY_CASE)
def test_a_lazy_cache_has_the_runs_values_or_raises(case: Any) -> None:
    model = made(case)
    _, full = model.run_with_cache(CORRUPTED)
    try:
        _, lazy = model.run_with_cache(CORRUPTED, lazy=True)
        read = dict(lazy)
    except (ValueError, RuntimeError) as error:
        assert "lazy" in str(error)  # noqa: PT017
        return
    assert list(read) == list(full)
    for name, value in read.items():
        torch.testing.assert_close(value, full[name], rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (Attention, "forward"),
        (Attention, "attend"),
        (Attention, "write"),
        (MLP, "forward"),
        (TransformerBlock, "forward"),
        (Unembed, "forward"),
        (HookedTransformer, "forward"),
    ],
)
def test_a_method_patched_on_the_class_is_noticed(kind: type, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(n_layers=3)
    assert not_stock(model) is None
    original = getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda self, *args, **how: original(self, *args, **how) * 1.5)
    assert not_stock(model) is not None
    cells = [Intervention(f"blocks.{layer}.attn.hook_z", "zero", head=1) for layer in range(3)]
    swept = sweep(model, CORRUPTED, cells, METRIC, verbose=False)
    loop = torch.stack([METRIC(model.run(CORRUPTED, interventions=[cell])) for cell in cells])
    torch.testing.assert_close(swept, loop, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match=f"which has another {method}"):
        model.run_with_cache(CORRUPTED, lazy=True)


@torch.no_grad()
def test_global_hooks_of_torch_are_noticed() -> None:
    model = tiny_model()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        assert not_stock(model) == "torch's global module hooks may do anything"
    finally:
        handle.remove()
    assert not_stock(model) is None


@torch.no_grad()
@pytest.mark.parametrize("change", ["soft cap", "eps", "torch hook"])
def test_a_lazy_cache_notices_what_changes_after_the_run(change: str) -> None:
    model = tiny_model()
    _, lazy = model.run_with_cache(CORRUPTED, lazy=True)
    if change == "soft cap":
        model.cfg.output_logits_soft_cap = 0.5
    elif change == "eps":
        model.ln_final.eps = 1.0
    else:
        model.ln_final.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(RuntimeError, match="does not compute what it did in the run"):
        lazy["unembed.hook_out"]


@torch.no_grad()
def test_a_lazy_cache_refuses_edits_of_a_norm_and_of_copies_read_through_it() -> None:
    model = tiny_model()
    edits = [("blocks.0.ln1.hook_scale", lambda x, hook: 1.5 * x), ("blocks.0.hook_q_input", lambda x, hook: x + 1)]
    with model.hooks(fwd_hooks=edits), pytest.raises(ValueError, match=r"norm and single heads' inputs in blocks\.0"):
        model.run_with_cache(CORRUPTED, lazy=True)


def test_a_subclass_that_changes_nothing_is_walked_and_so_is_one_that_says_it_keeps_the_stages() -> None:
    class Named(Attention):
        """Adds a method."""

        def name(self) -> str:
            return "mine"

    class Counting(TransformerBlock):
        keeps_stages = True
        calls = 0

        def after_attention(self, resid_pre: Tensor, attn_out: Tensor) -> Tensor:
            Counting.calls += 1
            return super().after_attention(resid_pre, attn_out)

    model = tiny_model(n_layers=3)
    for block in model.blocks:
        block.attn.__class__, block.__class__ = Named, Counting
    assert not_stock(model) is None
    cells = cells_of(model)
    with redirect_stderr(io.StringIO()) as bar:
        swept = sweep(model, CORRUPTED, cells, METRIC)
    assert "one run per cell" not in bar.getvalue()
    loop = torch.stack([METRIC(model.run(CORRUPTED, interventions=[cell])) for cell in cells])
    torch.testing.assert_close(swept, loop, rtol=0, atol=1e-9)


def test_the_declaration_is_not_inherited() -> None:
    class Kept(MLP):
        keeps_stages = True

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Changed(Kept):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = tiny_model()
    model.blocks[0].mlp.__class__ = Kept
    assert not_stock(model) is None
    model.blocks[0].mlp.__class__ = Changed
    assert not_stock(model) == "blocks.0.mlp is a Changed, which overrides forward"


# What a cache works out from weights


def hot(kind: type) -> type:
    return type("Hot", (kind,), {"forward": lambda self, *args, **how: kind.forward(self, *args, **how) * 2})


@torch.no_grad()
def test_a_cache_does_not_take_overridden_components_for_stock_ones() -> None:
    model = tiny_model()
    for block in model.blocks:
        block.attn.__class__, block.mlp.__class__ = hot(type(block.attn)), hot(type(block.mlp))
    model.ln_final.__class__, model.unembed.__class__ = hot(type(model.ln_final)), hot(type(model.unembed))
    _, cache = model.run_with_cache(CORRUPTED)
    for read in (
        lambda: cache.stack_head_results(),
        lambda: cache.compute_head_results(),
        lambda: cache.get_neuron_results(0),
        lambda: cache.stack_neuron_results(1),
        lambda: cache.decompose_resid(apply_ln=True),
        lambda: cache.logit_attrs(cache.accumulated_resid(), 3),
    ):
        with pytest.raises(ValueError, match="is a Hot, which overrides forward"):
            read()
    lens = cache.accumulated_resid(apply_ln=True)
    torch.testing.assert_close(
        lens[-1], cache["ln_final.hook_normalized"] * 0 + model.ln_final(cache["resid_post", -1])
    )


def test_models_made_of_other_classes_are_told_apart_by_name() -> None:
    model = tiny_model()
    model.blocks[0].mlp = nn.Identity()
    assert not_stock(model) == "blocks.0.mlp is a Identity, which is no component of this package"
    randomise_(model)
