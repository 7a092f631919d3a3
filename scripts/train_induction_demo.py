"""Train the bundled model `demo-induction-2l` and write its folder: weights, config and model card.

    python scripts/train_induction_demo.py [--out FOLDER] [--seed N]

The model learns to continue repeats in random tokens. Lengths and offsets of the repeats are random, so looking a fixed
number of places back does not work. Takes a few minutes on two cores; the same seed gives the same data.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from hooked_lm import HookedTransformer, HookedTransformerConfig
from hooked_lm.demo import HELD_OUT_LENGTHS, MODEL, DemoResult, label, run_demo
from hooked_lm.hooks import HookPoint

BUNDLED = Path(__file__).parents[1] / "hooked_lm" / "bundled" / MODEL


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained model.

    Attributes:
        seed: of the initial weights and of the data.
        d_vocab: tokens, of which 0 is the start token.
        n_ctx: length of every training row.
        direct_steps: steps in which layer 1 takes its values from the embedding alone; see `direct_values`.
        steps: steps in all.
        batch: rows in a step.
        learning_rate, warmup: the peak, and the steps up to it; after it, a straight line down to 2 %.
        weight_decay: of matrices; biases and norms have none.
        fresh_weight: how much the loss on tokens that nothing predicts counts, next to that on the repeats.
        short: the share of blocks with 2 to 7 tokens.
    """

    seed: int = 0
    d_model: int = 64
    n_heads: int = 4
    d_vocab: int = 64
    n_ctx: int = 64
    direct_steps: int = 900
    steps: int = 1500
    batch: int = 64
    learning_rate: float = 3e-3
    warmup: int = 200
    weight_decay: float = 0.01
    fresh_weight: float = 0.1
    short: float = 0.5

    @property
    def lengths(self) -> list[int]:
        """The block lengths trained on."""
        return [length for length in range(2, self.n_ctx // 2) if length not in HELD_OUT_LENGTHS]


def training_batches(recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tokens [batch n_ctx], and whether each next token [batch n_ctx-1] is part of a repeat and so determined.

    A row is the start token, then again and again: some fresh tokens, a block, and the block once more, cut where the row
    ends. The number of fresh tokens and the length of the block are random. But for the repeats, no token comes twice in
    a row, so what follows is never ambiguous.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    chance = random.Random(recipe.seed)
    while True:
        fresh = torch.rand(recipe.batch, recipe.d_vocab - 1, generator=generator).argsort(-1) + 1
        plans = [_plan_row(recipe, chance) for _ in range(recipe.batch)]
        order, determined = (torch.tensor(part) for part in zip(*plans, strict=True))
        start = torch.zeros(recipe.batch, 1, dtype=torch.long)
        yield torch.cat((start, fresh.gather(1, order)), dim=1), determined


def _plan_row(recipe: Recipe, chance: random.Random) -> tuple[list[int], list[bool]]:
    """For each place after the start token: which of the row's fresh tokens stands there, and if a repeat put it there."""
    short = [length for length in recipe.lengths if length < 8]
    order: list[int] = []
    determined: list[bool] = []
    n_used = 0
    while len(order) < recipe.n_ctx - 1:
        gap = chance.randrange(0, recipe.n_ctx // 2 if not order and chance.random() < 0.5 else 9)
        length = chance.choice(short if chance.random() < recipe.short else recipe.lengths)
        block = range(n_used + gap, n_used + gap + length)
        order += [*range(n_used, n_used + gap), *block, *block]
        determined += [False] * (gap + length + 1) + [True] * (length - 1)
        n_used += gap + length
    return order[: recipe.n_ctx - 1], determined[: recipe.n_ctx - 1]


def direct_values(model: HookedTransformer, tokens: Tensor) -> Tensor:
    """Return the logits when layer 1 takes its values from the embedding alone, past what layer 0 wrote.

    Many circuits continue a repeat. Layer 0 may look `k` places back, and layer 1 may attend `k` places on from the
    earlier occurrence and read the answer off what another head of layer 0 carried there. All of them predict equally
    well. While values come from the embedding, the answer can only be read off the token attended to, which leaves k = 1.
    """
    embedded: list[Tensor] = []

    def keep(residual: Tensor, hook: HookPoint) -> None:
        embedded.append(residual)

    def replace(value_input: Tensor, hook: HookPoint) -> Tensor:
        return embedded[-1][:, :, None].expand_as(value_input)

    return model.run_with_hooks(
        tokens, fwd_hooks=[("blocks.0.hook_resid_pre", keep), ("blocks.1.hook_v_input", replace)]
    )


def train(recipe: Recipe) -> tuple[HookedTransformer, float, float]:
    """Return the trained model, and its loss on repeats and on fresh tokens, averaged over the last hundred steps."""
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=2,
            d_model=recipe.d_model,
            n_heads=recipe.n_heads,
            n_ctx=recipe.n_ctx,
            d_vocab=recipe.d_vocab,
            attn_only=True,
            seed=recipe.seed,
            model_name=MODEL,
        )
    )
    matrices = [value for name, value in model.named_parameters() if ".W_" in name]
    others = [value for name, value in model.named_parameters() if ".W_" not in name]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / recipe.warmup, max(0.02, 1 - step / recipe.steps))
    )
    losses = []
    bar = tqdm(zip(range(recipe.steps), training_batches(recipe)), total=recipe.steps)
    for step, (tokens, determined) in bar:
        logits = direct_values(model, tokens) if step < recipe.direct_steps else model(tokens)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = loss.view_as(determined)
        repeats, fresh = loss[determined].mean(), loss[~determined].mean()
        optimizer.zero_grad()
        (repeats + recipe.fresh_weight * fresh).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append((repeats.item(), fresh.item()))
        if step % 20 == 0:
            bar.set_postfix_str(f"loss on repeats {losses[-1][0]:.3f}, on fresh tokens {losses[-1][1]:.3f}")
    last = torch.tensor(losses[-100:]).mean(0).tolist()
    return model, last[0], last[1]
