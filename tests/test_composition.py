"""Composition is judged by what matrices with the same singular values score when they are turned at random."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import FactoredMatrix, HookedTransformer, plotting
from hooked_lm.circuits.composition import CompositionScores, chance_of_square, head_composition, pairs_table
from hooked_lm.circuits.heads import repeated_token_scores
from hooked_lm.factored_matrix import composition_scores
from tests.helpers import LargestTensor, tiny_model

MODES = ("Q", "K", "V")
DEMO = HookedTransformer.from_pretrained("demo-induction-2l")


def composed(model: HookedTransformer, mode: str) -> CompositionScores:
    return head_composition(model, mode, verbose=False)


def assert_same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def random_rotations(n: int, size: int, seed: int = 0) -> Tensor:
    """Orthogonal matrices [n size size], uniform over all: QR of normal entries, signs of R's diagonal put right."""
    normal = torch.randn(n, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Q, R = torch.linalg.qr(normal)
    return Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None]


def drawn_squares(writer: list[float], reader: list[float], size: int, n: int) -> Tensor:
    """Squared composition scores of `n` pairs of [size size] matrices with these singular values."""
    left, right = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
    left.diagonal()[: len(writer)], right.diagonal()[: len(reader)] = torch.tensor(writer), torch.tensor(reader)
    U, V, X, Y = random_rotations(4 * n, size).chunk(4)
    pairs = FactoredMatrix(U, left @ V), FactoredMatrix(X, right @ Y)
    return composition_scores(*pairs, broadcast_dims=False).square()


def expected_moments(model: HookedTransformer, mode: str, writer: tuple[int, int], reader: tuple[int, int]) -> Any:
    """Score and z of a pair, from its two matrices multiplied out, and the formula of the module."""
    n = model.cfg.d_model
    left = model.OV[writer].AB
    right = {"Q": model.QK[reader].AB, "K": model.QK[reader].AB.T, "V": model.OV[reader].AB}[mode]
    score = (left @ right).norm() / (left.norm() * right.norm())
    uneven = []
    for matrix in (left, right):
        share = torch.linalg.svdvals(matrix).square() / matrix.norm().square()
        uneven.append(share.square().sum() - 1 / n)
    std = (2 * uneven[0] * uneven[1] / ((n - 1) * (n + 2))).sqrt()
    return float(score), float((score.square() - 1 / n) / std)


# Chance


@pytest.mark.parametrize(
    ("writer", "reader", "size"),
    [
        ([1.0], [2.0], 2),
        ([1.0], [1.0], 7),
        ([3.0, 1.0], [1.0, 1.0, 0.5], 5),
        ([2.0, 2.0, 2.0], [5.0, 1.0], 4),
        ([1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 0.3, 0.1, 0.1], 8),
    ],
    ids=str,
)
def test_the_moments_of_chance_are_those_of_matrices_turned_at_random(
    writer: list[float], reader: list[float], size: int
) -> None:
    n = 8_000
    drawn = drawn_squares(writer, reader, size, n)
    mean, std = chance_of_square(torch.tensor(writer), torch.tensor(reader), size)
    assert mean == 1 / size
    assert float(drawn.mean()) == pytest.approx(mean, abs=4 * float(std) / n**0.5)
    assert float(drawn.std()) == pytest.approx(float(std), rel=0.05)


def test_two_directions_in_a_plane_score_the_squared_cosine_of_a_random_angle() -> None:
    # The mean of cos^2 is 1/2, that of cos^4 3/8.
    mean, std = chance_of_square(torch.tensor([3.0, 0.0]), torch.tensor([1.0]), 2)
    assert mean == 0.5
    assert float(std) == pytest.approx((3 / 8 - 1 / 4) ** 0.5)


def test_a_matrix_with_equal_singular_values_scores_the_same_whichever_way_it_is_turned() -> None:
    drawn = drawn_squares([2.0] * 4, [3.0, 1.0, 0.5], 4, 50)
    assert_same(drawn, torch.full_like(drawn, 0.25))
    # Also where rounding has made them differ a little: z would else be noise over noise.
    for even in (torch.full((4,), 2.0), torch.tensor([2.0, 2.0, 2.0, 2.0001]).double()):
        assert float(chance_of_square(even, torch.tensor([3.0, 1.0, 0.5]), 4).std) == 0.0


def test_stacks_of_singular_values_broadcast_and_a_zero_matrix_has_no_spread() -> None:
    writer, reader = torch.rand(3, 1, 2) + 0.1, torch.rand(4, 2) + 0.1
    writer[2] = 0.0
    std = chance_of_square(writer, reader, 6).std
    assert std.shape == (3, 4)
    assert (std[2] == 0).all()
    assert float(std[1, 3]) == pytest.approx(float(chance_of_square(writer[1, 0], reader[3], 6).std))


def test_chance_in_no_dimensions_or_in_fewer_than_the_rank_raises() -> None:
    one, three = torch.ones(1), torch.ones(3)
    assert float(chance_of_square(one, one, 1).mean) == 1.0
    assert float(chance_of_square(one, one, 1).std) == 0.0
    with pytest.raises(ValueError, match="at least one dimension, got 0"):
        chance_of_square(one, one, 0)
    with pytest.raises(ValueError, match="more than 2 singular values are not zero"):
        chance_of_square(three, one, 2)


# Scores


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped queries": {"n_heads": 4, "n_key_value_heads": 2},
    "wide heads": {"d_head": 16},
    "parallel": {"parallel_attn_mlp": True},
    "experts": {"num_experts": 4, "experts_per_token": 2},
    "attention only": {"attn_only": True},
}


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_scores_and_z_are_those_of_the_matrices_multiplied_out(changes: dict[str, Any], mode: str) -> None:
    model = tiny_model(n_layers=3, normalization_type=None, **changes)
    found = composed(model, mode)
    assert found.mode == mode
    assert found.expected == pytest.approx(12**-0.5)
    assert_same(found.scores, model.all_composition_scores(mode))
    for writer, reader in (((0, 1), (1, 0)), ((0, 2), (2, 1)), ((1, 0), (2, 2))):
        score, z = expected_moments(model, mode, writer, reader)
        assert float(found.scores[(*writer, *reader)]) == pytest.approx(score)
        assert float(found.z[(*writer, *reader)]) == pytest.approx(z)


@torch.no_grad()
def test_nothing_composes_with_a_head_of_the_same_or_an_earlier_layer() -> None:
    found = composed(tiny_model(n_layers=3), "K")
    for first in range(3):
        for second in range(3):
            block = (found.scores[first, :, second], found.z[first, :, second], found.excess[first, :, second])
            assert all(bool(numbers.all()) == (first < second) for numbers in block)
            assert bool(found.earlier[first, :, second].all()) == (first < second)
    torch.testing.assert_close(found.excess[0, :, 1], found.scores[0, :, 1] - found.expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "changes", [{}, {"normalization_type": "RMS"}, {"n_heads": 4, "n_key_value_heads": 2}], ids=str
)
def test_a_model_scores_the_same_whether_its_norms_are_folded_or_not(changes: dict[str, Any], mode: str) -> None:
    raw = tiny_model(**changes)
    folded = copy.deepcopy(raw)
    folded.process_weights_()
    assert folded.ln_final.w is None
    found, again = composed(raw, mode), composed(folded, mode)
    assert_same(found.scores, again.scores)
    torch.testing.assert_close(found.z, again.z)
    assert_same(again.scores, folded.all_composition_scores(mode).detach())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("placement", ["before_and_after", "after"])
def test_the_gain_of_a_norm_on_what_heads_write_counts(placement: str, mode: str) -> None:
    model = tiny_model(norm_placement=placement, normalization_type="RMS")
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for block in by_hand.blocks:
            block.attn.W_O.mul_(block.ln1_post.w)
            block.ln1_post.w.fill_(1.0)
            if placement == "before_and_after":
                for W in (block.attn.W_Q, block.attn.W_K, block.attn.W_V):
                    W.mul_(block.ln1.w[:, None])
                block.ln1.w.fill_(1.0)
    assert_same(composed(model, mode).scores, by_hand.all_composition_scores(mode).detach())
    assert not torch.allclose(composed(model, mode).scores, model.all_composition_scores(mode))


@pytest.mark.parametrize(("normalization_type", "dimensions"), [("LN", 11), ("LNPre", 11), ("RMS", 12), (None, 12)])
def test_heads_that_read_less_the_mean_meet_in_one_dimension_less(
    normalization_type: str | None, dimensions: int
) -> None:
    found = composed(tiny_model(normalization_type=normalization_type), "Q")
    assert found.expected == pytest.approx(dimensions**-0.5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalization_type", ["LN", None])
def test_heads_with_random_weights_compose_as_chance_says(normalization_type: str | None, mode: str) -> None:
    model = tiny_model(n_layers=4, d_model=24, n_heads=6, normalization_type=normalization_type, attn_only=True)
    found = composed(model, mode)
    z = found.z[found.earlier]
    assert z.numel() == 6 * 36
    # 216 values, not independent, of mean 0 and deviation 1.
    assert abs(float(z.mean())) < 0.4
    assert 0.7 < float(z.std()) < 1.3
    assert abs(float(found.excess[found.earlier].mean())) < 0.02


# Known answers


def wired_model() -> HookedTransformer:
    """Random heads, but the keys of L1H2 read just where L0H1 writes."""
    model = tiny_model(attn_only=True, normalization_type=None, d_model=24, n_heads=4, d_head=3)
    with torch.no_grad():
        model.blocks[1].attn.W_K[2] = model.blocks[0].attn.W_O[1].T
    return model


@torch.no_grad()
def test_a_wired_pair_stands_out_in_its_own_mode_only() -> None:
    model = wired_model()
    best, second = composed(model, "K").top(2)
    assert (best.writer, best.reader, best.label) == ((0, 1), (1, 2), "L0H1 -> L1H2")
    assert best.z > 5 > second.z
    assert best.excess == pytest.approx(best.score - 24**-0.5)
    assert all(composed(model, mode).top(1)[0].z < 5 for mode in "QV")


@torch.no_grad()
def test_a_reader_of_everything_that_is_written_and_one_of_nothing_have_the_scores_of_their_definition() -> None:
    model = wired_model()
    write, read = model.blocks[0].attn.W_O, model.blocks[1].attn.W_K
    model.blocks[0].attn.W_V.copy_(torch.eye(24)[:, :3])
    model.blocks[1].attn.W_Q.copy_(torch.eye(24)[:, :3])
    write.copy_(torch.eye(24)[:3])
    read.copy_(torch.eye(24)[:, 3:6])
    read[2] = torch.eye(24)[:, :3]
    found = composed(model, "K")
    # ||P P|| / (||P|| ||P||) for a projection P on 3 dimensions.
    assert found.scores[0, :, 1, 2].tolist() == pytest.approx([3**-0.5] * 4)
    assert found.scores[0, :, 1, :2].tolist() == [[0.0, 0.0]] * 4
    # Shares of a third each: std of the square is sqrt(2 (1/3 - 1/24)^2 / (23 * 26)).
    std = (2 / (23 * 26)) ** 0.5 * (1 / 3 - 1 / 24)
    assert found.z[0, 0, 1, 2] == pytest.approx((1 / 3 - 1 / 24) / std)
    assert found.z[0, 0, 1, 0] == pytest.approx(-1 / 24 / std)


@torch.no_grad()
def test_a_head_that_writes_nothing_and_one_that_reads_nothing_score_zero() -> None:
    model = wired_model()
    model.blocks[0].attn.W_O[0].zero_()
    model.blocks[1].attn.W_K[3].zero_()
    found = composed(model, "K")
    for pair in (found.scores[0, 0, 1], found.scores[0, :, 1, 3], found.z[0, 0, 1], found.z[0, :, 1, 3]):
        assert (pair == 0).all()
    assert bool(found.z.isfinite().all())


def test_the_strongest_composition_of_the_bundled_model_is_of_its_two_heads_through_the_keys() -> None:
    previous = repeated_token_scores(DEMO, "previous_token", verbose=False).top(1)[0]
    induction = repeated_token_scores(DEMO, "induction", verbose=False).top(1)[0]
    best = {mode: composed(DEMO, mode).top(1)[0] for mode in MODES}
    assert best["K"].label == f"{previous.label} -> {induction.label}" == "L0H0 -> L1H1"
    assert best["K"].z > 50 > 10 > max(best["Q"].z, best["V"].z)


# What comes back


def made_up() -> CompositionScores:
    scores, z = torch.zeros(2, 2, 2, 2), torch.zeros(2, 2, 2, 2)
    scores[0, :, 1] = torch.tensor([[0.4, 0.1], [0.2, 0.3]])
    z[0, :, 1] = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    return CompositionScores("V", scores, 0.25, z)


def test_top_orders_the_pairs_there_are_by_z_or_by_score() -> None:
    found = made_up()
    assert [one.label for one in found.top(4)] == ["L0H1 -> L1H1", "L0H0 -> L1H0", "L0H1 -> L1H0", "L0H0 -> L1H1"]
    assert [one.z for one in found.top(4)] == [3.0, 1.0, 0.5, -2.0]
    by_score = found.top(4, by="score")
    assert [one.score for one in by_score] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert [one.excess for one in by_score] == pytest.approx([0.15, 0.05, -0.05, -0.15])
    assert {one.mode for one in by_score} == {"V"}


def test_the_table_has_a_line_for_each_pair_and_takes_several_modes() -> None:
    lines = str(made_up()).splitlines()
    assert lines[0].split() == ["writer", "->", "reader", "score", "excess", "z"]
    assert lines[1].split() == ["V", "L0H1", "->", "L1H1", "0.300", "0.050", "3.0"]
    assert len(lines) == 5
    both = pairs_table([*made_up().top(1), *composed(DEMO, "K").top(1)]).splitlines()
    assert [line.split()[0] for line in both] == ["writer", "V", "K"]
    assert len({len(line) for line in both}) == 1


def test_the_scores_draw_as_a_map_of_writers_and_readers() -> None:
    found = composed(DEMO, "K")
    labels = DEMO.all_head_labels
    heat = plotting.composition_matrix(found.scores[0, :, 1], labels[:4], labels[4:]).data[0]
    assert heat.z.tolist() == found.scores[0, :, 1].tolist()


def test_one_pair_of_layers_is_in_memory_at_a_time() -> None:
    model = tiny_model(n_layers=6, d_model=24, n_heads=4)
    with LargestTensor() as seen:
        composed(model, "K")
    # The products of all heads of two layers: (heads * d_head)^2.
    assert seen.numbers <= max(24**2, 6 * 4 * 6 * 4)


def test_half_precision_weights_are_composed_in_single() -> None:
    half = tiny_model(dtype=torch.float32).to(torch.bfloat16)
    rounded = copy.deepcopy(half).to(torch.float32)
    torch.testing.assert_close(composed(half, "Q").z, composed(rounded, "Q").z)


def test_what_cannot_be_composed_raises() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="composition is by 'Q', 'K' or 'V', not 'O'"):
        composed(model, "O")
    with pytest.raises(ValueError, match="this model has 1 layers"):
        composed(tiny_model(n_layers=1), "Q")
    with pytest.raises(ValueError, match="normalises the residual stream itself"):
        composed(tiny_model(norm_placement="residual"), "Q")
    after = tiny_model(use_qk_norm=True, positional_embedding_type="rotary", qk_norm_after_rotary=True)
    with pytest.raises(ValueError, match="no product of its own matrices"):
        composed(after, "Q")
    assert composed(after, "V").scores.shape == (2, 3, 2, 3)
    with pytest.raises(ValueError, match=r"top\(10\): there are 9 pairs of heads"):
        composed(model, "Q").top(10)
    with pytest.raises(ValueError, match="ordered by 'z' or 'score', not 'excess'"):
        composed(model, "Q").top(1, by="excess")
