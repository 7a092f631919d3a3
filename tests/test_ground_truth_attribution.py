"""Attribution, heads and ablation on a circuit that is known: each says what was wired, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, metrics, patching
from hooked_lm.circuits.composition import head_composition
from hooked_lm.circuits.direct_logit import logit_attribution
from hooked_lm.circuits.heads import copying_scores, matching_scores, repeated_token_scores
from hooked_lm.circuits.induction import k_composition_qk_circuit, repeated_random_tokens
from hooked_lm.circuits.logit_lens import logit_lens
from hooked_lm.patching.ablation import ablate
from hooked_lm.patching.attribution import Attribution, attribution_patch
from hooked_lm.patching.path import (
    get_act_patch_direct_path_all_sources,
    path_patch_heads,
)
from tests.ground_truth_helpers import (
    ANSWER,
    BOS,
    CLEAN,
    CORRUPTED_SCORE,
    D_MODEL,
    DIFFERENCE,
    EARLIER,
    EXACT,
    GAIN,
    INDUCTION_HEAD,
    LAST,
    NEW,
    QUIET,
    RECOVERS,
    SHARP,
    SOFT,
    SUCCESSOR,
    VOCAB,
    Head,
    corrupted_at,
    everywhere,
    grid_of,
    idle,
    wired,
)

# Direct logit attribution and the logit lens


@everywhere
def test_the_whole_logit_difference_is_the_induction_heads_and_comes_from_the_successor(
    previous: Head, induction: Head
) -> None:
    _, run = wired(previous, induction).run_with_cache(CLEAN)
    by_head = logit_attribution(run, ANSWER, NEW, split="head")
    by_source = logit_attribution(run, ANSWER, NEW, split="source")
    by_component = logit_attribution(run, ANSWER, NEW, split="component")
    for prompt in range(3):
        torch.testing.assert_close(by_head.grid[..., prompt], GAIN * grid_of((2, 3), induction), **EXACT)
        from_where = GAIN * grid_of((2, 3, 6), (*induction, SUCCESSOR))
        torch.testing.assert_close(by_source.grid[..., prompt], from_where, **EXACT)
        parts = dict(zip(by_component.labels, by_component.values[:, prompt].tolist(), strict=True))
        assert parts.pop("1_attn_out") == pytest.approx(GAIN, abs=1e-12)
        assert {"embed", "pos_embed", "0_attn_out"} <= set(parts)
        assert set(parts.values()) == {0.0}
    for found in (by_head, by_source):
        assert float(found.rest.abs().max()) == 0.0
        assert found.logit.tolist() == pytest.approx([GAIN] * 3, abs=1e-12)


@everywhere
def test_without_an_earlier_copy_the_induction_head_writes_BOS_from_where_it_stands(
    previous: Head, induction: Head
) -> None:
    _, run = wired(previous, induction).run_with_cache(corrupted_at(EARLIER))
    found = logit_attribution(run, BOS, split="source")
    for prompt in range(3):
        torch.testing.assert_close(found.grid[..., prompt], GAIN * grid_of((2, 3, 6), (*induction, 0)), **EXACT)


@everywhere
def test_soft_attention_is_attributed_in_proportion(previous: Head, induction: Head) -> None:
    """At the last token of `BOS a b c d a` the scores are rest 0 match 0 0 0: attention is 3 1 9 1 1 1, over 16."""
    _, run = wired(previous, induction, SOFT).run_with_cache(CLEAN)
    shares = torch.tensor([3, 1, 9, 1, 1, 1], dtype=torch.float64) / 16
    torch.testing.assert_close(run["pattern", 1][:, induction[1], LAST], shares.expand(3, 6), **EXACT)
    for wrong, where in ((BOS, [0]), (CLEAN[:, LAST], [EARLIER, LAST]), (CLEAN[:, 3], [3]), (NEW, [])):
        found = logit_attribution(run, ANSWER, wrong, split="source")
        expected = torch.zeros(2, 3, 6, dtype=torch.float64)
        expected[induction][SUCCESSOR] = GAIN * 9 / 16
        expected[induction][where] = -GAIN * shares[where]
        for prompt in range(3):
            torch.testing.assert_close(found.grid[..., prompt], expected, **EXACT)


@everywhere
def test_the_lens_sees_nothing_before_the_induction_head_and_all_of_it_after(previous: Head, induction: Head) -> None:
    lens = logit_lens(wired(previous, induction), CLEAN, targets=ANSWER[:, None].expand(3, 6), top_k=1, **QUIET)
    assert lens.labels == ("0_pre", "0_post", "1_pre", "1_post")
    share = math.exp(GAIN) / (math.exp(GAIN) + 7)  # of the token whose logit is GAIN
    other = (1 - share) / 7
    entropy = -share * math.log(share) - 7 * other * math.log(other)

    def assert_everywhere(found: Tensor, value: float) -> None:
        torch.testing.assert_close(found, torch.full_like(found, value), **EXACT)

    assert_everywhere(lens.entropy[:3], math.log(8))
    assert_everywhere(lens.target_probs[:3], 1 / 8)
    assert_everywhere(lens.kl[:3], math.log(8) - entropy)  # of even odds from these
    assert_everywhere(lens.entropy[3], entropy)
    assert_everywhere(lens.kl[3], 0.0)
    assert_everywhere(lens.target_probs[3, :, LAST], share)
    assert_everywhere(lens.target_probs[3, :, :LAST], other)
    assert lens.top_tokens[3, :, LAST, 0].tolist() == ANSWER.tolist()
    assert lens.top_tokens[3, :, :LAST].unique().tolist() == [BOS]


# Heads and their circuits


@everywhere
def test_detection_gives_the_heads_of_the_circuit_the_full_score(previous: Head, induction: Head) -> None:
    """On BOS, five tokens and the same five again, positions 0-10."""
    model, length = wired(previous, induction), 5
    found = {
        kind: repeated_token_scores(model, kind, length=length, **QUIET).scores
        for kind in ("previous_token", "induction", "duplicate_token")
    }
    # The idle heads give each of the q + 1 keys the same, and each kind one key to the queries it is about.
    every_query, repeat = range(1, 11), range(6, 11)
    for layer, head in (idle(previous), idle(induction)):
        for kind, queries in (("previous_token", every_query), ("induction", repeat), ("duplicate_token", repeat)):
            chance = math.fsum(1 / (query + 1) for query in queries) / len(queries)
            assert float(found[kind][layer, head]) == pytest.approx(chance, abs=1e-12)
    expected = {
        "previous_token": {previous: 1.0, induction: 1 / 10},  # resting on BOS, from position 1 only, is looking back
        "induction": {previous: 0.0, induction: 1.0},
        "duplicate_token": {previous: 0.0, induction: 0.0},
    }
    for kind, scores in expected.items():
        for place, score in scores.items():
            assert float(found[kind][place]) == pytest.approx(score, abs=1e-12), (kind, place)


@everywhere
def test_only_the_induction_head_copies_and_neither_head_matches_tokens_with_themselves(
    previous: Head, induction: Head
) -> None:
    """The OV circuit is GAIN times the identity for it, and nothing for the others, whose output is not unembedded.
    Positions and previous tokens, which the circuit's queries or keys are made of, are not in the embedding."""
    model = wired(previous, induction)
    torch.testing.assert_close(copying_scores(model, **QUIET).scores, grid_of((2, 3), induction), **EXACT)
    matching = matching_scores(model, **QUIET).scores
    for place in (previous, induction, idle(previous), idle(induction)):
        assert float(matching[place]) == 0.0
    circuit = k_composition_qk_circuit(model, previous, induction).AB.detach()
    torch.testing.assert_close(circuit, SHARP[0] * torch.eye(VOCAB, dtype=torch.float64), **EXACT)


@everywhere
def test_the_two_heads_compose_through_the_keys_and_no_others_through_anything(previous: Head, induction: Head) -> None:
    """Writer: 8 singular values 1, from TOKEN to PREVIOUS. Reader: 8 singular values `match`, from there to TOKEN.

    So the score is ||match P|| / (||P|| ||match P||) for a P with ||P||^2 = 8.
    """
    model = wired(previous, induction)
    for mode in "QKV":
        found = head_composition(model, mode, **QUIET)
        pairs = [(*previous, *induction)] if mode == "K" else []
        torch.testing.assert_close(found.scores, grid_of((2, 3, 2, 3), *pairs) * 8**-0.5, **EXACT)
    found = head_composition(model, "K", **QUIET)
    best = found.top(1)[0]
    assert (best.writer, best.reader) == (previous, induction)
    # (1/8 - 1/n) over sqrt(2 (1/8 - 1/n)^2 / ((n-1)(n+2))), with n the width of the stream
    assert best.z == pytest.approx(math.sqrt((D_MODEL - 1) * (D_MODEL + 2) / 2), rel=1e-12)
    for writer, reader in ((idle(previous), induction), (previous, idle(induction))):
        assert float(found.z[(*writer, *reader)]) == 0.0


# Attribution patching


def attributed(model: HookedTransformer, pos: int, *grids: str, **how: Any) -> Attribution:
    return attribution_patch(model, corrupted_at(pos), CLEAN, DIFFERENCE, grids, **QUIET, **how)


@everywhere
@pytest.mark.parametrize("pos", RECOVERS)
def test_what_acts_without_moving_attention_is_estimated_exactly_however_sharp_that_is(
    previous: Head, induction: Head, pos: int
) -> None:
    """From the induction head's values, output and pattern on, the logits are linear in each."""
    kinds = ("v", "out", "pattern")
    found = attributed(wired(previous, induction), pos, *(f"attn_head_{kind}_by_pos" for kind in kinds))
    assert found.corrupted == pytest.approx(CORRUPTED_SCORE[pos], abs=1e-12)
    for kind in kinds:
        cells = [(1, at, induction[1]) for at, which in RECOVERS[pos][kind] if which == INDUCTION_HEAD]
        expected = (GAIN - CORRUPTED_SCORE[pos]) * grid_of((2, 6, 3), *cells)
        torch.testing.assert_close(found[f"attn_head_{kind}_by_pos"], expected, **EXACT)


@everywhere
def test_what_moves_sharp_attention_has_no_estimate_and_the_audit_says_so(previous: Head, induction: Head) -> None:
    """The softmax has no slope there. So of the two heads that matter all the same, one is estimated to do nothing."""
    grid = "attn_head_out_all_pos"
    audit = attributed(wired(previous, induction), EARLIER, grid, audit=3).audits[grid]
    pairs = {one.cell: (one.estimate, one.exact) for one in audit.cells}
    assert len(pairs) == 6
    for cell, pair in pairs.items():
        estimate, exact = GAIN * (cell == induction), GAIN * (cell in (previous, induction))
        assert pair == pytest.approx((estimate, exact), abs=1e-12), cell
    # Ranks of the estimates: 6 and five times 3; of the effects: twice 5.5 and four times 2.5. Less their mean, 3.5:
    # product 2.5 * 2 - 0.5 * 2 + 4 * 0.5 * 1 = 6, squares 2.5^2 + 5 * 0.5^2 = 7.5 and 2 * 2^2 + 4 = 12.
    assert audit.rank_correlation == pytest.approx(6 / math.sqrt(7.5 * 12), abs=1e-12)
    assert audit.sign_flips == ()
    stream = attributed(wired(previous, induction), EARLIER, "resid_pre")["resid_pre"]
    torch.testing.assert_close(stream, torch.zeros(2, 6, dtype=torch.float64), **EXACT)


@everywhere
@pytest.mark.parametrize(("pos", "kind"), [(EARLIER, "k"), (LAST, "q")])
def test_the_fix_for_queries_and_keys_sees_through_sharp_attention(
    previous: Head, induction: Head, pos: int, kind: str
) -> None:
    model, grids = wired(previous, induction), [f"attn_head_{kind}_by_pos", f"attn_head_{kind}_all_pos"]
    plain, fixed = (attributed(model, pos, *grids, qk_fix=fix) for fix in (False, True))
    at = SUCCESSOR if kind == "k" else LAST
    for grid, cell in zip(grids, [(1, at, induction[1]), induction], strict=True):
        nothing = torch.zeros_like(plain[grid])
        torch.testing.assert_close(plain[grid], nothing, **EXACT)
        torch.testing.assert_close(fixed[grid], GAIN * grid_of(nothing.shape, cell), **EXACT)


@everywhere
def test_what_moves_soft_attention_is_estimated_by_its_slope(previous: Head, induction: Head) -> None:
    """BOS n b c d a against BOS a b c d a: the score at `b` rises from 0 to log 9, and n is not attended to any more.

    Attention from the last token is 3 1 1 1 1 1 over 8, and 3 1 9 1 1 1 over 16 with that score. A score's slope is its
    share of attention, 1/8, times how much more than the mean its key is worth: `b` is worth GAIN, n as much less, and
    the others nothing, so the mean is 0 and the slope GAIN/8.
    """
    model = wired(previous, induction, SOFT)
    by_slope = GAIN / 8 * math.log(9)
    heads, stream, keys = "attn_head_out_all_pos", "resid_pre", "attn_head_k_by_pos"
    found = attributed(model, EARLIER, heads, stream, keys, audit=20)
    assert found.corrupted == pytest.approx(0.0, abs=1e-12)
    known: dict[str, dict[tuple[int, ...], tuple[float, float]]] = {
        # With the score alone, `b` has 9/16 of the attention and n still 1/16. The induction head itself brings 9/16.
        heads: {previous: (by_slope, GAIN / 2), induction: (GAIN * 9 / 16, GAIN * 9 / 16)},
        keys: {(1, SUCCESSOR, induction[1]): (by_slope, GAIN / 2)},
        # The earlier token reaches the score by the previous head, and by the value that it has itself: n goes.
        stream: {
            (0, EARLIER): (by_slope + GAIN / 8, GAIN * 9 / 16),
            (1, EARLIER): (GAIN / 8, GAIN / 8),
            (1, SUCCESSOR): (by_slope, GAIN / 2),
        },
    }
    for grid, pairs in known.items():
        audit = found.audits[grid]
        assert len(audit.cells) == found[grid].numel()
        for one in audit.cells:
            assert (one.estimate, one.exact) == pytest.approx(pairs.get(one.cell, (0.0, 0.0)), abs=1e-12), one
        assert audit.sign_flips == ()
        assert audit.rank_correlation == pytest.approx(1.0, abs=1e-12)
    fixed = attributed(model, EARLIER, keys, qk_fix=True)[keys]
    torch.testing.assert_close(fixed, GAIN / 2 * grid_of((2, 6, 3), (1, SUCCESSOR, induction[1])), **EXACT)


# Ablation


@everywhere
def test_without_either_head_of_the_circuit_the_behaviour_is_gone_and_without_others_it_is_not(
    previous: Head, induction: Head
) -> None:
    model = wired(previous, induction)
    lost = ablate(model, CLEAN, DIFFERENCE, "heads", "zero", **QUIET)
    torch.testing.assert_close(lost.intact, torch.full((3,), GAIN, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(lost.effect, -GAIN * grid_of((2, 3), previous, induction), **EXACT)
    by_pos = ablate(model, CLEAN, DIFFERENCE, "heads", "zero", by_pos=True, **QUIET)
    needed = grid_of((2, 6, 3), (0, SUCCESSOR, previous[1]), (1, LAST, induction[1]))
    torch.testing.assert_close(by_pos.effect, -GAIN * needed, **EXACT)
    # Without the first head BOS is predicted, without the second nothing in particular.
    found = ablate(model, CLEAN, metrics.log_prob(ANSWER), "heads", "zero", **QUIET).scores.mean(-1)
    expected = torch.full((2, 3), GAIN - math.log(math.exp(GAIN) + 7), dtype=torch.float64)
    expected[previous], expected[induction] = -math.log(math.exp(GAIN) + 7), -math.log(8)
    torch.testing.assert_close(found, expected, **EXACT)


# A circuit that was trained


@pytest.mark.parametrize(("seed", "length", "last"), [(0, 12, 18), (1, 20, 25), (2, 8, 15), (3, 30, 59)])
def test_on_the_bundled_model_every_method_points_to_the_same_two_heads(seed: int, length: int, last: int) -> None:
    """Prompts end at a token of the repeat; corrupted ones have another where it stood the first time."""
    model = HookedTransformer.from_pretrained("demo-induction-2l")
    previous, induction = (0, 0), (1, 1)
    generator = torch.Generator().manual_seed(seed)
    repeated = repeated_random_tokens(4, length, model.cfg.d_vocab, generator)
    clean, answer = repeated[:, : last + 1], repeated[:, last - length + 1]
    unused = torch.tensor([next(one for one in range(1, 96) if one not in row) for row in repeated.tolist()])
    corrupted = clean.clone()
    corrupted[:, last - length] = unused
    metric = metrics.log_prob(answer)
    before, after = (float(metric(model(tokens)).detach()) for tokens in (corrupted, clean))
    assert after - before > 5
    circuit = grid_of((2, 4), previous, induction)

    def share(scores: Tensor) -> Tensor:
        return ((scores - before) / (after - before)).double()

    # Patched exactly, each of the two heads brings back the answer, and no other brings back any of it.
    _, run = model.run_with_cache(clean)
    patched = share(patching.get_act_patch_attn_head_out_all_pos(model, corrupted, run, metric, **QUIET))
    torch.testing.assert_close(patched, circuit, atol=0.02, rtol=0)
    # Estimated by one backward pass, the same two come first, and patching them exactly confirms it.
    grid = "attn_head_out_all_pos"
    estimated = attribution_patch(model, corrupted, clean, metric, grid, audit=2, **QUIET)
    assert {cell for cell, _ in estimated.strongest(grid, 2)} == {previous, induction}
    for one in estimated.audits[grid].cells:
        assert one.exact == pytest.approx(float(patched[one.cell]) * (after - before), abs=1e-3 * (after - before))
        assert not (one in estimated.audits[grid].sign_flips and one.chosen == "top")
    # Path by path, the first speaks to the keys of the second, and the second to the logits.
    for way in "qkv":
        paths = share(get_act_patch_direct_path_all_sources(model, corrupted, run, None, metric, way, **QUIET))
        pairs = [(*previous, *induction)] if way == "k" else []
        torch.testing.assert_close(paths, grid_of((2, 4, 2, 4), *pairs), atol=0.02, rtol=0)
    to_logits = share(path_patch_heads(model, corrupted, clean, metric, "logits", **QUIET))
    torch.testing.assert_close(to_logits, grid_of((2, 4), induction), atol=0.02, rtol=0)
    # And of all pairs of heads, these two are wired to each other most, through the keys.
    best = max((head_composition(model, mode, **QUIET).top(1)[0] for mode in "QKV"), key=lambda pair: pair.z)
    assert (best.mode, best.writer, best.reader) == ("K", previous, induction)
