"""suggest_merges: which heads of a layer attend alike, and have OV circuits whose sum fits into one head."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm._support.integers import at_least_one, integer
from hooked_lm._support.precision import at_least_single
from hooked_lm.circuits.last_token import chosen_layers
from hooked_lm.components import Attention
from hooked_lm.hooked_model import HookedModel
from hooked_lm.names import get_act_name
from hooked_lm.patching.sites import read_prompts
from hooked_lm.surgery.factoring import check_mergeable, lost_share
from hooked_lm.tokenization import Prompts

if TYPE_CHECKING:
    from hooked_lm.plotting import Figure

__all__ = ["HeadPair", "MergeSuggestions", "suggest_merges"]

# A line of `MergeSuggestions.rows`.
Row = dict[str, int | float]


class HeadPair(NamedTuple):
    """Two heads of a layer, and how alike they are.

    Attributes:
        layer, first, second: which heads.
        score: `pattern_similarity * (1 - lost)`: 1 where one head can stand for both exactly.
        pattern_similarity: 1 less the mean total variation distance of their patterns, over queries: 1 for equal
            patterns, 0 for patterns without a common key.
        lost: the share of the squared norm of their summed OV circuits that is beyond rank `d_head`.
        ov_similarity: the cosine of their OV circuits, as matrices; 0 if one of them is zero.
    """

    layer: int
    first: int
    second: int
    score: float
    pattern_similarity: float
    lost: float
    ov_similarity: float


@dataclass(frozen=True, eq=False)
class MergeSuggestions:
    """Pairs of heads of a layer, those that could be merged at the least cost first.

    Attributes:
        pairs: every pair that can be merged, by falling score; of equal ones the first comes first.
        n_queries: how many queries the patterns were compared on.
    """

    pairs: tuple[HeadPair, ...]
    n_queries: int

    def top(self, k: int = 10) -> list[HeadPair]:
        """Return the `k` pairs with the highest score.

        Args:
            k: how many.

        Raises:
            ValueError: `k` is below 1.
        """
        at_least_one(k, "k")
        return list(self.pairs[:k])

    def rows(self) -> list[Row]:
        """Return a dictionary for each pair, with the fields of `HeadPair`; `pandas.DataFrame` takes them."""
        return [pair._asdict() for pair in self.pairs]

    def table(self, k: int = 10) -> str:
        """Return the first pairs as text.

        Args:
            k: how many.

        Raises:
            ValueError: `k` is below 1.
        """
        lines = [f"layer  heads    score  patterns  lost   OV cosine ({self.n_queries} queries)"]
        for pair in self.top(k):
            heads = f"{pair.first}, {pair.second}"
            values = (
                f"{pair.score:>5.2f}  {pair.pattern_similarity:>8.2f}  {pair.lost:>4.2f}  {pair.ov_similarity:>+9.2f}"
            )
            lines.append(f"{pair.layer:>5}  {heads:<7}  {values}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def figure(self, k: int = 10, title: str = "") -> Figure:
        """Return the scores of the first pairs as bars. Needs the extra `viz`.

        Args:
            k: how many pairs.
            title: of the figure.

        Raises:
            ValueError: `k` is below 1, or there are no pairs.
            ImportError: plotly is not installed.
        """
        # Plotting is an optional extra.
        from hooked_lm.plotting import attribution_bars

        pairs = self.top(k)
        labels = [f"L{pair.layer}H{pair.first} and H{pair.second}" for pair in pairs]
        name = f"How well one head could stand for two, on {self.n_queries} queries"
        return attribution_bars(labels, [pair.score for pair in pairs], unit="score", title=title or name)


@torch.no_grad()
def suggest_merges(
    model: HookedModel,
    prompts: Prompts,
    layers: Sequence[int] | None = None,
    *,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    batch_size: int = 32,
    verbose: bool = True,
) -> MergeSuggestions:
    """Return the pairs of heads of a layer by how well one head could stand for both.

    One head has one pattern and an OV circuit of rank `d_head`. So two heads can be merged as far as they attend alike
    and the sum of their OV circuits fits into that rank; `HeadPair` has both. Patterns are compared on the prompts, so
    prompts on which heads differ are part of a fair choice. Heads that read and write little are alike in nothing, and
    still cheap to merge: `merge_heads` measures what a merge costs.

    Queries at padding are left out; in causal models also a prompt's first, which sees only itself in every head. With
    grouped queries, pairs of one group are compared, which share their values.

    Args:
        model: a `HookedTransformer`.
        prompts: as the model takes them.
        layers: blocks to look at; by default all.
        attention_mask: [batch pos], 0 at padding.
        batch_size: prompts that are run at a time.
        verbose: show a progress bar.

    Raises:
        ValueError: a layer that the model lacks, heads that cannot be merged (see `factoring.check_mergeable`), or
            prompts without a query that counts.
    """
    if integer(batch_size, "batch_size") < 1:
        raise ValueError(f"batch_size is 1 or more, got {batch_size}")
    chosen = chosen_layers(model, layers)
    for layer in chosen:
        check_mergeable(model, layer)
    tokens, mask = read_prompts(model, prompts, attention_mask)
    counted = mask.bool()
    if model.cfg.attention_dir == "causal":
        counted = counted & (mask.cumsum(1) > 1)
    n_queries = int(counted.sum())
    if not n_queries:
        raise ValueError("no query counts: patterns are compared where a token sees others besides itself")
    n_heads, sites = model.cfg.n_heads, [get_act_name("pattern", layer) for layer in chosen]
    distances = {site: torch.zeros(n_heads, n_heads, dtype=torch.float64) for site in sites}
    for first in tqdm(range(0, len(tokens), batch_size), disable=not verbose, desc="batches", leave=False):
        rows = slice(first, first + batch_size)
        _, cache = model.run_with_cache(
            tokens[rows],
            attention_mask=mask[rows],
            names_filter=sites,
            stop_at_layer=model.cfg.stop_after(max(chosen)),
            return_type=None,
            return_cache_object=False,
        )
        for site in sites:
            distances[site] += _distances(cache[site], counted[rows])
    pairs = [
        _pair(layer, first, second, 1 - float(distances[site][first, second]) / n_queries, model.blocks[layer].attn)
        for layer, site in zip(chosen, sites, strict=True)
        for first, second in itertools.combinations(range(n_heads), 2)
        if _share_values(model, first, second)
    ]
    return MergeSuggestions(tuple(sorted(pairs, key=lambda pair: -pair.score)), n_queries)


def _share_values(model: HookedModel, first: int, second: int) -> bool:
    """Whether one head could stand for two: each has values of its own, or both have the same."""
    cfg = model.cfg
    of_group = cfg.n_heads // cfg.n_kv_heads
    return of_group == 1 or first // of_group == second // of_group


def _distances(
    pattern: Float[Tensor, "batch head query key"], counted: Bool[Tensor, "batch query"]
) -> Float[Tensor, "head other"]:
    """Total variation distances of each two heads' patterns, summed over queries."""
    rows = at_least_single(pattern).transpose(1, 2)[counted.to(pattern.device)]  # [query head key]
    # One head at a time: all pairs at once would take as many patterns as there are pairs.
    of_each = [(rows - rows[:, head, None]).abs().sum((0, 2), dtype=torch.float64) for head in range(rows.shape[1])]
    return torch.stack(of_each).cpu() / 2


def _pair(layer: int, first: int, second: int, similarity: float, attn: Attention) -> HeadPair:
    grouped = attn.n_kv_heads != attn.n_heads
    values = [first // attn.repeat_kv_heads] * 2 if grouped else [first, second]
    W_V, W_O = attn.W_V.detach()[values].double(), attn.W_O.detach()[[first, second]].double()
    # <W_V_i W_O_i, W_V_j W_O_j> for each two, without a matrix of d_model by d_model.
    reads = einsum(W_V, W_V, "i d_model one, j d_model other -> i j one other")
    writes = einsum(W_O, W_O, "i one d_model, j other d_model -> i j one other")
    products = (reads * writes).sum((2, 3))
    size = float((products[0, 0] * products[1, 1]).sqrt())
    cosine = float(products[0, 1]) / size if size > 0 else 0.0
    lost = 0.0 if grouped else lost_share(attn, (first, second))
    return HeadPair(layer, first, second, similarity * (1 - lost), similarity, lost, cosine)
