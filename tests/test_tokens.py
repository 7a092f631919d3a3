"""Text to tokens and back."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from hooked_lm import HookedTransformer
from hooked_lm.utils import tokenize_and_concatenate
from tests.helpers import CORPUS, VOCAB, randomise_, tiny_config, tiny_model, tiny_tokenizer

BOS = 0
TOKENIZER = tiny_tokenizer()
TEXTS = [CORPUS[0], "Mary", CORPUS[2]]


def text_model(tokenizer: Any = TOKENIZER, **changes: Any) -> HookedTransformer:
    """A tiny model that reads text."""
    fields = {"d_vocab": VOCAB + 2, "n_ctx": 128, **changes}
    return randomise_(HookedTransformer(tiny_config(**fields), tokenizer))  # type: ignore[return-value]


MODEL = text_model()


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def that_adds_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that puts BOS in front of every text by itself, as Llama's does."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A <|endoftext|> $B", special_tokens=[("<|endoftext|>", BOS)]
    )
    assert tokenizer("Mary")["input_ids"][0] == BOS
    return tokenizer


def without_bos() -> PreTrainedTokenizerFast:
    """A tokenizer with an end-of-sequence token and nothing else."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    assert tokenizer.bos_token_id is None
    return tokenizer


# to_tokens


def test_a_string_becomes_bos_and_its_tokens() -> None:
    tokens = MODEL.to_tokens(CORPUS[0])
    assert tokens.dtype == torch.long
    assert tokens.tolist() == [[BOS, *ids_of(CORPUS[0])]]


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("given_bos", [True, False, None])
def test_prepend_bos_overrides_the_default_of_the_model(default: bool, given_bos: bool | None) -> None:
    model = text_model(default_prepend_bos=default)
    has_bos = default if given_bos is None else given_bos
    expected = [BOS, *ids_of("Mary")] if has_bos else ids_of("Mary")
    assert model.to_tokens("Mary", prepend_bos=given_bos).tolist() == [expected]
    assert model.to_tokens(["Mary"], prepend_bos=given_bos).tolist() == [expected]
    assert model.to_str_tokens("Mary", prepend_bos=given_bos) == [TOKENIZER.decode([t]) for t in expected]
    assert model.get_token_position(expected[-1], "Mary", prepend_bos=given_bos) == len(expected) - 1
    assert model("Mary", prepend_bos=given_bos).shape[1] == len(expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("as_default", [True, False])
def test_strings_are_padded_to_the_longest_on_the_side_asked_for(side: Any, as_default: bool) -> None:
    model = text_model(default_padding_side=side) if as_default else MODEL
    tokens = model.to_tokens(TEXTS) if as_default else model.to_tokens(TEXTS, padding_side=side)
    rows = [[BOS, *ids_of(text)] for text in TEXTS]
    longest = max(map(len, rows))
    pads = [[BOS] * (longest - len(row)) for row in rows]
    assert tokens.tolist() == [p + r if side == "left" else r + p for p, r in zip(pads, rows, strict=True)]


def test_padding_is_the_padding_token_where_there_is_one() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokens = text_model(tokenizer).to_tokens(TEXTS)
    assert tokens[1, -1] == tokenizer.pad_token_id != BOS


def test_an_empty_string_is_bos_alone() -> None:
    assert MODEL.to_tokens("").tolist() == [[BOS]]


def test_a_prompt_that_is_too_long_is_cut_with_a_warning() -> None:
    model = text_model(n_ctx=5)
    with pytest.warns(UserWarning, match="was cut to n_ctx=5"):
        tokens = model.to_tokens(CORPUS[0])
    assert tokens.tolist() == [[BOS, *ids_of(CORPUS[0])[:4]]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_cutting_keeps_the_start_of_each_prompt(side: Any) -> None:
    model = text_model(n_ctx=6)
    with pytest.warns(UserWarning, match="was cut to n_ctx=6"):
        tokens = model.to_tokens([CORPUS[0], "Mary", CORPUS[1]], padding_side=side)
    short = [BOS, *ids_of("Mary")]
    pads = [BOS] * (6 - len(short))
    assert tokens.shape == (3, 6)
    assert tokens[0].tolist() == [BOS, *ids_of(CORPUS[0])[:5]]
    assert tokens[1].tolist() == (pads + short if side == "left" else short + pads)
    assert tokens[2].tolist() == [BOS, *ids_of(CORPUS[1])[:5]]


def test_nothing_is_cut_when_that_is_not_wanted_or_not_needed() -> None:
    model = text_model(n_ctx=5)
    assert model.to_tokens(CORPUS[0], truncate=False).shape[1] == 1 + len(ids_of(CORPUS[0])) > 5
    exact = TOKENIZER.decode(ids_of(CORPUS[0])[:4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.to_tokens(exact).shape == (1, 5)


def test_a_model_cuts_nothing_behind_its_users_back() -> None:
    with pytest.raises(ValueError, match="more than this model's n_ctx of 5"):
        text_model(n_ctx=5)(CORPUS[0])


# Tokenizers that differ


def test_a_tokenizer_that_adds_bos_itself_gives_one_bos() -> None:
    model = text_model(that_adds_bos())
    assert model.to_tokens("Mary").tolist() == [[BOS, *ids_of("Mary")]]
    assert model.to_tokens("Mary", prepend_bos=False).tolist() == [ids_of("Mary")]
    assert (model.to_tokens(TEXTS)[:, 0] == BOS).all()
    assert (model.to_tokens(TEXTS)[:, 1] != BOS).all()
    assert model.to_str_tokens("Mary") == MODEL.to_str_tokens("Mary")
    assert model.to_single_token(" Mary") == MODEL.to_single_token(" Mary")
    assert torch.equal(tokenize_and_concatenate(CORPUS, that_adds_bos(), max_length=8), chunks(8))


@pytest.mark.parametrize("make", [tiny_tokenizer, without_bos, that_adds_bos])
def test_the_callers_tokenizer_is_not_changed(make: Any) -> None:
    tokenizer = make()
    tokenizer.padding_side = "left"
    special, size, plain = dict(tokenizer.special_tokens_map), len(tokenizer), tokenizer("Mary")["input_ids"]
    default = tokenizer.bos_token is not None
    model = text_model(tokenizer, default_padding_side="right", default_prepend_bos=default)
    model.to_tokens(TEXTS)
    model(TEXTS, padding_side="right")
    model.generate("Mary", max_new_tokens=2, verbose=False)
    model.set_tokenizer(tokenizer, default_padding_side="right")
    assert model.tokenizer is not tokenizer
    assert dict(tokenizer.special_tokens_map) == special
    assert tokenizer.pad_token is None
    assert (len(tokenizer), tokenizer.padding_side, tokenizer("Mary")["input_ids"]) == (size, "left", plain)


def test_set_tokenizer_gives_a_model_its_text() -> None:
    model = tiny_model(d_vocab=VOCAB, n_ctx=64)
    assert model.tokenizer is None
    model.set_tokenizer(TOKENIZER, default_padding_side="left")
    assert model.to_tokens(TEXTS)[1, 0] == BOS
    assert model.to_tokens(TEXTS)[1, -1] == ids_of("Mary")[-1]
    assert model.cfg.default_padding_side == "left"


def test_a_model_may_be_given_its_padding_side_and_no_tokenizer_yet() -> None:
    model = HookedTransformer(tiny_config(d_vocab=VOCAB, n_ctx=64), default_padding_side="left")
    model.set_tokenizer(TOKENIZER)
    assert model.to_tokens(TEXTS)[1, -1] == ids_of("Mary")[-1]


def test_the_tokenizer_attribute_can_be_set_and_unset() -> None:
    model = tiny_model(d_vocab=VOCAB, n_ctx=64)
    model.tokenizer = TOKENIZER
    assert model.to_tokens("Mary").tolist() == [[BOS, *ids_of("Mary")]]
    model.tokenizer = None
    with pytest.raises(ValueError, match="has no tokenizer"):
        model.to_tokens("Mary")


def test_an_unknown_padding_side_raises() -> None:
    for call in (
        lambda: MODEL.to_tokens(TEXTS, padding_side="top"),  # type: ignore[arg-type]
        lambda: MODEL(TEXTS, padding_side="top"),
        lambda: MODEL(torch.tensor([[1, 2]]), padding_side="top"),
        lambda: text_model().set_tokenizer(TOKENIZER, default_padding_side="top"),
    ):
        with pytest.raises(ValueError, match="padding_side is 'left' or 'right', not 'top'"):
            call()


def test_the_vocabulary_of_a_model_defaults_to_that_of_its_tokenizer() -> None:
    model = HookedTransformer(tiny_config(d_vocab=-1), TOKENIZER)
    assert model.cfg.d_vocab == model.cfg.d_vocab_out == max(TOKENIZER.get_vocab().values()) + 1
    assert model("Mary").shape[-1] == model.cfg.d_vocab


# Back to text


def test_to_string_takes_tokens_in_every_form() -> None:
    ids = ids_of(CORPUS[0])
    for form in (ids, torch.tensor(ids), np.array(ids), np.array(ids, dtype=np.int32), tuple(ids)):
        assert MODEL.to_string(form) == CORPUS[0]
    assert MODEL.to_string(ids[0]) == MODEL.to_string(torch.tensor(ids[0])) == TOKENIZER.decode(ids[:1])
    assert MODEL.to_string(torch.tensor([ids, ids])) == [CORPUS[0]] * 2
    assert MODEL.to_string([ids]) == [CORPUS[0]]
    assert MODEL.to_string(MODEL.to_tokens("Mary")) == ["<|endoftext|>Mary"]


def test_spaces_before_punctuation_stay() -> None:
    text = "A B ... ! ' n't  ,  two"
    assert MODEL.to_string(MODEL.to_tokens(text, prepend_bos=False)[0]) == text


def test_to_string_of_something_else_raises() -> None:
    with pytest.raises(TypeError, match=r"tokens are integers, got torch\.float32"):
        MODEL.to_string(torch.ones(3))
    with pytest.raises(ValueError, match="one sequence of tokens or a batch"):
        MODEL.to_string(torch.ones(1, 1, 1, dtype=torch.long))


def test_to_str_tokens_gives_each_token_as_a_string() -> None:
    expected = ["<|endoftext|>", *(TOKENIZER.decode([token]) for token in ids_of(CORPUS[0]))]
    tokens = MODEL.to_tokens(CORPUS[0])
    assert MODEL.to_str_tokens(CORPUS[0]) == expected
    assert "".join(expected[1:]) == CORPUS[0]
    for form in (tokens, tokens[0], tokens.numpy(), tokens[0].tolist()):
        assert MODEL.to_str_tokens(form) == expected
    assert MODEL.to_str_tokens(tokens.repeat(2, 1)) == [expected, expected]


def test_to_str_tokens_of_a_list_of_strings_pads_nothing() -> None:
    assert MODEL.to_str_tokens(TEXTS) == [MODEL.to_str_tokens(text) for text in TEXTS]


def test_to_str_tokens_never_adds_bos_to_tokens() -> None:
    assert MODEL.to_str_tokens(torch.tensor(ids_of("Mary")), prepend_bos=True) == MODEL.to_str_tokens(
        "Mary", prepend_bos=False
    )


def test_to_str_tokens_of_something_else_raises() -> None:
    with pytest.raises(TypeError, match="tokens are integers"):
        MODEL.to_str_tokens(torch.ones(3))
    with pytest.raises(ValueError, match=r"\[batch pos\]"):
        MODEL.to_str_tokens(torch.ones(2, 2, 2, dtype=torch.long))


def test_single_tokens_go_both_ways() -> None:
    token = MODEL.to_single_token(" Mary")
    assert ids_of(" Mary") == [token]
    assert MODEL.to_single_str_token(token) == " Mary"
    assert MODEL.to_single_token("<|endoftext|>") == BOS
    for index in range(len(TOKENIZER)):
        assert MODEL.to_single_str_token(index) == TOKENIZER.decode([index])


@pytest.mark.parametrize("text", ["Elephant", ""])
def test_a_string_that_is_not_one_token_raises(text: str) -> None:
    count = len(ids_of(text))
    assert count != 1
    with pytest.raises(ValueError, match=f"is {count} tokens, not one"):
        MODEL.to_single_token(text)


@pytest.mark.parametrize("token", ["Mary", 1.0, True, torch.tensor(3.0), torch.tensor([3])])
def test_to_single_str_token_wants_an_int(token: Any) -> None:
    with pytest.raises(TypeError, match="a token is an int"):
        MODEL.to_single_str_token(token)


# Positions and directions


def test_get_token_position_finds_the_first_or_the_last() -> None:
    text = "When John and Mary went to the store, John gave"
    words = MODEL.to_str_tokens(text)
    first, last = words.index(" John"), len(words) - 1 - words[::-1].index(" John")
    assert first < last
    token = MODEL.to_single_token(" John")
    for single in (" John", token):
        for form in (text, MODEL.to_tokens(text), MODEL.to_tokens(text)[0], MODEL.to_tokens(text).numpy()):
            assert MODEL.get_token_position(single, form) == first
            assert MODEL.get_token_position(single, form, mode="first") == first
            assert MODEL.get_token_position(single, form, mode="last") == last
    assert MODEL.get_token_position(" John", text, prepend_bos=False) == first - 1
    assert MODEL.get_token_position("<|endoftext|>", text) == 0


def test_get_token_position_of_what_is_not_there_raises() -> None:
    with pytest.raises(ValueError, match="' John' does not occur"):
        MODEL.get_token_position(" John", "Mary")
    with pytest.raises(ValueError, match="one sequence, got a batch"):
        MODEL.get_token_position(1, torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="mode is 'first' or 'last'"):
        MODEL.get_token_position("<|endoftext|>", "Mary", mode="middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokens, not one"):
        MODEL.get_token_position("Elephant", "Mary")


def test_residual_directions_are_columns_of_the_unembedding() -> None:
    token = MODEL.to_single_token(" Mary")
    for form in (" Mary", token, torch.tensor(token), torch.tensor([token]), torch.tensor([[token]])):
        direction = MODEL.tokens_to_residual_directions(form)
        assert direction.shape == (12,)
        assert torch.equal(direction, MODEL.W_U[:, token])
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    directions = MODEL.tokens_to_residual_directions(tokens)
    assert directions.shape == (2, 3, 12)
    assert torch.equal(directions[1, 2], MODEL.W_U[:, 6])


def test_a_residual_direction_raises_the_logit_of_its_token() -> None:
    residual, token = torch.zeros(1, 1, 12, dtype=torch.float64), 7
    direction = MODEL.tokens_to_residual_directions(token)
    difference = (MODEL.unembed(residual + direction) - MODEL.unembed(residual))[0, 0, token]
    torch.testing.assert_close(difference, direction @ direction)


@pytest.mark.parametrize("token", [-1, VOCAB + 2])
def test_residual_directions_of_tokens_that_do_not_exist_raise(token: int) -> None:
    with pytest.raises(ValueError, match=f"not all in 0-{VOCAB + 1}"):
        MODEL.tokens_to_residual_directions(torch.tensor([1, token]))


# Round trips


@settings(max_examples=150)
@given(st.text(min_size=1, max_size=30))
def test_text_to_tokens_to_text_is_the_text(text: str) -> None:
    tokens = MODEL.to_tokens(text, prepend_bos=False)[0]
    assert MODEL.to_string(tokens) == text
    with_bos = MODEL.to_tokens(text, prepend_bos=True)[0]
    assert with_bos[0] == BOS
    assert torch.equal(with_bos[1:], tokens)
    assert MODEL.to_string(with_bos) == "<|endoftext|>" + text
    assert len(MODEL.to_str_tokens(text)) == len(with_bos)


@settings(max_examples=50)
@given(
    st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4),
    st.sampled_from(["left", "right"]),
    st.booleans(),
)
def test_a_batch_holds_what_each_string_gives_alone(texts: list[str], side: Any, bos: bool) -> None:
    batch = MODEL.to_tokens(texts, prepend_bos=bos, padding_side=side)
    assert batch.shape[0] == len(texts)
    for row, text in zip(batch, texts, strict=True):
        alone = MODEL.to_tokens(text, prepend_bos=bos)[0]
        n_pads = batch.shape[1] - len(alone)
        assert torch.equal(row[n_pads:] if side == "left" else row[: len(alone)], alone)
        assert (row[:n_pads] if side == "left" else row[len(alone) :]).eq(BOS).all()


@settings(max_examples=50)
@given(st.text(alphabet=st.characters(max_codepoint=127), max_size=30))
def test_the_strings_of_the_tokens_of_ascii_text_join_to_it(text: str) -> None:
    assert "".join(MODEL.to_str_tokens(text)) == "<|endoftext|>" + text


# Rows of equal length for training


def chunks(length: int, bos: bool = True) -> torch.Tensor:
    stream: list[int] = []
    for index, text in enumerate(CORPUS):
        stream += ([TOKENIZER.eos_token_id] if index else []) + ids_of(text)
    width = length - int(bos)
    rows = [stream[start : start + width] for start in range(0, len(stream) - width + 1, width)]
    return torch.tensor([[BOS, *row] if bos else row for row in rows])


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("length", [4, 9])
def test_tokenize_and_concatenate_cuts_joined_texts_into_equal_rows(length: int, bos: bool) -> None:
    rows = tokenize_and_concatenate(CORPUS, TOKENIZER, max_length=length, add_bos_token=bos)
    assert rows.shape[0] > 2
    assert torch.equal(rows, chunks(length, bos))


def test_tokenize_and_concatenate_takes_any_iterable() -> None:
    assert torch.equal(tokenize_and_concatenate(iter(CORPUS), TOKENIZER, max_length=8), chunks(8))


class Dataset:
    """As much of a `datasets.Dataset` as is needed: columns in, columns out."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.columns, self.format = columns, "python"

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @classmethod
    def from_dict(cls, columns: dict[str, Any]) -> Dataset:
        return cls(columns)

    def with_format(self, format: str) -> Dataset:
        self.format = format
        return self


def test_tokenize_and_concatenate_gives_a_dataset_for_a_dataset() -> None:
    result = tokenize_and_concatenate(Dataset({"body": CORPUS}), TOKENIZER, max_length=8, column_name="body")
    assert isinstance(result, Dataset)
    assert (result.column_names, result.format) == (["tokens"], "torch")
    assert np.array_equal(result["tokens"], chunks(8).numpy())


def test_tokenize_and_concatenate_leaves_the_tokenizer_alone() -> None:
    tokenizer = tiny_tokenizer()
    before = copy.deepcopy(tokenizer.special_tokens_map)
    tokenize_and_concatenate(CORPUS, tokenizer, max_length=8)
    assert tokenizer.special_tokens_map == before


def test_too_little_text_for_one_row_raises() -> None:
    with pytest.raises(ValueError, match="less than one row"):
        tokenize_and_concatenate(["Mary"], TOKENIZER, max_length=64)


@pytest.mark.parametrize(("length", "bos"), [(1, True), (0, False), (-3, True)])
def test_rows_without_room_for_a_token_raise(length: int, bos: bool) -> None:
    with pytest.raises(ValueError, match="max_length"):
        tokenize_and_concatenate(CORPUS, TOKENIZER, max_length=length, add_bos_token=bos)


def test_in_rows_neither_bos_nor_the_token_between_texts_stands_in_for_the_other() -> None:
    with pytest.raises(ValueError, match="add_bos_token=True needs a BOS token, and this tokenizer has none"):
        tokenize_and_concatenate(CORPUS, without_bos(), max_length=8)
    rows = tokenize_and_concatenate(CORPUS, without_bos(), max_length=8, add_bos_token=False)
    assert torch.equal(rows, chunks(8, bos=False))
    without_eos = tiny_tokenizer()
    without_eos.eos_token = None
    with pytest.raises(ValueError, match="puts eos_token between texts, and this tokenizer has none"):
        tokenize_and_concatenate(CORPUS, without_eos, max_length=8)
