"""Texts to tokens and back, with padding and BOS."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from tests.classic.library import Library
from tests.classic.scenario import Outcome, scenario
from tests.classic.words import word_tokenizer

TEXTS = ["the cat sat", "John and Mary went to the store"]
PROMPTS = ["the cat sat on the mat", "John ran"]


@scenario("text_plain")
def to_tokens(lib: Library, model: Any) -> Outcome:
    out: Outcome = {}
    for text in [*TEXTS, " the", "zebra", "the cat!\n"]:
        out[repr(text)] = model.to_tokens(text)
        out[f"{text!r} alone"] = model.to_tokens(text, prepend_bos=False)
    out["several"] = model.to_tokens(PROMPTS)
    out["several on the left"] = model.to_tokens(PROMPTS, padding_side="left")
    out["several alone"] = model.to_tokens(PROMPTS, prepend_bos=False, padding_side="right")
    out["too long"] = list(model.to_tokens("cat " * 30).shape)
    out["not truncated"] = list(model.to_tokens("cat " * 30, truncate=False).shape)
    return out


@scenario("text_plain")
def to_strings(lib: Library, model: Any) -> Outcome:
    given = model.to_tokens(PROMPTS)
    return {
        "of a batch": model.to_string(given),
        "of one": model.to_string(given[0]),
        "of a list": model.to_string([4, 5, 6]),
        "of a number": model.to_string(torch.tensor(5)),
        "of an array": model.to_string(given[1].numpy()),
        "pieces": model.to_str_tokens("the cat sat"),
        "pieces alone": model.to_str_tokens("the cat sat", prepend_bos=False),
        "pieces of tokens": model.to_str_tokens(given[0]),
        "pieces of a row": model.to_str_tokens(given[:1]),
        "pieces of an array": model.to_str_tokens(given[0].numpy()),
        "pieces of several": model.to_str_tokens(PROMPTS),
    }


@scenario("text_plain")
def single_tokens(lib: Library, model: Any) -> Outcome:
    out: Outcome = {text: model.to_single_token(text) for text in (" cat", " Mary", "a", ".")}
    out["as text"] = [model.to_single_str_token(number) for number in (0, 5, 12, 39)]
    for mode in ("first", "last"):
        out[f"{mode} position"] = model.get_token_position(" the", "the cat saw the dog", mode=mode)
        out[f"{mode} alone"] = model.get_token_position(" the", "a cat saw the dog", mode=mode, prepend_bos=False)
        out[f"{mode} of tokens"] = model.get_token_position(4, torch.tensor([1, 4, 3, 4]), mode=mode)
    return out


@scenario("text_plain", "text_vocab_out")
def residual_directions(lib: Library, model: Any) -> Outcome:
    if model.cfg.d_vocab_out < 10:
        return {"tokens": model.tokens_to_residual_directions(torch.tensor([1, 2]))}
    return {
        "text": model.tokens_to_residual_directions(" cat"),
        "number": model.tokens_to_residual_directions(5),
        "scalar": model.tokens_to_residual_directions(torch.tensor(5)),
        "one": model.tokens_to_residual_directions(torch.tensor([5])),
        "row": model.tokens_to_residual_directions(torch.tensor([5, 6, 7])),
        "batch": model.tokens_to_residual_directions(torch.tensor([[5, 6], [7, 8]])),
    }


@scenario("text_plain", "text_rotary", "text_alibi", "text_shortformer", "text_grouped", "text_local")
def logits_of_padded_texts(lib: Library, model: Any) -> Outcome:
    """At the positions of the prompts: what stands at padding is nobody's business."""
    out: Outcome = {}
    for side in ("left", "right"):
        given = model.to_tokens(PROMPTS, padding_side=side)
        ordinary = given != model.tokenizer.pad_token_id
        out[side] = model(PROMPTS, padding_side=side)[ordinary]
        out[f"{side} as tokens"] = model(given, padding_side=side)[ordinary]
        out[f"{side} loss"] = model(PROMPTS, padding_side=side, return_type="loss", loss_per_token=True)[
            ordinary[:, 1:]
        ]
    out["alone"] = model(PROMPTS[1])
    out["without BOS"] = model(PROMPTS[1], prepend_bos=False)
    return out


@scenario("text_plain", "text_rotary")
def padding_and_losses(lib: Library, model: Any) -> Outcome:
    given = model.to_tokens(PROMPTS, padding_side="right")
    mask = (given != model.tokenizer.pad_token_id).long()
    return {
        "loss of padded texts": model(PROMPTS, return_type="loss", padding_side="right"),
        "loss under a mask": model(given, return_type="loss", attention_mask=mask, padding_side="right"),
        "loss of one": model(PROMPTS[0], return_type="loss"),
        "loss_fn": model.loss_fn(model(given), given, mask),
        "loss_fn per token": model.loss_fn(model(given), given, per_token=True)[0],
        "masks": lib.utils.get_attention_mask(model.tokenizer, given, True),
        "masks without BOS": lib.utils.get_attention_mask(model.tokenizer, given[:, 1:], False),
    }


@scenario("text_plain")
def the_padding_side_is_one_setting(lib: Library, model: Any) -> Outcome:
    out: Outcome = {"at first": model.tokenizer.padding_side}
    model.tokenizer.padding_side = "left"
    out["left"] = model.to_tokens(PROMPTS)
    out["logits"] = model(PROMPTS)[:, -1]
    model.tokenizer.padding_side = "right"
    out["right"] = model.to_tokens(PROMPTS)
    return out


@scenario("text_plain", default_prepend_bos=False)
def no_bos_by_default(lib: Library, model: Any) -> Outcome:
    out: Outcome = {
        "tokens": model.to_tokens(TEXTS[0]),
        "asked for": model.to_tokens(TEXTS[0], prepend_bos=True),
        "pieces": model.to_str_tokens(TEXTS[0]),
        "logits": model(TEXTS[0])[:, -1],
        "several on the left": model.to_tokens(PROMPTS, padding_side="left"),
    }
    model.cfg.default_prepend_bos = True
    out["changed"] = model.to_tokens(TEXTS[0])
    return out


@scenario("text_plain")
def other_tokenizers(lib: Library, model: Any) -> Outcome:
    out: Outcome = {}
    model.set_tokenizer(word_tokenizer(padding_side="left"), default_padding_side="left")
    out["left"] = model.to_tokens(PROMPTS)
    model.set_tokenizer(word_tokenizer(), default_padding_side="right")
    out["right"] = model.to_tokens(PROMPTS)
    out["prepends"] = model.cfg.tokenizer_prepends_bos
    out["encoded"] = model.tokenizer.encode("the cat")
    inferred = lib.HookedTransformerConfig(n_layers=1, d_model=8, n_ctx=8, d_head=4, n_heads=2, act_fn="relu", seed=0)
    small = lib.HookedTransformer(inferred, tokenizer=word_tokenizer())
    out["vocabulary"] = [small.cfg.d_vocab, small.cfg.d_vocab_out]
    return out


@scenario("text_plain")
def prompts_tested(lib: Library, model: Any) -> Outcome:
    frame = model("the cat")[0, -1]
    return {"top": frame.topk(5).indices.tolist(), "probability": frame.softmax(-1)[model.to_single_token(" dog")]}


@scenario()
def concatenated(lib: Library) -> Outcome:
    rows = {"text": ["the cat sat. ", "John and Mary went to the store. ", "a dog ran! "] * 5}
    # The other library takes data sets of `datasets` alone, which need not be installed here.
    classic = lib.package == "transformer_lens"
    texts: Any = importlib.import_module("datasets").Dataset.from_dict(rows) if classic else rows["text"]
    chunks = lib.utils.tokenize_and_concatenate(texts, word_tokenizer(), max_length=8, num_proc=1)
    bare = lib.utils.tokenize_and_concatenate(texts, word_tokenizer(), max_length=6, add_bos_token=False, num_proc=1)
    return {
        "rows": _rows(chunks),
        "without BOS": _rows(bare),
    }


def _rows(chunks: Any) -> Any:
    """Return the tokens [row pos] of a data set, or of a tensor."""
    return chunks if isinstance(chunks, torch.Tensor) else torch.stack([row["tokens"] for row in chunks])


@scenario("text_plain", "text_rotary", "text_alibi")
def one_special_token(lib: Library, model: Any) -> Outcome:
    """BOS, EOS and padding are the same token, as GPT-2's are."""
    model.set_tokenizer(word_tokenizer(bos_token="<eos>", pad_token="<eos>"))
    out: Outcome = {}
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        given = model.to_tokens(PROMPTS)
        out[side] = given
        mask = lib.utils.get_attention_mask(model.tokenizer, given, True)
        out[f"{side} mask"] = mask
        out[f"{side} logits"] = model(PROMPTS)[mask.bool()]
        out[f"{side} as tokens"] = model(given)[mask.bool()]
    out["alone"] = model(PROMPTS[1])
    out["generated"] = model.generate(
        PROMPTS, max_new_tokens=3, padding_side="left", do_sample=False, verbose=False, return_type="tokens"
    )[:, -3:]
    return out


@scenario("text_plain")
def masks_of_either_side(lib: Library, model: Any) -> Outcome:
    out: Outcome = {}
    for side in ("left", "right"):
        given = model.to_tokens(PROMPTS, padding_side=side)
        out[side] = lib.utils.get_attention_mask(model.tokenizer, given, True, padding_side=side)
        out[f"{side}, no BOS"] = lib.utils.get_attention_mask(model.tokenizer, given[:, 1:], False, padding_side=side)
    return out
