"""Hook sites and the clean run, for every engine of this package.

`clean` is the same everywhere: the clean prompts themselves, or a cache of a run on them; as many prompts as corrupted
ones, or one for all of them. A cache of one prompt may lack the batch axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_lm.activation_cache import ActivationCache
from hooked_lm.hooked_model import HookedModel
from hooked_lm.interventions import Intervention, Selection
from hooked_lm.names import POSITION_AXES, UnknownHookError, describe_unknown, grid_axis, selected_axis
from hooked_lm.tokenization import Prompts

__all__ = [
    "Clean",
    "axes_at",
    "axis_index",
    "check_padding",
    "clean_activations",
    "clean_prompts",
    "is_text",
    "read_prompts",
    "replacement",
]

# The clean prompts, or full hook name -> activation, as `run_with_cache` records them.
Clean = Mapping[str, Tensor] | Prompts


# Axes


def axes_at(model: HookedModel, site: str) -> tuple[str, ...]:
    """Return the names of the axes of a site's activations, the batch first.

    Args:
        model: the model.
        site: full hook name.

    Raises:
        UnknownHookError: the model has no such site.
    """
    if site not in model.hook_dict:
        raise UnknownHookError(describe_unknown(site, list(model.hook_dict)))
    return model.hook_dict[site].axes


def axis_index(site: str, axes: Sequence[str], name: str) -> int:
    """Return the index of the activation's axis that an axis of a grid goes along.

    Args:
        site: full hook name, for the message.
        axes: the axes of its activations.
        name: of the grid's axis.

    Raises:
        ValueError: the activations have no such axis.
    """
    wanted = grid_axis(name)
    found = [index for index, axis in enumerate(axes) if axis in wanted.along]
    if not found or (wanted.field == "feature" and found[-1] != len(axes) - 1):
        last = "the last " if wanted.field == "feature" else ""
        raise ValueError(
            f"the activations at {site!r} are [{' '.join(axes)}]: a grid along {name!r} needs {last}axis "
            f"{' or '.join(map(repr, wanted.along))}"
        )
    return found[-1]


def replacement(
    model: HookedModel,
    site: str,
    value: Tensor,
    pos: Selection = None,
    head: Selection = None,
    feature: Selection = None,
) -> Intervention:
    """Return the intervention that puts part of an activation in place of the run's own.

    Args:
        model: the model, whose hook points name the axes.
        site: full hook name.
        value: a whole activation at that site.
        pos, head, feature: the part; None for all.
    """
    axes = axes_at(model, site)
    kept = list(axes)
    for field, selection in (("pos", pos), ("head", head), ("feature", feature)):
        index = None if selection is None else selected_axis(axes, field)
        if selection is None or index is None:
            continue  # a field without an axis is refused once the intervention is checked
        where = kept.index(axes[index])
        if isinstance(selection, tuple):
            value = value.index_select(where, torch.tensor(selection, device=value.device) % value.shape[where])
        else:
            value = value.select(where, selection)
            kept.remove(axes[index])
    if (pos, head, feature) != (None, None, None):
        value = value.clone()  # so that the part does not keep the whole activation alive
    return Intervention(site, "replace", value, pos=pos, head=head, feature=feature)


# Prompts and activations


def read_prompts(
    model: HookedModel, prompts: Prompts, attention_mask: Tensor | None = None
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Return tokens and their mask, all ones if nothing is padded.

    The mask is explicit so that no later run takes tokens that look like padding for padding.

    Args:
        model: the model.
        prompts, attention_mask: as for a call of the model.
    """
    tokens, mask = model.tokens_and_mask(prompts, attention_mask)
    return tokens, torch.ones_like(tokens) if mask is None else mask.to(tokens)


@torch.no_grad()
def clean_activations(
    model: HookedModel,
    clean: Clean,
    sites: Iterable[str],
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"] | None = None,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    run: Literal["clean", "corrupted"] = "clean",
) -> dict[str, Tensor]:
    """Return the clean run's activations by full hook name, [batch ...] with as many prompts as are patched.

    Args:
        model: the model.
        clean: a cache of the clean run, or the clean prompts, which are then run; as many as `tokens` has, or one for
            all of them. A cache of one prompt may lack the batch axis.
        sites: full hook names.
        tokens: the prompts that are patched.
        mask: their padding, as `read_prompts` returns it; None if nothing is padded.
        attention_mask: the mask given by the user for prompts in tokens; clean prompts in tokens have it too.
        run: the name of the run in errors; a corrupted one has as many prompts as `tokens`.

    Raises:
        UnknownHookError: the model has no such site, or the cache lacks it.
        ValueError: another number of prompts, of positions or of axes, or other padding.
        TypeError: `clean` is neither a cache nor prompts.
    """
    sites = list(dict.fromkeys(sites))
    for site in sites:
        axes_at(model, site)
    if isinstance(clean, Mapping):
        found = {site: _cached(model, clean, site, tokens, run) for site in sites}
        if sites and isinstance(clean, ActivationCache):
            _check_cached_padding(clean, tokens, mask, run)
    else:
        found = _recorded(model, clean, sites, tokens, mask, attention_mask, run)
    return {site: value.expand(tokens.shape[0], *value.shape[1:]) for site, value in found.items()}


def _cached(model: HookedModel, cache: Mapping[str, Tensor], site: str, tokens: Tensor, run: str) -> Tensor:
    if site not in cache:
        raise UnknownHookError(
            f"the {run} cache has no {site!r}: record it, by name if it is one of those computed on demand"
        )
    axes, value = axes_at(model, site), cache[site].detach()
    if value.ndim == len(axes) - 1:
        value = value[None]
    if value.ndim != len(axes):
        raise ValueError(f"the {run} cache's {site!r} has shape {tuple(value.shape)}; it should be [{' '.join(axes)}]")
    for axis, size in zip(axes, value.shape, strict=True):
        if axis in POSITION_AXES:
            _check_positions(size, tokens, run, f" ({site!r} in the {run} cache)")
        elif axis == "batch":
            _check_prompts(size, tokens, run, f" ({site!r} in the {run} cache)")
    return value


def _check_cached_padding(cache: ActivationCache, tokens: Tensor, mask: Tensor | None, run: str) -> None:
    """Refuse a cache whose run was padded elsewhere than the prompts that are patched."""
    own, mask = cache.attention_mask, torch.ones_like(tokens) if mask is None else mask
    check_padding(torch.ones_like(mask[:1]) if own is None else own.to(mask), mask, run)


def _recorded(
    model: HookedModel,
    prompts: Prompts,
    sites: Sequence[str],
    tokens: Tensor,
    mask: Tensor | None,
    attention_mask: Tensor | None,
    run: str,
) -> dict[str, Tensor]:
    mask = torch.ones_like(tokens) if mask is None else mask
    own = clean_prompts(model, prompts, tokens, mask, attention_mask, run)
    if not sites:
        return {}
    if own.shape[0] == 1 and bool((mask == mask[:1]).all()):
        mask = mask[:1]
    _, cache = model.run_with_cache(
        own.expand(mask.shape[0], -1),
        names_filter=list(sites),
        attention_mask=mask,
        return_type=None,
        return_cache_object=False,
    )
    return dict(cache)


def clean_prompts(
    model: HookedModel,
    prompts: Prompts,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    run: str = "clean",
) -> Int[Tensor, "batch_or_1 pos"]:
    """Return the tokens of the clean prompts, checked to match the corrupted ones; their mask is `mask` too.

    Args:
        model: the model.
        prompts: as many as `tokens` has, or one for all of them.
        tokens, mask, attention_mask, run: as for `clean_activations`.

    Raises:
        ValueError: another number of prompts or of positions, or other padding.
        TypeError: they are no prompts.
    """
    try:
        own, own_mask = read_prompts(model, prompts)
    except TypeError as error:
        raise TypeError(f"{run}: give the {run} prompts, or a cache of a run on them; {error}") from error
    _check_positions(own.shape[1], tokens, run)
    _check_prompts(own.shape[0], tokens, run)
    if attention_mask is None or is_text(prompts):
        check_padding(own_mask, mask, run)
    return own


def is_text(prompts: object) -> bool:
    """Return whether prompts are given as strings, which have their own padding.

    Args:
        prompts: as a model takes them.
    """
    several = isinstance(prompts, (list, tuple)) and any(isinstance(one, str) for one in prompts)
    return isinstance(prompts, str) or several


def _check_positions(n_positions: int, tokens: Tensor, run: str, where: str = "") -> None:
    if n_positions != tokens.shape[1]:
        others = "corrupted ones" if run == "clean" else "the prompts"
        raise ValueError(
            f"{run} prompts have {n_positions} positions and {others} {tokens.shape[1]}{where}: "
            "patching goes position by position, so make them equally long"
        )


def _check_prompts(n_prompts: int, tokens: Tensor, run: str, where: str = "") -> None:
    batch = tokens.shape[0]
    if run == "clean" and n_prompts not in (1, batch):
        raise ValueError(
            f"there are {n_prompts} clean prompts and {batch} corrupted ones{where}: give as many, or one for all"
        )
    if run != "clean" and n_prompts != batch:
        raise ValueError(f"there are {n_prompts} {run} prompts and {batch} that are patched{where}: give as many")


def check_padding(clean_mask: Tensor, mask: Tensor, run: str = "clean") -> None:
    """Check that clean prompts are padded where those are that they are patched into.

    Args:
        clean_mask: [batch pos] or [1 pos], 0 at padding.
        mask: [batch pos].
        run: the name of the clean run in errors.

    Raises:
        ValueError: some are not.
    """
    differing = torch.where((clean_mask.to(mask) != mask).any(-1))[0].tolist()
    if differing:
        raise ValueError(
            f"the {run} prompt {differing[0]} is padded differently from the corrupted one: patching goes position by "
            "position, so make them equally long, and give tokens that are padded their attention_mask in every run"
        )
