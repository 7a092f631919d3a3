"""The script that trained the bundled model: the weights follow from the seed, and the card says what was done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hooked_lm import HookedTransformer, bundled
from hooked_lm.tasks import get_task, greater_than
from hooked_lm.training import train
from scripts import train_tasks_demo as script

MODEL = "demo-tasks-4l"


def trained(seed: int) -> HookedTransformer:
    recipe = replace(script.Recipe(), steps=3, warmup=1, rows=2, early_steps=1, d_model=24, seed=seed)
    model = script.new_model(recipe)
    train(model, script.training_batches(recipe, model), recipe.training, None, script.weighted_loss, verbose=False)
    return model


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, again, other = (trained(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["embed.W_E"], other["embed.W_E"])


def test_the_bundled_card_is_the_templates_but_for_what_was_measured() -> None:
    recipe, model = script.Recipe(), HookedTransformer.from_pretrained_no_processing(MODEL)
    measured = script.evaluate(model, 20)
    record = {"step": 1.0, "loss": 0.5, "cpu_minutes": 1.0, **measured}
    made = script.model_card(recipe, model, [record], measured, "A note.").splitlines()
    folder = bundled.find(MODEL)
    assert folder is not None
    shipped = (Path(folder) / "README.md").read_text().splitlines()
    for line in made:
        if line.startswith(("|", "- Greater-than", "- Repeated", "- Final loss", "  0.05 on matrices", "  A note.")):
            continue
        assert line in shipped


def test_no_answer_without_examples_can_be_right_more_often_than_the_cards_ceiling() -> None:
    assert script.zero_shot_ceiling() == pytest.approx(0.698, abs=5e-4)
    model = HookedTransformer.from_pretrained(MODEL)
    assert script.evaluate(model, 200)["relations, 0 shots: top"] < 0.698


def test_the_bundled_model_is_as_good_as_its_card_says() -> None:
    model = HookedTransformer.from_pretrained(MODEL)
    years = get_task("greater_than").examples(script.AT_THE_END, script.TEST_SEED)
    logits = model(years.tokens(model).clean, logits_to_keep=1)[:, -1]
    mass = greater_than.probability_above(logits, years, model.tokenizer).mean().item()
    folder = bundled.find(MODEL)
    assert folder is not None
    assert f"- Greater-than: {mass:.1%} of the probability" in (Path(folder) / "README.md").read_text()
