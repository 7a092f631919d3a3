"""The sweep gives, cell by cell, what a loop of hooked runs gives, and computes only what a cell can change.

The oracle is a plain loop: one run of the whole model per cell, under hooks that are written here.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hooked_lm import HookedTransformer, Intervention, UnknownHookError
from hooked_lm.components.attention import Attention
from hooked_lm.components.mlp import MLP
from hooked_lm.interventions import Operation
from hooked_lm.metrics import accuracy, kl_to, log_prob, logit, logit_diff, rank
from hooked_lm.names import get_act_name
from hooked_lm.patching import attribution_patch, patch_pairs, path_patch
from hooked_lm.sweep import sweep
from hooked_lm.sweep.walk import SweepWalk
from tests.helpers import VOCAB, randomise_, tiny_config, tiny_model
from tests.test_hook_sites import ARCHITECTURES, BATCH, POS, TOKENS, model_of, sites_of

# Three layers, so that there is one between the first and the last.
DEEP: dict[str, dict[str, Any]] = {
    "deep": {"n_layers": 3},
    "deep grouped alibi windows": {
        "n_layers": 3,
        "n_heads": 4,
        "d_head": 6,
        "n_key_value_heads": 2,
        "positional_embedding_type": "alibi",
        "attn_types": ["local", "global", "local"],
        "window_size": 3,
    },
    "deep parallel grouped rotary": {
        "n_layers": 3,
        "n_heads": 4,
        "d_head": 6,
        "n_key_value_heads": 2,
        "parallel_attn_mlp": True,
        "positional_embedding_type": "rotary",
        "attn_scores_soft_cap": 0.5,
    },
    "deep norms on the stream": {"n_layers": 3, "norm_placement": "residual"},
    "deep attention only, norms before and after": {
        "n_layers": 3,
        "attn_only": True,
        "use_normalization_before_and_after": True,
    },
}
CAUSAL = [name for name in (*ARCHITECTURES, *DEEP) if "bidirectional" not in name]
PADDED = torch.tensor([[1] * POS, [0, 0] + [1] * (POS - 2)])
Selection = int | tuple[int, ...] | None
_AXES = {
    "pos": ("pos", "query"),
    "head": ("head", "kv_head"),
    "feature": ("d_model", "d_head", "d_mlp", "expert", "key"),
    "batch": ("batch",),
}


@cache
def model_named(name: str) -> HookedTransformer:
    return tiny_model(**DEEP[name]) if name in DEEP else model_of(name)


@cache
def sites_named(name: str) -> tuple[str, ...]:
    model = model_named(name)
    # The table of sites gives every block an `ln2_post`, those without an MLP too.
    return tuple(site for site in sites_of(model) if not (model.cfg.attn_only and ".ln2_post." in site))


@dataclass(frozen=True)
class Edit:
    """An intervention, and the same thing as a hook, written independently: by a mask over the whole activation.

    Attributes:
        full: a value for every entry of the activation; the intervention gets the part that is selected.
    """

    site: str
    operation: Operation
    full: Tensor
    axes: tuple[str, ...]
    selections: tuple[tuple[str, Selection], ...] = ()

    def by_axis(self) -> dict[int, tuple[int, ...] | int]:
        return {
            next(i for i, axis in enumerate(self.axes) if axis in _AXES[name]): chosen
            for name, chosen in self.selections
            if chosen is not None
        }

    def intervention(self) -> Intervention:
        value = self.full
        for axis, chosen in sorted(self.by_axis().items(), reverse=True):
            value = value.select(axis, chosen) if isinstance(chosen, int) else value[(slice(None),) * axis + (chosen,)]
        fields: dict[str, Any] = dict(self.selections)
        return Intervention(self.site, self.operation, None if self.operation == "zero" else value, **fields)

    def hook(self, x: Tensor, hook: Any) -> Tensor:
        selected = torch.ones_like(x, dtype=torch.bool)
        for axis, chosen in self.by_axis().items():
            entries = [one % x.shape[axis] for one in (chosen if isinstance(chosen, tuple) else (chosen,))]
            along = torch.zeros(x.shape[axis], dtype=torch.bool)
            along[entries] = True
            selected &= along.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        full = self.full.to(x)
        edited = {"replace": full, "add": x + full, "scale": x * full, "zero": torch.zeros_like(x)}[self.operation]
        return torch.where(selected, edited, x)


def make_edit(name: str, site: str, operation: Operation, seed: int, **selections: Selection) -> Edit:
    """An edit with random values between 1/2 and 3/2; selections that the site has no axis for are left out."""
    model = model_named(name)
    axes = model.hook_dict[site].axes
    generator = torch.Generator().manual_seed(seed)
    if site.endswith("hook_tokens"):
        full = torch.randint(0, 20, (BATCH, POS), generator=generator)
    elif site.endswith("hook_expert_indices"):
        full = torch.arange(model.cfg.experts_per_token or 0).expand(sites_of(model)[site])
    else:
        full = torch.rand(sites_of(model)[site], generator=generator, dtype=torch.float64) + 0.5
    operation = operation if full.is_floating_point() else "replace"
    made = {key: chosen for key, chosen in selections.items() if set(_AXES[key]) & set(axes)}
    if full.shape[-2] == 1 and isinstance(made.get("head"), tuple):  # the only key-value head, once
        made["head"] = (0,)
    if axes[-1] not in _AXES["feature"]:
        made.pop("feature", None)
    if axes == ("batch", "pos"):
        made.pop("head", None)
    return Edit(site, operation, full, axes, tuple(made.items()))


def run_by_hand(model: HookedTransformer, cell: Sequence[Edit], mask: Tensor | None = None) -> Tensor:
    """The logits of one run of the whole model under a cell's edits."""
    hooks = [(edit.site, edit.hook) for edit in cell]
    with torch.no_grad():
        logits: Tensor = model.run_with_hooks(TOKENS, fwd_hooks=hooks, attention_mask=mask)
    return logits


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


def as_data(cells: Sequence[Sequence[Edit]]) -> list[list[Intervention]]:
    return [[edit.intervention() for edit in cell] for cell in cells]


def reads_everything(logits: Tensor) -> Tensor:
    """A metric that every logit of every position and prompt bears on, each with a weight of its own."""
    weights = torch.rand(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (weights * logits.sin()).sum()


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


def grid(name: str = "deep", site: str = "hook_resid_pre") -> list[list[Edit]]:
    layers = range(model_named(name).cfg.n_layers)
    return [[make_edit(name, f"blocks.{i}.{site}", "scale", pos, pos=pos)] for i in layers for pos in range(POS)]


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


# What cannot be walked


def counted(monkeypatch: pytest.MonkeyPatch, owner: type, method: str) -> list[tuple[Any, ...]]:
    """The arguments of every call of a method from now on."""
    calls: list[tuple[Any, ...]] = []
    original = getattr(owner, method)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    counting.keeps_stages = True  # type: ignore[attr-defined]
    monkeypatch.setattr(owner, method, counting)
    return calls


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
    expected = torch.stack([logit(3)(model.run(text, interventions=[cell]).detach()) for cell in cells])
    torch.testing.assert_close(sweep(model, text, cells, logit(3), verbose=False), expected, rtol=0, atol=1e-10)


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


# Errors


GOOD = Intervention("blocks.0.hook_resid_pre", "zero", pos=1)


@pytest.mark.parametrize(
    ("cell", "error", "message"),
    [
        (Intervention("blocks.7.attn.hook_z", "zero"), UnknownHookError, "layers run 0-1"),
        (Intervention("blocks.0.hook_resid_pree", "zero"), UnknownHookError, "did you mean"),
        (Intervention("blocks.0.attn.hook_z", "zero", head=3), ValueError, "head 3: this model has heads 0-2"),
        (Intervention("blocks.0.hook_resid_pre", "zero", pos=6), ValueError, "pos 6: the prompts have 6 positions"),
        (Intervention("blocks.0.hook_resid_pre", "zero", pos=(0, -7)), ValueError, "pos -7: the prompts have 6 pos"),
        (Intervention("blocks.0.attn.hook_pattern", "zero", feature=6), ValueError, "feature 6: the prompts have 6"),
        (Intervention("blocks.0.hook_resid_pre", "zero", batch=2), ValueError, "batch 2: the prompts have 2 in the"),
        (
            Intervention("blocks.1.hook_mlp_out", "add", torch.zeros(5)),
            ValueError,
            r"shape \(5,\) does not fit the selection",
        ),
        (
            Intervention("blocks.0.attn.hook_z", "add", torch.zeros(3, 4), pos=(0, 5), head=1),
            ValueError,
            r"shape \(3, 4\) .* selection, \(2, 2, 4\)",
        ),
        ("hook_embed", TypeError, "a cell is an Intervention or several, got 'h"),
    ],
)
def test_an_intervention_at_fault_is_named_before_anything_runs(
    cell: Any, error: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = counted(monkeypatch, Attention, "project")
    for metric in (logit(3), logit(3, pos=0), reads_everything):
        for cells, always in (([GOOD, cell], []), ([GOOD], [cell])):
            with pytest.raises(error, match=message):
                sweep(model_named("gpt2"), TOKENS, cells, metric, always=always, verbose=False)
    assert not ran


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (logit(3, pos=6), "logit reads position 6, and the logits have 6 positions"),
        (log_prob(3, pos=-7), "log-probability reads position -7"),
        (logit(20), "logit reads tokens .*20.*; the vocabulary is 0-19"),
        (logit_diff(2, -1), "logit difference reads tokens .*-1.*; the vocabulary is 0-19"),
        (rank(20), "rank reads tokens"),
        (logit([1, 2, 3]), "logit has answers for 3 prompts; there are 2"),
        (log_prob([1, 2, 3]), "log-probability has answers for 3 prompts; there are 2"),
        (accuracy([1, 2, 3]), "accuracy has answers for 3 prompts; there are 2"),
        (kl_to(torch.zeros(3, POS, 20)), "KL divergence has answers for 3 prompts; there are 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_metric_that_does_not_fit_the_prompts_is_named_before_anything_runs(
    metric: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = counted(monkeypatch, Attention, "project")
    with pytest.raises(ValueError, match=message):
        sweep(model_named("gpt2"), TOKENS, [GOOD], metric, verbose=False)
    assert not ran


def fails(logits: Tensor) -> Tensor:
    raise ZeroDivisionError("of the metric's own")


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        (lambda logits: logits[:, -1, 3], ValueError, r"returns a scalar; it returned shape \(2,\)"),
        (
            lambda logits: logits.sum() * float("nan"),
            ValueError,
            "not a number for 2 of 2 cells, first for .*resid_pre",
        ),
        (fails, ZeroDivisionError, "of the metric's own"),
    ],
)
@pytest.mark.parametrize("incremental", [True, False])
def test_a_metric_that_fails_is_named_and_leaves_nothing_behind(
    metric: Any, error: Any, message: str, incremental: bool
) -> None:
    model = model_named("gpt2")
    cells = [GOOD, Intervention("blocks.1.attn.hook_pattern", "zero", head=1)]
    clean = model(TOKENS)
    always = [Intervention("hook_embed", "scale", 2.0)]
    with pytest.raises(error, match=message):
        sweep(model, TOKENS, cells, metric, always=always, incremental=incremental, verbose=False)
    assert torch.is_grad_enabled()
    assert not any(point.live for point in model.hook_points())
    assert model.context_level == 0
    assert torch.equal(model(TOKENS), clean)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cells": GOOD}, TypeError, "cells and always are lists"),
        ({"always": GOOD}, TypeError, "cells and always are lists"),
        ({"metric": 3}, TypeError, "metric is one of hooked_lm.metrics or a function"),
        ({"memory_budget": 0}, ValueError, "memory_budget is a number of bytes"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_arguments_of_the_wrong_kind_are_refused(arguments: dict[str, Any], error: Any, message: str) -> None:
    given = {"cells": [GOOD], "metric": logit(3), **arguments}
    with pytest.raises(error, match=message):
        sweep(model_named("deep"), TOKENS, verbose=False, **given)


def test_the_cell_whose_score_is_not_a_number_is_named() -> None:
    nan = Intervention("blocks.1.attn.hook_z", "replace", float("nan"), pos=2, head=1)
    with pytest.raises(ValueError, match=r"not a number for 1 of 2 cells, first for .*hook_z.*pos=2"):
        sweep(model_named("gpt2"), TOKENS, [GOOD, nan], reads_everything, verbose=False)


def test_prompts_apart_need_a_metric_that_scores_each() -> None:
    with pytest.raises(ValueError, match="per_prompt needs a metric of"):
        sweep(model_named("gpt2"), TOKENS, [GOOD], reads_everything, per_prompt=True, verbose=False)


def test_the_features_of_a_shared_expert_are_its_own() -> None:
    fields = {**ARCHITECTURES["dense layer, then mixture with a shared gated expert"], "d_shared_expert": 60}
    model = tiny_model(**fields)
    assert model.cfg.d_mlp == 48
    last = Intervention("blocks.1.mlp.shared.hook_post", "add", 3.0, feature=59)
    assert sweep(model, TOKENS, [last], logit(3), verbose=False) != logit(3)(model(TOKENS))
    with pytest.raises(ValueError, match="feature 60: this model has features 0-59"):
        sweep(model, TOKENS, [dataclasses.replace(last, feature=60)], logit(3), verbose=False)


def test_a_sweep_changes_neither_prompts_nor_values() -> None:
    tokens, cells = TOKENS.clone(), as_data([*grid(), *grid(site="attn.hook_q")])
    before = [torch.as_tensor(cell[0].value).clone() for cell in cells]
    sweep(model_named("deep"), tokens, cells, logit(3), verbose=False)
    assert torch.equal(tokens, TOKENS)
    for cell, value in zip(cells, before, strict=True):
        assert torch.equal(torch.as_tensor(cell[0].value), value)
