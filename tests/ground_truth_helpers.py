"""A model into which an induction circuit is wired by hand, and the prompts that it is read with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, metrics
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


def grid_of(shape: Sequence[int], *cells: tuple[int, ...]) -> Tensor:
    """1 at some cells, and 0 elsewhere."""
    grid = torch.zeros(tuple(shape), dtype=torch.float64)
    for cell in cells:
        grid[cell] = 1.0
    return grid


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
