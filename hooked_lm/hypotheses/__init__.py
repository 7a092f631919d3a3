"""Tests of hypotheses: is an effect there, how large is it, and is it larger than a control's?

    found = effect_test(with_heads, without_heads)
    print(found.verdict)

`effect_test` takes the measured numbers, of one effect or a grid of them. `controlled_test` takes a function of heads
or labels and measures it on controls too. `pairs_needed` and `power` are asked before anything is run.
"""

from __future__ import annotations

from hooked_lm.hypotheses.controls import ControlTest, against_controls, control_heads, shuffled
from hooked_lm.hypotheses.corrections import CORRECTIONS, Correction, adjusted
from hooked_lm.hypotheses.effect import controlled_test, effect_test
from hooked_lm.hypotheses.permutation import Alternative
from hooked_lm.hypotheses.power import detectable_effect, pairs_needed, power
from hooked_lm.hypotheses.result import EffectTest

__all__ = [
    "CORRECTIONS",
    "Alternative",
    "ControlTest",
    "Correction",
    "EffectTest",
    "adjusted",
    "against_controls",
    "control_heads",
    "controlled_test",
    "detectable_effect",
    "effect_test",
    "pairs_needed",
    "power",
    "shuffled",
]
