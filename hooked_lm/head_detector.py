"""The classic head detector: how far each head's attention on a text is that of a previous-token head, and so on.

Two measures, of a head's attention `A` [query key] and a detection pattern `D`:

    mul    sum(A * D) / sum(A)              the share of the attention that falls where the pattern is
    abs    1 - sum(|A - D|) / positions     1 for a perfect match, less for every difference, down to -1

Queries without a key in the pattern count here, although they too attend somewhere, so that few heads come near 1;
`circuits.heads.attention_scores` leaves them out, takes tokens as well as text, and patterns of your own as functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_lm._support.integers import integer
from hooked_lm._support.precision import at_least_single
from hooked_lm._support.replaced import missing
from hooked_lm.activation_cache import ActivationCache
from hooked_lm.circuits.heads import (
    DETECTION_PATTERNS,
    check_attention,
    check_pattern_entries,
    duplicate_token_pattern,
    induction_pattern,
    previous_token_pattern,
    read_patterns,
)
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooked_model import HookedModel

if TYPE_CHECKING:
    from hooked_lm.transformer import HookedTransformer

__all__ = [
    "HEAD_NAMES",
    "ErrorMeasure",
    "HeadName",
    "LayerHeadTuple",
    "LayerToHead",
    "compute_head_attention_similarity_score",
    "detect_head",
    "get_duplicate_token_head_detection_pattern",
    "get_induction_head_detection_pattern",
    "get_previous_token_head_detection_pattern",
]

HeadName = Literal["previous_token_head", "duplicate_token_head", "induction_head"]
HEAD_NAMES: tuple[str, ...] = get_args(HeadName)
ErrorMeasure = Literal["mul", "abs"]

LayerHeadTuple = tuple[int, int]
LayerToHead = Mapping[int, Sequence[int]]


# Patterns


def get_previous_token_head_detection_pattern(tokens: Int[Tensor, "*batch pos"]) -> Float[Tensor, "query key"]:
    """Return 1 where the key is the position before the query's, and 0 elsewhere; of one prompt, [pos] or [1 pos]."""
    return previous_token_pattern(_one_prompt(tokens))[0]


def get_duplicate_token_head_detection_pattern(tokens: Int[Tensor, "*batch pos"]) -> Float[Tensor, "query key"]:
    """Return 1 where the key is earlier and holds the query's token, and 0 elsewhere; of one prompt."""
    return duplicate_token_pattern(_one_prompt(tokens))[0]


def get_induction_head_detection_pattern(tokens: Int[Tensor, "*batch pos"]) -> Float[Tensor, "query key"]:
    """Return 1 where the key comes right after an earlier copy of the query's token, and 0 elsewhere; of one prompt."""
    return induction_pattern(_one_prompt(tokens))[0]


_PATTERNS: dict[str, Callable[[Tensor], Tensor]] = {
    "previous_token_head": get_previous_token_head_detection_pattern,
    "duplicate_token_head": get_duplicate_token_head_detection_pattern,
    "induction_head": get_induction_head_detection_pattern,
}


# Under these names `circuits.heads` has the patterns above; the classic detector takes them under its own names only.
_OTHER_NAMES = frozenset({"previous_token", "duplicate_token", "induction"})


def _one_prompt(tokens: Int[Tensor, "*batch pos"]) -> Int[Tensor, "one pos"]:
    if tokens.ndim not in (1, 2) or (tokens.ndim == 2 and len(tokens) != 1) or tokens.numel() == 0:
        raise ValueError(f"a detection pattern belongs to one prompt, [pos] or [1 pos]; got {tuple(tokens.shape)}")
    return tokens.reshape(1, -1)


# Scores


@torch.no_grad()
def detect_head(
    model: HookedModel,
    seq: str | list[str],
    detection_pattern: Tensor | str,
    heads: Sequence[LayerHeadTuple] | LayerToHead | None = None,
    cache: ActivationCache | None = None,
    *,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    error_measure: ErrorMeasure = "mul",
) -> Float[Tensor, "layer head"]:
    """Return how well each head's attention matches a pattern, [layer head] on the CPU; -1 for heads not chosen.

    Args:
        model: a `HookedTransformer` with a tokenizer.
        seq: a text, or several; the scores are then means over them. Each is read by itself, BOS as the model has it.
        detection_pattern: one of `HEAD_NAMES`; a name given by `circuits.heads.register_head_pattern`; or a tensor
            [query key] with entries between 0 and 1, none above the diagonal where attention is causal, which has to
            fit every text.
        heads: pairs (layer, head), or a dictionary from layers to lists of heads; all by default.
        cache: of a run of the model on `seq`, with `blocks.{layer}.attn.hook_pattern` of the chosen layers, to save
            running it again. With several texts, they have to be equally long and its batch that of the texts.
        exclude_bos: leave out the attention to the first position.
        exclude_current_token: leave out the attention of each position to itself.
        error_measure: `"mul"` or `"abs"`, see the top of this module. By `"mul"`, a head whose whole attention is left
            out scores 0.

    Raises:
        TypeError: `seq` is not text, or the pattern neither a name nor a tensor.
        ValueError: an unknown name or measure, a pattern that does not fit, a head that does not exist, none at all, a
            text of a single token or of more than the model takes, or a cache of another run.
    """
    if error_measure not in get_args(ErrorMeasure):
        raise ValueError(f"error_measure is 'mul' or 'abs', not {error_measure!r}")
    chosen = _chosen_heads(model.cfg, heads)
    prompts = [_tokens(model, text) for text in _texts(seq)]
    _check_cache(cache, prompts)
    layers = chosen.any(1).nonzero()[:, 0].tolist()
    scores = torch.zeros(len(prompts), *chosen.shape, dtype=torch.promote_types(model.cfg.dtype, torch.float32))
    for row, tokens in enumerate(prompts):
        target = _detection_pattern(model, detection_pattern, tokens)
        kept = _kept(target, exclude_bos, exclude_current_token)
        score = partial(_score_layer, scores[row], target, kept, error_measure)
        if cache is None:
            read_patterns(model, tokens, score, layers=layers, attention_mask=torch.ones_like(tokens))
        else:
            for layer in layers:
                score(layer, _cached_pattern(cache, layer, row, len(prompts), tokens.shape[1]))
    return scores.mean(0).where(chosen, -1.0).to(model.cfg.dtype)


def _score_layer(
    scores: Float[Tensor, "layer head"],
    target: Float[Tensor, "query key"],
    kept: Float[Tensor, "query key"],
    error_measure: str,
    layer: int,
    attention: Float[Tensor, "one head query key"],
) -> None:
    """Write into `scores` how well each head of a layer matches the target, where `kept` is 1."""
    attention = attention[0].to(target)
    if error_measure == "abs":
        off = ((attention - target).abs() * kept).sum((-2, -1))
        scores[layer] = 1 - off / len(target)
        return
    seen = attention * kept
    total = seen.sum((-2, -1))
    scores[layer] = (seen * target).sum((-2, -1)) / total.where(total > 0, 1.0)


def _kept(target: Float[Tensor, "query key"], exclude_bos: bool, exclude_current: bool) -> Float[Tensor, "query key"]:
    kept = torch.ones_like(target)
    if exclude_bos:
        kept[:, 0] = 0.0
    return kept.fill_diagonal_(0.0) if exclude_current else kept


def compute_head_attention_similarity_score(
    attention_pattern: Float[Tensor, "query key"],
    detection_pattern: Float[Tensor, "query key"],
    *,
    exclude_bos: bool,
    exclude_current_token: bool,
    error_measure: ErrorMeasure,
) -> float:
    """Return how well the attention of one head matches a pattern, as `detect_head` scores it.

    Args:
        attention_pattern: [query key], left as it is.
        detection_pattern: [query key].
        exclude_bos, exclude_current_token, error_measure: as for `detect_head`.

    Raises:
        ValueError: an unknown measure, or patterns that are not square or not of one size.
    """
    if error_measure not in get_args(ErrorMeasure):
        raise ValueError(f"error_measure is 'mul' or 'abs', not {error_measure!r}")
    size = attention_pattern.shape[-1]
    if not tuple(attention_pattern.shape) == tuple(detection_pattern.shape) == (size, size):
        raise ValueError(
            f"attention and pattern are [query key], square and of one size; got {tuple(attention_pattern.shape)} and "
            f"{tuple(detection_pattern.shape)}"
        )
    target = at_least_single(detection_pattern)
    scores = torch.zeros(1, 1, dtype=target.dtype, device=target.device)
    kept = _kept(target, exclude_bos, exclude_current_token)
    _score_layer(scores, target, kept, error_measure, 0, attention_pattern[None, None])
    return scores.item()


# Checks of the arguments


def _texts(seq: object) -> list[str]:
    texts = [seq] if isinstance(seq, str) else seq
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError(
            f"seq is a text or a list of texts, got {type(seq).__name__}; for tokens there is "
            "hooked_lm.circuits.heads.attention_scores"
        )
    return list(texts)


def _tokens(model: HookedModel, text: str) -> Int[Tensor, "one pos"]:
    # `HookedModel.to_tokens` has no `truncate`; a text that is too long has to be seen as such.
    tokens = cast("HookedTransformer", model).to_tokens(text, truncate=False)
    if not 1 < tokens.shape[1] <= model.cfg.n_ctx:
        raise ValueError(
            f"the text {text[:40]!r} has {tokens.shape[1]} tokens; attention is scored on 2 to "
            f"{model.cfg.n_ctx}, the model's n_ctx"
        )
    return tokens


def _detection_pattern(model: HookedModel, asked: object, tokens: Int[Tensor, "one pos"]) -> Float[Tensor, "query key"]:
    precise, causal = torch.promote_types(model.cfg.dtype, torch.float32), model.cfg.attention_dir == "causal"
    if isinstance(asked, str):
        return _named_pattern(asked, tokens, causal).to(tokens.device, precise)
    if not isinstance(asked, Tensor):
        raise TypeError(f"detection_pattern is a name or a tensor [query key], got {type(asked).__name__}")
    n_pos = tokens.shape[1]
    if tuple(asked.shape) != (n_pos, n_pos):
        raise ValueError(
            f"the detection pattern has shape {tuple(asked.shape)}, and the text {n_pos} tokens (BOS is one, where the "
            "model puts it in front): it should be [query key] of these"
        )
    pattern = asked.to(tokens.device, precise)
    check_pattern_entries(pattern, causal)
    return pattern


def _named_pattern(name: str, tokens: Int[Tensor, "one pos"], causal: bool) -> Float[Tensor, "query key"]:
    if name in _PATTERNS:
        return _PATTERNS[name](tokens)
    registered = [one for one in DETECTION_PATTERNS if one not in _OTHER_NAMES]
    if name not in registered:
        known = ", ".join(map(repr, (*HEAD_NAMES, *registered)))
        raise ValueError(f"detection_pattern {name!r} is none of {known}, nor a tensor")
    made, n_pos = DETECTION_PATTERNS[name](tokens), tokens.shape[1]
    if not isinstance(made, Tensor) or tuple(made.shape) not in ((n_pos, n_pos), (1, n_pos, n_pos)):
        came = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(
            f"the registered head pattern {name!r} made {came} of {n_pos} tokens; a pattern is a tensor [query key] or "
            "[1 query key]"
        )
    pattern = made.reshape(n_pos, n_pos)
    check_pattern_entries(pattern, causal)
    return pattern


def _chosen_heads(
    cfg: HookedTransformerConfig, heads: Sequence[LayerHeadTuple] | LayerToHead | None
) -> Bool[Tensor, "layer head"]:
    chosen = torch.zeros(cfg.n_layers, cfg.n_heads, dtype=torch.bool)
    if heads is None:
        pairs = [(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    elif isinstance(heads, Mapping):
        pairs = [(layer, head) for layer, several in heads.items() for head in several]
    else:
        pairs = [_pair(one) for one in heads]
    for layer, head in ((integer(one, "a layer"), integer(other, "a head")) for one, other in pairs):
        if not (0 <= layer < cfg.n_layers and 0 <= head < cfg.n_heads):
            raise ValueError(
                f"no head L{layer}H{head}: this model has layers 0-{cfg.n_layers - 1} and heads 0-{cfg.n_heads - 1}"
            )
        chosen[layer, head] = True
    if not pairs:
        raise ValueError("heads is empty: give pairs (layer, head), or None for all")
    return chosen


def _pair(one: object) -> LayerHeadTuple:
    if not isinstance(one, (tuple, list)) or len(one) != 2:
        raise ValueError(f"heads are pairs (layer, head), or a dictionary from layers to lists of heads; got {one!r}")
    return one[0], one[1]


def _check_cache(cache: ActivationCache | None, prompts: Sequence[Int[Tensor, "one pos"]]) -> None:
    lengths = [tokens.shape[1] for tokens in prompts]
    if cache is not None and len(set(lengths)) > 1:
        raise ValueError(f"a cache goes with texts of the same length; these have {lengths} tokens: leave it out")
    if cache is not None and cache.attention_mask is not None:
        raise ValueError("the cache is of a run with padding, and the texts are read without: leave it out")


def _cached_pattern(
    cache: ActivationCache, layer: int, row: int, n_texts: int, n_pos: int
) -> Float[Tensor, "one head query key"]:
    attention = cache["pattern", layer]
    attention = attention if cache.has_batch_dim else attention[None]
    if (len(attention), *attention.shape[-2:]) != (n_texts, n_pos, n_pos):
        raise ValueError(
            f"the cache is from another run: its attention in layer {layer} has shape {tuple(attention.shape)}, for "
            f"{n_texts} texts of {n_pos} tokens"
        )
    check_attention(layer, attention)
    return attention[row : row + 1]


def __getattr__(name: str) -> object:
    raise missing("module 'hooked_lm.head_detector'", name, {"get_supported_heads": "HEAD_NAMES lists the patterns"})
