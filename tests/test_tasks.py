"""The tasks: examples say what they should, training text never shows what is held out, tokenizers are checked."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch

from hooked_lm import HookedTransformer, HookedTransformerConfig, bundled
from hooked_lm.circuits.induction import repeated_random_tokens
from hooked_lm.tasks import (
    TASKS,
    Example,
    Task,
    TaskBatches,
    TaskSet,
    capitals,
    get_task,
    greater_than,
    ioi,
    lexicon,
    prose,
    register_task,
    relations,
    repeated_tokens,
    score,
    word_tokenizer,
)
from hooked_lm.tasks.mixture import DOCUMENTS
from hooked_lm.tasks.words import CAPITALS, EVENTS, NAMES, OPPOSITES, RELATIONS


@pytest.fixture(scope="module")
def words() -> Any:
    return word_tokenizer(lexicon())


@pytest.fixture(scope="module")
def model(words: Any) -> HookedTransformer:
    cfg = HookedTransformerConfig(
        n_layers=1, d_model=16, n_heads=2, n_ctx=128, d_vocab=len(words), act_fn="gelu_new", seed=0
    )
    return HookedTransformer(cfg, words)


def documents(name: str, n: int = 4000, seed: int = 0) -> list[str]:
    return list(itertools.islice(get_task(name).documents(seed), n))


# Names


def test_a_task_is_found_by_its_name() -> None:
    assert set(TASKS) == {"ioi", "repeated_tokens", "capitals", "relations", "greater_than"}
    assert all(get_task(name).name == name for name in TASKS)


def test_an_unknown_task_is_an_error_that_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'ioy': the tasks are ioi, .*greater_than"):
        get_task("ioy")


@pytest.fixture
def counting() -> Iterator[Task]:
    """A task that is registered, and afterwards no longer."""
    task = Task(
        "counting",
        "the number that follows",
        lambda rng: " one two three",
        lambda n, seed: TaskSet("counting", (Example(" one two", " three", " two", " two two", None),) * n),
        lambda: iter([" one two three zebracrossing"]),
    )
    register_task(task)
    yield task
    del TASKS["counting"]


def test_a_registered_task_is_found_by_its_name_and_its_words_are_in_the_lexicon(counting: Task) -> None:
    assert get_task("counting") is counting
    assert get_task("counting").examples(3).answers == [" three"] * 3
    assert " one two three zebracrossing" in set(lexicon())


def test_a_taken_or_empty_name_of_a_task_is_refused(counting: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests
    for name in ("counting", "ioi", ""):
        with pytest.raises(ValueError, match=f"the task '{name}' cannot be registered: it is (taken|an empty name)"):
            register_task(dataclasses.replace(counting, name=name))
    assert get_task("ioi") is ioi.TASK
    with pytest.raises(TypeError, match=r"a hooked_lm\.tasks\.Task, got module"):
        register_task(ioi)  # type: ignore[arg-type]


# All tasks


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_gives_the_same_text_and_examples_and_another_gives_others(name: str) -> None:
    task = get_task(name)
    assert documents(name, 20) == documents(name, 20)
    assert documents(name, 20) != documents(name, 20, seed=1)
    assert task.examples(20) == task.examples(20)
    assert task.examples(20) != task.examples(20, seed=1)


@pytest.mark.parametrize("name", TASKS)
def test_the_demo_tokenizer_suits_every_task(name: str, words: Any) -> None:
    get_task(name).examples(60).check(words)


@pytest.mark.parametrize("name", [*DOCUMENTS, "repeated_tokens"])
def test_every_word_of_the_text_is_one_token(name: str, words: Any) -> None:
    rng = random.Random(0)
    draw = TASKS[name].document if name in TASKS else DOCUMENTS[name]
    pieces = words.backend_tokenizer.pre_tokenizer
    for _ in range(500):
        text = draw(rng)
        tokens = words(text, add_special_tokens=False)["input_ids"]
        assert len(tokens) == len(pieces.pre_tokenize_str(text)), text
        assert words.decode(tokens) == text


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("n", [0, -3])
def test_a_set_has_one_example_at_least(name: str, n: int) -> None:
    with pytest.raises(ValueError, match=f"1 or more, not {n}"):
        get_task(name).examples(n)


# Indirect object identification


def names_in(text: str) -> list[str]:
    return [word for word in re.findall(r"[A-Z][a-z]+", text) if word in NAMES]


@pytest.mark.parametrize("order", ioi.ORDERS)
def test_the_ioi_answer_is_the_name_that_comes_once(order: str) -> None:
    for example in ioi.make_examples(200, order=order).examples:
        first, second, giver = names_in(example.prompt)
        assert giver == (second if order == "abba" else first)
        assert {example.answer, example.wrong} == {f" {first}", f" {second}"}
        assert example.wrong == f" {giver}"


def test_the_ioi_swap_changes_the_giver_alone_and_turns_the_answer_round() -> None:
    for example in ioi.make_examples(100).examples:
        first, second, giver = names_in(example.corrupted)
        assert [first, second] == names_in(example.prompt)[:2]
        assert f" {giver}" == example.answer
        assert example.corrupted_answer == example.wrong


def test_the_abc_variant_has_a_third_giver_and_no_answer() -> None:
    for example in ioi.make_examples(100, corruption="abc").examples:
        assert len(set(names_in(example.corrupted))) == 3
        assert example.corrupted_answer is None


def test_training_never_shows_two_names_of_a_held_out_pair_and_examples_show_no_other() -> None:
    seen = set()
    for text in documents("ioi"):
        for one, other in itertools.combinations(set(names_in(text)), 2):
            assert not ioi.are_held_out(one, other), text
            seen.add(frozenset((one, other)))
    for example in ioi.make_examples(500).examples:
        first, second, _ = names_in(example.prompt)
        assert ioi.are_held_out(first, second)
        assert frozenset((first, second)) not in seen


def test_prose_has_one_name_at_most() -> None:
    rng = random.Random(0)
    assert all(len(set(names_in(prose.document(rng)))) <= 1 for _ in range(2000))


def test_every_ioi_template_is_used_and_one_can_be_asked_for() -> None:
    starts = [text.split("{")[0] for text in ioi.TEMPLATES]
    prompts = ioi.make_examples(40).clean
    assert all(any(prompt.startswith(start) for prompt in prompts) for start in starts)
    assert all(prompt.startswith("After ") for prompt in ioi.make_examples(20, template=1).clean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corruption": "cba"}, "unknown corruption 'cba': it is one of 'swap', 'abc'"),
        ({"order": "abab"}, "unknown order 'abab'"),
        ({"template": 99}, "no IOI template 99"),
    ],
)
def test_unknown_ioi_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_task("ioi").examples(4, **options)


# Repeated tokens


def test_the_repeated_words_end_where_the_answer_follows() -> None:
    for length in (10, 20):
        for example in repeated_tokens.make_examples(30, length=length).examples:
            block = example.prompt.split()[:length]
            again = example.prompt.split()[length:]
            assert again == block[: length // 2]
            assert example.answer == f" {block[length // 2]}"
            assert example.corrupted.split()[length // 2] == example.wrong.strip()


def test_training_repeats_have_no_held_out_length() -> None:
    for text in documents("repeated_tokens", 500):
        block = text.split()[: len(text.split()) // 2]
        assert text.split() == block * 2
        assert len(block) not in repeated_tokens.HELD_OUT_LENGTHS


def test_drawn_tokens_are_determined_where_the_pair_came_before() -> None:
    rng = random.Random(0)
    for _ in range(300):
        room = rng.randint(8, 120)
        drawn, determined = repeated_tokens.draw_tokens(rng, range(1, 400), room)
        assert len(drawn) == len(determined) <= room
        again = next(place for place, token in enumerate(drawn) if token in drawn[:place])
        assert again in repeated_tokens.TRAINED_LENGTHS  # the whole block is what came before its first repeat
        followers: dict[int, int] = {}
        for (before, token), known in zip(itertools.pairwise(drawn), determined[1:], strict=True):
            assert not known or followers[before] == token
            followers.setdefault(before, token)


def test_a_length_that_is_trained_on_is_refused() -> None:
    with pytest.raises(ValueError, match="a block of 21 words is not held out"):
        repeated_tokens.make_examples(3, length=21)


# Capitals


def asked(text: str) -> Iterator[tuple[str, int]]:
    """The countries a text asks about, and how."""
    for question in re.findall(r"Q: (.*)", text):
        (country,) = (word for word in re.findall(r"[A-Z][a-z]+", question) if word in CAPITALS)
        yield country, capitals.QUESTIONS.index(question.replace(country, "{country}"))


def test_training_never_asks_about_a_country_as_the_examples_do() -> None:
    seen = {pair for text in documents("capitals") for pair in asked(text)}
    assert len(seen) == len(CAPITALS) * (len(capitals.QUESTIONS) - 1)
    for shots in (0, 2):
        for example in capitals.make_examples(len(CAPITALS), shots=shots).examples:
            *before, last = asked(example.prompt)
            assert last not in seen
            assert set(before) <= seen
            assert len(before) == shots
            assert example.answer == f" {CAPITALS[last[0]]}"


def test_the_corrupted_prompt_asks_the_same_about_another_country() -> None:
    for example in capitals.make_examples(40).examples:
        ((clean, question),), ((other, other_question),) = asked(example.prompt), asked(example.corrupted)
        assert clean != other
        assert question == other_question
        assert example.corrupted_answer == example.wrong == f" {CAPITALS[other]}"


def test_one_question_can_be_asked_of_all_countries_when_held_out_ones_are_not_wanted() -> None:
    examples = capitals.make_examples(len(CAPITALS), question=0, held_out=False)
    assert "Q: What is the capital of France?\nA:" in examples.clean
    with pytest.raises(ValueError, match=rf"there are \d+ countries to ask about in this way, not {len(CAPITALS)}"):
        capitals.make_examples(len(CAPITALS), question=0)


@pytest.mark.parametrize(
    ("options", "message"), [({"question": 4}, "no question 4"), ({"shots": -1}, "shots are 0 to 9, not -1")]
)
def test_unknown_options_for_capitals_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_task("capitals").examples(4, **options)


# Relations


def test_most_words_take_part_in_several_relations() -> None:
    counts = [sum(word in table for table in RELATIONS.values()) for word in {w for t in RELATIONS.values() for w in t}]
    assert sum(count > 1 for count in counts) / len(counts) > 0.6
    assert all(OPPOSITES[OPPOSITES[word]] == word for word in OPPOSITES)


def pairs_of(text: str) -> list[tuple[str, str]]:
    return [(word, answer) for word, answer in re.findall(r"(\w+): (\w+)", text)]


def relation_of(pairs: list[tuple[str, str]]) -> set[str]:
    """The relations that all pairs are in."""
    return {name for name, table in RELATIONS.items() if all(table.get(word) == answer for word, answer in pairs)}


def test_training_pairs_are_of_one_relation_and_no_neighbours_are_held_out() -> None:
    for text in documents("relations"):
        pairs = pairs_of(text)
        names = relation_of(pairs)
        assert names, text
        for (before, _), (query, _) in itertools.pairwise(pairs):
            assert not all(relations.are_held_out(name, before, query) for name in names), text
        words = [word for pair in pairs for word in pair]
        assert len(set(words)) == len(words), text


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_query_stands_after_a_word_that_training_never_shows_before_it(relation: str) -> None:
    for example in relations.make_examples(60, relation=relation).examples:
        pairs, query = pairs_of(example.prompt), re.findall(r"(\w+):$", example.prompt)[0]
        assert len(pairs) == 5
        assert relation in relation_of(pairs)
        assert relations.are_held_out(relation, pairs[-1][0], query)
        assert example.answer == f" {RELATIONS[relation][query]}"
        assert query not in {word for pair in pairs for word in pair}


def test_shots_of_another_relation_make_the_wrong_answer_right() -> None:
    for example in relations.make_examples(100).examples:
        query = re.findall(r"(\w+):$", example.prompt)[0]
        assert example.corrupted.endswith(f" {query}:")
        assert any(
            f" {RELATIONS[name][query]}" == example.corrupted_answer
            for name in relation_of(pairs_of(example.corrupted))
        )
        assert example.corrupted_answer == example.wrong != example.answer


def test_shuffled_shots_keep_words_and_answers_and_no_pair() -> None:
    for example in relations.make_examples(50, corruption="shuffled").examples:
        clean, shuffled = pairs_of(example.prompt), pairs_of(example.corrupted)
        assert [word for word, _ in clean] == [word for word, _ in shuffled]
        assert sorted(answer for _, answer in clean) == sorted(answer for _, answer in shuffled)
        assert not set(clean) & set(shuffled)
        assert example.corrupted_answer is None


def test_a_zero_shot_prompt_is_the_query_alone() -> None:
    for example in relations.make_examples(50, shots=0, relation="opposite").examples:
        assert re.fullmatch(r"\w+:", example.prompt)
        assert example.answer == f" {OPPOSITES[example.prompt[:-1]]}"
        assert example.corrupted_answer == example.wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relation": "synonym"}, "unknown relation 'synonym': it is one of 'opposite'"),
        ({"corruption": "random"}, "unknown corruption 'random'"),
        ({"corruption": "shuffled", "shots": 1}, "needs 2 to 11 shots, not 1"),
        ({"shots": 12}, "shots, not 12"),
    ],
)
def test_unknown_options_for_relations_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_task("relations").examples(4, **options)


# Greater than

YEARS = re.compile(r"The (\w+) lasted from the year (\d\d)(\d\d) to the year (\d\d)(\d\d)?")


def test_training_years_rise_and_no_combination_is_held_out() -> None:
    for text in documents("greater_than"):
        event, century, year, other_century, later = YEARS.match(text).groups()  # type: ignore[union-attr]
        assert event in EVENTS
        assert century == other_century
        assert int(later) > int(year)
        assert not greater_than.are_held_out(event, century, year)


def test_examples_start_in_held_out_years() -> None:
    for example in greater_than.make_examples(200).examples:
        event, century, year, *_ = YEARS.match(example.prompt).groups()  # type: ignore[union-attr]
        assert greater_than.are_held_out(event, century, year)
        assert int(example.answer) == int(year) + 1
        assert example.wrong == year
        assert example.corrupted == example.prompt.replace(f"{century}{year}", f"{century}01")


def test_the_probability_above_a_year_is_the_sum_over_later_numbers(words: Any) -> None:
    examples = TaskSet("greater_than", (Example("", "98", "97", "", None), Example("", "51", "50", "", None)))
    logits = torch.randn(2, len(words), generator=torch.Generator().manual_seed(0))
    found = greater_than.probability_above(logits, examples, words)
    ids = words.convert_tokens_to_ids(["98", "99"])
    torch.testing.assert_close(found[0], logits[0].softmax(-1)[ids].sum())
    assert 0 < found[1] < 1
    with pytest.raises(ValueError, match="2 examples, but logits of 1 prompts"):
        greater_than.probability_above(logits[:1], examples, words)


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
