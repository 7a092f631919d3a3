"""Every component changed in every way: sweeps, grids and lazy caches have the numbers of plain runs, or raise."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooked_lm import HookedTransformer, patching
from hooked_lm.components import Attention, TransformerBlock
from hooked_lm.components.stock import not_stock
from hooked_lm.hooks import HookPoint
from hooked_lm.sweep import sweep
from tests.changed_components_helpers import CASES, changed_model
from tests.helpers import randomise_, tiny_model
from tests.own_components_helpers import CLEAN, CORRUPTED, METRIC, cells_of

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
    model.blocks[1].attn = randomise_(Attention(model.cfg.replace(attention_dir="bidirectional"), layer_id=1)).double()
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
