"""Profiles: where a run's time and memory go, and what hooks cost."""

from __future__ import annotations

__all__: list[str] = []
