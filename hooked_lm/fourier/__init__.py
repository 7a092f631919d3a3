"""Fourier analysis of models that do modular arithmetic (Nanda et al. 2023, "Progress measures for grokking").

found = analyse_modular(model, p=113, after=[113])
print(found.summary)
"""

from __future__ import annotations

from hooked_lm.fourier.analysis import (
    all_pairs,
    analyse_modular,
    frequency_shares,
    key_frequencies,
    neuron_frequencies,
    only_frequencies,
    trig_shares,
    without_frequencies,
)
from hooked_lm.fourier.basis import fourier_basis, frequency_of_row, from_fourier, row_labels, to_fourier
from hooked_lm.fourier.result import ModularAnalysis

__all__ = [
    "ModularAnalysis",
    "all_pairs",
    "analyse_modular",
    "fourier_basis",
    "frequency_of_row",
    "frequency_shares",
    "from_fourier",
    "key_frequencies",
    "neuron_frequencies",
    "only_frequencies",
    "row_labels",
    "to_fourier",
    "trig_shares",
    "without_frequencies",
]
