"""Every analysis, on an induction circuit that is wired by hand: what is to be found is known before anything is run.

The stream has five parts that nothing mixes: the token, its position, the previous token, the prediction, and one that
nobody reads. Of the three heads of each layer

- one is part of the circuit: in layer 0 the PREVIOUS head, which attends one position back and writes that token into
  "previous"; in layer 1 the INDUCTION head, whose query is the token, whose key is "previous", and which writes the
  token that it attends to into "prediction". Where nothing matches it rests on position 0.
- one is idle: all its weights are zero, so it attends to all positions alike and writes nothing.
- one is noise: random queries, keys and values of tokens and positions, written where nobody reads.

The unembedding reads "prediction" alone, `GAIN` times. There are no norms and no MLPs.

Scores are 0, `match` (the previous token at the key is the query's token) or `rest` (the key is position 0). The SHARP
model has `exp(-match / 2)` below 1e-43, so that attention is one key's, and every number below is a whole one. In the
SOFT model `match` is log 9 and `rest` log 3, so that attention goes in the proportions 9 : 3 : 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
    get_act_patch_direct_path,
    get_act_patch_direct_path_all_sources,
    path_patch,
    path_patch_heads,
)
from hooked_lm.patching.statistics import patch_pairs
from tests.helpers import tiny_config

EXACT: dict[str, Any] = {"atol": 1e-12, "rtol": 0.0}
QUIET: dict[str, Any] = {"verbose": False}

VOCAB, N_CTX, GAIN = 8, 12, 3.0
BOS = 0
TOKEN, POSITION, PREVIOUS, PREDICTION, UNREAD = (
    slice(start, stop) for start, stop in ((0, 8), (8, 20), (20, 28), (28, 36), (36, 38))
)
D_MODEL = 38
SHARP, SOFT = (200.0, 100.0), (math.log(9), math.log(3))

Head = tuple[int, int]
# Where the two heads of the circuit are: as the literature names them, and where mixing up an axis would show.
PLACES: list[tuple[Head, Head]] = [((0, 0), (1, 0)), ((0, 1), (1, 2))]
everywhere = pytest.mark.parametrize(("previous", "induction"), PLACES)


@cache
def wired(previous: Head, induction: Head, scores: tuple[float, float] = SHARP) -> HookedTransformer:
    """The model of this module; scores are `match` and `rest`. Do not change it."""
    fields = {"attn_only": True, "normalization_type": None, "act_fn": None, "use_attn_scale": False}
    sizes = {"d_model": D_MODEL, "n_heads": 3, "d_head": N_CTX, "n_ctx": N_CTX, "d_vocab": VOCAB}
    model = HookedTransformer(tiny_config(**fields, **sizes))
    match, rest = scores
    generator, identity = torch.Generator().manual_seed(0), torch.eye(VOCAB, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E[:, TOKEN] = identity
        model.pos_embed.W_pos[:, POSITION] = torch.eye(N_CTX)
        model.unembed.W_U[PREDICTION] = GAIN * identity
        for layer, (_, head) in enumerate((previous, induction)):
            attn, noise = model.blocks[layer].attn, (head + 2) % 3
            for W in (attn.W_Q, attn.W_K):
                W[noise, TOKEN.start : POSITION.stop].normal_(generator=generator)
            attn.W_V[noise, TOKEN].normal_(generator=generator)
            attn.b_V[noise].normal_(generator=generator)
            attn.W_O[noise, :, UNREAD].normal_(generator=generator)
            attn.b_O[UNREAD].normal_(generator=generator)
            attn.W_V[head, TOKEN, :VOCAB] = identity
            attn.W_O[head, :VOCAB, (PREVIOUS, PREDICTION)[layer]] = identity
        attn, (_, head) = model.blocks[0].attn, previous
        attn.W_Q[head, POSITION] = torch.eye(N_CTX)
        attn.W_K[head, POSITION] = SHARP[0] * torch.ones(N_CTX - 1).diag(1)  # the key of j is what the query of j+1 is
        attn, (_, head) = model.blocks[1].attn, induction
        attn.W_Q[head, TOKEN, :VOCAB] = identity
        attn.W_K[head, PREVIOUS, :VOCAB] = match * identity
        attn.b_Q[head, VOCAB] = 1.0
        attn.W_K[head, POSITION.start, VOCAB] = rest
    return model


def idle(head: Head) -> Head:
    """The idle head in the layer of a head of the circuit."""
    return head[0], (head[1] + 1) % 3


# Three prompts `BOS a b c d a`, after which comes `b`, and a token for each that is not in it.
EARLIER, SUCCESSOR, LAST = 1, 2, 5
CLEAN = torch.tensor([[BOS, 3, 5, 2, 7, 3], [BOS, 1, 6, 4, 2, 1], [BOS, 7, 2, 5, 1, 7]])
ANSWER, NEW = CLEAN[:, SUCCESSOR], torch.tensor([6, 3, 4])
DIFFERENCE = metrics.logit_diff(ANSWER, NEW)


def corrupted_at(pos: int) -> Tensor:
    """The prompts with a new token at a position."""
    tokens = CLEAN.clone()
    tokens[:, pos] = NEW
    return tokens


# What the corrupted prompts score, by where they are corrupted; the clean ones score GAIN, the logit of `b`.
#   BOS a n c d a: the earlier token is followed by n, which is predicted, and `b` is not.
#   BOS n b c d a, BOS a b c d n: the last token is new, so BOS is predicted, and neither `b` nor n.
CORRUPTED_SCORE = {SUCCESSOR: -GAIN, EARLIER: 0.0, LAST: 0.0}


def recovered(scores: Tensor, pos: int) -> Tensor:
    """Scores of runs that are corrupted at `pos`, on the scale on which corrupted is 0 and clean 1."""
    return (scores - CORRUPTED_SCORE[pos]) / (GAIN - CORRUPTED_SCORE[pos])


def grid_of(shape: Sequence[int], *cells: tuple[int, ...]) -> Tensor:
    """1 at some cells, and 0 elsewhere."""
    grid = torch.zeros(tuple(shape), dtype=torch.float64)
    for cell in cells:
        grid[cell] = 1.0
    return grid


# The model


@everywhere
def test_the_heads_of_the_circuit_attend_as_they_are_wired(previous: Head, induction: Head) -> None:
    _, run = wired(previous, induction).run_with_cache(CLEAN)
    one_back = torch.zeros(6, 6, dtype=torch.float64)
    one_back[0, 0] = 1.0  # it has nothing else to attend to
    for query in range(1, 6):
        one_back[query, query - 1] = 1.0
    after_the_earlier_one = torch.zeros(6, 6, dtype=torch.float64)
    after_the_earlier_one[:5, 0] = 1.0  # tokens that are new rest on BOS
    after_the_earlier_one[5, 2] = 1.0
    torch.testing.assert_close(run["pattern", 0][:, previous[1]], one_back.expand(3, 6, 6), **EXACT)
    torch.testing.assert_close(run["pattern", 1][:, induction[1]], after_the_earlier_one.expand(3, 6, 6), **EXACT)
    evenly = torch.ones(6, 6, dtype=torch.float64).tril() / torch.arange(1, 7)[:, None]
    for layer, head in (idle(previous), idle(induction)):
        torch.testing.assert_close(run["pattern", layer][0, head], evenly, **EXACT)


@everywhere
def test_the_stream_holds_each_token_and_the_one_before_it(previous: Head, induction: Head) -> None:
    _, run = wired(previous, induction).run_with_cache(CLEAN)
    before = torch.cat((CLEAN[:, :1], CLEAN[:, :-1]), 1)
    stream = run["resid_post", 0].detach()
    for part, tokens in ((TOKEN, CLEAN), (PREVIOUS, before)):
        torch.testing.assert_close(stream[..., part], torch.eye(VOCAB, dtype=torch.float64)[tokens], **EXACT)
    assert float(stream[..., PREDICTION].abs().max()) == 0.0
    assert float(stream[..., UNREAD].abs().min()) > 1e-3  # the noise is there


@everywhere
@settings(max_examples=40)
@given(drawn=st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=N_CTX - 1))
def test_the_model_predicts_what_came_after_the_earlier_copies_of_the_token(
    previous: Head, induction: Head, drawn: list[int]
) -> None:
    tokens = [BOS, *drawn]
    logits = torch.zeros(len(tokens), VOCAB, dtype=torch.float64)
    for query, token in enumerate(tokens):
        followers = [tokens[key] for key in range(1, query + 1) if tokens[key - 1] == token] or [BOS]
        for follower in followers:
            logits[query, follower] += GAIN / len(followers)
    torch.testing.assert_close(wired(previous, induction)(torch.tensor([tokens]))[0].detach(), logits, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("pos", CORRUPTED_SCORE)
def test_clean_and_corrupted_prompts_score_what_they_are_said_to(pos: int) -> None:
    model = wired(*PLACES[0])
    assert DIFFERENCE.per_prompt(model(CLEAN)).tolist() == pytest.approx([GAIN] * 3, abs=1e-12)
    found = DIFFERENCE.per_prompt(model(corrupted_at(pos)))
    assert found.tolist() == pytest.approx([CORRUPTED_SCORE[pos]] * 3, abs=1e-12)
    # Of GAIN for one token and 0 for the seven others.
    certain = GAIN - math.log(math.exp(GAIN) + 7)
    assert float(metrics.log_prob(ANSWER)(model(CLEAN))) == pytest.approx(certain, abs=1e-12)
    assert float(metrics.log_prob(ANSWER)(model(corrupted_at(pos)))) == pytest.approx(certain - GAIN, abs=1e-12)
    # KL = sum of p (log p - log q): they differ in two tokens, which exchange their logits.
    share = math.exp(certain)
    divergence = metrics.kl_to(model(CLEAN))(model(corrupted_at(pos)))
    assert float(divergence) == pytest.approx((share - share / math.exp(GAIN)) * GAIN, abs=1e-12)


# Activation patching

PREVIOUS_HEAD, INDUCTION_HEAD = "previous", "induction"
# Where the corrupted prompt is corrupted -> the patch -> the cells that bring everything back; no other does anything.
# Cells are (layer, pos) of the stream and of attention's output, and (pos, head) of a head's output, query, key, value
# and pattern, whose pos is that of its queries.
RECOVERS: dict[int, dict[str, list[tuple[Any, Any]]]] = {
    # `b` is read from its own position, as a value of the induction head. Who looks where stays as it was.
    SUCCESSOR: {
        "resid_pre": [(0, SUCCESSOR), (1, SUCCESSOR)],
        "resid_post": [(0, SUCCESSOR), (1, LAST)],
        "attn_out": [(1, LAST)],
        "out": [(LAST, INDUCTION_HEAD)],
        "q": [],
        "k": [],
        "v": [(SUCCESSOR, INDUCTION_HEAD)],
        "pattern": [],
    },
    # The earlier `a` is the previous head's value at the position after it, and there the induction head's key.
    EARLIER: {
        "resid_pre": [(0, EARLIER), (1, SUCCESSOR)],
        "resid_post": [(0, SUCCESSOR), (1, LAST)],
        "attn_out": [(0, SUCCESSOR), (1, LAST)],
        "out": [(SUCCESSOR, PREVIOUS_HEAD), (LAST, INDUCTION_HEAD)],
        "q": [],
        "k": [(SUCCESSOR, INDUCTION_HEAD)],
        "v": [(EARLIER, PREVIOUS_HEAD)],
        "pattern": [(LAST, INDUCTION_HEAD)],
    },
    # The last `a` is the induction head's query.
    LAST: {
        "resid_pre": [(0, LAST), (1, LAST)],
        "resid_post": [(0, LAST), (1, LAST)],
        "attn_out": [(1, LAST)],
        "out": [(LAST, INDUCTION_HEAD)],
        "q": [(LAST, INDUCTION_HEAD)],
        "k": [],
        "v": [],
        "pattern": [(LAST, INDUCTION_HEAD)],
    },
}
HEAD_PATCHES = ("out", "q", "k", "v", "pattern")


@everywhere
@pytest.mark.parametrize("pos", RECOVERS)
def test_patching_brings_back_everything_along_the_circuit_and_nothing_elsewhere(
    previous: Head, induction: Head, pos: int
) -> None:
    model, tokens = wired(previous, induction), corrupted_at(pos)
    _, run = model.run_with_cache(CLEAN)
    heads = {PREVIOUS_HEAD: previous, INDUCTION_HEAD: induction}

    def patched(name: str) -> Tensor:
        function = getattr(patching, f"get_act_patch_{name}")
        return recovered(function(model, tokens, run, DIFFERENCE, **QUIET), pos)

    for name in ("resid_pre", "resid_post", "attn_out"):
        torch.testing.assert_close(patched(name), grid_of((2, 6), *RECOVERS[pos][name]), **EXACT)
    for name in HEAD_PATCHES:
        cells = [(heads[which][0], at, heads[which][1]) for at, which in RECOVERS[pos][name]]
        torch.testing.assert_close(patched(f"attn_head_{name}_by_pos"), grid_of((2, 6, 3), *cells), **EXACT)
        whole = grid_of((2, 3), *((layer, head) for layer, _, head in cells))
        torch.testing.assert_close(patched(f"attn_head_{name}_all_pos"), whole, **EXACT)


@everywhere
def test_one_entry_of_the_pattern_is_all_that_has_to_change(previous: Head, induction: Head) -> None:
    """Attention that is added at the successor adds `b`; what is taken from BOS matters to neither `b` nor the new."""
    model = wired(previous, induction)
    _, run = model.run_with_cache(CLEAN)
    for pos in (EARLIER, LAST):
        grid = patching.get_act_patch_attn_head_pattern_dest_src_pos(model, corrupted_at(pos), run, DIFFERENCE, **QUIET)
        torch.testing.assert_close(recovered(grid, pos), grid_of((2, 3, 6, 6), (*induction, LAST, SUCCESSOR)), **EXACT)


@everywhere
def test_every_pair_of_prompts_says_the_same_in_both_directions(previous: Head, induction: Head) -> None:
    circuit = grid_of((2, 3), previous, induction)
    for direction, expected in (("denoising", circuit), ("noising", 1 - circuit)):
        found = patch_pairs(
            wired(previous, induction),
            CLEAN,
            corrupted_at(EARLIER),
            DIFFERENCE,
            "attn_head_out_all_pos",
            direction=direction,  # type: ignore[arg-type]
            **QUIET,
        )
        for scores in (found.mean, found.low, found.high):
            torch.testing.assert_close(scores, expected, **EXACT)
        torch.testing.assert_close(found.per_pair, expected[..., None].expand(2, 3, 3), **EXACT)
        assert torch.equal(found.same_sign, circuit)  # those that change nothing have no sign


# Path patching


@everywhere
def test_the_previous_head_tells_the_induction_heads_keys_everything_and_nobody_else_anything(
    previous: Head, induction: Head
) -> None:
    model, tokens = wired(previous, induction), corrupted_at(EARLIER)
    nothing = grid_of((2, 3))
    for way in "qkv":
        for head in range(3):
            found = path_patch_heads(model, tokens, CLEAN, DIFFERENCE, (way, 1, head), **QUIET)
            says = grid_of((2, 3), previous) if (way, head) == ("k", induction[1]) else nothing
            torch.testing.assert_close(recovered(found, EARLIER), says, **EXACT)
    _, run = model.run_with_cache(CLEAN)
    for way in "qkv":
        grid = get_act_patch_direct_path(model, tokens, run, None, DIFFERENCE, *previous, way, **QUIET)
        cells = [induction] if way == "k" else []
        torch.testing.assert_close(recovered(grid, EARLIER), grid_of((2, 3), *cells), **EXACT)


@everywhere
def test_only_the_induction_head_speaks_to_the_logits_itself(previous: Head, induction: Head) -> None:
    """The previous head does so through it: by all routes to the logits, that is to say patched in earnest."""
    for pos in CORRUPTED_SCORE:
        found, in_earnest = (
            path_patch_heads(
                wired(previous, induction), corrupted_at(pos), CLEAN, DIFFERENCE, "logits", routes=routes, **QUIET
            )
            for routes in ("direct", "all")
        )
        torch.testing.assert_close(recovered(found, pos), grid_of((2, 3), induction), **EXACT)
        circuit = [previous, induction] if pos == EARLIER else [induction]
        torch.testing.assert_close(recovered(in_earnest, pos), grid_of((2, 3), *circuit), **EXACT)


@everywhere
def test_the_message_leaves_and_arrives_after_the_earlier_token(previous: Head, induction: Head) -> None:
    model, tokens = wired(previous, induction), corrupted_at(EARLIER)
    keys = ("k", *induction)
    senders: list[Any] = [("z", *previous, pos) for pos in range(6)]
    found = path_patch(model, tokens, CLEAN, DIFFERENCE, senders, keys, **QUIET)
    torch.testing.assert_close(recovered(found, EARLIER), grid_of((6,), (SUCCESSOR,)), **EXACT)
    for pos in range(6):
        found = path_patch(model, tokens, CLEAN, DIFFERENCE, [("z", *previous)], (*keys, pos), **QUIET)
        assert float(recovered(found, EARLIER)) == pytest.approx(float(pos == SUCCESSOR), abs=1e-12)


@everywhere
@pytest.mark.parametrize(("pos", "reader"), [(SUCCESSOR, "v"), (LAST, "q"), (EARLIER, None)])
def test_the_embedding_tells_the_induction_head_what_it_reads_of_it_directly(
    previous: Head, induction: Head, pos: int, reader: str | None
) -> None:
    """Its values and queries are tokens; its keys are not, so the earlier token comes by way of the previous head."""
    model, tokens = wired(previous, induction), corrupted_at(pos)
    for way in "qkv":
        for routes, carries in (("direct", way == reader), ("all", way == (reader or "k"))):
            found = path_patch(model, tokens, CLEAN, DIFFERENCE, ["embed"], (way, *induction), routes=routes, **QUIET)
            assert float(recovered(found, pos)) == pytest.approx(float(carries), abs=1e-12), (way, routes)
    to_logits = path_patch(model, tokens, CLEAN, DIFFERENCE, ["embed", "pos_embed"], "logits", **QUIET)
    torch.testing.assert_close(recovered(to_logits, pos), torch.zeros(2, dtype=torch.float64), **EXACT)


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
