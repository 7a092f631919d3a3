"""The explorer: a local web page that looks inside a model."""

from __future__ import annotations

__all__: list[str] = []
