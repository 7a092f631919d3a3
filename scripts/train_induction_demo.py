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

BUNDLED = Path(__file__).parents[1] / "hooked_lm" / "bundled" / MODEL


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained model.

    Attributes:
        seed: of the initial weights and of the data.
        d_vocab: tokens, of which 0 is the start token.
        n_ctx: length of every training row.
        batch, steps: rows in a step, and steps.
        learning_rate, warmup: the peak, and the steps up to it; after it, a straight line down to 2 %.
        weight_decay: of matrices; biases and norms have none.
        head_penalty: times the sum over heads of the square root of `||W_O||`. Weight decay has heads share the work;
            a group penalty lets a head that is not needed fade away (Yuan and Lin 2006), and with the root two heads
            that do the same cost more than one.
    """

    seed: int = 1
    d_model: int = 128
    n_heads: int = 4
    d_head: int = 32
    d_vocab: int = 96
    n_ctx: int = 64
    batch: int = 64
    steps: int = 2500
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.01
    head_penalty: float = 0.1

    @property
    def lengths(self) -> list[int]:
        """The block lengths trained on."""
        return [length for length in range(4, self.n_ctx // 2 - 3) if length not in HELD_OUT_LENGTHS]


def training_batches(recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tokens [batch n_ctx], and whether each next token [batch n_ctx-1] is determined by what came before.

    A row is the start token, some fresh tokens, a block of fresh tokens, and then pieces of that block until the row is
    full: each piece starts at a random place of the block and has a random length. So no token is followed by another
    for any reason but that it was so before, and neither a position nor a distance tells what comes next.
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
    """For each place after the start token: which of the row's fresh tokens it has, and whether that is determined."""
    gap = chance.choice((0, chance.randint(0, recipe.n_ctx - 16)))
    length = chance.choice([length for length in recipe.lengths if length <= recipe.n_ctx - 8 - gap])
    end = gap + length
    order = list(range(end))
    determined = [False] * end
    while len(order) < recipe.n_ctx - 1:
        start = chance.randint(gap, end - 2)
        piece = range(start, min(start + chance.randint(2, 16), end))
        order += piece
        determined += [False] + [True] * (len(piece) - 1)
    return order[: recipe.n_ctx - 1], determined[: recipe.n_ctx - 1]


def head_norms(model: HookedTransformer) -> Tensor:
    """Return the norm of each head's `W_O`, [layer head]."""
    return torch.linalg.vector_norm(model.W_O, dim=(-2, -1))


def train(recipe: Recipe) -> tuple[HookedTransformer, float]:
    """Return the trained model, and its loss on determined tokens, the mean of the last hundred steps."""
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
    matrices = [value for name, value in model.named_parameters() if ".W_" in name]
    others = [value for name, value in model.named_parameters() if ".W_" not in name]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / recipe.warmup, max(0.02, 1 - step / recipe.steps))
    )
    losses = []
    bar = tqdm(zip(range(recipe.steps), training_batches(recipe), strict=False), total=recipe.steps)
    for step, (tokens, determined) in bar:
        logits = model(tokens)
        loss = F.cross_entropy(logits[:, :-1][determined], tokens[:, 1:][determined])
        optimizer.zero_grad()
        (loss + recipe.head_penalty * (head_norms(model) + 1e-3).sqrt().sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {losses[-1]:.3f}")
    return model, sum(losses[-100:]) / len(losses[-100:])


CARD = """\
# {name}

A transformer with two layers of attention and no MLPs that continues repeats in random tokens, by a previous-token
head in layer 0 and an induction head in layer 1. It is a model to study, not to use: it has no tokenizer and reads
tokens only, 0 to {last_token}, of which 0 is the start token that every sequence begins with.

    HookedTransformer.from_pretrained("{name}")

`hooked-lm demo` finds its circuit and tests it.

## Architecture

{n_parameters:,} parameters in float32: 2 layers, {recipe.n_heads} heads each, `d_model` {recipe.d_model}, `d_head`
{recipe.d_head}, LayerNorm, learned positions (`n_ctx` {recipe.n_ctx}), vocabulary {recipe.d_vocab}.

## Training

Made by `scripts/train_induction_demo.py`.

- Seed: {recipe.seed}, for the initial weights and the data.
- Data: rows of {recipe.n_ctx} tokens: the start token, some fresh random tokens, a block of random tokens, and
  then pieces of that block, each from a random place and of random length, until the row is full. The number of fresh
  tokens and the length of the block ({shortest} to {longest}) are random. So neither a position nor a distance tells
  what comes next. Block lengths {held_out} are held out, and a piece has 16 tokens at most.
- Loss: on the tokens that are determined, those within a piece. What fresh tokens get is not trained.
- Steps: {recipe.steps} of {recipe.batch} rows; AdamW, peak learning rate {recipe.learning_rate:g} after {recipe.warmup}
  steps, then a straight line down; weight decay {recipe.weight_decay:g}. {minutes:.1f} minutes on one CPU core.
- A penalty of {recipe.head_penalty:g} times the sum over heads of the square root of `||W_O||` lets heads that are not
  needed fade. One is left in each layer; without the penalty, several share each role.
- Final loss, mean over the last hundred steps: {loss:.4f} nats (a guess costs {guess:.3f}).

## Measured

On {result.batch} sequences for each length (seed {result.seed}): a block of random tokens, then the same again. The
second half is the tokens of the repeat but its first, which nothing announces.

- Second-half accuracy at the lengths held out: {accuracy}.
- Log-probability at length {result.length}: {result.first_half.log_prob:.3f} in the first half,
  {result.second_half.log_prob:.4f} in the second.
- {previous}: previous-token score {result.previous_token_score:.3f}. {induction}: induction score
  {result.induction_score:.3f}.
- K-composition of the pair: {result.pair_composition:.3f}; the other writers of layer 0 reach {runner_up:.3f} at most.
- Top-1 accuracy of the pair's full QK circuit, from the weights alone: {result.circuit_accuracy:.1%}.

| second half at length {result.length} | loss (nats) | accuracy |
|---|---|---|
{ablations}

## Limits

It does one thing. It models no language, and refuses more than {recipe.n_ctx} tokens. Licence: the library's.
"""


def model_card(recipe: Recipe, result: DemoResult, loss: float, minutes: float) -> str:
    """Return the model card, with what was measured."""
    column = result.k_composition[:, result.induction_head[1]].tolist()
    column.pop(result.previous_token_head[1])
    return CARD.format(
        name=MODEL,
        recipe=recipe,
        result=result,
        n_parameters=result.n_parameters,
        last_token=recipe.d_vocab - 1,
        shortest=min(recipe.lengths),
        longest=max(recipe.lengths),
        held_out=", ".join(str(length) for length in HELD_OUT_LENGTHS),
        minutes=minutes,
        loss=loss,
        guess=math.log(recipe.d_vocab),
        accuracy=", ".join(f"{length}: {value:.1%}" for length, value in result.accuracy_by_length.items()),
        previous=label(result.previous_token_head),
        induction=label(result.induction_head),
        runner_up=max(column),
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
    model, loss = train(recipe)
    minutes = (time.perf_counter() - start) / 60
    model.save_pretrained(arguments.out)
    result = run_demo(arguments.out)
    (arguments.out / "README.md").write_text(model_card(recipe, result, loss, minutes))
    print(f"{minutes:.1f} minutes; loss {loss:.4f}; head norms {head_norms(model).tolist()}")
    print(f"accuracy at held-out lengths: {result.accuracy_by_length}")
    print(
        f"previous-token scores {result.previous_token_scores.tolist()}, induction {result.induction_scores.tolist()}"
    )
    print(f"K-composition {result.k_composition.tolist()}, circuit {result.circuit_accuracy}")
    print(*result.ablations, sep="\n")


if __name__ == "__main__":
    main()
