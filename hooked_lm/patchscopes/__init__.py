"""Patchscopes: a hidden state read by the model itself, in another prompt."""

from __future__ import annotations

__all__: list[str] = []
