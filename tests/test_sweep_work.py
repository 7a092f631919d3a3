"""What a sweep computes and what it leaves out, and what it runs the plain way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, Intervention
from hooked_lm.components.attention import Attention
from hooked_lm.components.mlp import MLP
from hooked_lm.interventions import Operation
from hooked_lm.metrics import logit
from hooked_lm.names import get_act_name
from hooked_lm.patching import attribution_patch, patch_pairs, path_patch
from hooked_lm.sweep import sweep
from hooked_lm.sweep.walk import SweepWalk
from tests.helpers import VOCAB, counted, randomise_, tiny_config, tiny_model
from tests.hook_sites_helpers import BATCH, POS, TOKENS, model_of
from tests.sweep_helpers import as_data, grid, make_edit, model_named, reads_everything, run_by_hand

# What cannot be walked


def stretched(module: Any, args: Any, output: Tensor) -> Tensor:
    return output * torch.linspace(1, 2, output.shape[-1], dtype=output.dtype)


@pytest.mark.parametrize("kind", ["bidirectional", "a hook", "a hook of torch's"])
def test_what_cannot_be_walked_is_run_the_plain_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "folded, bidirectional" if kind == "bidirectional" else "gpt2"
    model, cells = model_of(name), grid(name)
    if kind == "a hook":
        model.add_hook("blocks.0.hook_mlp_out", lambda x, hook: stretched(None, None, x))
    elif kind == "a hook of torch's":
        model.blocks[0].register_forward_hook(stretched)
    expected = torch.stack([logit(3)(run_by_hand(model, cell)) for cell in cells])
    walks = counted(monkeypatch, SweepWalk, "run")
    got = sweep(model, TOKENS, as_data(cells), logit(3), verbose=False)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert not walks


def test_the_plain_way_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cells, walks = model_named("deep"), as_data(grid()), counted(monkeypatch, SweepWalk, "run")
    plain = sweep(model, TOKENS, cells, logit(3), incremental=False, verbose=False)
    assert not walks
    torch.testing.assert_close(plain, sweep(model, TOKENS, cells, logit(3), verbose=False), rtol=0, atol=1e-12)


@pytest.mark.parametrize("text", ["<|endoftext|><|endoftext|>When John", ["When John and", "<|endoftext|>When John"]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_strings_are_swept_as_they_are_run(text: Any, side: str, tokenizer: Any) -> None:
    model: Any = randomise_(HookedTransformer(tiny_config(d_vocab=VOCAB), tokenizer=copy.deepcopy(tokenizer)))
    model.tokenizer.padding_side = side
    cells = [
        Intervention("blocks.0.hook_resid_pre", "scale", 1.5, pos=4),
        Intervention("blocks.1.attn.hook_z", "zero", head=0),
    ]
    # Padding on the right stands at the last position.
    metric = logit(3, pos=-1 if side == "left" else 1)
    expected = torch.stack([metric(model.run(text, interventions=[cell]).detach()) for cell in cells])
    torch.testing.assert_close(sweep(model, text, cells, metric, verbose=False), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("changes", [{}, {"normalization_type": None}])
def test_a_model_without_layers_is_run_the_plain_way(changes: dict[str, Any]) -> None:
    model = tiny_model(n_layers=0, **changes)
    site = "ln_final.hook_normalized" if not changes else "unembed.hook_in"
    cell = Intervention(site, "scale", 2.0, pos=-1)
    expected = logit(3)(model.run(TOKENS, interventions=[cell])).detach()
    torch.testing.assert_close(sweep(model, TOKENS, [cell], logit(3), verbose=False)[0], expected, rtol=0, atol=1e-12)


def test_a_metric_that_would_read_padding_is_refused() -> None:
    model, right = model_named("deep"), torch.tensor([[1] * POS, [1] * (POS - 2) + [0, 0]])
    for run in (
        lambda: sweep(model, TOKENS, [[]], logit(3), attention_mask=right, verbose=False),
        lambda: patch_pairs(model, TOKENS, TOKENS.flip(0), logit(3), attention_mask=right, verbose=False),
        lambda: attribution_patch(model, TOKENS, TOKENS.flip(0), logit(3), attention_mask=right),
        lambda: path_patch(model, TOKENS, TOKENS.flip(0), logit(3), [("z", 0)], "logits", attention_mask=right),
    ):
        with pytest.raises(ValueError, match="logit reads position -1, which is padding in prompt 1"):
            run()
    sweep(model, TOKENS, [[]], logit(3, pos=3), attention_mask=right, verbose=False)


def test_why_cells_are_run_one_by_one_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("gpt2")
    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda x, hook: None)]):
        sweep(model, TOKENS, as_data(grid("gpt2"))[:1], logit(3))
    assert "one run per cell (the model has hooks" in capsys.readouterr().err


# Work


def positions_projected(calls: list[tuple[Any, ...]]) -> int:
    """Over all layers, the positions of the rows for which attention has formed queries."""
    return sum(x.shape[0] * x.shape[1] for _, x, which in calls if which == "Q")


def test_only_the_rows_positions_and_layers_that_a_cell_can_change_are_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, cells = model_named("deep"), as_data(grid())
    n_layers = model.cfg.n_layers
    projections, hidden = counted(monkeypatch, Attention, "project"), counted(monkeypatch, MLP, "forward")
    sweep(model, TOKENS, cells, reads_everything, verbose=False)
    once = BATCH * POS * n_layers
    # The cell (layer, pos) has positions pos and after, from its layer on.
    rows = sum(BATCH * (POS - pos) * (n_layers - layer) for layer in range(n_layers) for pos in range(POS))
    assert positions_projected(projections) == once + rows
    assert sum(x.shape[0] * x.shape[1] for _, x in hidden) == once + rows
    # The loop, by the same count, does `once` for every cell.
    projections.clear()
    sweep(model, TOKENS, cells, reads_everything, incremental=False, verbose=False)
    assert positions_projected(projections) == once * len(cells) > 2 * (once + rows)


def test_the_last_layer_goes_on_with_the_position_that_the_metric_reads_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cells = model_named("deep"), as_data(grid()[-POS:])  # those in the last layer
    hidden, unembedded = counted(monkeypatch, MLP, "forward"), counted(monkeypatch, type(model.unembed), "forward")
    sweep(model, TOKENS, cells, logit(3), verbose=False)
    assert sum(x.shape[0] * x.shape[1] for _, x in hidden) == BATCH * POS * 3 + BATCH * len(cells)
    assert not unembedded  # as a whole: the tokens that are read are enough


def patches_of_a_pair(model: HookedTransformer, parts_at: int) -> tuple[Tensor, list[Intervention]]:
    """Corrupted prompts that leave the clean ones at a position, and patches at several sites from a full cache."""
    corrupted = TOKENS.clone()
    corrupted[:, parts_at] = (corrupted[:, parts_at] + 1) % 20
    _, clean = model.run_with_cache(TOKENS)
    layers = range(model.cfg.n_layers)
    cells = [
        Intervention(f"blocks.{layer}.hook_resid_pre", "replace", clean["resid_pre", layer][:, pos], pos=pos)
        for layer in layers
        for pos in range(POS)
    ]
    for site in ("q", "v", "z", "pattern"):
        of_head = (slice(None), 0) if site == "pattern" else (slice(None), slice(None), 0)
        cells += [
            Intervention(get_act_name(site, layer), "replace", clean[site, layer][of_head], head=0) for layer in layers
        ]
    return corrupted, cells


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_clean_and_corrupted_prompts_share_is_not_computed_again(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, parts_at = tiny_model(n_layers=3, dtype=dtype), POS - 2
    corrupted, cells = patches_of_a_pair(model, parts_at)
    looped = sweep(model, corrupted, cells, reads_everything, incremental=False, verbose=False)
    projections = counted(monkeypatch, Attention, "project")
    swept = sweep(model, corrupted, cells, reads_everything, verbose=False)
    torch.testing.assert_close(swept, looped, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-4)
    in_layers = [3, 2, 1]
    # Residual patches before the prompts part change nothing, nor does one of the first layer at the last token, which
    # they share. Heads differ from where the prompts part; patterns are not compared.
    residual = sum(in_layers) * 2 + sum(in_layers) * 1 - 3
    heads = sum(in_layers) * 2 * 2 + sum(one - 1 for one in in_layers) * 2
    patterns = sum(in_layers) * POS
    assert positions_projected(projections) == BATCH * (3 * POS + residual + heads + patterns)


@pytest.mark.parametrize("operation", ["replace", "add"])
def test_a_change_that_is_small_beside_an_outlier_is_made(operation: Operation) -> None:
    """Massive activations are a thousand times their neighbours, whose changes count all the same."""
    model = tiny_model(dtype=torch.float32, normalization_type=None)
    outlier = torch.zeros(model.cfg.d_model)
    outlier[3] = 3000.0
    model.W_pos.data[4] += outlier
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
    small = torch.zeros(model.cfg.d_model)
    small[5] = 200 * torch.finfo(torch.float32).eps * float(cache["resid_pre", 0][0, 4].abs().median())
    value = small if operation == "add" else cache["resid_pre", 0][:, 4] + small
    with pytest.MonkeyPatch.context() as patched:
        projections = counted(patched, Attention, "project")
        sweep(
            model, TOKENS, [Intervention("blocks.0.hook_resid_pre", operation, value, pos=4)], logit(3), verbose=False
        )
    assert positions_projected(projections) > BATCH * POS * 2


def test_a_small_change_is_made_where_it_is_one_and_not_where_it_is_rounding() -> None:
    model = tiny_model(dtype=torch.float32)
    _, cache = model.run_with_cache(TOKENS)
    same, small = cache["resid_pre", 1], 1e-3 * torch.arange(model.cfg.d_model)
    cells = [
        Intervention("blocks.1.hook_resid_pre", "replace", same),
        Intervention("blocks.1.hook_resid_pre", "replace", same + small),
        Intervention("blocks.1.hook_resid_pre", "add", small),
        Intervention("blocks.1.hook_resid_pre", "add", 0 * small),
    ]
    base, *others = sweep(model, TOKENS, [[], *cells], reads_everything, verbose=False)
    assert others[0] == base == others[3]
    assert others[1] != base != others[2]


@pytest.mark.parametrize(
    ("site", "attentions", "mlps"), [("attn.hook_z", 1, 2), ("hook_resid_mid", 1, 2), ("hook_mlp_out", 1, 1)]
)
def test_rows_that_join_late_in_a_block_leave_out_what_comes_before(
    site: str, attentions: int, mlps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    projections, hidden = counted(monkeypatch, Attention, "project"), counted(monkeypatch, MLP, "forward")
    cell = make_edit("deep", f"blocks.1.{site}", "scale", 0)
    sweep(model_named("deep"), TOKENS, as_data([[cell]]), reads_everything, verbose=False)
    assert positions_projected(projections) == BATCH * POS * (3 + attentions)
    assert sum(x.shape[0] * x.shape[1] for _, x in hidden) == BATCH * POS * (3 + mlps)
