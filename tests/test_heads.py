"""Head scores are shares of attention and sums of eigenvalues, as the definitions write them out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from hooked_lm import ActivationCache, HookedTransformer, UnknownHookError, plotting
from hooked_lm.circuits.heads import (
    DETECTION_PATTERNS,
    HeadScores,
    attention_scores,
    copying_scores,
    read_patterns,
    register_head_pattern,
    repeated_token_scores,
)
from hooked_lm.circuits.induction import (
    induction_scores,
    next_token_scores,
    previous_token_scores,
    repeated_random_tokens,
)
from hooked_lm.head_detector import detect_head
from tests.heads_helpers import TOKENS, assert_same
from tests.helpers import CORPUS, VOCAB, randomise_, tiny_config, tiny_model, tiny_tokenizer

DEMO = HookedTransformer.from_pretrained("demo-induction-2l")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def run(model: HookedTransformer, tokens: Tensor, **how: Any) -> ActivationCache:
    return model.run_with_cache(tokens, **how)[1]


def is_a_key(kind: str, tokens: list[int], query: int, key: int) -> bool:
    """The three kinds in words: previous position; earlier copy; right after an earlier copy."""
    if kind == "previous_token":
        return key == query - 1
    if kind == "duplicate_token":
        return key < query and tokens[key] == tokens[query]
    return 1 <= key <= query and tokens[key - 1] == tokens[query]


def written_out(model: HookedTransformer, tokens: Tensor, kind: str) -> Tensor:
    """Mean attention to the keys, over prompts and over queries that have one, in plain loops."""
    cache = run(model, tokens)
    scores = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, dtype=torch.float64)
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            attended = []
            for row, prompt in enumerate(tokens.tolist()):
                for query in range(len(prompt)):
                    keys = [key for key in range(len(prompt)) if is_a_key(kind, prompt, query, key)]
                    if keys:
                        attended.append(float(cache["pattern", layer][row, head, query, keys].sum()))
            scores[layer, head] = sum(attended) / len(attended)
    return scores


def attending(model: HookedTransformer, patterns: Tensor) -> Any:
    """Every head of layer `l` attends as `patterns[l]` [head query key] says, as long as the context lasts."""

    def attend(attention: Tensor, hook: Any) -> Tensor:
        return patterns[hook.layer()].to(attention).expand_as(attention)

    return model.hooks(fwd_hooks=[("blocks.*.attn.hook_pattern", attend)])


# Where a head of a kind looks


@pytest.mark.parametrize("kind", DETECTION_PATTERNS)
def test_a_detection_pattern_is_what_its_name_says(kind: str) -> None:
    pattern = DETECTION_PATTERNS[kind](TOKENS)
    for row, prompt in enumerate(TOKENS.tolist()):
        for query in range(9):
            for key in range(9):
                assert float(pattern[row, query, key]) == float(is_a_key(kind, prompt, query, key))


@pytest.mark.parametrize("kind", DETECTION_PATTERNS)
def test_a_single_token_gives_nothing_to_look_for(kind: str) -> None:
    assert DETECTION_PATTERNS[kind](torch.tensor([[3]])).tolist() == [[[0.0]]]


# Patterns of one's own


@pytest.fixture
def _patterns_afterwards_as_before() -> Iterator[None]:
    before = dict(DETECTION_PATTERNS)
    yield
    DETECTION_PATTERNS.clear()
    DETECTION_PATTERNS.update(before)


def first_token(tokens: torch.Tensor) -> torch.Tensor:
    pattern = torch.zeros(*tokens.shape, tokens.shape[1])
    pattern[:, 1:, 0] = 1.0
    return pattern


@pytest.mark.usefixtures("_patterns_afterwards_as_before")
def test_a_registered_pattern_is_found_by_its_name() -> None:
    register_head_pattern("first_token", first_token)
    model = tiny_model()
    found = attention_scores(model, TOKENS, "first_token", verbose=False)
    assert found.kind == "first_token"
    assert_same(found.scores, attention_scores(model, TOKENS, first_token, verbose=False).scores)
    scores = repeated_token_scores(model, "first_token", batch=2, length=5, verbose=False)
    assert_same(scores.scores, repeated_token_scores(model, first_token, batch=2, length=5, verbose=False).scores)


@pytest.mark.usefixtures("_patterns_afterwards_as_before")
def test_the_classic_detector_takes_a_registered_pattern_and_checks_it() -> None:
    model = tiny_model(d_vocab=VOCAB, n_ctx=64)
    model.set_tokenizer(tiny_tokenizer())
    text = "Mary and John"
    with pytest.raises(ValueError, match="detection_pattern 'mine' is none of 'previous_token_head'"):
        detect_head(model, text, "mine")
    register_head_pattern("mine", first_token)
    assert_same(detect_head(model, text, "mine"), detect_head(model, text, first_token(model.to_tokens(text))[0]))
    register_head_pattern("too_long", lambda tokens: torch.ones(99, 99))
    with pytest.raises(ValueError, match=r"head pattern 'too_long' made \(99, 99\) of \d+ tokens"):
        detect_head(model, text, "too_long")
    register_head_pattern("later", lambda tokens: torch.ones(tokens.shape[1], tokens.shape[1]))
    with pytest.raises(ValueError, match="points from queries to later keys"):
        detect_head(model, text, "later")


@pytest.mark.usefixtures("_patterns_afterwards_as_before")
@pytest.mark.parametrize("name", ["induction", "induction_head", "mine", ""])
def test_a_pattern_under_a_taken_or_empty_name_is_refused(name: str) -> None:
    register_head_pattern("mine", first_token)
    before = dict(DETECTION_PATTERNS)
    with pytest.raises(ValueError, match=f"pattern '{name}' cannot be registered: it is (taken|an empty name)"):
        register_head_pattern(name, first_token)
    assert before == DETECTION_PATTERNS


def test_what_is_no_pattern_cannot_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests
    with pytest.raises(TypeError, match="a name and a function from tokens to a pattern"):
        register_head_pattern("mine", torch.ones(3, 3))  # type: ignore[arg-type]


# Scores of attention


@pytest.mark.parametrize(
    "changes", [{}, {"n_heads": 4, "n_key_value_heads": 2}, {"window_size": 3}, {"attention_sinks": True}], ids=str
)
@pytest.mark.parametrize("kind", DETECTION_PATTERNS)
def test_a_score_is_the_mean_attention_to_the_keys_of_the_pattern(kind: str, changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    found = attention_scores(model, TOKENS, kind, verbose=False)
    assert found.kind == kind
    assert_same(found.scores, written_out(model, TOKENS, kind))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_the_number_of_prompts_at_a_time_changes_nothing(batch_size: int) -> None:
    model = tiny_model()
    found = attention_scores(model, TOKENS, "induction", batch_size=batch_size, verbose=False)
    assert_same(found.scores, written_out(model, TOKENS, "induction"))


@pytest.mark.parametrize("kind", DETECTION_PATTERNS)
def test_a_head_that_attends_as_the_pattern_says_scores_one_and_one_that_never_does_scores_zero(kind: str) -> None:
    model, tokens = tiny_model(), repeated_random_tokens(1, 6, 20, generator())
    shows = {name: make(tokens)[0] for name, make in DETECTION_PATTERNS.items()}
    names = list(shows)
    with attending(model, torch.stack([torch.stack(list(shows.values()))] * 2)):
        found = attention_scores(model, tokens, kind, verbose=False)
    assert found.scores.tolist() == [[float(name == kind) for name in names]] * 2
    assert [one.head for one in found.top(2)] == [names.index(kind)] * 2


def test_on_repeated_random_tokens_the_scores_are_those_of_the_induction_module() -> None:
    model = tiny_model()
    tokens = repeated_random_tokens(4, 6, 20, generator(3), start_token=0)
    cache = run(model, tokens)
    how: dict[str, Any] = {"batch": 4, "length": 6, "verbose": False}
    induction = repeated_token_scores(model, generator=generator(3), **how)
    assert_same(induction.scores, induction_scores(cache, 6))
    previous = repeated_token_scores(model, "previous_token", generator=generator(3), **how)
    assert_same(previous.scores, previous_token_scores(cache))
    other = repeated_token_scores(model, generator=generator(4), **how)
    assert not torch.allclose(other.scores, induction.scores)


def test_repeated_tokens_start_with_bos_even_where_that_is_the_padding_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.bos_token
    # Without BOS of its own in front, a model with such a tokenizer takes the one that is there for padding.
    cfg = tiny_config(d_vocab=VOCAB, default_padding_side="left", default_prepend_bos=False)
    model = randomise_(HookedTransformer(cfg, tokenizer))
    tokens = repeated_random_tokens(8, 5, VOCAB, generator(), start_token=tokenizer.bos_token_id)
    cache = run(model, tokens, attention_mask=torch.ones_like(tokens))
    found = repeated_token_scores(model, "previous_token", length=5, verbose=False)
    assert_same(found.scores, previous_token_scores(cache))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_neither_as_query_nor_as_key(side: str) -> None:
    cfg = tiny_config(d_vocab=VOCAB + 2, n_ctx=64, default_padding_side=side)
    model = randomise_(HookedTransformer(cfg, tiny_tokenizer()))
    texts = [CORPUS[0], "Mary Mary Mary", CORPUS[2]]
    together = attention_scores(model, texts, "duplicate_token", verbose=False).scores
    alone, queries = [], []
    for text in texts:
        tokens = model.to_tokens(text)
        alone.append(attention_scores(model, tokens, "duplicate_token", verbose=False).scores)
        queries.append(sum(token in tokens[0, :q].tolist() for q, token in enumerate(tokens[0].tolist())))
    expected = sum(score * n for score, n in zip(alone, queries, strict=True)) / sum(queries)
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-10)
    assert len({model.to_tokens(text).shape[1] for text in texts}) == 3


def test_a_pattern_may_be_given_as_a_tensor_or_a_function_of_the_tokens() -> None:
    model = tiny_model()
    made = DETECTION_PATTERNS["induction"](TOKENS)
    expected = attention_scores(model, TOKENS, "induction", verbose=False).scores

    def after_a_copy(tokens: Tensor) -> Tensor:
        assert torch.equal(tokens, TOKENS)
        return made.bool()

    for pattern in (made, after_a_copy):
        assert_same(attention_scores(model, TOKENS, pattern, verbose=False).scores, expected)
    assert attention_scores(model, TOKENS, after_a_copy, verbose=False).kind == "after_a_copy"


def test_a_pattern_for_all_prompts_weighs_the_attention() -> None:
    model, first = tiny_model(), torch.zeros(9, 9)
    first[4:, 0], first[6, 2] = 0.5, 1.0
    cache = run(model, TOKENS)
    attention = torch.stack([cache["pattern", layer] for layer in range(2)])  # [layer batch head query key]
    queries = 0.5 * attention[..., 4:, 0].sum(-1) + attention[..., 6, 2]
    found = attention_scores(model, TOKENS, first, verbose=False)
    assert found.kind == "custom pattern"
    assert_same(found.scores, queries.mean(1) / 5)


def test_hooks_in_place_act_in_the_run() -> None:
    model = tiny_model()
    free = attention_scores(model, TOKENS, "previous_token", verbose=False).scores
    with model.hooks(fwd_hooks=[("blocks.0.hook_attn_out", lambda x, hook: x * 0)]):
        edited = attention_scores(model, TOKENS, "previous_token", verbose=False).scores
    assert_same(edited[0], free[0])
    assert not torch.allclose(edited[1], free[1])


def test_nothing_runs_after_the_last_layer_that_is_read_and_nothing_is_left_behind() -> None:
    model, ran, read = tiny_model(n_layers=3), [], []
    with model.hooks(fwd_hooks=[("blocks.*.hook_resid_pre", lambda x, hook: ran.append(hook.layer()))]):
        read_patterns(model, TOKENS, lambda layer, attention: read.append((layer, attention.shape)), layers=[1, 0])
    assert ran == [0, 1]
    assert read == [(0, (5, 3, 9, 9)), (1, (5, 3, 9, 9))]
    assert not any(point.has_hooks() for point in model.hook_points())


def test_a_pattern_that_points_ahead_is_for_bidirectional_models() -> None:
    ahead = torch.ones(8).diag(1)
    both_ways = tiny_model(attention_dir="bidirectional")
    cache = run(both_ways, TOKENS)
    expected = torch.stack([cache["pattern", layer].diagonal(1, 2, 3).mean((0, 2)) for layer in range(2)])
    assert_same(attention_scores(both_ways, TOKENS, ahead, verbose=False).scores, expected)
    with pytest.raises(ValueError, match="points from queries to later keys, which causal attention never sees"):
        attention_scores(tiny_model(), TOKENS, ahead, verbose=False)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("inductoin", "no pattern 'inductoin': there are 'previous_token', 'duplicate_token', 'induction'"),
        (torch.ones(8, 8).tril(), r"batch 5 and 9 positions; got shape \(8, 8\)"),
        (torch.ones(2, 9, 9).tril(), r"got shape \(2, 9, 9\)"),
        (2 * torch.eye(9), "between 0 and 1, like attention; got 0 to 2"),
        (torch.eye(9) - 0.5 * torch.ones(9, 9).tril(), "got -0.5 to 0.5"),
        (torch.full((9, 9), torch.nan).tril(), "got nan to nan"),
        (torch.zeros(9, 9), "the pattern gives no query of these tokens a key"),
    ],
    ids=["typo", "short", "batch", "above one", "below zero", "nan", "empty"],
)
def test_a_pattern_that_does_not_fit_raises(pattern: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        attention_scores(tiny_model(), TOKENS, pattern, verbose=False)


def test_tokens_that_do_not_repeat_have_no_induction_score() -> None:
    with pytest.raises(ValueError, match=r"'induction' gives no query .* \(see repeated_token_scores\)"):
        attention_scores(tiny_model(), torch.arange(9), "induction", verbose=False)


def test_a_function_that_makes_no_tensor_raises() -> None:
    with pytest.raises(TypeError, match=r"a pattern is a name, a tensor .* function from tokens to one; got list"):
        attention_scores(tiny_model(), TOKENS, lambda tokens: [[1.0]], verbose=False)  # type: ignore[arg-type]


def test_attention_that_is_not_finite_raises_and_names_the_layer() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.blocks[1].attn.W_Q[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="the attention of layer 1 is NaN or infinite"):
        attention_scores(model, TOKENS, "previous_token", verbose=False)
    read_patterns(model, TOKENS, lambda layer, attention: None, layers=[0])
    with pytest.raises(UnknownHookError, match=r"layers run 0-1"):
        read_patterns(model, TOKENS, lambda layer, attention: None, layers=[2])
    with pytest.raises(UnknownHookError, match="empty"):
        read_patterns(model, TOKENS, lambda layer, attention: None, layers=[])


def test_a_batch_size_of_zero_and_a_model_without_heads_raise() -> None:
    with pytest.raises(ValueError, match="batch_size is at least 1, got 0"):
        attention_scores(tiny_model(), TOKENS, "induction", batch_size=0, verbose=False)
    empty = tiny_model(n_layers=0)
    with pytest.raises(ValueError, match="no heads to score"):
        attention_scores(empty, TOKENS, "induction", verbose=False)
    with pytest.raises(ValueError, match="no heads to score"):
        copying_scores(empty, verbose=False)


# What comes back


def test_top_gives_the_highest_first_under_the_labels_of_the_model() -> None:
    model = tiny_model(n_heads=4, n_layers=3, d_model=8)
    found = HeadScores("made up", torch.arange(12.0).reshape(3, 4).flip(0) / 12)
    best = found.top(3)
    assert [(one.layer, one.head) for one in best] == [(0, 3), (0, 2), (0, 1)]
    assert [one.score for one in best] == pytest.approx([11 / 12, 10 / 12, 9 / 12])
    assert [one.label for one in best] == ["L0H3", "L0H2", "L0H1"]
    assert found.labels == list(model.all_head_labels)
    lines = str(found).splitlines()
    assert lines[0] == "made up, the highest of 12 heads:"
    assert lines[1].split() == ["L0H3", "0.917"]
    assert len(lines) == 6


@pytest.mark.parametrize("k", [0, -1, 7])
def test_asking_for_more_heads_than_there_are_raises(k: int) -> None:
    with pytest.raises(ValueError, match=rf"top\({k}\): there are 6 heads"):
        HeadScores("made up", torch.zeros(2, 3)).top(k)


def test_attention_scores_draw_as_a_map_of_heads() -> None:
    found = attention_scores(tiny_model(), TOKENS, "induction", verbose=False)
    heat = plotting.head_scores(found.scores, found.kind).data[0]
    assert heat.z.tolist() == found.scores.tolist()


# The bundled model, causally


def second_half_log_prob(silent: tuple[int, int] | None) -> float:
    """How well the repeat is predicted while a head writes nothing."""

    def silence(z: Tensor, hook: Any) -> Tensor:
        z[:, :, silent[1]] = 0.0
        return z

    tokens = repeated_random_tokens(8, 24, DEMO.cfg.d_vocab, generator(5))
    hooks = [] if silent is None else [(f"blocks.{silent[0]}.attn.hook_z", silence)]
    with torch.no_grad():
        logits = DEMO.run_with_hooks(tokens, fwd_hooks=hooks)
    return next_token_scores(logits, tokens).second_half().mean_log_prob()


def test_the_heads_found_in_the_bundled_model_are_those_without_which_it_predicts_worst() -> None:
    previous = repeated_token_scores(DEMO, "previous_token", verbose=False).top(1)[0]
    induction = repeated_token_scores(DEMO, "induction", verbose=False).top(1)[0]
    assert (previous.label, induction.label) == ("L0H0", "L1H1")
    assert min(previous.score, induction.score) > 0.95
    for found in (previous, induction):
        silenced = [second_half_log_prob((found.layer, head)) for head in range(4)]
        assert min(range(4), key=silenced.__getitem__) == found.head
    assert second_half_log_prob((0, 0)) < second_half_log_prob(None) - 1


def test_the_induction_head_of_the_bundled_model_is_the_one_that_copies() -> None:
    copying = copying_scores(DEMO, verbose=False)
    assert copying.kind == "copying"
    assert copying.top(1)[0].label == "L1H1"
    assert copying.top(1)[0].score > 0.99
