"""Edits of every kind, as interventions and as hooks, and the plain loop that a sweep has to equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hooked_lm import HookedTransformer, Intervention
from hooked_lm.interventions import Operation
from tests.helpers import tiny_model
from tests.hook_sites_helpers import BATCH, POS, TOKENS, model_of, sites_of

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
        "query_scale_beta": 0.8,
        "query_scale_ctx_len": 2,
        "attn_scores_soft_cap": 0.5,
    },
    "deep norms on the stream": {"n_layers": 3, "norm_placement": "residual"},
    "deep attention only, norms before and after": {
        "n_layers": 3,
        "attn_only": True,
        "use_normalization_before_and_after": True,
    },
}
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


def as_data(cells: Sequence[Sequence[Edit]]) -> list[list[Intervention]]:
    return [[edit.intervention() for edit in cell] for cell in cells]


def reads_everything(logits: Tensor) -> Tensor:
    """A metric that every logit of every position and prompt bears on, each with a weight of its own."""
    weights = torch.rand(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (weights * logits.sin()).sum()


def grid(name: str = "deep", site: str = "hook_resid_pre") -> list[list[Edit]]:
    layers = range(model_named(name).cfg.n_layers)
    return [[make_edit(name, f"blocks.{i}.{site}", "scale", pos, pos=pos)] for i in layers for pos in range(POS)]
