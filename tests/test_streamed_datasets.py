"""Data sets that are read as their rows are taken."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from hooked_lm.utils import keep_single_column, tokenize_and_concatenate
from tests.helpers import CORPUS, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


class Stream:
    """As much of a `datasets.IterableDataset` as is needed: examples one after the other, no length."""

    column_names = ("body", "title")

    def __init__(self, generator: Any) -> None:
        self.generator, self.format = generator, "python"

    def __iter__(self) -> Any:
        return self.generator()

    @classmethod
    def from_generator(cls, generator: Any) -> Stream:
        return cls(generator)

    def with_format(self, format: str) -> Stream:
        self.format = format
        return self


@pytest.mark.parametrize("bos", [True, False])
def test_a_streamed_dataset_is_read_no_further_than_the_rows_that_are_taken(bos: bool) -> None:
    read = []

    def examples() -> Any:
        for text in itertools.cycle(CORPUS):  # it has no end
            read.append(text)
            yield {"body": text, "title": "none"}

    options = {"max_length": 6, "column_name": "body", "add_bos_token": bos}
    rows = tokenize_and_concatenate(Stream(examples), TOKENIZER, streaming=True, **options)
    assert isinstance(rows, Stream)
    assert rows.format == "torch"
    assert read == []
    expected = tokenize_and_concatenate(CORPUS, TOKENIZER, max_length=6, add_bos_token=bos)
    first = [row["tokens"] for row in itertools.islice(rows, len(expected) - 1)]
    assert first == expected[:-1].tolist()
    assert len(read) <= len(CORPUS)
    again = next(iter(rows))["tokens"]
    assert again == first[0]
    plain = tokenize_and_concatenate(Stream(examples), TOKENIZER, set_format=False, **options)
    assert plain.format == "python"


def test_a_single_column_is_kept() -> None:
    class Table:
        column_names = ["text", "a", "b"]

        def remove_columns(self, names: list[str]) -> list[str]:
            return names

    assert keep_single_column(Table(), "text") == ["a", "b"]
    with pytest.raises(ValueError, match="has no column 'body'; it has text, a, b"):
        keep_single_column(Table(), "body")
