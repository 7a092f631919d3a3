"""Next-token loss and accuracy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_lm._support.torch_internals import values_readable

__all__ = ["lm_accuracy", "lm_cross_entropy_loss", "predictions_that_count"]


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

    Raises:
        ValueError: logits, tokens and mask do not fit each other, or there is no prediction to take the mean of.
    """
    counts = predictions_that_count(logits, tokens, attention_mask, may_be_none=per_token)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    loss = loss.reshape(tokens.shape[0], tokens.shape[1] - 1)
    if counts is None:
        return loss if per_token else loss.mean()
    # `where`, not a product with the mask: 0 * inf is nan.
    loss = loss.where(counts, 0.0)
    return loss if per_token else loss.sum() / counts.sum()


def lm_accuracy(
    logits: Float[Tensor, "batch pos vocab"],
    tokens: Int[Tensor, "batch pos"],
    per_token: bool = False,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, ""] | Bool[Tensor, "batch pos_minus_one"]:
    """Return the share of next tokens whose logit is the largest, or [batch pos-1] of True where it is.

    Args:
        logits, tokens: the last position's logits predict nothing here and are not used.
        per_token: return [batch pos-1], True where the prediction is right, rather than the share.
        attention_mask: 0 at padding; a prediction counts where both it and its next token are real. The others are not
            right.

    Raises:
        ValueError: as for `lm_cross_entropy_loss`.
    """
    counts = predictions_that_count(logits, tokens, attention_mask, may_be_none=per_token)
    correct = logits[:, :-1].argmax(-1) == tokens[:, 1:]
    if counts is None:
        return correct if per_token else correct.float().mean()
    correct = correct & counts
    return correct if per_token else correct.sum() / counts.sum()


def predictions_that_count(
    logits: Float[Tensor, "batch pos vocab"],
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    may_be_none: bool = False,
) -> Bool[Tensor, "batch pos_minus_one"] | None:
    """Return where a real token is predicted from a real one, [batch pos-1]; None without a mask, for everywhere.

    Args:
        logits, tokens, attention_mask: checked against each other.
        may_be_none: do not raise where no prediction counts.

    Raises:
        ValueError: they have different prompts or positions, the mask is no mask, a token has no logit, or no
            prediction counts.
    """
    if logits.ndim != 3 or tuple(logits.shape[:2]) != tuple(tokens.shape):
        raise ValueError(
            f"logits are [batch pos vocab] and tokens [batch pos] of the same run; got {tuple(logits.shape)} and "
            f"{tuple(tokens.shape)}: take the logits of every position, and tokens with their batch axis"
        )
    if not may_be_none and tokens[:, 1:].numel() == 0:
        raise ValueError(
            f"tokens of shape {tuple(tokens.shape)} have no next token: a loss needs at least two positions"
        )
    _check_vocabulary(tokens, logits.shape[-1])
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or tuple(attention_mask.shape) != tuple(tokens.shape):
        came = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask is a tensor [batch pos] = {tuple(tokens.shape)} like the tokens, got {came}")
    real = attention_mask.to(logits.device).bool()
    counts = real[:, :-1] & real[:, 1:]
    if not may_be_none and values_readable(counts) and not bool(counts.any()):
        raise ValueError("the mask leaves no real token with a real one after it, so there is no mean loss or accuracy")
    return counts


def _check_vocabulary(tokens: Tensor, d_vocab: int) -> None:
    """Check that there is a logit for every token that is predicted."""
    predicted = tokens[:, 1:]
    # On an accelerator the loss itself fails for such a token, and to read it here is to wait for all work so far.
    if predicted.device.type != "cpu" or not values_readable(predicted) or predicted.numel() == 0:
        return
    least, most = (int(extreme) for extreme in torch.aminmax(predicted))
    if least < 0 or most >= d_vocab:
        raise ValueError(
            f"token {least if least < 0 else most} has no logit: these logits are of tokens 0-{d_vocab - 1}. A model "
            "whose d_vocab_out differs from d_vocab predicts other things than its tokens: compute the loss from its "
            "logits and labels of your own"
        )
