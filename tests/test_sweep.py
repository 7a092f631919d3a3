"""The sweep gives, cell by cell, what a loop of hooked runs gives, and computes only what a cell can change.

The oracle is a plain loop: one run of the whole model per cell, under hooks that are written here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hooked_lm import HookedTransformer
from hooked_lm.interventions import Operation
from hooked_lm.metrics import accuracy, kl_to, log_prob, logit, logit_diff, rank
from hooked_lm.sweep import sweep
from hooked_lm.sweep.walk import SweepWalk
from tests.helpers import counted
from tests.hook_sites_helpers import ARCHITECTURES, BATCH, POS, TOKENS, sites_of
from tests.sweep_helpers import (
    DEEP,
    Edit,
    Selection,
    as_data,
    grid,
    make_edit,
    model_named,
    reads_everything,
    run_by_hand,
)

CAUSAL = [name for name in (*ARCHITECTURES, *DEEP) if "bidirectional" not in name]
PADDED = torch.tensor([[1] * POS, [0, 0] + [1] * (POS - 2)])


@cache
def sites_named(name: str) -> tuple[str, ...]:
    model = model_named(name)
    # The table of sites gives every block an `ln2_post`, those without an MLP too.
    return tuple(site for site in sites_of(model) if not (model.cfg.attn_only and ".ln2_post." in site))


def run_all_by_hand(model: HookedTransformer, cells: Sequence[Sequence[Edit]], mask: Tensor | None = None) -> Tensor:
    """The logits of every cell [cell batch pos vocab]: as `run_by_hand`, with the prompts repeated for each cell.

    Cells whose heads read inputs of their own run apart from those that edit the norm which such heads do not read.
    """
    logits = torch.zeros(len(cells), BATCH, POS, model.cfg.d_vocab, dtype=torch.float64)
    reads_norm = [any(".ln1." in edit.site for edit in cell) for cell in cells]
    for wanted in (True, False):
        chosen = [index for index, reads in enumerate(reads_norm) if reads == wanted]
        if not chosen:
            continue
        hooks = [
            (edit.site, partial(on_rows, edit, slice(place * BATCH, (place + 1) * BATCH)))
            for place, index in enumerate(chosen)
            for edit in cells[index]
        ]
        repeated = None if mask is None else mask.repeat(len(chosen), 1)
        with torch.no_grad():
            together = model.run_with_hooks(TOKENS.repeat(len(chosen), 1), fwd_hooks=hooks, attention_mask=repeated)
        logits[chosen] = together.unflatten(0, (-1, BATCH))
    return logits


def on_rows(edit: Edit, rows: slice, x: Tensor, hook: Any) -> Tensor:
    x = x.clone()
    x[rows] = edit.hook(x[rows], hook)
    return x


def assert_equal_to_the_loop(
    name: str, cells: Sequence[Sequence[Edit]], mask: Tensor | None, metric: Callable[[Tensor], Tensor]
) -> None:
    """The sweep and hooked runs of the whole model agree on every cell."""
    model = model_named(name)
    expected = torch.stack([metric(one) for one in run_all_by_hand(model, cells, mask)])
    got = sweep(model, TOKENS, as_data(cells), metric, verbose=False, attention_mask=mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


# Every site


@pytest.mark.parametrize("name", CAUSAL)
def test_the_sweep_equals_the_loop_at_every_site(name: str) -> None:
    selections: list[dict[str, Selection]] = [
        {"pos": 3},
        {"pos": (-1, 2), "head": 0},
        {},
        {"pos": -2, "batch": 1},
        {"head": (-1, 0), "feature": 1},
        {"pos": (4, 3), "batch": (0,), "feature": (2, 0)},
    ]
    operations: list[Operation] = ["replace", "scale", "add", "zero"]
    cells = []
    for index, site in enumerate(sites_named(name), start=CAUSAL.index(name)):
        # Nothing but finite logits: a score of minus infinity times nothing, or a norm by nothing, is NaN.
        operation = operations[index % (3 if site.endswith(("hook_scale", "scores")) else 4)]
        cells.append([make_edit(name, site, operation, index, **selections[index % len(selections)])])
    assert_equal_to_the_loop(name, cells, padding_for(name), reads_everything)


@pytest.mark.parametrize("name", CAUSAL)
def test_any_pair_of_sites_of_a_layer_equals_the_loop(name: str) -> None:
    layer = model_named(name).cfg.n_layers - 1
    sites = [site for site in sites_named(name) if site.startswith((f"blocks.{layer}.", "ln_final"))]
    cells = []
    for index, site in enumerate(sites):
        other = sites[(7 * index + 3) % len(sites)]
        cell = [make_edit(name, site, "scale", 1, pos=(2, 4)), make_edit(name, other, "add", 2, pos=3)]
        if not edits_a_norm_that_heads_do_not_read(cell):
            cells.append(cell)
    padded = None if padding_for(name) is not None else PADDED
    assert_equal_to_the_loop(name, cells, padded, logit_diff([3, 5], 7, pos=-2))


def padding_for(name: str) -> Tensor | None:
    """Every other architecture is padded where it is swept at every site, and the others where pairs are."""
    return PADDED if CAUSAL.index(name) % 2 else None


def edits_a_norm_that_heads_do_not_read(cell: Sequence[Edit]) -> bool:
    per_head = any(edit.site.endswith(("attn_in", "q_input", "k_input", "v_input")) for edit in cell)
    return per_head and any(".ln1." in edit.site for edit in cell)


def test_runs_one_by_one_say_the_same_as_the_repeated_prompts_of_these_tests() -> None:
    cells = [[make_edit("gpt2", site, "scale", 4, pos=(2, -1))] for site in sites_named("gpt2")[1:]]
    one_by_one = torch.stack([run_by_hand(model_named("gpt2"), cell, PADDED) for cell in cells])
    together = run_all_by_hand(model_named("gpt2"), cells, PADDED)
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-11)


# Several edits in one cell


@pytest.fixture(scope="module", autouse=True)
def models() -> None:
    """Built before any strategy draws: making a model uses random numbers, which a strategy must not."""
    for name in CAUSAL:
        model_named(name)


@st.composite
def sweeps(draw: st.DrawFn) -> tuple[str, bool, list[list[Edit]]]:
    """An architecture, whether to pad, and cells of two to five edits each, often at one site."""
    name = draw(st.sampled_from(CAUSAL))
    # Edits of scores meet minus infinity; the pairs above have them.
    sites = [site for site in sites_named(name) if not site.endswith("hook_attn_scores")]
    few = draw(st.lists(st.sampled_from(sites), min_size=1, max_size=3))
    several = st.lists(st.integers(-POS, -1), min_size=1, max_size=3, unique=True).map(tuple)
    edits = st.builds(
        partial(make_edit, name),
        st.sampled_from(few),
        st.sampled_from(["replace", "add", "scale"]),
        st.integers(0, 9),
        pos=st.none() | st.integers(-POS, POS - 1) | several,
        head=st.sampled_from([None, 0, (0,)]),
        batch=st.sampled_from([None, 1, (1, 0)]),
    )
    cells = draw(st.lists(st.lists(edits, min_size=2, max_size=5), min_size=1, max_size=3))
    return name, draw(st.booleans()), [cell for cell in cells if not edits_a_norm_that_heads_do_not_read(cell)]


@settings(max_examples=60, deadline=None)
@given(sweeps(), st.integers(-POS, POS - 1))
def test_any_combination_of_edits_equals_the_loop(drawn: tuple[str, bool, list[list[Edit]]], pos: int) -> None:
    name, padded, cells = drawn
    pos = 2 if padded and pos % POS < 2 else pos  # what is read is no padding
    if cells:
        assert_equal_to_the_loop(name, cells, PADDED if padded else None, log_prob(4, pos=pos))


def test_an_edit_of_a_norm_and_of_the_heads_inputs_in_one_cell_equals_the_loop() -> None:
    norm = make_edit("gpt2", "blocks.1.ln1.hook_normalized", "scale", 0, pos=2)
    queries = make_edit("gpt2", "blocks.1.hook_q_input", "add", 1, pos=3)
    other = make_edit("gpt2", "blocks.1.hook_v_input", "zero", 1, head=1)
    model, cells = model_named("gpt2"), [[norm, queries], [other], [norm]]
    expected = torch.stack([reads_everything(run_by_hand(model, cell)) for cell in cells])
    got = sweep(model, TOKENS, as_data(cells), reads_everything, verbose=False)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


# Cells, and the order of results


def test_results_are_in_the_order_of_the_cells_whatever_that_is() -> None:
    model, cells = model_named("deep"), as_data([*grid(), *grid(site="attn.hook_z"), []])
    results = sweep(model, TOKENS, cells, reads_everything, verbose=False)
    assert len(set(results.tolist())) == len(cells)
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = sweep(model, TOKENS, (cells[index] for index in order), reads_everything, verbose=False)
    torch.testing.assert_close(shuffled, results[order], rtol=0, atol=1e-10)


def test_a_cell_of_no_interventions_is_the_run_itself_and_no_cells_have_no_results() -> None:
    model = model_named("deep")
    clean = logit(3)(model(TOKENS).detach())
    torch.testing.assert_close(sweep(model, TOKENS, [()], logit(3), verbose=False), clean[None], rtol=0, atol=1e-12)
    assert sweep(model, TOKENS, [], logit(3), verbose=False).shape == (0,)
    assert sweep(model, TOKENS, [], logit(3), verbose=False, per_prompt=True).shape == (0, BATCH)


def test_one_intervention_is_a_cell_by_itself() -> None:
    model, cells = model_named("deep"), as_data(grid())
    alone = sweep(model, TOKENS, [cell[0] for cell in cells], logit(3), verbose=False)
    assert torch.equal(alone, sweep(model, TOKENS, cells, logit(3), verbose=False))


@pytest.mark.parametrize("name", ["deep", "deep grouped alibi windows"])
def test_a_tiny_memory_budget_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [*grid(name), *grid(name, "attn.hook_z")[::3], *grid(name, "hook_q_input")[::3]]
    walks = counted(monkeypatch, SweepWalk, "run")
    whole = sweep(model_named(name), TOKENS, as_data(cells), logit(3), verbose=False)
    assert len(walks) == 2  # cells that give heads their own inputs are kept apart
    for memory_budget, least, most in ((1, len(cells), len(cells)), (60_000, 3, len(cells) - 1)):
        walks.clear()
        got = sweep(model_named(name), TOKENS, as_data(cells), logit(3), memory_budget=memory_budget, verbose=False)
        torch.testing.assert_close(got, whole, rtol=0, atol=1e-12)
        assert least <= len(walks) <= most


# Metrics


@pytest.mark.parametrize(
    "metric",
    [
        logit([3, 4], pos=2),
        logit_diff(3, [5, 6]),
        log_prob([3, 4], pos=-3),
        rank(3),
        accuracy(3, pos=4),
        kl_to(torch.linspace(-1, 1, BATCH * POS * 20).reshape(BATCH, POS, 20), pos=3),
    ],
    ids=lambda metric: metric.name,
)
def test_every_metric_scores_each_prompt_as_the_loop_does(metric: Any) -> None:
    model, cells = model_named("soft caps"), [*grid("soft caps"), *grid("soft caps", "hook_attn_out")]
    expected = torch.stack([metric.per_prompt(one) for one in run_all_by_hand(model, cells)])
    got = sweep(model, TOKENS, as_data(cells), metric, per_prompt=True, verbose=False)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    mean = sweep(model, TOKENS, as_data(cells), metric, verbose=False)
    torch.testing.assert_close(mean, expected.mean(1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("returned", [float, lambda x: x, lambda x: x.reshape(1, 1)])
def test_any_function_that_returns_one_number_is_a_metric(returned: Callable[[Tensor], Any]) -> None:
    model, cells = model_named("deep"), grid()
    expected = torch.stack([one[1, 2, 3:6].prod() for one in run_all_by_hand(model, cells)])
    got = sweep(model, TOKENS, as_data(cells), lambda logits: returned(logits[1, 2, 3:6].prod()), verbose=False)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


# Interventions that are always made


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("gpt2", "hook_tokens"),
        ("gpt2", "hook_pos_embed"),
        ("shortformer", "hook_pos_embed"),
        ("alibi", "hook_embed"),
        ("alibi", "embed.ln.hook_normalized"),
        ("deep norms on the stream", "hook_embed"),
        ("deep norms on the stream", "blocks.0.hook_resid_mid"),
    ],
)
def test_what_is_always_made_is_made_in_every_cell(name: str, site: str) -> None:
    model, always = model_named(name), make_edit(name, site, "scale", 8, pos=(1, 3))
    cells = [*grid(name), *grid(name, "attn.hook_z")]
    expected = torch.stack([logit(3)(one) for one in run_all_by_hand(model, [[always, *cell] for cell in cells])])
    got = sweep(model, TOKENS, as_data(cells), logit(3), always=[always.intervention()], verbose=False)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
