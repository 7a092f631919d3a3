"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from jaxtyping import config as jaxtyping_config
from transformers import PreTrainedTokenizerFast

from hooked_lm.tasks import lexicon, word_tokenizer
from tests.helpers import tiny_gpt2, tiny_tokenizer

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a tiny GPT-2 checkpoint and its tokenizer, as transformers writes them. Do not write to it."""
    folder = tmp_path_factory.mktemp("gpt2")
    tiny_gpt2().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reader_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random GPT-2 whose tokenizer knows the words of the tasks. Do not write to it."""
    folder, words = tmp_path_factory.mktemp("reader"), word_tokenizer(lexicon())
    tiny_gpt2(vocab_size=len(words), n_positions=128).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture
def no_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that the annotations exclude reach the code, as they do outside the tests."""
    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)
