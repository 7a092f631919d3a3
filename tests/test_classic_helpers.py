"""Helpers of the classic library around tokenizers, defaults and attributes, and names that are not kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hooked_lm import USE_DEFAULT_VALUE, evals, head_detector, utils
from tests.generation_helpers import text_model
from tests.helpers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPT = "When John and Mary"


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_of_the_padding_may_be_given(side: str) -> None:
    tokenizer = utils.get_tokenizer_with_bos(TOKENIZER)
    tokenizer.padding_side = "left" if side == "right" else "right"
    tokens = torch.tensor([[0, 0, 5, 0, 0]])
    expected = [[0, 1, 1, 1, 1]] if side == "left" else [[1, 1, 1, 0, 0]]
    assert utils.get_attention_mask(tokenizer, tokens, True, padding_side=side).tolist() == expected
    assert utils.get_attention_mask(None, tokens, True).tolist() == [[1] * 5]
    with pytest.raises(ValueError, match="padding_side is 'left' or 'right'"):
        utils.get_attention_mask(tokenizer, tokens, True, "both")


@pytest.mark.parametrize("own_pad", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_bos_is_put_in_front_of_strings_and_taken_from_tokens(side: str, own_pad: bool) -> None:
    model = text_model(default_padding_side=side)
    if own_pad:
        model.tokenizer.pad_token = ","
    texts = ["When John and Mary", "Mary"]
    whole, bare = model.to_tokens(texts), model.to_tokens(texts, prepend_bos=False)
    assert torch.equal(utils.get_tokens_with_bos_removed(model.tokenizer, whole), bare)
    assert torch.equal(utils.get_tokens_with_bos_removed(model.tokenizer, whole, side), bare)
    bos = model.tokenizer.bos_token
    assert utils.get_input_with_manually_prepended_bos(bos, texts) == [bos + text for text in texts]
    assert utils.get_input_with_manually_prepended_bos(bos, "Mary") == bos + "Mary"
    assert utils.get_input_with_manually_prepended_bos(None, "Mary") == "Mary"
    without = copy.deepcopy(TOKENIZER)
    without.bos_token = None
    assert utils.get_tokens_with_bos_removed(without, whole) is whole


def test_a_row_without_bos_has_none_to_remove() -> None:
    with pytest.raises(ValueError, match="has no BOS token"):
        utils.get_tokens_with_bos_removed(utils.get_tokenizer_with_bos(TOKENIZER), torch.tensor([[5, 6]]), "left")


def test_defaults_of_a_model_are_others_within_a_block_and_whatever_happens_as_before_after_it() -> None:
    model = text_model()
    before = (model.cfg.default_prepend_bos, model.tokenizer.padding_side)
    texts, other_side = ["When John", "Mary"], "right" if before[1] == "left" else "left"
    expected = model.to_tokens(texts, prepend_bos=False, padding_side=other_side)
    with utils.LocallyOverridenDefaults(model, prepend_bos=False, padding_side=other_side):
        assert torch.equal(model.to_tokens(texts), expected)
        assert model.tokenizer.padding_side == other_side
        with utils.LocallyOverridenDefaults(model, prepend_bos=True, padding_side=utils.USE_DEFAULT_VALUE):
            assert torch.equal(model.to_tokens(texts), model.to_tokens(texts, True, other_side))
    assert (model.cfg.default_prepend_bos, model.tokenizer.padding_side) == before
    with pytest.raises(ValueError, match="the mark"), utils.LocallyOverridenDefaults(model, padding_side=other_side):
        raise ValueError("the mark")
    assert model.tokenizer.padding_side == before[1]
    for wrong in ({"prepend_bos": "yes"}, {"padding_side": "middle"}):
        with pytest.raises(ValueError, match=r"prepend_bos is|padding_side is"):
            utils.LocallyOverridenDefaults(model, **wrong)


def test_the_value_that_stands_for_a_default_is_taken_wherever_there_is_one() -> None:
    model = text_model(default_prepend_bos=False)
    default = {"prepend_bos": USE_DEFAULT_VALUE, "padding_side": USE_DEFAULT_VALUE}
    tokens = model.to_tokens(PROMPT)
    assert torch.equal(model.to_tokens(PROMPT, **default), tokens)
    assert torch.equal(model(PROMPT, **default), model(tokens))
    assert model.to_str_tokens(PROMPT, **default) == model.to_str_tokens(tokens)
    options = {"max_new_tokens": 2, "do_sample": False, "verbose": False, "stop_at_eos": False}
    assert model.generate(PROMPT, **default, **options) == model.generate(PROMPT, **options)


# Attributes and dictionaries


def test_attributes_are_found_and_set_by_their_paths() -> None:
    model = text_model()
    assert utils.get_nested_attr(model, "cfg.n_ctx") == 64
    assert utils.get_nested_attr(model, "embed.W_E") is model.embed.W_E
    utils.set_nested_attr(model, "cfg.n_ctx", 20)
    utils.set_nested_attr(model, "mark", 3)
    assert (model.cfg.n_ctx, model.mark) == (20, 3)


def test_entries_are_picked_by_the_start_of_their_names() -> None:
    weights = {"blocks.1.W": 1, "blocks.10.W": 2, "embed": 3}
    assert utils.filter_dict_by_prefix(weights, "blocks.1") == {"W": 1}
    assert utils.filter_dict_by_prefix(weights, "blocks.1.") == {"W": 1}


def test_what_is_installed_is_known_without_importing_it() -> None:
    assert utils.is_library_available("torch")
    assert not utils.is_library_available("no_such_package_at_all")
    assert utils.get_device() == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("owner", "name", "instead"),
    [
        (utils, "download_file_from_hf", "huggingface_hub.hf_hub_download"),
        (utils, "get_dataset", "datasets.load_dataset"),
        (evals, "evaluate", "tokenize_and_concatenate"),
        (evals, "make_pile_data_loader", "tokenize_and_concatenate"),
        (head_detector, "get_supported_heads", "HEAD_NAMES"),
        (text_model(), "sample_datapoint", "model.to_tokens"),
        (text_model(), "move_model_modules_to_device", "model.to"),
    ],
)
def test_a_name_that_is_not_kept_says_what_replaces_it(owner: Any, name: str, instead: str) -> None:
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'.*not kept: .*{instead}"):
        getattr(owner, name)
    with pytest.raises(AttributeError, match=r"no attribute 'nonsense'$"):
        _ = owner.nonsense
