"""Which heads write along a direction or read it, beside what random directions give.

A head writes `x W_OV` of what it reads, `x`. Of inputs that are alike in all directions, the share of the output's size
that lies along a direction `d` of length 1 is `||W_OV d|| / ||W_OV||`, in Frobenius norm; the square is a share of the
variance. A head's queries read `x W_Q`: the share of their size that `d` gives is `||d W_Q|| / ||W_Q||`, and likewise
for keys and values. So a share is the composition score (Elhage et al. 2021, "A Mathematical Framework for Transformer
Circuits") of a head with a reader or a writer of this one direction.

Some directions have large shares in many heads, such as those in which all embeddings vary most. So the share of a
direction is held to those of random directions with the covariance of all of its kind, `N(0, C)`. The p-value of a head
is `(1 + n of draws with at least its share) / (1 + n of draws)`, adjusted for the number of heads (Holm 1979). It
answers whether a head prefers the direction to others of its kind, not whether it does so in a run.

The gain of a norm belongs to what reads through it: it is in `W_Q`, `W_K` and `W_V`, and in the direction that a
token's logit reads. Where heads read through LayerNorm the mean over the stream's entries is not read, and all shares
are of vectors less their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm._support.integers import at_least_one, integer, is_integer
from hooked_lm._support.multiple_tests import holm_adjusted
from hooked_lm._support.precision import at_least_single
from hooked_lm.circuits.folded import (
    folded_ov,
    head_norm_linear_part,
    read_through,
    reads_centred,
    require_additive,
    require_scores_by_head,
)
from hooked_lm.circuits.full_circuits import token_embeddings
from hooked_lm.circuits.stock_only import (
    require_own_matrices,
    require_stock_attention,
    require_stock_unembedding,
)
from hooked_lm.components.projections import per_query_head
from hooked_lm.hooked_model import HookedModel

__all__ = ["Chance", "DirectionHead", "Directions", "HeadDirections", "Through", "reading_heads", "writing_heads"]

# One direction, several, or tokens that stand for theirs.
Directions = str | int | Sequence[str] | Sequence[int] | Tensor
# The kind of the random directions, or activations whose covariance they have.
Chance = Literal["unembedding", "embedding", "isotropic"] | Tensor
Through = Literal["q", "k", "v"]
# A line of `HeadDirections.rows`.
Row = dict[str, str | int | float]

# Random directions for each head, by default: so many that the smallest adjusted p-value is about 0.01.
_DRAWS_PER_HEAD, _LEAST_DRAWS = 100, 1000
# Added to seeds: a model that was initialised with seed 0 has the numbers in its weights that seed 0 draws here too.
_SEED_OFFSET = 5_851_834_092_671
# Random directions that go through a layer's heads at a time.
_DRAWS_AT_A_TIME = 1024
# A direction is one if this share of its length is left without the mean.
_LEAST_LENGTH = 1e-5


class DirectionHead(NamedTuple):
    """A head and a direction. `pandas.DataFrame` takes a list of them; the numbers are those of `HeadDirections`."""

    direction: str
    layer: int
    head: int
    score: float
    expected: float
    z: float
    percentile: float
    p: float
    p_adjusted: float

    @property
    def label(self) -> str:
        """`"L1H4"`."""
        return f"L{self.layer}H{self.head}"


@dataclass(frozen=True, eq=False)
class HeadDirections:
    """How much each head writes along directions, or reads them, beside chance.

    Attributes:
        kind: `"writes"`, `"reads by q"`, `"reads by k"` or `"reads by v"`.
        directions: the name of each: a token, or `"direction 0"`.
        scores: the shares, between 0 and 1, [direction layer head].
        expected: the mean share of random directions, [layer head].
        z: the score less that, in standard deviations of the random directions' shares, [direction layer head]; 0 where
            all directions have the same share.
        percentile: how many of 100 random directions have a lower share, [direction layer head].
        p: the probability of a random direction to have at least this share, from the draws, [direction layer head].
        p_adjusted: the same for all heads together (Holm), for each direction by itself, [direction layer head].
        chance: what the random directions are like.
        n_draws: how many there were.
    """

    kind: str
    directions: tuple[str, ...]
    scores: Float[Tensor, "direction layer head"]
    expected: Float[Tensor, "layer head"]
    z: Float[Tensor, "direction layer head"]
    percentile: Float[Tensor, "direction layer head"]
    p: Float[Tensor, "direction layer head"]
    p_adjusted: Float[Tensor, "direction layer head"]
    chance: str
    n_draws: int

    def top(self, k: int = 5, direction: int | str | None = None) -> list[DirectionHead]:
        """Return the `k` heads furthest above chance, by z, the furthest first; fewer where there are fewer.

        Args:
            k: how many.
            direction: its number or name; by default heads of all directions.

        Raises:
            ValueError: `k` is below 1, or there is no such direction.
        """
        at_least_one(k, "k")
        rows = range(len(self.directions)) if direction is None else [self._index(direction)]
        return sorted((one for row in rows for one in self._heads_of(row)), key=lambda one: -one.z)[:k]

    def significant(self, level: float = 0.05) -> list[DirectionHead]:
        """Return the heads whose adjusted p-value is at most a level, the furthest above chance first.

        Raises:
            ValueError: the level is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"level is between 0 and 1, got {level!r}")
        return [one for one in self.top(self.scores.numel()) if one.p_adjusted <= level]

    def _index(self, direction: int | str) -> int:
        if isinstance(direction, str) and direction in self.directions:
            return self.directions.index(direction)
        if is_integer(direction) and 0 <= integer(direction, "direction") < len(self.directions):
            return integer(direction, "direction")
        last = len(self.directions) - 1
        raise ValueError(f"no direction {direction!r}: there are 0-{last}, such as {self.directions[-1]!r}")

    def _heads_of(self, row: int) -> Iterator[DirectionHead]:
        n_layers, n_heads = self.expected.shape
        each = (self.scores, self.z, self.percentile, self.p, self.p_adjusted)
        for layer in range(n_layers):
            for head in range(n_heads):
                score, z, percentile, p, adjusted = (float(one[row, layer, head]) for one in each)
                expected = float(self.expected[layer, head])
                yield DirectionHead(self.directions[row], layer, head, score, expected, z, percentile, p, adjusted)

    def rows(self) -> list[Row]:
        """Return a dictionary for each direction and head; `pandas.DataFrame` takes them.

        Keys: those of `DirectionHead`.
        """
        return [dict(one._asdict()) for row in range(len(self.directions)) for one in self._heads_of(row)]

    def table(self, k: int = 10, direction: int | str | None = None) -> str:
        """Return the heads furthest above chance as text.

        Args:
            k, direction: as for `top`.

        Raises:
            ValueError: as `top`.
        """
        lines = [["direction", "head", "score", "chance", "z", "percentile", "p (Holm)"]]
        lines += [
            [
                *(repr(one.direction), one.label, f"{one.score:.3f}", f"{one.expected:.3f}", f"{one.z:+.1f}"),
                *(f"{one.percentile:.1f}", f"{one.p_adjusted:.3f}"),
            ]
            for one in self.top(k, direction)
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        head = f"{self.kind}; chance: {self.n_draws} {self.chance}"
        return "\n".join([head, *("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)])

    def __str__(self) -> str:
        return self.table()


@torch.no_grad()
def writing_heads(
    model: HookedModel,
    direction: Directions,
    *,
    names: Sequence[str] | None = None,
    chance: Chance = "unembedding",
    n_draws: int | None = None,
    seed: int = 0,
    verbose: bool = True,
) -> HeadDirections:
    """Return how much of what each head writes lies along a direction, `||W_OV d|| / ||W_OV||`, beside chance.

    Args:
        model: a `HookedTransformer`.
        direction: [d_model], or several [direction d_model], of any length; or tokens, as strings or numbers, for the
            directions in which their logits read the stream, less the mean of all tokens, which changes no probability.
        names: of the directions, in results; by default the tokens, or `"direction 0"`.
        chance: the random directions' covariance: of those that all tokens' logits read (`"unembedding"`), of all
            token embeddings (`"embedding"`), the same in all directions (`"isotropic"`), or of activations
            [example d_model], such as `probing.activations_at` returns of the residual stream.
        n_draws: how many random directions; by default 100 for each head of the model, and at least 1000.
        seed: of the draws.
        verbose: show a progress bar.

    Raises:
        ValueError: directions of another width, that are zero (less their mean, where heads read through LayerNorm) or
            not finite; an unknown chance; a model whose heads write no product of matrices; overridden components.
    """
    _require_heads(model)
    given = _named_directions(model, direction, _logit_directions, names)
    return _compared(model, given, "writes", _written, chance, n_draws, seed, verbose)


@torch.no_grad()
def reading_heads(
    model: HookedModel,
    direction: Directions,
    through: Through = "q",
    *,
    names: Sequence[str] | None = None,
    chance: Chance = "embedding",
    n_draws: int | None = None,
    seed: int = 0,
    verbose: bool = True,
) -> HeadDirections:
    """Return how much of what each head's queries, keys or values read lies along a direction, beside chance.

    The share is `||d W_Q|| / ||W_Q||`, with the gain of the norm before the head, and of a norm on queries or keys, in
    the matrix. With grouped queries, a head's keys and values are those of its group.

    Args:
        model: a `HookedTransformer`.
        direction: [d_model], or several [direction d_model], of any length; or tokens, as strings or numbers, for their
            embeddings less the mean of all.
        through: `"q"`, `"k"` or `"v"`.
        names, chance, n_draws, seed, verbose: as for `writing_heads`.

    Raises:
        ValueError: as `writing_heads`, or norms of queries and keys that mix heads.
    """
    if through not in get_args(Through):
        raise ValueError(f"heads read through 'q', 'k' or 'v', not {through!r}")
    _require_heads(model)
    require_own_matrices(model, "how much a head reads")
    if through != "v":
        require_scores_by_head(model)

    def read(model: HookedModel, layer: int) -> Float[Tensor, "head width d_model"]:
        return _read(model, layer, through)

    given = _named_directions(model, direction, _embedding_directions, names)
    return _compared(model, given, f"reads by {through}", read, chance, n_draws, seed, verbose)


# The matrices


def _require_heads(model: HookedModel) -> None:
    if model.cfg.n_layers == 0:
        raise ValueError("this model has no layers, and so no heads")
    require_additive(model)


def _written(model: HookedModel, layer: int) -> Float[Tensor, "head width d_model"]:
    """Matrices that are as long along every direction as `W_OV` is: `||M d|| = ||W_OV d||`."""
    OV = folded_ov(model, layer)
    R: Tensor = torch.linalg.qr(OV.A).R
    return R @ OV.B


def _read(model: HookedModel, layer: int, through: Through) -> Float[Tensor, "head width d_model"]:
    require_stock_attention(model, layer, "how much a head reads")
    block = model.blocks[layer]
    attn, home = block.attn, model.embed.W_E.device
    weights, norm = {"q": (attn.W_Q, attn.q_norm), "k": (attn.W_K, attn.k_norm), "v": (attn.W_V, None)}[through]
    W = read_through(block.ln1, at_least_single(weights.detach().to(home)))
    W = W if norm is None else head_norm_linear_part(norm, W)
    return per_query_head(W, model.cfg.n_heads).mT


# Directions


def _logit_directions(model: HookedModel) -> Float[Tensor, "vocab d_model"]:
    """The directions in which the logits read the stream, less their mean."""
    require_stock_unembedding(model, "the direction of a logit")
    W_U = at_least_single(model.W_U.detach().to(model.embed.W_E.device))
    rows = read_through(model.ln_final, W_U).mT
    return rows - rows.mean(0)


def _embedding_directions(model: HookedModel) -> Float[Tensor, "vocab d_model"]:
    """The tokens' embeddings less their mean."""
    rows = at_least_single(token_embeddings(model, verbose=False))
    return rows - rows.mean(0)


def _at_work(model: HookedModel, vectors: Tensor) -> Tensor:
    """Vectors on the device and in the precision that heads' matrices are compared in."""
    home = model.embed.W_E
    return vectors.detach().to(home.device, torch.promote_types(home.dtype, torch.float32))


_Named = tuple[tuple[str, ...], Float[Tensor, "direction d_model"]]


def _named_directions(
    model: HookedModel,
    given: Directions,
    of_tokens: Callable[[HookedModel], Tensor],
    names: Sequence[str] | None,
) -> _Named:
    """Return names and vectors of the directions that were asked for."""
    own, vectors = _vectors(model, given, of_tokens)
    if names is None:
        return own, vectors
    if isinstance(names, str) or len(names) != len(vectors):
        raise ValueError(f"names are as many as the directions, {len(vectors)}; got {names!r}")
    return tuple(names), vectors


def _vectors(model: HookedModel, given: Directions, of_tokens: Callable[[HookedModel], Tensor]) -> _Named:
    if isinstance(given, Tensor) and given.is_floating_point():
        rows = _at_work(model, given)
        rows = rows[None] if rows.ndim == 1 else rows
        if rows.ndim != 2 or rows.shape[1] != model.cfg.d_model or not len(rows):
            raise ValueError(
                f"a direction is [d_model] with d_model {model.cfg.d_model}, or several [direction d_model]; got shape "
                f"{tuple(given.shape)}"
            )
        return tuple(f"direction {index}" for index in range(len(rows))), rows
    several = given.tolist() if isinstance(given, Tensor) else given
    tokens = [several] if isinstance(several, (str, int)) else list(several)
    numbers = [model.to_single_token(one) if isinstance(one, str) else integer(one, "a token") for one in tokens]
    vectors = of_tokens(model)
    wrong = [one for one in numbers if not 0 <= one < len(vectors)]
    if wrong or not numbers:
        raise ValueError(f"direction is one or more tokens of 0-{len(vectors) - 1}, or a float tensor; got {given!r}")
    names = tuple(str(one) if model.tokenizer is None else model.to_single_str_token(one) for one in numbers)
    return names, vectors[numbers]


# Chance


@dataclass(frozen=True)
class _RandomDirections:
    """Random directions `g @ root`, with `g` normal: the same each time that they are drawn.

    root: [rank d_model].
    description: for people.
    n_draws, seed: how many, and which.
    """

    root: Float[Tensor, "rank d_model"]
    description: str
    n_draws: int
    seed: int

    def blocks(self) -> Iterator[Float[Tensor, "draw rank"]]:
        """Yield `g`, a block of draws at a time."""
        generator = torch.Generator().manual_seed(_SEED_OFFSET + self.seed)
        for start in range(0, self.n_draws, _DRAWS_AT_A_TIME):
            n = min(_DRAWS_AT_A_TIME, self.n_draws - start)
            yield torch.randn(n, len(self.root), generator=generator).to(self.root)


def _random_directions(
    model: HookedModel, chance: Chance, n_draws: int | None, seed: int, centred: bool
) -> _RandomDirections:
    d_model = model.cfg.d_model
    n_draws = (
        max(_LEAST_DRAWS, _DRAWS_PER_HEAD * model.cfg.n_layers * model.cfg.n_heads) if n_draws is None else n_draws
    )
    if integer(n_draws, "n_draws") < 2:
        raise ValueError(f"n_draws is 2 or more, got {n_draws}")
    if isinstance(chance, str) and chance == "isotropic":
        root = _at_work(model, torch.eye(d_model))
        return _RandomDirections(_less_mean(root, centred), "directions, all alike", n_draws, seed)
    if isinstance(chance, Tensor):
        if chance.ndim != 2 or chance.shape[1] != d_model or len(chance) < 2 or not bool(chance.isfinite().all()):
            raise ValueError(
                f"chance is activations [example d_model], two or more, finite, with d_model {d_model}; got shape "
                f"{tuple(chance.shape)}"
            )
        rows, words = _at_work(model, chance), f"directions like {len(chance)} activations"
    else:
        known = {"unembedding": _logit_directions, "embedding": _embedding_directions}
        if chance not in known:
            raise ValueError(f"chance is one of {', '.join(known)}, isotropic, or activations; got {chance!r}")
        rows, words = known[chance](model), f"directions like the {chance}s"
    rows = _less_mean(rows - rows.mean(0), centred)
    variances, axes = torch.linalg.eigh(rows.mT @ rows / len(rows))
    if not float(variances[-1]) > 0:
        raise ValueError(f"{words} do not vary: there are no random directions like them")
    # The symmetric root: eigenvectors have no sign of their own, and the draws would depend on the one they came with.
    return _RandomDirections((axes * variances.clamp(min=0).sqrt()) @ axes.mT, words, n_draws, seed)


def _less_mean(rows: Float[Tensor, "row d_model"], centred: bool) -> Float[Tensor, "row d_model"]:
    return rows - rows.mean(-1, keepdim=True) if centred else rows


# The comparison


def _compared(
    model: HookedModel,
    given: _Named,
    kind: str,
    matrices: Callable[[HookedModel, int], Tensor],
    chance: Chance,
    n_draws: int | None,
    seed: int,
    verbose: bool,
) -> HeadDirections:
    """Hold the shares of directions in every head's matrix to those of random directions."""
    centred = reads_centred(model)
    names, vectors = given[0], _checked(*given, centred)
    drawn = _random_directions(model, chance, n_draws, seed, centred)
    lengths = torch.cat([(g @ drawn.root).norm(dim=-1) for g in drawn.blocks()])
    found = list[tuple[Tensor, ...]]()
    for layer in tqdm(range(model.cfg.n_layers), disable=not verbose, desc="heads", leave=False):
        M = matrices(model, layer)
        # What a matrix does to the mean is never read, or writes what is never read.
        M = M - M.mean(-1, keepdim=True) if centred else M
        size = M.square().sum((1, 2)).sqrt()
        size = size.where(size > 0, 1.0)
        scores = _lengths_through(M, vectors) / size
        rooted = einsum(M, drawn.root, "head width d_model, rank d_model -> head width rank")
        by_chance = torch.cat([_lengths_through(rooted, g) for g in drawn.blocks()]) / (lengths[:, None] * size)
        found.append((scores, *_held_to(scores, by_chance)))
    # [direction layer head]; the mean of chance has no axis of directions.
    scores, expected, z, percentile, p = (torch.stack(one, -2) for one in zip(*found, strict=True))
    adjusted = holm_adjusted(p.flatten(1)).reshape(p.shape)
    return HeadDirections(kind, names, scores, expected, z, percentile, p, adjusted, drawn.description, drawn.n_draws)


def _checked(names: Sequence[str], vectors: Tensor, centred: bool) -> Float[Tensor, "direction d_model"]:
    """Return directions of length 1, less their mean where that is not read."""
    left = _less_mean(vectors, centred)
    length: Tensor = torch.linalg.vector_norm(left, dim=-1)
    there = length > _LEAST_LENGTH * vectors.norm(dim=-1)
    for index in (~there).nonzero().flatten().tolist():
        raise ValueError(
            f"{names[index]!r} is no direction: it is zero or not finite"
            + (", or the same in all entries, which no head reads through LayerNorm" if centred else "")
        )
    return left / length[:, None]


def _lengths_through(
    M: Float[Tensor, "head width d_model"], rows: Float[Tensor, "row d_model"]
) -> Float[Tensor, "row head"]:
    """Return the length of each row times each head's matrix."""
    lengths: Tensor = torch.linalg.vector_norm((rows @ M.flatten(0, 1).mT).unflatten(-1, M.shape[:2]), dim=-1)
    return lengths


def _held_to(
    scores: Float[Tensor, "direction head"], by_chance: Float[Tensor, "draw head"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mean of chance [head], and z, percentile and p-value of each score."""
    n_draws = len(by_chance)
    # Rounding must not decide between a share and the same share of all other directions.
    margin = 16 * torch.finfo(scores.dtype).eps
    ordered = by_chance.sort(0).values.mT.contiguous()
    below = torch.searchsorted(ordered, (scores - margin).mT.contiguous()).mT
    mean, spread = by_chance.mean(0), by_chance.std(0)
    varies = spread > margin
    z = ((scores - mean) / spread.where(varies, 1.0)).where(varies, 0.0)
    p = (1.0 + n_draws - below) / (1.0 + n_draws)
    return mean, z, (100.0 * below / n_draws).to(scores), p.to(scores)
