"""Tests of hypotheses: is an effect there, how large is it, and is it larger than a control's?"""

from __future__ import annotations

__all__: list[str] = []
