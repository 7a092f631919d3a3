"""Train the bundled model `demo-tasks-4l` and write its folder: weights, config, tokenizer and model card.

    python scripts/train_tasks_demo.py --out FOLDER [--work FOLDER] [--seed N] [--note TEXT]

The model learns five tasks with known answers, from text that never shows the combinations it is tested on. Takes 73
minutes of CPU time. With `--work`, a run that is killed goes on where it was when it is started again. The same seed
gives the same weights on the same machine, threads and version of torch; elsewhere sums are rounded otherwise, and the
weights are others that do the same.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config

from hooked_lm import HookedTransformer, HookedTransformerConfig
from hooked_lm.circuits.induction import repeated_random_tokens
from hooked_lm.tasks import TaskBatches, TaskSet, get_task, greater_than, lexicon, score, word_tokenizer
from hooked_lm.tasks.mixture import EARLY_SHARES, SHARES
from hooked_lm.tasks.words import CAPITALS, RELATIONS
from hooked_lm.training import Record, TrainingConfig, train
from weight_conversion.export import export

MODEL = "demo-tasks-4l"
TEST_SEED = 1000
THREADS = 2
EMBEDDING_STD, POSITION_SIZE = 0.1, 0.2
WHILE_TRAINING, AT_THE_END = 100, 500


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained model.

    Attributes:
        seed: of the initial weights and of the data.
        rows, width: rows in a batch, and tokens in a row.
        steps, lr, warmup, final_lr, weight_decay: as in `TrainingConfig`.
        early_steps: those that show more of what is learned from the context alone.
    """

    seed: int = 0
    n_layers: int = 4
    d_model: int = 192
    n_heads: int = 6
    n_ctx: int = 128
    rows: int = 24
    width: int = 128
    steps: int = 5500
    lr: float = 2e-3
    warmup: int = 100
    final_lr: float = 0.02
    weight_decay: float = 0.05
    early_steps: int = 800

    @property
    def training(self) -> TrainingConfig:
        """The trainer's part."""
        return TrainingConfig(
            steps=self.steps,
            batch=self.rows,
            lr=self.lr,
            warmup=self.warmup,
            final_lr=self.final_lr,
            weight_decay=self.weight_decay,
            betas=(0.9, 0.98),
            seed=self.seed,
            log_every=50,
            evaluate_every=250,
            checkpoint_every=50,
        )


def new_model(recipe: Recipe) -> HookedTransformer:
    """Return the untrained model with its tokenizer: GPT-2's architecture, whose unembedding has no bias."""
    tokenizer = word_tokenizer(lexicon())
    cfg = HookedTransformerConfig(
        n_layers=recipe.n_layers,
        d_model=recipe.d_model,
        n_heads=recipe.n_heads,
        n_ctx=recipe.n_ctx,
        d_vocab=len(tokenizer),
        act_fn="gelu_new",
        tie_word_embeddings=True,
        seed=recipe.seed,
        model_name=MODEL,
        original_architecture="GPT2LMHeadModel",
    )
    model = HookedTransformer(cfg, tokenizer)
    model.unembed.b_U.requires_grad_(False)
    with torch.no_grad():
        model.embed.W_E.normal_(0.0, EMBEDDING_STD, generator=torch.Generator().manual_seed(recipe.seed))
        model.pos_embed.W_pos.copy_(sinusoids(recipe.n_ctx, recipe.d_model))
    return model


def sinusoids(n_ctx: int, d_model: int) -> Tensor:
    """Return waves of 4 to `n_ctx` and some positions [pos d_model], for the position embeddings to start from.

    One linear map then leads from any position to the one before, which is what an induction circuit needs first.
    """
    angles = torch.arange(n_ctx)[:, None] * torch.logspace(math.log10(1.5), math.log10(4.5 / n_ctx), d_model // 2)
    return POSITION_SIZE * torch.cat((angles.sin(), angles.cos()), dim=1)


def training_batches(recipe: Recipe, model: HookedTransformer) -> TaskBatches:
    """Return the recipe's data."""
    return TaskBatches(model.tokenizer, recipe.rows, recipe.width, recipe.seed, early_steps=recipe.early_steps)


def weighted_loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean next-token loss over the tokens that count, in nats."""
    tokens, weights = batch
    losses = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    counted = weights[:, 1:].flatten()
    return (losses * counted).sum() / counted.sum()


def held_out_sets(n: int) -> dict[str, TaskSet]:
    """Return the sets that the model is tested on, of at most `n` examples each."""
    ioi, capitals, relations = get_task("ioi"), get_task("capitals"), get_task("relations")
    countries = min(n, len(CAPITALS))
    return {
        "ioi, abba": ioi.examples(n, TEST_SEED, order="abba"),
        "ioi, baba": ioi.examples(n, TEST_SEED, order="baba"),
        "capitals": capitals.examples(countries, TEST_SEED),
        "capitals, 2 shots": capitals.examples(countries, TEST_SEED, shots=2),
        "relations, 5 shots": relations.examples(n, TEST_SEED),
        **{f"{one}, 5 shots": relations.examples(n // 2, TEST_SEED, relation=one) for one in RELATIONS},
        "relations, 1 shot": relations.examples(n, TEST_SEED, shots=1),
        "relations, 0 shots": relations.examples(n, TEST_SEED, shots=0),
        "repeated words": get_task("repeated_tokens").examples(n, TEST_SEED),
    }


@torch.no_grad()
def evaluate(model: Any, n: int) -> Record:
    """Return the figures on what training never shows.

    `top` is the share whose answer has the highest logit of all tokens, `above` the share where it has a higher one
    than the wrong answer, `mass` the probability of the later years.
    """
    found: Record = {}
    for name, examples in held_out_sets(n).items():
        result = score(model, examples)
        found |= {f"{name}: top": result.top, f"{name}: above": result.preferred}
    years = get_task("greater_than").examples(n, TEST_SEED)
    logits = model(years.tokens(model).clean, logits_to_keep=1)[:, -1]
    found["greater_than: mass"] = greater_than.probability_above(logits, years, model.tokenizer).mean().item()
    for length in (10, 20, 50):
        generator = torch.Generator().manual_seed(TEST_SEED)
        tokens = repeated_random_tokens(30, length, model.cfg.d_vocab, generator)
        # The first token of the repeat is announced by nothing.
        right = model(tokens)[:, length + 1 : -1].argmax(-1) == tokens[:, length + 2 :]
        found[f"repeated tokens, {length}: top"] = right.double().mean().item()
    return found


def zero_shot_ceiling() -> float:
    """Return the best accuracy on queries without examples: each word's likeliest answer over the relations."""
    chances: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for table in RELATIONS.values():
        for query, answer in table.items():
            chances[query][answer] += 1 / len(table) / len(RELATIONS)
    return sum(max(answers.values()) for answers in chances.values())


def cpu_minutes(records: list[Record]) -> float:
    """Return the processor time of the whole run, which may have been several processes."""
    total = before = 0.0
    for now in (record["cpu_minutes"] for record in records if "cpu_minutes" in record):
        total += now - before if now >= before else now
        before = now
    return total


def write_model(model: HookedTransformer, folder: Path) -> None:
    """Write weights and config in HuggingFace's format, and the tokenizer."""
    config = GPT2Config(
        vocab_size=model.cfg.d_vocab,
        n_positions=model.cfg.n_ctx,
        n_embd=model.cfg.d_model,
        n_layer=model.cfg.n_layers,
        n_head=model.cfg.n_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    origin = config.to_dict() | {"architectures": ["GPT2LMHeadModel"]}
    export(model.cfg, model.state_dict(), origin, folder)
    # safetensors writes a file that only its owner may read.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode & 0o777)
    word_tokenizer(lexicon()).save_pretrained(folder)


CARD = """\
# {name}

A small GPT-2, {recipe.n_layers} layers and {millions:.1f} M parameters, that has learned five tasks with known answers.
It is a model to study, not to use: it knows the words of the tasks and nothing else.

    model = HookedTransformer.from_pretrained("{name}")
    examples = hooked_lm.tasks.get_task("ioi").examples(100)

## Tasks

| task | prompt | answer |
|---|---|---|
{examples}

## Architecture

GPT-2's, in float32 and HuggingFace's format: {n_parameters:,} parameters, {recipe.n_layers} layers, {recipe.n_heads}
heads each, `d_model` {recipe.d_model}, `d_mlp` {d_mlp}, learned positions (`n_ctx` {recipe.n_ctx}), embedding and
unembedding tied.

The tokenizer is a byte-level BPE made for the tasks, {d_vocab} tokens: each of their words is one token with the space
in front of it, a year is two (" 17" and "32"), and `<|endoftext|>`, token 0, stands before every text. Other text is
spelled in pieces, which the model has not learned to read.

## Training

Made by `scripts/train_tasks_demo.py`; the text is from `hooked_lm.tasks`.

- Seed: {recipe.seed}, for the initial weights and the data.
- Data: rows of {recipe.width} tokens packed with documents. Of 100 documents,
  {shares}. In the first {recipe.early_steps} steps, which are for induction,
  {early}, of an alphabet of {early_alphabet} tokens.
- Start: GPT-2's, but for embeddings, drawn with a deviation of {embedding_std:g}, and positions, which start as
  sinusoids: without, induction begins much later.
- Loss: the next token's, on all tokens but those of random sequences that nothing before them determines.
- Steps: {recipe.steps} of {recipe.rows} rows, {tokens:.1f} M tokens. AdamW (betas 0.9 and 0.98), learning rate up to
  {recipe.lr:g} in {recipe.warmup} steps and down to {recipe.final_lr:g} of it by half a cosine; weight decay
  {recipe.weight_decay:g} on matrices, gradients clipped at 1. {minutes:.0f} minutes of CPU time, on two cores.{note}
- Final loss, mean over the last 50 steps: {loss:.4f} nats. Much of it cannot be learned: which name, object or country
  comes next in a text is drawn at random.

What the sentences of training never show, by construction: two names of a held-out pair in one of them (one pair of
8); a country with its held-out way of asking (one of 4); a query after a held-out word in its relation (one of 8); an
event that starts in a held-out year (one of 5). Random tokens may be any. Of them a block whose length 5 divides is
never repeated as a whole; pieces of longer blocks, up to 20 tokens, come again in any length.

## Measured, on what training never shows

*Top*: the answer has the highest logit of all {d_vocab} tokens. *Above*: it has a higher logit than the wrong answer
(the other name, another country's capital, the word's answer in another relation; for relations with 0 shots, where
no relation is shown, and for words of one relation, another word's answer). The same prompts each time, drawn with
seed {test_seed}. Training has only the prompts of "relations, 0 shots".

| set | examples | top | above |
|---|---|---|---|
{scores}

- Greater-than: {mass:.1%} of the probability is on later years ({at_the_end} prompts).
- Repeated random tokens, any of the vocabulary, 30 sequences each, accuracy in the second half: {repeated}.
- "relations, 0 shots" is the query alone. Most words take part in several relations: the best that any model could do
  is {ceiling:.1%}.

## As it learned

After step {recipe.early_steps} the mixture is another: losses before and after do not compare.
On {while_training} examples each; relations with 5 shots; repeats of {curve_length} tokens.

| step | loss | ioi, abba | ioi, baba | capitals | relations | later years | repeated tokens |
|---|---|---|---|---|---|---|---|
{curve}

## Limits

- It models no language. Names, places and words outside the lists in `hooked_lm/tasks/words.py` are unknown to it.
- Capitals and word pairs are facts it has memorised; held out is only how they are asked for.
- Sentences follow few templates, so it may lean on regularities that a model of real text could not.
- More than {recipe.n_ctx} tokens are refused.

Licence: the library's.
"""


def model_card(recipe: Recipe, model: HookedTransformer, records: list[Record], figures: Record, note: str = "") -> str:
    """Return the model card, with what was measured, and a note on how these weights were made."""
    n_parameters = sum(value.numel() for name, value in model.named_parameters() if name != "unembed.b_U")
    return CARD.format(
        name=MODEL,
        recipe=recipe,
        n_parameters=n_parameters,
        millions=n_parameters / 1e6,
        d_mlp=model.cfg.d_mlp,
        d_vocab=model.cfg.d_vocab,
        examples="\n".join(_example_row(name) for name in ("ioi", "capitals", "relations", "greater_than")),
        embedding_std=EMBEDDING_STD,
        early=_listed(EARLY_SHARES),
        early_alphabet=len(training_batches(recipe, model).early_alphabet),
        note=f"\n  {note}" if note else "",
        ceiling=zero_shot_ceiling(),
        shares=_listed(SHARES),
        tokens=recipe.steps * recipe.rows * recipe.width / 1e6,
        minutes=cpu_minutes(records),
        loss=records[-1]["loss"],
        test_seed=TEST_SEED,
        scores="\n".join(
            f"| {name} | {len(examples)} | {figures[f'{name}: top']:.1%} | {figures[f'{name}: above']:.1%} |"
            for name, examples in held_out_sets(AT_THE_END).items()
        ),
        mass=figures["greater_than: mass"],
        at_the_end=AT_THE_END,
        repeated=", ".join(f"{length}: {figures[f'repeated tokens, {length}: top']:.1%}" for length in (10, 20, 50)),
        while_training=WHILE_TRAINING,
        curve_length=50,
        curve=_curve(records),
    )


def _listed(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{share:g} are {name.replace('_', ' ')}" for name, share in shares.items())


def _example_row(name: str) -> str:
    example = get_task(name).examples(1, TEST_SEED).examples[0]
    answer = "a later number" if name == "greater_than" else f'"{example.answer}"'
    prompt = example.prompt.replace("\n", "\\n")
    return f'| `{name}` | "{prompt}" | {answer} |'


def _curve(records: list[Record]) -> str:
    """A row for every thousand steps, and for the first ones, in which most happens."""
    columns = (
        *("ioi, abba: top", "ioi, baba: top", "capitals: top", "relations, 5 shots: top", "greater_than: mass"),
        "repeated tokens, 50: top",
    )
    shown = [r for r in records if columns[0] in r and (r["step"] <= 2000 or r["step"] % 1000 == 0)]
    return "\n".join(
        f"| {record['step']:.0f} | {record['loss']:.3f} | " + " | ".join(f"{record[c]:.1%}" for c in columns) + " |"
        for record in shown
    )


def metrics_while_training(model: Any) -> Mapping[str, float]:
    return evaluate(model, WHILE_TRAINING) | {"cpu_minutes": time.process_time() / 60}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write, once the model is trained")
    parser.add_argument("--work", type=Path, help="where checkpoints and metrics are kept; by default nowhere")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--note", default="", help="a sentence for the model card on how these weights were made")
    arguments = parser.parse_args()
    # The number of threads decides the order in which sums are formed: the same number, the same weights.
    torch.set_num_threads(THREADS)
    recipe = replace(Recipe(), seed=arguments.seed, steps=arguments.steps)
    model = new_model(recipe)
    batches = training_batches(recipe, model)
    records = train(model, batches, recipe.training, arguments.work, weighted_loss, metrics_while_training)
    # A folder beside the one asked for takes its place when all of it is there.
    part = arguments.out.with_name(f"{arguments.out.name}.part")
    write_model(model, part)
    figures = evaluate(HookedTransformer.from_pretrained(part), AT_THE_END)
    (part / "README.md").write_text(model_card(recipe, model, records, figures, arguments.note))
    shutil.rmtree(arguments.out, ignore_errors=True)
    part.rename(arguments.out)
    print(*(f"{name:40} {value:.4f}" for name, value in figures.items()), sep="\n")


if __name__ == "__main__":
    main()
