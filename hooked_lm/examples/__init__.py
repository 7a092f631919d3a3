"""Maximal examples: the tokens of a corpus on which a neuron, a head or a direction is most active.

    found = max_activating(model, texts, ("post", 2), features=[17, 80])
    print(found.table(unit=0))

The corpus is read once, a batch at a time, and may be longer than memory: of each unit the highest activations are
kept, with the tokens around them. BOS and padding are left out. The highest activations are one end of a distribution:
look at others too before a unit is given a name (Bolukbasi et al. 2021, "An Interpretability Illusion for BERT").
"""

from __future__ import annotations

from hooked_lm.examples.corpus import Corpus
from hooked_lm.examples.result import ActivatingExample, MaxActivating
from hooked_lm.examples.search import max_activating

__all__ = ["ActivatingExample", "Corpus", "MaxActivating", "max_activating"]
