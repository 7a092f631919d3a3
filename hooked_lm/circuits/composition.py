"""Composition of heads beside chance: how much of what a head writes a later one reads, and what random heads score.

The score of a pair is `||W_OV W_R|| / (||W_OV|| ||W_R||)` in Frobenius norms, where the reader's `W_R` is its QK (Q
composition), the transpose of that (K), or its OV (V) (Elhage et al. 2021, "A Mathematical Framework for Transformer
Circuits"). Random matrices score above zero too, so a score means little without the score that chance gives.

Chance: both matrices keep their singular values, and the side on which they meet is turned at random, uniformly over
all rotations. With `s` and `t` the squared singular values of the two, each divided by their sum, and `O` the random
rotation seen from their singular vectors, the squared score is `sum_ij s_i t_j O_ij^2`. The moments of a random
rotation's entries (Weingarten calculus; Collins and Sniady 2006, "Integration with Respect to the Haar Measure on
Unitary, Orthogonal and Symplectic Group") are `E[O_ij^2] = 1/n`, `E[O_ij^4] = 3/(n(n+2))`,
`E[O_ij^2 O_ik^2] = 1/(n(n+2))` and, for entries that share no row and no column,
`E[O_ij^2 O_kl^2] = (n+1)/((n-1)n(n+2))`. Summed up, exactly:

    mean of the squared score      1/n
    variance of the squared score  2 (sum_i s_i^2 - 1/n) (sum_j t_j^2 - 1/n) / ((n-1)(n+2))

`n` is `d_model`, or one less where heads read through LayerNorm, which takes the mean of the stream away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm.circuits.folded import folded_ov, folded_qk, reads_centred
from hooked_lm.factored_matrix import FactoredMatrix
from hooked_lm.hooked_model import HookedModel

__all__ = [
    "MODES",
    "Chance",
    "ComposingPair",
    "CompositionScores",
    "chance_of_square",
    "head_composition",
    "pairs_table",
]

MODES = ("Q", "K", "V")

# Singular values that differ by less are taken as equal: such a matrix scores the same in every rotation.
_EVEN = 1e-6


# Results


class ComposingPair(NamedTuple):
    """Two heads, and how much the later one reads of the earlier. `pandas.DataFrame` takes a list of them."""

    mode: str
    writer: tuple[int, int]
    reader: tuple[int, int]
    score: float
    excess: float
    z: float

    @property
    def label(self) -> str:
        """`"L0H0 -> L1H1"`."""
        return " -> ".join(f"L{layer}H{head}" for layer, head in (self.writer, self.reader))


@dataclass(frozen=True, eq=False)
class CompositionScores:
    """Composition of every pair of heads, indexed by the writer's layer and head, then the reader's.

    Where the writer is not in an earlier layer there is no composition, and every number is 0.

    Attributes:
        mode: `"Q"`, `"K"` or `"V"`: through the reader's queries, keys or values.
        scores: between 0 and 1, [layer head layer head].
        expected: the root of the mean squared score by chance, the same for all pairs.
        z: the squared score less its mean by chance, in standard deviations of chance, [layer head layer head]; 0 where
            chance has no spread, and for a head that writes or reads nothing.
    """

    mode: str
    scores: Float[Tensor, "layer head layer head"]
    expected: float
    z: Float[Tensor, "layer head layer head"]

    @property
    def earlier(self) -> Bool[Tensor, "layer head layer head"]:
        """Whether the writer is in an earlier layer than the reader."""
        n_layers = self.scores.shape[0]
        layer = torch.arange(n_layers, device=self.scores.device)
        return (layer[:, None, None, None] < layer[:, None]).expand(self.scores.shape)

    @property
    def excess(self) -> Float[Tensor, "layer head layer head"]:
        """The scores less `expected`; negative where a reader reads less of the writer's output than chance would."""
        return torch.where(self.earlier, self.scores - self.expected, torch.zeros_like(self.scores))

    def top(self, k: int = 10, by: str = "z") -> list[ComposingPair]:
        """Return the `k` pairs that compose most, the strongest first.

        Args:
            k: how many pairs.
            by: order by `"z"`, the deviation from chance, or by `"score"`.

        Raises:
            ValueError: fewer than `k` pairs, or an unknown order.
        """
        pairs = self.earlier.nonzero()
        if by not in ("z", "score"):
            raise ValueError(f"pairs are ordered by 'z' or 'score', not {by!r}")
        if not 1 <= k <= len(pairs):
            raise ValueError(
                f"top({k}): there are {len(pairs)} pairs of heads in different layers, ask for one at least"
            )
        values = (self.z if by == "z" else self.scores)[self.earlier]
        return [self._pair(*pairs[index].tolist()) for index in values.topk(k).indices.tolist()]

    def _pair(self, *at: int) -> ComposingPair:
        score, z = float(self.scores[at]), float(self.z[at])
        return ComposingPair(self.mode, (at[0], at[1]), (at[2], at[3]), score, score - self.expected, z)

    def __str__(self) -> str:
        return pairs_table(self.top(min(10, int(self.earlier.sum()))))


def pairs_table(pairs: Sequence[ComposingPair]) -> str:
    """Return a line of text for each pair; pairs of several modes may share one table."""
    lines = [f"{'':<3}{'writer -> reader':<20}{'score':>7}{'excess':>8}{'z':>9}"]
    lines += [f"{one.mode:<3}{one.label:<20}{one.score:>7.3f}{one.excess:>8.3f}{one.z:>9.1f}" for one in pairs]
    return "\n".join(lines)


# Chance


class Chance(NamedTuple):
    """The *square* of a composition score by chance: its mean, and its standard deviation [*leading]."""

    mean: float
    std: Float[Tensor, "*leading"]


def chance_of_square(
    writer: Float[Tensor, "*#leading rank"], reader: Float[Tensor, "*#leading rank2"], dimensions: int
) -> Chance:
    """Return mean and standard deviation of the squared composition score of two matrices turned at random; exact.

    The formula is at the top of this module. For heads that are not very narrow the square is nearly normally
    distributed, and the root of its mean is close to the mean of the score itself.

    Args:
        writer, reader: singular values; leading axes broadcast.
        dimensions: of the space in which the two matrices meet, `n` in the formula.

    Raises:
        ValueError: `dimensions` is below 1, or more singular values than dimensions are not zero.
    """
    if dimensions < 1:
        raise ValueError(f"matrices meet in at least one dimension, got {dimensions}")
    uneven = _unevenness(writer, dimensions) * _unevenness(reader, dimensions)
    if dimensions == 1:
        return Chance(1.0, torch.zeros_like(uneven))
    return Chance(1 / dimensions, (2 * uneven / ((dimensions - 1) * (dimensions + 2))).sqrt())


def _unevenness(S: Float[Tensor, "*leading rank"], dimensions: int) -> Float[Tensor, "*leading"]:
    """`sum_i s_i^2 - 1/n`: 0 where all `n` singular values are equal, and for a matrix that is zero."""
    total = S.square().sum(-1)
    shares = S.square() / total.where(total > 0, 1.0)[..., None]
    excess = shares.square().sum(-1) - 1 / dimensions
    if bool((excess < -_EVEN)[total > 0].any()):
        raise ValueError(
            f"more than {dimensions} singular values are not zero, but the matrices meet in {dimensions} dimensions"
        )
    return excess.where((total > 0) & (excess > _EVEN / dimensions), 0.0)


# Scores


@torch.no_grad()
def head_composition(model: HookedModel, mode: str, *, verbose: bool = True) -> CompositionScores:
    """Return the composition of every pair of heads, beside that of random matrices with the same singular values.

    Norms between the heads count with their gain and centring, whether they were folded when the model was loaded or
    not, so a model scores the same either way. With grouped queries, a head's keys and values are those of its group.

    Args:
        model: a `HookedTransformer`.
        mode: composition through the reader's `"Q"`, `"K"` or `"V"`.
        verbose: show a progress bar.

    Raises:
        ValueError: another mode, fewer than two layers, norms stand where a head is no product of matrices, or
            attention or norms are overridden.
    """
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    if mode not in MODES:
        raise ValueError(f"composition is by 'Q', 'K' or 'V', not {mode!r}")
    if n_layers < 2:
        raise ValueError(f"heads compose with those of earlier layers, and this model has {n_layers} layers")
    layers = tqdm(range(n_layers), disable=not verbose, desc="singular values", leave=False)
    sides = [_sides(model, layer, mode) for layer in layers]
    dimensions = model.cfg.d_model - int(reads_centred(model))
    scores = sides[0].S_written.new_zeros(n_layers, n_heads, n_layers, n_heads)
    z = torch.zeros_like(scores)
    pairs = list(combinations(range(n_layers), 2))
    for first, second in tqdm(pairs, disable=not verbose, desc=f"{mode} composition", leave=False):
        chance = chance_of_square(sides[first].S_written[:, None], sides[second].S_read, dimensions)
        square = _squared_scores(sides[first], sides[second])
        scores[first, :, second] = square.sqrt()
        z[first, :, second] = _in_deviations(square, chance)
    return CompositionScores(mode, scores, dimensions**-0.5, z)


class _Sides(NamedTuple):
    """The heads of a layer, rotated so that only the side that meets other heads has d_model entries.

    written: `diag(S) V^T` of the OV, [head rank d_model].
    read: `U diag(S)` of the matrix that reads, [head d_model rank].
    S_written, S_read: the singular values of OV and of the reading matrix, [head rank].
    """

    written: Float[Tensor, "head rank d_model"]
    S_written: Float[Tensor, "head rank"]
    read: Float[Tensor, "head d_model rank2"]
    S_read: Float[Tensor, "head rank2"]


def _sides(model: HookedModel, layer: int, mode: str) -> _Sides:
    OV = folded_ov(model, layer)
    if reads_centred(model):
        # LayerNorm hides the mean of the stream from later heads: the part of a write along it is not read.
        OV = FactoredMatrix(OV.A, OV.B - OV.B.mean(-1, keepdim=True))
    reads = OV if mode == "V" else folded_qk(model, layer) if mode == "Q" else folded_qk(model, layer).T
    _, S_written, V = OV.svd()
    U, S_read, _ = reads.svd()
    return _Sides(S_written[..., None] * V.mT, S_written, U * S_read[..., None, :], S_read)


def _squared_scores(first: _Sides, second: _Sides) -> Float[Tensor, "writer reader"]:
    products = einsum(
        first.written, second.read, "writer rank d_model, reader d_model rank2 -> writer reader rank rank2"
    )
    sizes = first.S_written.square().sum(-1)[:, None] * second.S_read.square().sum(-1)
    # A head that writes nothing composes with nothing.
    return products.square().sum((-2, -1)) / sizes.where(sizes > 0, 1.0)


def _in_deviations(square: Float[Tensor, "writer reader"], chance: Chance) -> Float[Tensor, "writer reader"]:
    spread = chance.std > 0
    return ((square - chance.mean) / chance.std.where(spread, 1.0)).where(spread, 0.0)
