"""The pure functions that find an induction circuit, on inputs whose answers are known."""

from __future__ import annotations

import pytest
import torch

from hooked_lm import ActivationCache
from hooked_lm.circuits.induction import (
    NextTokenScores,
    induction_scores,
    k_composition_qk_circuit,
    next_token_scores,
    previous_token_scores,
    repeated_random_tokens,
    strongest_head,
)
from tests.helpers import tiny_model, tiny_tokens


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pattern_cache(model: object, patterns: list[torch.Tensor]) -> ActivationCache:
    named = {f"blocks.{layer}.attn.hook_pattern": pattern for layer, pattern in enumerate(patterns)}
    return ActivationCache(named, model)


def looking_back(n_pos: int, back: int) -> torch.Tensor:
    """A pattern [query key] that attends `back` places back, and to position 0 where there is nothing so far back."""
    pattern = torch.zeros(n_pos, n_pos)
    for query in range(n_pos):
        pattern[query, max(query - back, 0)] = 1.0
    return pattern


# Tokens


def test_the_block_comes_twice_after_the_start_token() -> None:
    tokens = repeated_random_tokens(3, 5, 20, generator(), start_token=7)
    assert tokens.shape == (3, 11)
    assert tokens.dtype == torch.long
    assert (tokens[:, 0] == 7).all()
    assert torch.equal(tokens[:, 1:6], tokens[:, 6:])


@pytest.mark.parametrize("start_token", [0, 4, 9])
def test_a_block_as_long_as_can_be_holds_every_token_but_the_start_token_once(start_token: int) -> None:
    tokens = repeated_random_tokens(8, 9, 10, generator(), start_token=start_token)
    others = [token for token in range(10) if token != start_token]
    assert all(sorted(row[1:10]) == others for row in tokens.tolist())
    assert len({tuple(row) for row in tokens.tolist()}) == 8


def test_the_generator_decides_the_tokens_and_the_global_one_is_left_alone() -> None:
    before = torch.get_rng_state()
    first, second = (repeated_random_tokens(2, 6, 30, generator(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, repeated_random_tokens(2, 6, 30, generator(4)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("batch", "length", "start_token"), [(0, 3, 0), (1, 0, 0), (1, 10, 0), (1, 3, 10), (1, 3, -1)])
def test_tokens_that_cannot_be_drawn_raise(batch: int, length: int, start_token: int) -> None:
    with pytest.raises(ValueError, match="a block of 1-9 different tokens"):
        repeated_random_tokens(batch, length, 10, generator(), start_token)


# Scores of the predictions


def test_each_column_is_the_log_probability_of_the_token_after_it() -> None:
    tokens = torch.tensor([[0, 2, 1, 2, 1]])
    logits = torch.randn(1, 5, 3, generator=generator())
    scores = next_token_scores(logits, tokens)
    for position in range(4):
        token = int(tokens[0, position + 1])
        row = logits[0, position]
        assert float(scores.log_prob[0, position]) == pytest.approx(float(row[token] - row.exp().sum().log()), abs=1e-5)
        assert bool(scores.correct[0, position]) == (int(row.argmax()) == token)


def test_the_halves_leave_out_only_the_first_token_of_the_repeat() -> None:
    # start a b c | a b c: columns 0-2 predict the first block, 3 the unannounced `a`, 4-5 the rest of the repeat.
    columns = torch.arange(6.0)[None]
    scores = NextTokenScores(columns, columns > 4)
    assert scores.first_half().log_prob.tolist() == [[0.0, 1.0, 2.0]]
    assert scores.second_half().log_prob.tolist() == [[4.0, 5.0]]
    assert scores.second_half().accuracy() == 0.5
    assert scores.second_half().mean_log_prob() == 4.5


# Scores of the heads


def test_heads_that_look_one_back_or_after_the_earlier_occurrence_score_one_and_others_do_not() -> None:
    model, length = tiny_model(n_layers=2, n_heads=3), 4
    n_pos = 2 * length + 1
    layers = [
        torch.stack([looking_back(n_pos, back) for back in backs])[None].repeat(2, 1, 1, 1)
        for backs in ((1, 0, 2), (length, length - 1, length - 2))
    ]
    cache = pattern_cache(model, layers)
    previous, induction = previous_token_scores(cache), induction_scores(cache, length)
    assert previous[0].tolist() == [1.0, 0.0, 0.0 + 1 / (n_pos - 1)]  # from position 1, two back is position 0 too
    assert induction[0].tolist() == [0.0, 0.0, 0.0]
    assert induction[1].tolist() == [0.0, 1.0, 0.0]
    assert strongest_head(previous, 0) == (0, 0)
    assert strongest_head(induction, 1) == (1, 1)


def test_head_scores_are_means_over_batch_and_positions() -> None:
    model, length = tiny_model(n_layers=1, n_heads=3), 3
    pattern = torch.rand(2, 3, 7, 7, generator=generator())
    cache = pattern_cache(model, [pattern])
    previous = torch.stack([pattern[:, :, query, query - 1] for query in range(1, 7)]).mean((0, 1))
    # The repeat is positions 4-6; the token at 4 stood at 1, and 2 came after it.
    induction = torch.stack([pattern[:, :, 4, 2], pattern[:, :, 5, 3], pattern[:, :, 6, 4]]).mean((0, 1))
    torch.testing.assert_close(previous_token_scores(cache)[0], previous)
    torch.testing.assert_close(induction_scores(cache, length)[0], induction)


def test_an_induction_score_for_another_length_raises() -> None:
    cache = pattern_cache(tiny_model(n_layers=1), [torch.rand(1, 3, 7, 7)])
    with pytest.raises(ValueError, match="a repeated block of 4 makes 9 positions, but the patterns have 7"):
        induction_scores(cache, 4)


# The circuit


@pytest.mark.parametrize("n_key_value_heads", [None, 1])
def test_the_circuit_is_the_score_between_a_query_token_and_a_token_moved_by_the_writer(
    n_key_value_heads: int | None,
) -> None:
    model = tiny_model(attn_only=True, normalization_type=None, n_key_value_heads=n_key_value_heads)
    writer, reader = (0, 2), (1, 1)
    circuit = k_composition_qk_circuit(model, writer, reader)
    assert circuit.shape == (20, 20)
    assert circuit.mdim <= model.cfg.d_head
    kv = (lambda head: head) if n_key_value_heads is None else (lambda head: 0)
    first, second = model.blocks[0].attn, model.blocks[1].attn
    moved = model.W_E @ first.W_V[kv(2)] @ first.W_O[2]  # what the writer puts down for each token
    queries, keys = model.W_E @ second.W_Q[1], moved @ second.W_K[kv(1)]
    torch.testing.assert_close(circuit.AB, queries @ keys.T)


@pytest.mark.parametrize("normalization_type", ["LN", "RMS"])
def test_folding_the_norms_first_changes_no_composed_circuit(normalization_type: str) -> None:
    model = tiny_model(normalization_type=normalization_type)
    before = k_composition_qk_circuit(model, (0, 2), (1, 1)).AB
    model.fold_layer_norm()
    torch.testing.assert_close(k_composition_qk_circuit(model, (0, 2), (1, 1)).AB, before)
    assert not torch.allclose(before, (model.W_E @ model.QK[1, 1] @ model.W_E.T).AB)


def test_the_destination_may_be_read_after_the_first_mlp() -> None:
    model = tiny_model()
    effective = k_composition_qk_circuit(model, (0, 2), (1, 1), effective_embedding=True).AB
    plain = k_composition_qk_circuit(model, (0, 2), (1, 1)).AB
    written = model.embed.W_E + model.blocks[0].mlp_output(model.embed.W_E[None])[0]
    # The same columns, for other rows: what the plain circuit gives for an embedding that is the effective one.
    solved = torch.linalg.lstsq(model.W_E.T, written.T).solution.T.detach()
    torch.testing.assert_close(effective, (solved @ plain), rtol=0, atol=1e-8)


def test_no_circuit_is_composed_through_a_norm_on_the_stream() -> None:
    with pytest.raises(ValueError, match="normalises the residual stream itself"):
        k_composition_qk_circuit(tiny_model(norm_placement="residual"), (0, 0), (1, 0))


@pytest.mark.parametrize(("writer", "reader"), [((1, 0), (1, 1)), ((1, 0), (0, 0))])
def test_a_writer_that_does_not_come_before_its_reader_raises(writer: tuple[int, int], reader: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="the writer is in an earlier layer than the reader"):
        k_composition_qk_circuit(tiny_model(), writer, reader)


@pytest.mark.parametrize(
    ("writer", "reader", "said"), [((0, 3), (1, 0), "no writer L0H3"), ((0, 0), (2, 0), "no reader L2H0")]
)
def test_a_head_that_does_not_exist_raises(writer: tuple[int, int], reader: tuple[int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        k_composition_qk_circuit(tiny_model(), writer, reader)


def test_the_scores_of_a_real_run_come_from_its_patterns() -> None:
    model = tiny_model()
    _, cache = model.run_with_cache(tiny_tokens(pos=7), names_filter="blocks.*.attn.hook_pattern")
    scores = previous_token_scores(cache)
    assert scores.shape == (2, 3)
    expected = cache["pattern", 1][:, 2].diagonal(-1, 1, 2).mean()
    torch.testing.assert_close(scores[1, 2], expected)
