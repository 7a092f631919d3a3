"""What padding means for values that are taken from a cache: left out of means, refused where positions must match."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["check_aligned", "combined_mask", "mask_weights"]


def check_aligned(what: str, mask: Tensor | None) -> None:
    """Check that padding does not shift the positions of some prompts against those of others.

    Args:
        what: goes position by position; for the message.
        mask: of the prompts, [batch pos], 0 at padding; None if nothing is padded.

    Raises:
        ValueError: it does.
    """
    if mask is not None and not bool((mask == mask[:1]).all()):
        raise ValueError(
            f"{what} goes position by position, and the prompts of this cache are padded to {mask.shape[1]} positions "
            f"from {mask.sum(1).tolist()}: take prompts of one length"
        )


def combined_mask(given: Tensor | None, own: Tensor | None) -> Tensor | None:
    """Return a given mask without the padding of the cache's own; None if all positions count.

    Args:
        given: [batch pos]; one of another shape is returned as it is, for `mask_weights` to refuse.
        own: [batch pos].
    """
    if own is None or (given is not None and given.shape != own.shape):
        return given
    return own if given is None else given.to(own) * own


def mask_weights(site: str, value: Tensor, averaged: Sequence[int], mask: Tensor | None) -> Tensor | None:
    """Return 1 for entries in the mean and 0 at padding, shaped like the averaged axes; None without a mask.

    Args:
        site: of the activation, for messages.
        value: the activation.
        averaged: the axes that the mean is over.
        mask: [batch pos].

    Raises:
        ValueError: the mean is per position, the mask does not fit, or it counts nothing.
    """
    if mask is None:
        return None
    wanted = tuple(value.shape[axis] for axis in averaged)
    if len(averaged) < 2:
        raise ValueError("a mean per position has no use for attention_mask: padding shifts positions")
    if tuple(mask.shape) != wanted:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; the cache has {site!r} for {wanted}")
    if not bool(mask.any()):
        raise ValueError("attention_mask is 0 everywhere: there is nothing to take the mean of")
    return mask.to(value).reshape([value.shape[axis] if axis in averaged else 1 for axis in range(value.ndim)])
