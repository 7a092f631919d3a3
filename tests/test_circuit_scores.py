"""Scores of circuits: copying and matching, from the eigenvalues of their matrices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import FactoredMatrix, HookedTransformer
from hooked_lm.circuits.folded import folded_ov, folded_qk
from hooked_lm.circuits.full_circuits import full_ov_circuit, full_qk_circuit
from hooked_lm.circuits.heads import (
    attention_scores,
    copying_scores,
    eigenvalue_score,
    matching_scores,
)
from tests.heads_helpers import TOKENS, assert_same
from tests.helpers import LargestTensor, tiny_model

# Scores of circuits


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (torch.eye(2), 1.0),
        (-3 * torch.eye(2), -1.0),
        (torch.tensor([[2.0, 5.0], [0.0, -1.0]]), 1 / 3),
        (torch.tensor([[0.0, -1.0], [1.0, 0.0]]), 0.0),
        (torch.tensor([[0.5, -(0.75**0.5)], [0.75**0.5, 0.5]]), 0.5),  # turns by 60 degrees
        (torch.zeros(2, 2), 0.0),
    ],
    ids=["identity", "negation", "triangular", "quarter turn", "sixth of a turn", "zero"],
)
def test_the_eigenvalue_score_of_a_matrix_with_known_eigenvalues(matrix: Tensor, expected: float) -> None:
    # In a corner of a larger matrix: the rest adds eigenvalues that are zero.
    left, right = torch.zeros(5, 2), torch.zeros(2, 5)
    left[1:3], right[:, 1:3] = torch.eye(2), matrix
    assert float(eigenvalue_score(FactoredMatrix(left, right))) == pytest.approx(expected, abs=1e-6)


def test_a_stack_of_circuits_has_a_score_for_each_and_a_circuit_that_is_not_square_none() -> None:
    stack = FactoredMatrix(torch.eye(3), torch.stack((torch.eye(3), -torch.eye(3))))
    assert eigenvalue_score(stack).tolist() == [1.0, -1.0]
    with pytest.raises(ValueError, match="square"):
        eigenvalue_score(FactoredMatrix(torch.ones(3, 2), torch.ones(2, 4)))


MODELS: dict[str, dict[str, Any]] = {
    "no norms": {"normalization_type": None},
    "layer norm": {},
    "folded": {"normalization_type": "LNPre"},
    "rms": {"normalization_type": "RMS"},
    "grouped queries": {"n_heads": 4, "n_key_value_heads": 2},
    "norms around": {"norm_placement": "before_and_after"},
    "norms after": {"norm_placement": "after"},
    "no final norm": {"final_norm": False},
    "rms at the end": {"final_rms": True},
    "scaled embedding": {"embedding_scale": 3.0, "logit_scale": 0.3},
    "norm after the embedding": {"post_embedding_ln": True},
    "tied": {"tie_word_embeddings": True},
    "parallel": {"parallel_attn_mlp": True},
    "gated": {"gated_mlp": True, "act_fn": "silu"},
    "experts": {"num_experts": 4, "experts_per_token": 2},
    "attention only": {"attn_only": True},
    "wide heads": {"d_head": 16},
    "query-key norm": {"use_qk_norm": True},
    "layer norm of queries and keys": {"use_qk_norm": True, "qk_norm_type": "LN", "qk_norm_per_head_gains": True},
    "query-key norm across heads": {
        "use_qk_norm": True,
        "qk_norm_across_heads": True,
        "n_heads": 4,
        "n_key_value_heads": 2,
    },
}


def centring(norm: Any, size: int) -> Tensor:
    """The matrix of what a norm does before its scale: take out the mean, or nothing."""
    eye = torch.eye(size, dtype=torch.float64)
    return eye - 1 / size if getattr(norm, "centred", False) else eye


def gain(norm: Any, size: int) -> Tensor:
    w = getattr(norm, "w", None)
    return torch.eye(size, dtype=torch.float64) if w is None else w.diag()


def dense_head(model: HookedTransformer, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """OV and QK of a head [d_model d_model], the matrices of its norms multiplied in one by one."""
    cfg, block = model.cfg, model.blocks[layer]
    d, kv = cfg.d_model, head // (cfg.n_heads // cfg.n_kv_heads)
    read = centring(block.ln1, d) @ gain(block.ln1, d)
    write = centring(block.ln1_post, d) @ gain(block.ln1_post, d)

    def own(norm: Any, index: int) -> Tensor:
        w = getattr(norm, "w", None)
        w = w if w is None or w.ndim == 1 else w[index]
        scaled = torch.eye(cfg.d_head, dtype=torch.float64) if w is None else w.diag()
        return centring(norm, cfg.d_head) @ scaled

    attn = block.attn
    OV = read @ attn.W_V[kv] @ attn.W_O[head] @ write
    queries = read @ attn.W_Q[head] @ own(attn.q_norm, head)
    keys = read @ attn.W_K[kv] @ own(attn.k_norm, kv)
    return OV, queries @ keys.T


def share_of_positive(matrix: Tensor) -> float:
    """Sum of all eigenvalues, the many zeros too, over the sum of their absolute values."""
    eigenvalues = torch.linalg.eigvals(matrix.detach())
    return float(eigenvalues.sum().real / eigenvalues.abs().sum())


@torch.no_grad()
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_copying_and_matching_are_the_eigenvalues_of_the_circuits_multiplied_out(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    d = model.cfg.d_model
    embedded = model.embed(torch.arange(20)[None])[0]
    final = centring(model.ln_final, d) @ gain(model.ln_final, d)
    copying, matching = (score(model, verbose=False).scores for score in (copying_scores, matching_scores))
    for layer in range(2):
        for head in range(model.cfg.n_heads):
            OV, QK = dense_head(model, layer, head)
            whole = embedded @ OV @ final @ model.W_U
            assert float(copying[layer, head]) == pytest.approx(share_of_positive(whole), abs=1e-7)
            assert float(matching[layer, head]) == pytest.approx(
                share_of_positive(embedded @ QK @ embedded.T), abs=1e-7
            )
            assert_same(folded_ov(model, layer)[head].AB, OV)
            assert_same(folded_qk(model, layer)[head].AB, QK)


def test_a_head_that_hands_on_what_it_reads_copies_and_one_that_turns_it_round_does_the_opposite() -> None:
    model = tiny_model(n_heads=3, attn_only=True, normalization_type=None, d_vocab=12)
    with torch.no_grad():
        model.embed.W_E.copy_(torch.eye(12))
        model.unembed.W_U.copy_(torch.eye(12))
        values = model.blocks[1].attn.W_V
        for head, sign in enumerate((1.0, -1.0)):
            model.blocks[1].attn.W_O[head].copy_(sign * values[head].T)
            model.blocks[1].attn.W_K[head].copy_(sign * model.blocks[1].attn.W_Q[head])
    for found in (copying_scores(model, verbose=False), matching_scores(model, verbose=False)):
        assert found.scores[1, :2].tolist() == pytest.approx([1.0, -1.0])
        assert abs(float(found.scores[1, 2])) < 0.9


@pytest.mark.parametrize("changes", [{}, {"n_heads": 4, "n_key_value_heads": 2}], ids=str)
def test_folding_the_norms_changes_no_score(changes: dict[str, Any]) -> None:
    raw = tiny_model(**changes)
    folded = copy.deepcopy(raw)
    folded.process_weights_(center_unembed=False)
    assert folded.ln_final.w is None
    for score in (copying_scores, matching_scores):
        assert_same(score(raw, verbose=False).scores, score(folded, verbose=False).scores)
    assert_same(folded_ov(folded, 1).AB, folded.OV[1].AB)
    assert_same(folded_qk(folded, 1).AB, folded.QK[1].AB)


def test_the_effective_embedding_is_for_the_heads_that_read_after_the_first_mlp() -> None:
    model = tiny_model(n_layers=3)
    for score, circuit in ((copying_scores, full_ov_circuit), (matching_scores, full_qk_circuit)):
        plain = score(model, verbose=False).scores
        effective = score(model, effective_embedding=True, verbose=False).scores
        assert_same(effective[0], plain[0])
        assert not torch.allclose(effective[1:], plain[1:])
        for layer, head in ((1, 0), (2, 2)):
            expected = eigenvalue_score(circuit(model, layer, head, effective_embedding=True))
            assert_same(effective[layer, head], expected)


@pytest.mark.parametrize("score", [copying_scores, matching_scores])
def test_no_matrix_over_pairs_of_tokens_is_formed(score: Any) -> None:
    model = tiny_model(d_vocab=500)
    with LargestTensor() as seen:
        score(model, verbose=False)
    assert seen.numbers <= 500 * model.cfg.d_model


def test_scores_of_half_precision_weights_are_computed_in_single() -> None:
    precise = tiny_model(dtype=torch.float32)
    half = copy.deepcopy(precise).to(torch.bfloat16)
    rounded = copy.deepcopy(half).to(torch.float32)
    for score in (copying_scores, matching_scores):
        torch.testing.assert_close(score(half, verbose=False).scores, score(rounded, verbose=False).scores)
    found = attention_scores(half, TOKENS, "induction", verbose=False)
    assert found.scores.dtype == torch.float32
    expected = attention_scores(precise, TOKENS, "induction", verbose=False).scores
    torch.testing.assert_close(found.scores, expected, rtol=0, atol=0.02)


def test_models_in_which_a_head_is_no_product_of_its_matrices_raise() -> None:
    residual = tiny_model(norm_placement="residual")
    rotary = {"use_qk_norm": True, "positional_embedding_type": "rotary", "qk_norm_after_rotary": True}
    after = tiny_model(**rotary)
    for score in (copying_scores, matching_scores):
        with pytest.raises(ValueError, match="normalises the residual stream itself"):
            score(residual, verbose=False)
    with pytest.raises(ValueError, match="no product of its own matrices"):
        matching_scores(after, verbose=False)
    assert copying_scores(after, verbose=False).scores.shape == (2, 3)
    with pytest.raises(ValueError, match="20 in and 15 out"):
        copying_scores(tiny_model(d_vocab_out=15), verbose=False)
    with pytest.raises(ValueError, match="no layer 2: this model has layers 0-1"):
        folded_ov(tiny_model(), 2)
