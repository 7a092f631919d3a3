"""The tokenizer that a model has: tokens without rows, missing special tokens, BOS by family, one padding side."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from hooked_lm import CheckpointError, HookedTransformer
from hooked_lm.utils import get_attention_mask
from tests.helpers import CORPUS, VOCAB, randomise_, tiny_config, tiny_gpt2, tiny_tokenizer
from tests.loading_helpers import edit_json, row_model, unprocessed
from weight_conversion.registry import FAMILIES, family_of

BOS = 0
TEXTS = [CORPUS[0], "Mary", CORPUS[2]]
NO_BOS = pytest.mark.filterwarnings("ignore:this tokenizer has no BOS token")


def text_model(tokenizer: Any, **changes: Any) -> HookedTransformer:
    fields = {"d_vocab": VOCAB, "n_ctx": 128, **changes}
    return randomise_(HookedTransformer(tiny_config(**fields), tokenizer))  # type: ignore[return-value]


def ids_of(text: str) -> list[int]:
    return list(tiny_tokenizer()(text)["input_ids"])


def with_special(**tokens: str | None) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with these special tokens and no others."""
    return PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, **{"unk_token": None, **tokens})


def sentencepiece() -> PreTrainedTokenizerFast:
    """A BPE that writes spaces as sentencepiece does, and drops the one at the start of a text."""
    pieces = ["<s>", "<unk>", "▁", *"aehlorwMy", "▁h", "he", "hell", "▁hell", "▁hello", "▁w", "▁wo", "▁wor"]
    merges = [("▁", "h"), ("▁h", "e"), ("h", "e"), ("▁", "w"), ("▁w", "o"), ("▁wo", "r")]
    vocabulary = {piece: at for at, piece in enumerate(dict.fromkeys([*pieces, "▁he"]))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


# Tokens without rows


def test_a_tokenizer_with_more_tokens_than_rows_loads_and_refuses_such_a_token_where_it_is_used() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == VOCAB
    with pytest.warns(UserWarning, match=rf"1 tokens more than the embedding has rows \({VOCAB}\), such as '\[PAD\]'"):
        model = text_model(tokenizer)
    for use in (model, model.to_tokens, model.to_single_token, lambda text: model.generate(text, verbose=False)):
        with pytest.raises(ValueError, match=rf"\[PAD\].*{VOCAB}.*more tokens than the embedding has rows"):
            use("[PAD]")
    with pytest.raises(ValueError, match=f"token {VOCAB} is out of range"):
        model(torch.tensor([[1, VOCAB]]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_without_a_row_is_replaced_so_that_prompts_keep_the_logits_they_have_alone(side: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.warns(UserWarning, match="more than the embedding has rows"):
        model = text_model(tokenizer)
    together, alone = model(TEXTS, padding_side=side), model(TEXTS[1])
    n = alone.shape[1]
    torch.testing.assert_close(together[1, -n:] if side == "left" else together[1, :n], alone[0])


# Missing special tokens


def test_no_token_stands_in_for_a_missing_bos() -> None:
    with pytest.warns(UserWarning, match=r"no BOS token.*default_prepend_bos=False"):
        model = text_model(with_special(eos_token="<|endoftext|>"))
    assert model.cfg.default_prepend_bos is False
    assert model.to_tokens("Mary").tolist() == [ids_of("Mary")]
    assert model.tokenizer.bos_token is None
    assert model.tokenizer.pad_token == "<|endoftext|>"
    with pytest.raises(
        ValueError, match=r"prepend_bos=True needs a BOS token.*set its bos_token \(model\.tokenizer\.bos_token\)"
    ):
        model("Mary", prepend_bos=True)
    model.tokenizer.bos_token = "<|endoftext|>"
    assert model.to_tokens("Mary", prepend_bos=True).tolist() == [[BOS, *ids_of("Mary")]]


@NO_BOS
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_with_nothing_but_unk_pads_with_it(side: Any) -> None:
    model = text_model(with_special(unk_token="<|endoftext|>"))
    assert model.tokenizer.pad_token == "<|endoftext|>"
    together, alone = model(TEXTS, padding_side=side), model(TEXTS[1])
    n = alone.shape[1]
    torch.testing.assert_close(together[1, -n:] if side == "left" else together[1, :n], alone[0])


@NO_BOS
def test_a_tokenizer_with_no_special_token_reads_one_prompt_at_a_time() -> None:
    model = text_model(with_special(), default_padding_side="left")
    assert model("Mary").shape[1] == len(ids_of("Mary"))
    assert model(torch.tensor([ids_of("Mary")] * 2)).shape[0] == 2
    tokens = model.generate(torch.tensor([[5, 6], [7, 8]]), max_new_tokens=1, stop_at_eos=False, verbose=False)
    assert tokens.shape == (2, 3)
    assert get_attention_mask(model.tokenizer, torch.tensor([[5, 6]]), False).tolist() == [[1, 1]]
    with pytest.raises(ValueError, match=r"no special token at all to pad with: set model\.tokenizer\.pad_token"):
        model.to_tokens(TEXTS)


# The spaces of sentencepiece


def test_the_strings_of_sentencepiece_tokens_have_their_spaces() -> None:
    model = text_model(sentencepiece(), d_vocab=40)
    assert model.to_str_tokens("hello world", prepend_bos=False) == [" he", "l", "l", "o", " wor", "l", "<unk>"]
    assert model.to_str_tokens("he", prepend_bos=True) == ["<s>", " he"]
    assert model.to_single_str_token(model.to_single_token("he")) == " he"


# The tokenizer does what the model does


@pytest.mark.parametrize("prepend", [True, False])
def test_the_tokenizer_of_a_model_encodes_as_the_model_does(prepend: bool) -> None:
    model = text_model(tiny_tokenizer(), default_prepend_bos=prepend)
    for _ in range(2):
        for text in (*CORPUS, "", "<|endoftext|>Mary"):
            expected = [BOS, *ids_of(text.removeprefix("<|endoftext|>"))] if model.cfg.default_prepend_bos else None
            expected = ids_of(text) if expected is None else expected
            assert model.tokenizer.encode(text) == expected
            assert model.tokenizer(text)["input_ids"] == expected
            assert model.tokenizer(text, add_special_tokens=False)["input_ids"] == ids_of(text)
            assert not expected or model.to_tokens(text)[0].tolist() == expected
        # The config may change under the tokenizer.
        model.cfg.default_prepend_bos = not prepend


@pytest.mark.parametrize("prepend", [True, False])
def test_the_config_says_whether_the_tokenizer_puts_bos_in_front(prepend: bool) -> None:
    model = text_model(tiny_tokenizer(), default_prepend_bos=prepend)
    for _ in range(2):
        assert model.cfg.tokenizer_prepends_bos is model.cfg.default_prepend_bos
        # As scripts for the classic library tokenize by hand.
        wanted, there = model.cfg.default_prepend_bos, model.cfg.tokenizer_prepends_bos
        text = model.tokenizer.bos_token + "Mary" if wanted and not there else "Mary"
        tokens = model.tokenizer(text)["input_ids"]
        tokens = tokens[1:] if there and not wanted else tokens
        assert tokens == model.to_tokens("Mary")[0].tolist()
        model.cfg.default_prepend_bos = not prepend
    assert text_model(PlainTokenizer()).cfg.tokenizer_prepends_bos is None
    assert HookedTransformer(tiny_config()).cfg.tokenizer_prepends_bos is None


def test_a_tokenizer_written_in_python_encodes_as_the_model_does(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "mary", "john"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))

    class Slow(BertTokenizer):
        pass

    tokenizer = Slow(vocab=str(tmp_path / "vocab.txt"))
    tokenizer.bos_token = "[CLS]"
    model = text_model(tokenizer, d_vocab=7)
    assert model.tokenizer.encode("mary john") == [2, 5, 6] == model.to_tokens("mary john")[0].tolist()
    model.cfg.default_prepend_bos = False
    assert model.tokenizer.encode("mary john") == [5, 6] == model.to_tokens("mary john")[0].tolist()


def test_a_text_that_begins_with_bos_gets_no_second() -> None:
    model = text_model(tiny_tokenizer())
    text = "<|endoftext|>Mary"
    assert model.to_tokens(text).tolist() == [[BOS, *ids_of("Mary")]] == model.to_tokens("Mary").tolist()
    assert torch.equal(model(text), model("Mary"))
    assert model.to_tokens([text, "Mary"]).tolist() == [[BOS, *ids_of("Mary")]] * 2
    # A text that comes back has no special tokens.
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "stop_at_eos": False, "verbose": False}
    own, added = model.generate(text, **options), model.generate("Mary", **options)
    assert own == added
    assert model.generate([text, "Mary"], **options) == [own, added]
    assert "".join(model.generate_stream(text, return_type="str", **options)) == own


def test_texts_with_and_without_bos_in_one_list_have_one_each() -> None:
    model = text_model(tiny_tokenizer())
    both = ["<|endoftext|>Mary", "Mary"]
    assert model.tokenizer(both)["input_ids"] == [[BOS, *ids_of("Mary")]] * 2
    assert model.tokenizer(text=both, add_special_tokens=False)["input_ids"] == [[BOS, *ids_of("Mary")], ids_of("Mary")]
    model.cfg.default_prepend_bos = False
    assert model.tokenizer(both)["input_ids"] == [[BOS, *ids_of("Mary")], ids_of("Mary")]


def test_a_chat_template_that_writes_bos_gives_one_bos() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = text_model(tokenizer)
    messages = [{"role": "user", "content": "Mary"}]
    text = model.tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|endoftext|>Mary"
    assert model.to_tokens(text).tolist() == [[BOS, *ids_of("Mary")]]
    assert model.tokenizer.apply_chat_template(messages)["input_ids"] == [BOS, *ids_of("Mary")]


# One padding side


def test_the_padding_side_of_the_model_and_of_its_tokenizer_are_one_setting() -> None:
    model = text_model(tiny_tokenizer())
    model.tokenizer.padding_side = "left"
    assert model.cfg.default_padding_side == "left"
    tokens = model.to_tokens(TEXTS)
    assert tokens[1, -1] == ids_of("Mary")[-1]
    # Tokens padded by the tokenizer itself are recognised too.
    padded = model.tokenizer(TEXTS, padding=True, return_tensors="pt")["input_ids"]
    assert torch.equal(padded, tokens)
    torch.testing.assert_close(model(padded)[1, -1], model("Mary")[0, -1])
    model.cfg.default_padding_side = "right"
    assert model.tokenizer.padding_side == "right"
    assert model.tokenizer(TEXTS, padding=True)["input_ids"][1][-1] == BOS
    with pytest.raises(ValueError, match="top"):
        model.tokenizer.padding_side = "top"


def test_copies_and_pickles_of_a_model_have_a_padding_side_of_their_own() -> None:
    model = text_model(tiny_tokenizer())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.tokenizer.padding_side = "left"
        assert (copied.cfg.default_padding_side, model.cfg.default_padding_side) == ("left", "right")
        assert copied.tokenizer.encode("Mary") == [BOS, *ids_of("Mary")]
        assert isinstance(copied.tokenizer, PreTrainedTokenizerFast)


def test_the_tokenizer_of_a_model_is_saved_as_it_is_without_the_model(tmp_path: Path) -> None:
    model = text_model(tiny_tokenizer())
    assert model.tokenizer.encode("Mary")[0] == BOS
    model.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("Mary") == ids_of("Mary")
    again = HookedTransformer.from_pretrained(tmp_path)
    assert again.tokenizer.encode("Mary") == [BOS, *ids_of("Mary")]
    assert model.tokenizer.encode("Mary")[0] == BOS


def test_the_tokenizer_of_one_model_can_be_given_to_another() -> None:
    first = text_model(tiny_tokenizer())
    assert first.tokenizer.encode("Mary")[0] == BOS
    second = text_model(first.tokenizer, default_prepend_bos=False)
    second.tokenizer.padding_side = "left"
    assert first.cfg.default_padding_side == first.tokenizer.padding_side == "right"
    assert second.tokenizer.encode("Mary") == ids_of("Mary")
    assert type(second.tokenizer) is type(first.tokenizer)


class PlainTokenizer:
    """A tokenizer of no class of transformers, which cannot be given another class."""

    __slots__ = ("bos_token", "eos_token", "pad_token", "padding_side")
    bos_token_id = eos_token_id = pad_token_id = 0

    def __init__(self) -> None:
        self.bos_token = self.eos_token = self.pad_token = "<|endoftext|>"
        self.padding_side = "right"

    def get_vocab(self) -> dict[str, int]:
        return {"<|endoftext|>": 0, "a": 1}

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * len(text)}


def test_a_tokenizer_whose_class_cannot_change_works_without_the_link() -> None:
    model = text_model(PlainTokenizer(), default_padding_side="left")
    assert model.to_tokens(["aa", "a"]).tolist() == [[0, 1, 1], [0, 0, 1]]
    assert model.tokenizer.padding_side == "left"


# Loading


def checkpoint(folder: Path, row_id: str, tokenizer: Any, **config: Any) -> Path:
    row_model(row_id, vocab_size=VOCAB + 1, **config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("row_id", "default"),
    [
        *(("gpt2", True), ("llama", True), ("gemma", True)),
        *(("gpt-neox", False), ("bloom", False), ("qwen2", False), ("qwen3", False), ("phi", False)),
    ],
)
def test_bos_is_put_in_front_by_family(row_id: str, default: bool, tmp_path: Path) -> None:
    model = unprocessed(checkpoint(tmp_path, row_id, tiny_tokenizer()))
    assert model.cfg.default_prepend_bos is default
    assert model.to_tokens("Mary")[0].tolist() == [BOS] * default + ids_of("Mary")
    assert unprocessed(tmp_path, default_prepend_bos=not default).cfg.default_prepend_bos is not default


# What the classic library 3.9 does for every name it published, by architecture; the mixtures of Qwen, which it lacks,
# go with Qwen.
CLASSIC_BOS = {
    **dict.fromkeys(["GPT2LMHeadModel", "GPTNeoForCausalLM", "GPTJForCausalLM", "OPTForCausalLM"], True),
    **dict.fromkeys(["GPTBigCodeForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"], True),
    **dict.fromkeys(["GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM"], True),
    **dict.fromkeys(["OlmoForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoeForCausalLM"], True),
    **dict.fromkeys(["GptOssForCausalLM", "ApertusForCausalLM"], True),
    **dict.fromkeys(["GPTNeoXForCausalLM", "BloomForCausalLM", "PhiForCausalLM"], False),
    **dict.fromkeys(["Qwen2ForCausalLM", "Qwen3ForCausalLM"], False),
    **dict.fromkeys(["Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"], False),
}


def test_families_of_the_classic_library_have_its_default() -> None:
    assert {name: family_of(name).prepend_bos for name in CLASSIC_BOS} == CLASSIC_BOS
    others = [family for family in FAMILIES if not set(family.architectures) & set(CLASSIC_BOS)]
    assert {family.prepend_bos for family in others} == {None}


def test_an_empty_list_of_texts_raises_what_it_raises_without_a_model() -> None:
    plain, tokenizer = tiny_tokenizer(), text_model(tiny_tokenizer()).tokenizer
    for empty in ([], ()):
        with pytest.raises(Exception) as expected:  # noqa: PT011 - the class is that of transformers
            plain(empty)
        with pytest.raises(expected.type, match=str(expected.value)):
            tokenizer(empty)


@pytest.mark.parametrize("adds", [True, False])
def test_in_other_families_bos_is_put_in_front_where_the_tokenizer_does_it(adds: bool, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_bos_token = adds
    assert (tokenizer.encode("Mary")[0] == BOS) == adds
    model = unprocessed(checkpoint(tmp_path, "codegen", tokenizer))
    assert model.cfg.default_prepend_bos is adds
    assert model.tokenizer.encode("Mary") == [BOS] * adds + ids_of("Mary")


def test_a_bos_that_only_the_config_names_is_used_where_the_tokenizer_knows_it_as_special(tmp_path: Path) -> None:
    tokenizer = with_special(eos_token="<|endoftext|>")
    model = unprocessed(checkpoint(tmp_path, "qwen2", tokenizer, bos_token_id=0))
    assert model.to_tokens("Mary")[0].tolist() == ids_of("Mary")
    assert model.to_tokens("Mary", prepend_bos=True)[0].tolist() == [0, *ids_of("Mary")]
    with pytest.warns(UserWarning, match="no BOS token"):
        other = unprocessed(checkpoint(tmp_path / "other", "llama", tokenizer, bos_token_id=7))
    assert other.tokenizer.bos_token is None


def test_a_model_loads_without_a_tokenizer_if_asked(tmp_path: Path) -> None:
    checkpoint(tmp_path, "gpt2", tiny_tokenizer())
    (tmp_path / "tokenizer.json").write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert unprocessed(tmp_path, tokenizer=False).tokenizer is None
        assert unprocessed("no such name", hf_model=tiny_gpt2(), tokenizer=False).tokenizer is None
    with pytest.raises(CheckpointError, match=r"no tokenizer: .*tokenizer\.json.*tokenizer=False"):
        unprocessed(tmp_path)
    tiny_model = text_model(tiny_tokenizer())
    tiny_model.save_pretrained(tmp_path / "own")
    assert unprocessed(tmp_path / "own", tokenizer=False).tokenizer is None


@NO_BOS
def test_a_vocabulary_of_wordpieces_alone_is_a_tokenizer(tmp_path: Path) -> None:
    checkpoint(tmp_path, "gpt2", None)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "mary", "john"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    edit_json(tmp_path / "config.json", bos_token_id=...)
    model = unprocessed(tmp_path)
    assert model.to_tokens("mary john").tolist() == [[5, 6]]
    assert model.tokenizer.encode("mary john") == [5, 6]


def test_a_tokenizer_that_needs_a_package_that_is_missing_does_not_stop_a_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path, "llama", None)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x03abc")

    def fails(*_: Any, **__: Any) -> None:
        raise ImportError("LlamaTokenizer requires the SentencePiece library but it was not found.\nMore lines.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fails)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"tokens only: .*needs sentencepiece, which is not installed: pip install"):
        model = unprocessed(tmp_path)
    assert model.tokenizer is None


def test_a_tokenizer_that_transformers_cannot_make_does_not_stop_a_load(tmp_path: Path) -> None:
    checkpoint(tmp_path, "llama", None)
    (tmp_path / "tokenizer.model").write_bytes(b"rubbish")
    with pytest.warns(UserWarning, match=r"the model will read tokens only: no tokenizer .*tokenizer="):
        model = unprocessed(tmp_path)
    assert model.tokenizer is None


def test_a_chat_template_in_a_file_of_its_own_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "hub", "gpt2", tiny_tokenizer())
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}")

    def snapshot_download(hub_id: str, allow_patterns: list[str], **_: Any) -> str:
        for path in folder.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = unprocessed("some/model")
    assert model.tokenizer.apply_chat_template([{"content": "Mary"}], tokenize=False) == "<|endoftext|>Mary"
    model.save_pretrained(tmp_path / "own")
    again = unprocessed(tmp_path / "own")
    assert again.tokenizer.chat_template == model.tokenizer.chat_template
