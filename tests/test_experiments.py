"""The introductory experiments: each number is what a plain run under hooks gives.

The model is a random one whose tokenizer knows the words of the tasks.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer
from hooked_lm.circuits.induction import k_composition_qk_circuit, repeated_random_tokens
from hooked_lm.experiments import continue_repeats, decode_early, find_name_movers, patch_ioi, transplant_task
from hooked_lm.experiments.prompts import aligned
from hooked_lm.tasks import TaskSet, get_task, lexicon, word_tokenizer
from hooked_lm.tasks.words import RELATIONS
from tests.helpers import randomise_, tiny_config

QUIET: dict[str, Any] = {"verbose": False}


@cache
def reader(**changes: Any) -> Any:
    """A random model in float64 whose tokenizer knows the words of the tasks."""
    tokenizer = word_tokenizer(lexicon())
    cfg = tiny_config(**{"n_ctx": 128, "d_vocab": len(tokenizer), "n_layers": 3, **changes})
    return randomise_(HookedTransformer(cfg, tokenizer=tokenizer))


@torch.no_grad()
def last_log_probs(model: Any, prompt: str, hooks: Any = ()) -> Tensor:
    logits = model.run_with_hooks(prompt, fwd_hooks=list(hooks))
    return logits[0, -1].log_softmax(-1)


def silence_last(x: Tensor, hook: Any) -> Tensor:
    x = x.clone()
    x[:, -1] = 0.0
    return x


# Early decoding


def test_early_decoding_is_the_stream_of_each_layer_read_out_at_the_last_token() -> None:
    model, examples = reader(), get_task("capitals").examples(6, seed=3)
    found = decode_early(model, examples, **QUIET)
    assert found.labels[:3] == ("0_pre", "0_mid", "0_post")
    ordered = [example for group in examples.groups(model.tokenizer) for example in group.examples]
    assert (found.prompt, found.answer) == (ordered[0].prompt, ordered[0].answer)
    with torch.no_grad():
        for index, example in enumerate(ordered):
            answer = model.to_single_token(example.answer)
            _, cache_ = model.run_with_cache(example.prompt)
            read = model.unembed(model.ln_final(cache_["resid_mid", 1]))[0, -1].log_softmax(-1)
            site = found.labels.index("1_mid")
            torch.testing.assert_close(found.log_probs[site, index], read[answer], rtol=0, atol=1e-10)
            assert found.ranks[site, index] == (read > read[answer]).sum()
            if index == 0:
                assert found.top[site] == model.to_string(read.argmax()[None])
            without = last_log_probs(model, example.prompt, [("blocks.2.hook_mlp_out", silence_last)])
            torch.testing.assert_close(found.log_probs_without[2, index], without[answer], rtol=0, atol=1e-10)
            assert found.ranks_without[2, index] == (without > without[answer]).sum()
    torch.testing.assert_close(found.probability, found.log_probs.exp().mean(-1))
    assert found.decisive_mlp == found.log_probs_without.exp().mean(-1).argmin()


def test_where_an_answer_appears_is_where_it_stays() -> None:
    found = decode_early(reader(), get_task("capitals").examples(2), **QUIET)
    ranks = torch.ones_like(found.ranks)
    ranks[[2, 5, 6, 7, 8], 0] = 0  # it comes, goes, and comes to stay
    object.__setattr__(found, "ranks", ranks)
    assert found.appears_at(0) == found.labels[5]
    assert found.appears_at(1) is None
    object.__setattr__(found, "ranks", torch.zeros_like(ranks))
    assert found.appears_at(0) == found.labels[0]


# Residual patching


def test_a_cell_of_the_ioi_grid_is_the_clean_stream_in_the_corrupted_run() -> None:
    model = reader()
    examples = aligned(get_task("ioi").examples(20, template=0, order="abba"), model.tokenizer, 4)
    found = patch_ioi(model, examples, **QUIET)
    tokens = examples.tokens(model)
    assert found.labels == tuple(model.to_str_tokens(tokens.clean[0]))

    def difference(logits: Tensor) -> Tensor:
        rows = torch.arange(len(examples))
        return logits[rows, -1, tokens.answers] - logits[rows, -1, tokens.wrong]

    with torch.no_grad():
        clean, cache_ = model.run_with_cache(tokens.clean)
        corrupted = model(tokens.corrupted)
        giver = found.labels.index(",") + 1  # the first token that differs

        def patch(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[:, giver] = cache_["resid_pre", 1][:, giver]
            return x

        patched = model.run_with_hooks(tokens.corrupted, fwd_hooks=[("blocks.1.hook_resid_pre", patch)])
    torch.testing.assert_close(found.clean, difference(clean))
    torch.testing.assert_close(found.corrupted, difference(corrupted))
    assert found.accuracy == (difference(clean) > 0).double().mean()
    share = (difference(patched) - difference(corrupted)).mean() / (difference(clean) - difference(corrupted)).mean()
    torch.testing.assert_close(found.grid[1, giver], share)
    torch.testing.assert_close(found.grid[0, giver], torch.ones((), dtype=torch.float64))
    assert giver in found.carriers()[0]
    assert found.carriers(least=1e9) == [[], [], []]


# Repeats


def test_repeats_are_scored_by_halves_and_without_what_mlps_write_the_second_time() -> None:
    model = reader()
    found = continue_repeats(model, n_prompts=3, length=9, seed=2, **QUIET)
    tokens = repeated_random_tokens(3, 9, model.cfg.d_vocab, torch.Generator().manual_seed(2), 0)
    with torch.no_grad():
        logits, cache_ = model.run_with_cache(tokens)
        log_probs = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
        right = logits[:, :-1].argmax(-1) == tokens[:, 1:]
        assert found.first_log_prob == pytest.approx(float(log_probs[:, :9].mean()))
        assert found.second_log_prob == pytest.approx(float(log_probs[:, 10:].mean()))
        assert found.first_accuracy == pytest.approx(float(right[:, :9].double().mean()))

        def again(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[:, 10:] = cache_["mlp_out", 1][:, 1:10]
            return x

        without = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_mlp_out", again)])
    second = without.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[:, 10:].mean()
    assert float(found.log_prob_without_mlp[1]) == pytest.approx(float(second), rel=1e-6)
    diagonal = cache_["pattern", 2][:, 1].diagonal(1 - 9, -2, -1)[:, 2:].mean()
    torch.testing.assert_close(found.induction_scores[2, 1], diagonal)


def test_the_pair_is_the_strongest_induction_head_and_the_strongest_previous_token_head_below_it() -> None:
    model = reader()
    found = continue_repeats(model, n_prompts=3, length=9, **QUIET)
    layer, head = found.induction_head
    assert found.induction_scores[layer, head] == found.induction_scores.max()
    if layer == 0:
        assert found.previous_token_head is None
        assert found.circuit_accuracy is found.effective_accuracy is None
    else:
        assert found.previous_token_head is not None
        assert found.previous_token_scores[found.previous_token_head] == found.previous_token_scores[:layer].max()
        circuit = k_composition_qk_circuit(model, found.previous_token_head, found.induction_head).AB
        own = circuit.argmax(-1) == torch.arange(len(circuit))
        assert found.circuit_accuracy == pytest.approx(float(own.double().mean()))
        pair = (found.previous_token_head, found.induction_head)
        effective = k_composition_qk_circuit(model, *pair, effective_embedding=True).AB
        own = effective.argmax(-1) == torch.arange(len(circuit))
        assert found.effective_accuracy == pytest.approx(float(own.double().mean()))


def test_a_model_without_mlps_has_none_to_freeze() -> None:
    found = continue_repeats(reader(attn_only=True, n_layers=1), n_prompts=2, length=5, **QUIET)
    assert found.log_prob_without_mlp.shape == (0,)
    assert found.previous_token_head is None


# Function vectors


def test_a_task_is_moved_by_the_mean_state_and_by_heads_beside_controls() -> None:
    model = reader()
    found = transplant_task(model, "plural", n=8, shots=3, n_heads=2, seed=1, **QUIET)
    task = get_task("relations")
    shown = task.examples(8, 1, relation="plural", shots=3, corruption="relation")
    asked = found.asked
    # Queries that are steered are asked once, and not in the prompts that the vectors are made from.
    assert len({example.prompt for example in asked.examples}) == len(asked) == 8
    assert not {prompt.rsplit(", ", 1)[-1] for prompt in shown.clean} & set(asked.clean)
    assert found.accuracy.shape == (4, 3)
    assert len(found.vector.heads) == 2
    with torch.no_grad():
        states = torch.stack([model.run_with_cache(prompt)[1]["resid_post", 1][0, -1] for prompt in shown.clean])

        def add(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[:, -1] += states.mean(0)
            return x

        found_log_probs = [
            last_log_probs(model, prompt, [("blocks.1.hook_resid_post", add)])[model.to_single_token(answer)]
            for prompt, answer in zip(asked.clean, asked.answers, strict=True)
        ]
        base = [
            last_log_probs(model, prompt)[model.to_single_token(answer)].exp()
            for prompt, answer in zip(shown.corrupted, shown.answers, strict=True)
        ]
    state = found.steering.log_prob[0, 1]
    torch.testing.assert_close(state, torch.stack(found_log_probs).mean(), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.effects.base.mean(), torch.stack(base).mean(), rtol=0, atol=1e-9)
    heads, other, shuffled = found.steering.log_prob[1:]
    assert not torch.allclose(heads, other)
    assert not torch.allclose(heads, shuffled)
    assert not torch.allclose(other, shuffled)


def test_words_that_a_tokenizer_does_not_know_are_no_answers_and_may_be_spelled_in_examples() -> None:
    # Like GPT-2's: the opposites are words of it, and the other relations' words are spelled in pieces.
    tokenizer = word_tokenizer(f" {word}" for word in RELATIONS["opposite"])
    model = randomise_(HookedTransformer(tiny_config(n_ctx=200, d_vocab=len(tokenizer), n_layers=2), tokenizer))
    found = transplant_task(model, "opposite", n=6, shots=2, n_heads=1, n_controls=1, **QUIET)
    assert len(found.asked) == 6
    with pytest.raises(ValueError, match="an answer has to be one token"):
        transplant_task(model, "french", n=6, shots=2, n_heads=1, n_controls=1, **QUIET)


def test_there_has_to_be_a_query_left_to_steer() -> None:
    with pytest.raises(ValueError, match="ask for fewer"):
        transplant_task(reader(), "past", n=400, shots=2, **QUIET)


# Name movers


def unrelated_pairs(model: Any) -> TaskSet:
    return aligned(get_task("ioi").examples(40, template=0, corruption="unrelated"), model.tokenizer, 6)


def test_heads_are_measured_by_what_they_write_about_other_people_and_removed_by_its_mean() -> None:
    model = reader()
    examples = unrelated_pairs(model)
    found = find_name_movers(model, examples, n_heads=2, n_draws=3, **QUIET)
    tokens, rows = examples.tokens(model), torch.arange(len(examples))
    with torch.no_grad():
        _, cache_ = model.run_with_cache(tokens.corrupted)
        clean = model(tokens.clean)[:, -1]

        def put(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[:, :, 1] = cache_["z", 1][:, :, 1]
            return x

        def remove(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            for layer, head in found.movers:
                if layer == hook.layer():
                    x[:, :, head] = cache_["z", layer][:, :, head].mean(0)
            return x

        patched = model.run_with_hooks(tokens.clean, fwd_hooks=[("blocks.1.attn.hook_z", put)])[:, -1]
        without = model.run_with_hooks(tokens.clean, fwd_hooks=[(lambda name: name.endswith("hook_z"), remove)])[:, -1]
    assert found.logit == pytest.approx(float(clean[rows, tokens.answers].mean()))
    loss = (clean - patched)[rows, tokens.answers].mean()
    torch.testing.assert_close(found.patched[1, 1], loss, rtol=0, atol=1e-9)
    assert found.accuracy == pytest.approx(float((clean.argmax(-1) == tokens.answers).double().mean()))
    assert found.accuracy_without == pytest.approx(float((without.argmax(-1) == tokens.answers).double().mean()))
    assert [found.direct[head] for head in found.movers] == sorted(found.direct.flatten(), reverse=True)[:2]
    assert found.accuracy_without_others.shape == (3,)
    assert found.ranks()["direct"] == [0, 1]
    assert -1 <= found.agreement() <= 1


def test_the_direct_effect_is_the_change_of_what_a_head_adds_where_there_is_no_final_norm() -> None:
    model = reader(normalization_type=None)
    examples = unrelated_pairs(model)
    found = find_name_movers(model, examples, n_heads=2, n_draws=1, **QUIET)
    tokens = examples.tokens(model)
    with torch.no_grad():
        clean, other = (model.run_with_cache(one)[1]["z", 2][:, -1, 1] for one in (tokens.clean, tokens.corrupted))
        directions = model.W_U.T[tokens.answers]
        adds = [((z @ model.W_O[2, 1]) * directions).sum(-1).mean() for z in (clean, other)]
    torch.testing.assert_close(found.attribution[2, 1], adds[0])
    torch.testing.assert_close(found.direct[2, 1], adds[0] - adds[1])


# Bad input


def test_what_the_experiments_cannot_do_is_named() -> None:
    with pytest.raises(ValueError, match="this model has none"):
        decode_early(reader(attn_only=True, n_layers=1), get_task("capitals").examples(2), **QUIET)
    with pytest.raises(ValueError, match="use groups"):
        patch_ioi(reader(), get_task("ioi").examples(20), **QUIET)
    with pytest.raises(ValueError, match="n_heads is in 1-4"):
        find_name_movers(reader(), unrelated_pairs(reader()), n_heads=5, **QUIET)
    with pytest.raises(ValueError, match="unknown relation"):
        transplant_task(reader(), "synonym", **QUIET)


def test_aligned_examples_are_of_one_length_and_words_that_are_not_one_token_are_left_out(tokenizer: Any) -> None:
    examples = get_task("ioi").examples(40)
    own = aligned(examples, reader().tokenizer, 5)
    assert len(own) == 5
    assert len({reader().to_tokens(prompt).shape[1] for prompt in own.clean}) == 1
    with pytest.raises(ValueError, match="an answer has to be one token"):
        aligned(examples, tokenizer)
