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

from hooked_lm.tasks import (
    TASKS,
    Example,
    Task,
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
    word_tokenizer,
)
from hooked_lm.tasks.mixture import DOCUMENTS
from hooked_lm.tasks.words import CAPITALS, EVENTS, OPPOSITES, RELATIONS
from tests.tasks_helpers import documents, names_in


@pytest.fixture(scope="module")
def words() -> Any:
    return word_tokenizer(lexicon())


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
