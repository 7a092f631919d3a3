"""Activation stores: the activations of many texts on disk, and shuffled batches out of them.

store = store_activations(model, texts, "blocks.2.hook_resid_post", "activations")
for batch in store.batches("blocks.2.hook_resid_post", 1024, seed=epoch):
    ...
"""

from __future__ import annotations

from hooked_lm.datasets.store import ActivationStore, StoredActivations
from hooked_lm.datasets.writing import store_activations

__all__ = ["ActivationStore", "StoredActivations", "store_activations"]
