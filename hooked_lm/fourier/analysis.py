"""How a model does modular arithmetic: which frequencies its embedding, neurons and logits use.

A one-layer transformer that has learned (a + b) mod p embeds numbers as cosines and sines of a few frequencies, and its
logits are sums of cos(2 pi k (a + b - c) / p) (Nanda et al. 2023, "Progress measures for grokking via mechanistic
interpretability"). These functions measure how far that is so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_lm._support.integers import integer
from hooked_lm.fourier.basis import fourier_basis, to_fourier
from hooked_lm.fourier.result import ModularAnalysis
from hooked_lm.hooked_model import HookedModel

__all__ = [
    "all_pairs",
    "analyse_modular",
    "frequency_shares",
    "key_frequencies",
    "neuron_frequencies",
    "only_frequencies",
    "trig_shares",
    "without_frequencies",
]


def frequency_shares(weights: Float[Tensor, "p ..."]) -> Float[Tensor, " frequency"]:
    """Return the share of a matrix's variance along its rows that each frequency has, [frequency], 1 ... p//2.

    The mean over rows, frequency 0, is left out. Entry k-1 is frequency k.

    Args:
        weights: a row for each number, such as an embedding `W_E[:p]`.

    Raises:
        ValueError: fewer than three numbers, or all rows are the same.
    """
    p = weights.shape[0]
    if p < 3:
        raise ValueError(f"frequencies are those of three numbers or more, got {p}")
    power = (to_fourier(weights.double().reshape(p, -1)) ** 2).sum(-1)[1:]
    by_frequency = _by_frequency(power, p)
    total = by_frequency.sum()
    if float(total) <= 1e-24 * float((weights.double() ** 2).sum()):
        raise ValueError("all numbers have the same row: there is nothing to analyse")
    return by_frequency / total


def _by_frequency(power: Float[Tensor, "row ..."], p: int) -> Float[Tensor, "frequency ..."]:
    """The sum of cosine's and sine's power, of rows without the constant one."""
    n = p // 2
    found = power.new_zeros((n, *power.shape[1:]))
    index = torch.tensor([row // 2 for row in range(p - 1)], device=power.device)
    return found.index_add_(0, index, power)


def key_frequencies(
    weights: Float[Tensor, "p ..."], chance: float = 0.001, n_draws: int = 2000, seed: int = 0
) -> list[int]:
    """Return the frequencies whose share of the variance is above chance, the largest share first.

    Chance is the distribution of the largest share in matrices of the same shape with normal entries, which have no
    preferred frequency.

    Args:
        weights: a row for each number.
        chance: the probability that a random matrix has any such frequency.
        n_draws: random matrices.
        seed: of the draws.

    Raises:
        ValueError: a setting out of range, or as `frequency_shares`.
    """
    if not 0 < chance < 1 or integer(n_draws, "n_draws") < 1 / chance:
        raise ValueError(f"chance is between 0 and 1, with 1 / chance draws or more; got {chance} and {n_draws}")
    shares, p = frequency_shares(weights), weights.shape[0]
    width = max(1, weights[0].numel())
    # The power of a frequency in a normal matrix is chi-squared: two rows of the basis times the width.
    generator = torch.Generator().manual_seed(seed)
    degrees = torch.tensor([width * (1 if p % 2 == 0 and k == p // 2 else 2) for k in range(1, p // 2 + 1)])
    drawn = torch._standard_gamma((degrees / 2).double().expand(n_draws, -1).contiguous(), generator=generator)
    largest = (drawn / drawn.sum(-1, keepdim=True) / degrees * degrees.double().mean()).amax(-1)
    # A frequency of one row alone has half the power: compare each by its own size.
    sized = shares.cpu() / degrees * degrees.double().mean()
    above = (sized > torch.quantile(largest, 1 - chance)).nonzero()[:, 0]
    ordered = above[shares.cpu()[above].argsort(descending=True, stable=True)]
    return [int(one) + 1 for one in ordered]


def neuron_frequencies(
    activations: Float[Tensor, "p p neuron"],
) -> tuple[Float[Tensor, " neuron"], Float[Tensor, " neuron"]]:
    """Return each neuron's frequency, and the share of its variance over pairs that this frequency explains.

    The terms of frequency k are the constant, cosines and sines of k in a, in b, and their products.

    Args:
        activations: of neurons, for all pairs (a, b).

    Returns:
        The frequencies, 0 for a neuron that never changes, and the shares.

    Raises:
        ValueError: the activations are not [p p neuron].
    """
    if activations.ndim != 3 or activations.shape[0] != activations.shape[1] or activations.shape[0] < 3:
        raise ValueError(f"activations of all pairs are [p p neuron], got {tuple(activations.shape)}")
    p = activations.shape[0]
    power = to_fourier(activations.double(), (0, 1)) ** 2
    total = power.sum((0, 1)) - power[0, 0]
    shares = []
    for k in range(1, p // 2 + 1):
        rows = [0, *([2 * k - 1, 2 * k] if 2 * k < p else [2 * k - 1])]
        block = power[rows][:, rows]
        shares.append(block.sum((0, 1)) - block[0, 0])
    stacked = torch.stack(shares) / total.clamp(min=torch.finfo(torch.float64).tiny)
    best, which = stacked.max(0)
    constant = total <= 1e-20 * power.sum((0, 1)).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(constant, 0.0, which + 1.0), torch.where(constant, 0.0, best)


def _centred(logits: Float[Tensor, "p p p"]) -> Float[Tensor, "p p p"]:
    """Logits in float64, less their mean over answers, which softmax does not see."""
    if logits.ndim != 3 or len(set(logits.shape)) != 1 or logits.shape[0] < 3:
        raise ValueError(f"logits of all pairs and answers are [p p p], got {tuple(logits.shape)}")
    found = logits.double()
    return found - found.mean(-1, keepdim=True)


def _directions(p: int, frequencies: Sequence[int], device: torch.device) -> Float[Tensor, "term p p p"]:
    """cos(k (a + b - c)) and, for k below p / 2, sin(k (a + b - c)), each with norm 1."""
    a, b, c = torch.meshgrid(*[torch.arange(p, device=device)] * 3, indexing="ij")
    places = (a + b - c) % p
    rows = fourier_basis(p).to(device)
    terms = []
    for k in frequencies:
        for row in (2 * k - 1, 2 * k):
            if row < p:
                terms.append(rows[row][places])
    stacked = torch.stack(terms)
    sizes: Tensor = stacked.flatten(1).norm(dim=1)
    return stacked / sizes[:, None, None, None]


def _checked_frequencies(p: int, frequencies: Sequence[int]) -> list[int]:
    found = [integer(k, "frequency") for k in frequencies]
    if not found or len(set(found)) < len(found) or not all(1 <= k <= p // 2 for k in found):
        raise ValueError(f"frequencies are different whole numbers from 1 to {p // 2}, got {list(frequencies)}")
    return found


def trig_shares(logits: Float[Tensor, "p p p"], operation: str = "add") -> Float[Tensor, " frequency"]:
    """Return the share of the logits' variance that cos(k (a + b - c)) explains, for each frequency k, [frequency].

    Logits are taken less their mean over answers. Entry k-1 is frequency k.

    Args:
        logits: of all pairs (a, b) and answers c, [a b c].
        operation: `"add"`, or `"subtract"` for cos(k (a - b - c)).

    Raises:
        ValueError: the logits are not [p p p], all the same, or there is no such operation.
    """
    centred = _centred(_in_terms_of_sums(logits, operation))
    total = (centred**2).sum()
    if float(total) == 0:
        raise ValueError("all answers have the same logit: there is nothing to analyse")
    # Sum over everything that has one a + b - c, then over that.
    p = centred.shape[0]
    along = _mean_by_place(centred)
    # Of the basis's rows after the constant one, every second is a cosine, one for each frequency.
    cosines = to_fourier(along)[1::2] ** 2 * p**2
    return cosines / total


def _mean_by_place(centred: Float[Tensor, "p p p"]) -> Float[Tensor, " p"]:
    """The mean of the logits over all (a, b, c) with the same a + b - c."""
    p = centred.shape[0]
    a, b, c = torch.meshgrid(*[torch.arange(p, device=centred.device)] * 3, indexing="ij")
    places = ((a + b - c) % p).flatten()
    return centred.new_zeros(p).index_add_(0, places, centred.flatten()) / p**2


def _in_terms_of_sums(logits: Tensor, operation: str) -> Tensor:
    """Logits of a - b as those of a + b, by turning b around."""
    if operation not in ("add", "subtract"):
        raise ValueError(f"operation is 'add' or 'subtract', got {operation!r}")
    if operation == "add" or logits.ndim != 3:
        return logits
    index = (-torch.arange(logits.shape[1], device=logits.device)) % logits.shape[1]
    return logits[:, index]


def only_frequencies(logits: Float[Tensor, "p p p"], frequencies: Sequence[int]) -> Float[Tensor, "p p p"]:
    """Return the part of the logits along cosines and sines of k (a + b - c), for some frequencies.

    The loss of these logits is the restricted loss of Nanda et al. 2023.

    Args:
        logits: of all pairs (a, b) and answers c, [a b c].
        frequencies: 1 to p // 2.

    Raises:
        ValueError: logits that are not [p p p], or no such frequencies.
    """
    centred = _centred(logits)
    terms = _directions(centred.shape[0], _checked_frequencies(centred.shape[0], frequencies), centred.device)
    weights = torch.einsum("tabc,abc->t", terms, centred)
    found: Tensor = torch.einsum("t,tabc->abc", weights, terms)
    return found


def without_frequencies(logits: Float[Tensor, "p p p"], frequencies: Sequence[int]) -> Float[Tensor, "p p p"]:
    """Return the logits less their part along cosines and sines of k (a + b - c), for some frequencies.

    The loss of these logits is the excluded loss of Nanda et al. 2023.

    Args:
        logits, frequencies: as for `only_frequencies`.

    Raises:
        ValueError: as `only_frequencies`.
    """
    return _centred(logits) - only_frequencies(logits, frequencies)


def all_pairs(p: int, between: Sequence[int] = (), after: Sequence[int] = ()) -> Tensor:
    """Return the tokens of all pairs, [p * p pos]: a, `between`, b, `after`.

    Args:
        p: the numbers are tokens 0 ... p-1.
        between, after: tokens such as `+` and `=`.
    """
    a, b = (one.flatten() for one in torch.meshgrid(torch.arange(p), torch.arange(p), indexing="ij"))
    middle, end = (torch.tensor(list(tokens), dtype=torch.int64).expand(p * p, -1) for tokens in (between, after))
    return torch.cat([a[:, None], middle, b[:, None], end], 1)


@torch.no_grad()
def analyse_modular(
    model: HookedModel,
    p: int,
    *,
    between: Sequence[int] = (),
    after: Sequence[int] = (),
    layer: int = 0,
    train: Bool[Tensor, "p p"] | None = None,
    frequencies: Sequence[int] | None = None,
    batch_size: int = 4096,
) -> ModularAnalysis:
    """Return the frequencies with which a model does (a + b) mod p, and what it can do with those alone and without.

    Args:
        model: a `HookedTransformer` that reads a, `between`, b, `after` and gives the answer's logit at the last
            position; the numbers are tokens 0 ... p-1.
        p: the modulus.
        between, after: tokens such as `+` and `=`.
        layer: of the neurons.
        train: the pairs that it was trained on; for the losses. By default all.
        frequencies: the key frequencies; by default those of the embedding above chance.
        batch_size: pairs that are run at a time.

    Raises:
        ValueError: numbers or tokens that the model lacks, or no frequency is above chance and none is given.
    """
    if not 3 <= integer(p, "p") <= min(model.cfg.d_vocab, model.cfg.d_vocab_out):
        raise ValueError(f"p is 3 to {min(model.cfg.d_vocab, model.cfg.d_vocab_out)}, got {p}")
    embedding = frequency_shares(model.W_E[:p])
    keys = key_frequencies(model.W_E[:p]) if frequencies is None else _checked_frequencies(p, frequencies)
    if not keys:
        raise ValueError("no frequency of the embedding is above chance: give the frequencies to look at")
    site = f"blocks.{layer}.mlp.hook_post"
    logits, neurons = [], []
    for pairs_of_batch in all_pairs(p, between, after).split(batch_size):
        tokens = pairs_of_batch.to(model.W_E.device)
        if model.cfg.attn_only:
            logits.append(model(tokens, return_type="logits")[:, -1, :p].double().cpu())
            continue
        found, cache = model.run_with_cache(tokens, names_filter=site, return_cache_object=False)
        logits.append(found[:, -1, :p].double().cpu())
        neurons.append(cache[site][:, -1].double().cpu())
    table = torch.cat(logits).view(p, p, p)
    which, explained = (
        neuron_frequencies(torch.cat(neurons).view(p, p, -1)) if neurons else (torch.empty(0), torch.empty(0))
    )
    pairs = torch.ones(p, p, dtype=torch.bool) if train is None else train.cpu().bool()
    kept = {"all": table, "only": only_frequencies(table, keys), "without": without_frequencies(table, keys)}
    losses = {
        name: {half: _loss(one, mask) for half, mask in (("train", pairs), ("held out", ~pairs))}
        for name, one in kept.items()
    }
    answers = _answers(p)
    accuracy = {
        half: _share(table.argmax(-1) == answers, mask) for half, mask in (("train", pairs), ("held out", ~pairs))
    }
    return ModularAnalysis(
        p=p,
        keys=tuple(keys),
        embedding=embedding.cpu(),
        logits=trig_shares(table),
        neuron_frequency=which,
        neuron_share=explained,
        losses=losses,
        accuracy=accuracy,
    )


def _answers(p: int) -> Tensor:
    return (torch.arange(p)[:, None] + torch.arange(p)) % p


def _loss(logits: Tensor, pairs: Tensor) -> float:
    """The mean loss of the answers, in nats; NaN for no pairs."""
    p = logits.shape[0]
    losses = F.cross_entropy(logits.reshape(-1, p), _answers(p).flatten(), reduction="none").view(p, p)
    return float(losses[pairs].mean()) if bool(pairs.any()) else math.nan


def _share(right: Tensor, pairs: Tensor) -> float:
    return float(right[pairs].double().mean()) if bool(pairs.any()) else math.nan
