"""Experts whose output the next block adds: runs that would part the blocks raise, engines say which way they go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, Intervention, circuits
from hooked_lm.circuits.heads import read_patterns
from hooked_lm.components.sequence import SequenceLayout
from hooked_lm.components.shortcut import ShortcutBlock
from hooked_lm.components.stock import not_stock, stages_obstacle
from hooked_lm.metrics import log_prob
from hooked_lm.names import get_act_name
from hooked_lm.sweep import sweep
from hooked_lm.sweep.exactness import walking_obstacle
from tests.helpers import tiny_model, tiny_tokens

SHORTCUT: dict[str, Any] = {
    "n_layers": 4,
    "shortcut_experts": True,
    "num_experts": 4,
    "identity_experts": 1,
    "experts_per_token": 2,
    "norm_topk_prob": True,
    "normalization_type": "RMS",
}
BESIDE = "the output of experts goes from one block to the next beside the stream"


@pytest.fixture
def model() -> HookedTransformer:
    return tiny_model(**SHORTCUT)


@torch.no_grad()
def test_the_second_block_of_a_pair_adds_what_the_experts_of_the_first_write(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(tiny_tokens())
    for layer in range(4):
        assert isinstance(model.blocks[layer], ShortcutBlock)
        written = cache["resid_post", layer] - cache["resid_mid", layer]
        torch.testing.assert_close(written, cache["mlp_out", layer])
        dense = model.blocks[layer].mlp(model.blocks[layer].ln2(cache["resid_mid", layer]))
        carried = cache["shortcut_out", layer - 1] if layer % 2 else torch.zeros(())
        torch.testing.assert_close(cache["mlp_out", layer], dense + carried)
        assert (f"blocks.{layer}.hook_shortcut_out" in model.hook_dict) == (layer % 2 == 0)
    assert get_act_name("shortcut_out", 2) == "blocks.2.hook_shortcut_out"


@torch.no_grad()
def test_a_token_sent_to_an_identity_alone_gets_back_what_the_experts_read(model: HookedTransformer) -> None:
    def choose(x: Tensor, hook: object) -> Tensor:
        return torch.full_like(x, 3)

    with model.hooks(fwd_hooks=[("blocks.2.shortcut.hook_expert_indices", choose)]):
        _, cache = model.run_with_cache(tiny_tokens())
    ln2 = model.blocks[2].ln2
    torch.testing.assert_close(cache["shortcut_out", 2], ln2(cache["resid_mid", 2]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_at_layer": 1}, r"start_at_layer 1 is between blocks 0 and 1, which run together.* Give 0 or 2"),
        ({"start_at_layer": -1}, r"start_at_layer 3 is between blocks 2 and 3"),
        ({"stop_at_layer": 3}, r"stop_at_layer 3 is between blocks 2 and 3, which run together.* Give 2 or 4"),
    ],
)
def test_a_run_cannot_begin_or_end_within_a_pair(model: HookedTransformer, options: Any, message: str) -> None:
    given = torch.zeros(1, 4, 12, dtype=torch.float64) if "start_at_layer" in options else tiny_tokens(1, 4)
    with pytest.raises(ValueError, match=message):
        model(given, **options)


@torch.no_grad()
def test_a_run_may_begin_and_end_between_pairs(model: HookedTransformer) -> None:
    middle = model(tiny_tokens(), stop_at_layer=2)
    torch.testing.assert_close(model(middle, start_at_layer=2), model(tiny_tokens()))


@pytest.mark.parametrize(
    "run",
    [
        lambda block, x: block(x),
        lambda block, x: block(x, SequenceLayout(4, 0, x.device)),
        lambda block, x: block.mlp_output(x),
        lambda block, x: block.after_mid(x),
    ],
)
def test_the_second_block_does_not_run_alone(model: HookedTransformer, run: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"blocks 2 and 3 run one after the other in one pass, .* start_at_layer=2"):
        run(model.blocks[3], torch.zeros(1, 4, 12, dtype=torch.float64))


def test_engines_that_run_stages_take_the_plain_way_and_say_why(
    model: HookedTransformer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not_stock(model) is None
    assert stages_obstacle(model) == BESIDE
    assert walking_obstacle(model, ()) == BESIDE
    sweep(model, tiny_tokens(), [Intervention("blocks.1.attn.hook_z", "zero", head=0)], log_prob(3), verbose=True)
    assert BESIDE in capsys.readouterr().err


@torch.no_grad()
def test_a_lazy_cache_runs_both_blocks_of_a_pair(model: HookedTransformer) -> None:
    tokens, scale = tiny_tokens(), Intervention("blocks.2.hook_shortcut_out", "scale", 2.0, pos=1)
    for interventions in ([], [scale]):
        with model.intervening(interventions):
            _, eager = model.run_with_cache(tokens, names_filter="*")
            _, lazy = model.run_with_cache(tokens, names_filter="*", lazy=True)
        for name in ("blocks.3.hook_mlp_out", "blocks.3.mlp.hook_post", "blocks.2.hook_shortcut_out"):
            torch.testing.assert_close(lazy[name], eager[name])
        assert all(torch.allclose(lazy[name], eager[name], equal_nan=True) for name in eager)


@torch.no_grad()
def test_a_lazy_cache_sees_that_the_weights_of_the_other_block_have_changed(model: HookedTransformer) -> None:
    _, lazy = model.run_with_cache(tiny_tokens(), lazy=True)
    shortcut = model.blocks[2].shortcut
    assert shortcut is not None
    shortcut.W_out.data[0, 0, 0] += 1.0
    with pytest.raises(RuntimeError, match="does not compute what it did in the run"):
        _ = lazy["blocks.3.mlp.hook_post"]
    assert lazy["blocks.1.mlp.hook_post"].isfinite().all()


@torch.no_grad()
def test_attention_and_means_of_a_layer_within_a_pair_are_read_in_a_run_of_the_whole_pair(
    model: HookedTransformer,
) -> None:
    assert [model.cfg.stop_after(layer) for layer in range(4)] == [2, 2, 4, 4]
    seen: list[int] = []
    read_patterns(model, tiny_tokens(), lambda layer, _: seen.append(layer), layers=[0])
    assert seen == [0]


def test_neurons_of_a_block_that_adds_experts_are_no_parts_of_a_logit(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(tiny_tokens())
    with pytest.raises(ValueError, match=r"layers \[1, 3\] add the output of experts"):
        circuits.logit_attribution(cache, 3, split="neuron")
    parts = circuits.logit_attribution(cache, 3, split="neuron", layers=[0, 2])
    torch.testing.assert_close(parts.values.sum(0), parts.logit)
