"""Prompts, a metric and cells for models with components of their own."""

from __future__ import annotations

from hooked_lm import HookedTransformer, Intervention, metrics
from tests.helpers import tiny_tokens

CLEAN, CORRUPTED = tiny_tokens(pos=5, seed=1), tiny_tokens(pos=5, seed=2)
METRIC = metrics.logit_diff(3, 4)
SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "z", "q", "v", "pattern", "post")


def cells_of(model: HookedTransformer) -> list[Intervention]:
    """A cell at every layer, for some sites and positions, with the clean run's values."""
    _, clean = model.run_with_cache(CLEAN)
    names = [model_name for model_name in clean if model_name.split("hook_")[-1] in SITES]
    return [Intervention.from_cache(name, clean, pos=pos) for name in names for pos in (1, 4)]
