"""Activation stores: the activations of many prompts on disk, and shuffled batches out of them."""

from __future__ import annotations

__all__: list[str] = []
