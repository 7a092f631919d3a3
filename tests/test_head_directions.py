"""Heads that write a direction or read it: scores from their definition, a planted head, and chance that is chance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, plotting
from hooked_lm._support.multiple_tests import holm_adjusted
from hooked_lm.circuits import directions
from hooked_lm.circuits.composition import chance_of_square
from hooked_lm.circuits.directions import HeadDirections, reading_heads, writing_heads
from hooked_lm.components.norm import Norm
from tests.architectures_helpers import LATENT
from tests.helpers import randomise_, tiny_model, tiny_tokenizer

QUIET: dict[str, Any] = {"verbose": False}
MODELS: dict[str, dict[str, Any]] = {
    "layer norm": {},
    "rms": {"normalization_type": "RMS"},
    "no norms": {"normalization_type": None},
    "grouped queries": {"n_heads": 4, "n_key_value_heads": 2},
    "norms around": {"norm_placement": "before_and_after"},
    "query-key norm": {"use_qk_norm": True},
    "attention only": {"attn_only": True},
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(norm: Any, width: int) -> Tensor:
    """A norm without scale and bias, as a matrix that acts on rows from the right."""
    identity = torch.eye(width, dtype=torch.float64)
    if not isinstance(norm, Norm):
        return identity
    centring = identity - 1 / width if norm.centred else identity
    return centring if norm.w is None else centring @ norm.w.detach().diag()


def by_hand(model: HookedTransformer, d: Tensor, what: str) -> Tensor:
    """The share of each head's output or input along `d`, [layer head]."""
    cfg, rows = model.cfg, []
    centring = linear(model.blocks[-1].ln1, cfg.d_model) if model.blocks[-1].ln1 is not None else None
    read_mean = torch.eye(cfg.d_model, dtype=torch.float64)
    if isinstance(model.blocks[-1].ln1, Norm) and model.blocks[-1].ln1.centred:
        read_mean = read_mean - 1 / cfg.d_model
    assert centring is not None
    unit = d @ read_mean / (d @ read_mean).norm()
    for block in model.blocks:
        for head in range(cfg.n_heads):
            kv = head * cfg.n_kv_heads // cfg.n_heads
            before, attn = linear(block.ln1, cfg.d_model), block.attn
            if what == "writes":
                OV = before @ attn.W_V[kv] @ attn.W_O[head] @ linear(block.ln1_post, cfg.d_model) @ read_mean
                rows.append((OV @ unit).norm() / OV.norm())
                continue
            W = {"q": attn.W_Q[head], "k": attn.W_K[kv], "v": attn.W_V[kv]}[what]
            norm = {"q": attn.q_norm, "k": attn.k_norm, "v": None}[what]
            read = read_mean @ before @ W @ linear(norm, cfg.d_head)
            rows.append((unit @ read).norm() / read.norm())
    return torch.stack(rows).reshape(cfg.n_layers, cfg.n_heads).detach()


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_scores_are_shares_of_each_heads_matrix_with_the_norms_in_it(fields: dict[str, Any]) -> None:
    model, d = tiny_model(**fields), normal(2, 12)
    settings: dict[str, Any] = {"n_draws": 2, "chance": "isotropic", **QUIET}
    got = {"writes": writing_heads(model, d, **settings)}
    got |= {through: reading_heads(model, d, through, **settings) for through in ("q", "k", "v")}
    for what, found in got.items():
        for row in (0, 1):
            assert torch.allclose(found.scores[row], by_hand(model, d[row], what), atol=1e-10), what
    assert torch.allclose(writing_heads(model, -3 * d, **settings).scores, got["writes"].scores)


def test_folding_the_norms_changes_nothing() -> None:
    model = tiny_model()
    folded = randomise_(tiny_model())
    folded.process_weights_(fold_ln=True, center_writing_weights=True, center_unembed=True)
    for one, other in (
        (writing_heads(model, [3, 7], **QUIET), writing_heads(folded, [3, 7], **QUIET)),
        *((reading_heads(model, normal(12), t, **QUIET), reading_heads(folded, normal(12), t, **QUIET)) for t in "qkv"),
    ):
        assert torch.allclose(one.scores, other.scores, atol=1e-9)
        if one.kind == "writes":  # embeddings are centred by folding, the chance of unembeddings is the same
            assert torch.allclose(one.expected, other.expected, atol=0.01)
            assert torch.allclose(one.z, other.z, atol=0.2)


# A planted head


def planted(d: Tensor, what: str) -> HookedTransformer:
    """A model in which L1H2 alone writes along `d`, or reads it."""
    model = tiny_model(d_model=32, n_heads=4, d_head=8, n_layers=3)
    unit = (d - d.mean()) / (d - d.mean()).norm()
    with torch.no_grad():
        attn = model.blocks[1].attn
        if what == "writes":
            attn.W_O[2] += 5 * torch.outer(normal(8, seed=1), unit)
        else:
            W = {"q": attn.W_Q, "k": attn.W_K, "v": attn.W_V}[what]
            assert model.blocks[1].ln1.w is not None
            W[2] += 5 * torch.outer(unit / model.blocks[1].ln1.w, normal(8, seed=1))
    return model


@pytest.mark.parametrize("what", ["writes", "q", "k", "v"])
def test_a_planted_head_is_found_and_no_other(what: str) -> None:
    d = normal(32, seed=3)
    model = planted(d, what)
    settings: dict[str, Any] = {"chance": "isotropic", **QUIET}
    found = writing_heads(model, d, **settings) if what == "writes" else reading_heads(model, d, what, **settings)
    assert [(one.layer, one.head) for one in found.significant(0.05)] == [(1, 2)]
    best = found.top(1)[0]
    assert (best.label, best.percentile) == ("L1H2", 100.0)
    assert best.z > 5
    assert best.p == pytest.approx(1 / (found.n_draws + 1))
    assert best.p_adjusted == pytest.approx(12 / (found.n_draws + 1))
    other = normal(32, seed=4)
    none = (
        writing_heads(model, other, **settings) if what == "writes" else reading_heads(model, other, what, **settings)
    )
    assert none.significant(0.01) == []


def test_the_head_that_writes_a_tokens_logit_is_found_by_the_token() -> None:
    cfg = {"d_vocab": 300, "d_model": 32, "n_heads": 4, "d_head": 8}
    model = tiny_model(**cfg)
    model.set_tokenizer(tiny_tokenizer())
    word = model.to_single_str_token(290)
    token = model.to_single_token(word)
    with torch.no_grad():
        W_U = model.unembed.W_U * model.ln_final.w[:, None]
        write = (W_U - W_U.mean(0) - (W_U - W_U.mean(0)).mean(1, keepdim=True))[:, token]
        model.blocks[0].attn.W_O[3] += 3 * torch.outer(normal(8), write / write.norm())
    found = writing_heads(model, [word, token - 1], **QUIET)
    assert found.directions[0] == word
    assert [(one.direction, one.label) for one in found.significant()] == [(word, "L0H3")]
    assert found.top(1, word) == found.top(1)
    assert found.chance == "directions like the unembeddings"


# Chance


@pytest.mark.parametrize("chance", ["isotropic", "unembedding", "embedding", "activations"])
def test_random_directions_have_uniform_p_values(chance: str) -> None:
    model = tiny_model(d_vocab=60)
    uneven = normal(500, 12, seed=1) * torch.linspace(0.1, 3, 12)
    rows = {"isotropic": torch.eye(12, dtype=torch.float64), "activations": uneven - uneven.mean(0)}
    if chance == "unembedding":
        W_U = (model.ln_final.w[:, None] * model.W_U).detach().mT
        rows[chance] = W_U - W_U.mean(0)
    if chance == "embedding":
        rows[chance] = model.W_E.detach() - model.W_E.detach().mean(0)
    drawn = normal(400, len(rows[chance]), seed=9) @ rows[chance]
    # Their mean does not count.
    given: Any = uneven + 5 * normal(12, seed=2) if chance == "activations" else chance
    for found in (
        writing_heads(model, drawn, chance=given, n_draws=2000, **QUIET),
        reading_heads(model, drawn, "k", chance=given, n_draws=2000, **QUIET),
    ):
        shares = torch.stack([(found.p <= level).double().mean(0) for level in (0.1, 0.25, 0.5, 0.75, 0.9)])
        expected = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)[:, None, None]
        # Four standard errors of 400 directions, and of 2000 draws.
        assert bool(((shares - expected).abs() < 4 * (expected * (1 - expected) * (1 / 400 + 1 / 2000)).sqrt()).all())
        assert float((found.p_adjusted.amin((1, 2)) <= 0.05).double().mean()) < 0.05 + 4 * (0.05 * 0.95 / 400) ** 0.5
        assert abs(float(found.z.mean())) < 0.1


def test_the_wrong_chance_gives_p_values_that_are_not_uniform() -> None:
    model = tiny_model()
    uneven = normal(300, 12, seed=1) * torch.tensor([30.0] + [0.1] * 11)
    found = writing_heads(model, uneven, chance="isotropic", **QUIET)
    assert float((found.p.mean(0) - 0.5).abs().max()) > 0.2


def test_chance_without_a_preferred_direction_is_that_of_a_random_rotation() -> None:
    model = tiny_model()
    found = writing_heads(model, normal(12), chance="isotropic", n_draws=20000, **QUIET)
    spread = ((found.scores[0] - found.expected) / found.z[0]).abs()
    exact = chance_of_square(torch.ones(8), torch.ones(1), 11)
    mean_of_square = found.expected**2 + spread**2
    assert torch.allclose(mean_of_square, torch.full_like(mean_of_square, exact.mean), rtol=0.03)


def test_adjusted_p_values_are_holms() -> None:
    p = torch.tensor([[0.01, 0.04, 0.03, 0.005], [0.5, 0.9, 0.2, 0.3], [0.3, 0.9, 0.4, 0.5]], dtype=torch.float64)
    expected = [[0.03, 0.06, 0.06, 0.02], [1.0, 1.0, 0.8, 0.9], [1.0, 1.0, 1.0, 1.0]]
    assert torch.allclose(holm_adjusted(p), torch.tensor(expected, dtype=torch.float64))


def test_draws_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, d = tiny_model(), normal(12)
    before = torch.get_rng_state()
    one, again = (writing_heads(model, d, seed=1, **QUIET) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.p, again.p)
    assert not torch.equal(one.expected, writing_heads(model, d, seed=2, **QUIET).expected)
    assert one.n_draws == 1000
    monkeypatch.setattr(directions, "_LEAST_DRAWS", 10)
    assert writing_heads(model, d, **QUIET).n_draws == 600


def test_a_float32_model_gives_the_same_scores() -> None:
    model = tiny_model(dtype=torch.float32)
    model.load_state_dict(tiny_model().state_dict())
    one, other = writing_heads(model, [3], **QUIET), writing_heads(tiny_model(), [3], **QUIET)
    assert torch.allclose(one.scores.double(), other.scores, atol=1e-5)
    assert torch.allclose(one.z.double(), other.z, atol=1e-2)
    d, activations = normal(12), normal(50, 12, seed=1)
    mixed = reading_heads(model, d, chance=activations, **QUIET)
    exact = reading_heads(tiny_model(), d.float(), chance=activations.float(), **QUIET)
    assert (mixed.scores.dtype, exact.scores.dtype) == (torch.float32, torch.float64)
    assert torch.allclose(mixed.scores.double(), exact.scores, atol=1e-5)
    half = tiny_model(dtype=torch.bfloat16)
    half.load_state_dict(tiny_model().state_dict())
    assert torch.allclose(reading_heads(half, d, **QUIET).scores.double(), exact.scores, atol=0.02)


# Results and errors


def found_of_two() -> HeadDirections:
    return writing_heads(tiny_model(), normal(2, 12), **QUIET)


def test_rows_and_tables_say_what_the_numbers_say() -> None:
    found = found_of_two()
    rows = found.rows()
    assert len(rows) == 2 * 2 * 3
    assert rows[7]["z"] == float(found.z[1, 0, 1])
    assert [row["direction"] for row in rows][5:7] == ["direction 0", "direction 1"]
    best = found.top(1)[0]
    assert best.z == float(found.z.max())
    assert found.table(2).splitlines()[0] == "writes; chance: 1000 directions like the unembeddings"
    assert best.label in found.table(1)
    assert len(str(found).splitlines()) == 12
    assert {one.direction for one in found.top(100, 1)} == {"direction 1"}
    named = writing_heads(tiny_model(), normal(2, 12), names=["a", "b"], **QUIET)
    assert named.top(100, "b") == [one._replace(direction="b") for one in found.top(100, 1)]
    assert plotting.patching_grid(found.z[0], axis="head", unit="z").data[0].z.shape == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"direction": torch.ones(5)}, "d_model 12"),
        ({"direction": torch.ones(0, 12)}, "d_model 12"),
        ({"direction": torch.ones(12)}, "LayerNorm"),
        ({"direction": torch.zeros(12)}, "no direction"),
        ({"direction": torch.full((12,), float("nan"))}, "not finite"),
        ({"direction": 20}, "tokens of 0-19"),
        ({"direction": torch.tensor([-1])}, "tokens of 0-19"),
        ({"direction": []}, "one or more tokens"),
        ({"chance": "uniform"}, "chance is one of"),
        ({"chance": torch.ones(1, 12)}, "two or more"),
        ({"chance": torch.ones(9, 12)}, "do not vary"),
        ({"n_draws": 1}, "n_draws"),
        ({"names": "x"}, "names are as many"),
        ({"names": ["a", "b"]}, "names are as many"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_arguments_that_mean_nothing_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        writing_heads(tiny_model(), **{"direction": normal(12), **QUIET, **arguments})


@pytest.mark.usefixtures("no_type_checks")
def test_results_refuse_what_they_do_not_have() -> None:
    found = found_of_two()
    for call in (
        lambda: found.top(0),
        lambda: found.top(1, 2),
        lambda: found.top(1, "x"),
        lambda: found.significant(1),
    ):
        with pytest.raises(ValueError, match=r"at least 1|no direction|between 0 and 1"):
            call()
    with pytest.raises(ValueError, match="'q', 'k' or 'v'"):
        reading_heads(tiny_model(), normal(12), "o")  # type: ignore[arg-type]


def test_models_in_which_no_matrix_says_what_heads_read_or_write_are_refused() -> None:
    on_stream, latent, gated = (
        tiny_model(**one) for one in ({"norm_placement": "residual"}, LATENT, {"attention_gate": True})
    )
    for model in (on_stream, latent, gated):
        with pytest.raises(ValueError, match="no product of"):
            writing_heads(model, normal(12), **QUIET)
    for model in (on_stream, latent):
        with pytest.raises(ValueError, match="no product of"):
            reading_heads(model, normal(12), "v", **QUIET)
    assert reading_heads(gated, normal(12), "v", **QUIET).scores.shape == (1, 2, 3)
    with pytest.raises(ValueError, match="no layers"):
        writing_heads(tiny_model(n_layers=0), normal(12), **QUIET)
    changed = tiny_model()
    changed.blocks[1].attn.forward = lambda *args: 0.0  # type: ignore[assignment]
    with pytest.raises(ValueError, match="how much a head reads"):
        reading_heads(changed, normal(12), **QUIET)
