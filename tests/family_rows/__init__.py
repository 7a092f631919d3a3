"""Tiny models of every family, from which the tests make checkpoints. A new family adds a row."""

from __future__ import annotations

from tests.family_rows import (
    alibi,
    base,
    experts,
    gpt,
    latents,
    llamas,
    mistral_gemma,
    mixtures,
    published,
    qwen_olmo_phi,
    routers,
    variants,
)
from tests.family_rows.row import Row as Row

ROWS: tuple[Row, ...] = (
    *base.ROWS,
    *alibi.ROWS,
    *experts.ROWS,
    *gpt.ROWS,
    *mistral_gemma.ROWS,
    *qwen_olmo_phi.ROWS,
    *routers.ROWS,
    *latents.ROWS,
    *variants.ROWS,
    *llamas.ROWS,
    *mixtures.ROWS,
    *published.ROWS,
)
