"""Next-token loss and accuracy."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["lm_accuracy", "lm_cross_entropy_loss"]


def lm_cross_entropy_loss(
    logits: Float[Tensor, "batch pos vocab"],
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    per_token: bool = False,
) -> Float[Tensor, ""] | Float[Tensor, "batch pos_minus_one"]:
    """Return minus the log-probability of each next token, in nats.

    Args:
        logits, tokens: the last position's logits predict nothing here and are not used.
        attention_mask: 0 at padding; a prediction counts where both it and its next token are real.
        per_token: return [batch pos-1], zero where a prediction does not count, rather than the mean.
    """
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    loss = loss.reshape(tokens.shape[0], tokens.shape[1] - 1)
    if attention_mask is None:
        return loss if per_token else loss.mean()
    counts = (attention_mask[:, :-1] * attention_mask[:, 1:]).bool()
    # `where`, not a product with the mask: 0 * inf is nan.
    loss = loss.where(counts, 0.0)
    return loss if per_token else loss.sum() / counts.sum()


def lm_accuracy(
    logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"], per_token: bool = False
) -> Float[Tensor, ""] | Tensor:
    """Return the share of next tokens whose logit is the largest, or [batch pos-1] of True where it is.

    Args:
        logits, tokens: the last position's logits predict nothing here and are not used.
        per_token: return [batch pos-1], True where the prediction is right, rather than the share.
    """
    correct = logits[:, :-1].argmax(-1) == tokens[:, 1:]
    return correct if per_token else correct.float().mean()
