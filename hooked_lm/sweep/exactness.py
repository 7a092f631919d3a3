"""walking_obstacle: whether a sweep may skip work and still return the numbers of the plain loop."""

from __future__ import annotations

from collections.abc import Sequence

from hooked_lm.components.stock import stages_obstacle
from hooked_lm.hooked_model import HookedModel
from hooked_lm.hooks import any_live
from hooked_lm.interventions import Intervention

__all__ = ["walking_obstacle"]


def walking_obstacle(model: HookedModel, always: Sequence[Intervention]) -> str | None:
    """Return why the incremental forward would not be exact, for the progress bar; None if it is.

    It leaves out the positions before a cell's edit and the layers below it. So nothing but attention may read them,
    and the computation between hook points must be that of this package's components.

    Args:
        model: the model.
        always: interventions made in every run in addition to a cell's.
    """
    cfg = model.cfg
    if cfg.n_layers == 0:
        return "the model has no layers"
    if cfg.attention_dir == "bidirectional":
        return "earlier positions attend to later ones"
    changed = stages_obstacle(model)  # type: ignore[arg-type]
    if changed is not None:
        return changed
    if any((block.attn_only, block.parallel) != (cfg.attn_only, cfg.parallel_attn_mlp) for block in model.blocks):
        return "a block is of another kind than the config says"
    if any_live(model.hook_points()):
        return "the model has hooks, which may do anything"
    if any(one.site.startswith(("blocks.", "ln_final.", "unembed.")) for one in always):
        return "something in the blocks is changed in every run"
    if cfg.use_qk_norm and cfg.qk_norm_after_rotary and not all(map(cfg.rotates, range(cfg.n_layers))):
        return "no hook point shows the keys as attention uses them"
    return None
