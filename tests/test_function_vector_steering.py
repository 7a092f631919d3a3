"""Steering by function vectors, and a model that is built to do a task."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, Intervention
from hooked_lm.circuits import last_token
from hooked_lm.circuits.function_vectors import (
    FunctionVector,
    function_vector,
    head_effects,
    mean_head_outputs,
    mean_state,
    steering_effect,
)
from tests.function_vectors_helpers import (
    EXACT,
    MODELS,
    QUIET,
    TASK,
    ZERO_SHOT,
    every_model,
    last_logits,
    random_vector,
)
from tests.helpers import tiny_config, tiny_model

# Steering


@every_model
@pytest.mark.parametrize("operation", ["add", "replace"])
def test_steering_equals_a_loop_of_runs(kind: str, operation: Any) -> None:
    model = tiny_model(**MODELS[kind])
    vector, answers = 3 * random_vector(), torch.tensor([3, 4, 5, 6])
    effect = steering_effect(model, ZERO_SHOT, answers, vector, operation=operation, batch_size=3, **QUIET)
    assert effect.layers == (0, 1)
    base = last_logits(model, ZERO_SHOT)
    torch.testing.assert_close(effect.base_log_probs, base.log_softmax(-1)[range(4), answers], **EXACT)
    assert effect.base_accuracy == float((base.argmax(-1) == answers).double().mean())
    for layer in range(2):
        edit = Intervention(f"blocks.{layer}.hook_resid_post", operation, vector, pos=-1)
        logits = last_logits(model, ZERO_SHOT, edit)
        expected = logits.log_softmax(-1)[range(4), answers]
        torch.testing.assert_close(effect.log_probs[layer], expected, **EXACT)
        torch.testing.assert_close(effect.log_prob[layer], expected.mean(), **EXACT)
        assert effect.correct[layer].tolist() == (logits.argmax(-1) == answers).double().tolist()
    assert (effect.log_probs - effect.base_log_probs).abs().min() > 1e-6


def test_accuracy_is_the_share_of_likeliest_tokens() -> None:
    model, vector = tiny_model(), random_vector()
    edit = Intervention("blocks.1.hook_resid_post", "add", vector, pos=-1)
    answers = last_logits(model, ZERO_SHOT, edit).argmax(-1)
    answers[0] = (answers[0] + 1) % 20
    effect = steering_effect(model, ZERO_SHOT, answers, vector, [1], **QUIET)
    assert effect.accuracy.tolist() == [0.75]
    assert effect.correct.tolist() == [[0, 1, 1, 1]]


def test_controls_have_the_norm_of_the_vector_and_another_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_model(), []
    sweep = last_token.sweep

    def watched(model: Any, tokens: Tensor, cells: Any, *args: Any, **kwargs: Any) -> Tensor:
        seen.append([one.value for one in cells[1:]])
        return sweep(model, tokens, cells, *args, **kwargs)

    monkeypatch.setattr(last_token, "sweep", watched)
    given = {"task": 2 * random_vector(2, 12), "other": random_vector()}
    effect = steering_effect(model, ZERO_SHOT, 3, given, n_controls=2, seed=7, **QUIET)
    values = torch.stack(seen[0]).reshape(3, 2, 2, 12)  # variant, name, layer
    torch.testing.assert_close(values[0, 0], given["task"])
    torch.testing.assert_close(values[0, 1], given["other"].expand(2, 12))
    torch.testing.assert_close(values[1:].norm(dim=-1), values[:1].norm(dim=-1).expand(2, 2, 2))
    directions = values[1:] / values[1:].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(directions, directions[:, :1, :1].expand_as(directions))
    assert float((directions[0, 0, 0] @ directions[1, 0, 0]).abs()) < 0.99
    # The control is the mean over both draws.
    for index, layer in itertools.product(range(2), range(2)):
        edits = [
            Intervention(f"blocks.{layer}.hook_resid_post", "add", values[draw, index, layer], pos=-1)
            for draw in (1, 2)
        ]
        each = [last_logits(model, ZERO_SHOT, edit).log_softmax(-1)[:, 3] for edit in edits]
        torch.testing.assert_close(effect.control_log_probs[index, layer], torch.stack(each).mean(0), **EXACT)


def test_the_seed_decides_the_control_and_other_vectors_do_not() -> None:
    model, vector = tiny_model(), random_vector()
    first = steering_effect(model, ZERO_SHOT, 3, vector, **QUIET)
    beside = steering_effect(model, ZERO_SHOT, 3, {"other": 5 * vector, "task": vector}, **QUIET)
    torch.testing.assert_close(beside.control_log_probs[1], first.control_log_probs, **EXACT)
    other = steering_effect(model, ZERO_SHOT, 3, vector, seed=1, **QUIET)
    assert (other.control_log_prob - first.control_log_prob).abs().min() > 1e-6
    torch.testing.assert_close(other.log_probs, first.log_probs)


def test_several_vectors_by_name_are_each_as_if_alone() -> None:
    model = tiny_model()
    given = {"task": FunctionVector(random_vector(), ((0, 1),), 2), "shuffled": random_vector(seed=8)}
    both = steering_effect(model, ZERO_SHOT, 3, given, [1, 0], **QUIET)
    assert (both.names, both.layers, both.accuracy.shape) == (("task", "shuffled"), (1, 0), (2, 2))
    assert both.control_accuracy.shape == (2, 2)
    for index, vector in enumerate(given.values()):
        alone = steering_effect(model, ZERO_SHOT, 3, vector, [1, 0], **QUIET)
        assert alone.names is None
        torch.testing.assert_close(both.log_probs[index], alone.log_probs, **EXACT)
    in_order = steering_effect(model, ZERO_SHOT, 3, given, **QUIET)
    torch.testing.assert_close(both.log_prob.flip(1), in_order.log_prob, **EXACT)
    assert repr(both).startswith("SteeringEffect(task, shuffled; layers 1, 0; 4 prompts; accuracy at best")


def test_a_vector_for_each_layer_is_put_into_its_own() -> None:
    model, vectors = tiny_model(), random_vector(2, 12)
    effect = steering_effect(model, ZERO_SHOT, 3, vectors, [-1], **QUIET)
    alone = steering_effect(model, ZERO_SHOT, 3, vectors[1], [1], **QUIET)
    assert effect.layers == (1,)
    torch.testing.assert_close(effect.log_probs, alone.log_probs, **EXACT)


def test_replacing_the_last_state_by_the_mean_of_one_prompt_is_that_prompt() -> None:
    model = tiny_model()
    state = mean_state(model, TASK[:1], **QUIET)
    effect = steering_effect(model, ZERO_SHOT, 3, state, operation="replace", **QUIET)
    expected = last_logits(model, TASK[:1]).log_softmax(-1)[0, 3]
    # After the last block the state is all there is; before it, later heads still read the prompt.
    torch.testing.assert_close(effect.log_probs[1], expected.expand(4), **EXACT)
    assert (effect.log_probs[0] - expected).abs().min() > 1e-3


# A model that is built to do a task


ANSWER, WRONG, SIGN, PLAIN = 9, 5, 7, 1


def task_model() -> HookedTransformer:
    """A model without norms whose head L0H1 writes the answer, as much as it sees the sign of the task in the prompt.

    Every head attends evenly. L1H2 is misled: it writes the wrong answer where it sees the sign. A prompt of plain
    tokens is answered by WRONG, because every token brings some of it.
    """
    changes: dict[str, Any] = {"attn_only": True, "normalization_type": None, "positional_embedding_type": "none"}
    model = HookedTransformer(tiny_config(d_model=24, d_head=4, n_heads=3, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E[:, :20] = torch.eye(20)
        model.embed.W_E[:, WRONG] += 2.0
        model.unembed.W_U[:20] = torch.eye(20)
        for (layer, head), target in {(0, 1): ANSWER, (1, 2): WRONG}.items():
            model.blocks[layer].attn.W_V[head, SIGN, 0] = 1.0
            model.blocks[layer].attn.W_O[head, 0, target] = 12.0
    return model


# The sign is a third, or half, of the task's prompts: the heads hold 5/12 of it on average. Elsewhere there is none.
SHOWN = torch.tensor([[SIGN, PLAIN, SIGN, PLAIN, 2, 3], [SIGN, SIGN, SIGN, PLAIN, 2, 3]])
NOT_SHOWN = torch.tensor([[PLAIN, 2, 3, 4], [4, 3, 2, 6]])
QUERY = torch.tensor([[PLAIN], [2], [3]])


def test_the_head_that_knows_the_task_comes_first_and_its_vector_gives_the_answer() -> None:
    model = task_model()
    means = mean_head_outputs(model, SHOWN, **QUIET)
    assert means[0, 1].tolist() == pytest.approx([5 / 12, 0, 0, 0])
    effects = head_effects(model, NOT_SHOWN, ANSWER, means, **QUIET)
    assert effects.top(1) == [(0, 1)]
    assert effects.effect[1, 2] < 0
    idle = [(0, 0), (0, 2), (1, 0), (1, 1)]
    assert max(abs(float(effects.effect[one])) for one in idle) < 1e-12
    task = function_vector(model, means, effects, 1)
    expected = torch.zeros(24, dtype=torch.float64)
    expected[ANSWER] = 5.0
    torch.testing.assert_close(task.vector, expected)
    shuffled = function_vector(model, mean_head_outputs(model, NOT_SHOWN, **QUIET), [(0, 1)])
    steered = steering_effect(model, QUERY, ANSWER, {"task": task, "shuffled": shuffled}, **QUIET)
    assert steered.base_accuracy == 0
    assert steered.accuracy.tolist() == [[1, 1], [0, 0]]
    assert steered.control_accuracy[0].tolist() == [0, 0]


def test_generation_with_the_vector_says_the_answer_at_every_step() -> None:
    model = task_model()
    task = function_vector(model, mean_head_outputs(model, SHOWN, **QUIET), [(0, 1)])
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "verbose": False}
    assert model.generate(QUERY, **options)[:, 1:].tolist() == [[WRONG] * 3] * 3
    for layer, cached in itertools.product(range(2), (True, False)):
        told = model.generate(QUERY, interventions=[task.intervention(layer)], use_past_kv_cache=cached, **options)
        assert told[:, 1:].tolist() == [[ANSWER] * 3] * 3
    weak = model.generate(QUERY, interventions=[task.intervention(0, scale=0.1)], **options)
    assert weak[:, 1:].tolist() == [[WRONG] * 3] * 3


def test_the_intervention_of_a_vector_is_the_step_of_the_sweep() -> None:
    model = tiny_model()
    task = function_vector(model, mean_head_outputs(model, TASK, **QUIET), [(0, 1), (1, 2)])
    edit = task.intervention(-1, scale=2.0)
    assert (edit.site, edit.operation, edit.pos) == ("blocks.1.hook_resid_post", "add", -1)
    effect = steering_effect(model, ZERO_SHOT, 3, 2 * task.vector, [1], **QUIET)
    logits = last_logits(model, ZERO_SHOT, edit)
    torch.testing.assert_close(effect.log_probs[0], logits.log_softmax(-1)[:, 3], **EXACT)
    # In a generation too, the first token is drawn from these logits.
    new = model.generate(
        ZERO_SHOT, max_new_tokens=1, do_sample=False, stop_at_eos=False, interventions=[edit], verbose=False
    )
    assert new[:, -1].tolist() == logits.argmax(-1).tolist()
