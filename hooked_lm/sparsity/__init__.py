"""Sparsity: how often units are active, which never are, and how many a model can do without."""

from __future__ import annotations

__all__: list[str] = []
