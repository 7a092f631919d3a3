"""Full circuits are what a head does to lone tokens; questions to them are answered without multiplying them out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hooked_lm import ActivationCache, FactoredMatrix, HookedTransformer
from hooked_lm.circuits.full_circuits import (
    full_ov_circuit,
    full_qk_circuit,
    token_embeddings,
    top1_accuracy,
    top_entries,
)
from tests.helpers import LargestTensor, tiny_config, tiny_model

VOCAB = 20


def bare_model(silent_attention: bool = False, **changes: Any) -> HookedTransformer:
    """A random model without biases or positions; if asked, the first layer's attention writes nothing."""
    model = tiny_model(**{"positional_embedding_type": "none", **changes})
    with torch.no_grad():
        for block in model.blocks:
            for name in ("b_Q", "b_K", "b_V", "b_O"):
                getattr(block.attn, name).zero_()
            for norm in ("ln1", "ln1_post"):
                if getattr(getattr(block, norm), "b", None) is not None:
                    getattr(block, norm).b.zero_()
        if silent_attention:
            model.blocks[0].attn.W_O.zero_()
    return model


def one_token_prompts(model: HookedTransformer) -> ActivationCache:
    """A run in which each token stands alone, [batch=token pos=1]."""
    return model.run_with_cache(torch.arange(VOCAB)[:, None])[1]


def random_circuit(rows: int = 7, columns: int = 7, rank: int = 3, seed: int = 0) -> FactoredMatrix:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, rank, generator=generator) for size in (rows, columns))
    n_same = min(rows, columns) // 2
    return FactoredMatrix(left, torch.cat((3 * left[:n_same], right[n_same:])).T)  # some rows find themselves


# What the circuits are

PLAIN: dict[str, dict[str, Any]] = {
    "layer norm": {},
    "no norm": {"normalization_type": None},
    "RMS norm, gated": {"normalization_type": "RMS", "gated_mlp": True},
    "grouped queries": {"n_heads": 6, "d_head": 4, "n_key_value_heads": 2},
    "scaled and normalised embeddings": {"embedding_scale": 3.0, "post_embedding_ln": True},
    "logit scale": {"logit_scale": 0.3},
    "tied": {"tie_word_embeddings": True},
    "norms before and after": {"norm_placement": "before_and_after"},
    "norms after": {"norm_placement": "after", "normalization_type": "RMS"},
    "mixture of experts": {"num_experts": 4, "experts_per_token": 2},
    "parallel": {"parallel_attn_mlp": True},
}
cases = pytest.mark.parametrize("changes", PLAIN.values(), ids=PLAIN.keys())


def logits_of_head(model: HookedTransformer, cache: ActivationCache, layer: int, head: int) -> torch.Tensor:
    """What a head adds to every logit by the direct path, written out, [batch vocab]; gains and centring included."""
    written = cache["z", layer][:, 0, head] @ model.blocks[layer].attn.W_O[head]
    for norm, scale in ((model.blocks[layer].ln1_post, ("scale", layer, "ln1_post")), (model.ln_final, "scale")):
        if scale in cache:
            written = written - written.mean(-1, keepdim=True) if norm.centred else written
            written = written / cache[scale][:, 0] * norm.w
    return written @ model.W_U * model.cfg.logit_scale


def scales_on_the_way(cache: ActivationCache, layer: int) -> torch.Tensor | float:
    post = cache["scale", layer, "ln1_post"][:, 0] if ("scale", layer, "ln1_post") in cache else 1.0
    return post * (cache["scale"][:, 0] if "scale" in cache else 1.0)


@cases
def test_an_ov_circuit_is_what_a_head_adds_to_the_logits_when_it_sees_one_token(changes: dict[str, Any]) -> None:
    model = bare_model(**changes)
    cache = one_token_prompts(model)
    for head in (0, model.cfg.n_heads - 1):
        circuit = full_ov_circuit(model, 0, head, normalize=True)
        assert circuit.shape == (VOCAB, VOCAB)
        assert circuit.mdim == model.cfg.d_head
        added = circuit.AB * model.cfg.logit_scale / scales_on_the_way(cache, 0)
        torch.testing.assert_close(added, logits_of_head(model, cache, 0, head))


@cases
def test_with_effective_embeddings_it_reads_what_the_first_mlp_has_written(changes: dict[str, Any]) -> None:
    model = bare_model(silent_attention=True, **changes)
    cache = one_token_prompts(model)
    circuit = full_ov_circuit(model, 1, 2, effective_embedding=True, normalize=True)
    added = circuit.AB * model.cfg.logit_scale / scales_on_the_way(cache, 1)
    torch.testing.assert_close(added, logits_of_head(model, cache, 1, 2))
    assert not torch.allclose(circuit.AB, full_ov_circuit(model, 1, 2, normalize=True).AB)


QK = {
    **PLAIN,
    "query and key norms": {"use_qk_norm": True},
    "a gain for each head": {"use_qk_norm": True, "qk_norm_per_head_gains": True},
    "layer norm of queries and keys": {"use_qk_norm": True, "qk_norm_type": "LN"},
    "query and key norms over all heads": {
        "use_qk_norm": True,
        "qk_norm_across_heads": True,
        **PLAIN["grouped queries"],
    },
}


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("changes", QK.values(), ids=QK.keys())
def test_a_qk_circuit_holds_the_scores_between_tokens(changes: dict[str, Any], effective: bool) -> None:
    model, layer = bare_model(silent_attention=effective, **changes), int(effective)
    for norm in (model.blocks[layer].attn.q_norm, model.blocks[layer].attn.k_norm):
        if getattr(norm, "b", None) is not None:
            norm.b.data.zero_()
    pairs = torch.cartesian_prod(torch.arange(VOCAB), torch.arange(VOCAB))  # (destination, source)
    cache = model.run_with_cache(pairs.flip(1))[1]
    head = model.cfg.n_heads - 1
    scores = cache["attn_scores", layer][:, head, 1, 0]
    for norm, pos in (("attn.q_norm", 1), ("attn.k_norm", 0)):
        if ("scale", layer, norm) in cache:
            scores = scores * cache["scale", layer, norm][:, pos].flatten(1)[:, -1]  # the last head's
    circuit = full_qk_circuit(model, layer, head, effective_embedding=effective, normalize=True)
    scaled = circuit.AB * model.cfg.score_scale(layer)
    torch.testing.assert_close(scaled, scores.reshape(VOCAB, VOCAB))


def test_with_rotary_positions_a_qk_circuit_is_about_one_position() -> None:
    model = bare_model(positional_embedding_type="rotary")
    circuit = full_qk_circuit(model, 0, 1, normalize=True).AB * model.cfg.score_scale(0)
    tokens = torch.arange(10)[None]  # each at a position of its own, looking at itself
    own = model.run_with_cache(tokens)[1]["attn_scores", 0][0, 1].diagonal()
    torch.testing.assert_close(circuit.diagonal()[:10], own)


@pytest.mark.parametrize("normalization_type", ["LN", "RMS"])
def test_folding_the_norms_changes_no_circuit_and_leaves_the_plain_product(normalization_type: str) -> None:
    model = tiny_model(normalization_type=normalization_type, n_heads=6, d_head=4, n_key_value_heads=2)
    qk, ov = full_qk_circuit(model, 1, 4).AB, full_ov_circuit(model, 1, 4).AB
    model.fold_layer_norm()
    if normalization_type == "LN":
        model.center_writing_weights()
    torch.testing.assert_close(full_qk_circuit(model, 1, 4).AB, qk)
    torch.testing.assert_close(full_ov_circuit(model, 1, 4).AB, ov)
    torch.testing.assert_close((model.W_E @ model.QK[1, 4] @ model.W_E.T).AB, qk)
    torch.testing.assert_close((model.W_E @ model.OV[1, 4] @ model.W_U).AB, ov)


@pytest.mark.parametrize("circuit", [full_qk_circuit, full_ov_circuit])
def test_biases_are_in_no_circuit(circuit: Callable[..., FactoredMatrix]) -> None:
    model, bare = tiny_model(), bare_model(positional_embedding_type="standard")
    assert bool(model.blocks[1].ln1.b.any())
    assert not bool(bare.blocks[1].ln1.b.any())
    torch.testing.assert_close(circuit(model, 1, 2, normalize=True).AB, circuit(bare, 1, 2, normalize=True).AB)


def test_the_circuit_of_several_heads_is_the_sum_of_theirs() -> None:
    model = tiny_model()
    both = full_ov_circuit(model, 1, [2, 0])
    assert both.mdim == 2 * model.cfg.d_head
    torch.testing.assert_close(both.AB, full_ov_circuit(model, 1, 0).AB + full_ov_circuit(model, 1, 2).AB)


def test_an_output_vocabulary_of_its_own_gives_the_columns() -> None:
    circuit = full_ov_circuit(tiny_model(d_vocab_out=9), 0, 0)
    assert circuit.shape == (VOCAB, 9)
    assert 0 <= top1_accuracy(circuit, torch.full((VOCAB,), 3)) <= 1


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_effective_embeddings_are_the_same_in_blocks_of_any_size(block: int) -> None:
    model = bare_model(silent_attention=True)
    expected = one_token_prompts(model)["resid_post", 0][:, 0]
    torch.testing.assert_close(token_embeddings(model, effective=True, block=block), expected)
    assert torch.equal(token_embeddings(model), model.W_E)


# What is refused


@pytest.mark.parametrize(
    ("changes", "call", "said"),
    [
        ({}, lambda model: full_ov_circuit(model, 0, 3), "no head L0H3: this model has layers 0-1 and heads 0-2"),
        ({}, lambda model: full_ov_circuit(model, 0, [0, 3]), "no head L0H3"),
        ({}, lambda model: full_ov_circuit(model, 0, [1, 1]), "one or more different ones"),
        ({}, lambda model: full_ov_circuit(model, 0, []), "one or more different ones"),
        ({}, lambda model: full_qk_circuit(model, -1, 0), "no head L-1H0"),
        ({}, lambda model: full_qk_circuit(model, 0, 0, effective_embedding=True), "read before the first MLP"),
        ({}, lambda model: token_embeddings(model, effective=True, block=0), "at least one row"),
        ({"attn_only": True}, lambda model: full_ov_circuit(model, 1, 0, effective_embedding=True), "has no MLP"),
        ({"norm_placement": "residual"}, lambda model: full_ov_circuit(model, 0, 0), "normalises the residual stream"),
        ({"norm_placement": "residual"}, lambda model: full_qk_circuit(model, 0, 0), "normalises the residual stream"),
        (
            {"use_qk_norm": True, "qk_norm_after_rotary": True, "positional_embedding_type": "rotary"},
            lambda model: full_qk_circuit(model, 0, 0),
            "no product of its own matrices",
        ),
        (
            {"use_qk_norm": True, "qk_norm_across_heads": True, "qk_norm_type": "LN"},
            lambda model: full_qk_circuit(model, 0, 0),
            "no product of its own matrices",
        ),
    ],
)
def test_a_circuit_that_does_not_exist_raises(
    changes: dict[str, Any], call: Callable[[HookedTransformer], object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        call(tiny_model(**changes))


# Questions to a circuit


@pytest.mark.parametrize("block", [None, 1, 3, 7, 1000])
def test_top1_accuracy_is_the_same_in_blocks_of_any_size(block: int | None) -> None:
    circuit = random_circuit()
    expected = (circuit.AB.argmax(-1) == torch.arange(7)).double().mean()
    assert 0 < float(expected) < 1
    assert top1_accuracy(circuit, block=block) == pytest.approx(float(expected))


def test_top1_accuracy_goes_along_rows_not_columns() -> None:
    # Rows 0 and 1 are largest on the diagonal; only column 1 is.
    circuit = FactoredMatrix(torch.eye(3), torch.tensor([[3.0, 1.0, 2.0], [4.0, 5.0, 0.0], [6.0, 0.0, 1.0]]))
    assert top1_accuracy(circuit) == pytest.approx(2 / 3)
    assert top1_accuracy(circuit.T) == pytest.approx(1 / 3)


@pytest.mark.parametrize("block", [None, 2])
def test_targets_say_which_column_each_row_should_be_largest_in(block: int | None) -> None:
    circuit = random_circuit(rows=7, columns=5)
    best = circuit.AB.argmax(-1)
    assert top1_accuracy(circuit, best, block=block) == 1.0
    assert top1_accuracy(circuit, torch.cat((best[:3], (best[3:] + 1) % 5)), block=block) == pytest.approx(3 / 7)


@pytest.mark.parametrize("block", [None, 1, 3])
@pytest.mark.parametrize("largest", [True, False])
def test_top_entries_are_those_of_the_product(block: int | None, largest: bool) -> None:
    circuit = random_circuit(rows=7, columns=5)
    rows = [6, 0, 2, 2]
    top = top_entries(circuit, 3, rows, largest=largest, block=block)
    expected = circuit.AB[rows].sort(-1, descending=largest)
    assert top.rows.tolist() == rows
    assert torch.equal(top.columns, expected.indices[:, :3])
    torch.testing.assert_close(top.values, expected.values[:, :3])
    assert torch.equal(top_entries(circuit, 3, largest=largest, block=block).rows, torch.arange(7))


@pytest.mark.parametrize("question", [top1_accuracy, top_entries])
def test_the_circuit_is_never_multiplied_out(question: Callable[..., object]) -> None:
    circuit = random_circuit(rows=500, columns=500, rank=2)
    with LargestTensor() as largest:
        question(circuit, block=10)
    assert 10 * 500 <= largest.numbers < 20 * 500  # 250,000 if it were
    with LargestTensor() as largest:
        question(circuit)
    assert largest.numbers == 500 * 500  # a small one is a single block


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: top1_accuracy(random_circuit(7, 5)), "no diagonal for every row: give targets"),
        (lambda: top1_accuracy(random_circuit(), torch.zeros(6, dtype=torch.long)), "one column for each of 7 rows"),
        (lambda: top1_accuracy(random_circuit(7, 5), torch.full((7,), 5)), "columns 0-4, got 5 to 5"),
        (lambda: top1_accuracy(FactoredMatrix(torch.ones(2, 3, 2), torch.ones(2, 2, 3))), "one matrix"),
        (lambda: top_entries(FactoredMatrix(torch.ones(2, 3, 2), torch.ones(2, 2, 3))), "one matrix"),
        (lambda: top1_accuracy(random_circuit(), block=0), "at least one row"),
        (lambda: top_entries(random_circuit(), 8), "k 8 is not in 1-7"),
        (lambda: top_entries(random_circuit(), 0), "k 0 is not in 1-7"),
        (lambda: top_entries(random_circuit(), 1, [0, 7]), "rows are 0-6, got 0 to 7"),
        (lambda: top_entries(random_circuit(), 1, []), "one or more integers"),
        (lambda: top1_accuracy(random_circuit() * float("nan")), "NaN or infinite"),
        (lambda: top_entries(random_circuit() * float("inf"), 1), "NaN or infinite"),
    ],
)
def test_a_question_that_makes_no_sense_raises(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def test_the_progress_bar_shows_unless_it_is_turned_off(capsys: pytest.CaptureFixture[str]) -> None:
    top1_accuracy(random_circuit(), verbose=False)
    top_entries(random_circuit(), 1, verbose=False)
    assert capsys.readouterr().err == ""
    top1_accuracy(random_circuit())
    assert "top-1 accuracy" in capsys.readouterr().err


# Circuits with known answers


def test_a_head_wired_to_copy_copies_and_one_wired_to_shift_shifts() -> None:
    cfg = tiny_config(attn_only=True, n_layers=1, d_model=20, n_heads=2, d_head=20, normalization_type=None)
    model = HookedTransformer(cfg)
    identity = torch.eye(20, dtype=torch.float64)
    with torch.no_grad():
        model.embed.W_E.copy_(identity)
        model.unembed.W_U.copy_(identity)
        model.blocks[0].attn.W_V.copy_(identity.expand(2, -1, -1))
        model.blocks[0].attn.W_O.copy_(torch.stack((identity, identity.roll(1, dims=1))))
    following = (torch.arange(20) + 1) % 20
    assert top1_accuracy(full_ov_circuit(model, 0, 0)) == 1.0
    assert top1_accuracy(full_ov_circuit(model, 0, 1)) == 0.0
    assert top1_accuracy(full_ov_circuit(model, 0, 1), following) == 1.0
    assert torch.equal(top_entries(full_ov_circuit(model, 0, 1), 1).columns[:, 0], following)


def test_in_the_demo_model_the_induction_head_is_the_one_that_copies() -> None:
    model = HookedTransformer.from_pretrained("demo-induction-2l")
    accuracy = [top1_accuracy(full_ov_circuit(model, 1, head), verbose=False) for head in range(model.cfg.n_heads)]
    assert accuracy[1] > 0.95
    assert max(accuracy[:1] + accuracy[2:]) < 0.2
