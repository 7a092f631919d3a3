"""The classic head detector: its patterns, its two measures, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import ActivationCache, HookedTransformer, UnknownHookError
from hooked_lm.circuits.heads import attention_scores
from hooked_lm.head_detector import (
    HEAD_NAMES,
    compute_head_attention_similarity_score,
    detect_head,
    get_duplicate_token_head_detection_pattern,
    get_induction_head_detection_pattern,
    get_previous_token_head_detection_pattern,
)
from tests.helpers import VOCAB, randomise_, tiny_config, tiny_tokenizer

PATTERNS = {
    "previous_token_head": get_previous_token_head_detection_pattern,
    "duplicate_token_head": get_duplicate_token_head_detection_pattern,
    "induction_head": get_induction_head_detection_pattern,
}
TEXT = "again and again and again, John John"
OTHERS = ["Mary and Mary and John", "The store of the store of Mary"]


def text_model(**changes: Any) -> HookedTransformer:
    """A tiny model that reads text."""
    fields = {"d_vocab": VOCAB + 2, "n_ctx": 64, **changes}
    return randomise_(HookedTransformer(tiny_config(**fields), tiny_tokenizer()))  # type: ignore[return-value]


MODEL = text_model()


@torch.no_grad()
def cache_of(model: HookedTransformer, text: str | list[str], **how: Any) -> ActivationCache:
    return model.run_with_cache(text, **how)[1]


def written_out(attention: Tensor, pattern: Tensor, measure: str, exclude_bos: bool, exclude_current: bool) -> float:
    """The two measures of one head's attention [query key], in plain loops."""
    matched = attended = off = 0.0
    size = len(pattern)
    for query in range(size):
        for key in range(size):
            if (exclude_bos and key == 0) or (exclude_current and key == query):
                continue
            a, d = float(attention[query, key]), float(pattern[query, key])
            matched, attended, off = matched + a * d, attended + a, off + abs(a - d)
    return matched / attended if measure == "mul" else 1 - off / size


def assert_same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


# Patterns


def test_the_patterns_of_a_small_prompt_are_the_ones_drawn_here() -> None:
    tokens = torch.tensor([[7, 3, 3, 7, 5]])
    previous = [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]
    duplicate = [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    induction = [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    for make, expected in zip(PATTERNS.values(), (previous, duplicate, induction), strict=True):
        for prompt in (tokens, tokens[0]):
            pattern = make(prompt)
            assert pattern.dtype == torch.float32
            assert pattern.tolist() == expected


@pytest.mark.parametrize("make", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("shape", [(2, 5), (0,), (1, 1, 5)], ids=str)
def test_a_pattern_of_more_or_less_than_one_prompt_raises(make: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a detection pattern belongs to one prompt"):
        make(torch.zeros(shape, dtype=torch.long))


def test_the_names_are_the_classic_ones() -> None:
    assert HEAD_NAMES == ("previous_token_head", "duplicate_token_head", "induction_head") == tuple(PATTERNS)


# Scores


@pytest.mark.parametrize("changes", [{}, {"n_heads": 4, "n_key_value_heads": 2}], ids=str)
@pytest.mark.parametrize("exclude_bos", [False, True])
@pytest.mark.parametrize("exclude_current", [False, True])
@pytest.mark.parametrize("measure", ["mul", "abs"])
@pytest.mark.parametrize("name", HEAD_NAMES)
def test_a_score_is_the_measure_written_out(
    name: Any, measure: Any, exclude_current: bool, exclude_bos: bool, changes: dict[str, Any]
) -> None:
    model = text_model(**changes)
    found = detect_head(
        model,
        TEXT,
        name,
        exclude_bos=exclude_bos,
        exclude_current_token=exclude_current,
        error_measure=measure,
    )
    cache = cache_of(model, TEXT)
    pattern = PATTERNS[name](model.to_tokens(TEXT))
    for layer in range(2):
        for head in range(model.cfg.n_heads):
            attention = cache["pattern", layer][0, head]
            expected = written_out(attention, pattern, measure, exclude_bos, exclude_current)
            assert float(found[layer, head]) == pytest.approx(expected, abs=1e-9)
    assert found.shape == (2, model.cfg.n_heads)


def test_a_tensor_of_ones_and_zeros_scores_as_its_name_does_and_other_weights_count() -> None:
    pattern = get_induction_head_detection_pattern(MODEL.to_tokens(TEXT))
    named = detect_head(MODEL, TEXT, "induction_head")
    assert_same(detect_head(MODEL, TEXT, pattern), named)
    assert_same(detect_head(MODEL, TEXT, pattern.bool()), named)
    assert_same(detect_head(MODEL, TEXT, pattern / 2), named / 2)


@pytest.mark.parametrize("name", HEAD_NAMES)
def test_a_head_that_attends_as_the_pattern_says_scores_one(name: Any) -> None:
    tokens = MODEL.to_tokens(TEXT)
    pattern = PATTERNS[name](tokens)
    attention = pattern / pattern.sum(-1, keepdim=True).clamp(min=1.0)
    # A query without a key looks at BOS, as such heads do.
    attention[:, 0] = torch.where(pattern.any(-1), attention[:, 0], 1.0)

    def attend(x: Tensor, hook: Any) -> Tensor:
        x[:, 1] = attention
        return x

    with MODEL.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", attend)]):
        found = detect_head(MODEL, TEXT, name, exclude_bos=True)
        exact = detect_head(MODEL, TEXT, attention, error_measure="abs")
        without_idle_queries = attention_scores(MODEL, tokens, pattern, verbose=False)
    assert float(found[1, 1]) == pytest.approx(1.0)
    assert float(exact[1, 1]) == pytest.approx(1.0)
    assert float(without_idle_queries.scores[1, 1]) == pytest.approx(1.0)
    assert int(exact.argmax()) == 4
    assert int(found.argmax()) == 4


def test_a_head_that_attends_to_nothing_but_what_is_left_out_scores_zero() -> None:
    def attend_to_bos(x: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(x).index_fill(-1, torch.tensor(0), 1.0)

    with MODEL.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", attend_to_bos)]):
        found = detect_head(MODEL, TEXT, "previous_token_head", exclude_bos=True)
    assert found[0].tolist() == [0.0, 0.0, 0.0]
    assert bool((found[1] > 0).all())


def test_several_texts_have_the_mean_of_their_scores_with_every_option_applied_to_each() -> None:
    how: dict[str, Any] = {"exclude_bos": True, "exclude_current_token": True, "error_measure": "abs"}
    texts = [TEXT, *OTHERS]
    assert len({MODEL.to_tokens(text).shape[1] for text in texts}) == 3
    heads = [(0, 1), (1, 2)]
    found = detect_head(MODEL, texts, "induction_head", heads, **how)
    each = torch.stack([detect_head(MODEL, text, "induction_head", **how) for text in texts])
    for layer in range(2):
        for head in range(3):
            expected = each[:, layer, head].mean() if (layer, head) in heads else -1.0
            assert float(found[layer, head]) == pytest.approx(float(expected), abs=1e-12)
    assert not torch.allclose(each[0], each[1])
    assert_same(detect_head(MODEL, [TEXT], "induction_head", **how), each[0])


@pytest.mark.parametrize(
    "heads", [[(0, 2), (1, 0)], ((0, 2), (1, 0)), {0: [2], 1: [0]}, [[1, 0], [0, 2], [0, 2]]], ids=str
)
def test_heads_that_were_not_asked_for_score_minus_one(heads: Any) -> None:
    whole, found = (detect_head(MODEL, TEXT, "previous_token_head", asked) for asked in (None, heads))
    expected = torch.full((2, 3), -1.0, dtype=torch.float64)
    expected[0, 2], expected[1, 0] = whole[0, 2], whole[1, 0]
    assert_same(found, expected)
    assert bool((whole > 0).all())


def test_no_layer_after_the_last_one_asked_for_runs() -> None:
    ran: list[int] = []
    with MODEL.hooks(fwd_hooks=[("blocks.*.hook_resid_pre", lambda x, hook: ran.append(hook.layer()))]):
        detect_head(MODEL, TEXT, "previous_token_head", [(0, 1)])
    assert ran == [0]


# Caches


@pytest.mark.parametrize("remove_batch_dim", [False, True])
def test_a_cache_saves_the_run_and_stays_as_it_was(remove_batch_dim: bool) -> None:
    expected = detect_head(MODEL, TEXT, "induction_head", exclude_bos=True, exclude_current_token=True)
    names = "blocks.*.attn.hook_pattern"
    cache = cache_of(MODEL, TEXT, names_filter=names, remove_batch_dim=remove_batch_dim)
    before = {name: tensor.clone() for name, tensor in cache.items()}
    ran: list[str] = []
    with MODEL.hooks(fwd_hooks=[("hook_embed", lambda x, hook: ran.append(hook.name))]):
        found = detect_head(MODEL, TEXT, "induction_head", None, cache, exclude_bos=True, exclude_current_token=True)
    assert_same(found, expected)
    assert not ran
    assert all(torch.equal(cache[name], tensor) for name, tensor in before.items())


def test_a_cache_of_several_texts_of_one_length_has_a_row_for_each() -> None:
    texts = ["Mary and Mary and John", "John and Mary and John"]
    cache = cache_of(MODEL, texts)
    assert_same(detect_head(MODEL, texts, "induction_head", cache=cache), detect_head(MODEL, texts, "induction_head"))


def test_a_cache_needs_the_layers_that_are_asked_for_and_no_others() -> None:
    cache = cache_of(MODEL, TEXT, names_filter="blocks.0.attn.hook_pattern")
    found = detect_head(MODEL, TEXT, "previous_token_head", {0: [0, 1, 2]}, cache)
    assert_same(found[0], detect_head(MODEL, TEXT, "previous_token_head")[0])
    with pytest.raises(UnknownHookError, match=r"blocks\.1\.attn\.hook_pattern"):
        detect_head(MODEL, TEXT, "previous_token_head", cache=cache)


@pytest.mark.parametrize(
    ("texts", "cached", "said"),
    [
        (TEXT, OTHERS[0], "the cache is from another run"),
        (["Mary John", "John Mary"], "Mary John", r"for 2 texts of \d+ tokens"),
        ("Mary John", ["Mary John", "John Mary"], r"for 1 texts of \d+ tokens"),
        (OTHERS, OTHERS, "a cache goes with texts of the same length"),
    ],
    ids=["other text", "too few", "too many", "lengths"],
)
def test_a_cache_of_another_run_raises(texts: Any, cached: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        detect_head(MODEL, texts, "previous_token_head", cache=cache_of(MODEL, cached))


def test_a_cache_with_attention_that_is_not_finite_raises() -> None:
    cache = cache_of(MODEL, TEXT)
    cache["pattern", 1][0, 2, 3, 1] = torch.nan
    with pytest.raises(ValueError, match="the attention of layer 1 is NaN or infinite"):
        detect_head(MODEL, TEXT, "previous_token_head", cache=cache)


# What is refused


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"detection_pattern": "induction"}, "'induction' is none of 'previous_token_head'"),
        ({"detection_pattern": torch.eye(3)}, r"shape \(3, 3\), and the text \d+ tokens \(BOS is one"),
        ({"error_measure": "sub"}, "error_measure is 'mul' or 'abs', not 'sub'"),
        ({"heads": [(2, 0)]}, "no head L2H0: this model has layers 0-1 and heads 0-2"),
        ({"heads": {0: [0, 3]}}, "no head L0H3"),
        ({"heads": [(0, -1)]}, "no head L0H-1"),
        ({"heads": []}, "heads is empty"),
        ({"heads": {1: []}}, "heads is empty"),
        ({"heads": [0, 1]}, r"pairs \(layer, head\), or a dictionary from layers to lists of heads; got 0"),
        ({"seq": ""}, "has 1 tokens; attention is scored on 2 to 64"),
        ({"seq": "Mary " * 80}, "tokens; attention is scored on 2 to 64"),
    ],
    ids=str,
)
def test_arguments_out_of_range_raise(how: dict[str, Any], said: str) -> None:
    arguments = {"seq": TEXT, "detection_pattern": "induction_head", **how}
    with pytest.raises(ValueError, match=said):
        detect_head(MODEL, **arguments)


def test_a_text_as_long_as_the_model_takes_is_read() -> None:
    text = " and" * 63
    assert MODEL.to_tokens(text).shape[1] == 64
    assert bool((detect_head(MODEL, text, "previous_token_head") > 0).all())


@pytest.mark.parametrize("seq", [torch.tensor([[1, 2]]), [], 3, [TEXT, 3]], ids=["tokens", "none", "number", "mixed"])
def test_what_is_no_text_raises(seq: Any) -> None:
    with pytest.raises(TypeError, match="seq is a text or a list of texts"):
        detect_head(MODEL, seq, "induction_head")


def test_a_pattern_with_impossible_entries_or_of_another_kind_raises() -> None:
    n_pos = MODEL.to_tokens(TEXT).shape[1]
    with pytest.raises(ValueError, match="points from queries to later keys"):
        detect_head(MODEL, TEXT, torch.ones(n_pos, n_pos))
    with pytest.raises(ValueError, match="between 0 and 1, like attention; got 0 to 2"):
        detect_head(MODEL, TEXT, 2 * torch.eye(n_pos))
    with pytest.raises(TypeError, match="a name or a tensor"):
        detect_head(MODEL, TEXT, 3)  # type: ignore[arg-type]
    both_ways = text_model(attention_dir="bidirectional")
    assert_same(detect_head(both_ways, TEXT, torch.ones(n_pos, n_pos)), torch.ones(2, 3, dtype=torch.float64))


def test_a_tensor_has_to_fit_every_text() -> None:
    pattern = get_previous_token_head_detection_pattern(MODEL.to_tokens(OTHERS[0]))
    with pytest.raises(ValueError, match=r"the detection pattern has shape \(\d+, \d+\), and the text"):
        detect_head(MODEL, OTHERS, pattern)


@pytest.mark.parametrize("error_measure", ["mul", "abs"])
@pytest.mark.parametrize("exclude_bos", [True, False])
@pytest.mark.parametrize("exclude_current_token", [True, False])
def test_the_score_of_one_pattern_is_that_of_its_head(
    error_measure: Any, exclude_bos: bool, exclude_current_token: bool
) -> None:
    model = text_model()
    text = "When John and Mary went to the store, John"
    options = {
        "exclude_bos": exclude_bos,
        "exclude_current_token": exclude_current_token,
        "error_measure": error_measure,
    }
    _, cache = model.run_with_cache(text)
    wanted = get_previous_token_head_detection_pattern(model.to_tokens(text))
    scores = detect_head(model, text, "previous_token_head", **options)
    attention = cache["pattern", 1][0, 2]
    before = attention.clone()
    score = compute_head_attention_similarity_score(attention, wanted, **options)
    assert score == pytest.approx(float(scores[1, 2]), abs=1e-6)
    assert torch.equal(attention, before)


def test_patterns_of_two_sizes_have_no_score() -> None:
    options = {"exclude_bos": False, "exclude_current_token": False}
    for attention, measure in ((torch.ones(3, 3), "mul"), (torch.ones(3, 4), "abs"), (torch.ones(4, 4), "l2")):
        with pytest.raises(ValueError, match=r"square and of one size|error_measure is"):
            compute_head_attention_similarity_score(attention, torch.ones(4, 4), error_measure=measure, **options)
