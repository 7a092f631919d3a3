"""Head merging: which heads do the same, and a model in which one stands for several."""

from __future__ import annotations

__all__: list[str] = []
