"""Which heads do what: scores of every head, from where it attends and from the circuits of its weights.

Attention scores measure how much of a head's attention goes where a pattern points: to the previous token, to earlier
copies of the token, to the tokens after these copies (Elhage et al. 2021, "A Mathematical Framework for Transformer
Circuits"; Olsson et al. 2022, "In-context Learning and Induction Heads"), or wherever a pattern of your own points.
`register_head_pattern` gives such a pattern a name.

Weight scores measure whether a head's circuit maps tokens to themselves. Apart from zeros, a [vocab vocab] circuit has
the eigenvalues of a [d_head d_head] matrix: `A B` and `B A` share them. With the vocabulary summed over once, in
`W_U W_E` or `W_E^T W_E`, each head costs products of the size of its weights.

`plotting.head_scores(found.scores)` draws attention scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm._support.precision import at_least_single
from hooked_lm.circuits.folded import folded_ov, folded_qk, read_through
from hooked_lm.circuits.full_circuits import token_embeddings
from hooked_lm.circuits.induction import repeated_random_tokens
from hooked_lm.circuits.stock_only import require_stock_unembedding
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.factored_matrix import FactoredMatrix
from hooked_lm.hooked_model import HookedModel
from hooked_lm.hooks import HookPoint
from hooked_lm.tokenization import Prompts

__all__ = [
    "DETECTION_PATTERNS",
    "HeadScores",
    "Pattern",
    "ScoredHead",
    "attention_scores",
    "check_attention",
    "check_pattern_entries",
    "copying_scores",
    "duplicate_token_pattern",
    "eigenvalue_score",
    "induction_pattern",
    "matching_scores",
    "previous_token_pattern",
    "read_patterns",
    "register_head_pattern",
    "repeated_token_scores",
]

# A name of `DETECTION_PATTERNS`, a tensor, or a function from tokens [batch pos] to one.
Pattern = str | Tensor | Callable[[Tensor], Tensor]


# Results


class ScoredHead(NamedTuple):
    """A head and its score. `pandas.DataFrame` takes a list of them."""

    layer: int
    head: int
    score: float

    @property
    def label(self) -> str:
        """`"L1H4"`."""
        return f"L{self.layer}H{self.head}"


@dataclass(frozen=True, eq=False)
class HeadScores:
    """A score for every head.

    Attributes:
        kind: what was scored: `"induction"`, `"copying"`, ...
        scores: [layer head].
    """

    kind: str
    scores: Float[Tensor, "layer head"]

    @property
    def labels(self) -> list[str]:
        """`"L0H0"`, `"L0H1"`, ... in the order in which `scores` is flattened."""
        n_layers, n_heads = self.scores.shape
        return [f"L{layer}H{head}" for layer in range(n_layers) for head in range(n_heads)]

    def top(self, k: int = 5) -> list[ScoredHead]:
        """Return the `k` heads that score highest, the highest first.

        Raises:
            ValueError: there are fewer heads.
        """
        if not 1 <= k <= self.scores.numel():
            raise ValueError(f"top({k}): there are {self.scores.numel()} heads, ask for one at least")
        values, places = self.scores.flatten().topk(k)
        n_heads = self.scores.shape[1]
        pairs = zip(places.tolist(), values.tolist(), strict=True)
        return [ScoredHead(place // n_heads, place % n_heads, score) for place, score in pairs]

    def __str__(self) -> str:
        best = self.top(min(5, self.scores.numel()))
        return "\n".join([f"{self.kind}, the highest of {len(self.labels)} heads:"] + [_line(one) for one in best])


def _line(scored: ScoredHead) -> str:
    return f"  {scored.label:<8}{scored.score:6.3f}"


# Patterns of attention


def previous_token_pattern(tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch query key"]:
    """Return 1 where the key is the position before the query's, and 0 elsewhere."""
    batch, n_pos = tokens.shape
    return torch.ones(n_pos - 1, device=tokens.device).diag(-1).expand(batch, n_pos, n_pos)


def duplicate_token_pattern(tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch query key"]:
    """Return 1 where the key is earlier than the query and holds the same token, and 0 elsewhere."""
    return (tokens[:, :, None] == tokens[:, None, :]).float().tril(-1)


def induction_pattern(tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch query key"]:
    """Return 1 where the key comes right after an earlier copy of the query's token, and 0 elsewhere.

    For a token that comes twice in a row, that key is the query itself.
    """
    return F.pad(duplicate_token_pattern(tokens), (1, -1))


DETECTION_PATTERNS: dict[str, Callable[[Tensor], Tensor]] = {
    "previous_token": previous_token_pattern,
    "duplicate_token": duplicate_token_pattern,
    "induction": induction_pattern,
}


def register_head_pattern(name: str, pattern: Callable[[Tensor], Tensor]) -> None:
    """Give a pattern a name, which `attention_scores`, `repeated_token_scores` and `detect_head` then take.

        register_head_pattern("first_token", lambda tokens: F.one_hot(torch.zeros_like(tokens), tokens.shape[1]))

    Args:
        name: the name; it must not be taken, with or without the ending `_head`.
        pattern: makes the pattern [query key] or [batch query key], entries between 0 and 1, from tokens [batch pos].

    Raises:
        TypeError: the name is not a string, or the pattern is no function.
        ValueError: the name is empty or taken.
    """
    if not isinstance(name, str) or not callable(pattern):
        raise TypeError(
            f"a head pattern is a name and a function from tokens to a pattern; got {name!r} and "
            f"{type(pattern).__name__}"
        )
    taken = DETECTION_PATTERNS.keys() | {f"{known}_head" for known in DETECTION_PATTERNS}
    if not name or name in taken or f"{name}_head" in DETECTION_PATTERNS:
        raise ValueError(
            f"the head pattern {name!r} cannot be registered: it is {'taken' if name else 'an empty name'}"
        )
    DETECTION_PATTERNS[name] = pattern


# Scores of attention


@torch.no_grad()
def attention_scores(
    model: HookedModel,
    input: Prompts,
    pattern: Pattern,
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = 8,
    verbose: bool = True,
) -> HeadScores:
    """Run a model and return how much of each head's attention goes where a pattern points, between 0 and 1.

    The score is the mean, over prompts and over the queries that the pattern gives a key to, of the attention from the
    query to its keys: `sum_k attention[q, k] * pattern[q, k]`. Queries without a key do not count; neither does
    padding. Hooks and interventions that are in place act in the run. One layer's attention is in memory at a time.

    Args:
        model: a `HookedTransformer`.
        input: a string, a list of strings, or tokens [pos] or [batch pos].
        pattern: `"previous_token"`, `"duplicate_token"`, `"induction"` or a registered name; a tensor [query key] or
            [batch query key] with entries between 0 and 1; or a function that makes one from the tokens [batch pos].
        attention_mask: [batch pos], 0 at padding; strings bring their own.
        batch_size: prompts that run at a time.
        verbose: show a progress bar.

    Raises:
        TypeError: the pattern is none of these.
        ValueError: an unknown name, a pattern of another shape or with other entries, one that points to later
            positions where attention is causal, or one that gives no query a key.
    """
    _require_layers(model.cfg)
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1, got {batch_size}")
    tokens, mask = model.tokens_and_mask(input, attention_mask)
    real = torch.ones_like(tokens) if mask is None else mask.to(tokens.device)
    target = _target(pattern, tokens, real.bool(), causal=model.cfg.attention_dir == "causal")
    precise = torch.promote_types(model.cfg.dtype, torch.float32)
    totals = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, device=target.device, dtype=precise)

    def add(rows: slice, layer: int, attention: Float[Tensor, "batch head query key"]) -> None:
        hits = einsum(attention.to(totals), target[rows].to(totals), "batch head query key, batch query key -> head")
        totals[layer] += hits

    for start in tqdm(range(0, len(tokens), batch_size), disable=not verbose, desc="attention", leave=False):
        rows = slice(start, start + batch_size)
        read_patterns(model, tokens[rows], partial(add, rows), attention_mask=real[rows])
    kind = pattern if isinstance(pattern, str) else getattr(pattern, "__name__", "custom pattern")
    n_queries = target.any(-1).sum()
    return HeadScores(kind, totals / n_queries)


def repeated_token_scores(
    model: HookedModel,
    pattern: Pattern = "induction",
    *,
    batch: int = 8,
    length: int = 24,
    generator: torch.Generator | None = None,
    start_token: int | None = None,
    batch_size: int = 8,
    verbose: bool = True,
) -> HeadScores:
    """Return `attention_scores` on random tokens that come twice, so that only their order guides attention.

    Args:
        model: a `HookedTransformer`.
        pattern, batch_size, verbose: as for `attention_scores`.
        batch, length, start_token: as for `repeated_random_tokens`. By default the start token is the tokenizer's BOS,
            and 0 where there is none.
        generator: where the randomness comes from; by default a new one with seed 0.

    Raises:
        ValueError: as for `attention_scores` and `repeated_random_tokens`, or `2 * length + 1` positions are more than
            the model takes.
    """
    if start_token is None:
        bos = getattr(model.tokenizer, "bos_token_id", None)
        start_token = 0 if bos is None else int(bos)
    source = torch.Generator().manual_seed(0) if generator is None else generator
    tokens = repeated_random_tokens(batch, length, model.cfg.d_vocab, source, start_token)
    # BOS is often the padding token too: by the mask the model reads it as a token.
    mask = torch.ones_like(tokens)
    return attention_scores(model, tokens, pattern, attention_mask=mask, batch_size=batch_size, verbose=verbose)


def read_patterns(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    read: Callable[[int, Tensor], None],
    *,
    layers: Iterable[int] | None = None,
    attention_mask: Tensor | None = None,
) -> None:
    """Run a model and call `read(layer, attention)` with the attention [batch head query key] of each layer in turn.

    The attention is not kept, and no layer runs after the last one that is read. `read` changes nothing in the run.

    Args:
        model: a `HookedTransformer`.
        tokens: the prompts.
        read: called once for each layer.
        layers: the layers to read; all by default.
        attention_mask: [batch pos], 0 at padding.

    Raises:
        ValueError: there is attention that is not finite.
        UnknownHookError: no such layer, or none at all.
    """
    wanted = sorted(set(range(model.cfg.n_layers) if layers is None else layers))

    def show(attention: Tensor, hook: HookPoint) -> None:
        check_attention(hook.layer(), attention)
        read(hook.layer(), attention.detach())

    sites = [f"blocks.{layer}.attn.hook_pattern" for layer in wanted]
    with model.hooks(fwd_hooks=[(sites, show)]):
        stop = model.cfg.stop_after(wanted[-1])
        model(tokens, return_type=None, attention_mask=attention_mask, stop_at_layer=stop)


def check_attention(layer: int, attention: Float[Tensor, "batch head query key"]) -> None:
    """Check that a layer's attention is finite.

    Args:
        layer: the layer; for the message.
        attention: [batch head query key].

    Raises:
        ValueError: it is NaN or infinite somewhere.
    """
    if not bool(attention.isfinite().all()):
        raise ValueError(
            f"the attention of layer {layer} is NaN or infinite: look at the weights and at the hooks in place"
        )


def _require_layers(cfg: HookedTransformerConfig) -> None:
    if cfg.n_layers == 0:
        raise ValueError("this model has no layers, and so no heads to score")


def _target(
    pattern: Pattern, tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"], causal: bool
) -> Float[Tensor, "batch query key"]:
    """The checked pattern for each prompt, with padding left out."""
    target = _made(pattern, tokens)
    batch, n_pos = tokens.shape
    if tuple(target.shape) not in ((n_pos, n_pos), (batch, n_pos, n_pos)):
        raise ValueError(
            f"a pattern for these tokens is [query key] or [batch query key] with batch {batch} and {n_pos} positions; "
            f"got shape {tuple(target.shape)}"
        )
    target = target.to(tokens.device, torch.float32).expand(batch, n_pos, n_pos)
    check_pattern_entries(target, causal)
    target = target * (real[:, :, None] & real[:, None, :])
    if not bool(target.any()):
        name = f"{pattern!r}" if isinstance(pattern, str) else "the pattern"
        raise ValueError(
            f"{name} gives no query of these tokens a key, so there is nothing to score; 'duplicate_token' and "
            "'induction' need tokens that come again (see repeated_token_scores)"
        )
    return target


def _made(pattern: Pattern, tokens: Int[Tensor, "batch pos"]) -> Tensor:
    if isinstance(pattern, str):
        if pattern not in DETECTION_PATTERNS:
            known = ", ".join(map(repr, DETECTION_PATTERNS))
            raise ValueError(f"no pattern {pattern!r}: there are {known}; or give a tensor [query key] or a function")
        return DETECTION_PATTERNS[pattern](tokens)
    made = pattern(tokens) if callable(pattern) else pattern
    if not isinstance(made, Tensor):
        raise TypeError(
            f"a pattern is a name, a tensor [query key], or a function from tokens to one; got {type(made).__name__}"
        )
    return made


def check_pattern_entries(pattern: Float[Tensor, "*batch query key"], causal: bool) -> None:
    """Check that a pattern's entries are between 0 and 1, and, for causal attention, 0 above the diagonal.

    Args:
        pattern: [*batch query key].
        causal: whether a query sees no later key.

    Raises:
        ValueError: an entry is out of range, or one above the diagonal is not 0.
    """
    if not bool(((pattern >= 0) & (pattern <= 1)).all()):
        least, most = float(pattern.min()), float(pattern.max())
        raise ValueError(f"the entries of a pattern are between 0 and 1, like attention; got {least:g} to {most:g}")
    if causal and bool(pattern.triu(1).any()):
        raise ValueError(
            "the pattern points from queries to later keys, which causal attention never sees; rows are queries, "
            "columns keys"
        )


# Scores of circuits


def eigenvalue_score(circuit: FactoredMatrix) -> Float[Tensor, "*leading"]:
    """Return the sum of a circuit's eigenvalues over the sum of their absolute values, between -1 and 1.

    1 where each of them is positive: the circuit maps tokens, and mixtures of tokens, to themselves. 0 for a circuit
    without eigenvalues other than zero (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits",
    section "Detecting copying behavior").

    Args:
        circuit: square; leading axes are a stack of circuits.

    Raises:
        ValueError: it is not square.
    """
    eigenvalues = circuit.eigenvalues
    sizes = eigenvalues.abs().sum(-1)
    # Complex ones come in pairs: the imaginary parts cancel.
    return torch.where(sizes > 0, eigenvalues.real.sum(-1) / sizes, torch.zeros_like(sizes))


@torch.no_grad()
def copying_scores(model: HookedModel, *, effective_embedding: bool = False, verbose: bool = True) -> HeadScores:
    """Return each head's `eigenvalue_score` of its OV circuit `W_E W_V W_O W_U`: whether it raises what it attends to.

    With the gains and the centring of the norms on the way; biases and scales are left out. Where the unembedding is
    centred (as `from_pretrained` does), what a head adds to all logits alike is left out too.

    Args:
        model: a `HookedTransformer`.
        effective_embedding: tokens as they are after the first MLP, for heads after layer 0; see `token_embeddings`.
        verbose: show a progress bar.

    Raises:
        ValueError: tokens in and tokens out differ in number, there are no layers, norms stand where the circuit is no
            product of matrices, or a component on the way is overridden.
    """
    cfg = model.cfg
    require_stock_unembedding(model, "a copying score")
    if cfg.d_vocab != cfg.d_vocab_out:
        raise ValueError(
            f"copying compares tokens in with tokens out, and this model has {cfg.d_vocab} in and {cfg.d_vocab_out} out"
        )

    def summed(embedded: Float[Tensor, "vocab d_model"]) -> Float[Tensor, "d_model d_model"]:
        through = einsum(at_least_single(model.W_U), embedded, "written vocab, vocab read -> written read")
        return read_through(model.ln_final, through)

    return _circuit_scores(model, "copying", folded_ov, summed, effective_embedding, verbose)


@torch.no_grad()
def matching_scores(model: HookedModel, *, effective_embedding: bool = False, verbose: bool = True) -> HeadScores:
    """Return each head's `eigenvalue_score` of its QK circuit `W_E W_Q W_K^T W_E^T`: whether tokens match themselves.

    With the gains and the centring of the norms on the way; biases, scales and positions are left out (where positions
    rotate, the circuit is that of two tokens at the same one).

    Args:
        model, effective_embedding, verbose: as for `copying_scores`.

    Raises:
        ValueError: there are no layers, norms stand where the circuit is no product of matrices, or attention or norms
            are overridden.
    """

    def summed(embedded: Float[Tensor, "vocab d_model"]) -> Float[Tensor, "d_model d_model"]:
        return einsum(embedded, embedded, "vocab source, vocab read -> source read")

    return _circuit_scores(model, "matching", folded_qk, summed, effective_embedding, verbose)


def _circuit_scores(
    model: HookedModel,
    kind: str,
    circuits: Callable[[HookedModel, int], FactoredMatrix],
    summed: Callable[[Tensor], Tensor],
    effective: bool,
    verbose: bool,
) -> HeadScores:
    """Score `circuits(model, layer)` times what `summed` makes of the embeddings, layer by layer."""
    _require_layers(model.cfg)
    middle = summed(at_least_single(token_embeddings(model)))
    later = summed(at_least_single(token_embeddings(model, effective=True, verbose=verbose))) if effective else middle
    scores = []
    for layer in tqdm(range(model.cfg.n_layers), disable=not verbose, desc=kind, leave=False):
        # The heads of layer 0 read before the first MLP.
        scores.append(eigenvalue_score(circuits(model, layer) @ (later if layer else middle)))
    return HeadScores(kind, torch.stack(scores))
