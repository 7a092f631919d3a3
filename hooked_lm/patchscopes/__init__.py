"""Patchscopes: a hidden state is put into another prompt, and the model says what it reads there.

found = patchscope(model, "the capital of France", identity_prompt(model, [" cat", " dog"]))
print(found.table())
"""

from __future__ import annotations

from hooked_lm.patchscopes.maps import AffineMaps, fit_affine_maps
from hooked_lm.patchscopes.result import Patchscope, ReadingPrecision
from hooked_lm.patchscopes.scoping import identity_prompt, patchscope, reading_precision

__all__ = [
    "AffineMaps",
    "Patchscope",
    "ReadingPrecision",
    "fit_affine_maps",
    "identity_prompt",
    "patchscope",
    "reading_precision",
]
