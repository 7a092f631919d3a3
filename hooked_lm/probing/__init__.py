"""Probing: can a label be read from an activation by a linear map, and is that worth anything?

    found = probe_layers(model, prompts, labels, site="resid_post", pos=-1, types=subjects)
    print(found.table())

A probe's accuracy says little by itself. It is given on prompts that were held out, with its bootstrap interval, beside
the accuracy of always giving the commonest label, and beside control tasks (Hewitt and Liang 2019): random labels of
the same examples, which a probe can only learn by heart. That a label can be read does not say that the model reads it:
patch along `probe.direction` to see whether it does.
"""

from __future__ import annotations

from hooked_lm.probing.evaluation import ProbeResult, evaluate_probe, probe_activations
from hooked_lm.probing.labels import Label, LabelledExamples, Labels
from hooked_lm.probing.layers import LayerProbes, probe_layers
from hooked_lm.probing.positions import Positions, TokensAt, activations_at
from hooked_lm.probing.probe import KINDS, Kind, Probe, fit_probe
from hooked_lm.probing.relation import RelationProbes, probe_relation

__all__ = [
    "KINDS",
    "Kind",
    "Label",
    "LabelledExamples",
    "Labels",
    "LayerProbes",
    "Positions",
    "Probe",
    "ProbeResult",
    "RelationProbes",
    "TokensAt",
    "activations_at",
    "evaluate_probe",
    "fit_probe",
    "probe_activations",
    "probe_layers",
    "probe_relation",
]
