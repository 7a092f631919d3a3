"""Train the bundled model `demo-induction-2l` and write its folder: weights, config and model card.

    python scripts/train_induction_demo.py [--out FOLDER] [--seed N]

The model learns to continue repeats in random tokens. Lengths and offsets of the repeats are random, so looking a fixed
number of places back does not work. Takes a few minutes on one core; the same seed gives the same model.
"""

from __future__ import annotations

import argparse
import math
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
        steps: steps in all.
        closed_steps, opening_steps: steps with one circuit only, then steps in which the rest is let in; see
            `phased_logits`.
        batch: rows in a step.
        learning_rate, warmup: the peak, and the steps up to it; after it, a straight line down to 2 %.
        fresh_weight: how much the loss on tokens that nothing predicts counts, next to that on the repeats.
        short: the share of blocks with 2 to 7 tokens.
    """

    seed: int = 0
    d_model: int = 64
    n_heads: int = 4
    d_head: int = 16
    d_vocab: int = 64
    n_ctx: int = 64
    steps: int = 1800
    closed_steps: int = 1200
    opening_steps: int = 300
    batch: int = 64
    learning_rate: float = 4e-3
    warmup: int = 200
    fresh_weight: float = 0.1
    short: float = 0.25

    @property
    def lengths(self) -> list[int]:
        """The block lengths trained on."""
        return [length for length in range(2, self.n_ctx // 2) if length not in HELD_OUT_LENGTHS]


def training_batches(recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tokens [batch n_ctx], and whether each next token [batch n_ctx-1] is part of a repeat and so determined.

    A row is the start token, then again and again: some fresh tokens, a block, and the block once more, cut where the
    row ends. The number of fresh tokens and the length of the block are random. But for the repeats, a row has no token
    twice, so what follows is never ambiguous.
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
    """For each place after the start token: which of the row's fresh tokens it has, and if a repeat put it there."""
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


def phased_logits(model: HookedTransformer, tokens: Tensor, openness: float) -> Tensor:
    """Return the logits of the part of the model that is open: at 1 the whole model, at 0 one circuit only.

    At 0 only head 0 of each layer is on, and layer 1 takes its values from the embedding alone; in between, the rest
    counts by that factor. Many circuits continue a repeat: layer 0 may look `k` places back, while layer 1 attends `k`
    places on from the earlier occurrence and reads the answer off what another head of layer 0 has carried there; and
    any number of heads may share the work. All predict equally well, and training picks one at random. While values
    come from the embedding, the answer can only be read off the token attended to, which leaves k = 1; while one head
    is on in each layer, the work is not shared.
    """
    if openness == 1.0:
        return model(tokens)
    embedded: list[Tensor] = []

    def keep(residual: Tensor, hook: HookPoint) -> None:
        embedded.append(residual)

    def mostly_embedding(value_input: Tensor, hook: HookPoint) -> Tensor:
        return torch.lerp(embedded[-1][:, :, None].expand_as(value_input), value_input, openness)

    def mostly_head_0(z: Tensor, hook: HookPoint) -> Tensor:
        z[:, :, 1:] *= openness
        return z

    return model.run_with_hooks(
        tokens,
        fwd_hooks=[
            ("blocks.0.hook_resid_pre", keep),
            ("blocks.1.hook_v_input", mostly_embedding),
            ("blocks.*.attn.hook_z", mostly_head_0),
        ],
    )


def train(recipe: Recipe) -> tuple[HookedTransformer, float, float]:
    """Return the trained model, and its loss on repeats and on fresh tokens, averaged over the last hundred steps."""
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=2,
            d_model=recipe.d_model,
            n_heads=recipe.n_heads,
            d_head=recipe.d_head,
            n_ctx=recipe.n_ctx,
            d_vocab=recipe.d_vocab,
            attn_only=True,
            seed=recipe.seed,
            model_name=MODEL,
        )
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / recipe.warmup, max(0.02, 1 - step / recipe.steps))
    )
    losses = []
    bar = tqdm(zip(range(recipe.steps), training_batches(recipe), strict=False), total=recipe.steps)
    for step, (tokens, determined) in bar:
        openness = min(max((step - recipe.closed_steps) / recipe.opening_steps, 0.0), 1.0)
        logits = phased_logits(model, tokens, openness)
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


CARD = """\
# {name}

A transformer with two layers of attention and no MLPs that continues repeats in random tokens, by a previous-token
head in layer 0 and an induction head in layer 1. It is a model to study, not to use: it has no tokenizer and reads
tokens only, 0 to {last_token}, of which 0 is the start token that every sequence begins with.

    HookedTransformer.from_pretrained("{name}")

`hooked-lm demo` finds its circuit and tests it.

## Architecture

{n_parameters:,} parameters in float32: 2 layers, {recipe.n_heads} heads each, `d_model` {recipe.d_model},
`d_head` {recipe.d_head}, LayerNorm, learned positions (`n_ctx` {recipe.n_ctx}), vocabulary {recipe.d_vocab}.

## Training

Made by `scripts/train_induction_demo.py`.

- Seed: {recipe.seed}, for the initial weights and the data.
- Data: rows of {recipe.n_ctx} tokens. After the start token come, again and again, some fresh random tokens, a block of
  random tokens, and the block once more. The number of fresh tokens and the length of the block (2 to {longest}) are
  random, so the distance to look back differs within a row and between rows. Lengths {held_out}
  are held out.
- Steps: {recipe.steps} of {recipe.batch} rows; Adam, peak learning rate {recipe.learning_rate:g} after {recipe.warmup}
  steps, then a straight line down; {minutes:.1f} minutes on one CPU core.
- For {recipe.closed_steps} steps only head 0 of each layer is on, and layer 1 takes its values from the embedding
  alone; over the next {recipe.opening_steps} the rest is let in; the last {plain_steps} train the whole model as it is.
  Without this, training finds circuits that predict as well but look any number of places back and are shared among
  heads. So it is the recipe's doing that the circuit is the textbook one and that its heads have the number 0.
- Final loss, mean over the last hundred steps, in nats: {repeats:.4f} on repeated tokens, {fresh:.3f} on fresh ones
  (a guess costs {guess:.3f}).

## Measured

On {result.batch} sequences for each length (seed {result.seed}): a block of random tokens, then the same again. The
second half is the tokens of the repeat but its first, which nothing announces.

- Second-half accuracy at the lengths held out: {accuracy}.
- Log-probability at length {result.length}: {first_half:.3f} in the first half, {second_half:.4f} in the second.
- {previous}: previous-token score {previous_score:.3f}. {induction}: induction score {induction_score:.3f}.
- K-composition of the pair: {result.pair_composition:.3f}; the other writers of layer 0 reach {runner_up:.3f} at most.
- Top-1 accuracy of the pair's full QK circuit, from the weights alone: {result.circuit_accuracy:.1%}.

| second half at length {result.length} | loss (nats) | accuracy |
|---|---|---|
{ablations}

## Limits

It does one thing. It models no language, and refuses more than {recipe.n_ctx} tokens. Licence: the library's.
"""


def model_card(recipe: Recipe, result: DemoResult, repeats: float, fresh: float, minutes: float) -> str:
    """Return the model card, with what was measured."""
    column = result.k_composition[:, result.induction_head[1]].tolist()
    column.pop(result.previous_token_head[1])
    return CARD.format(
        name=MODEL,
        recipe=recipe,
        result=result,
        n_parameters=result.n_parameters,
        last_token=recipe.d_vocab - 1,
        longest=max(recipe.lengths),
        held_out=", ".join(str(length) for length in HELD_OUT_LENGTHS),
        plain_steps=recipe.steps - recipe.closed_steps - recipe.opening_steps,
        minutes=minutes,
        repeats=repeats,
        fresh=fresh,
        guess=math.log(recipe.d_vocab),
        accuracy=", ".join(f"{length}: {value:.1%}" for length, value in result.accuracy_by_length.items()),
        previous=label(result.previous_token_head),
        induction=label(result.induction_head),
        runner_up=max(column),
        first_half=result.first_half.log_prob,
        second_half=result.second_half.log_prob,
        previous_score=result.previous_token_score,
        induction_score=result.induction_score,
        ablations="\n".join(
            f"| {ablation.label} | {ablation.loss:.3f} | {ablation.accuracy:.1%} |" for ablation in result.ablations
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=BUNDLED, help="the folder to write; by default the bundled one")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    arguments = parser.parse_args()
    # One thread adds up in one order: the same weights whatever else the machine does. The model is too small for two.
    torch.set_num_threads(1)
    recipe = Recipe(seed=arguments.seed)
    start = time.perf_counter()
    model, repeats, fresh = train(recipe)
    minutes = (time.perf_counter() - start) / 60
    model.save_pretrained(arguments.out)
    result = run_demo(arguments.out)
    (arguments.out / "README.md").write_text(model_card(recipe, result, repeats, fresh, minutes))
    print(f"{minutes:.1f} minutes; loss {repeats:.4f} on repeats, {fresh:.3f} on fresh tokens")
    print(f"accuracy at held-out lengths: {result.accuracy_by_length}")
    print(
        f"previous-token scores {result.previous_token_scores.tolist()}, induction {result.induction_scores.tolist()}"
    )
    print(f"K-composition {result.k_composition.tolist()}, circuit {result.circuit_accuracy}")
    print(*result.ablations, sep="\n")


if __name__ == "__main__":
    main()
