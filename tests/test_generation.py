"""Generation: what is chosen, when it stops, and that the model is the same at every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from hooked_lm import HookedTransformer
from tests.architectures_helpers import LATENT
from tests.generation_helpers import BOS, GREEDY, say, text_model
from tests.helpers import CORPUS, VOCAB, tiny_model, tiny_tokenizer, tiny_tokens

TEXTS = ["When John and Mary", "The", "Induction heads complete", ""]


def greedy_by_hand(model: HookedTransformer, tokens: Tensor, steps: int) -> Tensor:
    """Extend tokens [1 pos] by the likeliest token, over and over."""
    for _ in range(steps):
        best = model(tokens, attention_mask=torch.ones_like(tokens))[:, -1].argmax(-1)
        tokens = torch.cat((tokens, best[:, None]), 1)
    return tokens


def say_rows(rows: list[list[int]]) -> Any:
    """As `say`, with tokens of their own for each row."""
    steps = iter(zip(*rows, strict=True))

    def force(logits: Tensor, hook: object) -> Tensor:
        forced = torch.zeros_like(logits)
        for row, token in enumerate(next(steps)):
            forced[row, -1, token] = 100.0
        return forced

    return [("unembed.hook_out", force)]


# Greedy decoding


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_is_the_loop_one_would_write(use_cache: bool) -> None:
    model, tokens = tiny_model(n_ctx=24), tiny_tokens(1)
    out = model.generate(tokens, 12, stop_at_eos=False, use_past_kv_cache=use_cache, **GREEDY)
    assert torch.equal(out, greedy_by_hand(model, tokens, 12))
    assert len(set(out[0].tolist())) > 3


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_is_that_of_transformers(gpt2_folder: Any, use_cache: bool) -> None:
    theirs = GPT2LMHeadModel.from_pretrained(gpt2_folder).eval()
    model = HookedTransformer.from_pretrained_no_processing(gpt2_folder)
    tokens = tiny_tokens(3, 6, vocab=VOCAB)
    expected = theirs.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=20,
        eos_token_id=[],
        pad_token_id=0,
    )
    assert expected.shape == (3, 26)
    out = model.generate(tokens, 20, stop_at_eos=False, use_past_kv_cache=use_cache, **GREEDY)
    assert torch.equal(out, expected)


CACHED = {
    "standard": {},
    "rotary": {"positional_embedding_type": "rotary", "d_head": 4},
    "alibi": {"positional_embedding_type": "alibi"},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "none": {"positional_embedding_type": "none"},
    "local": {"window_size": 3},
    "grouped": {"n_heads": 4, "d_head": 4, "n_key_value_heads": 2},
    "soft-cap": {"attn_scores_soft_cap": 1.5},
    "latent attention": LATENT,
    "experts": {"num_experts": 3, "experts_per_token": 2},
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("variant", CACHED)
@pytest.mark.parametrize("padded", [False, True])
def test_cached_generation_gives_the_tokens_and_logits_of_uncached(
    dtype: torch.dtype, tolerance: float, variant: str, padded: bool
) -> None:
    model = tiny_model(n_ctx=24, dtype=dtype, **CACHED[variant])
    tokens = tiny_tokens(3)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0] * 6 + [1]]) if padded else None
    runs = []
    for use_cache in (True, False):
        logits: list[Tensor] = []
        with model.hooks(fwd_hooks=[("unembed.hook_out", lambda x, hook, to=logits: to.append(x[:, -1].clone()))]):
            out = model.generate(
                tokens, 10, stop_at_eos=False, use_past_kv_cache=use_cache, attention_mask=mask, **GREEDY
            )
        runs.append((out, torch.stack(logits)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1].shape == (10, 3, 20)
    torch.testing.assert_close(runs[0][1], runs[1][1], atol=tolerance, rtol=0)


def test_the_cache_saves_the_work_it_is_for() -> None:
    model, tokens = tiny_model(n_ctx=24), tiny_tokens(2)
    for use_cache, expected in ((True, [7, 1, 1, 1]), (False, [7, 8, 9, 10])):
        lengths: list[int] = []
        with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook, to=lengths: to.append(x.shape[1]))]):
            model.generate(tokens, 4, stop_at_eos=False, use_past_kv_cache=use_cache, **GREEDY)
        assert lengths == expected


def test_a_step_unembeds_one_position() -> None:
    model, shapes = tiny_model(), []
    with model.hooks(fwd_hooks=[("unembed.hook_in", lambda x, hook: shapes.append(tuple(x.shape)))]):
        model.generate(tiny_tokens(2), 3, stop_at_eos=False, **GREEDY)
    assert shapes == [(2, 1, model.cfg.d_model)] * 3


# Batches of text


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("default_side", ["left", "right"])
@pytest.mark.parametrize("own_pad", [True, False])
def test_prompts_of_unequal_length_go_on_as_they_would_alone(use_cache: bool, default_side: str, own_pad: bool) -> None:
    tokenizer = tiny_tokenizer()
    if own_pad:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model = text_model(tokenizer, d_vocab=VOCAB + 1, default_padding_side=default_side)
    together = model.generate(TEXTS, 8, stop_at_eos=False, use_past_kv_cache=use_cache, **GREEDY)
    for text, out in zip(TEXTS, together, strict=True):
        by_hand = greedy_by_hand(model, model.to_tokens(text), 8)
        assert out == model.to_string(by_hand[0, 1:])
        assert out.startswith(text)
        assert out == model.generate(text, 8, stop_at_eos=False, use_past_kv_cache=use_cache, **GREEDY)


@pytest.mark.parametrize("freq_penalty", [0.5, 3.0])
def test_padding_does_not_count_as_having_been_said(freq_penalty: float) -> None:
    model = text_model()
    with torch.no_grad():
        # The padding token has to be in the running for a wrong penalty to show.
        model.unembed.b_U[BOS] = 3.0
    options = {"stop_at_eos": False, "freq_penalty": freq_penalty, **GREEDY}
    together = model.generate(TEXTS, 12, return_type="str", **options)
    assert together == [model.generate(text, 12, **options) for text in TEXTS]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("text", ["When John", "<|endoftext|>Mary", "<|endoftext|><|endoftext|>Mary"])
def test_bos_is_text_to_a_model_that_pads_with_it(use_cache: bool, default: bool, prepend_bos: bool, text: str) -> None:
    model = text_model(default_padding_side="left", default_prepend_bos=default)
    tokens = model.to_tokens(text, prepend_bos=prepend_bos)
    out = model.generate(
        text,
        8,
        prepend_bos=prepend_bos,
        stop_at_eos=False,
        use_past_kv_cache=use_cache,
        return_type="tokens",
        **GREEDY,
    )
    assert torch.equal(out, greedy_by_hand(model, tokens, 8))


@pytest.mark.parametrize("use_cache", [True, False])
def test_end_of_sequence_tokens_that_were_generated_are_not_taken_for_padding(use_cache: bool) -> None:
    model = text_model(default_padding_side="left")
    with model.hooks(fwd_hooks=say(BOS, BOS, BOS)):
        start = model.generate("", 3, stop_at_eos=False, return_type="tokens", use_past_kv_cache=use_cache, **GREEDY)
    assert start.tolist() == [[BOS] * 4]
    patterns: list[Tensor] = []
    hooks = [("blocks.0.attn.hook_pattern", lambda x, hook: patterns.append(x[0, 0, -1].clone()))]
    with model.hooks(fwd_hooks=[*say(BOS, BOS, BOS), *hooks]):
        model.generate("", 3, stop_at_eos=False, use_past_kv_cache=use_cache, **GREEDY)
    assert [len(pattern) for pattern in patterns] == [1, 2, 3]
    assert all((pattern > 0).all() for pattern in patterns)


def test_left_padded_tokens_go_on_as_their_prompts_would_alone() -> None:
    model = text_model(default_padding_side="left")
    tokens = model.to_tokens(TEXTS)
    out = model.generate(tokens, 8, stop_at_eos=False, **GREEDY)
    assert torch.equal(out[:, : tokens.shape[1]], tokens)
    for row, text in zip(out, TEXTS, strict=True):
        alone = greedy_by_hand(model, model.to_tokens(text), 8)[0]
        assert torch.equal(row[-len(alone) :], alone)


# Stopping


@pytest.mark.parametrize("use_cache", [True, False])
def test_each_prompt_stops_at_its_own_end_and_is_filled_from_there(use_cache: bool) -> None:
    model, tokens = text_model(), tiny_tokens(3, 4, vocab=VOCAB)
    said = [[5, BOS, 7, 8, 9, 10], [5, 6, 7, BOS, 9, 10], [BOS, 6, 7, 8, 9, 10]]
    with model.hooks(fwd_hooks=say_rows(said)):
        out = model.generate(tokens, 6, use_past_kv_cache=use_cache, **GREEDY)
    # The run ends when the last prompt has.
    assert out[:, 4:].tolist() == [[5, BOS, BOS, BOS], [5, 6, 7, BOS], [BOS, BOS, BOS, BOS]]


def test_an_end_in_the_prompt_does_not_stop_it() -> None:
    model = text_model()
    with model.hooks(fwd_hooks=say(5, 6, BOS, 7)):
        assert model.generate(torch.tensor([[3, BOS]]), 4, **GREEDY).tolist() == [[3, BOS, 5, 6, BOS]]


def test_nothing_stops_a_prompt_when_that_is_not_wanted() -> None:
    model = text_model()
    with model.hooks(fwd_hooks=say(5, BOS, 6, BOS)):
        out = model.generate(torch.tensor([[3]]), 4, stop_at_eos=False, **GREEDY)
    assert out.tolist() == [[3, 5, BOS, 6, BOS]]


@pytest.mark.parametrize("ends", [[11, 12], (12, 11)])
def test_any_of_several_end_tokens_stops_a_prompt(ends: Any) -> None:
    model = tiny_model()
    with model.hooks(fwd_hooks=say_rows([[5, 11, 6, 7, 8], [5, 6, 12, 7, 8], [5, 6, 7, 11, 8]])):
        out = model.generate(tiny_tokens(3, 2), 5, eos_token_id=ends, **GREEDY)
    new = out[:, 2:].tolist()
    assert len(new[0]) == 4
    assert new[0][:2] == [5, 11]
    assert new[1][:3] == [5, 6, 12]
    assert new[2] == [5, 6, 7, 11]
    # After the end there is nothing but ends.
    assert set(new[0][2:]) | set(new[1][3:]) <= {11, 12}


def test_a_single_end_token_may_be_given_to_a_model_without_tokenizer() -> None:
    model = tiny_model()
    with model.hooks(fwd_hooks=say(5, 11, 6)):
        assert model.generate(torch.tensor([1, 2]), 3, eos_token_id=11, **GREEDY).tolist() == [1, 2, 5, 11]


def test_a_model_without_tokenizer_has_no_end_to_stop_at() -> None:
    with pytest.raises(ValueError, match="pass eos_token_id, or stop_at_eos=False"):
        tiny_model().generate(tiny_tokens(), 3, **GREEDY)


def test_text_goes_up_to_the_end_without_special_tokens() -> None:
    model = text_model()
    mary = model.to_single_token(" Mary")
    with model.hooks(fwd_hooks=say_rows([[mary, BOS, mary, mary], [mary, mary, mary, BOS]])):
        out = model.generate(["John", "When John"], 4, **GREEDY)
    assert out == ["John Mary", "When John Mary Mary Mary"]


def test_more_steps_than_needed_are_not_taken() -> None:
    model, steps = text_model(), []
    with model.hooks(fwd_hooks=[*say(5, BOS), ("hook_embed", lambda x, hook: steps.append(1))]):
        model.generate("Mary", 40, **GREEDY)
    assert len(steps) == 2


# Hooks act at every step


@pytest.mark.parametrize("use_cache", [True, False])
def test_hooks_run_once_a_step(use_cache: bool) -> None:
    model, runs = tiny_model(), []
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: runs.append(1))]):
        model.generate(tiny_tokens(), 5, stop_at_eos=False, use_past_kv_cache=use_cache, **GREEDY)
    assert len(runs) == 5
    model.generate(tiny_tokens(), 5, stop_at_eos=False, use_past_kv_cache=use_cache, **GREEDY)
    assert len(runs) == 5


@pytest.mark.parametrize("use_cache", [True, False])
def test_steering_acts_on_every_step(use_cache: bool) -> None:
    model, tokens, target = tiny_model(), tiny_tokens(), 13
    direction = model.tokens_to_residual_directions(target).detach()

    def steer(resid: Tensor, hook: object) -> Tensor:
        return resid + 50 * direction

    options = {"stop_at_eos": False, "use_past_kv_cache": use_cache, **GREEDY}
    plain = model.generate(tokens, 6, **options)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", steer)]):
        steered = model.generate(tokens, 6, **options)
    by_hand = tokens
    for _ in range(6):
        logits = model.run_with_hooks(by_hand, fwd_hooks=[("blocks.1.hook_resid_post", steer)])
        by_hand = torch.cat((by_hand, logits[:, -1].argmax(-1)[:, None]), 1)
    assert torch.equal(steered, by_hand)
    assert not torch.equal(steered, plain)
    assert torch.equal(model.generate(tokens, 6, **options), plain)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_hook_that_raises_leaves_the_model_as_it_was(use_cache: bool) -> None:
    model, tokens = tiny_model(), tiny_tokens()
    before = model.generate(tokens, 4, stop_at_eos=False, use_past_kv_cache=use_cache, **GREEDY)
    with pytest.raises(StopIteration), model.hooks(fwd_hooks=say(1, 2)):  # noqa: PT012
        model(tokens)
        model(tokens)
        model(tokens)
    assert not any(point.has_hooks() for point in model.hook_points())
    after = model.generate(tokens, 4, stop_at_eos=False, use_past_kv_cache=use_cache, **GREEDY)
    assert torch.equal(before, after)


def test_generation_keeps_no_graph() -> None:
    model, grads = tiny_model(), []
    with model.hooks(fwd_hooks=[("unembed.hook_out", lambda x, hook: grads.append(x.requires_grad))]):
        model.generate(tiny_tokens(), 3, stop_at_eos=False, **GREEDY)
    assert grads == [False] * 3
    assert torch.is_grad_enabled()


# What comes back


def test_return_types_decide_between_text_and_tokens() -> None:
    model = text_model()
    options = {"stop_at_eos": False, **GREEDY}
    tokens = model.to_tokens("When John")
    expected = greedy_by_hand(model, tokens, 5)
    text = model.to_string(expected[0, 1:])
    assert model.generate("When John", 5, **options) == text
    assert model.generate(["When John"], 5, **options) == text
    assert model.generate(["When John", "When John"], 5, **options) == [text, text]
    assert model.generate("When John", 5, return_type="str", **options) == text
    assert torch.equal(model.generate("When John", 5, return_type="tokens", **options), expected)
    assert torch.equal(model.generate(tokens, 5, **options), expected)
    assert torch.equal(model.generate(tokens[0], 5, **options), expected[0])
    assert torch.equal(model.generate(tokens, 5, return_type="tokens", **options), expected)
    assert model.generate(tokens, 5, return_type="str", **options) == text
    assert model.generate(tokens[0], 5, return_type="str", **options) == text
    no_bos = model.generate("When John", 5, prepend_bos=False, **options)
    assert no_bos == model.to_string(greedy_by_hand(model, tokens[:, 1:], 5)[0])


def test_the_prompt_given_is_not_changed() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    before = tokens.clone()
    model.generate(tokens, 3, stop_at_eos=False, verbose=False)
    assert torch.equal(tokens, before)


@pytest.mark.parametrize("give", ["When John", ["When John", "The"], torch.tensor([[3, 4]]), torch.tensor([3, 4])])
def test_no_new_tokens_give_the_prompt_back(give: Any) -> None:
    out = text_model().generate(give, 0, **GREEDY)
    assert torch.equal(out, give) if isinstance(give, Tensor) else out == give


def test_an_empty_prompt_starts_from_bos() -> None:
    model = text_model()
    out = model.generate(max_new_tokens=4, stop_at_eos=False, return_type="tokens", **GREEDY)
    assert torch.equal(out, greedy_by_hand(model, torch.tensor([[BOS]]), 4))


@pytest.mark.parametrize("verbose", [True, False])
def test_verbose_shows_a_progress_bar(verbose: bool, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().generate(tiny_tokens(), 3, stop_at_eos=False, do_sample=False, verbose=verbose)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("generating" in captured.err and "0/3" in captured.err) == verbose
    assert verbose or captured.err == ""


# Bad options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k is at least 1, got 0"),
        ({"top_k": -3}, "top_k is at least 1, got -3"),
        ({"top_p": 0.0}, "top_p is above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p is above 0 and at most 1, got 1.5"),
        ({"temperature": -1.0}, "temperature is not negative, got -1.0"),
        ({"max_new_tokens": -1}, "max_new_tokens is not negative, got -1"),
        ({"return_type": "words"}, "return_type is 'input', 'str', 'tokens' or 'embeds', not 'words'"),
        ({"padding_side": "right"}, "padded on the left"),
        ({"attention_mask": torch.ones(1, 2)}, "mask"),
    ],
)
def test_bad_options_raise(options: dict[str, Any], message: str) -> None:
    model = text_model()
    before = model("Mary")
    with pytest.raises(ValueError, match=message):
        model.generate("Mary", **{"max_new_tokens": 2, "verbose": False, **options})
    assert torch.equal(model("Mary"), before)


def test_text_that_does_not_fit_raises_before_anything_is_computed() -> None:
    model, runs = tiny_model(n_ctx=10), []
    with (
        model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: runs.append(1))]),
        pytest.raises(ValueError, match="a prompt of 7 tokens and 5 new ones do not fit n_ctx=10"),
    ):
        model.generate(tiny_tokens(), 5, stop_at_eos=False, verbose=False)
    assert runs == []


@pytest.mark.parametrize("use_cache", [True, False])
def test_text_may_fill_the_context(use_cache: bool) -> None:
    model = tiny_model(n_ctx=10)
    out = model.generate(tiny_tokens(), 3, stop_at_eos=False, use_past_kv_cache=use_cache, **GREEDY)
    assert out.shape == (2, 10)


def test_tokens_padded_on_the_right_raise() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])
    with pytest.raises(ValueError, match="the last position of every prompt has to be a real token"):
        tiny_model().generate(tiny_tokens(), 2, attention_mask=mask, stop_at_eos=False, verbose=False)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="has no tokenizer"):
        tiny_model().generate(CORPUS[0], 2, verbose=False)


def test_an_empty_list_of_prompts_raises() -> None:
    with pytest.raises((ValueError, TypeError), match="empty"):
        text_model().generate([], 2, verbose=False)


@pytest.mark.parametrize("options", [{}, {"padding_side": "left"}])
def test_left_padding_is_seen_in_tokens_whatever_side_the_model_pads_by_default(options: dict[str, Any]) -> None:
    model = text_model()
    tokens = model.to_tokens(TEXTS, padding_side="left")
    out = model.generate(tokens, 8, stop_at_eos=False, **options, **GREEDY)
    for row, text in zip(out, TEXTS, strict=True):
        alone = greedy_by_hand(model, model.to_tokens(text), 8)[0]
        assert torch.equal(row[-len(alone) :], alone)


def test_prompts_padded_on_the_right_are_refused() -> None:
    model = text_model()
    with pytest.raises(ValueError, match="some prompts end in padding"):
        model.generate(model.to_tokens(TEXTS), 3, **GREEDY)
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(model.to_tokens(TEXTS), 3, padding_side="right", **GREEDY)


def test_a_mask_for_a_prompt_without_a_batch_axis_needs_none() -> None:
    model = text_model()
    tokens = model.to_tokens("When John")[0]
    padded = torch.cat((torch.zeros(2, dtype=torch.long), tokens))
    mask = torch.cat((torch.zeros(2, dtype=torch.long), torch.ones_like(tokens)))
    out = model.generate(padded, 4, attention_mask=mask, stop_at_eos=False, **GREEDY)
    assert torch.equal(out[2:], model.generate(tokens, 4, stop_at_eos=False, **GREEDY))
