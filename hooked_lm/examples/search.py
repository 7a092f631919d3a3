"""max_activating: read a corpus once, and keep the highest activations of each unit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm._support.integers import integer
from hooked_lm.examples.corpus import Corpus, batches, read_batch, scored_tokens
from hooked_lm.examples.highest import Highest
from hooked_lm.examples.result import MaxActivating
from hooked_lm.examples.units import Units
from hooked_lm.hooked_model import HookedModel
from hooked_lm.names import ActivationKey, layer_of

__all__ = ["max_activating"]


@torch.no_grad()
def max_activating(
    model: HookedModel,
    corpus: Corpus,
    site: ActivationKey,
    *,
    features: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    direction: Float[Tensor, "*unit width"] | None = None,
    k: int = 20,
    context: int = 10,
    one_per_text: bool = False,
    max_tokens: int | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
    verbose: bool = True,
) -> MaxActivating:
    """Read a corpus once and return the tokens on which units of a site are most active.

    The units are entries of the site's last axis (neurons), or directions along which it is projected. At a site with
    heads, the same of each head; without `features` and `direction` the activation of a head is the norm of its vector.
    Hooks and interventions that are in place act.

    Args:
        model: a `HookedTransformer`.
        corpus: texts, or for each text its tokens without padding; any iterable, read lazily.
        site: a hook name or a short key, `("post", 3)`, with axes [batch pos width] or [batch pos head width].
        features: entries of the last axis; by default all, at a site without heads.
        heads: which heads, at a site with heads; by default all.
        direction: [width], or several [unit width]; the activation is the product with it, whatever its length.
        k: how many examples of each unit to keep.
        context: tokens to keep on either side of each.
        one_per_text: keep a text's highest activation only, so that no text comes twice.
        max_tokens: read no more of a text than these tokens, BOS included; by default a text that is longer than the
            model's context raises.
        prepend_bos: as for the model; for texts.
        batch_size: texts that are run at a time.
        verbose: show a progress bar.

    Raises:
        UnknownHookError: the model has no such hook.
        ValueError: a site with other axes, a feature or head that it lacks, a direction of another width, features and
            direction together, activations that are NaN or infinite, a text that is too long, tokens that seem padded,
            or a count out of range.
        TypeError: the corpus is one string, or its entries are neither texts nor rows of tokens.
    """
    for name, value, least in (("k", k, 1), ("context", context, 0), ("batch_size", batch_size, 1)):
        if integer(value, name) < least:
            raise ValueError(f"{name} is {least} or more, got {value}")
    if max_tokens is not None and integer(max_tokens, "max_tokens") < 1:
        raise ValueError(f"max_tokens is 1 or more, or None; got {max_tokens}")
    units = Units.at(model, site, features, heads, direction)
    kept, names, n_texts, n_tokens = Highest(k, context, one_per_text), tuple[str, ...](), 0, 0
    with tqdm(disable=not verbose, desc="texts", leave=False) as bar:
        for batch in batches(corpus, batch_size):
            read = read_batch(model, batch, n_texts, prepend_bos, max_tokens)
            n_texts += len(batch)
            bar.update(len(batch))
            if read is None:
                continue
            tokens, mask, texts = read
            activation = _activation(model, tokens, mask, units.site)
            names, scored = names or units.names(activation), scored_tokens(model, tokens, mask)
            n_tokens += int(scored.sum())
            device = activation.device
            kept.add(units.read(activation), tokens.to(device), mask.to(device), scored.to(device), texts)
    if not names:
        raise ValueError(f"the corpus has no tokens: it has {n_texts} texts, all of them empty")
    values, places, positions, context_tokens, context_values = (one.cpu() for one in kept.fields)
    occurring = [token for token in context_tokens.unique().tolist() if token >= 0]
    strings = None if model.tokenizer is None else {one: model.to_single_str_token(one) for one in occurring}
    return MaxActivating(
        site=units.site,
        units=names,
        values=values,
        texts=places,
        positions=positions,
        context_tokens=context_tokens,
        context_values=context_values,
        strings=strings,
        n_texts=n_texts,
        n_tokens=n_tokens,
    )


def _activation(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], site: str
) -> Float[Tensor, "batch pos *head width"]:
    """The activation at a site; no layer after it is run."""
    layer = layer_of(site)
    _, cache = model.run_with_cache(
        tokens,
        attention_mask=mask,
        names_filter=site,
        stop_at_layer=None if layer is None else model.cfg.stop_after(layer),
        return_type=None,
        return_cache_object=False,
    )
    return cache[site]
