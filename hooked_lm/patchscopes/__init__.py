"""Patchscopes: a hidden state read by the model itself, in another prompt.

    found = patchscope(model, "When John and Mary went to the store, John gave a drink to", identity_prompt(model))
    print(found.table())

A state of a source prompt takes the place of a state of a target prompt, and the model goes on from there
(Ghandeharioun et al. 2024, "Patchscopes"). What it says depends on the target prompt too: hold it to what it says
without the state, or with states of other sources.
"""

from __future__ import annotations

from hooked_lm.patchscopes.mapping import AffineMaps, fit_affine_maps
from hooked_lm.patchscopes.next_token import LensComparison, compare_lenses
from hooked_lm.patchscopes.result import Patchscope, ScopeCell
from hooked_lm.patchscopes.run import Mapped, ScopeSite, patchscope
from hooked_lm.patchscopes.target import TargetPrompt, identity_prompt

__all__ = [
    "AffineMaps",
    "LensComparison",
    "Mapped",
    "Patchscope",
    "ScopeCell",
    "ScopeSite",
    "TargetPrompt",
    "compare_lenses",
    "fit_affine_maps",
    "identity_prompt",
    "patchscope",
]
