"""Sparsity: how often units are active, which never are, and how many a model can do without.

    activity = unit_activity(model, texts, "post", threshold=0.1)
    print(activity)                                  # units active on a token, dead units, Hoyer and Gini sparsity
    curve = ablation_curve(model, held_out, order="activity", reference=texts)
    print(curve, curve.spared(0.1))                  # the share of neurons that can go before the loss rises by 0.1

That a unit is seldom active does not say that it does nothing, and a unit that is active need not matter: the first is
measured by activity, the second by ablation.
"""

from __future__ import annotations

from hooked_lm.sparsity.activity import unit_activity
from hooked_lm.sparsity.activity_result import ActiveUnit, UnitActivity
from hooked_lm.sparsity.curve import ablation_curve
from hooked_lm.sparsity.curve_result import AblationCurve
from hooked_lm.sparsity.measures import gini, hoyer, rate_bound

__all__ = [
    "AblationCurve",
    "ActiveUnit",
    "UnitActivity",
    "ablation_curve",
    "gini",
    "hoyer",
    "rate_bound",
    "unit_activity",
]
