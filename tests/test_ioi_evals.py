"""`IOIDataset` and `ioi_eval`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hooked_lm import HookedTransformer
from hooked_lm.evals import IOIDataset, ioi_eval
from hooked_lm.tasks import word_tokenizer
from hooked_lm.tokenization import encode, single_token
from tests.evals_helpers import MODEL, TINY, WORDS, recorded_tokens, seeded, text_model
from tests.helpers import tiny_model, tiny_tokenizer

TEMPLATE = "[B] and [A] met, and [B] gave the [THING] to [A]"
NOUNS = {"THING": ["ball", "book"]}
THREE = ["Anna", "Tom", "Kate"]


# IOIDataset


def text_of(item: dict[str, Tensor], tokenizer: Any = WORDS) -> str:
    return tokenizer.decode(item["prompt"].tolist(), skip_special_tokens=True)


def test_an_item_is_a_sentence_whose_last_token_is_io_and_in_which_s_is_named_again() -> None:
    dataset = IOIDataset(WORDS, num_samples=61)
    assert len(dataset) == 61
    for index in range(61):
        item, sample = dataset[index], dataset.samples[index]
        assert set(item) == {"prompt", "IO", "S"}
        assert [(value.ndim, value.dtype) for value in item.values()] == [(1, torch.int64)] * 3
        prompt, io, s = item["prompt"].tolist(), item["IO"].tolist(), item["S"].tolist()
        assert io == [single_token(WORDS, f" {sample['IO']}")]
        assert s == [single_token(WORDS, f" {sample['S']}")]
        assert io != s
        assert (prompt[0], prompt[-1]) == (WORDS.bos_token_id, io[0])
        assert (prompt.count(io[0]), prompt.count(s[0])) == (2, 2)
        assert text_of(item) == sample["text"]
        assert "[" not in sample["text"]
    with pytest.raises(IndexError):
        dataset[61]


def test_the_default_sentences_have_every_template_and_many_names_in_both_orders() -> None:
    dataset = IOIDataset(WORDS, num_samples=400)
    starts = {sample["text"].split()[0] for sample in dataset.samples}
    assert {"When", "After", "Then,", "While", "Yesterday", "Friends", "Then", "As", "Because"} == starts
    first = [sample["text"].index(sample["IO"]) < sample["text"].index(sample["S"]) for sample in dataset.samples]
    assert 120 < sum(first) < 280
    assert {sample["IO"] for sample in dataset.samples} == set(IOIDataset.get_default_names())
    assert {sample["S"] for sample in dataset.samples} == set(IOIDataset.get_default_names())


def test_the_default_words_can_be_asked_for_and_given_back() -> None:
    defaults: dict[str, Any] = {
        "templates": IOIDataset.get_default_templates(),
        "names": IOIDataset.get_default_names(),
        "nouns": IOIDataset.get_default_nouns(),
    }
    assert IOIDataset(WORDS, **defaults, num_samples=9).samples == IOIDataset(WORDS, num_samples=9).samples
    defaults["names"].clear()
    assert IOIDataset.get_default_names()


def test_own_templates_names_and_nouns_are_the_ones_used() -> None:
    dataset = IOIDataset(WORDS, [TEMPLATE, "Then [A] saw [B]. [B] hit [A]"], THREE, NOUNS, num_samples=200)
    expected = {
        (f"{b} and {a} met, and {b} gave the {noun} to {a}", a, b)
        for a in THREE
        for b in THREE
        for noun in NOUNS["THING"]
        if a != b
    } | {(f"Then {a} saw {b}. {b} hit {a}", a, b) for a in THREE for b in THREE if a != b}
    assert {(sample["text"], sample["IO"], sample["S"]) for sample in dataset.samples} == expected


def test_a_kind_of_noun_is_one_word_throughout_a_sentence() -> None:
    template = "[A] had a [THING], [B] another [THING], and [B] gave it to [A]"
    for sample in IOIDataset(WORDS, [template], THREE, NOUNS, num_samples=20).samples:
        assert sorted(sample["text"].count(noun) for noun in NOUNS["THING"]) == [0, 2]


def test_symmetric_sentences_come_in_pairs_with_the_names_exchanged() -> None:
    dataset = IOIDataset(WORDS, num_samples=40, symmetric=True)
    assert len(dataset) == 40
    for index in range(0, 40, 2):
        one, other = dataset[index], dataset[index + 1]
        io, s = one["IO"], one["S"]
        assert torch.equal(torch.cat((other["S"], other["IO"])), torch.cat((io, s)))
        exchanged = one["prompt"].where(one["prompt"] != io, s).where(one["prompt"] != s, io)
        assert torch.equal(other["prompt"], exchanged)
    with pytest.raises(ValueError, match="even where symmetric=True; got 41"):
        IOIDataset(WORDS, num_samples=41, symmetric=True)


def test_bos_is_there_once_or_not_at_all() -> None:
    adds_bos = tiny_tokenizer()
    adds_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert adds_bos("John")["input_ids"][0] == 0
    for tokenizer in (WORDS, adds_bos):
        build: dict[str, Any] = {
            "names": ["John", "Mary"],
            "templates": ["Then [A] met [B]. [B] hit [A]"],
            "num_samples": 5,
        }
        bos, plain = (IOIDataset(tokenizer, prepend_bos=prepend, **build) for prepend in (True, False))
        for index in range(5):
            with_bos, without = bos[index]["prompt"].tolist(), plain[index]["prompt"].tolist()
            assert with_bos == [tokenizer.bos_token_id, *without]
            assert tokenizer.bos_token_id not in without


def test_changing_an_item_changes_no_other() -> None:
    dataset = IOIDataset(WORDS, num_samples=2)
    before = dataset[0]["prompt"].clone()
    dataset[0]["prompt"].zero_()
    assert torch.equal(dataset[0]["prompt"], before)


def test_the_same_generator_gives_the_same_sentences_and_another_gives_others() -> None:
    build: dict[str, Any] = {"num_samples": 20}
    default = IOIDataset(WORDS, **build).samples
    assert IOIDataset(WORDS, **build).samples == default
    one, again, other = (IOIDataset(WORDS, **build, generator=seeded(seed)).samples for seed in (5, 5, 6))
    assert one == again
    assert one not in (other, default)
    running = seeded(5)
    assert IOIDataset(WORDS, **build, generator=running).samples == one
    assert IOIDataset(WORDS, **build, generator=running).samples != one


# Names and nouns of several tokens


def test_a_seed_is_a_generator_with_that_seed() -> None:
    build = {"num_samples": 20}
    by_seed = IOIDataset(WORDS, **build, seed=5).samples
    assert by_seed == IOIDataset(WORDS, **build, generator=seeded(5)).samples
    assert by_seed != IOIDataset(WORDS, **build).samples == IOIDataset(WORDS, **build, seed=0).samples
    with pytest.raises(ValueError, match="got both"):
        IOIDataset(WORDS, **build, seed=5, generator=seeded(5))


def test_default_words_that_are_not_one_token_are_left_out() -> None:
    # Of the default words the tiny tokenizer has two names, and no place or object.
    dataset = IOIDataset(TINY, ["Then [A] met [B]. [B] hit [A]"], num_samples=30)
    assert dataset.names == ["John", "Mary"]
    assert {sample["IO"] for sample in dataset.samples} == {"John", "Mary"}
    with pytest.raises(ValueError, match=r"\[LOCATION\], but there are no nouns of that kind that this tokenizer has"):
        IOIDataset(TINY)
    only = word_tokenizer([" John gave"])
    with pytest.raises(ValueError, match=r"of the default names this tokenizer has as one token \['John'\]"):
        IOIDataset(only, ["Then [A] met [B]. [B] hit [A]"])


def test_a_given_name_or_noun_of_several_tokens_raises_by_name() -> None:
    own: dict[str, Any] = {"templates": [TEMPLATE], "names": THREE, "nouns": NOUNS}
    with pytest.raises(ValueError, match=r"the IOI name 'Bartholomew' should be one token here, .* and is \d+: \["):
        IOIDataset(WORDS, **{**own, "names": ["Anna", "Bartholomew", "Tom"]})
    with pytest.raises(ValueError, match=r"the IOI noun 'bottle of milk' should be one token here, .* and is 3: "):
        IOIDataset(WORDS, **{**own, "nouns": {"THING": ["ball", "bottle of milk"]}})
    with pytest.raises(ValueError, match="the IOI name 'Sarah' should be one token"):
        IOIDataset(TINY, ["Then [A] met [B]. [B] hit [A]"], names=["John", "Sarah"])


def unknowing_tokenizer() -> PreTrainedTokenizerFast:
    """One of whole words, for which every other word is `[UNK]`."""
    vocab = {word: index for index, word in enumerate(["[UNK]", "to", "Anna", "Tom", "Then", "met", "hit", "[BOS]"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", bos_token="[BOS]")


def test_the_unknown_token_is_nobodys_name() -> None:
    tokenizer, template = unknowing_tokenizer(), "Then [A] met [B] Then [B] hit [A]"
    assert IOIDataset(tokenizer, [template], ["Anna", "Tom"], num_samples=2)[0]["prompt"].shape == (9,)
    assert IOIDataset(tokenizer, [template], num_samples=2).names == ["Tom", "Anna"]
    with pytest.raises(ValueError, match=r"the IOI name 'Kate' should be one token here, .* and is none of its own"):
        IOIDataset(tokenizer, [template], ["Anna", "Kate"])


def spacing_tokenizer() -> PreTrainedTokenizerFast:
    """One that puts a space of its own in front of every text, as Llama 2's does."""
    words = ["to", "Anna", "Tom", "Then", "met", "hit"]
    vocab = {piece: index for index, piece in enumerate(["<s>", "_", *(f"_{word}" for word in words)])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="_"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
    backend.pre_tokenizer = pre_tokenizers.Split("_", "merged_with_next")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token=None)


def test_a_name_is_one_token_where_it_is_one_inside_a_text() -> None:
    tokenizer = spacing_tokenizer()
    with pytest.raises(ValueError, match="is 2 tokens, not one"):
        single_token(tokenizer, " Anna")
    dataset = IOIDataset(tokenizer, ["Then [A] met [B] Then [B] hit [A]"], ["Anna", "Tom"], num_samples=2)
    assert sorted([dataset[0]["IO"].item(), dataset[0]["S"].item()]) == [3, 4]


def test_a_name_that_cannot_be_told_from_what_is_before_it_raises() -> None:
    # Here the space belongs to the word before it.
    vocab = {word: index for index, word in enumerate(["to", "to ", "Anna", "Tom"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="to"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=None)
    assert encode(tokenizer, "to Anna") == [1, 2]
    with pytest.raises(ValueError, match=r"the IOI name 'Anna' should be one token here, .* and is none of its own"):
        IOIDataset(tokenizer, ["to [A] to [B] to [A]"], ["Anna", "Tom"], prepend_bos=False)


def test_too_few_names_and_a_name_twice_raise() -> None:
    for names in (["Anna"], ["Anna", "Tom", "Anna"]):
        with pytest.raises(ValueError, match=r"at least two names, each a token of its own; got \['Anna'"):
            IOIDataset(WORDS, [TEMPLATE], names, NOUNS)


@pytest.mark.parametrize(
    "template",
    [
        "[B] gave the ball to [A].",
        "[A] and [B] met, and [B] gave the ball to",
        "Then [B] gave the ball to [A]",
        "Then [A] gave the ball to [A]",
        "[A] and [B] met: [B] hit-[A]",
    ],
)
def test_a_template_that_asks_nothing_raises(template: str) -> None:
    with pytest.raises(ValueError, match=r"should name \[A\] and \[B\] and then end in ' \[A\]'"):
        IOIDataset(WORDS, [TEMPLATE, template], THREE, NOUNS)


def test_templates_and_kinds_of_nouns_have_to_match() -> None:
    with pytest.raises(ValueError, match=r"have \[LOCATION\], but there are no nouns of that kind: there are OBJECT"):
        IOIDataset(WORDS, nouns={"OBJECT": ["ball"]})
    with pytest.raises(ValueError, match=r"no IOI template has \[PLACE\], for which there are nouns"):
        IOIDataset(WORDS, [TEMPLATE], THREE, {**NOUNS, "PLACE": ["park"]})
    with pytest.raises(ValueError, match=r"no IOI template has \[A\], for which"):
        IOIDataset(WORDS, [TEMPLATE], THREE, {**NOUNS, "A": ["ball"]})


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"templates": []}, r"templates is a list of strings, with at least one; got \[\]"),
        ({"templates": TEMPLATE}, "templates is a list of strings"),
        ({"names": "Anna"}, "names is a list of strings"),
        ({"names": [1, 2]}, "names is a list of strings"),
        ({"nouns": {"THING": "ball"}}, r"nouns\['THING'\] is a list of strings"),
        ({"nouns": {"THING": []}}, r"nouns\['THING'\] is a list of strings"),
        ({"num_samples": 0}, "num_samples is 1 or more"),
    ],
    ids=str,
)
def test_what_is_no_list_of_words_raises(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IOIDataset(WORDS, **{"templates": [TEMPLATE], "names": THREE, "nouns": NOUNS, **options})


def test_a_tokenizer_that_ends_the_sentence_otherwise_raises() -> None:
    backend = Tokenizer.from_str(WORDS.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Replace("hit Anna", "hit Tom")
    odd = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>")
    with pytest.raises(ValueError, match="should end in the token of 'Anna', but its last is ' Tom'"):
        IOIDataset(odd, ["Then [A] met [B]. [B] hit [A]"], THREE)


def test_a_dataset_with_bos_needs_one() -> None:
    without = PreTrainedTokenizerFast(tokenizer_object=TINY.backend_tokenizer, eos_token="!", unk_token=None)
    build: dict[str, Any] = {"templates": ["Then [A] met [B]. [B] hit [A]"], "num_samples": 2}
    assert len(IOIDataset(without, **build, prepend_bos=False)) == 2
    with pytest.raises(ValueError, match="prepend_bos=True needs a BOS token"):
        IOIDataset(without, **build)


# ioi_eval


@torch.no_grad()
def written_out(model: HookedTransformer, items: Any) -> dict[str, float]:
    """The two numbers, one sentence at a time, from the logits of the whole sentence at the token before the last."""
    gaps = []
    for index in range(len(items)):
        item = items[index]
        logits = model(item["prompt"][None])[0, -2]
        gaps.append(float(logits[item["IO"]] - logits[item["S"]]))
    return {"Logit Difference": sum(gaps) / len(gaps), "Accuracy": sum(gap > 0 for gap in gaps) / len(gaps)}


@pytest.mark.parametrize("batch_size", [1, 8, 100])
@pytest.mark.parametrize(
    "model", [MODEL, text_model(positional_embedding_type="rotary", rotary_dim=4)], ids=["", "rot"]
)
def test_the_evaluation_is_the_plain_one_whatever_the_batch(model: HookedTransformer, batch_size: int) -> None:
    dataset = IOIDataset(WORDS, num_samples=21)
    assert len({len(dataset[index]["prompt"]) for index in range(21)}) > 2  # some are padded
    expected = written_out(model, dataset)
    assert 0 < expected["Accuracy"] < 1
    assert ioi_eval(model, dataset, batch_size=batch_size) == pytest.approx(expected, abs=1e-10)


def test_an_answer_that_is_copied_from_the_text_is_judged_right_and_one_that_is_not_wrong() -> None:
    model = text_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.unembed.b_U[single_token(WORDS, " Anna")] = 2.0
        model.unembed.b_U[single_token(WORDS, " Kate")] = -1.0
    rows = {("Anna", "Tom"): (2.0, 1.0), ("Kate", "Tom"): (-1.0, 0.0), ("Anna", "Kate"): (3.0, 1.0)}
    for (io, s), (gap, accuracy) in rows.items():
        made = IOIDataset(WORDS, [TEMPLATE], THREE, NOUNS, num_samples=40)
        dataset = [made[index] for index, sample in enumerate(made.samples) if (sample["IO"], sample["S"]) == (io, s)]
        assert ioi_eval(model, dataset) == pytest.approx({"Logit Difference": gap, "Accuracy": accuracy})


def test_equal_logits_are_no_right_answer() -> None:
    model = text_model()
    for parameter in model.parameters():
        parameter.data.zero_()
    assert ioi_eval(model, num_samples=4) == {"Logit Difference": 0.0, "Accuracy": 0.0}


def test_without_a_dataset_one_is_made_as_asked() -> None:
    def made(**how: Any) -> dict[str, float]:
        return written_out(MODEL, IOIDataset(WORDS, **how))

    assert ioi_eval(MODEL, num_samples=12) == pytest.approx(made(num_samples=12), abs=1e-10)
    symmetric = ioi_eval(MODEL, num_samples=12, symmetric=True)
    assert symmetric == pytest.approx(made(num_samples=12, symmetric=True), abs=1e-10)
    drawn = ioi_eval(MODEL, num_samples=12, generator=seeded(3))
    assert drawn == pytest.approx(made(num_samples=12, generator=seeded(3)), abs=1e-10)
    assert drawn != ioi_eval(MODEL, num_samples=12)
    plain = text_model(default_prepend_bos=False)
    expected = written_out(plain, IOIDataset(WORDS, num_samples=12, prepend_bos=False))
    assert ioi_eval(plain, num_samples=12) == pytest.approx(expected, abs=1e-10)


def test_a_model_without_a_tokenizer_takes_one_or_a_dataset() -> None:
    bare = tiny_model(d_vocab=MODEL.cfg.d_vocab, n_ctx=64)
    expected = ioi_eval(MODEL, num_samples=6)
    assert ioi_eval(bare, num_samples=6, tokenizer=WORDS) == pytest.approx(expected, abs=1e-10)
    assert ioi_eval(bare, IOIDataset(WORDS, num_samples=6)) == pytest.approx(expected, abs=1e-10)
    with pytest.raises(ValueError, match="needs a tokenizer to write its sentences"):
        ioi_eval(bare)


def test_the_model_does_not_read_the_answer() -> None:
    dataset = IOIDataset(WORDS, num_samples=3)
    with recorded_tokens(MODEL) as seen:
        ioi_eval(MODEL, dataset, batch_size=1)
    for index, tokens in enumerate(seen):
        assert tokens[0].tolist() == dataset[index]["prompt"].tolist()[:-1]


def test_options_that_come_too_late_for_a_dataset_raise() -> None:
    dataset = IOIDataset(WORDS, num_samples=2)
    for late in ({"symmetric": True}, {"generator": seeded(0)}):
        with pytest.raises(ValueError, match="the dataset is made already"):
            ioi_eval(MODEL, dataset, **late)


def test_an_empty_dataset_and_an_empty_batch_raise() -> None:
    with pytest.raises(ValueError, match="at least one sentence at a time; got 0"):
        ioi_eval(MODEL, [])
    with pytest.raises(ValueError, match="batch_size=0"):
        ioi_eval(MODEL, IOIDataset(WORDS, num_samples=2), batch_size=0)


@pytest.mark.parametrize(
    "item",
    [([5, 6, 7], [8], [6]), ([7], [7], [6]), ([5, 7], [6, 7], [6]), ([5, 7], [7], [5, 6]), ([[5], [7]], [7], [5])],
)
def test_an_item_that_is_no_such_sentence_raises_by_number(item: tuple[Any, ...]) -> None:
    bad = dict(zip(("prompt", "IO", "S"), map(torch.tensor, item), strict=True))
    dataset = [IOIDataset(WORDS, num_samples=1)[0], bad]
    with pytest.raises(ValueError, match="item 1 of the IOI dataset should have"):
        ioi_eval(MODEL, dataset)
