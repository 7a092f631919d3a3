"""Generation that yields its tokens, or its text, while it goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.generation_helpers import BOS, GREEDY, say, text_model
from tests.helpers import tiny_model, tiny_tokens

# Streaming


@pytest.mark.parametrize("per_yield", [1, 2, 3, 25])
@pytest.mark.parametrize("use_cache", [True, False])
def test_the_pieces_of_a_stream_join_to_the_whole(per_yield: int, use_cache: bool) -> None:
    model = text_model()
    options = {"stop_at_eos": False, "use_past_kv_cache": use_cache, **GREEDY}
    tokens = model.to_tokens("When John")
    whole = model.generate(tokens, 7, **options)
    pieces = list(model.generate_stream(tokens, 7, max_tokens_per_yield=per_yield, **options))
    first = max(tokens.shape[1] + 1, min(per_yield, tokens.shape[1] + 7))
    assert pieces[0].shape[1] == first
    assert len(pieces) == 1 - (first - tokens.shape[1] - 7) // per_yield
    assert torch.equal(torch.cat(pieces, 1), whole)


@pytest.mark.parametrize("per_yield", [1, 2, 25])
@pytest.mark.parametrize("bos", [True, False])
def test_streamed_text_joins_to_the_whole_text(per_yield: int, bos: bool) -> None:
    model = text_model()
    words = [model.to_single_token(word) for word in (" Mary", ",", " John", " and", " Mary")]
    options = {"prepend_bos": bos, "return_type": "str", **GREEDY}
    with model.hooks(fwd_hooks=say(*words)):
        pieces = list(model.generate_stream("When", 5, max_tokens_per_yield=per_yield, **options))
    assert all(isinstance(piece, str) for piece in pieces)
    assert "".join(pieces) == "When Mary, John and Mary"
    if per_yield == 1:
        assert pieces[0].startswith("When")
        assert len(pieces) == 5


@pytest.mark.parametrize("per_yield", [1, 2])
def test_a_character_of_several_tokens_is_streamed_whole(per_yield: int) -> None:
    model = text_model()
    tokens = model.to_tokens("é→", prepend_bos=False)[0].tolist()
    assert len(tokens) == 5
    with model.hooks(fwd_hooks=say(*tokens)):
        whole = model.generate("A", 5, **GREEDY)
    assert whole == "Aé→"
    with model.hooks(fwd_hooks=say(*tokens)):
        pieces = list(model.generate_stream("A", 5, max_tokens_per_yield=per_yield, return_type="str", **GREEDY))
    assert "".join(pieces) == whole


def test_a_stream_stops_at_the_end() -> None:
    model = text_model()
    with model.hooks(fwd_hooks=say(5, 6, BOS, 7)):
        pieces = list(model.generate_stream(torch.tensor([[3]]), 4, max_tokens_per_yield=2, **GREEDY))
    assert [piece.tolist() for piece in pieces] == [[[3, 5]], [[6, BOS]]]


@pytest.mark.parametrize("per_yield", [2, 3])
def test_a_stream_of_tokens_without_a_batch_axis_joins_to_what_generate_returns(per_yield: int) -> None:
    model, tokens = tiny_model(), tiny_tokens(1)[0]
    options = {"stop_at_eos": False, **GREEDY}
    pieces = list(model.generate_stream(tokens, 4, max_tokens_per_yield=per_yield, **options))
    assert torch.equal(torch.cat(pieces), model.generate(tokens, 4, **options))


def test_a_stream_of_no_new_tokens_is_the_prompt() -> None:
    assert list(text_model().generate_stream("When John", 0, return_type="str", **GREEDY)) == ["When John"]


@pytest.mark.parametrize(
    ("per_yield", "lengths"), [(1, [6, 1, 1, 1, 1, 1]), (3, [6, 3, 2]), (5, [6, 5]), (8, [8, 3]), (25, [11])]
)
def test_the_pieces_of_a_batch_have_the_classic_lengths(per_yield: int, lengths: list[int]) -> None:
    model, tokens = tiny_model(), tiny_tokens(2, 5)
    pieces = list(model.generate_stream(tokens, 6, max_tokens_per_yield=per_yield, stop_at_eos=False, **GREEDY))
    assert [tuple(piece.shape) for piece in pieces] == [(2, length) for length in lengths]
    assert torch.equal(torch.cat(pieces, 1), model.generate(tokens, 6, stop_at_eos=False, **GREEDY))


def test_a_string_is_streamed_as_tokens_unless_text_is_asked_for() -> None:
    model = text_model()
    pieces = list(model.generate_stream("When John", 4, max_tokens_per_yield=2, stop_at_eos=False, **GREEDY))
    whole = model.generate("When John", 4, stop_at_eos=False, return_type="tokens", **GREEDY)
    assert torch.equal(torch.cat(pieces, 1), whole)


def test_a_stream_yields_before_the_run_is_over() -> None:
    model, steps = tiny_model(), []
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: steps.append(1))]):
        stream = model.generate_stream(tiny_tokens(1), 6, max_tokens_per_yield=9, stop_at_eos=False, **GREEDY)
        next(stream)
        assert len(steps) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens_per_yield": 0}, "max_tokens_per_yield is at least 1"),
        ({"return_type": "words"}, "return_type is 'input', 'str' or 'tokens'"),
        ({"top_k": 0}, "top_k is at least 1"),
        ({"max_new_tokens": 100}, "do not fit n_ctx"),
    ],
)
def test_bad_options_of_a_stream_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(text_model().generate_stream("Mary", **{"max_new_tokens": 2, "verbose": False, **options}))


def test_only_one_prompt_can_be_streamed_as_text() -> None:
    options = {"stop_at_eos": False, "verbose": False, "return_type": "str"}
    with pytest.raises(ValueError, match="one prompt at a time can be streamed as text, got 2"):
        list(text_model().generate_stream(tiny_tokens(2), 2, **options))
