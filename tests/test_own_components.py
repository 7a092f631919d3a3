"""Sweeps, grids and caches of models with components of one's own: the plain loop's numbers, or an error."""

from __future__ import annotations

import io
from contextlib import redirect_stderr

import pytest
import torch
from torch import Tensor, nn

from hooked_lm import HookedTransformer, Intervention
from hooked_lm.components import MLP, Attention, TransformerBlock, Unembed
from hooked_lm.components.stock import not_stock
from hooked_lm.sweep import sweep
from tests.helpers import randomise_, tiny_model
from tests.own_components_helpers import CORRUPTED, METRIC, cells_of


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
