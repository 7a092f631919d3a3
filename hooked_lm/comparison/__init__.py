"""Comparison of two models: their weights, activations, outputs and effects."""

from __future__ import annotations

__all__: list[str] = []
