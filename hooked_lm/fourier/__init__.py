"""Fourier analysis of models that do modular arithmetic."""

from __future__ import annotations

__all__: list[str] = []
