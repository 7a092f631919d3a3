"""The sweep gives, cell by cell, what a loop of hooked runs gives, and computes only what a cell can change.

The oracle is a plain loop: one run of the whole model per cell, under hooks that are written here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hooked_lm import HookedTransformer, Intervention
from hooked_lm.interventions import Operation
from hooked_lm.metrics import logit_diff
from hooked_lm.sweep import sweep
from tests.helpers import tiny_model
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
    return tuple(sites_of(model_named(name)))


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
    axes = tuple((model.hook_dict[site].axes or "").split())
    generator = torch.Generator().manual_seed(seed)
    if site.endswith("hook_tokens"):
        full = torch.randint(0, 20, (BATCH, POS), generator=generator)
    elif site.endswith("hook_expert_indices"):
        full = torch.arange(model.cfg.experts_per_token or 0).expand(sites_of(model)[site])
    else:
        full = torch.rand(sites_of(model)[site], generator=generator, dtype=torch.float64) + 0.5
    operation = operation if full.is_floating_point() else "replace"
    made = {key: chosen for key, chosen in selections.items() if set(_AXES[key]) & set(axes)}
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
    name: str, cells: Sequence[Sequence[Edit]], mask: Tensor | None = None, **options: Any
) -> None:
    """The sweep and hooked runs agree, for a metric that reads every logit and for one that reads two in mid-prompt."""
    model = model_named(name)
    logits = run_all_by_hand(model, cells, mask)
    for metric in (reads_everything, logit_diff([3, 5], 7, pos=-2)):
        expected = torch.stack([metric(one) for one in logits])
        options = {"verbose": False, "attention_mask": mask, **options}
        got = sweep(model, TOKENS, as_data(cells), metric, **options)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


# Every site


@pytest.mark.parametrize("mask", [None, PADDED], ids=["", "padded on the left"])
@pytest.mark.parametrize("name", CAUSAL)
def test_the_sweep_equals_the_loop_at_every_site(name: str, mask: Tensor | None) -> None:
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
    for index, site in enumerate(sites_named(name)):
        for offset in (0, 1) if mask is None else (2,):
            choice = 2 * index + offset
            # Nothing but finite logits: a score of minus infinity times nothing, or a norm by nothing, is NaN.
            operation = operations[choice % (3 if site.endswith(("hook_scale", "scores")) else 4)]
            cells.append([make_edit(name, site, operation, choice, **selections[choice % len(selections)])])
    assert_equal_to_the_loop(name, cells, mask)


@pytest.mark.parametrize("name", ["gpt2", "deep parallel grouped rotary", "deep norms on the stream"])
def test_every_head_and_position_of_a_grid_equals_the_loop(name: str) -> None:
    cells = [
        [make_edit(name, site, "replace", layer, pos=pos, head=head)]
        for layer in range(model_named(name).cfg.n_layers)
        for site in (f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.attn.hook_result")
        for pos in range(POS)
        for head in range(2)
    ]
    assert_equal_to_the_loop(name, cells)


# Several edits in one cell


@pytest.mark.parametrize("name", CAUSAL)
def test_any_pair_of_sites_of_a_layer_equals_the_loop(name: str) -> None:
    layer = model_named(name).cfg.n_layers - 1
    sites = [site for site in sites_named(name) if site.startswith((f"blocks.{layer}.", "ln_final"))]
    per_head = ("attn_in", "q_input", "k_input", "v_input")
    cells = []
    for index, site in enumerate(sites):
        other = sites[(7 * index + 3) % len(sites)]
        if all(not one.endswith(per_head) or ".ln1." not in two for one, two in ((site, other), (other, site))):
            cells.append([make_edit(name, site, "scale", 1, pos=(2, 4)), make_edit(name, other, "add", 2, pos=3)])
    assert_equal_to_the_loop(name, cells)


@st.composite
def cells_of(draw: st.DrawFn) -> tuple[str, bool, list[list[Edit]]]:
    name = draw(st.sampled_from(CAUSAL))
    sites = [site for site in sites_named(name) if ".ln1." not in site and not site.endswith("hook_attn_scores")]
    # A few sites only, so that edits meet at one.
    few = draw(st.lists(st.sampled_from(sites), min_size=1, max_size=4))
    positions = (
        st.none()
        | st.integers(-POS, POS - 1)
        | st.lists(st.integers(0, POS - 1), min_size=1, max_size=3, unique=True).map(tuple)
    )
    edits = st.builds(
        lambda site, operation, seed, pos, head, batch: make_edit(
            name, site, operation, seed, pos=pos, head=head, batch=batch
        ),
        st.sampled_from(few),
        st.sampled_from(["replace", "add", "scale"]),
        st.integers(0, 9),
        positions,
        st.sampled_from([None, 0, (0,)]),
        st.sampled_from([None, 1, (1, 0)]),
    )
    cells = draw(st.lists(st.lists(edits, min_size=2, max_size=5), min_size=1, max_size=4))
    return name, draw(st.booleans()), cells


@settings(max_examples=60, deadline=None)
@given(cells_of())
def test_any_combination_of_edits_equals_the_loop(drawn: tuple[str, bool, list[list[Edit]]]) -> None:
    name, padded, cells = drawn
    assert_equal_to_the_loop(name, cells, PADDED if padded else None)
