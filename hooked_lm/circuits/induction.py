"""Induction, end to end: the tokens that call for it, the heads that do it, and the circuit that links them.

An induction head continues a repeat: at a token seen before, it attends to the token that came after it then, and
predicts that token. It needs an earlier head that writes, at each position, which token came before (Elhage et al.
2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al. 2022, "In-context Learning and Induction
Heads").

The tokens are a start token, then `length` random ones, then the same again:

    position   0      1 ... length      length+1 ... 2*length
    token      start  t_1 ... t_length  t_1 ...      t_length
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_lm._support.precision import at_least_single
from hooked_lm.activation_cache import ActivationCache
from hooked_lm.circuits.folded import folded_ov, folded_qk
from hooked_lm.circuits.full_circuits import token_embeddings
from hooked_lm.factored_matrix import FactoredMatrix
from hooked_lm.hooked_model import HookedModel
from hooked_lm.losses import predictions_that_count

__all__ = [
    "Head",
    "NextTokenScores",
    "induction_scores",
    "k_composition_qk_circuit",
    "next_token_scores",
    "previous_token_scores",
    "repeated_random_tokens",
    "strongest_head",
]

Head = tuple[int, int]


def repeated_random_tokens(
    batch: int, length: int, d_vocab: int, generator: torch.Generator, start_token: int = 0
) -> Int[Tensor, "batch pos"]:
    """Return `start_token`, then `length` random tokens, then the same again: [batch 2*length+1].

    The tokens of a block differ from one another and from `start_token`, so the repeat determines each next token.

    Args:
        batch: rows, drawn independently.
        length: tokens in the block that is repeated.
        d_vocab: tokens are drawn from `0` to `d_vocab - 1`.
        generator: the source of randomness. The result is on its device.
        start_token: the first token; a BOS token where the model has one.

    Raises:
        ValueError: no rows, an empty block, or more tokens than the vocabulary holds.
    """
    if batch < 1 or not 1 <= length < d_vocab or not 0 <= start_token < d_vocab:
        raise ValueError(
            f"repeated_random_tokens draws a block of 1-{d_vocab - 1} different tokens, besides a start token in "
            f"0-{d_vocab - 1}, for at least one row; got batch={batch}, length={length}, start_token={start_token}"
        )
    order = torch.rand(batch, d_vocab - 1, generator=generator, device=generator.device).argsort(-1)[:, :length]
    block = order + (order >= start_token)  # leaves out the start token
    start = torch.full((batch, 1), start_token, device=generator.device)
    return torch.cat((start, block, block), dim=1)


# How well the tokens are predicted


@dataclass(frozen=True)
class NextTokenScores:
    """How well each next token is predicted. Column `i` is about the token at position `i + 1`.

    Attributes:
        log_prob: the token's log-probability in nats, [batch pos-1].
        correct: whether the token was the likeliest, [batch pos-1].
        counts: whether a prediction is one of a real token from a real one, [batch pos-1]; None if all are. The others
            have log-probability 0 and are not correct, and the means leave them out.
    """

    log_prob: Float[Tensor, "batch pos_minus_one"]
    correct: Bool[Tensor, "batch pos_minus_one"]
    counts: Bool[Tensor, "batch pos_minus_one"] | None = None

    def first_half(self) -> NextTokenScores:
        """Return the scores of the block where it comes first, [batch length]: its tokens are random.

        Raises:
            ValueError: something is padded, so that the halves are not at the same positions in every prompt.
        """
        return self._columns(slice(None, self._length()))

    def second_half(self) -> NextTokenScores:
        """Return the scores of the repeat but for its first token, which cannot be known, [batch length-1].

        Raises:
            ValueError: as for `first_half`.
        """
        return self._columns(slice(self._length() + 1, None))

    def mean_log_prob(self) -> float:
        """Return the mean log-probability, in nats."""
        total = self.log_prob.detach().sum()
        return float(total / (self.log_prob.numel() if self.counts is None else self.counts.sum()))

    def accuracy(self) -> float:
        """Return the share of tokens that were the likeliest."""
        return float(self.correct.sum() / (self.correct.numel() if self.counts is None else self.counts.sum()))

    def _columns(self, columns: slice) -> NextTokenScores:
        return NextTokenScores(self.log_prob[:, columns], self.correct[:, columns])

    def _length(self) -> int:
        if self.counts is not None:
            raise ValueError("padded prompts have no common halves: score tokens of repeated_random_tokens")
        return self.log_prob.shape[1] // 2


def next_token_scores(
    logits: Float[Tensor, "batch pos vocab"],
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> NextTokenScores:
    """Return how well each token is predicted from those before it.

    Args:
        logits: the model's, for `tokens`. Those of the last position are not used.
        tokens: from `repeated_random_tokens`, if halves are to be taken.
        attention_mask: [batch pos], 0 at padding.

    Raises:
        ValueError: logits, tokens and mask do not fit each other, or the mask leaves nothing to predict.
    """
    counts = predictions_that_count(logits, tokens, attention_mask)
    target = tokens[:, 1:]
    log_prob = at_least_single(logits[:, :-1]).log_softmax(-1).gather(-1, target[..., None])[..., 0]
    correct = logits[:, :-1].argmax(-1) == target
    if counts is None:
        return NextTokenScores(log_prob, correct)
    return NextTokenScores(log_prob.where(counts, 0.0), correct & counts, counts)


# Which heads do it


def previous_token_scores(cache: ActivationCache) -> Float[Tensor, "layer head"]:
    """Return each head's mean attention from a position to the one before it, over positions 1 and up of each prompt.

    Padding of the run is left out.

    Args:
        cache: holds `blocks.*.attn.hook_pattern`, [batch head query key] each.

    Raises:
        ValueError: the patterns are cut to some positions, or no prompt has a second one.
    """
    return _mean_attention(cache, first_query=1, back=1)


def induction_scores(cache: ActivationCache, length: int) -> Float[Tensor, "layer head"]:
    """Return each head's mean attention from a token of the repeat to the token *after* its earlier occurrence.

    From position `q` that is `q - length + 1`, for every `q` from `length + 1` on.

    Args:
        cache: holds `blocks.*.attn.hook_pattern` of a run on `repeated_random_tokens(..., length, ...)`.
        length: of the block.

    Raises:
        ValueError: the patterns are not those of a block of this length, or something is padded.
    """
    if cache.attention_mask is not None:
        raise ValueError(
            "this run has padding, and repeated_random_tokens makes none: where a padding token is one of the tokens "
            "that are drawn, run them with attention_mask=torch.ones_like(tokens); for prompts of different lengths "
            "there is circuits.heads.attention_scores(model, prompts, 'induction')"
        )
    n_pos = cache["pattern", 0].shape[-1]
    if n_pos != 2 * length + 1:
        raise ValueError(
            f"a repeated block of {length} makes {2 * length + 1} positions, but the patterns have {n_pos}"
        )
    return _mean_attention(cache, first_query=length + 1, back=length - 1)


def _mean_attention(cache: ActivationCache, first_query: int, back: int) -> Float[Tensor, "layer head"]:
    """Mean attention from each query to the key `back` places before it, from `first_query` on."""
    scores = []
    for layer in range(cache.model.cfg.n_layers):
        pattern = cache["pattern", layer]
        pattern = pattern if cache.has_batch_dim else pattern[None]  # [batch head query key]
        n_queries, n_keys = pattern.shape[-2:]
        if n_queries != n_keys or n_keys <= first_query:
            raise ValueError(
                f"the patterns have {n_queries} queries and {n_keys} keys: these scores need every position of a run "
                f"(without pos_slice and key-value cache), more than {first_query} of them"
            )
        queries = torch.arange(first_query, n_keys, device=pattern.device)
        attention = pattern[:, :, queries, queries - back]
        scores.append(attention.mean((0, 2)) if cache.attention_mask is None else _mean_of_real(attention, cache, back))
    return torch.stack(scores)


def _mean_of_real(
    attention: Float[Tensor, "batch head query"], cache: ActivationCache, back: int
) -> Float[Tensor, " head"]:
    """Return the mean over queries that are real, and whose key `back` places before is real too."""
    assert cache.attention_mask is not None
    real = cache.attention_mask.to(attention.device).bool()
    n_queries = attention.shape[-1]
    counts = real[:, -n_queries:] & real[:, -n_queries - back : real.shape[1] - back]
    if not bool(counts.any()):
        raise ValueError(f"no prompt of this run has a token {back} places after another: there is nothing to score")
    return attention.where(counts[:, None], 0.0).sum((0, 2)) / counts.sum()


def strongest_head(scores: Float[Tensor, "layer head"], layer: int) -> Head:
    """Return the (layer, head) with the highest score in a layer.

    Args:
        scores: [layer head].
        layer: which layer.
    """
    return layer, int(scores[layer].argmax())


# The circuit that links them


def k_composition_qk_circuit(
    model: HookedModel, writer: Head, reader: Head, *, effective_embedding: bool = False
) -> FactoredMatrix:
    """Return the full QK circuit of two heads that compose through the keys: a factored matrix [vocab vocab].

    `W_E W_Q (W_E W_OV W_K)^T`, with the reader's `W_Q`, `W_K` and the writer's `W_OV = W_V W_O`. Row: the token at the
    reader's destination. Column: the token that the writer copied *into* the reader's source. Where a previous-token
    head writes and an induction head reads, each row is largest on the diagonal: the reader attends to the position
    whose previous token is the one at the destination. The linear part of the norms on the way is folded in; their
    scales, positions and biases are left out.

    Args:
        model: a `HookedTransformer`.
        writer, reader: (layer, head), the writer's in an earlier layer.
        effective_embedding: at the destination take the token as it is after the first MLP, where the heads of models
            with tied embeddings read it; see `token_embeddings`.

    Raises:
        ValueError: no such head, or the writer does not come before the reader; norms stand where the circuit is no
            product of matrices; or attention or norms are overridden.
    """
    for role, (layer, head) in (("writer", writer), ("reader", reader)):
        if not (0 <= layer < model.cfg.n_layers and 0 <= head < model.cfg.n_heads):
            raise ValueError(
                f"no {role} L{layer}H{head}: this model has layers 0-{model.cfg.n_layers - 1} and heads "
                f"0-{model.cfg.n_heads - 1}"
            )
    if writer[0] >= reader[0]:
        raise ValueError(f"the writer is in an earlier layer than the reader; got layers {writer[0]} and {reader[0]}")
    QK, OV = folded_qk(model, reader[0])[reader[1]], folded_ov(model, writer[0])[writer[1]]
    destination = token_embeddings(model, effective=effective_embedding, verbose=False)
    copied = token_embeddings(model, verbose=False)
    circuit: FactoredMatrix = destination @ QK @ OV.T @ copied.T
    return circuit
