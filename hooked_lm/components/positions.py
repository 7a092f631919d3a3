"""Positions: learned embeddings, rotary angles and their scalings, ALiBi slopes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from hooked_lm._support.torch_internals import transforms_active
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.config.classic import ConfigDict

__all__ = [
    "AlibiSpec",
    "ByParts",
    "Dynamic",
    "LongRope",
    "PosEmbed",
    "QueryScaleSpec",
    "RotarySpec",
    "Yarn",
    "alibi_slopes",
    "positions_of_text",
    "query_scales",
    "rotary_frequencies",
    "rotary_tables",
    "rotate",
    "wrong_mask",
]


class PosEmbed(nn.Module):
    """Learned positions, `W_pos` [n_ctx d_model]."""

    def __init__(self, cfg: HookedTransformerConfig | ConfigDict) -> None:
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        self.W_pos = nn.Parameter(torch.zeros(cfg.n_ctx, cfg.d_model))

    def forward(
        self,
        tokens: Shaped[Tensor, "batch pos"],
        past_kv_pos_offset: int = 0,
        attention_mask: Shaped[Tensor, "batch key"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return each token's position embedding: a view of `W_pos`, or with padding a tensor with zeros there.

        Args:
            tokens: of which only the shape is read.
            past_kv_pos_offset: the number of positions before them, in a key-value cache.
            attention_mask: 0 at padding, over all positions; None for no padding.

        Raises:
            ValueError: the mask has another shape.
        """
        batch, n_new = tokens.shape
        n_keys = past_kv_pos_offset + n_new
        if attention_mask is None:
            return self.W_pos[past_kv_pos_offset:n_keys].expand(batch, -1, -1)
        if tuple(attention_mask.shape) != (batch, n_keys):
            raise wrong_mask(attention_mask, batch, n_keys)
        valid = attention_mask.bool()
        positions = positions_of_text(valid)[:, past_kv_pos_offset:]
        return F.embedding(positions, self.W_pos).masked_fill(~valid[:, past_kv_pos_offset:, None], 0.0)


def positions_of_text(valid: Bool[Tensor, "batch key"]) -> Int[Tensor, "batch key"]:
    """Return the position of each token within its prompt, padding not counted; 0 at padding before the text.

    Args:
        valid: False at padding.
    """
    return (valid.long().cumsum(-1) - 1).clamp(min=0)


def wrong_mask(attention_mask: Tensor, batch: int, n_keys: int) -> ValueError:
    """Return the error about an attention mask of another shape than the positions have.

    Args:
        attention_mask: the mask.
        batch, n_keys: the shape of the positions.
    """
    return ValueError(
        f"attention_mask has shape [batch key] = [{batch} {n_keys}], the positions of the key-value cache included; "
        f"got {list(attention_mask.shape)}"
    )


@dataclass(frozen=True)
class ByParts:
    """Llama-3 scaling: pairs that turn less than `low` times over the original context are slowed by `factor`.

    Those that turn more than `high` times are left; in between the two are blended ("NTK-by-parts", Peng et al. 2023,
    section 3.2).
    """

    factor: float
    low: float
    high: float
    original_ctx: int

    def __call__(self, powers: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        """Return frequencies from the base's powers, whose inverses the unscaled frequencies are."""
        frequencies = 1.0 / powers
        turns = self.original_ctx * frequencies / (2 * math.pi)
        keep = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / self.factor


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023): as `ByParts`, but blended evenly over the pairs between the two bounds, not over turns.

    `fast` and `slow` are the bounds in turns; `truncate` rounds them outwards to whole pairs.
    """

    factor: float
    fast: float
    slow: float
    original_ctx: int
    truncate: bool
    base: float

    def __call__(self, powers: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        """Return frequencies from the base's powers, whose inverses the unscaled frequencies are."""
        n_pairs = len(powers)
        low, high = self._pair(self.fast, n_pairs), self._pair(self.slow, n_pairs)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * n_pairs - 1)
        pair = torch.arange(n_pairs, dtype=torch.float32, device=powers.device)
        slowed = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
        return (1 - slowed) / powers + slowed / (self.factor * powers)

    def _pair(self, turns: float, n_pairs: int) -> float:
        """Return the pair, as a real number, that turns so often over the original context."""
        return n_pairs * math.log(self.original_ctx / (turns * 2 * math.pi)) / math.log(self.base)


@dataclass(frozen=True)
class Dynamic:
    """NTK scaling that grows with the prompt: beyond the original context the base does (bloc97 2023)."""

    factor: float
    original_ctx: int
    base: float

    def __call__(self, powers: Float[Tensor, " pair"], lengths: Int[Tensor, " batch"]) -> Float[Tensor, "batch pair"]:
        """Return each prompt's frequencies, one for each of the base's powers."""
        dim = 2 * len(powers)
        stretch = self.factor * lengths.clamp(min=self.original_ctx) / self.original_ctx - (self.factor - 1)
        bases = self.base * stretch.float() ** (dim / (dim - 2))
        return 1.0 / bases[:, None] ** _exponents(dim, powers.device)


@dataclass(frozen=True)
class LongRope:
    """A divisor for each pair: `short` for prompts within the original context, `long` beyond (Ding et al. 2024)."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_ctx: int

    def __call__(self, powers: Float[Tensor, " pair"], lengths: Int[Tensor, " batch"]) -> Float[Tensor, "batch pair"]:
        """Return each prompt's frequencies from the base's powers."""
        short, long = (torch.tensor(divisors, device=powers.device) for divisors in (self.short, self.long))
        beyond = (lengths > self.original_ctx)[:, None]
        return 1.0 / (torch.where(beyond, long, short) * powers)


@dataclass(frozen=True)
class RotarySpec:
    """The parameters of rotary angles (Su et al. 2021, "RoFormer").

    Attributes:
        dim: the number of dimensions that rotate.
        base: the slowest pair turns by `base ** -(1 - 2/dim)` radians per position.
        adjacent: pairs are neighbours (0, 1), (2, 3), ... rather than halves (0, dim/2), ...
        divisor: positions are divided by it (linear scaling).
        scaling: the scaling of the frequencies besides; None for none.
        amplitude: queries and keys are multiplied by it as they rotate.
    """

    dim: int
    base: float
    adjacent: bool = False
    divisor: float = 1.0
    scaling: ByParts | Yarn | Dynamic | LongRope | None = None
    amplitude: float = 1.0

    @classmethod
    def of(cls, cfg: HookedTransformerConfig, layer: int, *, local: bool | None = None) -> RotarySpec:
        """Return the rotary parameters of one layer. A local layer with `rotary_base_local` has no scaling.

        Args:
            cfg: the config.
            layer: the layer.
            local: whether it is a local one; by default as the config says.
        """
        assert cfg.rotary_dim is not None  # filled in by the config
        local = cfg.window(layer) is not None if local is None else local
        if local and cfg.rotary_base_local is not None:
            return cls(cfg.rotary_dim, float(cfg.rotary_base_local), cfg.rotary_adjacent_pairs)
        return cls(
            cfg.rotary_dim,
            float(cfg.rotary_base),
            cfg.rotary_adjacent_pairs,
            float(cfg.rotary_scaling_factor),
            _scaling(cfg),
            _amplitude(cfg),
        )


def _scaling(cfg: HookedTransformerConfig) -> ByParts | Yarn | Dynamic | LongRope | None:
    if cfg.use_NTK_by_parts_rope:
        low, high = cfg.NTK_by_parts_low_freq_factor, cfg.NTK_by_parts_high_freq_factor
        return ByParts(cfg.NTK_by_parts_factor, low, high, cfg.NTK_original_ctx_len)
    if cfg.use_yarn_rope:
        original, fast, slow = cfg.yarn_original_max_position_embeddings, cfg.yarn_beta_fast, cfg.yarn_beta_slow
        return Yarn(cfg.yarn_factor, fast, slow, original, cfg.yarn_truncate, float(cfg.rotary_base))
    if cfg.use_dynamic_rope:
        return Dynamic(cfg.dynamic_rope_factor, cfg.dynamic_rope_original_ctx_len, cfg.rotary_base)
    if cfg.use_longrope and cfg.longrope_short_factors is not None and cfg.longrope_long_factors is not None:
        short, long = tuple(cfg.longrope_short_factors), tuple(cfg.longrope_long_factors)
        return LongRope(short, long, cfg.longrope_original_ctx_len)
    return None


def _amplitude(cfg: HookedTransformerConfig) -> float:
    if cfg.use_longrope:
        return cfg.longrope_attention_factor
    if not cfg.use_yarn_rope:
        return 1.0
    if cfg.yarn_attention_factor is not None:
        return cfg.yarn_attention_factor
    return 0.1 * math.log(max(cfg.yarn_factor, 1.0)) + 1.0


def _exponents(dim: int, device: torch.device) -> Float[Tensor, " pair"]:
    return torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim


@lru_cache(maxsize=64)
def _fixed_frequencies(spec: RotarySpec, device: torch.device) -> Float[Tensor, "1 pair"]:
    powers = spec.base ** _exponents(spec.dim, device)
    if isinstance(spec.scaling, (ByParts, Yarn)):
        return (spec.scaling(powers) / spec.divisor)[None]
    return (1.0 / powers / spec.divisor)[None]


def rotary_frequencies(spec: RotarySpec, lengths: Int[Tensor, " batch"]) -> Float[Tensor, "batch_or_1 pair"]:
    """Return radians per position of each rotating pair, in float32 as the checkpoints were trained with.

    Args:
        spec: the rotary positions.
        lengths: the length of each prompt without padding.
    """
    if isinstance(spec.scaling, (Dynamic, LongRope)):
        return spec.scaling(spec.base ** _exponents(spec.dim, lengths.device), lengths)
    # Not through the cache under torch.compile, which warns about lru_cache and folds constants itself, nor under
    # torch.func, whose tensors are of no use once the transform has ended.
    keeps = not (torch.compiler.is_compiling() or transforms_active())
    return (_fixed_frequencies if keeps else _fixed_frequencies.__wrapped__)(spec, lengths.device)


def rotary_tables(
    spec: RotarySpec, positions: Int[Tensor, "batch query"], lengths: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, "batch query 1 dim"], Float[Tensor, "batch query 1 dim"]]:
    """Return cosine and sine of every dimension's angle at the given positions."""
    angles = positions[:, :, None].float() * rotary_frequencies(spec, lengths)[:, None]
    angles = angles.repeat_interleave(2, -1) if spec.adjacent else angles.repeat(1, 1, 2)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    return (cos, sin) if spec.amplitude == 1.0 else (cos * spec.amplitude, sin * spec.amplitude)


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


@dataclass(frozen=True)
class QueryScaleSpec:
    """The factor on queries that grows with their position: it is 1 up to `ctx_len`, and larger with a larger `beta`.

    Llama 4 and Ministral 3 sharpen the softmax of late queries with it, which has more keys to spread over.
    """

    beta: float
    ctx_len: int


def query_scales(spec: QueryScaleSpec, positions: Int[Tensor, "batch query"]) -> Float[Tensor, "batch query 1 1"]:
    """Return the factor on the queries at the given positions, in float32 as the checkpoints were trained with."""
    contexts = positions.div(spec.ctx_len, rounding_mode="floor").float()
    return (1 + spec.beta * contexts.log1p())[:, :, None, None]


@dataclass(frozen=True)
class AlibiSpec:
    """ALiBi: a slope per head, times `scale`; rounded to bfloat16 where a model was trained so.

    With `part` it is for the heads from its first number to its second, not included.
    """

    n_heads: int
    scale: float = 1.0
    in_bfloat16: bool = False
    part: tuple[int, int] | None = None


def alibi_slopes(n_heads: int, device: torch.device) -> Float[Tensor, " head"]:
    """Return ALiBi's slope per head: the powers of `2 ** (-8 / n)`, for n the largest power of two up to `n_heads`.

    Heads beyond n take every second power of the next finer sequence (Press et al. 2022).
    """
    # Kept, since to send them to an accelerator is to wait for it. Tensors of a graph or a transform end with it.
    keeps = not (torch.compiler.is_compiling() or transforms_active())
    return (_slopes if keeps else _slopes.__wrapped__)(n_heads, device)


@lru_cache(maxsize=64)
def _slopes(n_heads: int, device: torch.device) -> Float[Tensor, " head"]:
    n = 2 ** math.floor(math.log2(n_heads))
    slopes = [2.0 ** (-8 * (i + 1) / n) for i in range(n)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / n) for i in range(n_heads - n)]
    return torch.tensor(slopes, device=device)
