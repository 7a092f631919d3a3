"""Positions: learned embeddings, rotary angles and their scalings, ALiBi slopes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_lm.config import HookedTransformerConfig

if TYPE_CHECKING:
    from hooked_lm.components.layout import SequenceLayout


class PosEmbed(nn.Module):
    """Learned positions, `W_pos` [n_ctx d_model]."""

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__()
        self.W_pos = nn.Parameter(torch.empty(cfg.n_ctx, cfg.d_model))

    def forward(self, layout: SequenceLayout, batch: int) -> Float[Tensor, "batch query d_model"]:
        """Return each query's position embedding; a view of `W_pos` when no prompt is padded."""
        if layout.valid is None:
            return self.W_pos[layout.n_past : layout.n_keys].expand(batch, -1, -1)
        return F.embedding(layout.position_ids, self.W_pos)


@dataclass(frozen=True)
class RotarySpec:
    """Everything rotary angles depend on besides the positions (Su et al. 2021, "RoFormer").

    Attributes:
        dim: how many dimensions rotate.
        base: the slowest pair turns by `base ** -(1 - 2/dim)` radians per position.
        adjacent: pairs are neighbours (0, 1), (2, 3), ... rather than halves (0, dim/2), ...
        divisor: positions are divided by it (linear scaling).
        by_parts: (factor, low_freq_factor, high_freq_factor, original_ctx) of the Llama-3 scaling, or None.
    """

    dim: int
    base: float
    adjacent: bool = False
    divisor: float = 1.0
    by_parts: tuple[float, float, float, int] | None = None

    @classmethod
    def of(cls, cfg: HookedTransformerConfig, layer: int) -> RotarySpec:
        """Return the rotary positions of one layer."""
        assert cfg.rotary_dim is not None  # filled in by the config
        local = cfg.window(layer) is not None and cfg.rotary_base_local is not None
        if local and cfg.rotary_base_local is not None:
            return cls(cfg.rotary_dim, cfg.rotary_base_local, cfg.rotary_adjacent_pairs)
        by_parts = (
            cfg.NTK_by_parts_factor,
            cfg.NTK_by_parts_low_freq_factor,
            cfg.NTK_by_parts_high_freq_factor,
            cfg.NTK_original_ctx_len,
        )
        return cls(
            cfg.rotary_dim,
            cfg.rotary_base,
            cfg.rotary_adjacent_pairs,
            cfg.rotary_scaling_factor,
            by_parts if cfg.use_NTK_by_parts_rope else None,
        )


@lru_cache(maxsize=64)
def rotary_frequencies(spec: RotarySpec, device: torch.device) -> Float[Tensor, " pair"]:
    """Return radians per position of each rotating pair, in float32 as the checkpoints were trained with."""
    exponents = torch.arange(0, spec.dim, 2, dtype=torch.int64, device=device).float() / spec.dim
    frequencies = 1.0 / spec.base**exponents
    if spec.by_parts is not None:
        frequencies = _scale_by_parts(frequencies, *spec.by_parts)
    return frequencies / spec.divisor


def _scale_by_parts(
    frequencies: Float[Tensor, " pair"], factor: float, low: float, high: float, original_ctx: int
) -> Float[Tensor, " pair"]:
    """Slow the pairs that turn less than `low` times over the original context by `factor`; leave those above `high`.

    In between the two are blended (Llama 3; "NTK-by-parts", Peng et al. 2023, section 3.2).
    """
    turns = original_ctx * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / factor


def rotary_tables(
    spec: RotarySpec, positions: Int[Tensor, "batch query"]
) -> tuple[Float[Tensor, "batch query 1 dim"], Float[Tensor, "batch query 1 dim"]]:
    """Return cosine and sine of every dimension's angle at the given positions."""
    angles = positions[:, :, None].float() * rotary_frequencies(spec, positions.device)
    angles = angles.repeat_interleave(2, -1) if spec.adjacent else angles.repeat(1, 1, 2)
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


def rotate(
    x: Float[Tensor, "batch query head d_head"], spec: RotarySpec, cos: Float[Tensor, "..."], sin: Float[Tensor, "..."]
) -> Float[Tensor, "batch query head d_head"]:
    """Return `x` with the first `spec.dim` dimensions of each head rotated pair by pair."""
    turning, still = x[..., : spec.dim], x[..., spec.dim :]
    if spec.adjacent:
        quarter_turn = torch.stack((-turning[..., 1::2], turning[..., ::2]), -1).flatten(-2)
    else:
        first, second = turning.chunk(2, -1)
        quarter_turn = torch.cat((-second, first), -1)
    turned = turning * cos + quarter_turn * sin
    return turned if still.shape[-1] == 0 else torch.cat((turned, still), -1)


def alibi_slopes(n_heads: int) -> Float[Tensor, " head"]:
    """Return ALiBi's slope per head: the powers of `2 ** (-8 / n)`, for n the largest power of two up to `n_heads`.

    Heads beyond n take every second power of the next finer sequence (Press et al. 2022).
    """
    n = 2 ** math.floor(math.log2(n_heads))
    slopes = [2.0 ** (-8 * (i + 1) / n) for i in range(n)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / n) for i in range(n_heads - n)]
    return torch.tensor(slopes)
