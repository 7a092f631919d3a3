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
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hooked_lm import metrics, patching
from hooked_lm.patching.path import (
    get_act_patch_direct_path,
    path_patch,
    path_patch_heads,
)
from hooked_lm.patching.statistics import patch_pairs
from tests.ground_truth_helpers import (
    ANSWER,
    BOS,
    CLEAN,
    CORRUPTED_SCORE,
    DIFFERENCE,
    EARLIER,
    EXACT,
    GAIN,
    INDUCTION_HEAD,
    LAST,
    N_CTX,
    PLACES,
    PREDICTION,
    PREVIOUS,
    PREVIOUS_HEAD,
    QUIET,
    RECOVERS,
    SUCCESSOR,
    TOKEN,
    UNREAD,
    VOCAB,
    Head,
    corrupted_at,
    everywhere,
    grid_of,
    idle,
    wired,
)


def recovered(scores: Tensor, pos: int) -> Tensor:
    """Scores of runs that are corrupted at `pos`, on the scale on which corrupted is 0 and clean 1."""
    return (scores - CORRUPTED_SCORE[pos]) / (GAIN - CORRUPTED_SCORE[pos])


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
