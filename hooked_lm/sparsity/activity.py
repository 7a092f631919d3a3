"""unit_activity: read a corpus once, and count how often each unit is active."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm._support.integers import integer
from hooked_lm.examples.corpus import Corpus, batches, read_batch, scored_tokens
from hooked_lm.examples.units import Units
from hooked_lm.hooked_model import HookedModel
from hooked_lm.patching.patches import Patch
from hooked_lm.sparsity.activity_result import UnitActivity
from hooked_lm.sparsity.measures import gini, hoyer
from hooked_lm.sparsity.orders import distinct_layers

__all__ = ["unit_activity"]


@torch.no_grad()
def unit_activity(
    model: HookedModel,
    corpus: Corpus,
    site: str = "post",
    layers: Sequence[int] | None = None,
    *,
    threshold: float = 0.0,
    relative: bool = False,
    max_tokens: int | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
    verbose: bool = True,
) -> UnitActivity:
    """Return how often each unit of a site is active in a corpus, how strongly, and how sparse each layer is.

    A unit is active on a token where the magnitude of its activation is above a threshold. After ReLU a threshold of 0
    separates activity from silence. GELU and SiLU are exactly 0 only where rounding makes them so, and the share of
    tokens on which a unit is active depends on the threshold: give one, and name it with the result.

    The units are the entries of the site's last axis (neurons); at a site with heads, such as `"z"`, they are the
    heads, each with the norm of its vector as its activation. BOS and padding do not count. Hooks and interventions
    that are in place act.

    Args:
        model: a `HookedTransformer`.
        corpus: texts, or for each text its tokens without padding; any iterable, read lazily.
        site: of each layer, with axes [batch pos width] or [batch pos head width]: a short name, `"post"`; or a hook
            name with `{layer}` in it.
        layers: blocks to look at, each once; by default all.
        threshold: magnitudes above it are active.
        relative: the threshold is a multiple of the root mean square of the token's activations in the layer, which is
            another number for each token and layer, rather than one in the units of activations.
        max_tokens, prepend_bos, batch_size, verbose: as for `examples.max_activating`.

    Raises:
        UnknownHookError: the model has no such hook.
        ValueError: a layer that the model lacks or that comes twice, an unknown site, one outside the blocks or with
            other axes, a negative threshold, activations that are NaN or infinite, a text that is too long, tokens that
            seem padded, a corpus without tokens, or a count out of range.
        TypeError: the corpus is one string, or its entries are neither texts nor rows of tokens.
    """
    if isinstance(threshold, bool) or not (isinstance(threshold, Real) and 0 <= threshold < math.inf):
        raise ValueError(f"threshold is a magnitude, 0 or more; got {threshold!r}")
    if integer(batch_size, "batch_size") < 1:
        raise ValueError(f"batch_size is 1 or more, got {batch_size}")
    if max_tokens is not None and integer(max_tokens, "max_tokens") < 1:
        raise ValueError(f"max_tokens is 1 or more, or None; got {max_tokens}")
    chosen = distinct_layers(model, layers)
    of_each = Patch(site, ("layer", "pos"))
    units = [Units.at(model, of_each.site(layer), None, None, None) for layer in chosen]
    sums, names, n_texts = [_Sums(float(threshold), relative) for _ in chosen], tuple[str, ...](), 0
    with tqdm(disable=not verbose, desc="texts", leave=False) as bar:
        for batch in batches(corpus, batch_size):
            read = read_batch(model, batch, n_texts, prepend_bos, max_tokens)
            n_texts += len(batch)
            bar.update(len(batch))
            if read is None:
                continue
            tokens, mask, texts = read
            _, cache = model.run_with_cache(
                tokens,
                attention_mask=mask,
                names_filter=[one.site for one in units],
                stop_at_layer=model.cfg.stop_after(max(chosen)),
                return_type=None,
                return_cache_object=False,
            )
            scored = scored_tokens(model, tokens, mask)
            for of_layer, sum_ in zip(units, sums, strict=True):
                names = names or of_layer.names(cache[of_layer.site])
                sum_.add(_counted(of_layer, cache[of_layer.site], scored, texts))
    if not sums[0].n_tokens:
        raise ValueError(f"the corpus has no tokens besides BOS and padding; it has {n_texts} texts")
    means = [sum_.means() for sum_ in sums]
    return UnitActivity(
        site=site,
        layers=chosen,
        units=names,
        threshold=float(threshold),
        relative=relative,
        n_texts=n_texts,
        n_tokens=sums[0].n_tokens,
        **{name: torch.stack([one[name] for one in means]) for name in means[0]},
    )


def _counted(
    units: Units,
    activation: Float[Tensor, "batch pos *head width"],
    scored: Bool[Tensor, "batch pos"],
    texts: list[int],
) -> Float[Tensor, "token unit"]:
    """The activations of a layer's units on the tokens that count."""
    values = units.read(activation)[scored.to(activation.device)]
    if not bool(values.isfinite().all()):
        raise ValueError(f"texts {texts[0]}-{texts[-1]} have activations at {units.site} that are NaN or infinite")
    return values


class _Sums:
    """Sums over tokens of what a layer's units do, in float64."""

    def __init__(self, threshold: float, relative: bool) -> None:
        self.threshold, self.relative = threshold, relative
        self.n_tokens = 0
        self._sums: dict[str, Tensor] = {}
        self._highest: Tensor | None = None

    def add(self, values: Float[Tensor, "token unit"]) -> None:
        """Add the activations of a batch of tokens to the counts."""
        if not len(values):
            return
        self.n_tokens += len(values)
        threshold: Tensor | float = self.threshold
        if self.relative:
            # Of a float64 sum: squares of float32 may overflow.
            threshold = self.threshold * values.double().square().mean(1, keepdim=True).sqrt()
        active = values.abs() > threshold
        at_once, sparse, unequal = active.sum(1).double(), hoyer(values).double(), gini(values).double()
        for name, one in {
            "rate": active.sum(0).double(),
            "mean": values.sum(0, dtype=torch.float64),
            "mean_square": values.double().square().sum(0),
            "l0": at_once.sum(),
            "l0_square": at_once.square().sum(),
            "hoyer": sparse.nansum(),
            "gini": unequal.nansum(),
            # A vector of zeros has neither of the two.
            "with_hoyer": sparse.isfinite().sum().double(),
            "with_gini": unequal.isfinite().sum().double(),
        }.items():
            self._sums[name] = self._sums[name] + one if name in self._sums else one
        highest = values.amax(0)
        self._highest = highest if self._highest is None else torch.maximum(self._highest, highest)

    def means(self) -> dict[str, Tensor]:
        """Return what a `UnitActivity` holds of a layer, on the CPU."""
        assert self._highest is not None
        sums = {name: value.cpu() for name, value in self._sums.items()}
        means = {name: sums[name] / self.n_tokens for name in ("rate", "mean", "mean_square", "l0", "l0_square")}
        spread = (means.pop("l0_square") - means["l0"].square()).clamp(min=0).sqrt()
        sparse = {name: sums[name] / sums[f"with_{name}"] for name in ("hoyer", "gini")}
        return {**means, **sparse, "l0_std": spread, "max": self._highest.double().cpu()}
