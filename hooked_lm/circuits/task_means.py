"""Means over the prompts of a task: the output of each head, and the residual stream, at the last token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm._support.precision import at_least_single
from hooked_lm.circuits.last_token import LastTokenPrompts, chosen_layers
from hooked_lm.hooked_model import HookedModel
from hooked_lm.names import get_act_name
from hooked_lm.tokenization import Prompts

__all__ = ["mean_head_outputs", "mean_state"]


@torch.no_grad()
def mean_head_outputs(
    model: HookedModel,
    prompts: Prompts,
    pos: int = -1,
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
    verbose: bool = True,
) -> Float[Tensor, "layer head d_head"]:
    """Return `hook_z` of every head at the last token, averaged over prompts: [layer head d_head].

    Args:
        model: a `HookedTransformer`.
        prompts: in-context prompts of one task: strings of any lengths, or tokens [batch pos].
        pos: which token, counted from the end of each prompt: -1 is the last.
        attention_mask: [batch pos], 0 at padding, for tokens.
        batch_size: prompts that are run at a time.
        verbose: show a progress bar.

    Raises:
        ValueError: no prompts, a position that some prompt lacks, or tokens whose padding is not marked.
    """
    layers = chosen_layers(model, None)
    sites = [get_act_name("z", layer) for layer in layers]
    return _mean_activations(
        model, sites, layers[-1], LastTokenPrompts.of(model, prompts, attention_mask), pos, batch_size, verbose
    )


@torch.no_grad()
def mean_state(
    model: HookedModel,
    prompts: Prompts,
    layer: int | None = None,
    pos: int = -1,
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
    verbose: bool = True,
) -> Float[Tensor, "*layer d_model"]:
    """Return the residual stream at the end of a layer, at the last token, averaged over prompts: [d_model].

    Hendel et al. 2023 replace the stream of another prompt at the same layer by this mean:
    `steering_effect(..., operation="replace")`.

    Args:
        model, prompts: as for `mean_head_outputs`.
        layer: which layer, negative from the end; by default all layers, [layer d_model]. No later layer is run.
        pos, attention_mask, batch_size, verbose: as for `mean_head_outputs`.

    Raises:
        ValueError: a layer out of range, and as for `mean_head_outputs`.
    """
    layers = chosen_layers(model, None if layer is None else [layer])
    sites = [get_act_name("resid_post", one) for one in layers]
    read = LastTokenPrompts.of(model, prompts, attention_mask)
    states = _mean_activations(model, sites, layers[-1], read, pos, batch_size, verbose)
    return states if layer is None else states[0]


def _mean_activations(
    model: HookedModel,
    sites: Sequence[str],
    last_layer: int,
    prompts: LastTokenPrompts,
    pos: int,
    batch_size: int,
    verbose: bool,
) -> Float[Tensor, "site *head width"]:
    """The mean of each site's activation at a position, over prompts."""
    prompts.check_position(pos)
    batches = list(prompts.batches(batch_size))
    sums = []
    for rows in tqdm(batches, disable=not verbose, desc="means", leave=False):
        # Stopping after the last layer that is read also spares the unembedding of every position.
        _, cache = model.run_with_cache(
            prompts.tokens[rows],
            attention_mask=prompts.mask[rows],
            names_filter=list(sites),
            pos_slice=pos,
            stop_at_layer=model.cfg.stop_after(last_layer),
            return_cache_object=False,
        )
        sums.append(torch.stack([at_least_single(cache[site][:, 0]).sum(0) for site in sites]))
    return torch.stack(sums).sum(0) / len(prompts)
