"""Generation from embeddings and to them, and the logits of its steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hooked_lm import Intervention
from tests.generation_helpers import GREEDY, text_model
from tests.helpers import tiny_model, tiny_tokens

OPTIONS: dict[str, Any] = {"stop_at_eos": False, **GREEDY}
KINDS: dict[str, dict[str, Any]] = {
    "learned positions": {},
    "rotary": {"positional_embedding_type": "rotary", "normalization_type": "RMS"},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "scaled": {"embedding_scale": 3.0},
    "norm after the embedding": {"post_embedding_ln": True},
    # The rotation of cached keys changes with the length, so that the text is read anew on the way.
    "dynamic rotary": {
        "positional_embedding_type": "rotary",
        "use_dynamic_rope": True,
        "dynamic_rope_factor": 2.0,
        "dynamic_rope_original_ctx_len": 6,
    },
}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_go_on_as_their_tokens_do(kind: str, use_cache: bool) -> None:
    model, tokens = tiny_model(**KINDS[kind]), tiny_tokens(2, 4)
    options = {"use_past_kv_cache": use_cache, **OPTIONS}
    whole = model.generate(tokens, 5, **options)
    embeds = model.embed(tokens)
    assert torch.equal(model.generate(embeds, 5, return_type="tokens", **options), whole[:, 4:])
    assert torch.equal(model.generate(embeds, 5, **options), model.embed(whole))
    assert torch.equal(model.generate(tokens, 5, return_type="embeds", **options), model.embed(whole))
    assert not model.list_hooks()


def test_embeddings_of_no_token_are_read() -> None:
    model, tokens = tiny_model(), tiny_tokens(1, 4)
    half_way = (model.embed(tokens) + model.embed(tiny_tokens(1, 4, seed=1))) / 2
    with model.hooks([("hook_embed", lambda looked_up, hook: half_way)]):
        expected = model(tokens)[:, -1].argmax(-1)
    assert torch.equal(model.generate(half_way, 1, return_type="tokens", **OPTIONS)[:, 0], expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_hooks_and_interventions_act_on_given_embeddings(use_cache: bool) -> None:
    model, tokens = tiny_model(), tiny_tokens(2, 4)
    options = {"use_past_kv_cache": use_cache, **OPTIONS}
    off = Intervention("hook_embed", "zero", pos=3)
    expected = model.generate(tokens, 5, interventions=[off], **options)
    assert not torch.equal(expected, model.generate(tokens, 5, **options))
    embeds = model.embed(tokens)
    found = model.generate(embeds, 5, interventions=[off], return_type="tokens", **options)
    assert torch.equal(found, expected[:, 4:])

    def double(looked_up: torch.Tensor, hook: object) -> torch.Tensor:
        return looked_up * 2

    with model.hooks([("hook_embed", double)]):
        expected = model.generate(tokens, 5, **options)
        assert torch.equal(model.generate(embeds, 5, return_type="tokens", **options), expected[:, 4:])


def test_embeddings_padded_on_the_left_go_on_as_they_would_alone() -> None:
    model, tokens = tiny_model(), tiny_tokens(1, 4)
    alone = model.generate(tokens, 4, **OPTIONS)[:, 4:]
    padded = torch.cat((torch.ones(1, 2, model.cfg.d_model).double(), model.embed(tokens)), 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert torch.equal(model.generate(padded, 4, attention_mask=mask, return_type="tokens", **OPTIONS), alone)


def test_new_tokens_after_embeddings_are_text() -> None:
    model = text_model()
    tokens = model.to_tokens("When John")
    new = model.generate(tokens, 3, **OPTIONS)[:, tokens.shape[1] :]
    assert model.generate(model.embed(tokens), 3, return_type="str", **OPTIONS) == model.to_string(new[0])
    embeds = model.generate("When John", 3, return_type="embeds", **OPTIONS)
    assert torch.equal(embeds, model.embed(torch.cat((tokens, new), 1)))
    assert model.generate(tokens[0], 3, return_type="embeds", **OPTIONS).shape == embeds.shape[1:]


def test_what_are_no_embeddings_raises() -> None:
    model = tiny_model()
    for wrong in (torch.zeros(2, 4).double(), torch.zeros(1, 2, 5).double(), torch.zeros(1, 2, 12)):
        with pytest.raises(TypeError, match=r"embeddings \[batch pos 12\] in torch.float64, got a tensor with shape"):
            model.generate(wrong, 1, **OPTIONS)
    for penalty in ({"freq_penalty": 1.0}, {"repetition_penalty": 2.0}):
        with pytest.raises(ValueError, match="count tokens, and the prompt's embeddings are none"):
            model.generate(torch.zeros(1, 2, 12).double(), 1, **penalty, **OPTIONS)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("return_type", ["input", "str"])
def test_the_logits_of_each_step_are_those_that_the_model_gives_the_text(use_cache: bool, return_type: Any) -> None:
    model = text_model()
    tokens = model.to_tokens(["When John", "and Mary went"], padding_side="left")
    options = {"use_past_kv_cache": use_cache, "return_type": return_type, **OPTIONS}
    plain = model.generate(tokens, 4, use_past_kv_cache=use_cache, repetition_penalty=9.0, **OPTIONS)
    given = model.generate(tokens, 4, output_logits=True, repetition_penalty=9.0, **options)
    assert torch.equal(given.sequences, plain)
    assert len(given.logits) == 4
    logits = model(given.sequences, padding_side="left")
    for step, of_step in enumerate(given.logits):
        expected = logits[:, tokens.shape[1] - 1 + step]
        assert torch.allclose(of_step, expected, rtol=0, atol=1e-9)  # before the penalty
    from_embeddings = model.generate(model.embed(tokens), 4, output_logits=True, **OPTIONS)
    assert from_embeddings.sequences.shape == (2, 4)
