"""Fourier analysis: planted frequencies are found and random ones are not, transforms go there and back."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hooked_lm import HookedTransformer, HookedTransformerConfig
from hooked_lm.fourier import (
    all_pairs,
    analyse_modular,
    fourier_basis,
    frequency_of_row,
    frequency_shares,
    from_fourier,
    key_frequencies,
    neuron_frequencies,
    only_frequencies,
    row_labels,
    to_fourier,
    trig_shares,
    without_frequencies,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def table_of(p: int, weights: dict[int, float], sign: int = 1) -> Tensor:
    """Logits sum_k w_k cos(2 pi k (a + b - c) / p)."""
    a, b, c = torch.meshgrid(*[torch.arange(p)] * 3, indexing="ij")
    return sum(w * (2 * math.pi * k * (a + sign * b - c).double() / p).cos() for k, w in weights.items())  # type: ignore[union-attr, return-value]


@pytest.mark.parametrize("p", [1, 2, 3, 7, 8, 113])
def test_the_basis_is_orthonormal_and_its_rows_are_what_they_are_called(p: int) -> None:
    basis = fourier_basis(p)
    assert torch.allclose(basis @ basis.T, torch.eye(p, dtype=torch.float64), atol=1e-12)
    n = torch.arange(p).double()
    for row, (label, k) in enumerate(zip(row_labels(p), frequency_of_row(p), strict=True)):
        angle = 2 * math.pi * k * n / p
        expected = angle.sin() if label.startswith("sin") else angle.cos()
        assert label == ("constant" if row == 0 else f"{label[:3]} {k}")
        assert torch.allclose(basis[row], expected / expected.norm(), atol=1e-12)


@pytest.mark.parametrize("dims", [0, 1, (0, 2), [-1, 0, 1]])
def test_a_transform_keeps_norms_and_goes_back(dims: int | list[int]) -> None:
    x = normal(5, 6, 7)
    found = to_fourier(x, dims)
    assert found.shape == x.shape
    assert float(found.norm()) == pytest.approx(float(x.norm()))
    assert torch.allclose(from_fourier(found, dims), x)
    for wrong in ((0, 0), (3,), (0, -3)):
        with pytest.raises(ValueError, match="dims are different axes of a tensor with 3"):
            to_fourier(x, wrong)


def test_a_transform_in_two_axes_is_that_of_the_fast_fourier_transform() -> None:
    x = normal(5, 7)
    power = to_fourier(x, (0, 1)) ** 2
    fast = torch.fft.fft2(x).abs() ** 2 / x.numel()
    rows = frequency_of_row(5), frequency_of_row(7)
    for i in range(3):
        for j in range(4):
            ours = power[[r for r in range(5) if rows[0][r] == i]][:, [r for r in range(7) if rows[1][r] == j]].sum()
            theirs = sum(fast[a, b] for a in {i, -i % 5} for b in {j, -j % 7})
            assert float(ours) == pytest.approx(float(theirs))


@pytest.mark.parametrize("p", [23, 24])
def test_planted_frequencies_are_found_and_no_others(p: int) -> None:
    basis, directions = fourier_basis(p), normal(4, 16, seed=1)
    planted = basis[[5, 6, 13, 14]].T @ directions
    shares = frequency_shares(planted + 7.0)
    assert len(shares) == p // 2
    expected = torch.tensor([float((directions[:2] ** 2).sum()), float((directions[2:] ** 2).sum())])
    assert shares[[2, 6]].tolist() == pytest.approx((expected / expected.sum()).tolist())
    assert float(shares.sum()) == pytest.approx(1.0)
    noisy = planted + 0.1 * normal(p, 16, seed=2)
    assert sorted(key_frequencies(noisy)) == [3, 7]
    assert key_frequencies(noisy)[0] == (3 if shares[2] > shares[6] else 7)


@pytest.mark.parametrize("p", [23, 24])
def test_random_matrices_have_key_frequencies_as_seldom_as_chance_says(p: int) -> None:
    found = sum(bool(key_frequencies(normal(p, 3, seed=seed), chance=0.05, n_draws=400)) for seed in range(300))
    assert 3 <= found <= 30  # 15 are expected; 1 in 1000 are beyond these


def test_neurons_of_one_frequency_are_told_from_mixed_and_constant_ones(no_type_checks: None) -> None:
    p = 11
    a, b = (2 * math.pi * torch.arange(p).double() / p,) * 2
    one = (3 * a).cos()[:, None] * (3 * b).sin() + (3 * a).sin()[:, None] + 5
    mixed = one - 5 + 2 * (2 * a).cos()[:, None] * torch.ones(p)
    frequency, share = neuron_frequencies(torch.stack([one, mixed, torch.full((p, p), 2.0).double()], -1))
    assert frequency.tolist() == [3, 2, 0]
    own = float(((one - one.mean()) ** 2).sum())
    other = 4 * p * p / 2
    assert share.tolist() == pytest.approx([1.0, other / (own + other), 0.0])
    with pytest.raises(ValueError, match=r"activations of all pairs are \[p p neuron\]"):
        neuron_frequencies(normal(3, 4, 2))


def test_logits_that_are_cosines_are_explained_whole() -> None:
    table = table_of(13, {2: 3.0, 5: 1.0})
    shares = trig_shares(table + normal(13, 13, 1, seed=3))
    assert shares[[1, 4]].tolist() == pytest.approx([0.9, 0.1])
    assert float(shares.sum()) == pytest.approx(1.0)
    assert trig_shares(table_of(13, {2: 3.0, 5: 1.0}, sign=-1), "subtract")[[1, 4]].tolist() == pytest.approx(
        [0.9, 0.1]
    )
    assert float(trig_shares(normal(13, 13, 13)).sum()) < 0.05
    with pytest.raises(ValueError, match="operation is 'add' or 'subtract', got 'times'"):
        trig_shares(table, "times")
    with pytest.raises(ValueError, match="all answers have the same logit"):
        trig_shares(torch.ones(5, 5, 5))


def test_restricted_and_excluded_logits_are_projections_by_brute_force(no_type_checks: None) -> None:
    p, logits = 7, normal(7, 7, 7)
    centred = logits - logits.mean(-1, keepdim=True)
    a, b, c = torch.meshgrid(*[torch.arange(p)] * 3, indexing="ij")
    expected = torch.zeros_like(logits)
    for k in (1, 3):
        for wave in (torch.cos, torch.sin):
            term = wave(2 * math.pi * k * (a + b - c).double() / p)
            expected += (centred * term).sum() / (term**2).sum() * term
    assert torch.allclose(only_frequencies(logits, [1, 3]), expected)
    assert torch.allclose(without_frequencies(logits, [1, 3]), centred - expected)
    planted = table_of(p, {2: 4.0})
    assert torch.allclose(only_frequencies(planted, [2]), planted)
    assert float(without_frequencies(planted, [2]).abs().max()) < 1e-12
    for wrong in ([], [0], [4], [1, 1]):
        with pytest.raises(ValueError, match="frequencies are different whole numbers from 1 to 3"):
            only_frequencies(logits, wrong)
    with pytest.raises(ValueError, match=r"are \[p p p\], got \(3, 4, 5\)"):
        only_frequencies(normal(3, 4, 5), [1])


def test_tokens_of_all_pairs() -> None:
    tokens = all_pairs(3, between=[7], after=[8, 9])
    assert tokens.shape == (9, 5)
    assert tokens[5].tolist() == [1, 7, 2, 8, 9]
    assert all_pairs(2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


class Adder(HookedTransformer):
    """Adds modulo p with given frequencies, whatever its weights: its logits are made by hand."""

    def forward(self, input: Tensor, *args: object, **options: object) -> Tensor:  # type: ignore[override]
        super().forward(input, *args, **options)  # type: ignore[arg-type]
        rows = self.table[input[:, 0], input[:, 1]]
        return F.pad(rows, (0, 1)).unsqueeze(1).expand(-1, input.shape[1], -1)


def adder(p: int, weights: dict[int, float]) -> Adder:
    cfg = HookedTransformerConfig(
        n_layers=1, d_model=16, n_ctx=3, n_heads=2, d_head=8, d_vocab=p + 1, act_fn="relu", dtype=torch.float64
    )
    model = Adder(cfg)
    model.table = 6.0 * table_of(p, weights)  # type: ignore[assignment]
    rows = [row for k in weights for row in (2 * k - 1, 2 * k)]
    model.embed.W_E.data[:p] = fourier_basis(p)[rows].T @ normal(len(rows), 16, seed=4)
    return model


def test_an_adder_of_known_frequencies_is_analysed_right() -> None:
    p = 17
    model = adder(p, {2: 1.0, 5: 1.0, 7: 1.0})
    train = normal(p, p, seed=1) > 0
    found = analyse_modular(model, p, after=[p], train=train, batch_size=100)
    assert sorted(found.keys) == [2, 5, 7]
    assert found.logits_explained == pytest.approx(1.0)
    assert found.accuracy == {"train": 1.0, "held out": 1.0}
    answers = (torch.arange(p)[:, None] + torch.arange(p)) % p
    losses = F.cross_entropy(model.table.reshape(-1, p), answers.flatten(), reduction="none").view(p, p)
    assert found.losses["all"]["train"] == pytest.approx(float(losses[train].mean()))
    assert found.losses["only"]["held out"] == pytest.approx(float(losses[~train].mean()))
    assert found.losses["without"]["held out"] == pytest.approx(math.log(p))
    assert "they are enough" in found.summary
    assert "the model needs them" in found.summary
    assert found.neuron_frequency.shape == (64,)
    other = analyse_modular(model, p, after=[p], frequencies=[1, 3])
    assert other.logits_explained == pytest.approx(0.0, abs=1e-12)
    assert "they are not enough" in other.summary
    assert "does not need them" in other.summary
    assert math.isnan(other.losses["all"]["held out"])


def test_the_result_has_rows_a_table_and_a_figure() -> None:
    found = analyse_modular(adder(11, {2: 1.0, 4: 0.5}), 11, after=[11])
    rows = found.rows()
    assert [row["frequency"] for row in rows if row["key"]] == [2, 4]
    assert len(rows) == 5
    assert found.top(2)[0][1] == pytest.approx(float(found.embedding.max()))
    assert str(found).splitlines()[1].split() == ["frequency", "embedding", "logits", "neurons"]
    figure = found.figure()
    assert list(figure.data[1].y) == pytest.approx(found.logits.tolist())
    assert figure.layout.title.text == f"key frequencies {', '.join(map(str, found.keys))}"
    with pytest.raises(ValueError, match="k is at least 1"):
        found.top(0)


def test_what_cannot_be_analysed_raises() -> None:
    model = adder(11, {2: 1.0})
    with pytest.raises(ValueError, match="p is 3 to 12, got 13"):
        analyse_modular(model, 13)
    model.embed.W_E.data[:11] = normal(11, 16, seed=8)
    with pytest.raises(ValueError, match="no frequency of the embedding is above chance"):
        analyse_modular(model, 11, after=[11])
    with pytest.raises(ValueError, match="three numbers or more, got 2"):
        frequency_shares(normal(2, 4))
    with pytest.raises(ValueError, match="all numbers have the same row"):
        frequency_shares(torch.ones(5, 4))
    with pytest.raises(ValueError, match="chance is between 0 and 1, with 1 / chance draws or more"):
        key_frequencies(normal(5, 4), chance=0.0001)
    with pytest.raises(ValueError, match="p is 1 or more"):
        fourier_basis(0)
