"""Head merging: which heads do the same, and a model in which one stands for several.

    pairs = suggest_merges(model, prompts)
    merged = merge_heads(model, layer, [[0, 3]], prompts)
    print(merged)            # the divergence and loss of the new model, and with the freed head ablated instead
    merged.model             # a model like any other

Layers are dropped, moved and repeated by `model.with_layers`.
"""

from __future__ import annotations

from hooked_lm.surgery.merging import merge_heads
from hooked_lm.surgery.result import Cost, HeadMerge, MergedGroup
from hooked_lm.surgery.suggestions import HeadPair, MergeSuggestions, suggest_merges

__all__ = ["Cost", "HeadMerge", "HeadPair", "MergeSuggestions", "MergedGroup", "merge_heads", "suggest_merges"]
