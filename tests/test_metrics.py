"""The metrics beside formulas written out with the standard library, one row of logits at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from hooked_lm import Intervention, patching
from hooked_lm.components.attention import Attention
from hooked_lm.components.embed import Unembed
from hooked_lm.metrics import Metric, accuracy, kl_to, log_prob, logit, logit_diff, preferred, prob, rank
from hooked_lm.sweep import sweep
from tests.helpers import counted, tiny_model, tiny_tokens
from tests.metrics_helpers import (
    BATCH,
    EXACT,
    POS,
    VOCAB,
    cases,
    halves,
    kl_by_hand,
    log_probs_by_hand,
    numbers,
    quick,
    some_logits,
)

# How a metric is made for an answer and a position, and what it is for one row of logits.
SCORES: dict[str, tuple[Callable[..., Metric], Callable[[list[float], int], float]]] = {
    "logit": (logit, lambda row, answer: row[answer]),
    "logit difference": (
        lambda answer, pos: logit_diff(answer, 0, pos),
        lambda row, answer: row[answer] - row[0],
    ),
    "preferred": (
        lambda answer, pos: preferred(answer, 0, pos),
        lambda row, answer: float(row[answer] > row[0]),
    ),
    "log-probability": (log_prob, lambda row, answer: log_probs_by_hand(row)[answer]),
    "probability": (prob, lambda row, answer: math.exp(log_probs_by_hand(row)[answer])),
    "rank": (rank, lambda row, answer: sum(score > row[answer] for score in row)),
    "accuracy": (accuracy, lambda row, answer: float(all(row[answer] >= score for score in row))),
}


# Scores


@pytest.mark.parametrize("name", SCORES)
@quick
@given(drawn=cases(unequal=True))
def test_a_score_is_its_formula_for_each_prompt_at_the_position(
    name: str, drawn: tuple[Tensor, list[int], int]
) -> None:
    make, by_hand = SCORES[name]
    logits, answers, pos = drawn
    expected = [by_hand(row, answer) for row, answer in zip(logits[:, pos].tolist(), answers, strict=True)]
    metric = make(answers, pos)
    assert metric.name == name
    torch.testing.assert_close(metric.per_prompt(logits), numbers(expected), **EXACT)
    torch.testing.assert_close(metric(logits), numbers(expected).mean(), **EXACT)


@pytest.mark.parametrize("name", SCORES)
def test_an_answer_may_be_one_for_all_or_one_for_each_and_a_number_a_list_or_a_tensor(name: str) -> None:
    make, by_hand = SCORES[name]
    logits = some_logits()
    expected = numbers([by_hand(row, 4) for row in logits[:, -1].tolist()])
    for answer in (4, [4], [4] * BATCH, torch.tensor(4), torch.tensor([4] * BATCH, dtype=torch.int32)):
        torch.testing.assert_close(make(answer, -1).per_prompt(logits), expected, **EXACT)


def test_a_logit_difference_takes_one_token_or_several_on_either_side() -> None:
    rows = some_logits()[:, -1].tolist()
    several = numbers([rows[0][1] - rows[0][5], rows[1][2] - rows[1][5], rows[2][3] - rows[2][5]])
    torch.testing.assert_close(logit_diff([1, 2, 3], 5).per_prompt(some_logits()), several, **EXACT)
    torch.testing.assert_close(logit_diff([1, 2, 3], [5]).per_prompt(some_logits()), several, **EXACT)
    torch.testing.assert_close(logit_diff(5, [1, 2, 3]).per_prompt(some_logits()), -several, **EXACT)
    each = numbers([rows[0][1] - rows[0][3], rows[1][2] - rows[1][2], rows[2][3] - rows[2][1]])
    torch.testing.assert_close(logit_diff([1, 2, 3], [3, 2, 1]).per_prompt(some_logits()), each, **EXACT)


def test_the_last_position_is_read_by_default_and_negative_ones_count_from_the_end() -> None:
    logits, reference = some_logits(), some_logits(1)
    made: list[Callable[..., Metric]] = [
        lambda **at: logit(2, **at),
        lambda **at: logit_diff(2, 3, **at),
        lambda **at: prob(2, **at),
        lambda **at: log_prob(2, **at),
        lambda **at: rank(2, **at),
        lambda **at: accuracy(2, **at),
        lambda **at: kl_to(reference, **at),
    ]
    for make in made:
        assert torch.equal(make().per_prompt(logits), make(pos=POS - 1).per_prompt(logits))
        for pos in range(POS):
            at_pos = make(pos=pos).per_prompt(logits)
            assert torch.equal(make(pos=pos - POS).per_prompt(logits), at_pos)
    # The positions say different things: a metric that ignored `pos` would have failed above or here.
    assert len({float(logit(2, pos=pos)(logits)) for pos in range(POS)}) == POS


def test_even_odds_cost_the_log_of_the_vocabulary_in_nats() -> None:
    assert float(log_prob(3)(torch.zeros(2, 4, 50, dtype=torch.float64))) == pytest.approx(-math.log(50), abs=1e-14)


@quick
@given(drawn=cases())
def test_the_probabilities_of_all_answers_sum_to_one(drawn: tuple[Tensor, list[int], int]) -> None:
    logits, _, pos = drawn
    each = torch.stack([prob(token, pos).per_prompt(logits) for token in range(logits.shape[-1])])
    assert bool(((each > 0) & (each <= 1)).all())
    torch.testing.assert_close(each.sum(0), torch.ones(len(logits), dtype=torch.float64), **EXACT)


def test_log_probabilities_of_extreme_logits_neither_overflow_nor_vanish() -> None:
    logits = numbers([1e4, 0.0, -1e4]).reshape(1, 1, 3)
    assert [float(log_prob(token)(logits)) for token in range(3)] == [0.0, -1e4, -2e4]


@quick
@given(drawn=cases())
def test_a_rank_counts_the_tokens_with_a_larger_logit_so_that_ties_share_the_better_one(
    drawn: tuple[Tensor, list[int], int],
) -> None:
    logits, answers, pos = drawn
    rows = logits[:, pos].tolist()
    expected = [float(sorted(row, reverse=True).index(row[token])) for row, token in zip(rows, answers, strict=True)]
    assert rank(answers, pos).per_prompt(logits).tolist() == expected


@quick
@given(drawn=cases(unequal=True))
def test_without_ties_the_ranks_are_all_the_places_there_are_and_the_first_is_the_accurate_one(
    drawn: tuple[Tensor, list[int], int],
) -> None:
    logits, _, pos = drawn
    vocab = range(logits.shape[-1])
    ranks = torch.stack([rank(token, pos).per_prompt(logits) for token in vocab])
    right = torch.stack([accuracy(token, pos).per_prompt(logits) for token in vocab])
    for column in ranks.T.tolist():
        assert sorted(column) == list(vocab)
    assert torch.equal(right, (ranks == 0).double())


@quick
@given(drawn=cases())
def test_the_model_is_taken_to_predict_exactly_one_token_also_where_some_are_tied(
    drawn: tuple[Tensor, list[int], int],
) -> None:
    logits, _, pos = drawn
    vocab = range(logits.shape[-1])
    right = torch.stack([accuracy(token, pos).per_prompt(logits) for token in vocab])
    assert right.sum(0).tolist() == [1.0] * len(logits)
    assert right.argmax(0).tolist() == [row.index(max(row)) for row in logits[:, pos].tolist()]


@quick
@given(drawn=cases(), shift=halves)
def test_a_constant_added_to_all_logits_moves_the_logit_alone(
    drawn: tuple[Tensor, list[int], int], shift: float
) -> None:
    logits, answers, pos = drawn
    moved = logits + shift
    assert torch.equal(logit(answers, pos).per_prompt(moved), logit(answers, pos).per_prompt(logits) + shift)
    for metric in (logit_diff(answers, 0, pos), rank(answers, pos), accuracy(answers, pos)):
        assert torch.equal(metric.per_prompt(moved), metric.per_prompt(logits))
    for metric in (prob(answers, pos), log_prob(answers, pos), kl_to(logits.flip(-1), pos)):
        torch.testing.assert_close(metric.per_prompt(moved), metric.per_prompt(logits), **EXACT)
    assert float(kl_to(moved, pos).per_prompt(logits).abs().max()) < 1e-13


def test_scores_have_the_slopes_of_their_formulas() -> None:
    logits = some_logits().requires_grad_()
    probs = torch.stack([numbers(log_probs_by_hand(row)).exp() for row in logits[:, 1].tolist()])
    one_hot = torch.eye(VOCAB, dtype=torch.float64)
    reference = some_logits(1)
    wanted = torch.stack([numbers(log_probs_by_hand(row)).exp() for row in reference[:, 1].tolist()])
    slopes = {
        logit([0, 1, 2], pos=1): one_hot[:3],
        logit_diff([0, 1, 2], 5, pos=1): one_hot[:3] - one_hot[5],
        log_prob([0, 1, 2], pos=1): one_hot[:3] - probs,
        prob([0, 1, 2], pos=1): probs.diagonal()[:, None] * (one_hot[:3] - probs),
        kl_to(reference, pos=1): probs - wanted,
    }
    for metric, slope in slopes.items():
        (gradient,) = torch.autograd.grad(metric(logits), logits)
        expected = torch.zeros_like(gradient)
        expected[:, 1] = slope / BATCH  # the mean over prompts
        torch.testing.assert_close(gradient, expected, **EXACT)


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_half_precision_logits_are_not_rounded_to_it(dtype: torch.dtype) -> None:
    logits = some_logits(vocab=5000).to(dtype)
    rows, reference = logits[:, -1].double().tolist(), some_logits(1, vocab=5000).to(dtype)
    answers = [row.index(sorted(row, reverse=True)[4099]) for row in rows]
    ranks = [sum(score > row[answer] for score in row) for row, answer in zip(rows, answers, strict=True)]
    assert rank(answers).per_prompt(logits).tolist() == ranks
    expected = [log_probs_by_hand(row)[answer] for row, answer in zip(rows, answers, strict=True)]
    assert log_prob(answers).per_prompt(logits).tolist() == pytest.approx(expected, abs=1e-4)
    assert prob(answers).per_prompt(logits).tolist() == pytest.approx([math.exp(one) for one in expected], rel=1e-4)
    divergences = [kl_by_hand(*pair) for pair in zip(reference[:, -1].double().tolist(), rows, strict=True)]
    assert kl_to(reference).per_prompt(logits).tolist() == pytest.approx(divergences, abs=1e-4)


# What is read


@pytest.mark.parametrize("pos", [0, 2, -1])
def test_nothing_but_the_declared_position_and_tokens_counts(pos: int) -> None:
    logits, answers, wrong = some_logits(), torch.tensor([1, 2, 3]), torch.tensor([4, 5, 0])
    for metric in (logit(answers, pos), logit_diff(answers, wrong, pos)):
        assert metric.tokens is not None
        assert metric.tokens.T.tolist() == [answers.tolist(), wrong.tolist()][: metric.tokens.shape[1]]
        rest = torch.full_like(logits, float("nan"))
        for prompt, tokens in enumerate(metric.tokens.tolist()):
            rest[prompt, pos, tokens] = logits[prompt, pos, tokens]
        assert torch.equal(metric.per_prompt(rest), metric.per_prompt(logits))
    others = [make(answers, pos) for make in (prob, log_prob, rank, accuracy)]
    for metric in (*others, kl_to(some_logits(1), pos)):
        assert metric.tokens is None
        rest = torch.full_like(logits, float("nan"))
        rest[:, pos] = logits[:, pos]
        assert torch.equal(metric.per_prompt(rest), metric.per_prompt(logits))


N_POSITIONS = 7  # of `tiny_tokens`, in 2 prompts over 20 tokens
MODEL = tiny_model()
CELLS = [Intervention(f"blocks.{layer}.hook_mlp_out", "scale", 2.0, pos=pos) for layer in (0, 1) for pos in (0, 3, 4)]


@pytest.mark.parametrize(
    ("metric", "streams_per_cell"),
    [
        (logit([3, 4], pos=4), 0),
        (logit_diff(3, [5, 6], pos=4), 0),
        (prob([3, 4], pos=4), 2),
        (log_prob([3, 4], pos=4), 2),
        (rank(3, pos=4), 2),
        (accuracy(3, pos=4), 2),
        (kl_to(some_logits(batch=2, pos=5, vocab=20), pos=4), 2),
    ],
    ids=lambda value: value.name if isinstance(value, Metric) else "",
)
def test_a_sweep_unembeds_the_declared_tokens_or_else_one_position_of_each_prompt(
    metric: Metric, streams_per_cell: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted at the unembedding itself, which makes the whole vocabulary of each stream that it is given."""
    unembedded = counted(monkeypatch, Unembed, "forward")
    streams = []
    for cells in (CELLS[:1], CELLS):
        unembedded.clear()
        sweep(MODEL, tiny_tokens(), cells, metric, verbose=False)
        streams.append(sum(x.numel() // x.shape[-1] for _, x in unembedded))
    # Whatever the run without interventions takes, it is there in both.
    assert streams[1] - streams[0] == streams_per_cell * (len(CELLS) - 1)
    assert streams[0] <= 2 * N_POSITIONS + streams_per_cell


def test_a_sweep_computes_nothing_for_cells_after_the_position_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    after = [Intervention(f"blocks.{layer}.hook_resid_pre", "zero", pos=pos) for layer in (0, 1) for pos in (3, 6)]
    metric = log_prob([3, 4], pos=2)
    alone = metric.per_prompt(MODEL(tiny_tokens()).detach())
    attended = counted(monkeypatch, Attention, "project")
    found = sweep(MODEL, tiny_tokens(), after, metric, per_prompt=True, verbose=False)
    assert {x.shape[:2] for _, x, *_ in attended} == {(2, N_POSITIONS)}
    assert len(attended) == 3 * MODEL.cfg.n_layers  # queries, keys and values of the base run
    torch.testing.assert_close(found, alone.expand(len(after), 2), **EXACT)


# Errors


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (logit(2, pos=4), "logit reads position 4, and the logits have 4 positions"),
        (logit_diff(2, 3, pos=-5), "logit difference reads position -5, and the logits have 4 positions"),
        (rank(2, pos=9), "rank reads position 9, and the logits have 4 positions"),
        (kl_to(some_logits(pos=9), pos=8), "KL divergence reads position 8, and the logits have 4 positions"),
        (logit(6), r"logit reads tokens \[\[6\]\]; the vocabulary is 0-5"),
        (logit_diff([0, 1, 2], [3, -1, 4]), r"logit difference reads tokens .*\[1, -1\].*; the vocabulary is 0-5"),
        (prob(6), r"probability reads tokens \[\[6\]\]; the vocabulary is 0-5"),
        (log_prob([0, 6, 1]), r"log-probability reads tokens \[\[0\], \[6\], \[1\]\]; the vocabulary is 0-5"),
        (rank(-1), r"rank reads tokens \[\[-1\]\]; the vocabulary is 0-5"),
        (accuracy(6), r"accuracy reads tokens \[\[6\]\]; the vocabulary is 0-5"),
        (logit([1, 2]), "logit has answers for 2 prompts; there are 3"),
        (logit_diff(0, [1, 2, 3, 4]), "logit difference has answers for 4 prompts; there are 3"),
        (prob([1, 2]), "probability has answers for 2 prompts; there are 3"),
        (log_prob([1, 2]), "log-probability has answers for 2 prompts; there are 3"),
        (rank([1, 2]), "rank has answers for 2 prompts; there are 3"),
        (accuracy([1, 2]), "accuracy has answers for 2 prompts; there are 3"),
        (kl_to(some_logits(batch=2)), "KL divergence has answers for 2 prompts; there are 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_logits_that_a_metric_is_not_made_for_are_named(metric: Metric, message: str) -> None:
    for score in (metric, metric.per_prompt):
        with pytest.raises(ValueError, match=f"^{message}$"):
            score(some_logits())


def test_the_number_of_prompts_can_be_checked_by_itself() -> None:
    for metric in (logit(9, pos=99), logit([9, 9, 9], pos=99), kl_to(some_logits()), kl_to(some_logits(batch=1))):
        metric.check_batch(BATCH)
    with pytest.raises(ValueError, match=r"^logit has answers for 3 prompts; there are 1$"):
        logit([9, 9, 9], pos=99).check_batch(1)


@pytest.mark.parametrize(
    "tokens",
    [
        1.0,
        [1.0, 2.0],
        torch.tensor([1.0]),
        True,
        torch.tensor([True]),
        [],
        torch.tensor([], dtype=torch.long),
        [[1, 2]],
    ],
    ids=repr,
)
@pytest.mark.parametrize("make", [logit, prob, log_prob, rank, accuracy])
def test_what_is_no_token_and_no_list_of_tokens_is_named(make: Callable[..., Metric], tokens: Any) -> None:
    with pytest.raises(ValueError, match=r"^answer is a token, or one for each prompt; got ") as raised:
        make(tokens)
    assert str(raised.value).endswith(repr(tokens))


def test_a_logit_difference_names_which_of_its_sides_is_at_fault() -> None:
    with pytest.raises(ValueError, match=r"^answer is a token, or one for each prompt; got 0\.5$"):
        logit_diff(0.5, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^wrong is a token, or one for each prompt; got \[\]$"):
        logit_diff(1, [])
    with pytest.raises(ValueError, match=r"^logit_diff has 2 answers and 3 wrong ones$"):
        logit_diff([1, 2], [3, 4, 5])


@pytest.mark.parametrize("shape", [(6,), (4, 6), (1, 3, 4, 6)])
def test_a_reference_of_another_shape_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^kl_to takes logits \[batch pos vocab\], got shape \(") as raised:
        kl_to(torch.zeros(shape))
    assert str(raised.value).endswith(str(shape))


@pytest.mark.parametrize("pos", [4, -5])
def test_a_position_that_the_reference_lacks_is_named(pos: int) -> None:
    with pytest.raises(ValueError, match=f"^kl_to compares position {pos}, and the reference has 4 positions$"):
        kl_to(some_logits(), pos)


@pytest.mark.parametrize("vocab", [1, VOCAB + 1])
def test_a_reference_over_another_vocabulary_is_named(vocab: int) -> None:
    """One token would broadcast to all of the run's, and make a number that means nothing."""
    metric = kl_to(some_logits(1, vocab=vocab))
    with pytest.raises(ValueError, match=f"{vocab} tokens.*{VOCAB}"):
        metric.per_prompt(some_logits())


def test_one_prompt_that_is_not_a_number_is_enough_for_a_sweep_to_name_its_cell() -> None:
    nan = Intervention("blocks.1.hook_mlp_out", "replace", float("nan"), pos=6, batch=1)
    for metric in (logit([3, 4]), log_prob(3), kl_to(some_logits(batch=1, vocab=20))):
        for per_prompt in (False, True):
            with pytest.raises(ValueError, match=r"not a number for 1 of 2 cells, first for .*hook_mlp_out.*batch=1"):
                sweep(MODEL, tiny_tokens(), [CELLS[0], nan], metric, per_prompt=per_prompt, verbose=False)


def test_an_answer_in_letters_is_refused_and_the_remedy_named() -> None:
    for answer in (" Paris", [" Paris", " Rome"]):
        with pytest.raises(ValueError, match=r"model\.to_single_token"):
            logit(answer)  # type: ignore[arg-type]


def test_logits_and_positions_that_are_none_are_named() -> None:
    with pytest.raises(ValueError, match=r"reads logits \[batch pos vocab\], got shape \(3, 6\)"):
        logit(1).per_prompt(some_logits()[:, 0])
    with pytest.raises(ValueError, match=r"reads one position, an int; got 1\.0"):
        logit(1, pos=1.0)  # type: ignore[arg-type]


@torch.no_grad()
def test_a_metric_that_writes_to_its_logits_gives_what_it_gives_of_a_copy() -> None:
    model, tokens = tiny_model(n_layers=3), tiny_tokens(2, 6)
    _, clean = model.run_with_cache(tiny_tokens(2, 6, seed=4))

    def centred(logits: Tensor) -> Tensor:
        logits *= 2  # twice would be four times
        return logits[0, -1, 4] + logits[:, 1].square().sum()

    def of_a_copy(logits: Tensor) -> Tensor:
        return centred(logits.clone())

    sites = [f"blocks.{layer}.{name}" for layer in range(3) for name in ("hook_resid_pre", "attn.hook_z")]
    cells: list[Any] = [Intervention.from_cache(site, clean, pos=pos) for site in sites for pos in (0, 3, 5)]
    # Cells without effect are given the base run's own logits.
    cells += [Intervention("blocks.1.hook_resid_post", "add", 0.0, pos=2), ()]
    came = sweep(model, tokens, [*cells[-2:], *cells], centred, verbose=False)
    expected = sweep(model, tokens, [*cells[-2:], *cells], of_a_copy, verbose=False)
    loop = [of_a_copy(model.run(tokens, interventions=[cell] if cell else [])) for cell in [*cells[-2:], *cells]]
    torch.testing.assert_close(came, expected, rtol=0, atol=0)
    torch.testing.assert_close(came, torch.stack(loop), rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_setter_that_writes_to_the_clean_activation_spoils_no_other_cell() -> None:
    model, tokens = tiny_model(), tiny_tokens(2, 5)
    _, clean = model.run_with_cache(tiny_tokens(2, 5, seed=4))

    def setter(activation: Tensor, index: list[Any], clean_activation: Tensor) -> Tensor:
        clean_activation[:, : index[1]] = activation[:, : index[1]]
        return clean_activation

    how: dict[str, Any] = {"activation_name": "resid_pre", "index_axis_names": ("layer", "pos"), "verbose": False}
    grid = patching.generic_activation_patch(model, tokens, clean, logit(3), setter, **how)
    for layer in range(2):
        for pos in range(5):
            edit = Intervention.from_cache(f"blocks.{layer}.hook_resid_pre", clean, pos=tuple(range(pos, 5)))
            expected = logit(3)(model.run(tokens, interventions=[edit]))
            torch.testing.assert_close(grid[layer, pos], expected, rtol=0, atol=1e-9)
