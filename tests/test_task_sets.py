"""Task sets and their tokens, the mixture to train on, and the bundled model of the tasks."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch

from hooked_lm import HookedTransformer, HookedTransformerConfig, bundled
from hooked_lm.circuits.induction import repeated_random_tokens
from hooked_lm.tasks import (
    Example,
    TaskBatches,
    TaskSet,
    get_task,
    greater_than,
    ioi,
    lexicon,
    score,
    word_tokenizer,
)
from hooked_lm.tasks.words import CAPITALS
from tests.tasks_helpers import documents, names_in


@pytest.fixture(scope="module")
def words() -> Any:
    return word_tokenizer(lexicon())


@pytest.fixture(scope="module")
def model(words: Any) -> HookedTransformer:
    cfg = HookedTransformerConfig(
        n_layers=1, d_model=16, n_heads=2, n_ctx=128, d_vocab=len(words), act_fn="gelu_new", seed=0
    )
    return HookedTransformer(cfg, words)


# Task sets and tokens


def test_a_set_without_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        TaskSet("ioi", ())


def test_an_answer_of_several_tokens_is_named(words: Any) -> None:
    examples = TaskSet("ioi", (Example("When", " Mary", " unheardof", "When", None),))
    with pytest.raises(ValueError, match="ioi example 0: an answer has to be one token, but ' unheardof' is"):
        examples.check(words)


def test_a_corrupted_answer_of_several_tokens_is_named(words: Any) -> None:
    examples = TaskSet("ioi", (Example("When", " Mary", " John", "When", " Zebedee"),))
    with pytest.raises(ValueError, match="ioi example 0: an answer has to be one token, but ' Zebedee' is"):
        examples.check(words)


def test_prompts_of_different_length_are_named(words: Any) -> None:
    examples = TaskSet("ioi", (Example("When John", " Mary", " John", "When John and Mary", None),))
    with pytest.raises(ValueError, match=r"the clean prompt 'When John' is 2 tokens and the corrupted one .* is 4"):
        examples.check(words)


def test_tokens_are_the_prompts_with_bos_and_the_answers(model: HookedTransformer) -> None:
    examples = get_task("relations").examples(8)
    tokens = examples.tokens(model)
    torch.testing.assert_close(tokens.clean, model.to_tokens(examples.clean))
    torch.testing.assert_close(tokens.corrupted, model.to_tokens(examples.corrupted))
    assert tokens.answers.tolist() == [model.to_single_token(word) for word in examples.answers]
    assert tokens.wrong.tolist() == [model.to_single_token(word) for word in examples.wrong]


def test_prompts_of_several_lengths_come_in_groups(model: HookedTransformer) -> None:
    examples = get_task("ioi").examples(40)
    with pytest.raises(ValueError, match=r"the ioi prompts have \d+ to \d+ tokens.*use groups"):
        examples.tokens(model)
    groups = examples.groups(model.tokenizer)
    widths = [group.tokens(model).clean.shape[1] for group in groups]
    assert widths == sorted(set(widths))
    assert {example for group in groups for example in group.examples} == set(examples.examples)


def test_a_model_without_tokenizer_is_an_error() -> None:
    cfg = HookedTransformerConfig(n_layers=1, d_model=4, n_heads=1, n_ctx=8, d_vocab=9, attn_only=True)
    with pytest.raises(ValueError, match="no tokenizer"):
        get_task("ioi").examples(2).tokens(HookedTransformer(cfg))


def test_the_score_counts_what_the_logits_say(model: HookedTransformer) -> None:
    examples = get_task("relations").examples(12)
    tokens = examples.tokens(model)
    logits = model(tokens.clean)[:, -1]
    row = torch.arange(12)
    found = score(model, examples, batch=5)
    assert found.n == 12
    assert found.top == pytest.approx((logits.argmax(-1) == tokens.answers).double().mean().item())
    difference = logits[row, tokens.answers] - logits[row, tokens.wrong]
    assert found.logit_diff == pytest.approx(difference.double().mean().item(), rel=1e-4)
    assert found.preferred == pytest.approx((difference > 0).double().mean().item())


# The tokenizer


def test_a_year_is_two_tokens_and_unknown_text_survives(words: Any) -> None:
    assert words.tokenize(" 1732") == ["Ġ17", "32"]
    text = "An unheard-of Zebedee: 3.14159 naïve ✓\n\n  spaces"
    assert words.decode(words(text)["input_ids"]) == text
    assert words.bos_token_id == words.eos_token_id == 0


def test_the_tokenizer_is_the_same_each_time_and_after_saving(words: Any, tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    assert word_tokenizer(lexicon()).get_vocab() == words.get_vocab()
    words.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in documents("ioi", 20) + documents("relations", 20) + ["Zebedee"]:
        assert loaded(text)["input_ids"] == words(text)["input_ids"]


# The mixture


def test_a_batch_is_a_function_of_seed_and_step(words: Any) -> None:
    batches = TaskBatches(words, rows=3, width=64)
    tokens, weights = batches(5)
    assert tokens.shape == weights.shape == (3, 64)
    torch.testing.assert_close(batches(5)[0], tokens)
    assert not torch.equal(batches(6)[0], tokens)
    assert not torch.equal(TaskBatches(words, rows=3, width=64, seed=1)(5)[0], tokens)


def test_rows_are_documents_with_bos_before_each_and_only_random_tokens_go_uncounted(words: Any) -> None:
    batches = TaskBatches(words, rows=40, shares={"ioi": 1, "repeated_tokens": 1})
    tokens, weights = batches(0)
    assert bool((tokens[:, 0] == words.bos_token_id).all())
    assert bool((weights[:, 0] == 0).all())
    whole = [text for row in tokens for text in words.decode(row).split("<|endoftext|>")[1:-1]]
    told = [text for text in whole if re.search(r" to [A-Z][a-z]+\.$", text)]
    assert len(told) > 40
    for text in told:
        assert not any(ioi.are_held_out(*pair) for pair in itertools.combinations(sorted(set(names_in(text))), 2))
    assert 0.3 < weights.mean().item() < 0.9


def test_a_row_of_text_counts_every_token_but_the_first(words: Any) -> None:
    _, weights = TaskBatches(words, rows=2, shares={"relations": 1})(0)
    assert bool((weights[:, 1:] == 1).all())


def test_early_steps_have_shares_of_their_own(words: Any) -> None:
    batches = TaskBatches(words, rows=2, shares={"ioi": 1}, early_steps=3, early_shares={"greater_than": 1})
    early, late = (words.decode(batches(step)[0].flatten()) for step in (2, 3))
    assert "lasted" in early
    assert "lasted" not in late


def test_early_random_tokens_are_of_a_small_alphabet(words: Any) -> None:
    batches = TaskBatches(
        words,
        rows=20,
        shares={"repeated_tokens": 1},
        early_steps=1,
        early_shares={"repeated_tokens": 1},
        early_tokens=70,
    )
    early, late = (batches(step)[0].unique() for step in (0, 1))
    assert 70 <= len(batches.early_alphabet) <= 75
    assert set(early.tolist()) <= {words.bos_token_id, *batches.early_alphabet}
    assert len(late) > 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_shares": {"verse": 1}}, r"unknown documents \['verse'\]"),
        ({"shares": {"poetry": 1}}, r"unknown documents \['poetry'\]"),
        ({"early_tokens": 50}, r"early_tokens is at least 60, .* at most \d+, .*; got 50"),
        ({"rows": 0}, "1 row of 16 tokens at least, not 0 of 128"),
        ({"width": 8}, "not 24 of 8"),
    ],
)
def test_a_mixture_of_what_there_is_not_is_an_error(words: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskBatches(words, **options)


# The bundled model


DEMO = "demo-tasks-4l"


@pytest.fixture(scope="module")
def demo() -> HookedTransformer:
    return HookedTransformer.from_pretrained(DEMO)


def test_the_bundled_model_is_a_small_gpt2_with_the_tokenizer_of_the_tasks(demo: HookedTransformer, words: Any) -> None:
    assert demo.cfg.model_name == DEMO
    assert demo.cfg.original_architecture == "GPT2LMHeadModel"
    assert demo.tokenizer is not None
    assert demo.tokenizer.get_vocab() == words.get_vocab()
    folder = bundled.find(DEMO)
    assert folder is not None
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [
        ("ioi", {"order": "abba"}, 0.95),
        ("ioi", {"order": "baba"}, 0.95),
        ("capitals", {"n": len(CAPITALS)}, 0.95),
        ("relations", {"shots": 5}, 0.9),
        ("repeated_tokens", {}, 0.9),
    ],
)
def test_the_bundled_model_gives_the_answers_that_training_never_showed(
    demo: HookedTransformer, name: str, options: dict[str, Any], least: float
) -> None:
    assert score(demo, get_task(name).examples(**{"n": 100, "seed": 7, **options})).top >= least


def test_the_bundled_model_knows_that_wars_end_after_they_begin(demo: HookedTransformer) -> None:
    examples = get_task("greater_than").examples(100, 7)
    logits = demo(examples.tokens(demo).clean)[:, -1]
    assert greater_than.probability_above(logits, examples, demo.tokenizer).mean() > 0.85


def test_the_bundled_model_continues_repeats_of_any_tokens(demo: HookedTransformer) -> None:
    tokens = repeated_random_tokens(10, 50, demo.cfg.d_vocab, torch.Generator().manual_seed(7))
    right = demo(tokens)[:, 51:-1].argmax(-1) == tokens[:, 52:]
    assert right.double().mean() >= 0.9
