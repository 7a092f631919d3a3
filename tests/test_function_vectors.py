"""Function vectors equal a plain loop of hooked runs, and find the head that was built to know the task."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer
from hooked_lm.circuits.function_vectors import (
    FunctionVector,
    HeadEffects,
    function_vector,
    head_effects,
    mean_head_outputs,
    mean_state,
    steering_effect,
)
from tests.function_vectors_helpers import (
    CORRUPTED,
    EXACT,
    MODELS,
    QUIET,
    TASK,
    ZERO_SHOT,
    every_model,
    last_logits,
    random_vector,
)
from tests.helpers import VOCAB, randomise_, tiny_config, tiny_model

ANSWERS = [3, 4, 5]


def text_model(tokenizer: Any, **changes: Any) -> HookedTransformer:
    return randomise_(HookedTransformer(tiny_config(d_vocab=VOCAB, n_ctx=64, **changes), tokenizer))  # type: ignore


def random_z(model: HookedTransformer, seed: int = 5) -> Tensor:
    shape = (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Means


@every_model
def test_mean_head_outputs_are_those_of_single_runs(kind: str) -> None:
    model = tiny_model(**MODELS[kind])
    means = mean_head_outputs(model, TASK, batch_size=2, **QUIET)
    assert means.shape == (2, 3, 4)
    for layer in range(2):
        each = [model.run_with_cache(prompt)[1]["z", layer][0, -1] for prompt in TASK]
        torch.testing.assert_close(means[layer], torch.stack(each).mean(0), **EXACT)


def test_means_of_another_position_count_from_the_end() -> None:
    model = tiny_model()
    _, cache = model.run_with_cache(TASK)
    torch.testing.assert_close(mean_head_outputs(model, TASK, -2, **QUIET)[1], cache["z", 1][:, -2].mean(0), **EXACT)
    states = mean_state(model, TASK, 0, -3, **QUIET)
    torch.testing.assert_close(states, cache["resid_post", 0][:, -3].mean(0), **EXACT)


@every_model
def test_the_mean_state_is_the_stream_that_leaves_the_layer(kind: str) -> None:
    model = tiny_model(**MODELS[kind])
    _, cache = model.run_with_cache(TASK)
    expected = torch.stack([cache["resid_post", layer][:, -1].mean(0) for layer in range(2)])
    torch.testing.assert_close(mean_state(model, TASK, batch_size=3, **QUIET), expected, **EXACT)
    torch.testing.assert_close(mean_state(model, TASK, 0, **QUIET), expected[0], **EXACT)
    torch.testing.assert_close(mean_state(model, TASK, -1, **QUIET), expected[1], **EXACT)


def test_a_mean_state_runs_no_later_layer() -> None:
    model, ran = tiny_model(), []
    model.add_hook("blocks.1.hook_resid_pre", lambda x, hook: ran.append(hook.name))
    mean_state(model, TASK, 0, **QUIET)
    assert not ran


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_of_a_model_in_half_precision_are_float32(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    means = mean_head_outputs(model, TASK, **QUIET)
    # Nothing but z: where the pattern is kept too, attention goes another way and rounds differently.
    _, cache = model.run_with_cache(TASK, names_filter="*.hook_z")
    assert means.dtype == torch.float32
    torch.testing.assert_close(means[1], cache["z", 1][:, -1].float().mean(0))
    vector = function_vector(model, means, [(1, 2)])
    torch.testing.assert_close(vector.vector, means[1, 2] @ model.W_O[1, 2].float())
    assert last_logits(model, TASK, vector.intervention(0)).dtype == dtype
    effects = head_effects(model, CORRUPTED, ANSWERS, means, **QUIET)
    steered = steering_effect(model, ZERO_SHOT, 3, vector, **QUIET)
    assert effects.effect.dtype == steered.log_prob.dtype == steered.accuracy.dtype == torch.float32


def test_no_gradient_is_kept() -> None:
    model = tiny_model()
    assert all(parameter.requires_grad for parameter in model.parameters())
    means = mean_head_outputs(model, TASK, **QUIET)
    effects = head_effects(model, CORRUPTED, ANSWERS, means, **QUIET)
    task = function_vector(model, means, effects, 2)
    steered = steering_effect(model, ZERO_SHOT, 3, task, **QUIET)
    assert not any(t.requires_grad for t in (means, effects.scores, task.vector, steered.log_probs))


# Padding: every prompt's own last token


TEXTS = ["John and Mary went to the store", "France is", "the capital of Italy is Rome, and"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_unequal_length_count_as_they_do_alone(tokenizer: Any, side: str) -> None:
    model = text_model(tokenizer, default_padding_side=side)
    alone = torch.stack([mean_head_outputs(model, text, **QUIET) for text in TEXTS])
    assert (alone[0] - alone[1]).abs().max() > 1e-2
    torch.testing.assert_close(mean_head_outputs(model, TEXTS, batch_size=2, **QUIET), alone.mean(0), **EXACT)
    states = torch.stack([mean_state(model, text, **QUIET) for text in TEXTS])
    torch.testing.assert_close(mean_state(model, TEXTS, **QUIET), states.mean(0), **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_effects_and_steering_of_padded_prompts_are_those_of_the_prompts_alone(tokenizer: Any, side: str) -> None:
    model = text_model(tokenizer, default_padding_side=side)
    means, vector = random_z(model), random_vector()
    effects = head_effects(model, TEXTS, ANSWERS, means, **QUIET)
    steered = steering_effect(model, TEXTS, ANSWERS, vector, **QUIET)
    for index, (text, answer) in enumerate(zip(TEXTS, ANSWERS, strict=True)):
        alone = head_effects(model, text, answer, means, **QUIET)
        torch.testing.assert_close(effects.per_prompt[..., index], alone.effect, **EXACT)
        steered_alone = steering_effect(model, text, [answer], vector, **QUIET)
        torch.testing.assert_close(steered.log_probs[:, index], steered_alone.log_prob, **EXACT)
        torch.testing.assert_close(steered.control_log_probs[:, index], steered_alone.control_log_prob, **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_with_a_mask_are_read_at_their_last_real_position(side: str) -> None:
    model = tiny_model()
    lengths, mask = (6, 2, 4), torch.zeros(3, 6, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(6 - length, None) if side == "left" else slice(length)] = 1
    tokens = TASK[:3]
    alone = [mean_head_outputs(model, row[kept.bool()], **QUIET) for row, kept in zip(tokens, mask, strict=True)]
    for given in (mask, mask.bool()):
        padded = mean_head_outputs(model, tokens, attention_mask=given, **QUIET)
        torch.testing.assert_close(padded, torch.stack(alone).mean(0), **EXACT)
    effects = head_effects(model, tokens, ANSWERS, random_z(model), attention_mask=mask, **QUIET)
    steered = steering_effect(model, tokens, ANSWERS, random_vector(), attention_mask=mask, **QUIET)
    for row in range(3):
        real = tokens[row][mask[row].bool()]
        base = last_logits(model, real).log_softmax(-1)[0, ANSWERS[row]]
        torch.testing.assert_close(effects.base[row], base.exp(), **EXACT)
        torch.testing.assert_close(steered.base_log_probs[row], base, **EXACT)


def test_tokens_padded_on_the_right_without_a_mask_are_refused(tokenizer: Any) -> None:
    model = text_model(tokenizer)
    tokens = model.to_tokens(TEXTS)
    with pytest.raises(ValueError, match=r"some prompts end in padding tokens.*attention_mask"):
        mean_head_outputs(model, tokens, **QUIET)
    left = model.to_tokens(TEXTS, padding_side="left")
    model.set_tokenizer(tokenizer, default_padding_side="left")
    torch.testing.assert_close(
        mean_head_outputs(model, left, **QUIET), mean_head_outputs(model, TEXTS, **QUIET), **EXACT
    )


def test_a_position_that_the_shortest_prompt_lacks_is_refused() -> None:
    model, mask = tiny_model(), torch.ones(5, 6, dtype=torch.long)
    mask[3, :4] = 0
    for pos in (-3, 0, 5):
        with pytest.raises(ValueError, match=f"the shortest has 2 tokens: give one of -2 to -1, got {pos}"):
            mean_head_outputs(model, TASK, pos, attention_mask=mask, **QUIET)


# Effects of heads


@every_model
@pytest.mark.parametrize("measure", ["prob", "log_prob"])
def test_head_effects_equal_a_loop_of_hooked_runs(kind: str, measure: Any) -> None:
    model = tiny_model(**MODELS[kind])
    means = mean_head_outputs(model, TASK, **QUIET)
    effects = head_effects(model, CORRUPTED, ANSWERS, means, measure=measure, batch_size=2, **QUIET)

    def score(hooks: Sequence[tuple[str, Callable[..., Any]]]) -> Tensor:
        with torch.no_grad():
            log_probs = model.run_with_hooks(CORRUPTED, fwd_hooks=list(hooks))[:, -1].log_softmax(-1)
        log_prob = torch.stack([log_probs[row, answer] for row, answer in enumerate(ANSWERS)])
        return log_prob.exp() if measure == "prob" else log_prob

    torch.testing.assert_close(effects.base, score([]), **EXACT)
    for layer, head in itertools.product(range(2), range(3)):

        def replace(z: Tensor, hook: Any, layer: int = layer, head: int = head) -> Tensor:
            z[:, -1, head] = means[layer, head]
            return z

        expected = score([(f"blocks.{layer}.attn.hook_z", replace)])
        torch.testing.assert_close(effects.scores[layer, head], expected, **EXACT)
    assert effects.effect.abs().min() > 1e-7
    torch.testing.assert_close(effects.effect, (effects.scores - effects.base).mean(-1))


def test_effects_come_from_one_sweep_and_no_run_for_each_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = tiny_model(), []
    forward = HookedTransformer.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return forward(*args, **kwargs)

    counting.keeps_stages = True  # type: ignore[attr-defined]
    monkeypatch.setattr(HookedTransformer, "forward", counting)
    head_effects(model, CORRUPTED, ANSWERS, random_z(model), **QUIET)
    # One for the prompts as they are, one for what all heads have in common.
    assert len(runs) == 2


def test_the_measure_is_probability_unless_told_otherwise() -> None:
    model = tiny_model()
    effects = head_effects(model, CORRUPTED, ANSWERS, random_z(model), **QUIET)
    logs = head_effects(model, CORRUPTED, ANSWERS, random_z(model), measure="log_prob", **QUIET)
    assert (effects.measure, logs.measure) == ("prob", "log_prob")
    torch.testing.assert_close(effects.scores, logs.scores.exp(), **EXACT)
    assert repr(effects).startswith("HeadEffects('prob', layer 2, head 3, 3 prompts, base 0.")


def test_the_standard_error_is_that_of_the_mean_over_prompts() -> None:
    scores = torch.tensor([[[1.0, 3.0, 5.0], [1.0, 2.0, 3.0]]])
    effects = HeadEffects("log_prob", torch.tensor([1.0, 1.0, 2.0]), scores)
    assert effects.effect.tolist() == [[pytest.approx(5 / 3), pytest.approx(2 / 3)]]
    # Effects 0, 2, 3 and 0, 1, 1: the root of the unbiased variance, over the root of three.
    expected = [[(14 / 9 * 3 / 2 / 3) ** 0.5, (2 / 9 * 3 / 2 / 3) ** 0.5]]
    torch.testing.assert_close(effects.standard_error, torch.tensor(expected))
    with pytest.raises(ValueError, match="needs two prompts or more"):
        _ = HeadEffects("log_prob", torch.ones(1), torch.ones(1, 2, 1)).standard_error


def test_top_heads_are_those_that_help_most() -> None:
    effects = HeadEffects("prob", torch.zeros(1), torch.tensor([[[0.1], [-0.9]], [[0.4], [0.1]]]))
    assert effects.top(1) == [(1, 0)]
    assert effects.top(4) == [(1, 0), (0, 0), (1, 1), (0, 1)]
    # Of equals those of earlier layers come first.
    equal = HeadEffects("prob", torch.zeros(1), torch.zeros(8, 8, 1))
    assert equal.top(64) == list(itertools.product(range(8), range(8)))


def test_answers_are_strings_where_there_is_a_tokenizer(tokenizer: Any) -> None:
    model = text_model(tokenizer)
    means, number = random_z(model), 280
    string = model.to_single_str_token(number)
    for named, numbers in (([string, 7], [number, 7]), (string, torch.tensor(number))):
        by_name = head_effects(model, TEXTS[:2], named, means, **QUIET)
        by_number = head_effects(model, TEXTS[:2], numbers, means, **QUIET)
        torch.testing.assert_close(by_name.scores, by_number.scores)
    with pytest.raises(ValueError, match="' Paris' is 3 tokens, not one"):
        head_effects(model, TEXTS[:2], [" Paris", 7], means, **QUIET)


# The vector


def test_a_function_vector_is_what_its_heads_write() -> None:
    model = tiny_model(n_key_value_heads=1)
    means = mean_head_outputs(model, TASK, **QUIET)
    task = function_vector(model, means, [(0, 2), (1, 0)])
    # What the heads write in each run, averaged.
    names = ["blocks.0.attn.hook_result", "blocks.1.attn.hook_result"]
    _, cache = model.run_with_cache(TASK, names_filter=names)
    expected = (cache[names[0]][:, -1, 2] + cache[names[1]][:, -1, 0]).mean(0)
    torch.testing.assert_close(task.vector, expected.detach(), **EXACT)
    assert task.heads == ((0, 2), (1, 0))
    assert repr(task).endswith("heads L0H2, L1H0)")


def test_the_heads_are_those_of_the_largest_effects() -> None:
    model = tiny_model()
    means = mean_head_outputs(model, TASK, **QUIET)
    grid = torch.tensor([[0.1, 0.5, -3.0], [0.2, 0.9, 0.0]])
    task = function_vector(model, means, grid, n_heads=3)
    assert task.heads == ((1, 1), (0, 1), (1, 0))
    torch.testing.assert_close(task.vector, function_vector(model, means, [(0, 1), (1, 1), (1, 0)]).vector, **EXACT)
    effects = head_effects(model, CORRUPTED, ANSWERS, means, **QUIET)
    assert function_vector(model, means, effects, 2).heads == tuple(effects.top(2))


def test_a_function_vector_has_ten_heads_by_default() -> None:
    model = tiny_model(n_layers=4)
    assert len(function_vector(model, random_z(model), torch.rand(4, 3)).heads) == 10


@pytest.mark.parametrize("placement", ["before_and_after", "after", "residual"])
def test_heads_behind_a_norm_have_no_function_vector_but_a_mean_state(placement: str) -> None:
    model = tiny_model(norm_placement=placement)
    with pytest.raises(ValueError, match=f"norm_placement='{placement}' a norm comes between.*mean_state"):
        function_vector(model, random_z(model), [(0, 0)])
    state = mean_state(model, TASK, **QUIET)
    assert steering_effect(model, ZERO_SHOT, 3, state, operation="replace", **QUIET).accuracy.shape == (2,)


# What is refused, before anything runs


@pytest.fixture
def unrun(monkeypatch: pytest.MonkeyPatch) -> HookedTransformer:
    """A model that fails the test when it is run, and no types checked but by the library: as outside the tests."""

    def forward(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the model was run")

    model = tiny_model()
    monkeypatch.setattr(HookedTransformer, "forward", forward)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    return model


NAN = torch.full((2, 3, 4), float("nan"), dtype=torch.float64)
FINE = torch.zeros(2, 3, 4, dtype=torch.float64)


@pytest.mark.parametrize("prompts", [[], "", ["a", ""], torch.zeros(0, 3, dtype=torch.long), torch.zeros(2, 0).long()])
def test_there_have_to_be_prompts(unrun: HookedTransformer, prompts: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: mean_head_outputs(unrun, prompts, **QUIET),
        lambda: mean_state(unrun, prompts, 0, **QUIET),
        lambda: head_effects(unrun, prompts, 3, FINE, **QUIET),
        lambda: steering_effect(unrun, prompts, 3, random_vector(), **QUIET),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"none empty, or tokens \[batch pos\]|neither empty"):
            call()


def test_strings_need_a_tokenizer(unrun: HookedTransformer) -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        mean_head_outputs(unrun, ["a task"], **QUIET)
    with pytest.raises(ValueError, match="no tokenizer"):
        head_effects(unrun, CORRUPTED, " cold", FINE, **QUIET)


def test_a_mask_fits_its_tokens(unrun: HookedTransformer) -> None:
    with pytest.raises(ValueError, match=r"attention_mask has shape \[batch pos\] = \[5 6\]"):
        mean_head_outputs(unrun, TASK, attention_mask=torch.ones(5, 5).long(), **QUIET)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([3, 4], "2 answers came for 3 prompts"),
        ([], r"one for each prompt; got \[\]"),
        ([3, 4, 20], r"answers \[20\] are out of range: this model's vocabulary is 0-19"),
        (-1, r"answers \[-1\] are out of range"),
        ([0.5, 1.0, 2.0], "answers are tokens, or strings of one token"),
        (torch.ones(3, 1).long(), "answers are tokens, or strings of one token"),
    ],
)
def test_answers_fit_the_prompts(unrun: HookedTransformer, answers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_effects(unrun, CORRUPTED, answers, FINE, **QUIET)
    with pytest.raises(ValueError, match=message):
        steering_effect(unrun, CORRUPTED, answers, random_vector(), **QUIET)


@pytest.mark.parametrize(
    ("means", "message"),
    [
        (FINE[:1], r"mean_z is \[layer head d_head\] = \(2, 3, 4\) for this model, got \(1, 3, 4\)"),
        (NAN, "mean_z has 24 of 24 entries that are NaN or infinite"),
    ],
)
def test_means_fit_the_model(unrun: HookedTransformer, means: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_effects(unrun, CORRUPTED, ANSWERS, means, **QUIET)
    with pytest.raises(ValueError, match=message):
        function_vector(unrun, means, [(0, 0)])


@pytest.mark.parametrize(
    ("chosen", "n_heads", "message"),
    [
        (torch.zeros(2, 3), 7, "n_heads is in 1-6, the heads there are; got 7"),
        (torch.zeros(2, 3), 0, "n_heads is in 1-6"),
        (torch.zeros(2, 3), None, "n_heads is in 1-6, the heads there are; got 10"),
        (torch.zeros(3, 2), 1, r"effects are \[layer head\] = \(2, 3\) for this model, got \(3, 2\)"),
        (torch.full((2, 3), float("nan")), 1, "NaN"),
        ([(0, 3)], None, r"\[\(0, 3\)\] are no heads: .* layers 0-1 and heads 0-2"),
        ([(-1, 0)], None, "are no heads"),
        ([(0, 1, 2)], None, "are no heads"),
        ([(0, 1), (0, 1)], None, "each once"),
        ([], None, "one or more"),
        ([(0, 1)], 1, "n_heads=1 chooses among effects"),
    ],
)
def test_heads_are_those_of_the_model(unrun: HookedTransformer, chosen: Any, n_heads: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function_vector(unrun, FINE, chosen, n_heads)


@pytest.mark.parametrize(
    ("vectors", "options", "message"),
    [
        (torch.zeros(11), {}, r"tensor \[d_model\] = \(12,\), or \[layer d_model\] = \(2, 12\).*got \(11,\)"),
        (torch.zeros(3, 12), {}, r"got \(3, 12\)"),
        ({"task": torch.zeros(12), "odd": torch.zeros(13)}, {}, r"odd is a tensor.*got \(13,\)"),
        ({"task": torch.full((12,), float("inf"))}, {}, "task has 12 of 12 entries that are NaN or infinite"),
        ("blue", {}, "got 'blue'"),
        ({}, {}, "there are no vectors"),
        (torch.zeros(12), {"layers": [2]}, "no layer 2: this model has layers 0-1"),
        (torch.zeros(12), {"layers": [0.0]}, "no layer 0.0"),
        (torch.zeros(12), {"layers": []}, "there are no layers to look at"),
        (torch.zeros(12), {"operation": "scale"}, "operation is one of add, replace; got 'scale'"),
        (torch.zeros(12), {"n_controls": 0}, "n_controls is at least 1, got 0"),
        (torch.zeros(12), {"batch_size": 0}, "batch_size is an integer of at least 1, got 0"),
    ],
)
def test_vectors_fit_the_model(unrun: HookedTransformer, vectors: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steering_effect(unrun, ZERO_SHOT, 3, vectors, **options, **QUIET)


def test_other_bad_inputs_are_refused(unrun: HookedTransformer) -> None:
    with pytest.raises(ValueError, match="measure is one of prob, log_prob; got 'logit'"):
        head_effects(unrun, CORRUPTED, ANSWERS, FINE, measure="logit", **QUIET)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no layer 2: this model has layers 0-1"):
        mean_state(unrun, TASK, 2, **QUIET)
    with pytest.raises(ValueError, match="no layer 2: this model has layers 0-1"):
        FunctionVector(torch.zeros(12), ((0, 0),), 2).intervention(2)
    with pytest.raises(ValueError, match="batch_size is an integer of at least 1, got True"):
        mean_head_outputs(unrun, TASK, batch_size=True, **QUIET)
    with pytest.raises(ValueError, match="this model has none"):
        mean_head_outputs(tiny_model(n_layers=0), TASK, **QUIET)


def test_progress_is_shown_when_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    mean_head_outputs(model, TASK, **QUIET)
    steering_effect(model, ZERO_SHOT, 3, random_vector(), **QUIET)
    assert not capfd.readouterr().err
    mean_head_outputs(model, TASK)
    steering_effect(model, ZERO_SHOT, 3, random_vector())
    shown = capfd.readouterr().err
    assert "means" in shown
    assert "sweep" in shown
